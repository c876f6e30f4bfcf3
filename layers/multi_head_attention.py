"""Multi-head attention (Vaswani et al., 2017)."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..kernels import dot_product_attention, packed_attention
from ..kernels.checks import check_dropout
from ..kernels.dot_product_attention import attention_weights, with_score_bias
from ..kernels.score_bias import DistanceBias, ScoreBias
from ._heads import head_size, join_heads, split_heads, start_projections
from .key_value_cache import KeyValueCache
from .masking import attention_mask
from .packing import Packing, packed_places


class MultiHeadAttention(nn.Module):
    """Dot-product attention in several heads, each on projections of its own; self- or cross-attention.

    .. math:: \\operatorname{head}_h = \\operatorname{softmax}\\left(
              \\frac{Q_h K_h^\\top}{\\sqrt D} + b \\right) V_h,
              \\quad o = [\\operatorname{head}_1; \\dots; \\operatorname{head}_H] \\, W^O

    With `num_kv_heads` fewer than `num_heads`, neighbouring query heads share keys and values (grouped
    queries; 1 is multi-query attention). `rotary` turns queries and keys by their positions, the last query
    standing where the last key stands, as `is_causal` has it; `qk_norm` normalises both per head before that.

    It differs from `torch.nn.MultiheadAttention` in what a mask means (True takes part), in the alignment of
    `is_causal`, in its zero for a query without keys (there NaN), and in projecting from one weight each.
    Time O(L C² + L² C); memory as that of `lamina.kernels.dot_product_attention`.

    Args:
        dim: C, size of a query and of the output.
        num_heads: H.
        num_kv_heads: heads of the keys and values; `num_heads` where it is not given.
        head_dim: D; dim / num_heads where it is not given.
        value_head_dim: size of a head of the values; D where it is not given.
        key_dim: size of a key before its projection; `dim` where it is not given.
        value_dim: size of a value before its projection; `key_dim` where it is not given.
        bias: whether the four projections have one.
        dropout: probability with which an attention weight is dropped in training.
        rotary: turns (B, H, L, D) by position, e.g. `RotaryPositions(head_dim)`.
        qk_norm: makes the norm of a head's queries, and another of its keys, e.g. `nn.RMSNorm`.

    Shape:
        - query: (B, Lq, dim)
        - key: (B, Lk, key_dim); the queries where it is not given
        - value: (B, Lk, value_dim); the keys where it is not given
        - key_mask: (B, Lk) of bool, True where a key takes part
        - mask: bool, broadcastable to (B, H, Lq, Lk)
        - bias: float, broadcastable to (B, H, Lq, Lk), added to the scores; or a `DistanceBias` or
          `TableBias`, which need not be written out
        - output: (B, Lq, dim); a query with no key gives the bias of the output projection alone
        - packed: query (N, dim), key (M, key_dim), value (M, value_dim) and output (N, dim)

    Raises:
        ValueError: the heads do not divide `dim` or each other, a size or mask does not fit, or packed tokens
            come with a mask, a cache or a bias that is written out.

    Reference:
        Vaswani et al. Attention Is All You Need. NIPS 2017. Section 3.2.
        Ainslie et al. GQA: Training Generalized Multi-Query Transformer Models. EMNLP 2023.

    Example:
        >>> attention = MultiHeadAttention(32, num_heads=4)
        >>> attention(torch.randn(2, 5, 32), torch.randn(2, 7, 32)).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_head_dim: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        rotary: nn.Module | None = None,
        qk_norm: Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % num_kv_heads:
            raise ValueError(
                "num_kv_heads must divide num_heads, got "
                f"num_heads={num_heads} and num_kv_heads={num_kv_heads}"
            )
        check_dropout(dropout)
        factory = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.num_kv_heads = dim, num_heads, num_kv_heads
        self.head_dim = head_size(dim, num_heads, head_dim)
        self.value_head_dim = self.head_dim if value_head_dim is None else value_head_dim
        self.dropout = dropout
        key_dim = dim if key_dim is None else key_dim
        value_dim = key_dim if value_dim is None else value_dim
        self.query = nn.Linear(dim, num_heads * self.head_dim, bias=bias, **factory)
        self.key = nn.Linear(key_dim, num_kv_heads * self.head_dim, bias=bias, **factory)
        self.value = nn.Linear(value_dim, num_kv_heads * self.value_head_dim, bias=bias, **factory)
        self.out = nn.Linear(num_heads * self.value_head_dim, dim, bias=bias, **factory)
        self.query_norm = nn.Identity() if qk_norm is None else qk_norm(self.head_dim, **factory)
        self.key_norm = nn.Identity() if qk_norm is None else qk_norm(self.head_dim, **factory)
        self.rotary = rotary
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform projections with zero bias, as in the original implementation."""
        start_projections(self.query, self.key, self.value, self.out)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        mask: Tensor | None = None,
        bias: Tensor | ScoreBias | None = None,
        is_causal: bool = False,
        cache: KeyValueCache | None = None,
        packing: Packing | None = None,
        key_packing: Packing | None = None,
    ) -> Tensor:
        """The output, (B, Lq, dim). Shapes as above.

        With a `cache`, self-attention appends the keys and values of the new tokens to it and attends over
        all (masks are over all keys, the kept ones first); cross-attention projects `key` and `value` at the
        first step and takes what the cache keeps at every later one.

        With a `packing`, from `pack`, the queries of all sequences stand in one row without padding, and
        their keys in another, which `key_packing` tells where it is not the same. A `rotary` takes
        `positions=` then.
        """
        if packing is not None:
            given = {"key_mask": key_mask, "mask": mask, "cache": cache}
            return self._packed(query, key, value, packing, key_packing, bias, is_causal, given)
        if key_packing is not None:
            raise ValueError("packing must be given with key_packing, got None")
        if cache is not None and key is not None and cache.keys is not None and cache.values is not None:
            k, v = cache.keys, cache.values
        else:
            source = query if key is None else key
            k = self._keys(source, offset=0 if cache is None else cache.length)
            v = split_heads(self.value(source if value is None else value), self.num_kv_heads)
            if cache is not None:
                k, v = cache.update(k, v)
        q = self._queries(query, offset=k.shape[2] - query.shape[1])
        shape = (q.shape[0], self.num_heads, q.shape[2], k.shape[2])
        bias, score_bias = self._biases(bias, q, k)
        heads = dot_product_attention(
            q,
            k,
            v,
            mask=attention_mask(key_mask, mask, shape),
            bias=bias,
            score_bias=score_bias,
            is_causal=is_causal,
            dropout=self.dropout if self.training else 0.0,
        )
        return self.out(join_heads(heads))

    def weights(
        self,
        query: Tensor,
        key: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        mask: Tensor | None = None,
        bias: Tensor | ScoreBias | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """The attention weights, (B, H, Lq, Lk): each row sums to one, or to zero with no key to attend."""
        k = self._keys(query if key is None else key, offset=0)
        q = self._queries(query, offset=k.shape[2] - query.shape[1])
        shape = (q.shape[0], self.num_heads, q.shape[2], k.shape[2])
        bias, score_bias = self._biases(bias, q, k)
        return attention_weights(
            q,
            k,
            mask=attention_mask(key_mask, mask, shape),
            bias=bias,
            score_bias=score_bias,
            is_causal=is_causal,
        )

    def _packed(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        packing: Packing,
        key_packing: Packing | None,
        bias: Tensor | ScoreBias | None,
        is_causal: bool,
        given: Mapping[str, object],
    ) -> Tensor:
        for name, option in given.items():
            if option is not None:
                raise ValueError(f"{name} must be None with packed tokens, got a {type(option).__name__}")
        own = self._score_bias()
        score_bias = own if bias is None else bias
        both = bias is not None and own is not None
        if both or (score_bias is not None and not isinstance(score_bias, DistanceBias)):
            raise ValueError(
                "bias must be None with packed tokens, or a DistanceBias where the layer has none of its "
                f"own, got a {type(score_bias).__name__}"
            )
        source = query if key is None else key
        tokens = {"query": query, "key": source, "value": source if value is None else value}
        for name, of_name in tokens.items():
            if of_name.ndim != 2:
                raise ValueError(f"{name} must be (N, C) with a packing, got {tuple(of_name.shape)}")
        key_packing = packing if key_packing is None else key_packing
        q, k = self.query(query), self.key(source)
        q = self.query_norm(q.unflatten(1, (self.num_heads, -1)))
        k = self.key_norm(k.unflatten(1, (self.num_kv_heads, -1)))
        if self.rotary is not None:
            sequences, places = packed_places(packing, q.shape[0])
            more = key_packing.starts.diff() - packing.starts.diff()  # the last query stands at the last key
            q = self._turned(q, places + more[sequences])
            k = self._turned(k, packed_places(key_packing, k.shape[0])[1])
        heads = packed_attention(
            q,
            k,
            self.value(tokens["value"]).unflatten(1, (self.num_kv_heads, -1)),
            packing.starts,
            key_packing.starts,
            longest=(packing.longest, key_packing.longest),
            score_bias=score_bias if isinstance(score_bias, DistanceBias) else None,
            is_causal=is_causal,
            dropout=self.dropout if self.training else 0.0,
        )
        return self.out(heads.flatten(1))

    def _turned(self, heads: Tensor, positions: Tensor) -> Tensor:
        """`rotary` of (N, H, D), each token at its place."""
        assert self.rotary is not None
        turned: Tensor = self.rotary(heads.transpose(0, 1), positions=positions)
        return turned.transpose(0, 1)

    def _score_bias(self) -> ScoreBias | None:
        """What a kind of attention adds to every score, made from parameters of its own."""
        return None

    def _biases(
        self, bias: Tensor | ScoreBias | None, q: Tensor, k: Tensor
    ) -> tuple[Tensor | None, ScoreBias | None]:
        """What is given and the layer's own: one that is written out, and one that need not be."""
        own = self._score_bias()
        if bias is None or isinstance(bias, Tensor):
            return bias, own
        return (None, bias) if own is None else (with_score_bias(None, bias, q, k.shape[2]), own)

    def _queries(self, query: Tensor, offset: int) -> Tensor:
        q: Tensor = self.query_norm(split_heads(self.query(query), self.num_heads))
        return q if self.rotary is None else self.rotary(q, offset=offset)

    def _keys(self, key: Tensor, offset: int) -> Tensor:
        k: Tensor = self.key_norm(split_heads(self.key(key), self.num_kv_heads))
        return k if self.rotary is None else self.rotary(k, offset=offset)

    def extra_repr(self) -> str:
        heads = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"
        return f"dim={self.dim}, {heads}, dropout={self.dropout}"
