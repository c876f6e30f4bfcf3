"""Low-rank attention: the Linformer's (Wang et al., 2020)."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..kernels import low_rank_attention
from ..kernels.checks import check_dropout, check_key_mask
from ..kernels.dot_product_attention import attention_weights
from ._heads import head_size, join_heads, split_heads, start_projections
from .length_projection import Kind, LengthProjection

Share = Literal["key_value", "heads", "none"]


class LowRankAttention(nn.Module):
    """Multi-head attention to k mixtures of the keys in place of the keys: linear in the length.

    .. math:: \\operatorname{head}_h = \\operatorname{softmax}\\left(
              \\frac{Q_h (E_h K_h)^\\top}{\\sqrt D} \\right) F_h V_h,
              \\quad o = [\\operatorname{head}_1; \\dots; \\operatorname{head}_H] \\, W^O

    E and F, of size k x n, mix the places of the sequence (see `LengthProjection`). `share` says who shares
    them: "none", each head has its own E and F; "heads", one E and one F for all heads; "key_value", one
    matrix for all heads, keys and values. That is the default: in the paper's table 2 it scores as well as
    separate matrices (91.85 against 91.75 at k = 128, 92.03 against 92.08 at k = 256) with half the weights,
    and it is what the best result there, one matrix for all layers, is within a layer. To share by layers,
    give one `LengthProjection` to all of them.

    Keys and values are masked after their projections, biases included, and before E and F: padding has no
    influence. In the authors' code and in `linformer.LinformerSelfAttention` it has, as neither takes a mask
    before E. A shorter sequence takes the first columns of E, as in the authors' code. The authors' code
    applies E before the projection to keys, which is the paper's equation but for the bias; so does this
    layer where E is linear and shared by the heads, as it is cheaper, with the bias put right. `linformer`'s
    `share_kv` ties the projections to keys and values too, which no mode here does.

    There is no causal form: each column holds the whole sequence, so that a mask over the columns hides no
    future. `is_causal=True` is refused.

    Time O(L C² + L k C), memory O(L C + k L H) in the definition and O(L C + k C) in PyTorch's fused paths;
    E and F have k n parameters each.

    Args:
        dim: C, size of a token and of the output.
        num_heads: H.
        max_length: n, the most keys; only left out where `key_projection` is given.
        rank: k, columns that a sequence of `max_length` gives; at most `max_length`.
        projection: the kind of E and F: "linear", "mean", "max" or "conv".
        share: who shares E and F: "key_value", "heads" or "none".
        key_projection: a module to take as E, for example another layer's; it is F too where that is not
            given. `max_length`, `rank`, `projection` and `share` then say nothing.
        value_projection: a module to take as F, beside `key_projection`.
        num_kv_heads: heads of the keys and values; `num_heads` where it is not given.
        head_dim: D; dim / num_heads where it is not given.
        bias: whether the four projections have one.
        dropout: probability with which an attention weight is dropped in training.

    Shape:
        - query: (B, Lq, dim)
        - key: (B, Lk, dim) with Lk up to `max_length`; the queries where it is not given
        - value: (B, Lk, dim); the keys where it is not given
        - key_mask: (B, Lk) of bool, True where a key takes part
        - output: (B, Lq, dim); a row of the batch with no key gives the bias of the output projection alone

    Raises:
        ValueError: a size or mask does not fit, there are more keys than `max_length`, or `is_causal` is set.

    Reference:
        Wang, Li, Khabsa, Fang, Ma. Linformer: Self-Attention with Linear Complexity. arXiv:2006.04768, 2020.
        Section 4.

    Example:
        >>> attention = LowRankAttention(32, num_heads=4, max_length=100, rank=20)
        >>> attention(torch.randn(2, 70, 32)).shape
        torch.Size([2, 70, 32])
        >>> deeper = LowRankAttention(32, num_heads=4, key_projection=attention.key_projection)  # shared
        >>> deeper(torch.randn(2, 70, 32)).shape
        torch.Size([2, 70, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        max_length: int | None = None,
        rank: int = 256,
        projection: Kind = "linear",
        share: Share = "key_value",
        key_projection: LengthProjection | None = None,
        value_projection: LengthProjection | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
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
        if share not in get_args(Share):
            raise ValueError(f"share must be one of {', '.join(get_args(Share))}, got {share!r}")
        check_dropout(dropout)
        factory = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.num_kv_heads = dim, num_heads, num_kv_heads
        self.head_dim = head_size(dim, num_heads, head_dim)
        self.dropout = dropout
        self.query = nn.Linear(dim, num_heads * self.head_dim, bias=bias, **factory)
        self.key = nn.Linear(dim, num_kv_heads * self.head_dim, bias=bias, **factory)
        self.value = nn.Linear(dim, num_kv_heads * self.head_dim, bias=bias, **factory)
        self.out = nn.Linear(num_heads * self.head_dim, dim, bias=bias, **factory)
        if key_projection is None:
            if max_length is None:
                raise ValueError("max_length must be given where key_projection is not")
            if value_projection is not None:
                raise ValueError("value_projection must be given together with key_projection, got it alone")
            heads = num_kv_heads if share == "none" else 1
            key_projection = LengthProjection(
                max_length, rank, heads=heads, kind=projection, device=device, dtype=dtype
            )
            if share != "key_value":
                value_projection = LengthProjection(
                    max_length, rank, heads=heads, kind=projection, device=device, dtype=dtype
                )
        self.key_projection = key_projection
        self.value_projection = key_projection if value_projection is None else value_projection
        self._check_projections()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform projections of the tokens with zero bias; E and F reset themselves, as they may be
        shared."""
        start_projections(self.query, self.key, self.value, self.out)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        key = query if key is None else key
        value = key if value is None else value
        self._check(query, key, value, key_mask, is_causal)
        k, v = self._keys_and_values(key, value, key_mask)
        # Linear columns lack only where there is no key at all: then all are zero, and so is what they give.
        linear = self.key_projection.kind == "linear"
        heads = low_rank_attention(
            self._queries(query),
            k,
            v,
            key_mask=None if linear or key_mask is None else self.key_projection.column_mask(key_mask),
            dropout=self.dropout if self.training else 0.0,
        )
        return self.out(join_heads(heads))

    def weights(
        self,
        query: Tensor,
        key: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """The weight that each value receives, P F, (B, H, Lq, Lk). The rows need not sum to one.

        Time O(H Lq Lk k).

        Raises:
            ValueError: as forward, or the values are projected by their maximum, of which none has a weight.
        """
        key = query if key is None else key
        self._check(query, key, key, key_mask, is_causal)
        matrix = self.value_projection.matrix(
            key.shape[1], key_mask=key_mask, device=query.device, dtype=query.dtype
        )
        columns = self.column_weights(query, key, key_mask=key_mask)
        if matrix.shape[1] > 1:
            matrix = matrix.repeat_interleave(self.num_heads // matrix.shape[1], dim=1)
        return columns @ matrix.to(columns.dtype)

    def column_weights(
        self,
        query: Tensor,
        key: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """The softmax P over the columns, (B, H, Lq, k'): each row sums to one, or to zero with no key."""
        key = query if key is None else key
        self._check(query, key, key, key_mask, is_causal)
        mixed = self._mixed(self.key_projection, key, key_mask)
        k = self._projected(self.key, self.key_projection, key, key_mask, mixed)
        taken = None if key_mask is None else self.key_projection.column_mask(key_mask)[:, None, None]
        return attention_weights(self._queries(query), k, mask=taken)

    def extra_repr(self) -> str:
        heads = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"
        return f"dim={self.dim}, {heads}, dropout={self.dropout}"

    def _queries(self, query: Tensor) -> Tensor:
        return split_heads(self.query(query), self.num_heads)

    def _keys_and_values(self, key: Tensor, value: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        mixed = self._mixed(self.key_projection, key, key_mask)
        k = self._projected(self.key, self.key_projection, key, key_mask, mixed)
        if value is not key or self.value_projection is not self.key_projection:
            mixed = self._mixed(self.value_projection, value, key_mask)
        return k, self._projected(self.value, self.value_projection, value, key_mask, mixed)

    def _mixed(
        self, projection: LengthProjection, tokens: Tensor, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """The columns of the tokens themselves, (B, k', C), and of ones, (B, k', 1), where this is cheaper.

        A matrix over the length that the heads share passes by the projection W, b over the channels:
        E (X W + 1 b) = (E X) W + (E 1) b, where W then meets k' columns in place of all tokens.
        """
        length = tokens.shape[1]
        if not projection.is_linear or projection.heads > 1:
            return None
        # Whatever a user has put in place of a projection (an adapter, a quantised layer) is called.
        if type(self.key) is not nn.Linear or type(self.value) is not nn.Linear:
            return None
        # Compiled, the branch would pin the length.
        if not torch.compiler.is_compiling() and length < projection.columns(length):
            return None
        ones = tokens.new_ones(1 if key_mask is None else len(tokens), 1, length, 1)
        columns = projection(tokens.unsqueeze(1), key_mask=key_mask).squeeze(1)
        return columns, projection(ones, key_mask=key_mask).squeeze(1)

    def _projected(
        self,
        linear: nn.Linear,
        projection: LengthProjection,
        tokens: Tensor,
        key_mask: Tensor | None,
        mixed: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """E K or F V, (B, G, k', D), from the tokens or from what `_mixed` has made of them."""
        if mixed is None:
            heads = split_heads(linear(tokens), projection.heads)
            columns = projection(heads, key_mask=key_mask)
        else:
            columns = F.linear(mixed[0], linear.weight)
            if linear.bias is not None:
                columns = columns + (mixed[1] * linear.bias).to(columns.dtype)
            columns = columns.unsqueeze(1)
        return rearrange(columns, "b h k (g d) -> b (h g) k d", d=self.head_dim)

    def _check_projections(self) -> None:
        ours, theirs = self.key_projection, self.value_projection
        for name, projection in ("key_projection", ours), ("value_projection", theirs):
            if projection.heads not in (1, self.num_kv_heads):
                raise ValueError(
                    f"{name} must have 1 or num_kv_heads={self.num_kv_heads} heads, got {projection.heads}"
                )
        alike = (ours.max_length, ours.rank) == (theirs.max_length, theirs.rank)
        if not alike or (ours.kind == "linear") != (theirs.kind == "linear"):
            raise ValueError(
                "key_projection and value_projection must give the same columns, got "
                f"{ours.extra_repr()} and {theirs.extra_repr()}"
            )

    def _check(
        self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, is_causal: bool
    ) -> None:
        if is_causal:
            raise ValueError(
                "is_causal must be False: each column mixes all places of the sequence, later ones too, so "
                "that no mask over the columns hides the future; take an attention that has a causal form"
            )
        longest = self.key_projection.max_length
        if key.ndim != 3 or value.ndim != 3 or key.shape[:2] != value.shape[:2] or len(key) != len(query):
            raise ValueError(
                "expected query (B, Lq, C), key (B, Lk, C) and value (B, Lk, C), got "
                f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
            )
        if key.shape[1] > longest:
            raise ValueError(f"key must have at most max_length={longest} tokens, got {key.shape[1]}")
        check_key_mask(key_mask, (key.shape[0], key.shape[1]))
