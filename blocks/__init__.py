"""What papers build from layers: encoder and decoder blocks, and their stacks."""

from .decoder_block import DecoderBlock, DecoderBlockCache
from .encoder import Decoder, Encoder
from .encoder_block import EncoderBlock

__all__ = ["Decoder", "DecoderBlock", "DecoderBlockCache", "Encoder", "EncoderBlock"]
