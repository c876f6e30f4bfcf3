"""BERT's masked tokens (Devlin et al., 2019): which are hidden, and what stands in their places."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100  # the label of a place that only fills a row


class Masked(NamedTuple):
    """A batch with masked tokens.

    Args:
        ids: (B, L), with masks in it.
        places: (B, P), which tokens are asked for; 0 behind a row's last.
        labels: (B, P), what they were; `IGNORED` behind a row's last.

    Example:
        >>> from lamina.recipes.masking import Masked
        >>> Masked(torch.zeros(2, 9), torch.zeros(2, 1), torch.zeros(2, 1)).places.shape
        torch.Size([2, 1])
    """

    ids: Tensor
    places: Tensor
    labels: Tensor


class MaskTokens:
    """Hides some tokens of each sequence, anew in each call.

    Of every sequence `rate` of its tokens are chosen, one at the least; special tokens never are. Of the
    chosen 80 % become the mask, 10 % a random token of the whole vocabulary, and 10 % stay, by independent
    draws. All draws are from the global generator, or from `generator`.

    The authors' code draws once and repeats the text ten times with other masks; here each call has its own.

    Args:
        vocab_size: V.
        mask_id: of the mask.
        special_ids: of padding, and of what stands at the beginning and end.
        rate: of the tokens that are no special ones.
        shares: of masks and of random tokens; what is left to one stays.
        most: chosen tokens of a sequence at most; no limit where not given.

    Shape:
        - ids: (B, L) of integers
        - output: `Masked`

    Raises:
        ValueError: a rate or share is no probability, or the mask is not in the vocabulary.

    Reference:
        Devlin, Chang, Lee, Toutanova. BERT. NAACL 2019. Section 3.1 and appendix C.2.

    Example:
        >>> from lamina.recipes.masking import MaskTokens
        >>> masked = MaskTokens(50, mask_id=3, special_ids=(0, 1, 2))(torch.tensor([[1, 7, 9, 8, 2, 0]]))
        >>> masked.places.shape
        torch.Size([1, 1])
    """

    def __init__(
        self,
        vocab_size: int,
        mask_id: int,
        *,
        special_ids: Sequence[int] = (),
        rate: float = 0.15,
        shares: tuple[float, float] = (0.8, 0.1),
        most: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if not 0 <= mask_id < vocab_size:
            raise ValueError(f"mask_id must be from 0 to {vocab_size - 1}, got {mask_id}")
        if not 0 < rate <= 1:
            raise ValueError(f"rate must be above 0 and at most 1, got {rate}")
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(f"shares must not be negative, and at most 1 together, got {shares}")
        self.vocab_size, self.mask_id, self.special_ids = vocab_size, mask_id, tuple(special_ids)
        self.rate, self.shares, self.most, self.generator = rate, shares, most, generator

    def __call__(self, ids: Tensor) -> Masked:
        device = ids.device

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=self.generator, device=device)

        eligible = ~torch.isin(ids, torch.tensor(self.special_ids, dtype=ids.dtype, device=device))
        counts = (self.rate * eligible.sum(1)).round().long().clamp(min=1).minimum(eligible.sum(1))
        if self.most is not None:
            counts = counts.clamp(max=self.most)
        width = int(counts.max()) if len(ids) else 0
        # The first so many of the eligible in a random order, then in that of the text.
        order = uniform(*ids.shape).masked_fill(~eligible, 2.0).argsort(1)[:, :width]
        chosen = torch.arange(width, device=device) < counts.unsqueeze(1)
        places = order.masked_fill(~chosen, ids.shape[1]).sort(1).values
        places = places.masked_fill(~chosen, 0)
        labels = ids.gather(1, places)
        draw = uniform(*places.shape)
        other = torch.randint(
            self.vocab_size, places.shape, generator=self.generator, device=device, dtype=ids.dtype
        )
        new = torch.where(draw < self.shares[0], torch.full_like(labels, self.mask_id), labels)
        new = torch.where((draw >= self.shares[0]) & (draw < sum(self.shares)), other, new)
        rows = torch.arange(len(ids), device=device).unsqueeze(1).expand_as(places)
        hidden = ids.clone()
        hidden[rows[chosen], places[chosen]] = new[chosen]
        return Masked(hidden, places, labels.masked_fill(~chosen, IGNORED))
