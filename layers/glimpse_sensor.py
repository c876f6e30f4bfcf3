"""The retina of recurrent visual attention (Mnih et al., 2014)."""

from torch import Tensor, nn

from ..kernels.extract_glimpses import check_glimpses, extract_glimpses


class GlimpseSensor(nn.Module):
    """Cuts square patches around a location, each scale twice as wide as the last, all brought to one size.

    .. math:: \\rho(x, l) = \\left[ \\operatorname{pool}_{2^s}\\left(
              \\operatorname{patch}_{g 2^s}(x, l) \\right) \\right]_{s = 0 \\dots k - 1}

    A location (x, y) is (-1, -1) in the upper left corner of the image, (0, 0) in its middle and (1, 1) in
    the lower right corner. What lies outside the image is zero. Gradients pass to the images and none to the
    locations: the paper trains those by REINFORCE. What a patch is to the pixel says
    `lamina.kernels.extract_glimpses`, which this wraps, and where it differs from the well-known port. No
    parameters.

    Args:
        size: g, height and width of a glimpse in pixels.
        num_scales: k; scale s covers g 2^s pixels of the image.

    Shape:
        - images: (B, C, H, W)
        - locations: (B, 2) as (x, y), or (B, T, 2) for several glimpses of each image
        - output: (B, num_scales, C, size, size), or (B, T, num_scales, C, size, size)

    Raises:
        ValueError: `size` or `num_scales` is less than one, or an input has another shape or is no float.

    Reference:
        Mnih, Heess, Graves, Kavukcuoglu. Recurrent Models of Visual Attention. NIPS 2014. Section 3.1.

    Example:
        >>> sensor = GlimpseSensor(8, num_scales=3)
        >>> sensor(torch.rand(2, 1, 60, 60), torch.zeros(2, 2)).shape
        torch.Size([2, 3, 1, 8, 8])
    """

    def __init__(self, size: int, num_scales: int = 1) -> None:
        super().__init__()
        check_glimpses(size, num_scales)
        self.size, self.num_scales = size, num_scales

    def forward(self, images: Tensor, locations: Tensor) -> Tensor:
        return extract_glimpses(images, locations, self.size, self.num_scales)

    def extra_repr(self) -> str:
        return f"{self.size}, num_scales={self.num_scales}"
