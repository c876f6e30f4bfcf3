"""The simple recurrent cell (Elman, 1990)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ._cell import Cell


class RNNCell(Cell):
    """One step of a simple recurrent network: the new state is a layer over the input and the old state.

    .. math:: h_t = \\phi(W x_t + U h_{t-1} + b)

    The weights are named and laid out as in `torch.nn.RNNCell`, which has a second, redundant bias beside U
    (`recurrent_bias=True`). Elman's units are logistic and his training stops at the copied context, without
    backpropagation through time: detach the state between steps for that. Time O(B H (I + H)) a step, for
    H (I + H + 1) parameters.

    Args:
        input_dim: I, the size of the input.
        hidden_dim: H, the size of the state, which is the output.
        activation: "tanh" or "relu".
        bias: whether there is a bias b.
        recurrent_bias: whether there is torch.nn's second bias as well.

    Shape:
        - input: (B, input_dim)
        - state: one tensor (B, hidden_dim); zeros where it is not given
        - output: (B, hidden_dim), and the new state

    Raises:
        ValueError: the activation has another name, there is a second bias without the first, or input or
            state do not fit.

    Reference:
        Elman. Finding Structure in Time. Cognitive Science 14, 1990.

    Example:
        >>> cell = RNNCell(3, 5)
        >>> output, state = cell(torch.randn(2, 3))
        >>> output, state = cell(torch.randn(2, 3), state)
        >>> output.shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        *,
        activation: Literal["tanh", "relu"] = "tanh",
        bias: bool = True,
        recurrent_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if activation not in ("tanh", "relu"):
            raise ValueError(f"activation must be 'tanh' or 'relu', got {activation!r}")
        super().__init__(
            1, input_dim, hidden_dim, bias=bias, recurrent_bias=recurrent_bias, device=device, dtype=dtype
        )
        self.activation = activation
        self.state_dims = (hidden_dim,)
        self.routine = f"rnn_{activation}"
        self.reset_parameters()

    def step(self, projected: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        total = projected + F.linear(state[0], self.weight_hh, self.bias_hh)
        hidden = total.tanh() if self.activation == "tanh" else total.relu()
        return hidden, (hidden,)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"
