"""Renames a foreign state dict, key by key, and fills a model with it: nothing is left over in silence."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn


class Rule(NamedTuple):
    """A pattern of foreign names (a regular expression of the whole name), and what becomes of it.

    `ours` may refer to the pattern's groups; None is for what we have no use for. `change` turns the tensor.
    """

    theirs: str
    ours: str | None
    change: Callable[[Tensor], Tensor] = lambda tensor: tensor


def renamed(state: Mapping[str, Tensor], rules: Sequence[Rule]) -> tuple[dict[str, Tensor], list[str]]:
    """Our names with their tensors, by the first rule that fits, and the names that no rule knows."""
    ours: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in state.items():
        for rule in rules:
            if (found := re.fullmatch(rule.theirs, name)) is not None:
                if rule.ours is not None:
                    ours[found.expand(rule.ours)] = rule.change(tensor)
                break
        else:
            unknown.append(name)
    return ours, unknown


def fill(
    model: nn.Module,
    state: Mapping[str, Tensor],
    rules: Sequence[Rule],
    *,
    optional: Sequence[str] = (),
    superfluous: Sequence[str] = (),
) -> None:
    """Copies a foreign state dict into a model, each tensor in the model's dtype.

    Args:
        model: ours.
        state: theirs.
        rules: from their names to ours.
        optional: our modules and parameters that the file may lack: they keep their start.
        superfluous: of ours, what the file may have and the model lacks.

    Raises:
        ValueError: a name is left over on either side, or a tensor has another shape.
    """
    ours, unknown = renamed(state, rules)
    own = model.state_dict()
    unknown += [name for name in ours if name not in own and not _within(name, superfluous)]
    missing = [name for name in own if name not in ours and not _within(name, optional)]
    shapes = [
        f"{name} is {tuple(ours[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in ours and ours[name].shape != tensor.shape
    ]
    told = [("unknown to us", unknown), ("missing in it", missing), ("of another shape", shapes)]
    if any(names for _, names in told):
        raise ValueError(
            f"state does not fit {type(model).__name__}: "
            + "; ".join(f"{what}: {_shortened(names)}" for what, names in told if names)
        )
    model.load_state_dict({name: t for name, t in ours.items() if name in own}, strict=False)


def _within(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more
