"""The feed-forward network, a few tokens at a time (Kitaev et al., 2020)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .feed_forward import HOOKS, FeedForward

# Functions of their input alone, which give the same when they are computed again.
_PLAIN_ACTIVATIONS = (
    nn.GELU,
    nn.ReLU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.ELU,
    nn.LeakyReLU,
    nn.Mish,
    nn.Softplus,
    nn.Identity,
)


class ChunkedFeedForward(FeedForward):
    """`FeedForward`, computed for `chunk_size` tokens at a time, and again in the backward pass.

    .. math:: y_{[i]} = \\operatorname{FeedForward}(x_{[i]}), \\quad x = [x_{[1]}; x_{[2]}; \\dots]

    The function, its parameters and their names are those of `FeedForward`. The hidden layer, `hidden_dim /
    dim` times the size of x, exists for `chunk_size` tokens at most, counted through the batch: the backward
    pass computes it again from x, with the same dropout. Forward and backward together take a sixth more
    products than with the hidden layer kept (a third with dropout, under autocast, or where a layer has hooks
    or is not `nn.Linear`). Without gradients nothing is computed twice.

    With `recompute=False` the chunks are for calls without gradients: the hidden layers of all would be kept
    for a backward pass, which saves nothing, so x goes through at once. So it does when compiled, where a
    loop would fix the number of tokens: what is kept is then the compiler's choice. A second derivative is
    that of `FeedForward`, with its memory; `torch.func` needs `recompute=False`.

    How it differs: reformer-pytorch's `Chunk` takes a number of chunks, and keeps all hidden layers in
    training. With dropout the distribution is that of `FeedForward`, and the draws are others.

    Args:
        dim: channels of the model.
        hidden_dim: size of the hidden layer, 4·dim by default.
        chunk_size: tokens at a time.
        recompute: whether the backward pass computes the hidden layer again.
        activation: makes σ.
        gated: whether a third matrix gates the hidden layer.
        dropout: probability of dropping an output.
        hidden_dropout: probability of dropping a hidden unit; `dropout` where it is not given.
        bias: whether the linear layers add one.
        device: where the parameters are.
        dtype: of the parameters.

    Shape:
        - x: (..., dim), for example (B, L, dim)
        - output: as x

    Raises:
        ValueError: `chunk_size` is less than one.

    Reference:
        Kitaev, Kaiser, Levskaya. Reformer: The Efficient Transformer. ICLR 2020. Section 3.

    Example:
        >>> feed_forward = ChunkedFeedForward(8, chunk_size=3)
        >>> feed_forward(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int | None = None,
        *,
        chunk_size: int = 64,
        recompute: bool = True,
        activation: Callable[[], nn.Module] = nn.GELU,
        gated: bool = False,
        dropout: float = 0.0,
        hidden_dropout: float | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got chunk_size={chunk_size}")
        super().__init__(
            dim,
            hidden_dim,
            activation=activation,
            gated=gated,
            dropout=dropout,
            hidden_dropout=hidden_dropout,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.chunk_size = chunk_size
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or x.numel() <= self.chunk_size * x.shape[-1]:
            return super().forward(x)
        tokens = x.reshape(-1, x.shape[-1])
        keeps = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *self.parameters()))
        if keeps and not self.recompute:
            return super().forward(x)
        if self._is_plain(x):
            names, weights = zip(*self.named_parameters(remove_duplicate=False), strict=True)
            out: Tensor = _Chunks.apply(self, names, tokens, *weights)
        else:
            run = partial(checkpoint, super().forward, use_reentrant=False) if keeps else super().forward
            out = torch.cat([run(chunk) for chunk in tokens.split(self.chunk_size)])
        return out.view(*x.shape[:-1], out.shape[-1])

    def extra_repr(self) -> str:
        return f"chunk_size={self.chunk_size}" + ("" if self.recompute else ", recompute=False")

    def _is_plain(self, x: Tensor) -> bool:
        """Whether the three layers are their products and nothing else: no hook, no other class, no cast."""
        layers = [self.up, self.down] if self.gate is None else [self.up, self.gate, self.down]
        return (
            x.dtype in (torch.float32, torch.float64)  # half precision would add up the chunks in itself
            and all(type(layer) is nn.Linear and layer.weight.dtype == x.dtype for layer in layers)
            and type(self.activation) in _PLAIN_ACTIVATIONS
            and not getattr(self.activation, "inplace", False)
            and not any(getattr(part, hook) for part in (*layers, self.activation) for hook in HOOKS)
            and all(type(part) is nn.Dropout for part in (self.dropout, self.hidden_dropout))
            and not (self.training and (self.dropout.p or self.hidden_dropout.p))
            and x.device.type != "meta"  # which autocast does not know
            and not torch.is_autocast_enabled(x.device.type)
        )


