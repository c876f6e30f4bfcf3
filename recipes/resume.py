"""Exact resume: a run that was killed at any moment and started again ends with the same bits.

Three things make it so. Every draw is a function of the seed and the epoch alone: `EpochSeeds` sets all
generators at the start of each epoch, so that no generator's state has to survive. A checkpoint is written
after each epoch, whole or not at all, and read with a check of every byte. What the report shows (curves,
minutes) lives in the checkpoint too, and so cannot disagree with the weights.
"""

import hashlib
import io
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from .errors import RecipeError
from .files import write_bytes


def derive_seed(seed: int, *labels: int | str) -> int:
    """A seed of 32 bits for one purpose, unrelated to that of any other.

    Example:
        >>> from lamina.recipes.resume import derive_seed
        >>> derive_seed(1, "draws", 3) == derive_seed(1, "draws", 3) != derive_seed(1, "draws", 4)
        True
    """
    text = "/".join(map(str, (seed, *labels)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest())


class EpochSeeds(Callback):
    """Starts each epoch from its own seed: order, augmentation, dropout and noise repeat when it does.

    A data module needs nothing for it but to draw from the global generators, as `DataLoader(shuffle=True)`
    does, also in worker processes that are not persistent.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.first = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seed = derive_seed(self.seed, "draws", trainer.current_epoch, trainer.global_rank)
        seed_everything(seed, verbose=False)  # Python's, NumPy's and PyTorch's generators, on every device
        if self.first:
            # The first iterator of a fit was made, and drew its seed, before this; the later ones come after.
            iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
        self.first = False


class History(Callback):
    """What was logged in each epoch, and the seconds spent: in the checkpoint, copied to `metrics.csv`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, list[float]] = {}
        self.seconds = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, value in trainer.callback_metrics.items():
            # A value that is not logged in every epoch is missing, not shifted, in the epochs before.
            past = self.values.setdefault(name, [float("nan")] * trainer.current_epoch)
            past += [float("nan")] * (trainer.current_epoch - len(past)) + [float(value)]
        self.seconds += time.monotonic() - self.started
        rows = zip(*self.values.values(), strict=False)
        lines = [",".join(("epoch", *self.values))]
        lines += [",".join(map(str, (epoch, *row))) for epoch, row in enumerate(rows, 1)]
        write_bytes(self.path, ("\n".join(lines) + "\n").encode())

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.values, self.seconds = state_dict["values"], state_dict["seconds"]


class EpochCheckpoint(Checkpoint):
    """Saves everything after each epoch, in one file that is replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)


class Deadline(Callback):
    """Stops after the epoch in which the time is up: each sitting does at least one, and so gets further."""

    def __init__(self, at: float) -> None:
        self.at = at

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if time.monotonic() >= self.at:
            trainer.should_stop = True


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are written whole or not at all, and never unpickle code.

    Lightning's own goes through a file in the system's temporary folder, whose move to another disk is a copy
    that a kill can cut in two.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_bytes(Path(path), buffer.getvalue())

    def load_checkpoint(
        self, path: Any, map_location: Any | None = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        return load_checkpoint(Path(path))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint and checks every byte of it.

    Raises:
        RecipeError: the file is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself does not look at the checksums
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not {"state_dict", "optimizer_states", "loops", "callbacks"} <= checkpoint.keys():
            raise KeyError("no training state")
    except OSError:
        raise
    except Exception as error:  # zipfile, pickle and torch each have several ways to refuse a file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(
            f"damaged checkpoint {path} ({reason}); --restart begins a new run and leaves this one as it is"
        ) from error
    return dict(checkpoint)
