"""How a grid is cut into windows, moved or not, and put together again."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


class Axis(NamedTuple):
    """One axis of a grid, cut every `window` cells from `shift` on; what is before `shift` joins the last."""

    length: int
    window: int
    shift: int

    @property
    def count(self) -> int:
        return -(-self.length // self.window)

    @property
    def padding(self) -> int:
        return self.count * self.window - self.length

    def mask(self, device: torch.device) -> Tensor:
        """(count, window, window): whether two places of a window are neighbours, and the key no padding.

        Padding sees padding too, so that each place sees at least itself and no softmax is over nothing.
        """
        padded = self.length + self.padding
        cells = torch.arange(self.shift, self.shift + padded, device=device)
        # Numbers, not truths: inductor cannot compare those of two indices.
        turn = (cells // max(padded, 1)).unflatten(
            0, (self.count, self.window)
        )  # 1 for what is rolled around
        padding = ((cells >= self.length) & (cells < padded)).unflatten(0, (self.count, self.window))
        same = turn[:, :, None] == turn[:, None, :]
        return same & (padding[:, :, None] | ~padding[:, None, :])


class Windows:
    """The windows of a grid. An axis that fits into one window is one, and is not shifted."""

    def __init__(self, grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> None:
        self.rows, self.cols = (
            Axis(length, max(length, 1), 0) if length <= side else Axis(length, side, by)
            for length, side, by in zip(grid, window, shift, strict=True)
        )

    @property
    def size(self) -> tuple[int, int]:
        return self.rows.window, self.cols.window

    def cut(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, windows, places, C)."""
        rows, cols = self.rows, self.cols
        image = tokens.unflatten(1, (rows.length, cols.length))
        if rows.padding or cols.padding:
            image = F.pad(image, (0, 0, 0, cols.padding, 0, rows.padding))
        if rows.shift or cols.shift:
            image = image.roll((-rows.shift, -cols.shift), (1, 2))
        return rearrange(image, "b (y r) (x c) d -> b (y x) (r c) d", **self._sizes)

    def join(self, windows: Tensor) -> Tensor:
        """(B, windows, places, C) -> (B, N, C), without the padding."""
        rows, cols = self.rows, self.cols
        image = rearrange(windows, "b (y x) (r c) d -> b (y r) (x c) d", **self._sizes)
        if rows.shift or cols.shift:
            image = image.roll((rows.shift, cols.shift), (1, 2))
        return image[:, : rows.length, : cols.length].flatten(1, 2)

    def mask(self, device: torch.device) -> Tensor | None:
        """(windows, places, places), True where the first sees the second; None where all see all."""
        if not any(axis.padding or axis.shift for axis in (self.rows, self.cols)):
            return None
        of_rows, of_cols = self.rows.mask(device), self.cols.mask(device)
        both = of_rows[:, None, :, None, :, None] & of_cols[None, :, None, :, None, :]
        return both.flatten(4, 5).flatten(2, 3).flatten(0, 1)

    @property
    def _sizes(self) -> dict[str, int]:
        rows, cols = self.rows, self.cols
        return {"y": rows.count, "x": cols.count, "r": rows.window, "c": cols.window}
