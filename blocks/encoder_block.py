"""The Transformer's encoder block (Vaswani et al., 2017), pre- or post-norm, on any attention."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..layers import DropPath, FeedForward, KeyValueCache, MultiHeadAttention, Packing
from .parts import Part, attend, made


class EncoderBlock(nn.Module):
    """Self-attention, then a feed-forward network on each token, each added to what came in.

    .. math:: \\text{pre-norm: } x \\leftarrow x + f(\\operatorname{norm}(x)), \\qquad
              \\text{post-norm: } x \\leftarrow \\operatorname{norm}(x + f(x))

    The paper's block is post-norm (`norm_first=False`); pre-norm is what ViT and all deep stacks since use.
    Dropout stands after the attention and inside and after the feed-forward network, as in the paper.

    Args:
        dim: C.
        num_heads: H of the attention.
        attention: makes the attention, called `attention(dim, num_heads, device=, dtype=)`, or a module that
            is taken as it is. Options go in by `functools.partial(MultiHeadAttention, dropout=0.1)`.
        feed_forward: makes the network, called `feed_forward(dim, dropout=, device=, dtype=)`, or a module.
        norm: makes a norm, called `norm(dim, device=, dtype=)`.
        norm_first: pre-norm where True, post-norm where False.
        dropout: probability with which a channel of either branch is dropped in training.
        drop_path: probability with which a sample skips a branch in training.

    Shape:
        - x: (B, L, C)
        - key_mask: (B, L) of bool, True where a token takes part
        - mask, bias, is_causal: what the attention takes, see `MultiHeadAttention`
        - output: (B, L, C)
        - packed: x and output (N, C)

    Raises:
        TypeError: the attention does not take what is given, for example a `packing`.

    Reference:
        Vaswani et al. Attention Is All You Need. NIPS 2017. Section 3.1.
        Xiong et al. On Layer Normalization in the Transformer Architecture. ICML 2020 (pre-norm).

    Example:
        >>> block = EncoderBlock(32, num_heads=4)
        >>> block(torch.randn(2, 5, 32)).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        attention: Part = MultiHeadAttention,
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
        self.feed_forward_norm = norm(dim, device=device, dtype=dtype)
        self.feed_forward = made(feed_forward, dim, dropout=dropout, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
        cache: KeyValueCache | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """The block's output, (B, L, C). Shapes as above.

        `cache` is the attention's, to decode by steps; `packing` tells where the sequences of packed tokens
        stand.
        """

        def attention(tokens: Tensor) -> Tensor:
            return self.dropout(
                attend(
                    self.attention,
                    tokens,
                    key_mask=key_mask,
                    mask=mask,
                    bias=bias,
                    is_causal=is_causal,
                    cache=cache,
                    packing=packing,
                )
            )

        def drop_path(branch: Tensor) -> Tensor:
            out: Tensor = self.drop_path(branch, packing=packing)
            return out

        if self.norm_first:
            x = x + drop_path(attention(self.attention_norm(x)))
            return x + drop_path(self.feed_forward(self.feed_forward_norm(x)))
        x = self.attention_norm(x + drop_path(attention(x)))
        out: Tensor = self.feed_forward_norm(x + drop_path(self.feed_forward(x)))
        return out
