"""Token embedding, for the input and, tied, for the output (Vaswani et al., 2017, section 3.4)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenEmbedding(nn.Module):
    """A learned vector for each token id; `logits` scores a vector against all of them.

    .. math:: x_t = s \\, E_{w_t}, \\qquad \\operatorname{logits}(h) = h E^\\top

    s is sqrt(dim) with `scale`, as in the Transformer, and 1 without. The logits are never scaled: one table
    serves as input and as output.

    It is `nn.Embedding` with another start, N(0, 1/dim) in place of N(0, 1), and a padding row that stays
    what it is: in `nn.Embedding` it gets a gradient through a tied output, and `nn.init` on the weight leaves
    it random. Here it is zero, and gets no gradient from `forward` nor from `logits`, so a padding token's
    logit is 0. A checkpoint of `nn.Embedding` loads as it is. `forward` copies L rows of the table; its
    gradient is dense, as large as the table. `logits` takes 2 · dim · vocab_size operations a token.

    Args:
        vocab_size: V, how many ids there are.
        dim: C, channels of the model.
        padding_id: the id of padding, if there is one.
        scale: whether the embedding is multiplied by sqrt(dim).
        std: deviation of the initial table; 1 / sqrt(dim) where it is not given.
        device: where the parameter is.
        dtype: of the parameter.

    Shape:
        - ids: (...) of integers from 0 to vocab_size - 1, for example (B, L)
        - output: (..., dim)
        - hidden of `logits`: (..., dim), giving (..., vocab_size)

    Raises:
        ValueError: `padding_id` is no id; ids are not integers; `hidden` has not `dim` channels.

    Reference:
        Vaswani et al. Attention Is All You Need. NIPS 2017. Section 3.4.
        Press, Wolf. Using the Output Embedding to Improve Language Models. EACL 2017.

    Example:
        >>> embedding = TokenEmbedding(1000, 8, padding_id=0, scale=True)
        >>> tokens = embedding(torch.tensor([[5, 17, 3], [9, 0, 0]]))
        >>> tokens.shape, embedding.logits(tokens).shape
        (torch.Size([2, 3, 8]), torch.Size([2, 3, 1000]))
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        *,
        padding_id: int | None = None,
        scale: bool = False,
        std: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if padding_id is not None and not 0 <= padding_id < vocab_size:
            raise ValueError(f"padding_id must be from 0 to {vocab_size - 1}, got {padding_id}")
        self.vocab_size, self.dim, self.padding_id = vocab_size, dim, padding_id
        self.scale = math.sqrt(dim) if scale else 1.0
        self.std = dim**-0.5 if std is None else std
        self.weight = nn.Parameter(torch.empty(vocab_size, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, std²), and zero for padding."""
        nn.init.normal_(self.weight, std=self.std)
        if self.padding_id is not None:
            with torch.no_grad():
                self.weight[self.padding_id].zero_()

    def forward(self, ids: Tensor) -> Tensor:
        check_ids("ids", ids)
        rows = F.embedding(ids, self.weight, self.padding_id)
        # In place: the rows are fresh, and no backward reads them.
        return rows if self.scale == 1.0 else rows.mul_(self.scale)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden · Eᵀ, (..., vocab_size)."""
        if hidden.shape[-1] != self.dim:
            raise ValueError(f"hidden must be (..., {self.dim}), got {tuple(hidden.shape)}")
        weight = self.weight if self.padding_id is None else _FixedRow.apply(self.weight, self.padding_id)
        return F.linear(hidden, weight)

    def extra_repr(self) -> str:
        return f"{self.vocab_size}, {self.dim}, padding_id={self.padding_id}, scale={self.scale:.4g}"


def check_ids(name: str, ids: Tensor) -> None:
    """Raises ValueError where `ids` are not integers."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool:
        raise ValueError(f"{name} must be integers (int64 or int32), got {ids.dtype}")


class _FixedRow(torch.autograd.Function):
    """The table itself, whose row `row` gets no gradient. It copies nothing on the way forward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(table: Tensor, row: int) -> Tensor:
        return table.view_as(table)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.row = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        row = torch.tensor([ctx.row], device=gradient.device)
        return gradient.index_fill(0, row, 0.0), None
