"""What the recurrent cells share: weights in torch.nn's layout, checks of arguments, the zero state."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Cell(nn.Module):
    """One step of a recurrence whose gates are affine in the input and in the previous output.

    The gates' matrices are stacked, named and ordered as torch.nn's, so that its state dicts load: weight_ih
    (gates * hidden_dim, input_dim), weight_hh (gates * hidden_dim, output_dim), and bias_ih and bias_hh
    (gates * hidden_dim). A subclass writes `step`, sets `state_dims`, and names in `routine` the function of
    PyTorch that runs whole sequences of it, if there is one.
    """

    bias_ih: nn.Parameter | None
    bias_hh: nn.Parameter | None
    state_dims: tuple[int, ...]
    routine: str | None

    def __init__(
        self,
        gates: int,
        input_dim: int,
        hidden_dim: int,
        *,
        output_dim: int | None = None,
        bias: bool,
        recurrent_bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        if input_dim < 1 or hidden_dim < 1:
            raise ValueError(
                "input_dim and hidden_dim must be at least 1, "
                f"got input_dim={input_dim} and hidden_dim={hidden_dim}"
            )
        if recurrent_bias and not bias:
            raise ValueError("recurrent_bias=True is a second bias beside the first, but got bias=False")
        super().__init__()
        self.input_dim = input_dim
        self.hidden_dim = hidden_dim
        self.output_dim = hidden_dim if output_dim is None else output_dim
        self.bias = bias
        self.recurrent_bias = recurrent_bias
        rows = gates * hidden_dim
        self.weight_ih = nn.Parameter(torch.empty(rows, input_dim, device=device, dtype=dtype))
        self.weight_hh = nn.Parameter(torch.empty(rows, self.output_dim, device=device, dtype=dtype))
        for name, present in (("bias_ih", bias), ("bias_hh", recurrent_bias)):
            vector = nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if present else None
            self.register_parameter(name, vector)

    def reset_parameters(self) -> None:
        """Draws every parameter uniformly from ±1/sqrt(hidden_dim), as torch.nn does."""
        bound = 1 / math.sqrt(self.hidden_dim)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def initial_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, ...]:
        """Zeros, (batch_size, size) for each part; of the weights' device and dtype where not told."""
        weight = self.weight_hh
        device, dtype = weight.device if device is None else device, weight.dtype if dtype is None else dtype
        return tuple(torch.zeros(batch_size, dim, device=device, dtype=dtype) for dim in self.state_dims)

    def forward(
        self, input: Tensor, state: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if input.ndim != 2 or input.size(1) != self.input_dim:
            raise ValueError(f"input must be (B, input_dim={self.input_dim}), got {tuple(input.shape)}")
        if state is None:
            state = self.initial_state(input.size(0))
        else:
            found, wanted = (
                [tuple(part.shape) for part in state],
                [(input.size(0), dim) for dim in self.state_dims],
            )
            if found != wanted:
                raise ValueError(f"state must be of shapes {wanted}, got {found}")
        return self.step(self.project(input), state)

    def project(self, input: Tensor) -> Tensor:
        """The input's share in the gates, (..., gates * hidden_dim); all time steps may be taken at once."""
        return F.linear(input, self.weight_ih, self.bias_ih)

    def step(self, projected: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output and the new state, from `project(input)` and the state before."""
        raise NotImplementedError

    def routine_weights(self, zeros: Tensor | None) -> list[Tensor]:
        """The weights as `routine` takes them; `zeros` stands for a missing second bias."""
        biases = (self.bias_ih, zeros if self.bias_hh is None else self.bias_hh)
        return [self.weight_ih, self.weight_hh, *(b for b in biases if b is not None)]

    def extra_repr(self) -> str:
        return f"{self.input_dim}, {self.hidden_dim}, bias={self.bias}, recurrent_bias={self.recurrent_bias}"
