"""What papers build from layers: encoder and decoder blocks, their stacks, and residual networks."""

from .bottleneck import Bottleneck, ResNet
from .decoder_block import DecoderBlock, DecoderBlockCache
from .encoder import Decoder, Encoder
from .encoder_block import EncoderBlock

__all__ = [
    "Bottleneck",
    "Decoder",
    "DecoderBlock",
    "DecoderBlockCache",
    "Encoder",
    "EncoderBlock",
    "ResNet",
]
