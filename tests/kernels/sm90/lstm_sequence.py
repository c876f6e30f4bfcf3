"""Steps of LSTMs, a case for every dtype, size and variant: "bfloat16-512-norms"."""

from functools import partial
from itertools import product

import torch
from lamina.kernels.fused.lstm_sequence import backward_steps, forward_steps
from torch import Tensor

VARIANTS = {
    "peepholes": {"peepholes"},
    "norms": {"norms"},
    "peepholes norms lengths": {"peepholes", "norms", "lengths"},
    "peepholes projection": {"peepholes", "projection"},
}


def call(dtype: torch.dtype, size: int, variant: set[str]) -> None:
    def some(*shape: int, of: str = "", dtype: torch.dtype = dtype) -> Tensor | None:
        return torch.zeros(shape, dtype=dtype) if not of or of in variant else None

    steps, batch, wide = 1, 4, torch.promote_types(dtype, torch.float32)
    outputs = size // 2 if "projection" in variant else size
    lengths = torch.ones(batch, dtype=torch.int64) if "lengths" in variant else None
    parameters = [
        some(4 * size, outputs),
        some(3, size, of="peepholes"),
        some(4 * size, of="norms"),
        some(size, of="norms"),
        some(size, of="norms"),
        some(outputs, size, of="projection"),
    ]
    gates, row, states = some(steps, batch, 4 * size), some(steps, batch, size), some(steps, batch, outputs)
    memories = some(steps + 1, batch, size, dtype=wide)
    before = some(batch, outputs), some(batch, size, dtype=wide)
    written = [some(steps + 1, batch, outputs), memories, gates.clone(), some(steps, 0), row]
    forward_steps([gates, *before, lengths, *parameters], written, (1e-5, False))
    backward_steps(
        [states, gates, memories, gates, some(steps, 0), lengths, *parameters, *before],
        [gates, gates, row, states, *(t.clone() for t in before)],
        (1e-5, False),
    )


CASES = {
    f"{str(dtype).removeprefix('torch.')}-{size}-{name}": partial(call, dtype, size, variant)
    for dtype, size, (name, variant) in product(
        (torch.float16, torch.bfloat16, torch.float32, torch.float64),
        (5, 128, 512, 1000, 2048, 4096),
        VARIANTS.items(),
    )
}
