"""One entry of the contract list: how to make a small one of a public part, and how to call it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def _nothing(dtype: torch.dtype) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Case:
    """`name` is the public name, and a variant after a blank: "LSTMCell peepholes".

    `make` takes device= and dtype=; `args` and `kwargs` take a dtype and give the inputs of a call.
    `dynamic` tells for each positional tensor which of its dimensions vary in a compiled graph.
    `trains` is False where not every parameter reaches the output, `differentiable` where none does.
    """

    name: str
    make: Callable[..., nn.Module]
    args: Callable[[torch.dtype], tuple[Any, ...]]
    kwargs: Callable[[torch.dtype], Mapping[str, Any]] = _nothing
    dynamic: tuple[tuple[int, ...], ...] = ((0,),)
    trains: bool = True
    differentiable: bool = True
    exports: bool = True

    @property
    def part(self) -> str:
        return self.name.split()[0]

    def __str__(self) -> str:
        return self.name


def tensors(output: Any) -> list[Tensor]:
    """The tensors of an output, whatever tuple or mapping it comes in."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [t for value in output.values() for t in tensors(value)]
    if isinstance(output, (tuple, list)):
        return [t for value in output for t in tensors(value)]
    return []
