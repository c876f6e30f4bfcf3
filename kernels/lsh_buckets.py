"""Angular hashing: like directions fall into one bucket (Reformer: Kitaev et al., 2020, section 2).

    bucket[r, i] = argmax([x[i] R[r]; -x[i] R[r]])

The definition is a matrix product, and the maximum and minimum of its rows. The kernel takes the maximum of
a tile of products where they come up, and writes none of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._autocast import no_autocast
from .backend import Refusals, choose, operation, triton_refusal

TURNED = 2**19  # numbers that a CPU hashes at a time, 2 MB of them


def _refusals(query_key: Tensor, rotations: Tensor, **options: Any) -> Refusals:
    refusals: Refusals = {"torch": "PyTorch has no routine for it: the definition is its fastest expression"}
    if (reason := triton_refusal(query_key, rotations)) is not None:
        refusals["triton"] = reason
    elif query_key.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        refusals["triton"] = f"the kernel has no {query_key.dtype}"
    elif query_key.shape[-1] > 256:
        refusals["triton"] = f"heads are at most 256 wide in the kernel, these {query_key.shape[-1]}"
    return refusals


@operation(_refusals)
def lsh_buckets(query_key: Tensor, rotations: Tensor, *, num_buckets: int | Sequence[int]) -> Tensor:
    """The bucket of every token in every round, by angular hashing: argmax of [xR; -xR].

    Time O(R L D n / 2) for n buckets; memory O(R L n) in the definition, O(R L) in the kernel. With a pair
    (n1, n2) there are n1 n2 buckets for the price of n1 + n2. Buckets take no gradient. Each path is
    deterministic; where two directions are equally near to the last bit of a float32, paths may differ.

    Args:
        query_key: (B, H, L, D); only its direction matters.
        rotations: (H, D, R, n / 2) or (1, D, R, n / 2) with normal entries; n1 / 2 + n2 / 2 columns for a
            pair. It is hashed in float32 at the least.
        num_buckets: n, even, or 1, or a pair of such.

    Returns:
        (B, H, R, L) of int64, in [0, n): h1 + n1 h2 for a pair.

    Raises:
        ValueError: a number of buckets is neither even nor 1, or the shapes do not fit.

    Reference:
        Kitaev, Kaiser, Levskaya. Reformer: The Efficient Transformer. ICLR 2020. Section 2.
        Andoni et al. Practical and Optimal LSH for Angular Distance. NIPS 2015.

    Example:
        >>> lsh_buckets(torch.randn(2, 3, 100, 8), torch.randn(3, 8, 4, 5), num_buckets=10).shape
        torch.Size([2, 3, 4, 100])
    """
    factors = [num_buckets] if isinstance(num_buckets, int) else list(num_buckets)
    if any(n < 1 or (n % 2 and n != 1) for n in factors):
        raise ValueError(f"num_buckets must be even, or 1, got {num_buckets}")
    halves = [n // 2 for n in factors]
    (heads, dim), columns = (query_key.shape[1], query_key.shape[3]), rotations.shape[-1]
    if rotations.shape[0] not in (1, heads) or rotations.shape[1] != dim or columns != sum(halves):
        raise ValueError(
            f"rotations must be ({heads}, {dim}, R, {sum(halves)}) for {num_buckets} buckets, "
            f"got {tuple(rotations.shape)}"
        )
    precise = torch.promote_types(query_key.dtype, torch.float32)
    path = choose("lsh_buckets", _refusals(query_key, rotations))
    with torch.no_grad(), no_autocast(query_key.device.type):
        if path == "triton":
            from .fused.lsh_buckets import lsh_buckets as fused

            return fused(query_key.detach(), rotations.detach().to(precise), factors)
        return lsh_buckets_reference(query_key.to(precise), rotations.to(precise), factors)


def lsh_buckets_reference(query_key: Tensor, rotations: Tensor, factors: Sequence[int]) -> Tensor:
    """The definition, in PyTorch: what the kernel is tested against, and the path on a CPU."""
    batch, heads, length, _ = query_key.shape
    rounds, columns = rotations.shape[-2:]
    at_once = max(length, 1)
    if query_key.is_cpu and not torch.compiler.is_compiling():
        # A few tokens, as memory in one large piece is asked of the system, page by page, at each call.
        at_once = max(1, TURNED // max(1, batch * heads * rounds * columns))
    found = []
    for tokens in query_key.split(at_once, dim=2):
        turned = (tokens @ rotations.flatten(2)).view(*tokens.shape[:3], rounds, columns)
        buckets = torch.zeros(turned.shape[:-1], dtype=torch.int64, device=turned.device)
        stride = 1
        for n, part in zip(factors, turned.split([n // 2 for n in factors], dim=-1), strict=True):
            if n > 1:
                buckets = buckets + stride * _largest(part)
                stride = stride * n
        found.append(buckets)
    return torch.cat(found, 2).transpose(2, 3).contiguous()


def _largest(x: Tensor) -> Tensor:
    """Where in [x, -x] the largest stands, the first of equal ones.

    By comparing all with it: a `max` that tells the place goes through one number at a time on a CPU.
    """
    half = x.shape[-1]
    top = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))
    from_behind = torch.arange(half, 0, -1, dtype=x.dtype, device=x.device)
    found = torch.eq(x, top, out=torch.empty_like(x)).mul_(from_behind + half)
    found = torch.maximum(found, torch.eq(x, -top, out=torch.empty_like(x)).mul_(from_behind), out=found)
    # Where all are 0 they count twice, and where one is NaN nothing is equal.
    return (2 * half - found.amax(-1)).long().clamp_(0, 2 * half - 1)