class _Chunks(torch.autograd.Function):
    """The plain case by hand: the output is not computed again, and gradients are added up in place."""

    @staticmethod
    def forward(
        ctx: Any, layer: ChunkedFeedForward, names: tuple[str, ...], x: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.layer, ctx.names = layer, names
        ctx.save_for_backward(x, *parameters)
        weights = dict(zip(names, parameters, strict=True))
        out = x.new_empty(len(x), len(weights["down.weight"]))
        for chunk, rows in zip(x.split(layer.chunk_size), out.split(layer.chunk_size), strict=True):
            torch.mm(_hidden(layer, _inner(weights, chunk)), weights["down.weight"].T, out=rows)
        return out if layer.down.bias is None else out.add_(weights["down.bias"])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        layer, weights = ctx.layer, dict(zip(ctx.names, parameters, strict=True))
        needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # a second derivative is wanted: through the definition
            out = F.linear(
                _hidden(layer, _inner(weights, x)), weights["down.weight"], weights.get("down.bias")
            )
            wanted = [t for t, need in zip((x, *parameters), needed, strict=True) if need]
            found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
            return None, None, *(next(found) if need else None for need in needed)
        dx = torch.empty_like(x) if needed[0] else None
        sums = {
            n: torch.zeros_like(w) for (n, w), need in zip(weights.items(), needed[1:], strict=True) if need
        }
        # As in the forward pass, wherever the backward pass is called from.
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, len(x), layer.chunk_size):
                rows = slice(start, start + layer.chunk_size)
                chunk, g = x[rows], grad[rows]
                inner = [t.requires_grad_() for t in _inner(weights, chunk)]
                with torch.enable_grad():
                    hidden = _hidden(layer, inner)
                _add(sums, "down", g, hidden.detach())
                slopes = torch.autograd.grad(hidden, inner, g @ weights["down.weight"])
                for name, d in zip(("up", "gate"), slopes, strict=False):
                    _add(sums, name, d, chunk)
                if dx is not None:
                    torch.mm(slopes[0], weights["up.weight"], out=dx[rows])
                    if len(slopes) == 2:
                        dx[rows].addmm_(slopes[1], weights["gate.weight"])
        return None, None, dx, *(sums.get(name) for name in ctx.names)


def _inner(weights: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """What the activation takes: up(x), and gate(x) where there is one."""
    names = [name for name in ("up", "gate") if f"{name}.weight" in weights]
    return [F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias")) for name in names]


def _hidden(layer: FeedForward, inner: list[Tensor]) -> Tensor:
    up, *gate = inner
    hidden: Tensor = layer.activation(gate[0]) * up if gate else layer.activation(up)
    return hidden


def _add(sums: dict[str, Tensor], name: str, d: Tensor, x: Tensor) -> None:
    """Adds the gradients of a linear layer's weight and bias, from that of its output."""
    if (weight := sums.get(f"{name}.weight")) is not None:
        weight.addmm_(d.T, x)
    if (bias := sums.get(f"{name}.bias")) is not None:
        bias.add_(d.sum(0))
