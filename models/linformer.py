"""Linformer (Wang et al., 2020): a RoBERTa-style encoder on low-rank attention."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..blocks import MaskedTokenHead
from ..layers import LengthProjection, LowRankAttention
from .base import Model
from .bert import Bert, BertConfig, reset_as_bert
from .parts import ACTIVATIONS, Attention
from .registry import register_presets

Sharing = Literal["none", "heads", "key_value", "layers"]


@dataclass(frozen=True)
class LinformerConfig:
    """Sizes of a Linformer for tokens (B, L). The defaults are the paper's base model at n = 512, k = 128.

    `share` says which projections of the length are one: "none", each head of each layer has two of its own;
    "heads", those of a layer share both; "key_value", and keys and values share it too; "layers", there is
    one for the whole model. `rank` may be a tuple, with a k for each layer, unless they share. `projection`
    is the kind of `LengthProjection`. `attention` puts another layer in place of all that: with
    "MultiHeadAttention" the model is the RoBERTa that the paper compares with. Matrices and tables start with
    the deviation `std`, which is BERT's 0.02; a narrow model may want more.

    Source:
        Wang et al. 2020. Section 4.

    Example:
        >>> LinformerConfig(rank=256, share="layers").max_length
        512
    """

    vocab_size: int = 50265
    padding_id: int = 1
    max_length: int = 512
    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    hidden_dim: int = 3072
    rank: int | tuple[int, ...] = 128
    share: Sharing = "heads"
    projection: Literal["linear", "mean", "max", "conv"] = "linear"
    attention: Attention | None = None
    activation: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    norm_eps: float = 1e-5
    std: float = 0.02

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int):  # JSON has no tuples
            object.__setattr__(self, "rank", tuple(self.rank))
        if self.std <= 0:
            raise ValueError(f"std must be above 0, got {self.std}")
        if self.share not in ("none", "heads", "key_value", "layers"):
            raise ValueError(f"share must be none, heads, key_value or layers, got {self.share!r}")
        if isinstance(self.rank, tuple):
            if len(self.rank) != self.depth:
                raise ValueError(f"rank must be one number or {self.depth}, one a layer, got {self.rank}")
            if self.share == "layers":
                raise ValueError("rank must be one number where all layers share a projection, got a tuple")


class Linformer(Model):
    """An encoder whose attention is linear in the length, with RoBERTa's head for masked tokens.

    .. math:: \\operatorname{head}_i = \\operatorname{softmax}\\left(
              \\frac{Q_i (E_i K_i)^\\top}{\\sqrt D} \\right) F_i V_i

    It is `Bert` without segments on `LowRankAttention`. Padding has no influence; in the authors' code it
    reaches the projected keys. There is no causal form, as E mixes all places.

    Args:
        config: the sizes; `create_model("linformer_base")` makes one from a preset.
        attention: makes each block's attention, in place of the low-rank one that the config describes.

    Shape:
        - ids: (B, L) of integers, L up to max_length
        - key_mask: (B, L) of bool, True where a token takes part; where it is not padding, if not given
        - places: (B, P) of integers, the tokens to score; all where not given
        - output: (B, L or P, vocab_size), scores of what each token is

    Raises:
        ValueError: ids are not integers, or there are more than `max_length`.

    Reference:
        Wang, Li, Khabsa, Fang, Ma. Linformer: Self-Attention with Linear Complexity. arXiv:2006.04768, 2020.

    Example:
        >>> config = LinformerConfig(
        ...     50, max_length=16, dim=16, depth=2, num_heads=2, hidden_dim=32, rank=4, share="layers"
        ... )
        >>> Linformer(config)(torch.tensor([[5, 17, 9], [7, 4, 1]])).shape
        torch.Size([2, 3, 50])
    """

    def __init__(
        self,
        config: LinformerConfig,
        *,
        attention: Attention | Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        ranks = [config.rank] * config.depth if isinstance(config.rank, int) else list(config.rank)
        own = config.attention if attention is None else attention
        of_all = (
            LengthProjection(config.max_length, ranks[0], kind=config.projection, **factory)
            if config.share == "layers" and own is None
            else None
        )
        left = iter(ranks)

        def low_rank(dim: int, num_heads: int, **options: Any) -> nn.Module:
            """The next layer's."""
            part = partial(LowRankAttention, dim, num_heads, dropout=config.attention_dropout, **options)
            if config.share == "layers":
                return part(key_projection=of_all)
            return part(
                max_length=config.max_length,
                rank=next(left),
                projection=config.projection,
                share=config.share,
            )

        body = BertConfig(
            vocab_size=config.vocab_size,
            padding_id=config.padding_id,
            max_length=config.max_length,
            num_segments=0,
            dim=config.dim,
            depth=config.depth,
            num_heads=config.num_heads,
            hidden_dim=config.hidden_dim,
            activation=config.activation,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
            norm_eps=config.norm_eps,
        )
        self.bert = Bert(body, attention=low_rank if own is None else own, pooler=False, **factory)
        self.head = MaskedTokenHead(
            config.dim,
            config.vocab_size,
            activation=ACTIVATIONS[config.activation],
            norm=partial(nn.LayerNorm, eps=config.norm_eps),
            **factory,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Matrices and tables truncated normal with `config.std`, biases zero; E and F reset themselves."""
        reset_as_bert(self, self.config.std)

    def forward(self, ids: Tensor, *, key_mask: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """Scores of tokens. Shapes as above."""
        tokens = self.bert(ids, key_mask=key_mask)
        logits: Tensor = self.head(tokens, self.bert.embedding.weight, places)
        return logits

    def example_inputs(
        self, batch_size: int = 1, device: torch.device | str | None = None
    ) -> tuple[Tensor, ...]:
        """Random tokens, (B, max_length)."""
        shape = (batch_size, self.config.max_length)
        return (torch.randint(2, self.config.vocab_size, shape, device=device),)


_BASE = LinformerConfig()

register_presets(
    Linformer,
    {
        "linformer_base": _BASE,
        "linformer_base_shared": replace(_BASE, share="layers"),
        "linformer_base_1024": replace(_BASE, max_length=1024, rank=256),
        "linformer_small": LinformerConfig(
            vocab_size=4000,
            padding_id=0,
            max_length=128,
            dim=128,
            depth=2,
            num_heads=4,
            hidden_dim=512,
            rank=32,
        ),
    },
)
