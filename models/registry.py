"""Models by name: each family's presets, and what makes a model of them."""

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .base import Model
from .parts import describe_part

_presets: dict[str, tuple[type[Model], Any]] = {}


def register_presets(family: type[Model], presets: Mapping[str, Any]) -> None:
    """Makes each configuration of `presets` available by its name.

    Raises:
        ValueError: the name is taken.
    """
    for name, config in presets.items():
        if name in _presets:
            raise ValueError(f"a model named {name!r} is registered already")
        _presets[name] = (family, config)


def list_models(pattern: str = "*") -> list[str]:
    """The names of all presets that match a shell pattern, e.g. "vit*"; sorted.

    Args:
        pattern: as of `fnmatch`; a whole name matches itself alone.

    Returns:
        The names, for `create_model`.

    Source:
        The habit of timm.

    Example:
        >>> list_models("*_digits")
        ['lstm_digits', 'vit_digits']
    """
    return sorted(fnmatch.filter(_presets, pattern))


def model_config(name: str, **overrides: Any) -> Any:
    """The frozen configuration of a preset, with some fields replaced.

    Args:
        name: of a preset, see `list_models`.
        **overrides: fields of the family's configuration.

    Returns:
        The family's frozen dataclass.

    Raises:
        ValueError: there is no preset or no field of that name.

    Source:
        Lamina.

    Example:
        >>> model_config("vit_digits", depth=2).depth
        2
    """
    _, config = _find(name)
    fields = [field.name for field in dataclasses.fields(config)]
    for override in overrides:
        if override not in fields:
            known = ", ".join(fields)
            raise ValueError(
                f"{name} has no setting {override!r}{_near(override, fields)}; its settings are {known}"
            )
    return dataclasses.replace(config, **overrides)


def create_model(
    name: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> Model:
    """Makes a model from a preset, with random weights.

    Args:
        name: of a preset, see `list_models`.
        device: where the parameters are; "meta" for none.
        dtype: of the parameters.
        **overrides: fields of the family's configuration, e.g. `num_classes=10`; `attention` may also be a
        class or
            a `functools.partial` of one, Lamina's or your own.

    Returns:
        The model, in training mode; what it takes and gives, (B, …), stands in its docstring.

    Raises:
        ValueError: there is no preset or no setting of that name, or a setting is out of range.

    Source:
        The habit of timm.

    Example:
        >>> model = create_model("vit_digits", depth=2)
        >>> model(torch.randn(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """
    family, _ = _find(name)
    parts: dict[str, Callable[..., Any]] = {}
    if callable(attention := overrides.get("attention")):
        described = describe_part(attention)
        if described is None:
            parts["attention"] = attention
        # The configuration of a part that is not Lamina's keeps its name, for a reader.
        overrides["attention"] = described or getattr(attention, "__name__", repr(attention))
    return family(model_config(name, **overrides), **parts, device=device, dtype=dtype)


def _find(name: str) -> tuple[type[Model], Any]:
    if name not in _presets:
        raise ValueError(f"there is no model {name!r}{_near(name, _presets)}; list_models() names all")
    return _presets[name]


def _near(name: str, names: Any) -> str:
    near = difflib.get_close_matches(name, list(names), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""
