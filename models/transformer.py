"""The Transformer (Vaswani et al., 2017)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..blocks import (
    Decoder,
    DecoderBlock,
    DecoderBlockCache,
    Encoder,
    EncoderBlock,
    Generated,
    beam_search,
    greedy_search,
)
from ..blocks.parts import takes_cache
from ..layers import (
    FeedForward,
    LearnedPositions,
    MultiHeadAttention,
    SinusoidalPositions,
    TokenEmbedding,
    pack,
    unpack,
)
from .base import Model
from .parts import ACTIVATIONS, Attention, attention_part, find_part
from .registry import register_presets


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a Transformer from (B, S) to (B, T). The defaults are the paper's base for English-German.

    `source_vocab_size` gives the source a table of its own, None is one for both; `tie_output` makes the
    target's table the last layer too. `head_dim` and `value_head_dim` are d_k and d_v, dim / num_heads where
    they are None. `attention` names the layer of self-attention, of the decoder too unless
    `decoder_attention` names another; `bias`, `attention_dropout` and the sizes of heads are for
    `MultiHeadAttention`, and another layer brings its own: {"name": …, "options": {…}}. `norm_first` is the
    pre-norm of the authors' later code, which wants a norm at the end of each stack: None of `final_norm`
    has one there alone.

    Source:
        Vaswani et al. NIPS 2017. Table 3.

    Example:
        >>> TransformerConfig(dim=1024, hidden_dim=4096, num_heads=16, dropout=0.3).encoder_depth
        6
    """

    vocab_size: int = 37000
    source_vocab_size: int | None = None
    padding_id: int = 0
    start_id: int = 1
    end_id: int = 2
    dim: int = 512
    encoder_depth: int = 6
    decoder_depth: int = 6
    num_heads: int = 8
    head_dim: int | None = None
    value_head_dim: int | None = None
    hidden_dim: int = 2048
    attention: Attention = "MultiHeadAttention"
    decoder_attention: Attention | None = None
    positions: Literal["sinusoidal", "learned"] = "sinusoidal"
    max_length: int = 512
    activation: str = "relu"
    norm_first: bool = False
    final_norm: bool | None = None
    bias: bool = False
    tie_output: bool = True
    dropout: float = 0.1
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.positions not in ("sinusoidal", "learned"):
            raise ValueError(f"positions must be 'sinusoidal' or 'learned', got {self.positions!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        for name in "padding_id", "start_id", "end_id":
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(f"{name} must be from 0 to {self.vocab_size - 1}, got {getattr(self, name)}")
        if len({self.padding_id, self.start_id, self.end_id}) < 3:
            raise ValueError(
                "padding_id, start_id and end_id must differ, got "
                f"{self.padding_id}, {self.start_id} and {self.end_id}"
            )


class Transformer(Model):
    """Reads a source sequence with an encoder, and writes a target with a decoder, token by token.

    .. math:: m = \\operatorname{Encoder}(\\sqrt C \\, E_x + P), \\qquad
              \\operatorname{logits}_t = \\operatorname{Decoder}(\\sqrt C \\, E_{y_{<t}} + P, m)_t \\, E^\\top

    The default is the paper: post-norm, no norm at the end, ReLU, one table for source, target and output,
    dropout on each branch and on the embeddings. What the paper leaves open is as in the authors'
    tensor2tensor: projections of the attention without bias, ε = 1e-6 in the norms. `norm_first=True` is what
    that code became. `torch.nn.Transformer` (which has no embeddings) is `bias=True, final_norm=True,
    norm_eps=1e-5, attention_dropout=p, hidden_dropout=p`.

    Padding takes part nowhere: not as a source token, not as a logit that a search could choose. Targets are
    padded behind their end, where causality hides it; a padded source needs no mask from you.

    Args:
        config: the sizes; `create_model("transformer_base")` makes one from a preset.
        attention: makes the self-attention of each block, in place of the layers that the config names.

    Shape:
        - source: (B, S) of integers, `padding_id` behind a sequence's end
        - target: (B, T) of integers: the start token, then the target without its last token
        - output: (B, T, vocab_size); the logit at t is of the token at t of the target without its start

    Raises:
        ValueError: ids are not integers, or a sequence is longer than learned positions reach.

    Reference:
        Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, Polosukhin. Attention Is All You Need. NIPS
        2017.

    Example:
        >>> model = Transformer(TransformerConfig(vocab_size=11, dim=16, num_heads=2, hidden_dim=32)).eval()
        >>> source = torch.tensor([[5, 3, 9, 2], [7, 2, 0, 0]])
        >>> model(source, torch.tensor([[1, 4, 6], [1, 8, 3]])).shape
        torch.Size([2, 3, 11])
        >>> model.generate(source, num_beams=3, max_length=5).tokens.shape[:2]
        torch.Size([2, 3])
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        attention: Attention | Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def embed(vocab_size: int) -> TokenEmbedding:
            return TokenEmbedding(vocab_size, config.dim, padding_id=config.padding_id, scale=True, **factory)

        self.target_embedding = embed(config.vocab_size)
        self.source_embedding = (
            self.target_embedding if config.source_vocab_size is None else embed(config.source_vocab_size)
        )
        self.positions = (
            SinusoidalPositions(config.dim, **factory)
            if config.positions == "sinusoidal"
            else LearnedPositions(config.max_length, config.dim, **factory)
        )
        self.dropout = nn.Dropout(config.dropout)
        norm = partial(nn.LayerNorm, eps=config.norm_eps)
        final = config.norm_first if config.final_norm is None else config.final_norm
        block: dict[str, Any] = {
            "feed_forward": partial(
                FeedForward,
                hidden_dim=config.hidden_dim,
                activation=ACTIVATIONS[config.activation],
                hidden_dropout=config.hidden_dropout,
            ),
            "norm": norm,
            "norm_first": config.norm_first,
            "dropout": config.dropout,
        }
        stack = {"norm": norm if final else None, **factory}
        heads = partial(
            attention_part,
            head_dim=config.head_dim,
            value_head_dim=config.value_head_dim,
            bias=config.bias,
            dropout=config.attention_dropout,
        )
        own = find_part(config.attention if attention is None else attention)
        of_decoder = own if config.decoder_attention is None else find_part(config.decoder_attention)
        self.encoder = Encoder(
            config.dim,
            config.encoder_depth,
            config.num_heads,
            block=partial(EncoderBlock, attention=heads(own), **block),
            **stack,
        )
        self.decoder = Decoder(
            config.dim,
            config.decoder_depth,
            config.num_heads,
            block=partial(
                DecoderBlock,
                attention=heads(of_decoder),
                cross_attention=heads(MultiHeadAttention),
                **block,
            ),
            **stack,
        )
        self.head = (
            None if config.tie_output else nn.Linear(config.dim, config.vocab_size, bias=False, **factory)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Matrices Xavier-uniform with zero bias, embeddings N(0, 1 / dim), which the scale makes 1."""
        for module in self.modules():
            if isinstance(module, FeedForward):
                linears = [module.up, module.down]
            else:
                linears = [self.head] if module is self and self.head is not None else []
            for linear in linears:
                nn.init.xavier_uniform_(linear.weight)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)

    def forward(self, source: Tensor, target: Tensor, *, packed: bool = False) -> Tensor:
        """Logits, (B, T, vocab_size). Shapes as above; `packed` as of `encode`."""
        memory, key_mask = self.encode(source, packed=packed)
        return self.decode(target, memory, key_mask)

    def encode(self, source: Tensor, *, packed: bool = False) -> tuple[Tensor, Tensor]:
        """The encoded source, (B, S, dim), and where it is not padding, (B, S).

        With `packed` nothing is computed for padding, which comes back as zeros; the tokens are the same.

        Raises:
            TypeError: with `packed`, the encoder's attention takes no packed tokens.
        """
        key_mask = source != self.config.padding_id
        if not packed:
            x = self.dropout(self.positions(self.source_embedding(source)))
            return self.encoder(x, key_mask=key_mask), key_mask
        places = torch.arange(source.shape[1], device=source.device).expand_as(source)
        columns, packing = pack(torch.stack([source, places], -1), key_mask)
        ids, places = columns.unbind(-1)
        if isinstance(self.positions, LearnedPositions):
            self.positions.table(packing.longest)  # says so, if that is too long
        x = self.dropout(self.positions(self.source_embedding(ids), positions=places))
        return unpack(self.encoder(x, packing=packing), key_mask), key_mask

    def decode(
        self,
        target: Tensor,
        memory: Tensor,
        memory_key_mask: Tensor | None = None,
        *,
        cache: list[DecoderBlockCache] | None = None,
    ) -> Tensor:
        """Logits, (B, T, vocab_size), after the tokens (B, T); with a `cache` these are the new ones."""
        offset = cache[0].self_attention.length if cache else 0
        x = self.dropout(self.positions(self.target_embedding(target), offset=offset))
        x = self.decoder(x, memory, memory_key_mask=memory_key_mask, is_causal=True, cache=cache)
        logits: Tensor = self.target_embedding.logits(x) if self.head is None else self.head(x)
        return logits

    def generate(
        self,
        source: Tensor,
        *,
        num_beams: int = 4,
        length_penalty: float = 0.6,
        max_length: int | Tensor | None = None,
    ) -> Generated:
        """Target sequences for a batch of sources, by beam search, with one beam greedily.

        Args:
            source: (B, S) of integers.
            num_beams: K.
            length_penalty: α of `beam_search`.
            max_length: the most tokens that are written, one number or (B,); the paper's, 50 more than the
                source has, where it is not given.

        Returns:
            `Generated`: tokens (B, K, T) without the start, best first.
        """
        if max_length is None:
            limits = (source != self.config.padding_id).sum(1) + 50
            learned = isinstance(self.positions, LearnedPositions)
            max_length = limits.clamp(max=self.config.max_length) if learned else limits
        prompt = source.new_full((len(source), 1), self.config.start_id)
        options: dict[str, Any] = {
            "max_length": max_length,
            "end_id": self.config.end_id,
            "padding_id": self.config.padding_id,
        }
        decoding = self.decoding(source)
        if num_beams == 1:
            return greedy_search(decoding, prompt, **options)
        return beam_search(decoding, prompt, num_beams=num_beams, length_penalty=length_penalty, **options)

    def decoding(self, source: Tensor, *, use_cache: bool = True) -> "TransformerDecoding":
        """The model at work on `source`, as `beam_search` and `greedy_search` take it."""
        return TransformerDecoding(self, source, use_cache=use_cache)

    def example_inputs(
        self, batch_size: int = 1, device: torch.device | str | None = None
    ) -> tuple[Tensor, ...]:
        """Random tokens, sixteen a sequence, of source and target: (B, 16) each."""
        sizes = self.config.source_vocab_size or self.config.vocab_size, self.config.vocab_size
        first = min(3, *(size - 1 for size in sizes))
        source, target = (torch.randint(first, size, (batch_size, 16), device=device) for size in sizes)
        return source, target


