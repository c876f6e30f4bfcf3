"""Steps of decoders that attend, a case for every dtype, size and number of keys: "bfloat16-1000-50-mask"."""

from functools import partial
from itertools import product

import torch
from lamina.kernels.fused.attentive_gru import backward_steps, forward_steps
from torch import Tensor


def call(dtype: torch.dtype, size: int, length: int, mask: bool) -> None:
    def some(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    steps, batch, channels, hidden = 1, 2, 2 * size, size
    wide = torch.promote_types(dtype, torch.float32)
    state, states = some(batch, size), some(steps + 1, batch, size)
    contexts, weights = some(steps, batch, channels), some(steps, batch, length)
    gates, products = some(steps, batch, 3 * size), some(steps, batch, hidden + 2 * size)
    keys, values = some(batch, length, hidden), some(batch, length, channels)
    shared = [
        some(hidden + 2 * size, size),
        some(size, size),
        some(3 * size, channels),
        keys,
        values,
        some(hidden),
    ]
    key_mask = torch.ones(batch, length, dtype=torch.bool) if mask else None
    forward_steps([gates, state, *shared, key_mask], [states, contexts, weights, gates, products], ())
    added = (
        some(batch, size, dtype=wide),
        some(batch, length, hidden, dtype=wide),
        some(batch, hidden, dtype=wide),
    )
    backward_steps(
        [states[1:], contexts, weights if mask else None, states, weights, gates, products, *shared, *added],
        [gates, products, contexts, *(t.clone() for t in added)],
        (),
    )


CASES = {
    f"{str(dtype).removeprefix('torch.')}-{size}-{length}" + "-mask" * mask: partial(
        call, dtype, size, length, mask
    )
    for dtype, (size, length), mask in product(
        (torch.float16, torch.bfloat16, torch.float32, torch.float64),
        ((5, 7), (1000, 50), (512, 64), (512, 8192)),
        (False, True),
    )
}
