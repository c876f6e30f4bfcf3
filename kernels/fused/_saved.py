"""What the backward pass of a registered operation keeps of its forward pass."""

from typing import Any

from torch import Tensor


def save(ctx: Any, inputs: tuple[Any, ...], *outputs: Tensor) -> None:
    ctx.others = [None if isinstance(given, Tensor) else given for given in inputs]
    ctx.save_for_backward(*(given if isinstance(given, Tensor) else None for given in inputs), *outputs)


def saved(ctx: Any) -> tuple[list[Any], tuple[Tensor, ...]]:
    """The inputs, and the outputs that were saved with them."""
    tensors = ctx.saved_tensors  # once: under a checkpoint each look computes them again
    n = len(ctx.others)
    inputs = [other if t is None else t for t, other in zip(tensors[:n], ctx.others, strict=True)]
    return inputs, tensors[n:]
