"""Primitives. Each file holds one, usable alone: `from lamina.layers import AdditiveAttention`."""

from .additive_attention import AdditiveAttention
from .drop_path import DropPath
from .feed_forward import FeedForward
from .gru_cell import GRUCell
from .key_value_cache import KeyValueCache
from .learned_positions import LearnedPositions, LearnedPositions2d
from .lstm_cell import LSTMCell
from .masking import causal_mask, mask_from_lengths, mask_from_padding, masked_softmax
from .multi_head_attention import MultiHeadAttention
from .norms import LayerNorm2d, PixelNorm, ScaleNorm
from .patch_embedding import PatchEmbedding
from .recurrent import Recurrent, RecurrentCell
from .rnn_cell import RNNCell
from .rotary_positions import RotaryPositions
from .sinusoidal_positions import SinusoidalPositions, SinusoidalPositions2d
from .standardized_conv import StandardizedConv2d

__all__ = [
    "AdditiveAttention",
    "DropPath",
    "FeedForward",
    "GRUCell",
    "KeyValueCache",
    "LSTMCell",
    "LayerNorm2d",
    "LearnedPositions",
    "LearnedPositions2d",
    "MultiHeadAttention",
    "PatchEmbedding",
    "PixelNorm",
    "RNNCell",
    "Recurrent",
    "RecurrentCell",
    "RotaryPositions",
    "ScaleNorm",
    "SinusoidalPositions",
    "SinusoidalPositions2d",
    "StandardizedConv2d",
    "causal_mask",
    "mask_from_lengths",
    "mask_from_padding",
    "masked_softmax",
]
