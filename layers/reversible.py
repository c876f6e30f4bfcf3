"""Reversible residual layers (Gomez et al., 2017; Kitaev et al., 2020): memory that depth does not add to."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ._choices import Choices
from ._random_state import Autocast, RandomState


class ReversibleBlock(nn.Module):
    """Two residual layers on two streams, whose inputs can be computed from their outputs.

    .. math:: y_1 = x_1 + f(x_2), \\quad y_2 = x_2 + g(y_1); \\qquad
              x_2 = y_2 - g(y_1), \\quad x_1 = y_1 - f(x_2)

    f is `first`, in Reformer a norm and an attention, and g is `second`, a norm and a feed-forward network.
    Alone it computes and keeps what any module does; `Reversible` is what saves memory.

    Args:
        first: f, keeps the shape; called with those of the options below that are given.
        second: g, keeps the shape; called with its stream alone.

    Shape:
        - x1, x2: one shape, for example (B, L, C)
        - key_mask, mask, is_causal: what `first` takes, see `MultiHeadAttention`
        - output: (y1, y2), shaped as x1 and x2

    Raises:
        ValueError: a layer does not keep the shape of its stream.

    Reference:
        Gomez, Ren, Urtasun, Grosse. The Reversible Residual Network. NIPS 2017.
        Kitaev, Kaiser, Levskaya. Reformer: The Efficient Transformer. ICLR 2020. Section 3.

    Example:
        >>> block = ReversibleBlock(nn.Linear(8, 8), nn.Linear(8, 8))
        >>> x1, x2 = torch.randn(2, 3, 5, 8)
        >>> y1, y2 = block(x1, x2)
        >>> torch.allclose(block.inverse(y1, y2)[0], x1, atol=1e-6)
        True
    """

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(
        self,
        x1: Tensor,
        x2: Tensor,
        *,
        key_mask: Tensor | None = None,
        mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(y1, y2). Shapes as above."""
        given = _given(key_mask, mask, is_causal)
        y1 = x1 + _kept("first", self.first(x2, **given), x1)
        return y1, x2 + _kept("second", self.second(y1), x2)

    def inverse(
        self,
        y1: Tensor,
        y2: Tensor,
        *,
        key_mask: Tensor | None = None,
        mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The (x1, x2) that gave these, within rounding, where no layer draws random numbers or hashes."""
        x2 = y2 - self.second(y1)
        return y1 - self.first(x2, **_given(key_mask, mask, is_causal)), x2


class Reversible(nn.Module):
    """Reversible blocks, one after the other, whose activations are computed again in the backward pass.

    Kept for the backward pass are the last two streams alone; from them each block's inputs and activations
    come back, from the last block to the first. Memory is that of one block, however many there are, and time
    a third more in forward and backward together. The gradients are those of the plain stack, exact up to the
    rounding of y - f(x), which grows with depth: keep the streams in float32 (autocast does).

    What `LSHAttention` hashes is kept besides, two bytes a token, head and round: rounding would put a token
    near a tie into another bucket, and the layer into another function.

    Each layer is computed again with the random state (of the CPU and of the device) and the autocast that it
    had, so that dropout and hashing draw the same. Not from a `generator` of their own: its state is not
    known here. What a layer changes in itself (the averages of batch norm) it changes twice. Gradients reach
    x1, x2 and the parameters; a tensor that a layer holds otherwise, or that a hook takes out of it, has
    none. A module that is exchanged between forward and backward is refused.

    It runs as a plain stack with `recompute=False`, without gradients, and under `torch.compile` and
    `torch.export`. A second derivative and `torch.func` need `recompute=False`.

    How it differs: reformer-pytorch takes and returns the two streams joined along the channels, copies them
    for each block, restores the random state in training only and no autocast, and adds the gradients to
    `.grad` itself, which hides them from `torch.autograd.grad`. `torch.utils.checkpoint` of each block takes
    the same time, and keeps two streams a block.

    Args:
        blocks: the `ReversibleBlock`s; one that stands in more than one place shares its parameters.
        recompute: False for a plain stack.

    Shape:
        - x1: for example (B, L, C)
        - x2: as x1; None for x1 itself, as in Reformer
        - key_mask, mask, is_causal: what the blocks' `first` takes, see `MultiHeadAttention`
        - output: (y1, y2), each as x1

    Raises:
        ValueError: a block is no `ReversibleBlock`, or a layer does not keep the shape of its stream.
        RuntimeError: a second derivative is taken, or a parameter is not the one of the forward pass.

    Reference:
        Gomez, Ren, Urtasun, Grosse. The Reversible Residual Network. NIPS 2017.
        Kitaev, Kaiser, Levskaya. Reformer: The Efficient Transformer. ICLR 2020. Section 3.

    Example:
        >>> blocks = [ReversibleBlock(MultiHeadAttention(8, 2), FeedForward(8)) for _ in range(3)]
        >>> y1, y2 = Reversible(blocks)(torch.randn(2, 5, 8), is_causal=True)
        >>> y1.shape, y2.shape
        (torch.Size([2, 5, 8]), torch.Size([2, 5, 8]))
    """

    def __init__(self, blocks: Iterable[ReversibleBlock], *, recompute: bool = True) -> None:
        super().__init__()
        blocks = list(blocks)
        for i, block in enumerate(blocks):
            if not isinstance(block, ReversibleBlock):
                raise ValueError(f"blocks must be ReversibleBlocks, got {type(block).__name__} at {i}")
        self.blocks = nn.ModuleList(blocks)
        self.recompute = recompute

    def forward(
        self,
        x1: Tensor,
        x2: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor]:
        x2 = x1 if x2 is None else x2
        given = _given(key_mask, mask, is_causal)
        recompute = self.recompute and len(self.blocks) and not torch.compiler.is_compiling()
        if recompute and torch.is_grad_enabled():
            layers: list[Any] = [layer for block in self.blocks for layer in (block.first, block.second)]
            owned = [[p for p in layer.parameters() if p.requires_grad] for layer in layers]
            parameters = {id(p): p for own in owned for p in own}.values()
            if x1.requires_grad or x2.requires_grad or parameters:
                y1, y2 = _Recomputed.apply(layers, owned, given, x1, x2, *parameters)
                return y1, y2
        for block in self.blocks:
            x1, x2 = block(x1, x2, **given)
        return x1, x2

    def extra_repr(self) -> str:
        return "" if self.recompute else "recompute=False"


class _Recomputed(torch.autograd.Function):
    """The stack, with the parameters that take a gradient as inputs, so that autograd delivers to them."""

    @staticmethod
    def forward(
        ctx: Any,
        layers: list[nn.Module],
        owned: list[list[nn.Parameter]],
        given: dict[str, Any],
        x1: Tensor,
        x2: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.layers, ctx.owned, ctx.given, ctx.parameters = layers, owned, given, parameters
        ctx.autocast, ctx.states, ctx.dtypes = Autocast(x1.device.type), [], []
        choices = [Choices() for _ in layers]
        with ctx.autocast.again():
            for i in range(0, len(layers), 2):
                ctx.dtypes += x1.dtype, x2.dtype
                ctx.states.append(RandomState(x1))
                with choices[i].kept():
                    x1 = x1 + _kept("first", layers[i](x2, **given), x1)
                ctx.states.append(RandomState(x1))
                with choices[i + 1].kept():
                    x2 = x2 + _kept("second", layers[i + 1](x1), x2)
        chosen = [t for made in choices for t in made.made]
        ctx.sizes = [len(made.made) for made in choices]
        # Not for their values: autograd refuses what was changed in place between forward and backward.
        unchanged = [t for t in given.values() if isinstance(t, Tensor)]
        ctx.save_for_backward(x1, x2, *chosen, *unchanged, *parameters)
        return x1, x2

    @staticmethod
    def backward(ctx: Any, d1: Tensor, d2: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a reversible stack that recomputes has no second derivative (create_graph=True): "
                "make it with recompute=False"
            )
        y1, y2, *rest = ctx.saved_tensors
        chosen = iter(rest)
        choices = [Choices(list(islice(chosen, size))) for size in ctx.sizes]
        sums: dict[int, Tensor | None] = {id(p): None for p in ctx.parameters}
        with RandomState(y1).aside():
            for i in reversed(range(0, len(ctx.layers), 2)):
                with choices[i + 1].again():
                    out, dy1 = _again(ctx, i + 1, y1, {}, d2, sums)
                y2, d1 = (y2 - out).to(ctx.dtypes[i + 1]), d1 + dy1
                with choices[i].again():
                    out, dy2 = _again(ctx, i, y2, ctx.given, d1, sums)
                y1, d2 = (y1 - out).to(ctx.dtypes[i]), d2 + dy2
        return None, None, None, d1, d2, *sums.values()


def _again(
    ctx: Any, i: int, x: Tensor, given: dict[str, Any], grad: Tensor, sums: dict[int, Tensor | None]
) -> tuple[Tensor, Tensor]:
    """What layer i made of x, and the gradient of x; those of its parameters are added to `sums`."""
    layer = ctx.layers[i]
    held = {id(p) for p in layer.parameters()}
    if any(id(p) not in held for p in ctx.owned[i]):
        raise RuntimeError(
            "a parameter of a reversible stack was exchanged between forward and backward (by "
            "torch.func.functional_call?), so that nothing can be computed again: make the stack with "
            "recompute=False"
        )
    ctx.states[i].restore()
    x = x.detach().requires_grad_()
    with torch.enable_grad(), ctx.autocast.again():
        out = layer(x, **given)
    if not out.requires_grad:
        return out, torch.zeros_like(x)
    dx, *found = torch.autograd.grad(out, [x, *ctx.owned[i]], grad.to(out.dtype), allow_unused=True)
    for p, g in zip(ctx.owned[i], found, strict=True):
        before = sums[id(p)]
        if g is not None:
            sums[id(p)] = g if before is None else before + g
    return out.detach(), torch.zeros_like(x) if dx is None else dx


def _given(key_mask: Tensor | None, mask: Tensor | None, is_causal: bool) -> dict[str, Any]:
    """What is given and nothing else, so that a layer without, say, `mask` works, and says so if it comes."""
    given: dict[str, Any] = {"key_mask": key_mask, "mask": mask, "is_causal": is_causal or None}
    return {name: value for name, value in given.items() if value is not None}


def _kept(name: str, out: Tensor, x: Tensor) -> Tensor:
    if out.shape != x.shape:
        raise ValueError(f"{name} must keep the shape of its stream {tuple(x.shape)}, got {tuple(out.shape)}")
    return out
