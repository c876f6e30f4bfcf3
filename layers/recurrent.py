"""Runs any recurrent cell over a padded batch of sequences: layers, both directions, lengths, states."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.backend import forced_backend
from . import _fused_recurrent as fused
from .masking import mask_from_lengths

State = tuple[Tensor, ...]


@runtime_checkable
class RecurrentCell(Protocol):
    """What `Recurrent` asks of a cell: a module that makes one step.

    Shape:
        - input: (B, input_dim)
        - state: a tuple of tensors (B, ...), as many and as large as the cell likes
        - output: (B, output_dim), and the new state, shaped as the old

    Source:
        Lamina's convention: that of `torch.nn.LSTMCell`, made one for every kind of state.

    Example:
        >>> isinstance(LSTMCell(3, 5), RecurrentCell)
        True
    """

    input_dim: int
    hidden_dim: int
    output_dim: int

    def __call__(self, input: Tensor, state: State | None = None) -> tuple[Tensor, State]: ...

    def initial_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before the first step."""
        ...


class Recurrent(nn.Module):
    """A recurrent network: a cell along the time of a padded batch, in layers and in one or both directions.

    .. math:: y^{(k)}_t, s^{(k)}_t = \\mathrm{cell}_k(y^{(k-1)}_t, s^{(k)}_{t-1}), \\quad y^{(0)} = x

    Both directions have their own cells; the backward one starts at each sequence's own last step, and the
    next layer sees the outputs of both (forward first). The definition is a loop over the cells. The standard
    cells (`RNNCell`, a plain `LSTMCell`, `GRUCell` with `reset_after`) run as one call of PyTorch's fused
    routine, cuDNN's on a GPU, as fast as `torch.nn.LSTM`; `fused_refusal` tells why others do not. An
    `LSTMCell` with peepholes or layer normalisation runs as one `lamina.kernels.lstm_sequence` a layer and
    direction, as does any under `torch.compile` with gradients or `lengths`, where no routine does; other
    cells are unrolled over T there. The loop runs also under `use_backend("reference")`, which second
    derivatives need where a routine runs, as not all routines have them; and in exported programs with
    `lengths`, which consist of PyTorch's operations alone.

    With `lengths`, padding has no influence at all, whatever stands in it (NaN as well); on a GPU they cost a
    synchronisation unless they are on the CPU, where PyTorch wants them.

    Args:
        cell: makes one cell, called `cell(input_dim, hidden_dim, device=device, dtype=dtype)`: a class, or a
            `functools.partial` with its options. See `RecurrentCell` for one of your own.
        input_dim: size of the input.
        hidden_dim: size of each cell.
        num_layers: number of layers.
        bidirectional: whether each layer also reads the sequence from its end.
        dropout: probability with which an output of a layer is dropped in training before the next layer
            reads it; the last layer's outputs are never dropped.

    Shape:
        - input: (B, T, input_dim)
        - lengths: (B,) of integers from 0 to T, on any device; all T where they are not given
        - state: tensors (num_layers * directions, B, ...), one for each part of the cell's state, ordered as
          in torch.nn: layer by layer, forward before backward; the initial state where it is not given
        - output: (B, T, output_dim), where output_dim is the cell's times the directions, zero behind a
          sequence's end; and the state after each sequence's last step (backward: after its first)

    Raises:
        ValueError: num_layers or dropout is out of range, `cell` makes what is no `RecurrentCell`, or input,
            lengths or state do not fit. Under `torch.compile` the values of lengths are not looked at.

    Reference:
        Schuster, Paliwal. Bidirectional Recurrent Neural Networks. IEEE Transactions on Signal Processing
        45(11), 1997.
        Zaremba, Sutskever, Vinyals. Recurrent Neural Network Regularization. 2014. arXiv:1409.2329 (dropout).

    Example:
        >>> encoder = Recurrent(LSTMCell, 3, 5, num_layers=2, bidirectional=True)
        >>> output, (hidden, memory) = encoder(torch.randn(2, 7, 3), lengths=torch.tensor([7, 4]))
        >>> output.shape, hidden.shape
        (torch.Size([2, 7, 10]), torch.Size([4, 2, 5]))
    """

    def __init__(
        self,
        cell: Callable[..., nn.Module],
        input_dim: int,
        hidden_dim: int,
        *,
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be a probability, got {dropout}")
        super().__init__()
        self.input_dim = input_dim
        self.hidden_dim = hidden_dim
        self.num_layers = num_layers
        self.bidirectional = bidirectional
        self.directions = 2 if bidirectional else 1
        self.dropout = dropout
        cells: list[Any] = []
        for index in range(num_layers * self.directions):
            size = input_dim if index < self.directions else self.directions * cells[-1].output_dim
            made = cell(size, hidden_dim, device=device, dtype=dtype)
            if not isinstance(made, RecurrentCell):
                raise ValueError(f"cell must make a RecurrentCell, got {type(made).__name__}")
            cells.append(made)
        self.cells = nn.ModuleList(cells)
        self.output_dim: int = self.directions * cells[-1].output_dim
        self._zero_biases: list[Tensor] = []
        self.flatten_parameters()

    def initial_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The cells' initial states, each part (num_layers * directions, batch_size, ...)."""
        return _stack([cell.initial_state(batch_size, device, dtype) for cell in self._cells()])

    def forward(
        self, input: Tensor, lengths: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        if input.ndim != 3 or input.size(2) != self.input_dim:
            raise ValueError(f"input must be (B, T, input_dim={self.input_dim}), got {tuple(input.shape)}")
        cells = self._cells()
        if state is not None:
            found = [tuple(part.shape) for part in state]
            wanted = [(len(cells), input.size(0), *part.shape[1:]) for part in cells[0].initial_state(1)]
            if found != wanted:
                raise ValueError(f"state must be of shapes {wanted}, got {found}")
        if lengths is not None:
            lengths = _checked(lengths, input)
        by_definition = forced_backend() == "reference"
        if by_definition or not _routine_suits(input, lengths) or fused.refusal(cells) is not None:
            return self._loop(
                cells, input, lengths, state or self.initial_state(input.size(0)), by_definition
            )
        settings = (self.num_layers, self.dropout, self.training, self.bidirectional)
        return fused.run(cells, input, lengths, state, self._zero_biases, *settings)

    def fused_refusal(self) -> str | None:
        """Why PyTorch's fused routines cannot run these cells, or None where one can."""
        return fused.refusal(self._cells())

    def flatten_parameters(self) -> None:
        """Lays weights on a CUDA device out as cuDNN wants them, like `torch.nn.LSTM.flatten_parameters`.

        It happens by itself when the module is made, moved, copied or unpickled; elsewhere it does nothing.
        """
        self._zero_biases = fused.flatten(self._cells(), self.num_layers, self.bidirectional)

    def load_torch_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Loads the weights of a `torch.nn.RNN`, `LSTM` or `GRU` of the same sizes and biases.

        torch.nn has two biases a gate: `partial(LSTMCell, recurrent_bias=True)` has them as well.
        """
        sides = ("", "_reverse")[: self.directions]
        suffixes = [f"_l{layer}{side}" for layer in range(self.num_layers) for side in sides]
        renamed = {}
        for key, value in state_dict.items():
            name, _, place = key.rpartition("_l")
            known = f"_l{place}" in suffixes
            renamed[f"cells.{suffixes.index(f'_l{place}')}.{name}" if known else key] = value
        self.load_state_dict(renamed)

    def _cells(self) -> list[Any]:
        return list(self.cells)

    def _loop(
        self, cells: list[Any], input: Tensor, lengths: Tensor | None, state: State, by_definition: bool
    ) -> tuple[Tensor, State]:
        # Time comes first inside, as in the routines: steps are contiguous, outputs laid out as theirs.
        mask, output, last = None, input.transpose(0, 1), []
        if lengths is not None:
            lengths = lengths.to(input.device)
            mask = mask_from_lengths(lengths, input.size(1)).T
            output = _hide(output, mask)
        for layer in range(self.num_layers):
            if layer > 0:
                output = F.dropout(output, self.dropout, self.training)
            sides = []
            for direction in range(self.directions):
                index = layer * self.directions + direction
                cell, before = cells[index], tuple(part[index] for part in state)
                step, inputs = cell, output
                if not by_definition and fused.is_plain(cell):  # the input's share in all steps at once
                    step, inputs = cell.step, cell.project(output)
                side: Tensor | None
                if inputs is not output and fused.has_sequence(cell):
                    side, after = cell.sequence(inputs, before, lengths, reverse=direction == 1)
                else:
                    side, after = _scan(step, inputs, mask, before, backward=direction == 1)
                sides.append(
                    side if side is not None else output.new_zeros(*output.shape[:2], cell.output_dim)
                )
                last.append(after)
            output = torch.cat(sides, dim=-1) if self.bidirectional else sides[0]
        return output.transpose(0, 1), _stack(last)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Recurrent":
        super()._apply(fn, recurse)
        self.flatten_parameters()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_zero_biases": []}  # they are views of the memory of all weights

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.flatten_parameters()

    def extra_repr(self) -> str:
        options = f"num_layers={self.num_layers}, bidirectional={self.bidirectional}, dropout={self.dropout}"
        return f"{self.input_dim}, {self.hidden_dim}, {options}"


def _checked(lengths: Tensor, input: Tensor) -> Tensor | None:
    """The lengths on the CPU, or None where every sequence fills the batch's T steps."""
    B, T, _ = input.shape
    if lengths.shape != (B,) or lengths.is_floating_point() or lengths.dtype is torch.bool:
        found = f"{tuple(lengths.shape)} of {lengths.dtype}"
        raise ValueError(f"lengths must be (B={B},) of integers, got {found}")
    if torch.compiler.is_compiling() or lengths.is_meta:  # their values are not known
        return lengths
    lengths = lengths.cpu()
    shortest, longest = (int(bound) for bound in lengths.aminmax()) if B > 0 else (T, T)
    if shortest < 0 or longest > T:
        raise ValueError(f"lengths must lie between 0 and T={T}, got {shortest} to {longest}")
    return None if shortest == T else lengths


def _routine_suits(input: Tensor, lengths: Tensor | None) -> bool:
    """Whether a routine can run sequences like these as one operation."""
    compiling = torch.compiler.is_compiling()
    if input.size(1) == 0 or (lengths is not None and (compiling or lengths.is_meta)):
        return False  # no routine takes no step, and what has no known length is not packed
    # torch.compile takes a routine apart, step by step, where gradients are: the loop compiles in less than
    # half the time, and it trains; oneDNN's LSTM does not, AOTAutograd fails on it (PyTorch 2.13).
    return not compiling or torch.compiler.is_exporting() or not torch.is_grad_enabled()


def _scan(
    step: Callable[[Tensor, State], tuple[Tensor, State]],
    inputs: Tensor,
    mask: Tensor | None,
    state: State,
    *,
    backward: bool,
) -> tuple[Tensor | None, State]:
    """`step` along (T, B, ...) in one direction: the outputs, zero where the mask is, and the last state."""
    steps = inputs.unbind(0)
    outputs: list[Tensor] = list(steps)
    for t in reversed(range(len(steps))) if backward else range(len(steps)):
        outputs[t], new = step(steps[t], state)
        # Where a sequence is over, or for the backward direction has not begun, its state stays as it was.
        state = new if mask is None else _where(mask[t], new, state)
    if not outputs:
        return None, state
    output = torch.stack(outputs)
    return output if mask is None else _hide(output, mask), state


def _where(mask: Tensor, new: State, old: State) -> State:
    pairs = zip(new, old, strict=True)
    return tuple(torch.where(mask.view(-1, *[1] * (n.ndim - 1)), n, o) for n, o in pairs)


def _hide(tensor: Tensor, mask: Tensor) -> Tensor:
    """Zero where (T, B) is False, and so its gradient: a product with the mask would let NaN pass."""
    return tensor.masked_fill(~mask.unsqueeze(-1), 0.0)


def _stack(states: list[State]) -> State:
    return tuple(torch.stack(parts) for parts in zip(*states, strict=True))
