"""What papers build from layers: encoder and decoder blocks, their stacks, and residual networks."""

from .bottleneck import Bottleneck, ResNet
from .decoder_block import DecoderBlock, DecoderBlockCache
from .decoding import Decoding, Generated, beam_search, greedy_search
from .encoder import Decoder, Encoder
from .encoder_block import EncoderBlock
from .masked_token_head import MaskedTokenHead

__all__ = [
    "Bottleneck",
    "Decoder",
    "DecoderBlock",
    "DecoderBlockCache",
    "Decoding",
    "Encoder",
    "EncoderBlock",
    "Generated",
    "MaskedTokenHead",
    "ResNet",
    "beam_search",
    "greedy_search",
]
