"""The gated recurrent unit (Cho et al., 2014)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._cell import Cell


class GRUCell(Cell):
    """One step of a GRU: the new state lies between the old one and a candidate that may forget the old one.

    .. math:: \\begin{aligned}
              r &= \\sigma(W_r x_t + U_r h_{t-1} + b_r) \\\\
              z &= \\sigma(W_z x_t + U_z h_{t-1} + b_z) \\\\
              n &= \\tanh(W_n x_t + b_n + r \\odot (U_n h_{t-1} + b'_n))
                   \\quad \\text{or, reset before,} \\quad \\tanh(W_n x_t + b_n + U_n (r \\odot h_{t-1})) \\\\
              h_t &= (1 - z) \\odot n + z \\odot h_{t-1}
              \\end{aligned}

    `reset_after=True` is the form of cuDNN and `torch.nn.GRUCell`, whose weights load (gates in the order
    r, z, n); `reset_after=False` is that of the papers, for which there is no fused routine. z keeps the old
    state here, as in torch.nn and in Cho et al.; Bahdanau et al. write z where this has 1 - z: negate the
    rows z of their weights and biases. Time O(B H (I + H)) a step; 3 H (I + H + 1) parameters in the papers'
    form, 3 H (I + H + 2) in torch.nn's.

    Args:
        input_dim: I, the size of the input.
        hidden_dim: H, the size of the state, which is the output.
        reset_after: whether r multiplies after the product with U, or before it.
        bias: whether there are biases b.
        recurrent_bias: whether there is a second bias b' beside each U, redundant but for n with
            `reset_after`; as `reset_after` (and `bias`) where it is not given.

    Shape:
        - input: (B, input_dim)
        - state: one tensor (B, hidden_dim); zeros where it is not given
        - output: (B, hidden_dim), and the new state

    Raises:
        ValueError: there is a second bias without the first, or input or state do not fit.

    Reference:
        Cho, van Merriënboer, Gulcehre, Bahdanau, Bougares, Schwenk, Bengio. Learning Phrase Representations
        using RNN Encoder-Decoder for Statistical Machine Translation. EMNLP 2014. Section 2.3.
        Bahdanau, Cho, Bengio. Neural Machine Translation by Jointly Learning to Align and Translate. ICLR
        2015. Appendix A.1.1.

    Example:
        >>> cell = GRUCell(3, 5, reset_after=False)
        >>> output, state = cell(torch.randn(2, 3))
        >>> output.shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        *,
        reset_after: bool = True,
        bias: bool = True,
        recurrent_bias: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if recurrent_bias is None:
            recurrent_bias = reset_after and bias
        super().__init__(
            3, input_dim, hidden_dim, bias=bias, recurrent_bias=recurrent_bias, device=device, dtype=dtype
        )
        self.reset_after = reset_after
        self.state_dims = (hidden_dim,)
        self.routine = "gru" if reset_after else None
        self.reset_parameters()

    def step(self, projected: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        (hidden,) = state
        sizes = (2 * self.hidden_dim, self.hidden_dim)  # r and z together, and n
        gates, candidate = projected.split(sizes, dim=-1)
        if self.reset_after:
            of_gates, of_candidate = F.linear(hidden, self.weight_hh, self.bias_hh).split(sizes, dim=-1)
            r, z = (gates + of_gates).sigmoid().chunk(2, dim=-1)
            candidate = candidate + r * of_candidate
        else:
            weights = self.weight_hh.split(sizes)
            biases = (None, None) if self.bias_hh is None else self.bias_hh.split(sizes)
            r, z = (gates + F.linear(hidden, weights[0], biases[0])).sigmoid().chunk(2, dim=-1)
            candidate = candidate + F.linear(r * hidden, weights[1], biases[1])
        n = candidate.tanh()
        hidden = n + z * (hidden - n)
        return hidden, (hidden,)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, reset_after={self.reset_after}"
