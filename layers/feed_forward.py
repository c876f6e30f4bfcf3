"""Position-wise feed-forward network (Vaswani et al., 2017), also gated (Shazeer, 2020) and in chunks."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class FeedForward(nn.Module):
    """Two linear layers with a nonlinearity between, applied to each token alone.

    .. math:: y = W_2 \\, \\sigma(W_1 x + b_1) + b_2, \\qquad
              y = W_2 \\left( \\sigma(W_g x + b_g) \\odot (W_1 x + b_1) \\right) + b_2 \\text{ where gated}

    The original has ReLU; GELU, the default, is BERT's and ViT's. `gated` with `activation=nn.SiLU` is
    SwiGLU, with `nn.GELU` GEGLU. It has three matrices: Shazeer keeps the count of parameters with two
    thirds of `hidden_dim`, which is left to you.

    `chunk_size` runs that many tokens at a time. The hidden layer, `hidden_dim / dim` times the size of x,
    then never exists whole. This saves memory at inference, or under activation checkpointing; plain
    training keeps each chunk's hidden layer for the backward pass, and saves nothing. The result is that of
    the whole; with dropout the distribution is the same and the draws are others.

    Args:
        dim: channels of the model.
        hidden_dim: size of the hidden layer, 4·dim by default.
        activation: makes σ.
        gated: whether a third matrix gates the hidden layer.
        chunk_size: tokens at a time; None for all.
        dropout: probability of dropping a hidden unit and, again, an output.
        bias: whether the linear layers add one.
        device: where the parameters are.
        dtype: of the parameters.

    Shape:
        - x: (..., dim), for example (B, L, dim)
        - output: as x

    Raises:
        ValueError: `chunk_size` is less than one.

    Reference:
        Vaswani et al. Attention Is All You Need. NeurIPS 2017. Section 3.3.
        Shazeer. GLU Variants Improve Transformer. arXiv:2002.05202, 2020.
        Kitaev, Kaiser, Levskaya. Reformer: The Efficient Transformer. ICLR 2020. Section 3 (chunks).

    Example:
        >>> feed_forward = FeedForward(8)
        >>> feed_forward(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
        >>> swiglu = FeedForward(9, 24, gated=True, activation=torch.nn.SiLU, bias=False, chunk_size=2)
        >>> swiglu(torch.randn(2, 5, 9)).shape
        torch.Size([2, 5, 9])
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int | None = None,
        *,
        activation: Callable[[], nn.Module] = nn.GELU,
        gated: bool = False,
        chunk_size: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, or None, got chunk_size={chunk_size}")
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        self.chunk_size = chunk_size
        self.up = nn.Linear(dim, hidden_dim, bias=bias, device=device, dtype=dtype)
        self.gate = nn.Linear(dim, hidden_dim, bias=bias, device=device, dtype=dtype) if gated else None
        self.activation = activation()
        self.down = nn.Linear(hidden_dim, dim, bias=bias, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.chunk_size is None or x.dim() < 2:
            return self._tokens(x)
        return torch.cat([self._tokens(chunk) for chunk in x.split(self.chunk_size, -2)], -2)

    def extra_repr(self) -> str:
        return "" if self.chunk_size is None else f"chunk_size={self.chunk_size}"

    def _tokens(self, x: Tensor) -> Tensor:
        if self.gate is None:
            hidden = self.activation(self.up(x))
        else:
            hidden = self.activation(self.gate(x)) * self.up(x)
        return self.dropout(self.down(self.dropout(hidden)))
