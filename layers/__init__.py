"""Primitives. Each file holds one, usable alone: `from lamina.layers import AdditiveAttention`."""

from .additive_attention import AdditiveAttention
from .axial_attention import AxialAttention
from .axial_positions import AxialPositions
from .chunked_feed_forward import ChunkedFeedForward
from .class_token import ClassToken
from .deformable_attention import DeformableAttention
from .differentiable_augmentation import DifferentiableAugmentation
from .drop_path import DropPath
from .feed_forward import FeedForward
from .frozen_batch_norm import FrozenBatchNorm2d, freeze_batch_norms
from .gaussian_attention import GaussianAttention, orthogonality_penalty
from .glimpse_network import GlimpseNetwork
from .glimpse_sensor import GlimpseSensor
from .gru_cell import GRUCell
from .key_value_cache import KeyValueCache
from .label_smoothing import LabelSmoothingLoss
from .learned_positions import LearnedPositions, LearnedPositions2d
from .length_projection import LengthProjection
from .local_attention import LocalAttention
from .low_rank_attention import LowRankAttention
from .lsh_attention import LSHAttention
from .lstm_cell import LSTMCell
from .masking import causal_mask, mask_from_lengths, mask_from_padding, masked_softmax, window_mask
from .maxout import Maxout
from .memory_hop import MemoryHop
from .memory_hops import memory_hops
from .multi_head_attention import MultiHeadAttention
from .norms import LayerNorm2d, PixelNorm, ScaleNorm
from .packing import Packing, pack, unpack
from .patch_embedding import PatchEmbedding
from .pixel_shuffle import PixelShuffleUpsample
from .recurrent import Recurrent, RecurrentCell
from .relative_position_bias import RelativePositionBias, RelativePositionBias2d
from .reversible import Reversible, ReversibleBlock
from .rnn_cell import RNNCell
from .rotary_positions import RotaryPositions
from .sentence_encoding import SentenceEncoding
from .sinusoidal_positions import SinusoidalPositions, SinusoidalPositions2d
from .spectral_norm import SpectralConv2d, SpectralLinear
from .squeeze_excitation import SqueezeExcitation
from .standardized_conv import StandardizedConv2d
from .temporal_encoding import TemporalEncoding, temporal_noise_ages
from .token_embedding import TokenEmbedding
from .token_norm import TokenNorm
from .vector_quantizer import Quantized, VectorQuantizer
from .window_attention import WindowAttention

__all__ = [
    "AdditiveAttention",
    "AxialAttention",
    "AxialPositions",
    "ChunkedFeedForward",
    "ClassToken",
    "DeformableAttention",
    "DifferentiableAugmentation",
    "DropPath",
    "FeedForward",
    "FrozenBatchNorm2d",
    "GRUCell",
    "GaussianAttention",
    "GlimpseNetwork",
    "GlimpseSensor",
    "KeyValueCache",
    "LSHAttention",
    "LSTMCell",
    "LabelSmoothingLoss",
    "LayerNorm2d",
    "LearnedPositions",
    "LearnedPositions2d",
    "LengthProjection",
    "LocalAttention",
    "LowRankAttention",
    "Maxout",
    "MemoryHop",
    "MultiHeadAttention",
    "Packing",
    "PatchEmbedding",
    "PixelNorm",
    "PixelShuffleUpsample",
    "Quantized",
    "RNNCell",
    "Recurrent",
    "RecurrentCell",
    "RelativePositionBias",
    "RelativePositionBias2d",
    "Reversible",
    "ReversibleBlock",
    "RotaryPositions",
    "ScaleNorm",
    "SentenceEncoding",
    "SinusoidalPositions",
    "SinusoidalPositions2d",
    "SpectralConv2d",
    "SpectralLinear",
    "SqueezeExcitation",
    "StandardizedConv2d",
    "TemporalEncoding",
    "TokenEmbedding",
    "TokenNorm",
    "VectorQuantizer",
    "WindowAttention",
    "causal_mask",
    "freeze_batch_norms",
    "mask_from_lengths",
    "mask_from_padding",
    "masked_softmax",
    "memory_hops",
    "orthogonality_penalty",
    "pack",
    "temporal_noise_ages",
    "unpack",
    "window_mask",
]
