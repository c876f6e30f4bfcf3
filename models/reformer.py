"""Reformer (Kitaev et al., 2020): a language model of hashed and local attention on reversible blocks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..blocks import Generated, beam_search, greedy_search
from ..blocks.parts import attend, takes_cache
from ..layers import (
    AxialPositions,
    ChunkedFeedForward,
    KeyValueCache,
    LearnedPositions,
    LocalAttention,
    LSHAttention,
    Reversible,
    ReversibleBlock,
    TokenEmbedding,
)
from .base import Model
from .parts import ACTIVATIONS, Attention, find_part
from .registry import register_presets


@dataclass(frozen=True)
class ReformerConfig:
    """Sizes of a Reformer for tokens (B, L). The defaults are the authors' open model of 64K bytes of enwik8.

    `layers` are the kinds of attention, "lsh" or "local", from the first block on and over again. Positions
    are axial with `axial_shape`, the grid whose product is the longest sequence, and `axial_dims`, None to
    sum the axes; else learned, `max_length` of them. `scaling` "root" divides the scores of hashed attention
    by the root of the head's size once more, as reformer-pytorch does. `circular` lets a round's first chunk
    look back at the last of the round before, as all well-known code does, so that padding has an influence.
    `streams` is how the two reversible streams become one: "concatenate" as in the authors' code, or their
    "mean", as in reformer-pytorch. `redraw` draws the hashing's rotations anew in each pass of training, as
    the authors' code does; evaluation has those of `hash_seed`.
    `attention` puts another layer in place of both kinds. `chunk_feed_forward` is how many tokens the
    feed-forward networks take at once, 0 for all.

    Source:
        Kitaev, Kaiser, Levskaya. ICLR 2020, and the configurations of its code in Trax.

    Example:
        >>> ReformerConfig(depth=3, layers=("lsh",)).num_hashes
        2
    """

    vocab_size: int = 256
    dim: int = 768
    depth: int = 12
    layers: tuple[Literal["lsh", "local"], ...] = ("local", "local", "lsh", "local")
    num_heads: int = 8
    head_dim: int | None = 64
    hidden_dim: int = 2048
    axial_shape: tuple[int, ...] | None = (128, 512)
    axial_dims: tuple[int, ...] | None = (256, 512)
    max_length: int = 512
    chunk_size: int = 256
    num_hashes: int = 2
    num_buckets: int | tuple[int, int] | None = (16, 32)
    look_ahead: int = 0
    scaling: Literal["unit", "root"] = "unit"
    circular: bool = False
    redraw: bool = False
    streams: Literal["concatenate", "mean"] = "concatenate"
    attention: Attention | None = None
    is_causal: bool = True
    reversible: bool = True
    chunk_feed_forward: int = 0
    activation: str = "relu"
    dropout: float = 0.2
    attention_dropout: float = 0.0
    norm_eps: float = 1e-6
    hash_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "axial_shape", "axial_dims", "num_buckets"):  # JSON has no tuples
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.layers or any(kind not in ("lsh", "local") for kind in self.layers):
            raise ValueError(f"layers must be 'lsh' and 'local', one at the least, got {self.layers}")
        if self.scaling not in ("unit", "root"):
            raise ValueError(f"scaling must be 'unit' or 'root', got {self.scaling!r}")
        if self.streams not in ("concatenate", "mean"):
            raise ValueError(f"streams must be 'concatenate' or 'mean', got {self.streams!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")


class Reformer(Model):
    """A language model over long sequences: hashed attention, and memory that does not grow with depth.

    .. math:: y_1 = x_1 + \\operatorname{Attention}(\\operatorname{LN}(x_2)), \\quad
              y_2 = x_2 + \\operatorname{FFN}(\\operatorname{LN}(y_1)), \\quad
              \\operatorname{logits} = W \\operatorname{LN}([y_1; y_2]) + b

    Both streams start as the embedded tokens. A block's activations are computed again in the backward pass
    from its outputs; `reversible=False` keeps them, with the same numbers. Any length up to that of the
    positions is taken, whatever the chunks. With `is_causal=False` each token sees both sides, for masked
    tokens or as an encoder.

    Where a hashed layer's chunks end depends on all tokens, so that a new one changes what earlier ones were
    given. `decoding` keeps keys and values where no layer stands above a hashed one; else it reads all tokens
    again at each step, and says so where a cache is asked for.

    Args:
        config: the sizes; `create_model("reformer_enwik8")` makes one from a preset.
        attention: makes each block's attention, in place of the layers that the config names.

    Shape:
        - ids: (B, L) of integers
        - key_mask: (B, L) of bool, True where a token takes part
        - output: (B, L, vocab_size)

    Raises:
        ValueError: ids are not integers, or there are more than positions.

    Reference:
        Kitaev, Kaiser, Levskaya. Reformer: The Efficient Transformer. ICLR 2020.

    Example:
        >>> config = ReformerConfig(
        ...     50, 16, 2, ("local", "lsh"), 2, None, 32, (4, 8), None, chunk_size=4, num_buckets=None
        ... )
        >>> Reformer(config)(torch.randint(50, (2, 30))).shape
        torch.Size([2, 30, 50])
    """

    def __init__(
        self,
        config: ReformerConfig,
        *,
        attention: Attention | Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = TokenEmbedding(config.vocab_size, config.dim, std=1.0, **factory)
        self.positions: nn.Module = (
            LearnedPositions(config.max_length, config.dim, **factory)
            if config.axial_shape is None
            else AxialPositions(config.axial_shape, config.dim, dims=config.axial_dims, **factory)
        )
        self.dropout = nn.Dropout(config.dropout)
        own = config.attention if attention is None else attention
        blocks = []
        for index in range(config.depth):
            made = self._attention(index) if own is None else find_part(own)
            feed_forward = partial(ChunkedFeedForward, chunk_size=config.chunk_feed_forward or 2**62)
            second = feed_forward(
                config.dim,
                config.hidden_dim,
                activation=ACTIVATIONS[config.activation],
                dropout=config.dropout,
                **factory,
            )
            first = made(config.dim, config.num_heads, **factory)
            blocks.append(
                ReversibleBlock(
                    _Branch(config.dim, first, config.norm_eps, config.dropout, **factory),
                    _Branch(config.dim, second, config.norm_eps, 0.0, **factory),
                )
            )
        self.blocks = Reversible(blocks, recompute=config.reversible)
        width = config.dim if config.streams == "mean" else 2 * config.dim
        self.norm = nn.LayerNorm(width, eps=config.norm_eps, **factory)
        self.head = nn.Linear(width, config.vocab_size, **factory)

    def forward(
        self,
        ids: Tensor,
        *,
        key_mask: Tensor | None = None,
        cache: Sequence[KeyValueCache] | None = None,
    ) -> Tensor:
        """Logits, (B, L, vocab_size); where the model is causal, of the token that follows.

        With a `cache`, one entry a block, the ids are the new ones: see `decoding`.
        """
        offset = cache[0].length if cache else 0
        x = self.embedding(ids)
        x = self.dropout(self.positions(x, offset=offset) if offset else self.positions(x))
        if cache is None:
            y1, y2 = self.blocks(x, key_mask=key_mask, is_causal=self.config.is_causal)
        else:
            y1 = y2 = x
            for block, kept in zip(self.blocks.blocks, cache, strict=True):
                y1 = y1 + block.get_submodule("first")(y2, is_causal=True, cache=kept)
                y2 = y2 + block.get_submodule("second")(y1)
        joined = (y1 + y2) / 2 if self.config.streams == "mean" else torch.cat([y1, y2], -1)
        logits: Tensor = self.head(self.dropout(self.norm(joined)))
        return logits

    def generate(
        self,
        prompt: Tensor,
        *,
        num_beams: int = 1,
        length_penalty: float = 0.0,
        max_length: int | Tensor | None = None,
        end_id: int | None = None,
        padding_id: int = 0,
    ) -> Generated:
        """Goes on with a batch of beginnings, greedily, or by beam search where there are more beams.

        Args:
            prompt: (B, T) of integers, without padding.
            num_beams: K.
            length_penalty: α of `beam_search`.
            max_length: the most tokens that are written, one number or (B,); as many as there are positions
                left, where it is not given.
            end_id: the token behind which a sequence is over; None where all go on to `max_length`.
            padding_id: what stands behind the end.

        Returns:
            `Generated`: tokens (B, K, T') without the prompt, best first.

        Raises:
            ValueError: the model is not causal, or a search refuses what it is given.
        """
        if max_length is None:
            config = self.config
            positions = config.max_length if config.axial_shape is None else math.prod(config.axial_shape)
            max_length = max(positions - prompt.shape[-1], 0)
        options: dict[str, Any] = {
            "max_length": max_length,
            "end_id": -1 if end_id is None else end_id,  # no token is -1
            "padding_id": padding_id,
        }
        if num_beams == 1:
            return greedy_search(self.decoding(), prompt, **options)
        return beam_search(
            self.decoding(), prompt, num_beams=num_beams, length_penalty=length_penalty, **options
        )

    def decoding(self, *, use_cache: bool | None = None) -> "ReformerDecoding":
        """The model at work, as `greedy_search` and `beam_search` take it: a `Decoding`.

        Args:
            use_cache: whether keys and values are kept; where it is not given, if the logits are then those
                of the whole pass.

        Raises:
            ValueError: a cache is asked for, and they would not be; or the model is not causal.
        """
        if not self.config.is_causal:
            raise ValueError("is_causal must be set for a model that writes, got is_causal=False")
        reason = self._no_cache()
        if use_cache and reason is not None:
            raise ValueError(f"use_cache must be False: {reason}")
        return ReformerDecoding(self, use_cache=reason is None if use_cache is None else use_cache)

    def _no_cache(self) -> str | None:
        """Why what is kept would not give what the whole pass gives."""
        layers = [block.get_submodule("first.layer") for block in self.blocks.blocks]
        for index, layer in enumerate(layers):
            if not takes_cache(layer):
                return f"{type(layer).__name__} keeps nothing"
            if isinstance(layer, LSHAttention) and index < len(layers) - 1:
                return (
                    "hashed attention sorts all tokens by their buckets, so that a new one moves the chunks "
                    f"of those before it, and block {index} gives the blocks above it other numbers"
                )
        return None

    def example_inputs(
        self, batch_size: int = 1, device: torch.device | str | None = None
    ) -> tuple[Tensor, ...]:
        """Random tokens, (B, 2 chunks)."""
        length = 2 * self.config.chunk_size
        return (torch.randint(self.config.vocab_size, (batch_size, length), device=device),)

    def _attention(self, index: int) -> Callable[..., nn.Module]:
        config = self.config
        shared: dict[str, Any] = {
            "head_dim": config.head_dim,
            "look_ahead": config.look_ahead,
            "bias": False,
            "dropout": config.attention_dropout,
        }
        if config.layers[index % len(config.layers)] == "local":
            return partial(LocalAttention, window=config.chunk_size, **shared)
        size = config.dim // config.num_heads if config.head_dim is None else config.head_dim
        return partial(
            LSHAttention,
            chunk_size=config.chunk_size,
            num_hashes=config.num_hashes,
            num_buckets=config.num_buckets,
            scale=size**-0.5 if config.scaling == "root" else None,
            circular=config.circular,
            redraw=config.redraw,
            seed=config.hash_seed + index,
            **shared,
        )


class ReformerDecoding:
    """A Reformer at work on one batch: it keeps keys and values, or all tokens, to read them at each step."""

    def __init__(self, model: Reformer, *, use_cache: bool) -> None:
        self.model = model
        self.cache = [KeyValueCache() for _ in model.blocks.blocks] if use_cache else None
        self.tokens: Tensor | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        if self.cache is None:
            self.tokens = tokens = tokens if self.tokens is None else torch.cat([self.tokens, tokens], 1)
        logits: Tensor = self.model(tokens, cache=self.cache)[:, -1]
        return logits

    def reorder(self, rows: Tensor) -> None:
        self.tokens = None if self.tokens is None else self.tokens[rows]
        for kept in self.cache or []:
            kept.reorder(rows)


class _Branch(nn.Module):
    """A layer behind its norm, with dropout on what it gives."""

    def __init__(
        self,
        dim: int,
        layer: nn.Module,
        norm_eps: float,
        dropout: float,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=norm_eps, device=device, dtype=dtype)
        self.layer = layer
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        out = attend(self.layer, self.norm(x), key_mask=key_mask, is_causal=is_causal, cache=cache)
        dropped: Tensor = self.dropout(out)
        return dropped


_ENWIK8 = ReformerConfig()

register_presets(
    Reformer,
    {
        "reformer_enwik8": _ENWIK8,
        "reformer_imagenet64": replace(
            _ENWIK8,
            dim=1024,
            depth=6,
            hidden_dim=4096,
            axial_shape=(64, 64, 3),
            axial_dims=(384, 384, 256),
            chunk_size=128,
            num_buckets=192,
            dropout=0.0,
        ),
        # The paper's duplication task at L = 1024, table 2, and a short one for a CPU. The grid has
        # one axis: from a row and a column no projection alone tells the place half a sequence ago.
        "reformer_duplication": replace(
            _ENWIK8,
            vocab_size=128,
            dim=256,
            depth=1,
            layers=("lsh",),
            num_heads=4,
            head_dim=None,
            hidden_dim=256,
            axial_shape=(1024,),
            axial_dims=None,
            redraw=True,
            chunk_size=64,
            num_hashes=4,
            num_buckets=32,
            dropout=0.0,
        ),
        "reformer_duplication_short": replace(
            _ENWIK8,
            vocab_size=128,
            dim=256,
            depth=3,
            layers=("lsh",),
            num_heads=2,
            head_dim=None,
            hidden_dim=512,
            axial_shape=(64,),
            axial_dims=None,
            redraw=True,
            chunk_size=16,
            num_hashes=2,
            num_buckets=8,
            dropout=0.0,
        ),
    },
)
