"""Second derivatives of a path that has only first ones: the definition's, taken where they are asked for."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backend import transformed


def twice_differentiable(
    fast: Callable[..., Tensor], definition: Callable[..., Tensor], *inputs: Tensor | None, node: str = ""
) -> Tensor:
    """`fast(*inputs)`, whose gradient under `create_graph` is that of `definition`, and so has one itself.

    Nothing but the inputs is kept for it. Where `fast` is one node of autograd, whose name begins with `node`
    and whose inputs are the first of `inputs`, a hook on it is all that it costs; an empty name is for
    everything else. Compiled code has no second derivatives: there it is `fast` alone, as under one transform
    of `torch.func`; under several it is `definition`, which all of them can take.
    """
    if torch.compiler.is_compiling():
        return fast(*inputs)
    if transforms := transformed():
        return (fast if transforms == 1 else definition)(*inputs)
    tensors = [t for t in inputs if t is not None]
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        return fast(*inputs)

    gaps = [t is None for t in inputs]  # not the inputs themselves, which the graph would hold on to

    def with_gaps(function: Callable[..., Tensor], given: Sequence[Tensor]) -> Tensor:
        rest = iter(given)
        return function(*(None if gap else next(rest) for gap in gaps))

    if node:
        out = fast(*inputs)
        if out.grad_fn is not None and out.grad_fn.name().startswith(node):
            out.grad_fn.register_hook(_Replaced(lambda given: with_gaps(definition, given), tensors))
        return out
    passing: list[Tensor] = []
    entered = _Enter.apply(passing, lambda *given: with_gaps(definition, given), *tensors)
    left: Tensor = _Leave.apply(passing, with_gaps(fast, entered))
    return left


class _Replaced:
    """The hook: under `create_graph`, the definition's gradients in place of the node's.

    A plain backward pass lets go of the inputs, as it frees what the node has saved. If the graph was kept,
    and is gone through again with `create_graph`, PyTorch says what it has no derivative of.
    """

    def __init__(self, definition: Callable[[Sequence[Tensor]], Tensor], inputs: list[Tensor]) -> None:
        self.definition: Callable[[Sequence[Tensor]], Tensor] | None = definition
        self.inputs = inputs

    def __call__(
        self, gradients: tuple[Tensor | None, ...], cotangents: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...] | None:
        if not torch.is_grad_enabled():
            self.definition, self.inputs = None, []
        cotangent = cotangents[0]
        if self.definition is None or cotangent is None:
            return None
        places = [n for n, gradient in enumerate(gradients) if gradient is not None]
        out = self.definition(self.inputs)
        found = torch.autograd.grad(out, [self.inputs[n] for n in places], cotangent, create_graph=True)
        replaced = list(gradients)
        for place, gradient in zip(places, found, strict=True):
            replaced[place] = gradient
        return tuple(replaced)


class _Leave(torch.autograd.Function):
    """The identity. Where a graph of the backward pass is made, it hands the cotangent to `_Enter`.

    Both have the old form of `forward`, which costs half as much to call; no transform comes here.
    """

    @staticmethod
    def forward(ctx: Any, passing: list[Tensor], out: Tensor) -> Tensor:
        ctx.passing = passing
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        if torch.is_grad_enabled():
            ctx.passing[:] = [grad]
        return None, grad


class _Enter(torch.autograd.Function):
    """The identity. Where a cotangent was handed on, it gives the definition's gradients for what came."""

    @staticmethod
    def forward(
        ctx: Any, passing: list[Tensor], definition: Callable[..., Tensor], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.passing, ctx.definition = passing, definition
        ctx.save_for_backward(*inputs)
        return tuple(t.view_as(t) for t in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.passing:
            return None, None, *grads
        cotangent = ctx.passing.pop()
        inputs, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
        wanted = [t for t, n in zip(inputs, needed, strict=True) if n]
        gradients = torch.autograd.grad(
            ctx.definition(*inputs), wanted, cotangent, create_graph=True, allow_unused=True
        )
        found = iter(gradients)
        return None, None, *(next(found) if n else None for n in needed)
