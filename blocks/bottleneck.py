"""Residual networks of bottleneck units (He et al., 2016), on any convolution and norm."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import StandardizedConv2d
from ..layers.standardized_conv import pad_same


def _group_norm(
    channels: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    return nn.GroupNorm(min(32, channels), channels, eps=1e-6, device=device, dtype=dtype)


class Bottleneck(nn.Module):
    """Three convolutions, 1x1 down, 3x3, 1x1 up, added to what came in.

    .. math:: y = \\operatorname{ReLU}(P x + n(C_3 * \\operatorname{ReLU}(n(C_2 *
              \\operatorname{ReLU}(n(C_1 * x))))))

    where n is the norm, and P the identity where the shapes agree, else a 1x1 convolution and a norm. The
    stride is that of the 3x3 convolution. The last norm's scale starts at zero, so that the unit starts as P
    alone.

    Args:
        in_channels: channels of x.
        channels: of the 3x3 convolution; four times as many come out.
        stride: of the 3x3 convolution.
        conv: makes a convolution that keeps the size but for the stride, called
            `conv(in_channels, out_channels, kernel_size, stride=, device=, dtype=)`.
        norm: makes a norm, called `norm(channels, device=, dtype=)`.

    Shape:
        - x: (B, in_channels, H, W)
        - output: (B, 4 channels, ceil(H / stride), ceil(W / stride))

    Reference:
        He, Zhang, Ren, Sun. Deep Residual Learning for Image Recognition. CVPR 2016. Figure 5.
        Kolesnikov et al. Big Transfer (BiT). ECCV 2020 (group norm and standardised weights).

    Example:
        >>> unit = Bottleneck(8, 4, stride=2)
        >>> unit(torch.randn(2, 8, 7, 6)).shape
        torch.Size([2, 16, 4, 3])
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        stride: int = 1,
        conv: Callable[..., nn.Module] = StandardizedConv2d,
        norm: Callable[..., nn.Module] = _group_norm,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        conv, norm = partial(conv, device=device, dtype=dtype), partial(norm, device=device, dtype=dtype)
        self.conv1, self.norm1 = conv(in_channels, channels, 1), norm(channels)
        self.conv2, self.norm2 = conv(channels, channels, 3, stride=stride), norm(channels)
        self.conv3, self.norm3 = conv(channels, 4 * channels, 1), norm(4 * channels)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and in_channels == 4 * channels
            else nn.Sequential(conv(in_channels, 4 * channels, 1, stride=stride), norm(4 * channels))
        )
        scale = getattr(self.norm3, "weight", None)
        if isinstance(scale, nn.Parameter):
            nn.init.zeros_(scale)

    def forward(self, x: Tensor) -> Tensor:
        """The unit's output. Shapes as above."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.shortcut(x) + self.norm3(self.conv3(y)))


class ResNet(nn.Module):
    """A residual network without its classifier: a 7x7 convolution, a pooling, stages of bottleneck units.

    .. math:: x \\mapsto \\operatorname{stage}_n(\\dots \\operatorname{stage}_1(
              \\operatorname{maxpool}(\\operatorname{ReLU}(\\operatorname{norm}(C_{7 \\times 7} \\ast x)))))

    Stage i has 2^i times `width` channels (four times as many come out), and all but the first halve the
    size. With the default parts it is the ResNet of ViT's hybrid models. No stage at all leaves convolution
    and pooling.

    Args:
        depths: units of each stage: (3, 4, 6, 3) is ResNet-50.
        in_channels: channels of an image.
        width: channels of the 7x7 convolution and of the first stage's 3x3 convolutions.
        conv, norm: as of `Bottleneck`.

    Shape:
        - x: (B, in_channels, H, W)
        - output: (B, out_channels, H / reduction, W / reduction), rounded up at each halving

    Reference:
        He, Zhang, Ren, Sun. Deep Residual Learning for Image Recognition. CVPR 2016. Table 1.

    Example:
        >>> net = ResNet((1, 2), width=4)
        >>> net.reduction, net.out_channels
        (8, 32)
        >>> net(torch.randn(2, 3, 32, 24)).shape
        torch.Size([2, 32, 4, 3])
    """

    def __init__(
        self,
        depths: Sequence[int],
        *,
        in_channels: int = 3,
        width: int = 64,
        conv: Callable[..., nn.Module] = StandardizedConv2d,
        norm: Callable[..., nn.Module] = _group_norm,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv = conv(in_channels, width, 7, stride=2, device=device, dtype=dtype)
        self.norm = norm(width, device=device, dtype=dtype)
        self.stages, channels = nn.ModuleList(), width
        for i, depth in enumerate(depths):
            units: list[nn.Module] = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                units.append(
                    Bottleneck(
                        channels,
                        width * 2**i,
                        stride=stride,
                        conv=conv,
                        norm=norm,
                        device=device,
                        dtype=dtype,
                    )
                )
                channels = 4 * width * 2**i
            self.stages.append(nn.Sequential(*units))
        self.out_channels = channels
        self.reduction = 4 * 2 ** max(len(depths) - 1, 0)

    def forward(self, x: Tensor) -> Tensor:
        """The last stage's output. Shapes as above."""
        x = F.relu(self.norm(self.conv(x)))
        x = F.max_pool2d(pad_same(x, 3, 2, value=-torch.inf), 3, 2)
        for stage in self.stages:
            x = stage(x)
        return x
