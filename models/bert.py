"""BERT (Devlin et al., 2019): the encoder, its pre-training heads, and a classifier."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..blocks import Encoder, EncoderBlock, MaskedTokenHead
from ..layers import FeedForward, LearnedPositions, Packing, TokenEmbedding, pack, unpack
from ..layers.packing import packed_places
from .base import Model
from .parts import ACTIVATIONS, Attention, attention_part, find_part
from .registry import register_presets


@dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT for tokens (B, L). The defaults are BASE, uncased.

    `activation` is "gelu" as in the paper and in Hugging Face's models; the authors' code has "gelu_tanh".
    `attention` names the layer of self-attention; `attention_dropout` is for `MultiHeadAttention`, and
    another layer brings its own: {"name": …, "options": {…}}. `num_segments` is 0 for a model without them,
    such as RoBERTa. With `is_causal` a token sees itself and those before it alone, as in the left-to-right
    model of the paper's ablation.

    Source:
        Devlin et al. NAACL 2019. Section 3.

    Example:
        >>> BertConfig(dim=128, depth=2, num_heads=2, hidden_dim=512).vocab_size
        30522
    """

    vocab_size: int = 30522
    padding_id: int = 0
    max_length: int = 512
    num_segments: int = 2
    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    hidden_dim: int = 3072
    attention: Attention = "MultiHeadAttention"
    activation: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    norm_eps: float = 1e-12
    is_causal: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if not 0 <= self.padding_id < self.vocab_size:
            raise ValueError(f"padding_id must be from 0 to {self.vocab_size - 1}, got {self.padding_id}")


@dataclass(frozen=True)
class BertClassifierConfig(BertConfig):
    """Sizes of a BERT that classifies texts or pairs of texts, (B, L).

    Source:
        Devlin et al. NAACL 2019. Section 4.1.

    Example:
        >>> BertClassifierConfig(num_classes=3).dim
        768
    """

    num_classes: int = 2


