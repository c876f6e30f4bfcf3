"""Attention among tokens of like hash (Kitaev et al., 2020)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels._lsh_last import attend_last
from ..kernels._lsh_rounds import Options
from ..kernels.checks import check_dropout
from ..kernels.lsh_attention import lsh_attention, lsh_attention_weights
from ..kernels.lsh_buckets import lsh_buckets
from ._choices import choice
from ._heads import head_size, join_heads, split_heads, start_projections
from .key_value_cache import KeyValueCache, check_cached


class LSHAttention(nn.Module):
    """Reformer's self-attention: a token sees those that several rounds of hashing put beside it.

    .. math:: o_i = \\sum_{(r, j) \\in V_i} \\operatorname{softmax}_{(r, j)} \\left(
              q_i \\cdot \\frac{q_j}{\\lVert q_j \\rVert} \\right) v_j, \\qquad
              h_r(q) = \\operatorname{argmax} \\, [q R_r; -q R_r]

    Queries and keys are one projection. Each round r hashes them by random rotations, sorts them by bucket
    and position, and cuts the order into chunks; V_i holds the other tokens in the chunk of token i and in
    the one before it, round by round. A token attends to itself only where it sees no other. One chunk that
    holds all tokens is plain shared-QK attention, exactly; so is any input that is no longer than a chunk.

    The rotations are a function of the seed, which is in the state dict, and of head, round and column: two
    calls give the same, `num_hashes` may be raised after training (the first rounds stay), and the caller's
    random stream is not touched. Give stacked layers different seeds. The original draws rotations anew in
    each pass: `redraw` does so in training, from the global stream as dropout does, so that `Reversible`
    hashes the same again; or give a forward a `generator`.

    It differs from the paper where the original's code does (a token also sees other buckets in its chunks,
    and a pair that meets in several rounds counts as often): `same_bucket` and `deduplicate` are the paper's
    text. From the original, Hugging Face's `LSHSelfAttention` and reformer-pytorch's, all of which let the
    first chunk of a round look back at the last of the round before, so that padding has an influence: here
    it has nothing before it, unless `circular`. The token itself is left out exactly, where their large
    negative score costs float32 up to 0.75 % of a row. reformer-pytorch divides scores by the root of D once
    more (`scale=head_dim**-0.5`) and draws other rotations in every call, also in evaluation; Hugging Face
    reseeds the global stream.

    `is_causal` keeps every value and gradient from reaching back. Where the chunks end depends on the hashes
    of all tokens, later ones too, as in every implementation. So a step of decoding, with a `cache`, gives
    the new token what the whole pass gives it, but cannot mend what earlier ones were given: stacked layers
    decode as the whole pass only where no layer stands above a hashed one.

    With w = chunk_size (look_back + 1 + look_ahead), time is O(L C² + H R L D (w + num_buckets / 2)), memory
    O(H R L (w + D)) in training and O(H L (w + R D)) in evaluation.

    Args:
        dim: C, size of a token.
        num_heads: H.
        head_dim: D; dim / num_heads where it is not given.
        chunk_size: how many tokens a chunk holds.
        num_hashes: R, rounds of hashing; the paper has 1 to 8.
        num_buckets: of a round: even, or 1, or a pair whose product it is, which is cheaper to hash where
            there are many. Twice the number of chunks where it is not given, and so dependent on L: for
            outputs that do not depend on how far a batch is padded, give it.
        look_back: how many chunks before its own a token sees.
        look_ahead: how many chunks behind its own.
        circular: all rounds' chunks form one ring, as in the original.
        same_bucket: a token sees only its own bucket.
        deduplicate: a pair that meets in several rounds counts once; costs R comparisons of each pair.
        scale: of the scores, 1 where it is not given.
        bias: whether the three projections have one.
        dropout: probability with which an attention weight is dropped in training.
        redraw: every forward in training has rotations of its own; evaluation has the seed's.
        seed: of the rotations.

    Shape:
        - query: (B, L, dim)
        - key_mask: (B, L) of bool, True where a token takes part; where it does not, a token sees nothing, is
          not seen, and moves no other token's chunk
        - output: (B, L, dim); a token that does not take part gives the bias of the output projection, if any

    Raises:
        ValueError: `num_heads` does not divide `dim`, a size is not positive, a number of buckets is odd; a
            `cache` comes without `is_causal`, or with a `key_mask`.

    Reference:
        Kitaev, Kaiser, Levskaya. Reformer: The Efficient Transformer. ICLR 2020. Section 2.

    Example:
        >>> attention = LSHAttention(32, num_heads=4, chunk_size=16, num_hashes=2)
        >>> attention(torch.randn(2, 100, 32), is_causal=True).shape
        torch.Size([2, 100, 32])
    """

    hash_seed: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        head_dim: int | None = None,
        chunk_size: int = 64,
        num_hashes: int = 4,
        num_buckets: int | Sequence[int] | None = None,
        look_back: int = 1,
        look_ahead: int = 0,
        circular: bool = False,
        same_bucket: bool = False,
        deduplicate: bool = False,
        scale: float | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        redraw: bool = False,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(chunk_size, num_hashes) < 1 or min(look_back, look_ahead) < 0:
            raise ValueError(
                "chunk_size and num_hashes must be positive, look_back and look_ahead not negative, got "
                f"{chunk_size=}, {num_hashes=}, {look_back=} and {look_ahead=}"
            )
        factors = [] if num_buckets is None else _factors(num_buckets)
        if any(n < 1 or (n % 2 and n != 1) for n in factors):
            raise ValueError(f"num_buckets must be even, or 1, or a pair of such, got {num_buckets}")
        check_dropout(dropout)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.num_heads = dim, num_heads
        self.head_dim = head_size(dim, num_heads, head_dim)
        self.chunk_size, self.num_hashes, self.num_buckets = chunk_size, num_hashes, num_buckets
        self.look_back, self.look_ahead, self.circular = look_back, look_ahead, circular
        self.same_bucket, self.deduplicate = same_bucket, deduplicate
        self.scale = 1.0 if scale is None else scale
        self.dropout = dropout
        self.redraw, self.seed = redraw, seed
        self.query_key = nn.Linear(dim, num_heads * self.head_dim, bias=bias, **factory)
        self.value = nn.Linear(dim, num_heads * self.head_dim, bias=bias, **factory)
        self.out = nn.Linear(num_heads * self.head_dim, dim, bias=bias, **factory)
        self.register_buffer("hash_seed", torch.empty((), dtype=torch.int64, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform projections with zero bias, as in the original; the seed as it was given."""
        start_projections(self.query_key, self.value, self.out)
        self.hash_seed.fill_(self.seed)

    def forward(
        self,
        query: Tensor,
        *,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
        generator: torch.Generator | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """The output, (B, L, dim). Shapes as above; `generator` draws other rotations than the seed's.

        With a `cache`, `query` holds the new tokens alone, and they get what the last ones of a pass over all
        tokens would. What an earlier token would get in that pass may be another thing than it got.
        """
        if cache is not None:
            check_cached(key_mask, is_causal)
        query_key = split_heads(self.query_key(query), self.num_heads)
        value = split_heads(self.value(query), self.num_heads)
        new, dropout = query.shape[1], self.dropout if self.training else 0.0
        if cache is not None:
            query_key, value = cache.update(query_key, value)
        buckets, options = self._hash(query_key, generator, redraw=self.redraw and self.training)
        if cache is not None and new == 1 and not dropout:
            heads = attend_last(query_key, value, buckets, Options(**options, is_causal=True))
        else:
            heads = lsh_attention(
                query_key, value, buckets, **options, key_mask=key_mask, is_causal=is_causal, dropout=dropout
            )[:, :, -new:]
        return self.out(join_heads(heads))

    def weights(self, query: Tensor, *, key_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """The attention weights of all rounds, dense, (B, H, L, L), with the rotations of the seed.

        Each row sums to one, or to zero where `key_mask` is False.
        """
        query_key = split_heads(self.query_key(query), self.num_heads)
        buckets, options = self._hash(query_key, None)
        return lsh_attention_weights(query_key, buckets, **options, key_mask=key_mask, is_causal=is_causal)

    def _hash(
        self, query_key: Tensor, generator: torch.Generator | None, *, redraw: bool = False
    ) -> tuple[Tensor, dict[str, Any]]:
        """The tokens' buckets, (B, H, R, L), and what the operation is told besides."""
        chunks = (query_key.shape[2] + self.chunk_size - 1) // self.chunk_size
        factors = [2 * max(chunks, 1)] if self.num_buckets is None else _factors(self.num_buckets)
        shape = (self.num_heads, self.head_dim, self.num_hashes, sum(n // 2 for n in factors))
        drawn = None
        if generator is not None:
            drawn = torch.randn(shape, generator=generator, device=generator.device)
        elif redraw:  # in a second run as well, as what is drawn behind it must be the same
            drawn = torch.randn(shape, device=query_key.device)
        num_buckets = math.prod(factors)
        narrow = torch.int16 if num_buckets <= torch.iinfo(torch.int16).max else torch.int32

        def hashed() -> Tensor:
            rotations = seeded_normals(self.hash_seed, shape) if drawn is None else drawn
            return lsh_buckets(query_key, rotations.to(query_key.device), num_buckets=factors)

        return choice(hashed, narrow).long(), {
            "num_buckets": num_buckets,
            "chunk_size": self.chunk_size,
            "look_back": self.look_back,
            "look_ahead": self.look_ahead,
            "circular": self.circular,
            "same_bucket": self.same_bucket,
            "deduplicate": self.deduplicate,
            "scale": self.scale,
        }

    def extra_repr(self) -> str:
        chunks = f"chunk_size={self.chunk_size}, num_hashes={self.num_hashes}, num_buckets={self.num_buckets}"
        return f"dim={self.dim}, num_heads={self.num_heads}, {chunks}, dropout={self.dropout}"


def seeded_normals(seed: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normals in float32 that are a function of the seed and of each entry's indices alone.

    A smaller shape gives a part of a larger one's. It is counted, not drawn: no random stream is touched, any
    device gives the same to rounding, and a compiled graph holds it.
    """
    bits = _mixed(seed ^ _mixed(seed >> 32))
    for axis, size in enumerate(shape):
        index = torch.arange(size, device=seed.device).view(-1, *[1] * (len(shape) - 1 - axis))
        bits = _mixed(bits + 0x1E3779B9 * (index + 1))
    uniform = ((bits >> 9).to(torch.float32) + 0.5) * 2.0**-22 - 1  # in (-1, 1), exactly
    return math.sqrt(2) * uniform.erfinv()


def _mixed(bits: Tensor) -> Tensor:
    """Thirty-two well mixed bits of int64: multipliers below 2**31 keep every product within 63 bits."""
    bits = bits & 0xFFFFFFFF
    for shift, multiplier in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        bits = ((bits ^ (bits >> shift)) * multiplier) & 0xFFFFFFFF
    return bits ^ (bits >> 15)


def _factors(num_buckets: int | Sequence[int]) -> list[int]:
    return [num_buckets] if isinstance(num_buckets, int) else list(num_buckets)
