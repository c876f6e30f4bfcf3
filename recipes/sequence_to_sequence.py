"""The task of models that read one sequence and write another."""

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from ..layers import LabelSmoothingLoss
from .averaging import CheckpointAverage
from .schedules import warmup_then_inverse_root
from .settings import SequenceSettings


class SequenceToSequence(LightningModule):
    """Adam with the Transformer's schedule on label-smoothed cross entropy; tested by what is written.

    A batch is (source, target), integers (B, S) and (B, T), the target from its start token to its end,
    padding behind both. Validation logs the loss of a token without smoothing, whose exponential is the
    perplexity.

    Args:
        model: (source, target without its last token) -> logits; its `config` has `padding_id`, and
            `generate(source, num_beams=, length_penalty=)` gives `Generated`.
        settings: of the recipe.
    """

    def __init__(self, model: nn.Module, settings: SequenceSettings) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        self.padding_id: int = model.config.padding_id  # type: ignore[union-attr,assignment]
        self.loss = LabelSmoothingLoss(settings.label_smoothing, padding_id=self.padding_id)
        self.plain_loss = LabelSmoothingLoss(0.0, padding_id=self.padding_id, reduction="sum")
        self.right, self.written = 0, 0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        source, target = batch
        loss: Tensor = self.loss(self.model(source, target[:, :-1]), target[:, 1:])
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(source))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        source, target = batch
        tokens = int((target[:, 1:] != self.padding_id).sum())
        loss = self.plain_loss(self.model(source, target[:, :-1]), target[:, 1:]) / max(tokens, 1)
        self.log("val/loss", loss, batch_size=tokens)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        source, target = batch
        written = self.write(source)
        width = max(written.shape[1], target.shape[1] - 1)
        written, wanted = (
            F.pad(t, (0, width - t.shape[1]), value=self.padding_id) for t in (written, target[:, 1:])
        )
        self.right += int((written == wanted).all(1).sum())
        self.written += len(source)

    def on_test_epoch_end(self) -> None:
        self.log("test/exact_match", 100 * self.right / max(self.written, 1))

    def write(self, source: Tensor) -> Tensor:
        """The likeliest targets, (B, T), by the search that the settings name."""
        settings = self.settings
        found: Tensor = self.model.generate(  # type: ignore[operator]
            source, num_beams=settings.num_beams, length_penalty=settings.length_penalty
        ).best
        return found

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(
            self.parameters(), lr=self.settings.learning_rate, betas=(0.9, 0.98), eps=1e-9
        )
        warmup = self.settings.warmup_steps
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_then_inverse_root(step + 1, warmup)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_callbacks(self) -> list[Callback]:
        return [CheckpointAverage(self.settings.average_last)]