class Bert(Model):
    """A Transformer's encoder over word pieces: each token's vector is made of those on both sides of it.

    .. math:: h_0 = \\operatorname{Drop}(\\operatorname{LN}(E_w + S_s + P_t)), \\qquad
              h_\\ell = \\operatorname{Block}(h_{\\ell - 1}), \\qquad
              \\operatorname{pool}(h) = \\tanh(W h_{L,0} + b)

    The blocks are post-norm, with dropout on the attention's weights and on each branch.

    Args:
        config: the sizes; `create_model("bert_base")` makes one from a preset.
        attention: makes each block's attention, in place of the layer that `config.attention` names.
        pooler: whether `pool` is there.

    Shape:
        - ids: (B, L) of integers
        - segments: (B, L) of integers, the text of a pair that a token belongs to; 0 where not given
        - key_mask: (B, L) of bool, True where a token takes part; where it is not padding, if not given
        - output: (B, L, dim)
        - with a packing: ids and segments (N,), output (N, dim)

    Raises:
        ValueError: ids are not integers, there are more than `max_length` of them, segments are given to a
            model without, or a packing comes with a key mask.
        TypeError: the blocks' attention takes no packed tokens.

    Reference:
        Devlin, Chang, Lee, Toutanova. BERT: Pre-training of Deep Bidirectional Transformers for Language
        Understanding. NAACL 2019.

    Example:
        >>> model = Bert(BertConfig(vocab_size=50, dim=16, depth=2, num_heads=2, hidden_dim=32))
        >>> tokens = model(torch.tensor([[5, 17, 9], [7, 4, 0]]))
        >>> tokens.shape, model.pool(tokens).shape
        (torch.Size([2, 3, 16]), torch.Size([2, 16]))
    """

    def __init__(
        self,
        config: BertConfig,
        *,
        attention: Attention | Callable[..., nn.Module] | None = None,
        pooler: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        norm = partial(nn.LayerNorm, eps=config.norm_eps)
        # Padding has a vector as any token has, which checkpoints bring along; it takes no part by the mask.
        self.embedding = TokenEmbedding(config.vocab_size, config.dim, std=0.02, **factory)
        self.positions = LearnedPositions(config.max_length, config.dim, **factory)
        self.segments = (
            nn.Embedding(config.num_segments, config.dim, **factory) if config.num_segments else None
        )
        self.norm = norm(config.dim, **factory)
        self.dropout = nn.Dropout(config.dropout)
        part = find_part(config.attention if attention is None else attention)
        self.encoder = Encoder(
            config.dim,
            config.depth,
            config.num_heads,
            block=partial(
                EncoderBlock,
                attention=attention_part(part, dropout=config.attention_dropout),
                feed_forward=partial(
                    FeedForward,
                    hidden_dim=config.hidden_dim,
                    activation=ACTIVATIONS[config.activation],
                    hidden_dropout=0.0,
                ),
                norm=norm,
                norm_first=False,
                dropout=config.dropout,
            ),
            norm=None,
            **factory,
        )
        self.pooler = nn.Linear(config.dim, config.dim, **factory) if pooler else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Matrices and tables truncated normal with deviation 0.02, biases zero."""
        reset_as_bert(self)

    def forward(
        self,
        ids: Tensor,
        segments: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        packed: bool = False,
        packing: Packing | None = None,
    ) -> Tensor:
        """The last block's tokens, (B, L, dim). Shapes as above.

        With `packed` nothing is computed for padding, which comes back as zeros; the tokens are the same.
        With a `packing`, from `pack`, tokens come without padding and leave so.
        """
        is_causal = self.config.is_causal
        if packing is not None:
            if key_mask is not None or packed:
                raise ValueError("key_mask and packed must be left out where a packing is given")
            places = packed_places(packing, ids.shape[0])[1]
        else:
            if key_mask is None:
                key_mask = ids != self.config.padding_id
            if not packed:
                x = self._embed(ids, segments)
                out: Tensor = self.encoder(x, key_mask=key_mask, is_causal=is_causal)
                return out
            # Places are those in the padded rows: a mask may have holes.
            columns = [ids, torch.arange(ids.shape[1], device=ids.device).expand_as(ids)]
            columns += [] if segments is None else [segments.expand_as(ids)]
            packed_columns, packing = pack(torch.stack(columns, -1), key_mask)
            ids, places, *rest = packed_columns.unbind(-1)
            segments = rest[0] if rest else None
        self.positions.table(packing.longest)  # says so, if that is too long
        tokens = self.encoder(self._embed(ids, segments, places), packing=packing, is_causal=is_causal)
        return tokens if key_mask is None else unpack(tokens, key_mask)

    def _embed(self, ids: Tensor, segments: Tensor | None, places: Tensor | None = None) -> Tensor:
        x = self.positions(self.embedding(ids), positions=places)
        if self.segments is not None:
            x = x + (self.segments.weight[0] if segments is None else self.segments(segments))
        elif segments is not None:
            raise ValueError("segments must not be given to a model of num_segments=0")
        embedded: Tensor = self.dropout(self.norm(x))
        return embedded

    def pool(self, tokens: Tensor) -> Tensor:
        """The first token's vector behind a tanh layer, (B, dim): what stands for the whole text.

        Raises:
            ValueError: the model was made with `pooler=False`.
        """
        if self.pooler is None:
            raise ValueError("pooler must be True for a model that pools, got pooler=False")
        return torch.tanh(self.pooler(tokens[:, 0]))

    def example_inputs(
        self, batch_size: int = 1, device: torch.device | str | None = None
    ) -> tuple[Tensor, ...]:
        """Random tokens, (B, 128) or as many as there are places."""
        length = min(128, self.config.max_length)
        return (torch.randint(1, self.config.vocab_size, (batch_size, length), device=device),)


class PreTrainingLogits(NamedTuple):
    """What BERT is pre-trained to tell.

    Args:
        tokens: (B, L, vocab_size), or (B, P, vocab_size) at the places asked for.
        is_next: (B, 2), of whether the second text does not follow the first: class 0 is that it does.

    Source:
        Devlin et al. NAACL 2019. Section 3.1.

    Example:
        >>> PreTrainingLogits(torch.zeros(2, 7, 50), torch.zeros(2, 2)).is_next.shape
        torch.Size([2, 2])
    """

    tokens: Tensor
    is_next: Tensor


class BertForPreTraining(Model):
    """BERT with its two pre-training heads: which tokens were masked, and whether one text follows another.

    .. math:: \\mathcal L = \\operatorname{mean}_{t \\in M} -\\log p(w_t \\mid h_t)
              - \\log p(\\text{next} \\mid \\operatorname{pool}(h))

    is what they are trained by, M the masked places. The table that scores tokens is the embedding's.

    Args:
        config: the sizes; `create_model("bert_base_pretraining")` makes one from a preset.
        attention: makes each block's attention, in place of the layer that `config.attention` names.

    Shape:
        - ids, segments, key_mask: as of `Bert`
        - places: (B, P) of integers, the tokens to score; all where not given. The tables of words are large:
          scoring the masked 15 % alone saves most of the time
        - output: `PreTrainingLogits`

    Reference:
        Devlin, Chang, Lee, Toutanova. BERT. NAACL 2019. Section 3.1.

    Example:
        >>> config = BertConfig(vocab_size=50, dim=16, depth=2, num_heads=2, hidden_dim=32)
        >>> model = BertForPreTraining(config)
        >>> ids, masked = torch.tensor([[5, 3, 9, 11], [7, 4, 3, 0]]), torch.tensor([[1], [2]])
        >>> model(ids, places=masked).tokens.shape
        torch.Size([2, 1, 50])
    """

    def __init__(
        self,
        config: BertConfig,
        *,
        attention: Attention | Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.bert = Bert(config, attention=attention, **factory)
        self.head = MaskedTokenHead(
            config.dim,
            config.vocab_size,
            activation=ACTIVATIONS[config.activation],
            norm=partial(nn.LayerNorm, eps=config.norm_eps),
            **factory,
        )
        self.is_next = nn.Linear(config.dim, 2, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Matrices and tables truncated normal with deviation 0.02, biases zero."""
        reset_as_bert(self)

    def forward(
        self,
        ids: Tensor,
        segments: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        places: Tensor | None = None,
        packed: bool = False,
    ) -> PreTrainingLogits:
        """Scores of tokens and of the pair. Shapes as above; `packed` as of `Bert`."""
        tokens = self.bert(ids, segments, key_mask=key_mask, packed=packed)
        logits = self.head(tokens, self.bert.embedding.weight, places)
        return PreTrainingLogits(logits, self.is_next(self.bert.pool(tokens)))

    def example_inputs(
        self, batch_size: int = 1, device: torch.device | str | None = None
    ) -> tuple[Tensor, ...]:
        """As those of `Bert`."""
        return self.bert.example_inputs(batch_size, device)


class BertClassifier(Model):
    """BERT with a linear layer on the pooled first token.

    .. math:: \\operatorname{logits} = W \\operatorname{Drop}(\\operatorname{pool}(h)) + b

    Args:
        config: the sizes; `create_model("bert_base_classifier", num_classes=3)` makes one from a preset.
        attention: makes each block's attention, in place of the layer that `config.attention` names.

    Shape:
        - ids, segments, key_mask: as of `Bert`
        - output: (B, num_classes)

    Reference:
        Devlin, Chang, Lee, Toutanova. BERT. NAACL 2019. Section 4.1.

    Example:
        >>> config = BertClassifierConfig(
        ...     vocab_size=50, dim=16, depth=2, num_heads=2, hidden_dim=32, num_classes=3
        ... )
        >>> BertClassifier(config)(torch.tensor([[5, 3, 9], [7, 4, 0]])).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        config: BertClassifierConfig,
        *,
        attention: Attention | Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.bert = Bert(config, attention=attention, device=device, dtype=dtype)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.dim, config.num_classes, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Matrices and tables truncated normal with deviation 0.02, biases zero."""
        reset_as_bert(self)

    def forward(
        self,
        ids: Tensor,
        segments: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        packed: bool = False,
    ) -> Tensor:
        """Logits of the classes, (B, num_classes); `packed` as of `Bert`."""
        tokens = self.bert(ids, segments, key_mask=key_mask, packed=packed)
        logits: Tensor = self.classifier(self.dropout(self.bert.pool(tokens)))
        return logits

    def example_inputs(
        self, batch_size: int = 1, device: torch.device | str | None = None
    ) -> tuple[Tensor, ...]:
        """As those of `Bert`."""
        return self.bert.example_inputs(batch_size, device)


def reset_as_bert(model: nn.Module, std: float = 0.02) -> None:
    """Every matrix and table truncated normal, every bias zero; norms and other parts keep their start."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding, TokenEmbedding, LearnedPositions)):
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if isinstance(module, (nn.Linear, MaskedTokenHead)) and module.bias is not None:
            nn.init.zeros_(module.bias)


_SIZES = {
    "tiny": BertConfig(dim=128, depth=2, num_heads=2, hidden_dim=512),
    "mini": BertConfig(dim=256, depth=4, num_heads=4, hidden_dim=1024),
    "small": BertConfig(dim=512, depth=4, num_heads=8, hidden_dim=2048),
    "medium": BertConfig(dim=512, depth=8, num_heads=8, hidden_dim=2048),
    "base": BertConfig(),
    "large": replace(BertConfig(), dim=1024, depth=24, num_heads=16, hidden_dim=4096),
}

register_presets(Bert, {f"bert_{size}": config for size, config in _SIZES.items()})
register_presets(BertForPreTraining, {f"bert_{size}_pretraining": c for size, c in _SIZES.items()})
register_presets(
    BertClassifier,
    {f"bert_{size}_classifier": BertClassifierConfig(**vars(c)) for size, c in _SIZES.items()},
)
