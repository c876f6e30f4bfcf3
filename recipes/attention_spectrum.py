"""Masked language whose test also looks at the attention: how much of it few singular values hold."""

from typing import Any

from torch import Tensor, nn

from ..viz import attention_spectrum, capture_attention
from .masked_language import MaskedLanguage
from .settings import TextSettings


class SpectrumOfLanguage(MaskedLanguage):
    """`MaskedLanguage`, with the spectrum of each layer's and head's attention over the test's first batch.

    Logs "test/top_quarter" too: the share of the largest quarter of the singular values, over layers and
    heads.

    Reference:
        Wang, Li, Khabsa, Fang, Ma. Linformer: Self-Attention with Linear Complexity. arXiv:2006.04768, 2020.
        Section 3 and figure 1.
    """

    def __init__(self, model: nn.Module, settings: TextSettings) -> None:
        super().__init__(model, settings)
        self.spectrum: list[Tensor] = []

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        if batch_idx:
            super().test_step(batch, batch_idx)
            return
        with capture_attention(self.model) as record:
            super().test_step(batch, batch_idx)
        self.spectrum = [attention_spectrum(weights) for weights in record.last()]

    def on_test_epoch_end(self) -> None:
        quarter = max(self.spectrum[0].shape[-1] // 4, 1)
        shares = [layer[:, quarter - 1].mean() for layer in self.spectrum]
        self.log("test/top_quarter", sum(shares) / len(shares))

    def evidence(self) -> dict[str, Any]:
        rounded = [[[round(x, 4) for x in head] for head in layer.tolist()] for layer in self.spectrum]
        return super().evidence() | {"spectrum": rounded}
