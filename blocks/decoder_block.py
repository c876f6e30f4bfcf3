"""The Transformer's decoder block (Vaswani et al., 2017), pre- or post-norm, on any attention."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..layers import DropPath, FeedForward, KeyValueCache, MultiHeadAttention
from .parts import Part, attend, made


@dataclass
class DecoderBlockCache:
    """What one decoder block keeps between steps: its own tokens' keys and values, and the memory's.

    Args:
        self_attention: over the tokens so far, (B, H, L, D).
        cross_attention: over the memory, (B, H, Lk, D), filled at the first step.

    Source:
        Vaswani et al., whose decoder it serves; see `KeyValueCache`.

    Example:
        >>> block, memory = DecoderBlock(8, num_heads=2).eval(), torch.randn(1, 3, 8)
        >>> tokens, cache = torch.randn(1, 4, 8), DecoderBlockCache()
        >>> steps = [block(tokens[:, i : i + 1], memory, is_causal=True, cache=cache) for i in range(4)]
        >>> torch.allclose(torch.cat(steps, 1), block(tokens, memory, is_causal=True), atol=1e-5)
        True
    """

    self_attention: KeyValueCache = field(default_factory=KeyValueCache)
    cross_attention: KeyValueCache = field(default_factory=KeyValueCache)

    def reorder(self, rows: Tensor) -> None:
        """Keeps the batch rows at the indices `rows`, in that order: a beam search's step."""
        self.self_attention.reorder(rows)
        self.cross_attention.reorder(rows)


class DecoderBlock(nn.Module):
    """Self-attention over the tokens so far, cross-attention to a memory, then a feed-forward network.

    .. math:: x \\leftarrow x + \\operatorname{self}(x), \\quad
              x \\leftarrow x + \\operatorname{cross}(x, m), \\quad
              x \\leftarrow x + \\operatorname{ffn}(x)

    each with a norm before (`norm_first`) or after. It is causal only where `is_causal` is given: DETR's
        decoder,
    whose queries see each other, is this block too.

    Args:
        dim: C.
        num_heads: H of both attentions.
        attention: makes the self-attention, called `attention(dim, num_heads, device=, dtype=)`, or a module.
        cross_attention: makes the attention to the memory, called in the same way, or a module.
        feed_forward: makes the network, called `feed_forward(dim, dropout=, device=, dtype=)`, or a module.
        norm: makes a norm, called `norm(dim, device=, dtype=)`.
        norm_first: pre-norm where True, post-norm (the paper's) where False.
        dropout: probability with which a channel of a branch is dropped in training.
        drop_path: probability with which a sample skips a branch in training.

    Shape:
        - x: (B, Lq, C)
        - memory: (B, Lk, C), or of the size that the cross-attention takes
        - key_mask: (B, Lq) of bool, True where a token takes part; with a cache over all tokens so far
        - memory_key_mask: (B, Lk) of bool, True where a place of the memory takes part
        - mask, bias: of the self-attention; memory_mask: bool, broadcastable to (B, H, Lq, Lk), of the
          cross-attention
        - output: (B, Lq, C)

    Reference:
        Vaswani et al. Attention Is All You Need. NIPS 2017. Section 3.1.

    Example:
        >>> block = DecoderBlock(32, num_heads=4)
        >>> block(torch.randn(2, 5, 32), torch.randn(2, 7, 32), is_causal=True).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        attention: Part = MultiHeadAttention,
        cross_attention: Part = MultiHeadAttention,
        feed_forward: Part = FeedForward,
        norm: Callable[..., nn.Module] = nn.LayerNorm,
        norm_first: bool = True,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.attention_norm = norm(dim, device=device, dtype=dtype)
        self.attention = made(attention, dim, num_heads, device=device, dtype=dtype)
        self.cross_attention_norm = norm(dim, device=device, dtype=dtype)
        self.cross_attention = made(cross_attention, dim, num_heads, device=device, dtype=dtype)
        self.feed_forward_norm = norm(dim, device=device, dtype=dtype)
        self.feed_forward = made(feed_forward, dim, dropout=dropout, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        *,
        key_mask: Tensor | None = None,
        memory_key_mask: Tensor | None = None,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
        cache: DecoderBlockCache | None = None,
    ) -> Tensor:
        """The block's output, (B, Lq, C). Shapes as above.

        With a `cache`, x holds the new tokens alone, and the memory is projected at the first step only.
        """

        def attention(tokens: Tensor) -> Tensor:
            kept = None if cache is None else cache.self_attention
            out = attend(
                self.attention,
                tokens,
                key_mask=key_mask,
                mask=mask,
                bias=bias,
                is_causal=is_causal,
                cache=kept,
            )
            return self.dropout(out)

        def cross_attention(tokens: Tensor) -> Tensor:
            kept = None if cache is None else cache.cross_attention
            out = attend(
                self.cross_attention, tokens, memory, key_mask=memory_key_mask, mask=memory_mask, cache=kept
            )
            return self.dropout(out)

        for norm, branch in (
            (self.attention_norm, attention),
            (self.cross_attention_norm, cross_attention),
            (self.feed_forward_norm, self.feed_forward),
        ):
            if self.norm_first:
                x = x + self.drop_path(branch(norm(x)))
            else:
                x = norm(x + self.drop_path(branch(x)))
        return x
