"""Batch norm that stays as it is (the backbones of DETR and of detectors before it)."""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FrozenBatchNorm2d(nn.Module):
    """Batch norm with fixed statistics and a fixed affine part, in training as in evaluation.

    .. math:: y_{bchw} = \\gamma_c \\frac{x_{bchw} - \\mu_c}{\\sqrt{\\sigma^2_c + \\epsilon}} + \\beta_c

    μ, σ², γ and β are buffers: nothing updates them, and no optimiser sees them. A detector fine-tunes a
    pretrained backbone on batches of one or two images, whose statistics would be useless. The state dict is
    that of `nn.BatchNorm2d`; its `num_batches_tracked` is ignored.

    It equals `nn.BatchNorm2d` in evaluation with its parameters frozen, but `module.train()` does not thaw
    it. Hugging Face's and torchvision's layers of this kind take a product and a sum, so two passes; this
    takes one. Where x needs a gradient, nothing of x's size is kept for the backward pass; `nn.BatchNorm2d`
    keeps x.

    Cost: one multiply-add a number.

    Args:
        channels: of the image.
        eps: ε.
        device: where the buffers are.
        dtype: of the buffers. Half precision is computed in float32.

    Shape:
        - x: (B, channels, H, W)
        - output: as x

    Raises:
        ValueError: x is not an image of `channels` channels.

    Reference:
        Ioffe, Szegedy. Batch Normalization. ICML 2015.
        Carion et al. End-to-End Object Detection with Transformers. ECCV 2020. Section 4.

    Example:
        >>> norm = FrozenBatchNorm2d.from_batch_norm(nn.BatchNorm2d(8))
        >>> norm(torch.randn(2, 8, 5, 7)).shape, list(norm.parameters())
        (torch.Size([2, 8, 5, 7]), [])
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        channels: int,
        *,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The identity, but for ε: μ = β = 0, σ² = γ = 1."""
        for zero in (self.running_mean, self.bias):
            nn.init.zeros_(zero)
        for one in (self.running_var, self.weight):
            nn.init.ones_(one)

    @classmethod
    def from_batch_norm(cls, batch_norm: nn.BatchNorm2d) -> Self:
        """A copy of `batch_norm` as it is in evaluation.

        Raises:
            ValueError: `batch_norm` has no running statistics.
        """
        mean, variance = batch_norm.running_mean, batch_norm.running_var
        if mean is None or variance is None:
            raise ValueError("batch_norm must have running statistics, got track_running_stats=False")
        frozen = cls(batch_norm.num_features, eps=batch_norm.eps, device=mean.device, dtype=mean.dtype)
        with torch.no_grad():
            frozen.running_mean.copy_(mean)
            frozen.running_var.copy_(variance)
            if batch_norm.affine:
                frozen.weight.copy_(batch_norm.weight)
                frozen.bias.copy_(batch_norm.bias)
        return frozen.train(batch_norm.training)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != len(self.weight):
            raise ValueError(f"x must be (B, {len(self.weight)}, H, W), got {tuple(x.shape)}")
        keeps_precision = x.dtype == self.weight.dtype and x.dtype in (torch.float32, torch.float64)
        if keeps_precision and x.requires_grad and torch.is_grad_enabled():
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            shift = torch.addcmul(self.bias, self.running_mean, scale, value=-1)
            return torch.addcmul(shift[:, None, None], x, scale[:, None, None])
        # The library's kernel is the faster one forward, and takes half precision with wide statistics.
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def freeze_batch_norms(module: nn.Module) -> nn.Module:
    """Puts a `FrozenBatchNorm2d` in the place of every `nn.BatchNorm2d` in a module.

    Make the optimiser afterwards: the scales and shifts are parameters no longer.

    Args:
        module: changed in place; its other parts stay the same objects.

    Returns:
        `module`, or what replaces it where it is itself a batch norm.

    Raises:
        ValueError: a batch norm has no running statistics. Nothing is replaced then.

    Reference:
        Carion et al. End-to-End Object Detection with Transformers. ECCV 2020. Section 4.

    Example:
        >>> backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> freeze_batch_norms(backbone)[1]
        FrozenBatchNorm2d(8, eps=1e-05)
    """
    norms = [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)]
    frozen = {norm: FrozenBatchNorm2d.from_batch_norm(norm) for norm in norms}
    if isinstance(module, nn.BatchNorm2d):
        return frozen[module]
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, frozen[child])
    return module
