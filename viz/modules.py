"""A model from the inside: its modules with their shapes and parameters, and what one forward costs."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ModuleRow:
    """One module, or a run of neighbours that are the same in all but name.

    Args:
        name: as in its parent; "0-11" for a run of twelve.
        kind: name of the class, or "Parameter" for one that a module with children holds itself.
        output: a shape per returned tensor; empty where forward was not called.
        parameters: how many numbers are learnt, in one of the run; shared ones count once.
        children: in the order of their registration.
        repeats: length of the run.

    Example:
        >>> from lamina.viz import ModuleRow
        >>> ModuleRow("0-11", "EncoderBlock", ((1, 197, 768),), 7_087_872, repeats=12).repeats
        12
    """

    name: str
    kind: str
    output: Shapes
    parameters: int
    children: tuple["ModuleRow", ...] = ()
    repeats: int = 1


def module_tree(model: nn.Module, inputs: Sequence[Tensor]) -> ModuleRow:
    """The modules of `model`, with the shapes that they return for `inputs`; equal neighbours are one row.

    A module that does nothing (`nn.Identity`) is left out; one that is called more than once shows the shape
    of its first call. Runs the model once, in evaluation mode and without gradients, and leaves its mode as
    it was.

    Example:
        >>> from lamina.viz import module_tree
        >>> model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 5))
        >>> tree = module_tree(model, [torch.randn(1, 3)])
        >>> [(row.name, row.repeats, row.parameters) for row in tree.children]
        [('0', 1, 20), ('1-2', 2, 30)]
    """
    shapes: dict[nn.Module, Shapes] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        shapes.setdefault(module, tuple(tuple(t.shape) for t in tree_leaves(output) if isinstance(t, Tensor)))

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_hook(note).remove)
        with _evaluating(model):
            model(*inputs)
    return _row("", model, shapes)


def count_flops(model: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Floating-point operations of a forward: matrix products, convolutions, attention; 2 per multiply-add.

    The model and its inputs are to be on the meta device, where nothing is computed: PyTorch's counter does
    not see into the fused attention and the fused LSTM of a CPU.

    Raises:
        ValueError: the model or an input is on another device.

    Example:
        >>> from lamina.viz import count_flops
        >>> count_flops(nn.Linear(3, 5, device="meta"), [torch.randn(2, 3, device="meta")])
        60
    """
    from torch.utils.flop_counter import FlopCounterMode

    for tensor in (*model.parameters(), *model.buffers(), *inputs):
        if not tensor.is_meta:
            raise ValueError(f"model and inputs must be on the meta device, got a tensor on {tensor.device}")
    with _evaluating(model), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return int(counter.get_total_flops())


def _row(name: str, module: nn.Module, shapes: dict[nn.Module, Shapes]) -> ModuleRow:
    children = [
        _row(child_name, child, shapes)
        for child_name, child in module.named_children()
        if not isinstance(child, nn.Identity)
    ]
    if children:
        own = [
            ModuleRow(key, "Parameter", (tuple(parameter.shape),), parameter.numel())
            for key, parameter in module.named_parameters(recurse=False)
        ]
        children = own + children
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return ModuleRow(name, type(module).__name__, shapes.get(module, ()), parameters, _collapsed(children))


def _collapsed(rows: Sequence[ModuleRow]) -> tuple[ModuleRow, ...]:
    """Joins neighbours that differ in nothing but their number: only numbered ones, as in a ModuleList."""
    joined: list[ModuleRow] = []
    for row in rows:
        last = joined[-1] if joined else None
        numbered = row.name.isdigit()
        if last and numbered and replace(row, name="") == replace(last, name="", repeats=1):
            first = last.name.partition("-")[0]
            joined[-1] = replace(last, name=f"{first}-{row.name}", repeats=last.repeats + 1)
        else:
            joined.append(row)
    return tuple(joined)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
