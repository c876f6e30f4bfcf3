"""Attention in windows of neighbouring tokens."""

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.checks import check_dropout
from ..kernels.dot_product_attention import attention_weights, dot_product_attention
from ..kernels.local_attention import local_attention, local_mask
from ._heads import head_size, join_heads, split_heads, start_projections
from .key_value_cache import KeyValueCache, check_cached
from .masking import attention_mask


class LocalAttention(nn.Module):
    """Self-attention within chunks of the sequence and the chunks beside them.

    .. math:: o_i = \\sum_{j \\in N_i} \\operatorname{softmax}_j \\left(
              \\frac{q_i \\cdot k_j}{\\sqrt D} \\right) v_j, \\qquad
              N_i = \\{ j : -b \\le \\lfloor j / w \\rfloor - \\lfloor i / w \\rfloor \\le a \\}

    in several heads, with w = window, b = look_back, a = look_ahead. A token sees at least its own chunk, and
    how far beyond that reaches depends on where in its chunk it stands; a band of fixed width is
    `MultiHeadAttention` with `window_mask`, which costs O(L²).

    Reformer alternates it with LSH attention. Hugging Face's `LocalSelfAttention` joins the ends into a ring:
    the first chunk looks back at the last unless it is causal, and the last ahead at the first even then. It
    needs whole chunks, and leaves the output projection to another module. The package local-attention lets
    the places that it pads with take part, unless it is given a mask; here they never do.
    Time O(L C² + L w (b + 1 + a) C), memory O(L w (b + 1 + a) H) at most: no length by length matrix.

    Args:
        dim: C, size of a token.
        num_heads: H.
        head_dim: D; dim / num_heads where it is not given.
        window: w, how many tokens a chunk holds.
        look_back: how many chunks before its own a token sees.
        look_ahead: how many chunks behind its own; nothing of them where `is_causal`.
        bias: whether the four projections have one.
        dropout: probability with which an attention weight is dropped in training.
        rotary: turns (B, H, L, D) by position, e.g. `RotaryPositions(head_dim)`.

    Shape:
        - query: (B, L, dim), of any length
        - key_mask: (B, L) of bool, True where a key takes part
        - output: (B, L, dim); a query with no key gives the bias of the output projection alone

    Raises:
        ValueError: `num_heads` does not divide `dim`, a size is not positive, a mask does not fit; a `cache`
            comes without `is_causal`, or with a `key_mask`.

    Reference:
        Kitaev, Kaiser, Levskaya. Reformer: The Efficient Transformer. ICLR 2020 (its local layers).

    Example:
        >>> attention = LocalAttention(32, num_heads=4, window=16)
        >>> attention(torch.randn(2, 100, 32), is_causal=True).shape
        torch.Size([2, 100, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        head_dim: int | None = None,
        window: int = 64,
        look_back: int = 1,
        look_ahead: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
        rotary: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if window < 1 or min(look_back, look_ahead) < 0:
            raise ValueError(
                "window must be positive, look_back and look_ahead not negative, got "
                f"{window=}, {look_back=} and {look_ahead=}"
            )
        check_dropout(dropout)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.num_heads = dim, num_heads
        self.head_dim = head_size(dim, num_heads, head_dim)
        self.window, self.look_back, self.look_ahead = window, look_back, look_ahead
        self.dropout = dropout
        self.query = nn.Linear(dim, num_heads * self.head_dim, bias=bias, **factory)
        self.key = nn.Linear(dim, num_heads * self.head_dim, bias=bias, **factory)
        self.value = nn.Linear(dim, num_heads * self.head_dim, bias=bias, **factory)
        self.out = nn.Linear(num_heads * self.head_dim, dim, bias=bias, **factory)
        self.rotary = rotary
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform projections with zero bias, as `MultiHeadAttention`."""
        start_projections(self.query, self.key, self.value, self.out)

    def forward(
        self,
        query: Tensor,
        *,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """The output, (B, L, dim). Shapes as above; with a `cache`, `query` holds the new tokens alone."""
        if cache is not None:
            check_cached(key_mask, is_causal)
        before = 0 if cache is None else cache.length
        q, k = self._turned(self.query(query), before), self._turned(self.key(query), before)
        v = split_heads(self.value(query), self.num_heads)
        if cache is not None:
            k, v = cache.update(k, v)
        if before:
            return self.out(join_heads(self._among_kept(q, k, v, before)))
        heads = local_attention(
            q,
            k,
            v,
            window=self.window,
            look_back=self.look_back,
            look_ahead=self.look_ahead,
            key_mask=key_mask,
            is_causal=is_causal,
            dropout=self.dropout if self.training else 0.0,
        )
        return self.out(join_heads(heads))

    def weights(self, query: Tensor, *, key_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """The attention weights, dense, (B, H, L, L): each row sums to one, or to zero with no key."""
        batch, length = query.shape[:2]
        seen = local_mask(length, self.window, self.look_back, self.look_ahead, query.device)
        mask = attention_mask(key_mask, seen, (batch, self.num_heads, length, length))
        return attention_weights(
            self._turned(self.query(query)), self._turned(self.key(query)), mask=mask, is_causal=is_causal
        )

    def _among_kept(self, query: Tensor, key: Tensor, value: Tensor, before: int) -> Tensor:
        """Of queries that follow `before` tokens, given all keys and values."""
        length, device = key.shape[2], query.device
        first = max(0, before // self.window - self.look_back) * self.window
        mask = local_mask(length - first, self.window, self.look_back, 0, device)[before - first :]
        return dot_product_attention(
            query,
            key[:, :, first:],
            value[:, :, first:],
            mask=mask if length - before > 1 else None,  # one token sees all of these
            is_causal=True,
            dropout=self.dropout if self.training else 0.0,
        )

    def _turned(self, tokens: Tensor, offset: int = 0) -> Tensor:
        heads = split_heads(tokens, self.num_heads)
        if self.rotary is None:
            return heads
        turned: Tensor = self.rotary(heads, offset=offset) if offset else self.rotary(heads)
        return turned

    def extra_repr(self) -> str:
        reach = f"window={self.window}, look_back={self.look_back}, look_ahead={self.look_ahead}"
        return f"dim={self.dim}, num_heads={self.num_heads}, {reach}, dropout={self.dropout}"
