"""What attentions in heads share: the size of a head, how projections start, tokens split by heads."""

from einops import rearrange
from torch import Tensor, nn


def head_size(dim: int, num_heads: int, head_dim: int | None = None) -> int:
    """D: `head_dim`, or dim / num_heads. Raises ValueError where the heads do not divide `dim`."""
    if head_dim is not None:
        return head_dim
    if dim % num_heads:
        raise ValueError(f"num_heads must divide dim, got dim={dim} and num_heads={num_heads}")
    return dim // num_heads


def start_projections(*projections: nn.Linear) -> None:
    """Xavier-uniform weights with zero bias, as in the Transformer's original implementation."""
    for projection in projections:
        nn.init.xavier_uniform_(projection.weight)
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)


def split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """(B, L, H D) -> (B, H, L, D)."""
    return rearrange(tokens, "b l (h d) -> b h l d", h=num_heads)


def join_heads(heads: Tensor) -> Tensor:
    """(B, H, L, D) -> (B, L, H D)."""
    return rearrange(heads, "b h l d -> b l (h d)")
