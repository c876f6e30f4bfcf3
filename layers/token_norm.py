"""Norm of each channel over the tokens of its sequence (Ulyanov et al., 2016)."""

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.checks import check_mask


class TokenNorm(nn.Module):
    """Brings each channel to mean zero and deviation one over the tokens of its own sequence.

    .. math:: y_{blc} = \\gamma_c \\frac{x_{blc} - \\mu_{bc}}{\\sqrt{\\sigma^2_{bc} + \\epsilon}} + \\beta_c,
              \\quad \\mu_{bc} = \\frac{1}{|M_b|} \\sum_{l \\in M_b} x_{blc}, \\quad
              \\sigma^2_{bc} = \\frac{1}{|M_b|} \\sum_{l \\in M_b} (x_{blc} - \\mu_{bc})^2

    where M are the places that take part. It is the instance norm of images for tokens, TransGAN's norm
    "in"; layer norm goes over the channels of one token instead. Without a mask it equals
    `nn.InstanceNorm1d` on transposed tokens, which knows no mask: there padding shifts the statistics. As
    there, γ and β are left out unless `affine` asks for them.

    Padding has no influence, whatever it holds, and gives zero; so does a sequence in which nothing takes
    part. One token alone is its own mean, and gives β: torch refuses it. Every token sees all others, so this
    is no norm for a causal model.

    Cost: three passes over x, and one output for the backward pass, which takes four.

    Args:
        dim: channels of the model.
        affine: whether there are γ and β.
        eps: ε.
        device: where the parameters are.
        dtype: of the parameters. Half precision is computed in float32.

    Shape:
        - x: (B, L, dim)
        - key_mask: (B, L) of bool, True where a token takes part
        - output: as x

    Raises:
        ValueError: x is not (B, L, dim); `key_mask` is not (B, L) of bool.

    Reference:
        Ulyanov, Vedaldi, Lempitsky. Instance Normalization: The Missing Ingredient for Fast Stylization.
        arXiv:1607.08022, 2016.
        Jiang, Chang, Wang. TransGAN: Two Pure Transformers Can Make One Strong GAN. NeurIPS 2021.

    Example:
        >>> norm = TokenNorm(8)
        >>> norm(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        dim: int,
        *,
        affine: bool = False,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype)) if affine else None
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype)) if affine else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """γ = 1, β = 0."""
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        if x.dim() != 3 or x.shape[2] != self.dim:
            raise ValueError(f"x must be (B, L, {self.dim}), got {tuple(x.shape)}")
        hidden = None
        if key_mask is not None:
            if key_mask.shape != x.shape[:2]:
                raise ValueError(
                    f"key_mask must be (B, L) = {tuple(x.shape[:2])}, got {tuple(key_mask.shape)}"
                )
            check_mask("key_mask", key_mask, tuple(x.shape[:2]))
            hidden = ~key_mask.unsqueeze(-1)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        y, _ = _Normalize.apply(wide, hidden, self.eps)
        if self.weight is not None and self.bias is not None:
            y = torch.addcmul(self.bias, y, self.weight)
            if hidden is not None:
                y = y.masked_fill(hidden, 0.0)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, affine={self.weight is not None}, eps={self.eps}"


class _Normalize(torch.autograd.Function):
    """x normalised over its tokens, and one over the deviation. By hand, since autograd's own backward pass
    of the same formula takes two to three times as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, hidden: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        if hidden is None:
            count: Tensor | int = max(x.shape[1], 1)
            centred = x - x.sum(1, keepdim=True) / count
        else:
            count = (~hidden).sum(1, keepdim=True).clamp(min=1)
            x = x.masked_fill(hidden, 0.0)
            centred = (x - x.sum(1, keepdim=True) / count).masked_fill_(hidden, 0.0)
        rate = (centred.square().sum(1, keepdim=True) / count + eps).rsqrt()
        y = centred.mul_(rate)
        # Outputs alone are kept, so that a second derivative finds its way through them.
        ctx.save_for_backward(y, rate, hidden)
        return y, rate

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_rate: Tensor) -> tuple[Tensor, None, None]:
        y, rate, hidden = ctx.saved_tensors
        if hidden is None:
            count: Tensor | int = max(y.shape[1], 1)
        else:
            count = (~hidden).sum(1, keepdim=True).clamp(min=1)
            grad = grad.masked_fill(hidden, 0.0)
        along_one = rate * grad.sum(1, keepdim=True) / count
        along_y = (rate * (grad * y).sum(1, keepdim=True) + rate.square() * grad_rate) / count
        of_x = torch.addcmul(-along_one, grad, rate).addcmul_(y, along_y, value=-1)
        return of_x if hidden is None else of_x.masked_fill(hidden, 0.0), None, None
