"""One bar a seed, over all its epochs; Lightning's own is a bar an epoch, a flicker where it takes 0.2 s."""

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class EpochProgress(Callback):
    """Epochs done, last values of the validation, and time. Off a terminal it prints its last state alone.

    Args:
        title: before the bar.
        console: where to draw.
    """

    def __init__(self, title: str, console: Console) -> None:
        self.bar = Progress(
            TextColumn(f"  {title}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=4,
        )
        self.task = self.bar.add_task("")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.bar.update(self.task, total=trainer.max_epochs, completed=trainer.current_epoch)
        self.bar.start()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = {
            k.removeprefix("val/"): float(v) for k, v in trainer.callback_metrics.items() if "val/" in k
        }
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.bar.update(self.task, completed=trainer.current_epoch + 1, description=shown)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.bar.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.bar.stop()
