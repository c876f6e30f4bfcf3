"""How a block takes a part that its user may swap, and how it calls an attention of any kind."""

from collections.abc import Callable
from inspect import signature
from typing import Any

from torch import Tensor, nn

from ..layers import KeyValueCache, Packing

Part = nn.Module | Callable[..., nn.Module]


def made(part: Part, *sizes: int, **options: Any) -> nn.Module:
    """`part` itself where it is a module already, else what it makes of the sizes and options."""
    return part if isinstance(part, nn.Module) else part(*sizes, **options)


def attend(
    attention: nn.Module,
    query: Tensor,
    key: Tensor | None = None,
    *,
    key_mask: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    cache: KeyValueCache | None = None,
    packing: Packing | None = None,
) -> Tensor:
    """Calls any attention with what is given and nothing else, so that one which cannot honour it says so.

    An attention without, say, `mask` in its signature raises a TypeError when a mask is given, and works
    without.
    """
    given: dict[str, Any] = {"key_mask": key_mask, "mask": mask, "bias": bias, "cache": cache}
    given["packing"] = packing
    given = {name: value for name, value in given.items() if value is not None}
    if is_causal:
        given["is_causal"] = True
    output: Tensor = attention(query, **given) if key is None else attention(query, key, **given)
    return output


def takes_cache(attention: nn.Module) -> bool:
    """Whether it can decode step by step."""
    return "cache" in signature(attention.forward).parameters
