"""Convolution with standardised weights (Qiao et al., 2019)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StandardizedConv2d(nn.Conv2d):
    """A convolution whose filters are brought to mean zero and deviation one before each use.

    .. math:: \\hat W_o = \\frac{W_o - \\operatorname{mean}(W_o)}{\\operatorname{std}(W_o) + \\epsilon},
              \\quad y = \\hat W * x

    It stands with group norm where batches are small; ViT's hybrid models are built on it. The padding is
    TensorFlow's "same": ceil(size / stride) places come out, and an odd row or column of zeros goes to the
    right and below, as the weights of those models expect.

    Cost: one pass over the weights more than a convolution.

    Args:
        in_channels: channels of x.
        out_channels: number of filters.
        kernel_size: rows and columns of a filter, alike.
        stride: step between two places.
        bias: whether each filter has one.
        eps: added to the deviation.

    Shape:
        - x: (B, in_channels, H, W)
        - output: (B, out_channels, ceil(H / stride), ceil(W / stride))

    Reference:
        Qiao, Wang, Liu, Shen, Yuille. Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization. arXiv:1903.10520, 2019. Equation 11.

    Example:
        >>> conv = StandardizedConv2d(3, 8, kernel_size=7, stride=2)
        >>> conv(torch.randn(2, 3, 15, 10)).shape
        torch.Size([2, 8, 8, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        bias: bool = False,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, bias=bias, device=device, dtype=dtype
        )
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """The filtered images. Shapes as above."""
        deviation, mean = torch.std_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) / (deviation + self.eps)
        return F.conv2d(pad_same(x, self.kernel_size[0], self.stride[0]), weight, self.bias, self.stride)


def pad_same(x: Tensor, kernel_size: int, stride: int, value: float = 0.0) -> Tensor:
    """Pads images so that a window fits ceil(size / stride) times, more on the right and below."""
    padding: list[int] = []
    for size in (x.shape[-1], x.shape[-2]):
        short = max((-(-size // stride) - 1) * stride + kernel_size - size, 0)
        padding += [short // 2, short - short // 2]
    return F.pad(x, padding, value=value)
