"""The task of a language model that writes a sequence a second time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from ..layers import LSHAttention
from .reformer_duplication import DuplicationSettings, name_of
from .schedules import warmup_then_inverse_root


class Duplication(LightningModule):
    """Adam on the cross entropy of the second copy; tested by its tokens, with several numbers of hashes.

    A batch is (B, L) of 0w0w. Nothing is asked of the first copy, which is random. "test/accuracy" is in
    percent, with the hashing that the model was trained with; "test/accuracy_lsh_4" is the same model's with
    four rounds of the settings' chunks, "test/accuracy_full" with one chunk that holds all tokens.

    Args:
        model: ids (B, L) -> logits (B, L, vocab_size), with `LSHAttention` in it.
        settings: of the recipe.
    """

    def __init__(self, model: nn.Module, settings: DuplicationSettings) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        self.right: dict[str, Tensor] = {}
        self.asked = 0

    def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        loss, _ = self._second_copy(ids)
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(ids))
        return loss

    def validation_step(self, ids: Tensor, batch_idx: int) -> None:
        loss, right = self._second_copy(ids)
        self.log("val/loss", loss, batch_size=len(ids))
        self.log("val/accuracy", 100 * right.float().mean(), batch_size=len(ids))

    def on_test_epoch_start(self) -> None:
        self.right, self.asked = {}, 0

    def test_step(self, ids: Tensor, batch_idx: int) -> None:
        self._count("accuracy", ids)
        for rounds in self.settings.test_hashes:
            with hashing(self.model, rounds, self.settings.test_chunk_size or ids.shape[1]):
                self._count(f"accuracy_{name_of(rounds)}", ids)
        self.asked += len(ids) * (ids.shape[1] // 2 - 1)

    def on_test_epoch_end(self) -> None:
        for name, right in self.right.items():
            self.log(f"test/{name}", 100 * right.float() / self.asked)

    def _count(self, name: str, ids: Tensor) -> None:
        right = self._second_copy(ids)[1].sum()
        self.right[name] = self.right[name] + right if name in self.right else right

    def _second_copy(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Its mean loss, and which of its tokens are the likeliest, (B, L / 2 - 1)."""
        start = ids.shape[1] // 2  # where its 0 stands, which tells the first symbol
        logits, wanted = self.model(ids)[:, start:-1], ids[:, start + 1 :]
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten()), logits.argmax(-1) == wanted

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(
            self.parameters(), lr=self.settings.learning_rate, betas=(0.9, 0.98), eps=1e-9
        )
        warmup = self.settings.warmup_steps
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_then_inverse_root(step + 1, warmup)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@contextmanager
def hashing(model: nn.Module, num_hashes: int, chunk_size: int) -> Iterator[None]:
    """Inside the block all hashed layers have so many rounds; 0 is one chunk: attention to every token.

    Rounds that a layer has been trained with stay, as its rotations are of its seed.
    """
    names = ("num_hashes", "chunk_size", "num_buckets")
    layers = [module for module in model.modules() if isinstance(module, LSHAttention)]
    before = [[getattr(layer, name) for name in names] for layer in layers]
    values = (num_hashes, chunk_size, None) if num_hashes else (1, 2**31, 1)
    try:
        for layer in layers:
            for name, value in zip(names, values, strict=True):
                setattr(layer, name, value)
        yield
    finally:
        for layer, kept in zip(layers, before, strict=True):
            for name, value in zip(names, kept, strict=True):
                setattr(layer, name, value)
