"""Linear layers and convolutions of spectral norm one (Miyato et al., 2018)."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What torch calls them: by its parametrization, and by the older hook.
_TORCH_NAMES = {
    "parametrizations.weight.original": "weight",
    "parametrizations.weight.0._u": "u",
    "parametrizations.weight.0._v": "v",
    "weight_orig": "weight",
    "weight_u": "u",
    "weight_v": "v",
}
_ITERATIONS_AT_START = 15  # as torch's


class _SpectralWeight(nn.Module):
    """What the two layers share: the vectors, their iteration, and how they are loaded."""

    weight: Tensor
    u: Tensor
    v: Tensor

    def _start(self, power_iterations: int, eps: float) -> None:
        if power_iterations < 1:
            raise ValueError(f"power_iterations must be at least 1, got power_iterations={power_iterations}")
        self.power_iterations = power_iterations
        self.eps = eps
        rows = self.weight.flatten(1)
        self.register_buffer("u", torch.empty_like(rows[:, 0], requires_grad=False))
        self.register_buffer("v", torch.empty_like(rows[0], requires_grad=False))
        self.reset_vectors()

    def reset_parameters(self) -> None:
        """The weight and bias as torch's layer of this kind draws them, and the vectors anew."""
        super().reset_parameters()  # type: ignore[misc]
        if "u" in self._buffers:  # torch's constructor calls this before there are any
            self.reset_vectors()

    @torch.no_grad()
    def reset_vectors(self, generator: torch.Generator | None = None) -> None:
        """Draws v anew, and brings u and v near the singular vectors of the weight as it now is.

        A weight that is changed by hand, and then used in evaluation, needs this.
        """
        rows = _wide(self.weight.flatten(1))
        self.v.normal_(generator=generator)
        self._keep(*_iterate(rows, _wide(self.v), _ITERATIONS_AT_START, self.eps))

    def normalized_weight(self) -> Tensor:
        """The weight that `forward` uses. In training each call goes on with the power iteration."""
        with torch.autocast("cpu" if self.weight.is_meta else self.weight.device.type, enabled=False):
            rows = _wide(self.weight.flatten(1))
            if self.training:
                with torch.no_grad():
                    u, v = _iterate(rows, _wide(self.v), self.power_iterations, self.eps)
                    self._keep(u, v)
            else:
                # Copies, since a later step in training writes into the buffers that a graph would hold.
                u, v = _wide(self.u).clone(), _wide(self.v).clone()
            largest = torch.vdot(u, torch.mv(rows, v))
            # Not a division, whose backward pass reads and writes the weight once more.
            return (rows * largest.reciprocal()).view_as(self.weight).to(self.weight.dtype)

    def _keep(self, u: Tensor, v: Tensor) -> None:
        """In place, for whoever shares the buffers; the graph holds u and v themselves, so that a second call
        before the backward pass of the first is no error."""
        self.u.copy_(u)
        self.v.copy_(v)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        *rest: Any,
    ) -> None:
        for theirs, ours in _TORCH_NAMES.items():
            if prefix + theirs in state_dict:
                state_dict[prefix + ours] = state_dict.pop(prefix + theirs)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        vectors = {prefix + "u", prefix + "v"}
        if prefix + "weight" in state_dict and vectors.isdisjoint(state_dict):
            missing[:] = [key for key in missing if key not in vectors]
            device = "cpu" if self.u.is_meta else self.u.device
            self.reset_vectors(torch.Generator(device).manual_seed(0))


