"""Glimpses: square patches of images around continuous locations, at several scales (Mnih et al., 2014).

    out[b, s, c, i, j] = mean over the 2^s x 2^s samples of cell (i, j) of  bilinear(image[b, c], sample)

where the samples of scale s are one pixel apart and their square of size 2^s on a side is centred on the
location.

Samples one pixel apart make a patch separable. PyTorch's path is two small matrix products an image; where
there is nothing to average, at one scale, `grid_sample` is faster on a CPU. The kernel has a cell read its
(2^s + 1)^2 pixels, in one launch for all scales, and in the backward pass a pixel its cells, of which there
are at most four a scale.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import Refusals, choose, forced_backend, forward_derivatives, operation, triton_refusal

_KERNEL_SCALES = 6  # a cell of the widest takes 33 x 33 pixels


def _refusals(images: Tensor, locations: Tensor, size: int, num_scales: int = 1) -> Refusals:
    refusals: Refusals = {}
    if (reason := triton_refusal(images, locations)) is not None:
        refusals["triton"] = reason
    elif images.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        refusals["triton"] = f"the kernel has no {images.dtype}"
    elif forced_backend() is None and torch.float64 in (images.dtype, locations.dtype):
        refusals["triton"] = "of float64 the kernel is made for tests"
    elif forced_backend() is None and num_scales > _KERNEL_SCALES:
        refusals["triton"] = f"of more than {_KERNEL_SCALES} scales two products are fewer operations"
    return refusals


@operation(_refusals)
def extract_glimpses(images: Tensor, locations: Tensor, size: int, num_scales: int = 1) -> Tensor:
    """Patches around each location: scale s covers size 2^s pixels on a side, averaged down to `size`.

    (-1, -1) is the outer corner of the upper left pixel, (1, 1) that of the lower right one, and (0, 0) the
    middle of the image, on every image: x is at (x + 1) W / 2 - 0.5 counted from the centre of the first
    pixel. The middle of the patch lies there. So a patch of even size falls on the pixels where the location
    is a corner between pixels (in the middle of an image of even size), one of odd size where it is the
    centre of a pixel (in the middle of an image of odd size): there a glimpse is a slice of the image, and a
    wider scale its `avg_pool2d`. Elsewhere it is interpolated bilinearly. Outside the image there are zeros.

    The well-known port of the paper slices after rounding down, so that its patch is up to a pixel, half a
    pixel in the mean, off the location, and an odd one fails at 1. The gradient of the images passes; none
    passes to the locations, which the paper trains by REINFORCE alone.

    Time O(B C T size num_scales H (W + size)), memory O(B T size num_scales (H + W) + B C T H size
    num_scales), in two matrix products; the definition takes a sample a pixel, and so does PyTorch's
    `grid_sample`, which a CPU runs at one scale where no gradient is wanted. The kernel takes time
    O(B C T size² 4^num_scales), backward O(B C T num_scales H W), and no memory beyond its output. It has no
    atomics: it is deterministic, as all are on a CPU. All are differentiable in the images any number of
    times, the kernel by itself; a forward-mode derivative takes the definition or the products.

    Args:
        images: (B, C, H, W).
        locations: (B, 2) as (x, y), or (B, T, 2) for T glimpses of each image; any float.
        size: height and width of a glimpse.
        num_scales: how many scales, each twice as wide as the one before.

    Returns:
        (B, num_scales, C, size, size), or (B, T, num_scales, C, size, size), in the dtype of the images;
        what it is made from is at least float32, but for products under autocast.

    Raises:
        ValueError: `size` or `num_scales` is less than one, or an input has another shape or is no float.

    Reference:
        Mnih, Heess, Graves, Kavukcuoglu. Recurrent Models of Visual Attention. NIPS 2014. Section 3.1.

    Example:
        >>> images = torch.arange(16.0).view(1, 1, 4, 4)
        >>> extract_glimpses(images, torch.zeros(1, 2), 2)
        tensor([[[[[ 5.,  6.],
                   [ 9., 10.]]]]])
    """
    check_glimpses(size, num_scales)
    _check(images, locations)
    locations = locations.detach()
    several = locations if locations.ndim == 3 else locations.unsqueeze(1)
    path = choose("extract_glimpses", _refusals(images, locations, size, num_scales))
    if path == "triton":
        from .fused import extract_glimpses as fused

        wide = torch.promote_types(several.dtype, torch.float32)
        glimpses = fused.extract_glimpses(images, several.to(wide), size, num_scales)
    elif path == "torch":
        way = _by_grid_sample if _samples_do(images, several, num_scales) else _by_products
        glimpses = way(images, several, size, num_scales)
    else:
        glimpses = extract_glimpses_reference(images, several, size, num_scales)
    return glimpses if locations.ndim == 3 else glimpses.squeeze(1)


def extract_glimpses_reference(images: Tensor, locations: Tensor, size: int, num_scales: int) -> Tensor:
    """The definition, in PyTorch, of `locations` (B, T, 2): what the other paths are tested against."""
    x, y = _pixels(images, locations)
    scales = []
    for scale in range(num_scales):
        samples = torch.arange(size * 2**scale, device=images.device) - (size * 2**scale - 1) / 2
        patch = _bilinear(images.to(x.dtype), y.unsqueeze(-1) + samples, x.unsqueeze(-1) + samples)
        pooled = F.avg_pool2d(patch.flatten(0, 1), 2**scale).unflatten(0, patch.shape[:2])
        scales.append(pooled)
    return torch.stack(scales, 2).to(images.dtype)


def _bilinear(images: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """The samples (B, T, C, n, n) of the images in the rows y and the columns x, both (B, T, n)."""
    height, width = images.shape[2:]
    batch = torch.arange(len(images), device=images.device).view(-1, 1, 1, 1)
    patch = images.new_zeros(())
    # Two pixels outside all shares are zero: clamped there, infinity does as well and no integer overflows.
    y, x = y.clamp(-2, height + 1), x.clamp(-2, width + 1)
    for lower in (False, True):
        for right in (False, True):
            row, column = y.floor() + lower, x.floor() + right
            across = (1 - (x - column).abs()) * ((column >= 0) & (column < width))
            down = (1 - (y - row).abs()) * ((row >= 0) & (row < height))
            row, column = row.clamp(0, height - 1).long(), column.clamp(0, width - 1).long()
            pixels = images[batch, :, row.unsqueeze(-1), column.unsqueeze(-2)]  # (B, T, n, n, C)
            patch = patch + pixels * (down.unsqueeze(-1) * across.unsqueeze(-2)).unsqueeze(-1)
    return patch.movedim(-1, 2)


def _by_products(images: Tensor, locations: Tensor, size: int, num_scales: int) -> Tensor:
    (batch, channels, height, width), count = images.shape, locations.shape[1] * num_scales
    x, y = _pixels(images, locations)
    of_columns, of_rows = _shares(x, width, size, num_scales), _shares(y, height, size, num_scales)
    columns = images.to(x.dtype).flatten(1, 2) @ of_columns.flatten(1, 3).mT
    columns = columns.view(batch, channels, height, count, size).permute(0, 3, 2, 1, 4)
    glimpses = of_rows.flatten(1, 2) @ columns.flatten(3)
    glimpses = glimpses.view(batch, count // num_scales, num_scales, size, channels, size).transpose(3, 4)
    return glimpses.to(images.dtype)


def _samples_do(images: Tensor, locations: Tensor, num_scales: int) -> bool:
    """Whether `grid_sample` is the faster way, and as exact. Of its gradient there is no further one."""
    wide = torch.promote_types(torch.promote_types(images.dtype, locations.dtype), torch.float32)
    return (
        num_scales == 1
        and images.device.type == "cpu"
        and images.dtype is wide
        and not (images.requires_grad and torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
        and not forward_derivatives(images)
    )


def _by_grid_sample(images: Tensor, locations: Tensor, size: int, num_scales: int) -> Tensor:
    (height, width), count = images.shape[2:], locations.shape[1]
    cells = torch.arange(1 - size, size, 2, device=images.device, dtype=images.dtype)
    places = locations.unsqueeze(-1) + torch.stack([cells / width, cells / height])
    x, y = places.clamp(-2, 2).unbind(2)  # beyond 2 all is zero, and infinity would be none
    grid = torch.stack(torch.broadcast_tensors(x.unsqueeze(-2), y.unsqueeze(-1)), -1)
    glimpses = F.grid_sample(images, grid.flatten(1, 2), align_corners=False)
    return glimpses.unflatten(2, (count, size)).movedim(2, 1).unsqueeze(2)


def _shares(middle: Tensor, length: int, size: int, num_scales: int) -> Tensor:
    """What each of `length` pixels is in each cell of each glimpse, (B, T, num_scales, size, length).

    A cell is the mean of `step` samples a pixel apart, and the shares of a pixel in them are tents one apart,
    whose sum is a trapezoid.
    """
    step = 2 ** torch.arange(num_scales, device=middle.device).view(-1, 1)
    cells = torch.arange(size, device=middle.device) * step - (size * step - 1) / 2
    past = torch.arange(length, device=middle.device) - (middle[..., None, None] + cells).unsqueeze(-1)
    step = step.unsqueeze(-1)
    return torch.minimum(past + 1, step - past).clamp(0, 1) / step


def _pixels(images: Tensor, locations: Tensor) -> tuple[Tensor, Tensor]:
    """The locations' x and y, both (B, T), in pixels from the centre of the first; at least float32."""
    dtype = torch.promote_types(torch.promote_types(images.dtype, locations.dtype), torch.float32)
    x, y = locations.to(dtype).unbind(-1)
    height, width = images.shape[2:]
    return (x + 1) * (width / 2) - 0.5, (y + 1) * (height / 2) - 0.5


def check_glimpses(size: int, num_scales: int) -> None:
    """Raises ValueError where glimpses of this size cannot be taken."""
    for name, number in ("size", size), ("num_scales", num_scales):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")


def _check(images: Tensor, locations: Tensor) -> None:
    fits = images.ndim == 4 and locations.ndim in (2, 3)
    if not fits or locations.shape[-1] != 2 or locations.shape[0] != images.shape[0]:
        raise ValueError(
            "expected images (B, C, H, W) and locations (B, 2) or (B, T, 2), got "
            f"images {tuple(images.shape)} and locations {tuple(locations.shape)}"
        )
    for name, tensor in ("images", images), ("locations", locations):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a float, got {tensor.dtype}")