class TransformerDecoding:
    """A Transformer at work on one batch of sources: a `Decoding`.

    Keys and values are kept where the decoder's attention can; else all tokens are read again at each step.
    """

    def __init__(self, model: Transformer, source: Tensor, *, use_cache: bool = True) -> None:
        self.model = model
        self.memory, self.key_mask = model.encode(source)
        self.sources = torch.arange(len(source), device=source.device)
        caches = all(takes_cache(block.get_submodule("attention")) for block in model.decoder.blocks)
        self.cache = model.decoder.make_cache() if use_cache and caches else None
        self.tokens: Tensor | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        if self.cache is None:
            tokens = tokens if self.tokens is None else torch.cat([self.tokens, tokens], 1)
            self.tokens = tokens
        logits = self.model.decode(tokens, self.memory, self.key_mask, cache=self.cache)[:, -1]
        never = torch.tensor([self.model.config.padding_id, self.model.config.start_id], device=logits.device)
        return logits.index_fill(-1, never, -torch.inf)

    def reorder(self, rows: Tensor) -> None:
        sources = self.sources[rows]
        moved = not torch.equal(sources, self.sources)  # beams of one source share its memory
        if moved:
            self.memory, self.key_mask, self.sources = self.memory[rows], self.key_mask[rows], sources
        for entry in self.cache or []:
            entry.self_attention.reorder(rows)
            if moved:
                entry.cross_attention.reorder(rows)
        self.tokens = None if self.tokens is None else self.tokens[rows]


_BASE = TransformerConfig()

register_presets(
    Transformer,
    {
        "transformer_base": _BASE,
        "transformer_big": replace(_BASE, dim=1024, hidden_dim=4096, num_heads=16, dropout=0.3),
        # Of the copy task, and of Multi30k's short sentences.
        "transformer_copy": replace(
            _BASE, vocab_size=11, dim=128, encoder_depth=2, decoder_depth=2, num_heads=4, hidden_dim=256
        ),
        "transformer_small": replace(
            _BASE,
            vocab_size=8000,
            dim=256,
            encoder_depth=3,
            decoder_depth=3,
            num_heads=4,
            hidden_dim=1024,
            dropout=0.2,
        ),
    },
)
