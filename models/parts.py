"""How a configuration, which is plain data, names a part that a user has swapped."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from .. import blocks, layers

Attention = str | Mapping[str, Any]
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
}


def find_part(spec: Attention | Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The part that a configuration names, "MultiHeadAttention" or {"name": …, "options": {…}}.

    What makes a module already is taken as it is.

    Raises:
        ValueError: neither `lamina.layers` nor `lamina.blocks` has a part of that name.
    """
    if callable(spec):
        return spec
    name, options = (spec, {}) if isinstance(spec, str) else (spec["name"], spec.get("options", {}))
    for folder in (layers, blocks):
        if name in folder.__all__ and isinstance(getattr(folder, name), type):
            part = getattr(folder, name)
            return partial(part, **options) if options else part
    raise ValueError(
        f"there is no part {name!r} in lamina.layers or lamina.blocks; "
        "one of your own has to be given again: from_pretrained(folder, attention=…)"
    )


def attention_part(part: Callable[..., nn.Module], **options: Any) -> Callable[..., nn.Module]:
    """`part` with what a configuration says of `MultiHeadAttention`, which another layer knows nothing of."""
    if (part.func if isinstance(part, partial) else part) is not layers.MultiHeadAttention:
        return part
    return partial(part, **options | (part.keywords if isinstance(part, partial) else {}))


def describe_part(part: Callable[..., nn.Module]) -> Attention | None:
    """What `find_part` finds `part` by; None where it is not Lamina's or its options are no plain data."""
    options = part.keywords if isinstance(part, partial) and not part.args else {}
    made_by = part.func if isinstance(part, partial) else part
    name = getattr(made_by, "__name__", "")
    try:
        options = json.loads(json.dumps(options))
    except TypeError:
        return None
    if any(name in f.__all__ and getattr(f, name) is made_by for f in (layers, blocks)):
        return {"name": name, "options": options} if options else name
    return None
