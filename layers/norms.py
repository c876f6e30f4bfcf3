"""Norms that torch.nn lacks. Each computes in float32 at least, and returns its input's precision."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of an image, for each pixel alone.

    .. math:: y_{bchw} = \\gamma_c \\,
              \\frac{x_{bchw} - \\mu_{bhw}}{\\sqrt{\\sigma^2_{bhw} + \\epsilon}} + \\beta_c

    `nn.LayerNorm` wants the channels last, and `nn.GroupNorm(1, channels)` mixes the pixels. The output has
    the memory format of x. Images in `channels_last` are read as they are; others are transposed twice
    inside, which on a CPU still takes half the time of the formula written out.

    Args:
        channels: of the image.
        eps: ε.
        device: where the parameters are.
        dtype: of the parameters.

    Shape:
        - x: (B, channels, H, W)
        - output: as x

    Raises:
        ValueError: x is not an image of `channels` channels.

    Reference:
        Ba, Kiros, Hinton. Layer Normalization. arXiv:1607.06450, 2016.
        Liu et al. A ConvNet for the 2020s. CVPR 2022, from which the form for images and its ε are.

    Example:
        >>> norm = LayerNorm2d(8)
        >>> norm(torch.randn(2, 8, 5, 7)).shape
        torch.Size([2, 8, 5, 7])
    """

    def __init__(
        self,
        channels: int,
        *,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """γ = 1, β = 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != len(self.weight):
            raise ValueError(f"x must be (B, {len(self.weight)}, H, W), got {tuple(x.shape)}")
        last = x.permute(0, 2, 3, 1)
        y = F.layer_norm(last, self.weight.shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)
        return y.contiguous() if x.is_contiguous() else y

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


class PixelNorm(nn.Module):
    """Scales the channels of each pixel, or token, to a mean square of one.

    .. math:: y_c = \\frac{x_c}{\\sqrt{\\frac{1}{C} \\sum_j x_j^2 + \\epsilon}}

    It is `nn.RMSNorm` without its weight, over any one dimension. As the norm of a block:
    `norm=lambda dim, **factory: PixelNorm(dim=-1)`.

    Args:
        dim: which dimension holds the channels: 1 in images, -1 in tokens (TransGAN).
        eps: ε.

    Shape:
        - x: any, for example (B, C, H, W) with dim=1 or (B, L, C) with dim=-1
        - output: as x

    Reference:
        Karras, Aila, Laine, Lehtinen. Progressive Growing of GANs. ICLR 2018. Section 4.2.

    Example:
        >>> norm = PixelNorm()
        >>> norm(torch.randn(2, 8, 5, 7)).shape
        torch.Size([2, 8, 5, 7])
    """

    def __init__(self, *, dim: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * (wide.square().mean(self.dim, keepdim=True) + self.eps).rsqrt()).to(x.dtype)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, eps={self.eps}"


class ScaleNorm(nn.Module):
    """Scales each token to one learned length.

    .. math:: y = g \\, \\frac{x}{\\max(\\lVert x \\rVert_2, \\epsilon)}

    One parameter in place of the 2·dim of layer norm. g starts at sqrt(dim), where this is RMSNorm without
    a weight. It has the shape (1,), since FSDP shards no scalars. A zero token gives zero, and a finite
    gradient.

    Args:
        dim: channels of the model.
        eps: ε, the least length that is divided by.
        device: where the parameter is.
        dtype: of the parameter.

    Shape:
        - x: (..., dim)
        - output: as x

    Raises:
        ValueError: x has not `dim` channels.

    Reference:
        Nguyen, Salazar. Transformers without Tears: Improving the Normalization of Self-Attention.
        IWSLT 2019.

    Example:
        >>> norm = ScaleNorm(8)
        >>> norm(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.scale = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """g = sqrt(dim)."""
        nn.init.constant_(self.scale, math.sqrt(self.dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.dim:
            raise ValueError(f"x must be (..., {self.dim}), got {tuple(x.shape)}")
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp(min=self.eps)
        return (wide * (self.scale / length)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"
