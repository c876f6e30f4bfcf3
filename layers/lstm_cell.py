"""The long short-term memory cell (Hochreiter & Schmidhuber, 1997; forget gate of Gers et al., 2000)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import lstm_sequence
from ._cell import Cell


class LSTMCell(Cell):
    """One step of an LSTM: a memory that is kept, erased and written through gates.

    .. math:: \\begin{aligned}
              i &= \\sigma(W_i x_t + U_i h_{t-1} + p_i \\odot c_{t-1} + b_i) \\\\
              f &= \\sigma(W_f x_t + U_f h_{t-1} + p_f \\odot c_{t-1} + b_f) \\\\
              g &= \\tanh(W_g x_t + U_g h_{t-1} + b_g) \\\\
              c_t &= f \\odot c_{t-1} + i \\odot g \\\\
              o &= \\sigma(W_o x_t + U_o h_{t-1} + p_o \\odot c_t + b_o) \\\\
              h_t &= R \\, (o \\odot \\tanh c_t)
              \\end{aligned}

    The peepholes p are there with `peepholes=True`, the projection R with `projection_dim`. The weights are
    named and laid out as in `torch.nn.LSTMCell` (gates in the order i, f, g, o), which has a second,
    redundant bias beside U (`recurrent_bias=True`) and knows no peepholes; the projection is `weight_hr`, as
    in `torch.nn.LSTM`. The cell of 1997 has no forget gate (f = 1), squashes to other ranges and truncates
    its gradient; this is the form used since 2000. Time O(B H (I + P)) a step; 4 H (I + P + 1) parameters,
    3 H more for peepholes, P H more for a projection (P = H without one), 10 H more for layer normalisation.

    With `layer_norm=True`, W x and U h are each normalised over the 4 H of their gates together, before the
    bias is added, and c_t on its way into h_t, as Ba et al. have it; c_t itself is carried as it is. (Some
    ports normalise each gate alone, or carry the normalised memory.) The gains are `gain_ih`, `gain_hh` and
    `gain_cell`; of the biases, which would add up, there are b and `bias_cell`.

    Args:
        input_dim: I, the size of the input.
        hidden_dim: H, the size of the memory.
        peepholes: whether the gates see the memory: i and f that of the step before, o the new one.
        layer_norm: whether both products and the memory are normalised.
        projection_dim: P, the size of the output and of what the gates see of it, smaller than H; H, without
            a projection, where it is not given.
        forget_bias: what the forget gate's bias starts at: 1 keeps the memory at first.
        bias: whether there are biases b.
        recurrent_bias: whether there is torch.nn's second bias as well.

    Shape:
        - input: (B, input_dim)
        - state: two tensors, the output (B, projection_dim or hidden_dim) and the memory (B, hidden_dim);
          zeros where they are not given
        - output: (B, projection_dim or hidden_dim), and the new state

    Raises:
        ValueError: projection_dim does not lie between 0 and hidden_dim, there is a second bias without the
            first, or input or state do not fit.

    Reference:
        Hochreiter, Schmidhuber. Long Short-Term Memory. Neural Computation 9(8), 1997.
        Gers, Schmidhuber, Cummins. Learning to Forget. Neural Computation 12(10), 2000.
        Gers, Schraudolph, Schmidhuber. Learning Precise Timing with LSTM Recurrent Networks. JMLR 3, 2002.
        Ba, Kiros, Hinton. Layer Normalization. 2016. arXiv:1607.06450. Equations 20 to 22.
        Sak, Senior, Beaufays. Long Short-Term Memory Recurrent Neural Network Architectures for Large Scale
        Acoustic Modeling. Interspeech 2014 (the projection).

    Example:
        >>> cell = LSTMCell(3, 5, projection_dim=2)
        >>> output, (output, memory) = cell(torch.randn(7, 3))
        >>> output.shape, memory.shape
        (torch.Size([7, 2]), torch.Size([7, 5]))
    """

    weight_peephole: nn.Parameter | None
    weight_hr: nn.Parameter | None
    gain_ih: nn.Parameter | None
    gain_hh: nn.Parameter | None
    gain_cell: nn.Parameter | None
    bias_cell: nn.Parameter | None
    eps = 1e-5  # of layer normalisation, as torch.nn's

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        *,
        peepholes: bool = False,
        layer_norm: bool = False,
        projection_dim: int | None = None,
        forget_bias: float = 1.0,
        bias: bool = True,
        recurrent_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if projection_dim is not None and not 0 < projection_dim < hidden_dim:
            raise ValueError(
                f"projection_dim must lie between 0 and hidden_dim={hidden_dim}, "
                f"got projection_dim={projection_dim}"
            )
        super().__init__(
            4,
            input_dim,
            hidden_dim,
            output_dim=projection_dim,
            bias=bias,
            recurrent_bias=recurrent_bias,
            device=device,
            dtype=dtype,
        )
        self.peepholes = peepholes
        self.layer_norm = layer_norm
        self.projection_dim = projection_dim
        self.forget_bias = forget_bias
        self.state_dims = (self.output_dim, hidden_dim)
        self.routine = None if peepholes or layer_norm else "lstm"
        self.weight_hr, self.weight_peephole = None, None
        if projection_dim is not None:
            self.weight_hr = nn.Parameter(torch.empty(projection_dim, hidden_dim, device=device, dtype=dtype))
        if peepholes:  # rows: i, f, o
            self.weight_peephole = nn.Parameter(torch.empty(3, hidden_dim, device=device, dtype=dtype))
        norms = {"gain_ih": 4, "gain_hh": 4, "gain_cell": 1, "bias_cell": 1}
        for name, gates in norms.items():
            vector = torch.empty(gates * hidden_dim, device=device, dtype=dtype) if layer_norm else None
            self.register_parameter(name, None if vector is None else nn.Parameter(vector))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in ±1/sqrt(hidden_dim), as in torch.nn; then the forget gate's bias (one of its two).

        Gains of layer normalisation start at one, the bias of the normalised memory at zero.
        """
        super().reset_parameters()
        for gain in (self.gain_ih, self.gain_hh, self.gain_cell):
            if gain is not None:
                nn.init.ones_(gain)
        if self.bias_cell is not None:
            nn.init.zeros_(self.bias_cell)
        forget = slice(self.hidden_dim, 2 * self.hidden_dim)
        with torch.no_grad():
            if self.bias_ih is not None:
                self.bias_ih[forget] = self.forget_bias
            if self.bias_hh is not None:
                self.bias_hh[forget] = 0.0

    def project(self, input: Tensor) -> Tensor:
        if self.gain_ih is None:
            return super().project(input)
        product = F.linear(input, self.weight_ih)
        product = F.layer_norm(product, self.gain_ih.shape, self.gain_ih, None, self.eps)
        return product if self.bias_ih is None else product + self.bias_ih

    def step(self, projected: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        hidden, memory = state
        if self.gain_hh is None:
            product = F.linear(hidden, self.weight_hh, self.bias_hh)
        else:
            product = F.linear(hidden, self.weight_hh)
            product = F.layer_norm(product, self.gain_hh.shape, self.gain_hh, self.bias_hh, self.eps)
        i, f, g, o = (projected + product).chunk(4, dim=-1)
        if self.weight_peephole is not None:
            i = i + self.weight_peephole[0] * memory
            f = f + self.weight_peephole[1] * memory
        memory = f.sigmoid() * memory + i.sigmoid() * g.tanh()
        if self.weight_peephole is not None:
            o = o + self.weight_peephole[2] * memory
        seen = memory
        if self.gain_cell is not None:
            seen = F.layer_norm(memory, self.gain_cell.shape, self.gain_cell, self.bias_cell, self.eps)
        hidden = o.sigmoid() * seen.tanh()
        if self.weight_hr is not None:
            hidden = F.linear(hidden, self.weight_hr)
        return hidden, (hidden, memory)

    def sequence(
        self,
        projected: Tensor,
        state: tuple[Tensor, ...],
        lengths: Tensor | None = None,
        *,
        reverse: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """All steps at once: (T, B, ...) of `project` and the state before, the outputs and the state after.

        See `lamina.kernels.lstm_sequence`.
        """
        hidden, memory = state
        return lstm_sequence(
            projected if self.bias_hh is None else projected + self.bias_hh,
            self.weight_hh,
            (hidden, memory),
            peepholes=self.weight_peephole,
            gate_gain=self.gain_hh,
            cell_gain=self.gain_cell,
            cell_bias=self.bias_cell,
            projection=self.weight_hr,
            lengths=lengths,
            reverse=reverse,
            eps=self.eps,
        )

    def routine_weights(self, zeros: Tensor | None) -> list[Tensor]:
        weights = super().routine_weights(zeros)
        return weights if self.weight_hr is None else [*weights, self.weight_hr]

    def extra_repr(self) -> str:
        extra = f", peepholes={self.peepholes}, projection_dim={self.projection_dim}"
        extra += f", layer_norm={self.layer_norm}"
        return super().extra_repr() + extra
