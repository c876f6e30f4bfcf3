"""A classifier that reads a sequence step by step (Hochreiter & Schmidhuber, 1997)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..layers import GRUCell, LSTMCell, Recurrent, RNNCell
from .base import Model
from .registry import register_presets

CELLS: dict[str, type[nn.Module]] = {"rnn": RNNCell, "lstm": LSTMCell, "gru": GRUCell}


@dataclass(frozen=True)
class RecurrentClassifierConfig:
    """Sizes of a classifier of sequences (B, T, input_dim). The defaults read the rows of 28 x 28 images.

    Source:
        Hochreiter, Schmidhuber. Long Short-Term Memory. Neural Computation 1997, for the default cell.

    Example:
        >>> RecurrentClassifierConfig(cell="gru").hidden_dim
        128
    """

    input_dim: int = 28
    num_classes: int = 10
    hidden_dim: int = 128
    num_layers: int = 1
    cell: Literal["rnn", "lstm", "gru"] = "lstm"
    bidirectional: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.cell not in CELLS:
            raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {self.cell!r}")


class RecurrentClassifier(Model):
    """Reads a sequence with a recurrent network, and classifies the state that it ends in.

    .. math:: h_t = \\operatorname{cell}(x_t, h_{t-1}), \\qquad y = W h_T + b

    An image is read row by row: (B, H, W) is a sequence of H steps. With `bidirectional` the two directions'
    last states are put side by side, each at the end of its own reading.

    Args:
        config: the sizes; `create_model("lstm_digits")` makes one from a preset.

    Shape:
        - x: (B, T, input_dim)
        - lengths: (B,) of integers, the real steps of each padded sequence; all T where it is not given
        - output: (B, num_classes)

    Reference:
        Hochreiter, Schmidhuber. Long Short-Term Memory. Neural Computation 1997.
        Elman. Finding Structure in Time. Cognitive Science 1990 (cell "rnn").
        Cho et al. Learning Phrase Representations using RNN Encoder-Decoder. EMNLP 2014 (cell "gru").

    Example:
        >>> model = RecurrentClassifier(RecurrentClassifierConfig(input_dim=8, num_classes=5))
        >>> model(torch.randn(3, 7, 8), torch.tensor([7, 2, 4])).shape
        torch.Size([3, 5])
    """

    def __init__(
        self,
        config: RecurrentClassifierConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.recurrent = Recurrent(
            CELLS[config.cell],
            config.input_dim,
            config.hidden_dim,
            num_layers=config.num_layers,
            bidirectional=config.bidirectional,
            dropout=config.dropout if config.num_layers > 1 else 0.0,
            device=device,
            dtype=dtype,
        )
        self.dropout = nn.Dropout(config.dropout)
        width = config.hidden_dim * (2 if config.bidirectional else 1)
        self.head = nn.Linear(width, config.num_classes, device=device, dtype=dtype)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits of the classes, (B, num_classes)."""
        _, state = self.recurrent(x, lengths)
        last = (
            state[0][-2:] if self.config.bidirectional else state[0][-1:]
        )  # of the last layer, by direction
        logits: Tensor = self.head(self.dropout(torch.cat(tuple(last), dim=-1)))
        return logits

    def example_inputs(
        self, batch_size: int = 1, device: torch.device | str | None = None
    ) -> tuple[Tensor, ...]:
        """Random sequences, as many steps as inputs, as if of a square image: (B, input_dim, input_dim)."""
        return (torch.randn(batch_size, self.config.input_dim, self.config.input_dim, device=device),)


register_presets(
    RecurrentClassifier,
    {
        "lstm_mnist": RecurrentClassifierConfig(),
        "lstm_digits": RecurrentClassifierConfig(input_dim=8, hidden_dim=64, dropout=0.1),
    },
)
