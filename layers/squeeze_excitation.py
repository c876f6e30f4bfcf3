"""Squeeze and excitation (Hu et al., 2018)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SqueezeExcitation(nn.Module):
    """Weighs each channel of an image by what all channels hold on the average.

    .. math:: s = \\sigma\\left(W_2 \\, \\delta\\left(W_1 z + b_1\\right) + b_2\\right), \\quad
              z_c = \\frac{1}{HW} \\sum_{hw} x_{chw}, \\quad y_{chw} = s_c \\, x_{chw}

    As in the paper, whose reduction is 16, with biases. The two products are linear layers, on (B, C); most
    libraries write them as 1x1 convolutions on images of one pixel. The weights of either form load: those of
    a convolution, (out, in, 1, 1), are flattened.

    Cost: two passes over x, and 2 channels · hidden_dim multiply-adds an image. Memory beyond the output:
    (B, channels) numbers, and x for the backward pass.

    Args:
        channels: of the image.
        hidden_dim: size between the two layers; channels // 16 by default, at least 1. EfficientNet takes a
            quarter of what comes into its block, RegNet a quarter of the channels before its block.
        activation: makes δ, called `activation()`. SiLU in EfficientNet.
        gate: makes σ, called `gate()`. `nn.Hardsigmoid` in MobileNetV3.
        device: where the parameters are.
        dtype: of the parameters.

    Shape:
        - x: (B, channels, H, W)
        - output: as x
        - `reduce.weight`: (hidden_dim, channels)
        - `expand.weight`: (channels, hidden_dim)

    Raises:
        ValueError: x is not an image of `channels` channels; `hidden_dim` is less than one.

    Reference:
        Hu, Shen, Sun. Squeeze-and-Excitation Networks. CVPR 2018. Equations 2 to 4.

    Example:
        >>> layer = SqueezeExcitation(32)
        >>> layer(torch.randn(2, 32, 7, 5)).shape
        torch.Size([2, 32, 7, 5])
    """

    def __init__(
        self,
        channels: int,
        hidden_dim: int | None = None,
        *,
        activation: Callable[[], nn.Module] = nn.ReLU,
        gate: Callable[[], nn.Module] = nn.Sigmoid,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_dim = max(1, channels // 16) if hidden_dim is None else hidden_dim
        if hidden_dim < 1:
            raise ValueError(f"hidden_dim must be at least 1, got hidden_dim={hidden_dim}")
        self.channels = channels
        self.reduce = nn.Linear(channels, hidden_dim, device=device, dtype=dtype)
        self.activation = activation()
        self.expand = nn.Linear(hidden_dim, channels, device=device, dtype=dtype)
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weights(x).to(x.dtype)[:, :, None, None]

    def weights(self, x: Tensor) -> Tensor:
        """s, the weight of each channel: (B, channels)."""
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x must be (B, {self.channels}, H, W), got {tuple(x.shape)}")
        mean = F.adaptive_avg_pool2d(x, 1).flatten(1)
        weights: Tensor = self.gate(self.expand(self.activation(self.reduce(mean))))
        return weights

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("reduce.weight", "expand.weight"):
            weight = state_dict.get(prefix + name)
            if weight is not None and weight.dim() == 4:
                state_dict[prefix + name] = weight.flatten(1)
        super()._load_from_state_dict(state_dict, prefix, *rest)
