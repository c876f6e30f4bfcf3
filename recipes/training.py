"""One seed of a recipe on Lightning: the usual task, the trainer, and resume from a checkpoint."""

import logging
import math
import re
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from .errors import RecipeError
from .progress import EpochProgress
from .recipe import Recipe, SeedResult
from .resume import (
    Deadline,
    EpochCheckpoint,
    EpochSeeds,
    History,
    WholeCheckpoints,
    derive_seed,
    load_checkpoint,
)
from .schedules import warmup_then_cosine
from .settings import Settings


class Classification(LightningModule):
    """Cross entropy with label smoothing, AdamW, linear warm-up and cosine decay; accuracy in percent.

    A batch is (inputs, labels). A recipe that needs other steps or another optimiser overrides them here, or
    brings a LightningModule of its own.

    Args:
        model: inputs -> logits (B, num_classes); its `config` has `num_classes`.
        settings: of the recipe.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        classes: int = model.config.num_classes  # type: ignore[union-attr,assignment]
        # The accuracy is the trace of the confusion matrix: one metric serves both.
        self.validation = MulticlassConfusionMatrix(classes, validate_args=False)
        self.testing = MulticlassConfusionMatrix(classes, validate_args=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        loss = F.cross_entropy(self(inputs), labels, label_smoothing=self.settings.label_smoothing)
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        inputs, labels = batch
        logits = self(inputs)
        self.validation.update(logits, labels)
        self.log("val/loss", F.cross_entropy(logits, labels), batch_size=len(labels))

    def on_validation_epoch_end(self) -> None:
        self.log("val/accuracy", accuracy(self.validation.compute()))
        self.validation.reset()

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        inputs, labels = batch
        self.testing.update(self(inputs), labels)

    def on_test_epoch_end(self) -> None:
        self.confusion = self.testing.compute()
        self.log("test/accuracy", accuracy(self.confusion))

    def evidence(self) -> dict[str, Any]:
        return {"confusion": self.confusion.tolist()}

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim <= 1]  # biases and norms do not decay
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(
            groups, lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay
        )
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = round(steps * self.settings.warmup_epochs / self.settings.epochs)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_then_cosine(step, warmup, steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def accuracy(confusion: Tensor) -> Tensor:
    """Percent of the samples on the diagonal."""
    return 100 * confusion.trace() / confusion.sum()


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Where to train: handed to Lightning's Trainer as it is."""

    accelerator: str = "auto"
    precision: str = "32-true"

    def check(self) -> str:
        """The kind of device that this gives: "cpu", "cuda", ...

        Raises:
            RecipeError: there is no such accelerator here, or it lacks the precision.
        """
        with quiet():
            return str(self.trainer().strategy.root_device.type)

    def trainer(self, **arguments: Any) -> Trainer:
        arguments = {"logger": False, "enable_checkpointing": False} | arguments
        try:
            return Trainer(
                accelerator=self.accelerator,
                precision=self.precision,  # type: ignore[arg-type]
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                **arguments,
            )
        except (MisconfigurationException, ImportError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise RecipeError(
                f"cannot train with --accelerator {self.accelerator} --precision {self.precision}: {reason}"
            ) from error


def train_seed(
    recipe: Recipe,
    model: nn.Module,
    settings: Settings,
    data: LightningDataModule,
    seed: int,
    folder: Path,
    *,
    hardware: Hardware,
    deadline: float = math.inf,
    console: Console,
    label: str = "",
) -> SeedResult | None:
    """Trains from the folder's checkpoint, or from the start, and tests once at the end.

    `label` is what the progress is called by; "seed <seed>" where there is none.

    Returns:
        The result, or None where the deadline came first.

    Raises:
        RecipeError: the checkpoint is damaged or of another model.
    """
    checkpoint = folder / "last.ckpt"
    history = History(folder / "metrics.csv")
    task = recipe.task(model, settings)
    with quiet(), threads(settings.threads):
        trainer = hardware.trainer(
            max_epochs=settings.epochs,
            gradient_clip_val=settings.gradient_clip or None,
            enable_checkpointing=True,
            default_root_dir=folder,
            plugins=[WholeCheckpoints()],
            callbacks=[
                EpochSeeds(seed),
                history,
                Deadline(deadline),
                EpochProgress(label or f"seed {seed}", console),
                EpochCheckpoint(checkpoint),
            ],
        )
        if checkpoint.exists():
            _check_fits(checkpoint, task)
        _fit(trainer, task, data, checkpoint if checkpoint.exists() else None)
        if trainer.current_epoch < settings.epochs:
            return None
        trainer.test(task, datamodule=data, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    evidence: dict[str, Any] = getattr(task, "evidence", dict)()
    return SeedResult(
        seed=seed,
        value=metrics[f"test/{recipe.metric.key}"],
        metrics=metrics,
        history=history.values,
        evidence=evidence,
        minutes=history.seconds / 60,
    )


def measure_seed(recipe: Recipe, settings: Settings, seed: int) -> SeedResult:
    """The result of a recipe that trains nothing."""
    assert recipe.measure is not None
    started = time.monotonic()
    seed_everything(derive_seed(seed, "draws"), verbose=False)
    with quiet(), threads(settings.threads):
        found = recipe.measure(settings, seed)
    metrics = {name: float(value) for name, value in found["metrics"].items()}
    return SeedResult(
        seed=seed,
        value=metrics[f"test/{recipe.metric.key}"],
        metrics=metrics,
        history={},
        evidence=found.get("evidence", {}),
        minutes=(time.monotonic() - started) / 60,
    )


def new_model(recipe: Recipe, overrides: dict[str, Any], seed: int) -> nn.Module:
    """The recipe's model with the initial weights of that seed.

    Raises:
        RecipeError: the model does not take an override.
    """
    from ..models import create_model

    seed_everything(derive_seed(seed, "weights"), verbose=False)
    try:
        return create_model(recipe.model, **{**recipe.model_options, **overrides})
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        if not overrides:
            raise
        raise RecipeError(f"--set model.…: {error}") from error


def _fit(trainer: Trainer, task: LightningModule, data: LightningDataModule, checkpoint: Path | None) -> None:
    main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if main_thread else None
    try:
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:
        # Lightning turns Ctrl-C into an exit and leaves it ignored; the command line has its own word for it.
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None


def _check_fits(checkpoint: Path, task: LightningModule) -> None:
    try:
        task.load_state_dict(load_checkpoint(checkpoint)["state_dict"])
    except RuntimeError as error:
        raise RecipeError(
            f"checkpoint {checkpoint} is of another version of the model; --restart begins a new run"
        ) from error


@contextmanager
def threads(number: int) -> Iterator[None]:
    """So many threads of PyTorch inside the block; 0 changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Lightning without its hints: which devices there are, products to try, workers for data in memory."""
    hints = ("does not have many workers", "GPU available but not used", "`isinstance(treespec, LeafSpec)`")
    loggers = [
        logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning_utilities")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for hint in hints:
                warnings.filterwarnings("ignore", message=f".*{re.escape(hint)}", module=r"lightning\..*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def minutes_from_now(minutes: float | None) -> float:
    """A deadline on the monotonic clock; never, for None."""
    return math.inf if minutes is None else time.monotonic() + 60 * minutes