class SpectralLinear(_SpectralWeight, nn.Linear):
    """A linear layer whose weight is divided by its largest singular value.

    .. math:: y = \\frac{W}{\\sigma(W)} x + b, \\quad \\sigma(W) = u^\\top W v

    with u and v by the power iteration, which a call in training takes one step further:

    .. math:: u \\leftarrow \\frac{W v}{\\lVert W v \\rVert_2}, \\quad
              v \\leftarrow \\frac{W^\\top u}{\\lVert W^\\top u \\rVert_2}

    So the layer stretches no difference of two inputs; discriminators of GANs are built on it. The gradient
    passes through W in σ, while u and v are constants. Evaluation leaves them as they are, and gives the same
    output for the same input. Several calls before one backward pass, and second derivatives, are right; a
    call that activation checkpointing repeats takes another step, and sees a slightly other weight.

    `torch.nn.utils.parametrizations.spectral_norm` computes the same. It makes a module that cannot be
    pickled, and whose weight is under another name. Here the state dict has `weight`, `bias`, `u`
    (out_features,) and `v` (in_features,); one of `nn.Linear` loads too, and u and v are found for it, and so
    does one of torch's spectral norm. A weight of zeros has no direction, and gives NaN as torch's does.

    Cost: three products of W with a vector and one pass over W more than a linear layer, whatever the batch;
    as much memory as W for W / σ.

    Args:
        in_features: channels of x.
        out_features: channels of the output.
        bias: whether to add b.
        power_iterations: steps in each call in training.
        eps: least length that u and v are divided by.
        device: where the parameters are.
        dtype: of the parameters. σ is computed in float32 at least.

    Shape:
        - x: (..., in_features)
        - output: (..., out_features)

    Raises:
        ValueError: `power_iterations` is less than one.

    Reference:
        Miyato, Kataoka, Koyama, Yoshida. Spectral Normalization for Generative Adversarial Networks. ICLR
        2018. Algorithm 1.

    Example:
        >>> layer = SpectralLinear(8, 5)
        >>> layer(torch.randn(2, 7, 8)).shape
        torch.Size([2, 7, 5])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        power_iterations: int = 1,
        eps: float = 1e-12,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._start(power_iterations, eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.normalized_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, power_iterations={self.power_iterations}"


class SpectralConv2d(_SpectralWeight, nn.Conv2d):
    """A convolution whose filters, as one matrix, are divided by its largest singular value.

    .. math:: y = \\frac{W}{\\sigma(\\bar W)} * x + b, \\quad
              \\bar W \\in \\mathbb{R}^{C_{out} \\times C_{in} k_h k_w}

    with σ as in `SpectralLinear`, where the rest is said. As in the paper and in torch, σ is that of the
    matrix of filters and not of the convolution: patches overlap, so the whole may still stretch its input,
    by at most sqrt(k_h k_w).

    Cost: three products of the matrix with a vector and one pass over it more than a convolution; as much
    memory as W for W / σ.

    Args:
        in_channels: channels of x.
        out_channels: number of filters.
        kernel_size: rows and columns of a filter.
        stride, padding, dilation, groups, padding_mode: as in `nn.Conv2d`.
        bias: whether to add b.
        power_iterations: steps in each call in training.
        eps: least length that u and v are divided by.
        device: where the parameters are.
        dtype: of the parameters. σ is computed in float32 at least.

    Shape:
        - x: (B, in_channels, H, W)
        - output: (B, out_channels, rows, cols), as `nn.Conv2d` gives

    Raises:
        ValueError: `power_iterations` is less than one.

    Reference:
        Miyato, Kataoka, Koyama, Yoshida. Spectral Normalization for Generative Adversarial Networks. ICLR
        2018. Section 2.1 and algorithm 1.

    Example:
        >>> conv = SpectralConv2d(3, 8, kernel_size=3, padding=1)
        >>> conv(torch.randn(2, 3, 7, 5)).shape
        torch.Size([2, 8, 7, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        power_iterations: int = 1,
        eps: float = 1e-12,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Conv2d.__init__(
            self,
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        self._start(power_iterations, eps)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.normalized_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, power_iterations={self.power_iterations}"


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _iterate(rows: Tensor, v: Tensor, steps: int, eps: float) -> tuple[Tensor, Tensor]:
    """`steps` of the power iteration from v: new tensors, the left and the right vector."""
    for _ in range(steps):
        u = F.normalize(torch.mv(rows, v), dim=0, eps=eps)
        v = F.normalize(torch.mv(rows.mT, u), dim=0, eps=eps)
    return u, v
