"""Maxout (Goodfellow et al., 2013)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Maxout(nn.Module):
    """Of several linear maps of its input, the largest, for each output by itself.

    .. math:: y_o = \\max_{p = 1 \\dots P} \\left( W_{op} \\cdot x + b_{op} \\right)

    An activation that is learned: a convex function of P linear pieces. The gradient goes to the piece that
    wins alone, to the first of them where several are equal. P neighbours of one linear layer are the pieces
    of an output, rows oP … oP + P - 1 of the weight: for P = 2 that is Bahdanau's max over 2j - 1 and 2j, and
    a checkpoint of `nn.Linear(in_features, out_features * pieces)` loads as it is. Where the pieces were
    stored one block behind the other, (P, out) has to be transposed to (out, P).

    PyTorch has no such layer; the usual `view(…, P).max(-1)` is the same function, and keeps an int64 index
    for each output where this keeps P - 1 bytes. Time O(P · in · out) a token.

    Args:
        in_features: channels of x.
        out_features: channels of the output.
        pieces: P.
        bias: whether the pieces have one.
        device: where the parameters are.
        dtype: of the parameters.

    Shape:
        - x: (..., in_features)
        - output: (..., out_features)

    Raises:
        ValueError: `pieces` is less than 1; x has not `in_features` channels.

    Reference:
        Goodfellow, Warde-Farley, Mirza, Courville, Bengio. Maxout Networks. ICML 2013.
        Bahdanau, Cho, Bengio. Neural Machine Translation by Jointly Learning to Align and Translate.
        ICLR 2015. Appendix A.2.2.

    Example:
        >>> maxout = Maxout(8, 5, pieces=3)
        >>> maxout(torch.randn(2, 7, 8)).shape
        torch.Size([2, 7, 5])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        pieces: int = 2,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if pieces < 1:
            raise ValueError(f"pieces must be at least 1, got {pieces}")
        self.in_features, self.out_features, self.pieces = in_features, out_features, pieces
        rows = out_features * pieces
        self.weight = nn.Parameter(torch.empty(rows, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `nn.Linear`: uniform up to 1 / sqrt(in_features)."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must be (..., {self.in_features}), got {tuple(x.shape)}")
        pieces = F.linear(x, self.weight, self.bias).unflatten(-1, (self.out_features, self.pieces))
        if self.pieces == 1:
            return pieces.squeeze(-1)
        largest: Tensor = _Largest.apply(pieces)[0]
        return largest

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, pieces={self.pieces}, bias={self.bias is not None}"


class _Largest(torch.autograd.Function):
    """The maximum over the last dimension, piece by piece: a reduction over so few is slow on a CPU.

    Beside it, for each later piece, where it was larger than all before it: the last of these has won.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(pieces: Tensor) -> tuple[Tensor, ...]:
        largest, *others = pieces.unbind(-1)
        larger = []
        for piece in others:
            larger.append(piece > largest)
            largest = torch.maximum(largest, piece)
        return largest, *larger

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> Tensor:
        later = ctx.saved_tensors
        of_pieces = gradient.new_empty(*gradient.shape, 1 + len(later))
        for p in range(len(later), 0, -1):
            won = gradient * later[p - 1]
            of_pieces[..., p] = won
            gradient = gradient - won
        of_pieces[..., 0] = gradient
        return of_pieces
