"""The glimpse network of recurrent visual attention (Mnih et al., 2014)."""

from typing import Any

import torch
from torch import Tensor, nn

from .glimpse_sensor import GlimpseSensor


class GlimpseNetwork(nn.Module):
    """What a glimpse shows and where it was taken, in one vector.

    .. math:: h_g = \\operatorname{ReLU}(W^g \\rho(x, l)), \\quad h_l = \\operatorname{ReLU}(W^l l),
              \\quad g = \\operatorname{ReLU}(W^{hg} h_g + W^{hl} h_l)

    each W with a bias of its own, and the glimpse ρ of `GlimpseSensor` flattened scale by scale, then by
    channel, row and column, as in the well-known port (`sensor.fc1` to `fc4` of its checkpoints are the four
    layers here in their order). No gradient reaches `locations`, neither through the glimpse nor through h_l:
    were it to, the classifier's loss would train the policy beside REINFORCE. The paper does not say how it
    starts; `nn.Linear`'s own initialisation is kept. Time O(B (k C g² H + (H + L) D)) beside the sensor's.

    Args:
        in_channels: C of the images.
        size: g, height and width of a glimpse in pixels.
        num_scales: k, see `GlimpseSensor`.
        hidden_dim: H, size of h_g; 128 in the paper.
        location_dim: L, size of h_l; 128 in the paper.
        dim: D, size of the output; 256 in the paper.

    Shape:
        - images: (B, in_channels, height, width)
        - locations: (B, 2) as (x, y) in [-1, 1], or (B, T, 2)
        - output: (B, dim), or (B, T, dim)

    Raises:
        ValueError: `size` or `num_scales` is less than one, the images have another number of channels, or an
            input has another shape or is no float.

    Reference:
        Mnih, Heess, Graves, Kavukcuoglu. Recurrent Models of Visual Attention. NIPS 2014. Sections 3.1 and 4.

    Example:
        >>> network = GlimpseNetwork(1, 8, num_scales=2)
        >>> network(torch.rand(5, 1, 28, 28), torch.zeros(5, 2)).shape
        torch.Size([5, 256])
    """

    def __init__(
        self,
        in_channels: int,
        size: int,
        *,
        num_scales: int = 1,
        hidden_dim: int = 128,
        location_dim: int = 128,
        dim: int = 256,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.sensor = GlimpseSensor(size, num_scales)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.glimpse_hidden = nn.Linear(num_scales * in_channels * size**2, hidden_dim, **factory)
        self.location_hidden = nn.Linear(2, location_dim, **factory)
        self.glimpse_out = nn.Linear(hidden_dim, dim, **factory)
        self.location_out = nn.Linear(location_dim, dim, **factory)

    def forward(self, images: Tensor, locations: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ValueError(f"images must be (B, {self.in_channels}, H, W), got {tuple(images.shape)}")
        locations = locations.detach()
        glimpse = self.glimpse_hidden(self.sensor(images, locations).flatten(-4)).relu()
        where = self.location_hidden(locations.to(self.location_hidden.weight.dtype)).relu()
        return (self.glimpse_out(glimpse) + self.location_out(where)).relu()
