"""Up-sampling by sub-pixels (Shi et al., 2016), of tokens on a grid."""

import torch.nn.functional as F
from torch import Tensor, nn


class PixelShuffleUpsample(nn.Module):
    """Spreads the channels of each token over a square of tokens.

    .. math:: y_{(r i + a,\\, r j + b),\\, c} = x_{(i, j),\\, c r^2 + a r + b}, \\quad 0 \\le a, b < r

    It is `nn.PixelShuffle` for tokens: the layout is that which their image would get, and nothing is
    computed. TransGAN's generator goes so from stage to stage, with twice the side and a quarter of the
    channels; its code leaves a transposed view behind, where this is contiguous. For images `nn.PixelShuffle`
    itself serves.

    Cost: one copy of x.

    Args:
        factor: r, how many times the rows and the columns.

    Shape:
        - x: (B, N, C), row by row
        - grid: rows and columns of x; a square where it is not given
        - output: (B, N·r², C / r²), row by row of a grid with r times the rows and columns

    Raises:
        ValueError: `factor` is less than one; N is not rows·cols of `grid`, or no square without it; C is not
            a multiple of r².

    Reference:
        Shi et al. Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel
        Convolutional Neural Network. CVPR 2016. Equation 4.
        Jiang, Chang, Wang. TransGAN: Two Pure Transformers Can Make One Strong GAN. NeurIPS 2021.

    Example:
        >>> upsample = PixelShuffleUpsample(2)
        >>> upsample(torch.randn(2, 64, 16)).shape, upsample(torch.randn(2, 15, 16), grid=(3, 5)).shape
        (torch.Size([2, 256, 4]), torch.Size([2, 60, 4]))
    """

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        if factor < 1:
            raise ValueError(f"factor must be at least 1, got factor={factor}")
        self.factor = factor

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        if x.dim() != 3:
            raise ValueError(f"x must be (B, N, C), got {tuple(x.shape)}")
        batch, length, channels = x.shape
        if grid is None:
            side = round(length**0.5)  # not math.isqrt, which torch.compile cannot trace
            if side * side != length:
                raise ValueError(f"without a grid the number of tokens must be a square, got {length}")
            grid = side, side
        rows, cols = grid
        if rows * cols != length:
            raise ValueError(f"grid must hold the {length} tokens of x, got grid={grid}")
        if channels % self.factor**2:
            raise ValueError(f"channels must be a multiple of factor² = {self.factor**2}, got {channels}")
        # A grid of tokens is an image with its channels last, which torch shuffles as it lies.
        image = x.reshape(batch, rows, cols, channels).permute(0, 3, 1, 2)
        return F.pixel_shuffle(image, self.factor).permute(0, 2, 3, 1).flatten(1, 2).contiguous()

    def extra_repr(self) -> str:
        return f"{self.factor}"
