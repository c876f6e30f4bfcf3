"""Attention with a Gaussian prior over the distance, in each head on its own scale (Ding et al., 2020)."""

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.score_bias import DistanceBias
from .multi_head_attention import MultiHeadAttention

# The greatest logarithm of 1 / σ²: with a smaller σ than this a float32 would overflow, and 0 · ∞ be NaN.
_STEEPEST = 50.0


def orthogonality_penalty(weight: Tensor, num_heads: int) -> Tensor:
    """How far the heads of a projection are from pointing in orthogonal directions, as a loss.

    .. math:: L_p = \\lVert A A^\\top - I \\rVert_F^2

    where row h of A is the part of the weight that makes head h, flattened and scaled to length one. It is 0
    where the heads are orthogonal, and H (H - 1) where they are all alike; a head of zeros adds 1.

    Args:
        weight: (H D, C), of the projection to the values, as `nn.Linear` holds it.
        num_heads: H.

    Returns:
        A scalar, in float32 at the least. Time O(H² D C).

    Raises:
        ValueError: `weight` is not a matrix whose rows `num_heads` divides.

    Reference:
        Ding, Wu, Sun, Guo, Guo. Hierarchical Multi-Scale Gaussian Transformer for Stock Movement Prediction.
        IJCAI 2020.

    Example:
        >>> round(orthogonality_penalty(torch.ones(6, 5), num_heads=3).item(), 4)  # three heads, all alike
        6.0
    """
    if weight.ndim != 2 or num_heads < 1 or len(weight) % num_heads:
        raise ValueError(
            f"weight must be a matrix whose rows num_heads divides, got {tuple(weight.shape)} and {num_heads}"
        )
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    heads = F.normalize(wide.reshape(num_heads, -1), dim=-1)
    identity = torch.eye(num_heads, device=heads.device, dtype=heads.dtype)
    return (heads @ heads.mT - identity).square().sum()


class GaussianAttention(MultiHeadAttention):
    """Multi-head attention that prefers near keys, each head on a scale of its own.

    .. math:: \\operatorname{head}_h = \\operatorname{softmax}\\left(
              \\frac{Q_h K_h^\\top}{\\sqrt D} + B_h \\right) V_h,
              \\quad B_{h,ij} = -\\frac{(i - j)^2}{2 \\sigma_h^2}

    where i and j are positions, the last query standing where the last key stands, as `is_causal` has it:
    decoding step by step with a cache is right. The prior is the logarithm of a Gaussian, so that the softmax
    multiplies it with the content's weights. σ → ∞ is `MultiHeadAttention`; σ → 0 attends to the token's own
    place alone.

    The paper fixes σ by head to windows of 5, 10, 20 and 40 steps. Here these are where σ starts, over and
    over where there are more heads, and it learns as log σ unless `learnable` is False. The paper's encoder
    is causal, which here is `is_causal=True`. `orthogonality_penalty()` is the paper's regulariser. Its
    unofficial port masks whole layers by the windows, in place of a prior by head. All options of
    `MultiHeadAttention` are here, and mean the same.

    Time as `MultiHeadAttention`. The fused kernel makes the prior from σ where it is wanted, and its gradient
    beside that of the queries. On a CPU the prior takes O(H Lq Lk) memory, for the whole batch once; where σ
    learns, PyTorch's attention has no fused path with its gradient, and takes O(B H Lq Lk).

    Args:
        dim: C, size of a query and of the output.
        num_heads: H.
        windows: the first σ of each head, in tokens, cycled over the heads.
        learnable: whether σ is a parameter; else a buffer.
        num_kv_heads: heads of the keys and values; `num_heads` where it is not given.
        head_dim: D; dim / num_heads where it is not given.
        value_head_dim: size of a head of the values; D where it is not given.
        key_dim: size of a key before its projection; `dim` where it is not given.
        value_dim: size of a value before its projection; `key_dim` where it is not given.
        bias: whether the four projections have one.
        dropout: probability with which an attention weight is dropped in training.
        rotary: turns (B, H, L, D) by position, e.g. `RotaryPositions(head_dim)`.
        qk_norm: makes the norm of a head's queries, and another of its keys, e.g. `nn.RMSNorm`.

    Shape:
        - query, key, value, masks and bias: as of `MultiHeadAttention`; `bias` is added to the prior
        - output: (B, Lq, dim)

    Raises:
        ValueError: a window is not positive, or as `MultiHeadAttention`.

    Reference:
        Ding, Wu, Sun, Guo, Guo. Hierarchical Multi-Scale Gaussian Transformer for Stock Movement Prediction.
        IJCAI 2020.

    Example:
        >>> attention = GaussianAttention(32, num_heads=4, windows=(2, 4, 8, 16))
        >>> attention(torch.randn(2, 20, 32), is_causal=True).shape
        torch.Size([2, 20, 32])
        >>> loss = 0.01 * attention.orthogonality_penalty()
    """

    log_sigma: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        windows: Sequence[float] = (5, 10, 20, 40),
        learnable: bool = True,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_head_dim: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        rotary: nn.Module | None = None,
        qk_norm: Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not windows or min(windows) <= 0:
            raise ValueError(f"windows must be positive, one at the least, got {tuple(windows)}")
        super().__init__(
            dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_head_dim=value_head_dim,
            key_dim=key_dim,
            value_dim=value_dim,
            bias=bias,
            dropout=dropout,
            rotary=rotary,
            qk_norm=qk_norm,
            device=device,
            dtype=dtype,
        )
        self.windows = tuple(windows)
        log_sigma = torch.empty(num_heads, device=device, dtype=dtype)
        if learnable:
            self.log_sigma = nn.Parameter(log_sigma)
        else:
            self.register_buffer("log_sigma", log_sigma)
        self._reset_sigma()

    def reset_parameters(self) -> None:
        """As `MultiHeadAttention`, and each σ to its window."""
        super().reset_parameters()
        if hasattr(self, "log_sigma"):  # the base resets before there is one
            self._reset_sigma()

    def _reset_sigma(self) -> None:
        windows = list(itertools.islice(itertools.cycle(self.windows), self.num_heads))
        with torch.no_grad():
            self.log_sigma.copy_(torch.tensor(windows, dtype=torch.float64).log())

    @property
    def sigma(self) -> Tensor:
        """σ of each head, (H,), in tokens."""
        return self.log_sigma.exp()

    def prior(self, queries: int, keys: int) -> Tensor:
        """B, (H, Lq, Lk), in float32 at the least: of the last `queries` places with regard to all `keys`."""
        return self._score_bias().dense(queries, keys)

    def _score_bias(self) -> DistanceBias:
        wide = torch.promote_types(self.log_sigma.dtype, torch.float32)
        return DistanceBias(-0.5 * (-2 * self.log_sigma.to(wide)).clamp(max=_STEEPEST).exp(), power=2)

    def orthogonality_penalty(self) -> Tensor:
        """The paper's regulariser of this layer's projection to the values, to be added to a loss."""
        return orthogonality_penalty(self.value.weight, self.num_kv_heads)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, windows={self.windows}"
