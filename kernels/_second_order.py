"""Second derivatives of a path that has only first ones: the definition's, taken where they are asked for."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters


def twice_differentiable(
    fast: Callable[..., Tensor], definition: Callable[..., Tensor], *inputs: Tensor | None
) -> Tensor:
    """`fast(*inputs)`, whose gradient under `create_graph` is that of `definition`, and so has one itself.

    Nothing but the inputs is kept for it. Compiled code has no second derivatives: there it is `fast` alone,
    as under one transform of `torch.func`; under several it is `definition`, which all of them can take.
    """
    if torch.compiler.is_compiling():
        return fast(*inputs)
    if transforms := retrieve_all_functorch_interpreters():
        return (fast if len(transforms) == 1 else definition)(*inputs)
    tensors = [t for t in inputs if t is not None]
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        return fast(*inputs)

    def with_gaps(function: Callable[..., Tensor], given: tuple[Tensor, ...]) -> Tensor:
        rest = iter(given)
        return function(*(None if t is None else next(rest) for t in inputs))

    passing: list[Tensor] = []
    entered = _Enter.apply(passing, lambda *given: with_gaps(definition, given), *tensors)
    out: Tensor = _Leave.apply(passing, with_gaps(fast, entered))
    return out


class _Leave(torch.autograd.Function):
    """The identity. Where a graph of the backward pass is made, it hands the cotangent to `_Enter`."""

    @staticmethod
    def forward(passing: list[Tensor], out: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.passing = inputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        if torch.is_grad_enabled():
            ctx.passing[:] = [grad]
        return None, grad


class _Enter(torch.autograd.Function):
    """The identity. Where a cotangent was handed on, it gives the definition's gradients for what came."""

    @staticmethod
    def forward(
        passing: list[Tensor], definition: Callable[..., Tensor], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.passing, ctx.definition, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.passing:
            return None, None, *grads
        cotangent = ctx.passing.pop()
        inputs = ctx.saved_tensors
        wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad[2:], strict=True) if needed]
        found = iter(
            torch.autograd.grad(
                ctx.definition(*inputs), wanted, cotangent, create_graph=True, allow_unused=True
            )
        )
        return None, None, *(next(found) if needed else None for needed in ctx.needs_input_grad[2:])
