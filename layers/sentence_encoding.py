"""Sentences as weighted sums of their words (Sukhbaatar et al., 2015, section 4.1)."""

from typing import Literal

import torch
from torch import Tensor, nn

from ..kernels.checks import check_mask


class SentenceEncoding(nn.Module):
    """Sums the embedded words of a sentence, each channel weighted by the word's place.

    .. math:: m = \\sum_{j=1}^{J} l_j \\odot x_j, \\qquad
              l_{kj} = \\left(1 - \\frac jJ\\right) - \\frac kd \\left(1 - \\frac{2j}J\\right)

    for channel k of d = `dim` and word j of J, both from 1. So the order of the words counts, which in a bag
    of words it does not. The other forms are

    .. math:: l_{kj} = 1 + \\frac{4}{dJ} \\left(k - \\frac{d+1}2\\right) \\left(j - \\frac{J+1}2\\right)

    ("code", which the authors ran: its mean is 1, and it is nearly twice the printed formula, whose mean is
    about 1/2) and 1 ("bag"). J is the number of words of each sentence, and j counts only those in
    `word_mask`: padding on either side changes nothing. The released code has one J for all sentences and
    counts the columns, padding among them: `max_words` does that.

    No library has this layer; ports write one table of weights for the padded length. There are no parameters
    and no buffers. Time and memory O(J C) for each sentence.

    Args:
        dim: C, channels of a word.
        form: "paper", "code" or "bag".
        max_words: J of every sentence, whose word in column j is then word j; by default each has its own.

    Shape:
        - words: (..., J, dim)
        - word_mask: (..., J) of bool, True where a word takes part
        - output: (..., dim); zero for a sentence without words

    Raises:
        ValueError: `form` is unknown; the words have not `dim` channels, or are more than `max_words`;
            `word_mask` is not boolean or does not fit.

    Reference:
        Sukhbaatar, Szlam, Weston, Fergus. End-To-End Memory Networks. NIPS 2015. Section 4.1.

    Example:
        >>> encoding = SentenceEncoding(8)
        >>> encoding(torch.randn(2, 5, 7, 8)).shape  # two stories of five sentences of seven words
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        dim: int,
        *,
        form: Literal["paper", "code", "bag"] = "paper",
        max_words: int | None = None,
    ) -> None:
        super().__init__()
        if form not in ("paper", "code", "bag"):
            raise ValueError(f"form must be 'paper', 'code' or 'bag', got {form!r}")
        self.dim, self.form, self.max_words = dim, form, max_words

    def forward(self, words: Tensor, word_mask: Tensor | None = None) -> Tensor:
        if words.ndim < 2 or words.shape[-1] != self.dim:
            raise ValueError(f"words must be (..., J, {self.dim}), got {tuple(words.shape)}")
        check_mask("word_mask", word_mask, tuple(words.shape[:-1]))
        if word_mask is None:
            return (words * self.weights(words.shape[-2], like=words)).sum(-2)
        # The weights of each sentence are never stored.
        places, channels = self.factors(words.shape[-2], word_mask, like=words)
        return ((places @ words) * channels).sum(-2)

    def weights(
        self, num_words: int, word_mask: Tensor | None = None, *, like: Tensor | None = None
    ) -> Tensor:
        """l: (num_words, dim), or (..., num_words, dim) where a `word_mask` gives sentences of their own."""
        places, channels = self.factors(num_words, word_mask, like=like)
        terms = [p.unsqueeze(-1) * c for p, c in zip(places.unbind(-2), channels, strict=True)]
        return sum(terms[1:], terms[0])

    def factors(
        self, num_words: int, word_mask: Tensor | None = None, *, like: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Places (..., R, num_words) and channels (R, dim) whose products, summed over R, are the weights.

        R is 1 for a bag and 2 otherwise: weights of all words in a batch need never be stored. They have the
        dtype and the device of `like`, or torch's defaults and the mask's device.
        """
        if self.max_words is not None and num_words > self.max_words:
            raise ValueError(f"num_words must be at most max_words={self.max_words}, got {num_words}")
        dtype = torch.get_default_dtype() if like is None else like.dtype
        device = (None if word_mask is None else word_mask.device) if like is None else like.device
        wide = torch.promote_types(dtype, torch.float32)
        k = torch.arange(1, self.dim + 1, device=device, dtype=wide)
        j = torch.arange(1, num_words + 1, device=device, dtype=wide)
        total: Tensor | int = num_words if self.max_words is None else self.max_words
        if word_mask is not None and self.max_words is None:
            j, total = word_mask.cumsum(-1).to(wide), word_mask.sum(-1, keepdim=True).clamp(min=1)
        one = torch.ones_like(j)
        if self.form == "bag":
            places, channels = [one], [torch.ones_like(k)]
        elif self.form == "code":
            places = [one, (j - (total + 1) / 2) / total]
            channels = [torch.ones_like(k), (k - (self.dim + 1) / 2) * (4 / self.dim)]
        else:
            places = [1 - j / total, 2 * j / total - 1]
            channels = [torch.ones_like(k), k / self.dim]
        by_place = torch.stack(places, -2)
        if word_mask is not None:
            by_place = by_place * word_mask.unsqueeze(-2)
        return by_place.to(dtype), torch.stack(channels).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, form={self.form!r}, max_words={self.max_words}"
