"""Stochastic depth (Huang et al., 2016)."""

import torch
from torch import Tensor, nn

from .packing import Packing, packed_places


class DropPath(nn.Module):
    """In training, drops the whole residual branch for each sample with a probability.

    .. math:: y_b = \\frac{m_b}{1 - p} \\, x_b, \\quad m_b \\sim \\operatorname{Bernoulli}(1 - p)

    The scale keeps the expectation, so that evaluation is the identity; the paper scales by 1 - p in
    evaluation instead, and drops for a whole batch. Put it on the branch, before the sum:
    `x + drop_path(layer(x))`. The branch is computed and then dropped: this regularises, and saves no time.

    Args:
        probability: p, from 0 (the identity) to 1 (zero).

    Shape:
        - x: (B, ...), or packed (N, ...)
        - output: as x

    Raises:
        ValueError: `probability` is not between 0 and 1.

    Reference:
        Huang, Sun, Liu, Sedra, Weinberger. Deep Networks with Stochastic Depth. ECCV 2016. Section 3.

    Example:
        >>> drop_path = DropPath(0.1)
        >>> drop_path(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        if not 0 <= probability <= 1:
            raise ValueError(f"probability must be between 0 and 1, got probability={probability}")
        self.probability = probability

    def forward(self, x: Tensor, *, packing: Packing | None = None) -> Tensor:
        """Shapes as above; a `packing` tells the sequences of packed tokens, which are dropped whole."""
        if not self.training or self.probability == 0:
            return x
        keep = 1 - self.probability
        samples = len(x) if packing is None else len(packing.starts) - 1
        kept = torch.rand(samples, *[1] * (x.dim() - 1), device=x.device) < keep
        if packing is not None:
            kept = kept[packed_places(packing, x.shape[0])[0]]
        # Not x * kept: a dropped branch that overflowed must give zero, not NaN.
        return torch.where(kept, x / keep if keep else x, 0.0)

    def extra_repr(self) -> str:
        return f"{self.probability}"
