"""The keys and values of earlier steps, for decoding step by step."""

import torch
from torch import Tensor


class KeyValueCache:
    """Keeps the projected keys and values of one attention layer between the steps of a decoder.

    Give the same cache to the same layer at each step, with the new tokens alone: the outputs equal those of
    one pass over all tokens. A cache grows by doubling, so that n steps copy O(n) and not O(n²) elements;
    where gradients are wanted it appends instead, since a tensor that a graph has saved may not be written
    into.

    Shape:
        - keys, values: (B, H, L, D), L the steps so far; None before the first

    Source:
        Shazeer. Fast Transformer Decoding: One Write-Head is All You Need. 2019. Section 2.4, incremental
        attention.

    Example:
        >>> attention = MultiHeadAttention(8, num_heads=2).eval()
        >>> tokens, cache = torch.randn(1, 5, 8), KeyValueCache()
        >>> steps = [attention(tokens[:, i : i + 1], is_causal=True, cache=cache) for i in range(5)]
        >>> torch.allclose(torch.cat(steps, 1), attention(tokens, is_causal=True), atol=1e-6)
        True
    """

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self.length = 0

    @property
    def keys(self) -> Tensor | None:
        return None if self._keys is None else self._keys[:, :, : self.length]

    @property
    def values(self) -> Tensor | None:
        return None if self._values is None else self._values[:, :, : self.length]

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends the new steps and returns all, each (B, H, L, D).

        Raises:
            ValueError: the new ones have another batch size, number of heads or head size than those kept.
        """
        if self._keys is None or self._values is None:
            self._keys, self._values = keys, values
            self.length = keys.shape[2]
            return keys, values
        for name, kept, new in ("keys", self._keys, keys), ("values", self._values, values):
            if kept.shape[:2] != new.shape[:2] or kept.shape[3] != new.shape[3]:
                raise ValueError(
                    f"{name} must be (B, H, L, D) like those kept, "
                    f"{tuple(kept.shape)} but for L, got {tuple(new.shape)}"
                )
        self._keys, self._values = self._append(self._keys, keys), self._append(self._values, values)
        self.length += keys.shape[2]
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def reorder(self, rows: Tensor) -> None:
        """Keeps the batch rows at the indices `rows` (B',), in that order: a beam search's step."""
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys.index_select(0, rows), self._values.index_select(0, rows)

    def crop(self, length: int) -> None:
        """Forgets all steps but the first `length`.

        Raises:
            ValueError: there are fewer.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"length must be between 0 and the {self.length} steps kept, got {length}")
        if self._keys is not None and self._values is not None:
            # Cut, not only forgotten: what a caller holds of the later steps must not be written into.
            self._keys, self._values = self._keys[:, :, :length], self._values[:, :, :length]
        self.length = length

    def _append(self, kept: Tensor, new: Tensor) -> Tensor:
        filled, wanted = self.length, self.length + new.shape[2]
        if torch.is_grad_enabled():  # a graph may have saved what is kept: it must not be written into
            return torch.cat([kept[:, :, :filled], new], dim=2)
        if kept.shape[2] < wanted:
            grown = kept.new_empty(*kept.shape[:2], max(wanted, 2 * filled), kept.shape[3])
            grown[:, :, :filled] = kept[:, :, :filled]
            kept = grown
        kept[:, :, filled:wanted] = new
        return kept


def check_cached(key_mask: Tensor | None, is_causal: bool) -> None:
    """What an attention in chunks can honour beside a cache."""
    if not is_causal:
        raise ValueError("is_causal must be set with a cache, got is_causal=False")
    if key_mask is not None:
        raise ValueError("key_mask must be None with a cache: all tokens that are kept take part")
