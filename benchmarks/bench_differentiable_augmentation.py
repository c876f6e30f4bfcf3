"""Differentiable augmentation beside the operations of its authors, one after the other, on the same draw."""

import pytest
import torch
import torch.nn.functional as F
from lamina.layers import DifferentiableAugmentation

SIZES = {"cifar": (64, 3, 32, 32), "128-px": (16, 3, 128, 128), "256-px": (8, 3, 256, 256)}


def one_by_one(x: torch.Tensor, drawn: dict[str, torch.Tensor]) -> torch.Tensor:
    """As Zhao et al. do it: three passes for the colours, a gather of padded pixels, a mask by indices."""
    batch, _, height, width = x.shape
    image = torch.arange(batch, device=x.device)[:, None, None]
    x = x + drawn["brightness"].view(-1, 1, 1, 1)
    mean = x.mean(1, keepdim=True)
    x = (x - mean) * drawn["saturation"].view(-1, 1, 1, 1) + mean
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * drawn["contrast"].view(-1, 1, 1, 1) + mean

    def places(of: torch.Tensor, side: int, *, edge: int) -> torch.Tensor:
        return of.clamp(0, side - 1 + edge)

    rows = torch.arange(height, device=x.device)[None, :, None] - drawn["shift"][:, 0, None, None] + 1
    cols = torch.arange(width, device=x.device)[None, None, :] - drawn["shift"][:, 1, None, None] + 1
    padded = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)
    x = padded[image, places(rows, height, edge=2), places(cols, width, edge=2)].permute(0, 3, 1, 2)
    high, wide = int(height * 0.5 + 0.5), int(width * 0.5 + 0.5)
    rows = torch.arange(high, device=x.device)[None, :, None] + drawn["cutout"][:, 0, None, None] - high // 2
    cols = torch.arange(wide, device=x.device)[None, None, :] + drawn["cutout"][:, 1, None, None] - wide // 2
    mask = torch.ones(batch, height, width, device=x.device)
    mask[image, places(rows, height, edge=0), places(cols, width, edge=0)] = 0
    return x * mask[:, None]


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("how", ["lamina", "one by one"])
def bench_differentiable_augmentation(benchmark, benchmark_op, how, sizes, direction):
    benchmark.group = f"DifferentiableAugmentation {sizes} {direction}"
    augment = DifferentiableAugmentation()
    x = torch.randn(sizes)
    drawn = augment.draw(x.to("cuda" if torch.cuda.is_available() else "cpu"))
    both = [lambda x: augment.augment(x, drawn), lambda x: one_by_one(x, drawn)]
    timed, other = both if how == "lamina" else both[::-1]
    benchmark_op(timed, [x], backward=direction == "forward+backward", reference=other)
