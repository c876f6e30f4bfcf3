"""Whole stacks of standard cells as one call of PyTorch's routines: oneDNN's or ATen's, on a GPU cuDNN's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ._cell import Cell
from .gru_cell import GRUCell
from .lstm_cell import LSTMCell
from .rnn_cell import RNNCell

# These and no subclass of them: who overrides a step means it to be called.
_STANDARD_CELLS: tuple[type[nn.Module], ...] = (RNNCell, LSTMCell, GRUCell)
_CUDNN_MODES = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN_TANH", "rnn_relu": "RNN_RELU"}


def is_plain(cell: nn.Module) -> bool:
    """Whether parameters and `step` tell all that a call of the cell does: a standard cell, no hooks."""
    return type(cell) in _STANDARD_CELLS and not (
        cell._forward_hooks or cell._forward_pre_hooks or cell._backward_hooks or cell._backward_pre_hooks
    )


def has_sequence(cell: nn.Module) -> bool:
    """Whether an operation runs all steps of this plain cell. An exported program has PyTorch's alone."""
    return isinstance(cell, LSTMCell) and not torch.compiler.is_exporting()


def refusal(cells: Sequence[Any]) -> str | None:
    """Why no routine can run these cells, or None where one can."""
    first = cells[0]
    for cell in cells:
        if not is_plain(cell):
            return f"{type(cell).__name__} is not a standard cell, or has hooks, which only a call of it runs"
        if cell.routine is None:
            return f"PyTorch has no routine for {cell}"
        if (cell.routine, cell.bias, cell.output_dim) != (first.routine, first.bias, first.output_dim):
            return "the cells are not all of one kind"
    return None


def weights(cells: Sequence[Cell], zero_biases: Sequence[Tensor]) -> list[Tensor]:
    """All weights in the routines' order. Where a cell has one bias they want a second: a zero, that of
    `zero_biases` where it suits."""
    found: list[Tensor] = []
    for index, cell in enumerate(cells):
        zero = None
        if cell.bias and not cell.recurrent_bias:
            like = cell.weight_ih
            zero = zero_biases[index] if zero_biases else None
            if zero is None or zero.device != like.device or zero.dtype != like.dtype:
                zero = torch.zeros(like.size(0), device=like.device, dtype=like.dtype)
        found += cell.routine_weights(zero)
    return found


def run(
    cells: Sequence[Cell],
    input: Tensor,
    lengths: Tensor | None,
    state: tuple[Tensor, ...] | None,
    zero_biases: Sequence[Tensor],
    *settings: Any,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output and the last state.

    `lengths` are on the CPU; `settings` are num_layers, dropout, training, bidirectional.
    """
    first, B = cells[0], input.size(0)
    assert first.routine is not None
    routine: Any = getattr(torch, first.routine)
    if state is None:
        like = first.weight_hh
        state = tuple(
            torch.zeros(len(cells), B, dim, device=like.device, dtype=like.dtype) for dim in first.state_dims
        )
    arguments = (weights(cells, zero_biases), first.bias, *settings)
    if lengths is None:
        output, *last = routine(input, state if len(state) > 1 else state[0], *arguments, True)
        return output, tuple(last)

    # Packing knows no empty sequence: such a one takes one step over a zero, of which nothing is kept.
    empty = (lengths == 0).to(input.device) if bool((lengths == 0).any()) else None
    if empty is not None:
        input = input.masked_fill(empty.view(-1, 1, 1), 0.0)
    packed = pack_padded_sequence(input, lengths.clamp(min=1), batch_first=True, enforce_sorted=False)
    sort, unsort = packed.sorted_indices, packed.unsorted_indices
    assert sort is not None
    assert unsort is not None
    ordered = [part.index_select(1, sort) for part in state]
    data, *last = routine(
        packed.data, packed.batch_sizes, ordered if len(state) > 1 else ordered[0], *arguments
    )
    padded = PackedSequence(data, packed.batch_sizes, sort, unsort)
    output, _ = pad_packed_sequence(padded, total_length=input.size(1))
    last = [part.index_select(1, unsort) for part in last]
    if empty is not None:
        output = output.masked_fill(empty.view(1, -1, 1), 0.0)
        last = [torch.where(empty.view(1, -1, 1), old, new) for old, new in zip(state, last, strict=True)]
    return output.transpose(0, 1), tuple(last)


def flatten(cells: Sequence[Cell], num_layers: int, bidirectional: bool) -> list[Tensor]:
    """Moves the weights on a CUDA device into the one piece of memory that cuDNN reads without copying it.

    Does nothing elsewhere. Returns the zero biases, which have their places in that memory as well.
    """
    if refusal(cells) is not None:
        return []
    first, found = cells[0], weights(cells, ())
    suits = all(
        w.is_cuda and w.dtype == found[0].dtype and torch.backends.cudnn.is_acceptable(w) for w in found
    )
    if not suits or len({w.data_ptr() for w in found}) < len(found):
        return []
    assert first.routine is not None
    each = len(found) // len(cells)
    with torch.no_grad(), torch.cuda.device_of(found[0]):
        torch._cudnn_rnn_flatten_weight(
            found,
            each,
            first.input_dim,
            torch.backends.cudnn.rnn.get_cudnn_mode(_CUDNN_MODES[first.routine]),
            first.hidden_dim,
            0 if first.output_dim == first.hidden_dim else first.output_dim,
            num_layers,
            True,
            bidirectional,
        )
    return found[3::each] if first.bias and not any(cell.recurrent_bias for cell in cells) else []
