"""Rotary positions (Su et al., 2021)."""

import torch
from torch import Tensor, nn


class RotaryPositions(nn.Module):
    """Turns pairs of channels by an angle that grows with the position, so that scores see distances only.

    .. math:: y_{m,a} = x_{m,a} \\cos m\\theta_i - x_{m,b} \\sin m\\theta_i, \\quad
              y_{m,b} = x_{m,b} \\cos m\\theta_i + x_{m,a} \\sin m\\theta_i, \\quad
              \\theta_i = \\beta^{-2i/D}

    for position m and pair i = 0 … D/2 - 1. Apply it to queries and keys, never to values.

    Pair i is (a, b) = (i, i + D/2), as in GPT-NeoX and in Hugging Face's Llama; with `interleaved` it is
    (2i, 2i + 1), as in the paper and in Meta's Llama. The two differ by a permutation of the channels
    only, but published weights belong to one of them.

    It holds no parameter and no buffer. The D/2 frequencies are computed anew in each call, in float32
    whatever the module's precision (float64 for float64 input), so that `.half()` cannot round them and
    `.to_empty()` cannot lose them. Cost: four multiplications a pair, and L·D/2 sines and cosines that the
    batch and the heads share.

    Args:
        dim: size of one head, even.
        base: β, the longest wavelength is about 2πβ positions.
        interleaved: pair neighbouring channels, as the paper does, in place of the two halves.
        device: taken so that all layers are made alike; there is nothing to place.
        dtype: as `device`.

    Shape:
        - x: (..., L, dim), for example (B, H, L, D)
        - positions: (L,), or (B, 1, L) that broadcasts against x without its channels; 0 … L - 1 by default
        - output: as x, in its dtype

    Raises:
        ValueError: `dim` is not even and positive; x has not `dim` channels; positions are neither
            (L,) nor as x without its channels.

    Reference:
        Su, Lu, Pan, Murtadha, Wen, Liu. RoFormer: Enhanced Transformer with Rotary Position Embedding.
        arXiv:2104.09864, 2021. Section 3.2.2, equation 15.

    Example:
        >>> rotary = RotaryPositions(8)
        >>> rotary(torch.randn(2, 3, 5, 8)).shape
        torch.Size([2, 3, 5, 8])
        >>> rotary(torch.randn(2, 3, 1, 8), offset=5).shape  # the sixth token, when decoding step by step
        torch.Size([2, 3, 1, 8])
    """

    def __init__(
        self,
        dim: int,
        *,
        base: float = 10000.0,
        interleaved: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim <= 0 or dim % 2:
            raise ValueError(f"dim must be even and positive, got dim={dim}")
        self.dim = dim
        self.base = base
        self.interleaved = interleaved

    def forward(self, x: Tensor, *, offset: int = 0, positions: Tensor | None = None) -> Tensor:
        """Turns x.

        Args:
            x: (..., L, dim), queries or keys already split into heads.
            offset: position of the first token; added to `positions` where they are given.
            positions: (L,) or (B, 1, L), where tokens do not stand side by side: packed or left-padded rows.
        """
        if x.dim() < 2 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (..., L, {self.dim}), got {tuple(x.shape)}")
        if positions is not None and (
            positions.dim() not in (1, x.dim() - 1) or positions.shape[-1] != x.shape[-2]
        ):
            # (B, L) is refused: beside heads it would broadcast as (H, L), silently where B = H.
            raise ValueError(
                f"positions must be ({x.shape[-2]},), or broadcast against {tuple(x.shape[:-1])} and have "
                f"as many dimensions, got {tuple(positions.shape)}"
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        angles = self._angles(x, offset, positions, wide)
        cosine, sine = angles.cos(), angles.sin()
        pairs = x.to(wide)
        a, b = pairs.unflatten(-1, (-1, 2)).unbind(-1) if self.interleaved else pairs.chunk(2, -1)
        turned = a * cosine - b * sine, b * cosine + a * sine
        y = torch.stack(turned, -1).flatten(-2) if self.interleaved else torch.cat(turned, -1)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base}, interleaved={self.interleaved}"

    def _angles(self, x: Tensor, offset: int, positions: Tensor | None, wide: torch.dtype) -> Tensor:
        """mθ_i, (..., L, dim / 2), by a product: `outer` would run in half precision under autocast."""
        if positions is None:
            positions = torch.arange(x.shape[-2], device=x.device)
        exponents = torch.arange(0, self.dim, 2, device=x.device, dtype=wide) / self.dim
        return (positions + offset).to(wide).unsqueeze(-1) * self.base**-exponents
