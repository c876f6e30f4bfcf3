"""Augmentation that gradients pass through (Zhao et al., 2020)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_POLICIES = ("color", "translation", "cutout")


class DifferentiableAugmentation(nn.Module):
    """Colour, translation and cutout of each image by itself, for both sides of a discriminator.

    .. math:: L_D = \\mathbb{E}\\left[f_D(-D(T(x)))\\right] + \\mathbb{E}\\left[f_D(D(T(G(z))))\\right],
              \\quad L_G = \\mathbb{E}\\left[f_G(-D(T(G(z))))\\right]

    T draws anew for each image. With few images a discriminator learns them by heart; augmenting only the
    real ones would teach the generator to make augmented images, so T stands before D for real and fake
    alike, and the generator learns through it. Put it at the head of the discriminator. In evaluation it is
    the identity.

    - "color": brightness, then saturation, then contrast,

      .. math:: x + b, \\quad m + s (x - m), \\quad \\bar x + c (x - \\bar x)

      with b in [-0.5, 0.5), s in [0, 2), c in [0.5, 1.5), m the mean over the channels of each pixel, and x̄
      that over the whole image.
    - "translation": by whole pixels, at most `translation_ratio` of the side, with zeros behind.
    - "cutout": zeros in a rectangle of `cutout_ratio` of the sides, with its centre anywhere in the image.

    They follow each other as `policy` names them. The authors' code does the same by three passes for the
    colours and by gathers with indices for each pixel; here the three colours are one multiply-add.
    TransGAN takes `policy=("translation", "cutout", "color"), translation_ratio=0.2, cutout_probability=0.3`.

    `forward` draws from the global stream as dropout does, or from `generator`. `draw` and `augment` are its
    two halves, for one draw on two batches: the real and the fake ones, or an image and its mask.

    Cost: six passes over x with all three; memory for two images of indices beyond the outputs.

    Args:
        policy: what is done, in this order.
        translation_ratio: of the side, the furthest shift. 0.125 in the paper.
        cutout_ratio: of each side, the rectangle's. 0.5 in the paper.
        cutout_probability: that a batch is cut at all: one draw for the batch, as in TransGAN.

    Shape:
        - x: (B, C, H, W), any C; colours are meant in [-1, 1]
        - output: as x

    Raises:
        ValueError: a policy is unknown or named twice; a ratio or the probability is not between 0 and 1; x
            is no image; a draw is for another number of images.

    Reference:
        Zhao, Liu, Lin, Zhu, Han. Differentiable Augmentation for Data-Efficient GAN Training. NeurIPS 2020.
        Jiang, Chang, Wang. TransGAN: Two Pure Transformers Can Make One Strong GAN. NeurIPS 2021.

    Example:
        >>> augment = DifferentiableAugmentation()
        >>> real, fake = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)
        >>> augment(real).shape
        torch.Size([4, 3, 32, 32])
        >>> drawn = augment.draw(real)
        >>> augment.augment(real, drawn).shape == augment.augment(fake, drawn).shape
        True
    """

    def __init__(
        self,
        policy: Sequence[str] = _POLICIES,
        *,
        translation_ratio: float = 0.125,
        cutout_ratio: float = 0.5,
        cutout_probability: float = 1.0,
    ) -> None:
        super().__init__()
        if isinstance(policy, str) or len({*policy} & {*_POLICIES}) != len(policy):
            raise ValueError(f"policy must name some of {_POLICIES}, each once, got {policy!r}")
        for name, value in (
            ("translation_ratio", translation_ratio),
            ("cutout_ratio", cutout_ratio),
            ("cutout_probability", cutout_probability),
        ):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {name}={value}")
        self.policy = tuple(policy)
        self.translation_ratio = translation_ratio
        self.cutout_ratio = cutout_ratio
        self.cutout_probability = cutout_probability

    def forward(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """x augmented in training, x itself in evaluation. Shapes as above."""
        return self.augment(x, self.draw(x, generator=generator)) if self.training else x

    def draw(self, x: Tensor, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """What is to be done to each image of a batch like x. The values of x are not read.

        Args:
            x: (B, C, H, W).
            generator: where the numbers come from; the global stream by default. It may be on the CPU while x
                is on a GPU.

        Returns:
            By name, as far as the policy needs them: `brightness`, `saturation`, `contrast`, each (B,);
            `shift`, (B, 2), pixels down and to the right; `cutout`, (B, 2), row and column of the centre, and
            `cuts`, (1,) of bool.
        """
        _check_image(x)
        batch, _, height, width = x.shape
        device = x.device if generator is None else generator.device
        drawn: dict[str, Tensor] = {}

        def uniform(count: int) -> Tensor:
            return torch.empty(count, device=device).uniform_(generator=generator)

        def integers(low: tuple[int, int], counts: tuple[int, int]) -> Tensor:
            """Not by torch.randint, for which torch.compile wants fixed bounds."""
            pair = [
                at + (uniform(batch) * count).long().clamp(max=count - 1)
                for at, count in zip(low, counts, strict=True)
            ]
            return torch.stack(pair, dim=1)

        for what in self.policy:
            if what == "color":
                drawn["brightness"] = uniform(batch) - 0.5
                drawn["saturation"] = 2 * uniform(batch)
                drawn["contrast"] = uniform(batch) + 0.5
            elif what == "translation":
                rows, cols = _part(height, self.translation_ratio), _part(width, self.translation_ratio)
                drawn["shift"] = integers((-rows, -cols), (2 * rows + 1, 2 * cols + 1))
            else:
                rows, cols = _part(height, self.cutout_ratio), _part(width, self.cutout_ratio)
                # As the authors: an even rectangle has its centre between pixels, so at one place more.
                drawn["cutout"] = integers((0, 0), (height + 1 - rows % 2, width + 1 - cols % 2))
                drawn["cuts"] = uniform(1) < self.cutout_probability
        return {name: value.to(x.device) for name, value in drawn.items()}

    def augment(self, x: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        """x with what `draw` gave done to it, in training and in evaluation.

        Args:
            x: (B, C, H, W), as many images as in the draw.
            drawn: from `draw`, on the device of x.

        Returns:
            As x.
        """
        _check_image(x)
        for name, value in drawn.items():
            if name != "cuts" and len(value) != len(x):
                raise ValueError(f"drawn must be for {len(x)} images, got {name} for {len(value)}")
        for what in self.policy:
            if what == "color":
                x = _recolor(x, drawn["brightness"], drawn["saturation"], drawn["contrast"])
            elif what == "translation":
                x = _translate(x, drawn["shift"])
            else:
                size = tuple(_part(side, self.cutout_ratio) for side in x.shape[2:])
                x = x.masked_fill(_rectangle(x, drawn["cutout"], size) & drawn["cuts"], 0.0)
        return x

    def extra_repr(self) -> str:
        return (
            f"{self.policy}, translation_ratio={self.translation_ratio}, cutout_ratio={self.cutout_ratio}, "
            f"cutout_probability={self.cutout_probability}"
        )


def _part(side: int, ratio: float) -> int:
    return int(side * ratio + 0.5)


def _check_image(x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"x must be (B, C, H, W), got {tuple(x.shape)}")


def _recolor(x: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """The three after each other, multiplied out: c s x + c (1 - s) m + (1 - c) x̄ + b."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    b, s, c = (t.to(dtype)[:, None, None, None] for t in (brightness, saturation, contrast))
    pixel = x.mean(1, keepdim=True, dtype=dtype)
    whole = pixel.mean((2, 3), keepdim=True)
    return torch.addcmul(torch.addcmul((1 - c) * whole + b, pixel, c * (1 - s)), x.to(dtype), c * s).to(
        x.dtype
    )


def _translate(x: Tensor, shift: Tensor) -> Tensor:
    """y at (i, j) is x at (i - down, j - right), or zero where x ends before."""
    batch, channels, height, width = x.shape
    rows = torch.arange(height, device=x.device) - shift[:, :1]
    cols = torch.arange(width, device=x.device) - shift[:, 1:]
    outside = ((rows < 0) | (rows >= height))[:, :, None] | ((cols < 0) | (cols >= width))[:, None, :]
    source = rows.clamp(0, height - 1)[:, :, None] * width + cols.clamp(0, width - 1)[:, None, :]
    source = source.view(batch, 1, height * width).expand(batch, channels, height * width)
    return x.flatten(2).gather(2, source).view_as(x).masked_fill(outside[:, None], 0.0)


def _rectangle(x: Tensor, centre: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B, 1, H, W) of bool: the rectangle of that size around each centre, as far as it is in the image."""
    inside = []
    for axis in (0, 1):
        first = centre[:, axis : axis + 1] - size[axis] // 2
        place = torch.arange(x.shape[2 + axis], device=x.device)
        inside.append((place >= first) & (place < first + size[axis]))
    return inside[0][:, None, :, None] & inside[1][:, None, None, :]
