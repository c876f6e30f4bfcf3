"""Position-wise feed-forward network (Vaswani et al., 2017), also gated (Shazeer, 2020)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class FeedForward(nn.Module):
    """Two linear layers with a nonlinearity between, applied to each token alone.

    .. math:: y = W_2 \\, \\sigma(W_1 x + b_1) + b_2, \\qquad
              y = W_2 \\left( \\sigma(W_g x + b_g) \\odot (W_1 x + b_1) \\right) + b_2 \\text{ where gated}

    The original has ReLU; GELU, the default, is BERT's and ViT's. `gated` with `activation=nn.SiLU` is
    SwiGLU, with `nn.GELU` GEGLU. It has three matrices: Shazeer keeps the count of parameters with two
    thirds of `hidden_dim`, which is left to you.

    Time O(L dim hidden_dim). The hidden layer, `hidden_dim / dim` times the size of x, is kept for the
    backward pass: `ChunkedFeedForward` is the same function without that.

    Args:
        dim: channels of the model.
        hidden_dim: size of the hidden layer, 4·dim by default.
        activation: makes σ.
        gated: whether a third matrix gates the hidden layer.
        dropout: probability of dropping an output.
        hidden_dropout: probability of dropping a hidden unit; `dropout` where it is not given.
        bias: whether the linear layers add one.
        device: where the parameters are.
        dtype: of the parameters.

    Shape:
        - x: (..., dim), for example (B, L, dim)
        - output: as x

    Reference:
        Vaswani et al. Attention Is All You Need. NeurIPS 2017. Section 3.3.
        Shazeer. GLU Variants Improve Transformer. arXiv:2002.05202, 2020.

    Example:
        >>> feed_forward = FeedForward(8)
        >>> feed_forward(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
        >>> swiglu = FeedForward(9, 24, gated=True, activation=torch.nn.SiLU, bias=False)
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
        dropout: float = 0.0,
        hidden_dropout: float | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        self.up = nn.Linear(dim, hidden_dim, bias=bias, device=device, dtype=dtype)
        self.gate = nn.Linear(dim, hidden_dim, bias=bias, device=device, dtype=dtype) if gated else None
        self.activation = activation()
        self.down = nn.Linear(hidden_dim, dim, bias=bias, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.hidden_dropout = nn.Dropout(dropout if hidden_dropout is None else hidden_dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            hidden = self.up(x)
            hidden = hidden.relu_() if self._in_place() else self.activation(hidden)
        else:
            hidden = self.activation(self.gate(x)) * self.up(x)
        return self.dropout(self.down(self.hidden_dropout(hidden)))

    def _in_place(self) -> bool:
        """Whether a ReLU may write into its input: a fresh product, which nobody else sees or has saved."""
        up, activation = self.up, self.activation
        if type(up) is not nn.Linear or type(activation) is not nn.ReLU:
            return False
        return not any(getattr(part, hooks) for part in (up, activation) for hooks in HOOKS)
