"""What a step of training costs: its time and its memory, told in the test beside the loss."""

import statistics
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from .masked_language import MaskedLanguage
from .measuring import Peak, clock, peak_memory
from .settings import TextSettings


class StepCosts(Callback):
    """Logs "test/ms_per_step", the median over all steps, and "test/peak_mb", of the last epoch's first step.

    A step is forward, backward and the optimiser's; the memory is what it holds beyond what was held before,
    so without the parameters, and without the optimiser's state but in the first epoch. The steps whose
    memory is measured, the first of each epoch, are not timed.

    A task hands the same one to Lightning in training and in the test, by `configure_callbacks`.
    """

    def __init__(self) -> None:
        self.milliseconds: list[float] = []
        self.peak_mb = float("nan")
        self.peak = Peak()
        self.measuring = ExitStack()
        self.started = 0.0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self.peak = self.measuring.enter_context(peak_memory())
        self.started = clock()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx:
            self.milliseconds.append(1e3 * (clock() - self.started))
            return
        self.measuring.close()
        self.peak_mb = self.peak.bytes / 2**20

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.measuring.close()

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.milliseconds:
            pl_module.log("test/ms_per_step", statistics.median(self.milliseconds))
        pl_module.log("test/peak_mb", self.peak_mb)

    def state_dict(self) -> dict[str, Any]:
        return {"milliseconds": self.milliseconds, "peak_mb": self.peak_mb}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.milliseconds, self.peak_mb = state_dict["milliseconds"], state_dict["peak_mb"]


class CostedLanguage(MaskedLanguage):
    """`MaskedLanguage`, whose test also tells what a step of its training has cost."""

    def __init__(self, model: nn.Module, settings: TextSettings) -> None:
        super().__init__(model, settings)
        self.costs = StepCosts()

    def configure_callbacks(self) -> list[Callback]:
        return [self.costs]
