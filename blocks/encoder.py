"""Stacks of blocks: the Transformer's encoder and decoder (Vaswani et al., 2017)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..layers import KeyValueCache, Packing
from .decoder_block import DecoderBlock, DecoderBlockCache
from .encoder_block import EncoderBlock


class Encoder(nn.Module):
    """`depth` encoder blocks, one after the other, and a norm at the end.

    The final norm belongs to pre-norm blocks, whose sums nothing else bounds; the paper's post-norm encoder
    is `Encoder(..., block=partial(EncoderBlock, norm_first=False), norm=None)`.

    Args:
        dim: C.
        depth: number of blocks.
        num_heads: H of each block's attention.
        block: makes a block, called `block(dim, num_heads, drop_path=, device=, dtype=)`; its options go in
            by `functools.partial`.
        norm: makes the final norm, called `norm(dim, device=, dtype=)`; None for none.
        drop_path: probability of the last block; it grows linearly from zero at the first.

    Shape:
        - x: (B, L, C)
        - key_mask: (B, L) of bool, True where a token takes part
        - mask, bias, is_causal: what the blocks' attention takes, see `MultiHeadAttention`
        - output: (B, L, C)
        - packed: x and output (N, C)

    Raises:
        ValueError: a cache is given that has not one entry a block.
        TypeError: the attention does not take what is given, for example a `packing`.

    Reference:
        Vaswani et al. Attention Is All You Need. NIPS 2017. Section 3.1.
        Huang et al. Deep Networks with Stochastic Depth. ECCV 2016 (the linear rule of `drop_path`).

    Example:
        >>> encoder = Encoder(32, depth=2, num_heads=4)
        >>> encoder(torch.randn(2, 5, 32)).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int = 8,
        *,
        block: Callable[..., nn.Module] = EncoderBlock,
        norm: Callable[..., nn.Module] | None = nn.LayerNorm,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.blocks = _stack(dim, depth, num_heads, block, drop_path, device, dtype)
        self.norm = nn.Identity() if norm is None else norm(dim, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
        cache: Sequence[KeyValueCache] | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """The encoded tokens, (B, L, C). Shapes as above.

        `cache` is from `make_cache`, to decode by steps; `packing` from `pack`, for tokens without padding.
        """
        _check_cache(cache, self.blocks)
        for i, block in enumerate(self.blocks):
            x = block(
                x,
                key_mask=key_mask,
                mask=mask,
                bias=bias,
                is_causal=is_causal,
                cache=None if cache is None else cache[i],
                packing=packing,
            )
        out: Tensor = self.norm(x)
        return out

    def make_cache(self) -> list[KeyValueCache]:
        """An empty cache, one entry a block, for decoding step by step."""
        return [KeyValueCache() for _ in self.blocks]


class Decoder(nn.Module):
    """`depth` decoder blocks, one after the other, all attending to the same memory, and a norm at the end.

    Args:
        dim: C.
        depth: number of blocks.
        num_heads: H of each block's attentions.
        block: makes a block, called `block(dim, num_heads, drop_path=, device=, dtype=)`.
        norm: makes the final norm, called `norm(dim, device=, dtype=)`; None for none.
        drop_path: probability of the last block; it grows linearly from zero at the first.

    Shape:
        - x: (B, Lq, C)
        - memory: (B, Lk, C)
        - key_mask: (B, Lq) of bool, True where a token takes part; with a cache over all tokens so far
        - memory_key_mask: (B, Lk) of bool, True where a place of the memory takes part
        - mask, bias, memory_mask, is_causal: see `DecoderBlock`
        - output: (B, Lq, C)

    Raises:
        ValueError: a cache is given that has not one entry a block.

    Reference:
        Vaswani et al. Attention Is All You Need. NIPS 2017. Section 3.1.

    Example:
        >>> decoder = Decoder(32, depth=2, num_heads=4)
        >>> decoder(torch.randn(2, 5, 32), torch.randn(2, 7, 32), is_causal=True).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int = 8,
        *,
        block: Callable[..., nn.Module] = DecoderBlock,
        norm: Callable[..., nn.Module] | None = nn.LayerNorm,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.blocks = _stack(dim, depth, num_heads, block, drop_path, device, dtype)
        self.norm = nn.Identity() if norm is None else norm(dim, device=device, dtype=dtype)

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
        cache: Sequence[DecoderBlockCache] | None = None,
    ) -> Tensor:
        """The decoded tokens, (B, Lq, C). Shapes as above; `cache` from `make_cache`."""
        _check_cache(cache, self.blocks)
        for i, block in enumerate(self.blocks):
            x = block(
                x,
                memory,
                key_mask=key_mask,
                memory_key_mask=memory_key_mask,
                mask=mask,
                memory_mask=memory_mask,
                bias=bias,
                is_causal=is_causal,
                cache=None if cache is None else cache[i],
            )
        out: Tensor = self.norm(x)
        return out

    def make_cache(self) -> list[DecoderBlockCache]:
        """An empty cache, one entry a block, for decoding step by step."""
        return [DecoderBlockCache() for _ in self.blocks]


def _stack(
    dim: int,
    depth: int,
    num_heads: int,
    block: Callable[..., nn.Module],
    drop_path: float,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.ModuleList:
    if isinstance(block, nn.Module):
        raise ValueError(
            "block must make a new block at each call, got a module: each of the depth needs its own"
        )
    rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
    return nn.ModuleList(block(dim, num_heads, drop_path=rate, device=device, dtype=dtype) for rate in rates)


def _check_cache(cache: Sequence[object] | None, blocks: nn.ModuleList) -> None:
    if cache is not None and len(cache) != len(blocks):
        raise ValueError(f"cache must have one entry a block, {len(blocks)}, got {len(cache)}")
