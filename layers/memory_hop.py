"""One hop of an end-to-end memory network (Sukhbaatar et al., 2015)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.checks import check_mask
from ..kernels.masking import combine_masks, masked_softmax
from ._table_reads import Factors, table_scores, table_sums
from .sentence_encoding import SentenceEncoding
from .temporal_encoding import TemporalEncoding, check_ages, check_count, recency
from .token_embedding import TokenEmbedding

# Sentences are read by way of the vocabulary while it has at most this many ids for each of their words. On a
# CPU a product with the table is that much faster than copying and weighting its rows (bench_memory_hop.py).
_IDS_PER_WORD = 16


class MemoryHop(nn.Module):
    """A state reads once from memories: it attends over them and takes up what it finds.

    .. math:: p = \\operatorname{softmax}_i(u \\cdot m_i), \\qquad o = \\sum_i p_i c_i, \\qquad
              u' = f(H u + o)

    A memory is a sentence of word ids. m_i is the sum of its words' rows in the input embedding, weighted by
    `encoding` (the position encoding by default), plus its row of T_A; c_i is the same in the output
    embedding, plus T_C. f and H are the identity unless they are given. `memory_hops` makes the stacks of the
    paper; any tying is done by handing the same embedding to several hops.

    Padding words have no influence. A memory of padding alone is an empty slot, m_i = c_i = 0. It takes no
    part where `key_mask` says so; otherwise it draws exp(0) of the softmax to itself, as in the authors'
    code. The paper adds T to every memory; here an empty slot has no age and gets none.

    Where the vocabulary is small beside the words in memory, as in bAbI, forward never embeds a word:
    u · m_i is summed from the scalars u · A[w], and o from the words' total weights. It is the same sum in
    another order. Time O(C · V + M J) for a row of the batch instead of O(C · M J), and memory O(V + M J)
    instead of O(C · M J). `weights` always takes the definition. A forward hook of an embedding, or a
    subclass, or any other module in its place, is called: the definition then runs in `forward` too.

    Args:
        dim: C, channels of the state.
        vocab_size: V, of the embeddings that it makes itself.
        input_embedding: A: maps memories to (B, M, C), or word by word to (B, M, J, C).
        output_embedding: C, likewise.
        encoding: sums the words of a sentence, (words, word_mask) to sentences: `SentenceEncoding(dim)` by
            default.
        max_memories: rows of the temporal encodings that it makes itself; None for none.
        input_temporal: T_A, in place of its own.
        output_temporal: T_C, likewise.
        hidden_map: H: False for the identity, True for a linear layer without bias, or a module.
        activation: makes f.
        linear_dim: how many channels, the first ones, f leaves alone.
        padding_id: the id of padding; that of `input_embedding` where it is not given.
        std: deviation of all that it initialises, which is normal.
        device: where the parameters are.
        dtype: of the parameters.

    Shape:
        - state: (B, dim)
        - memories: (B, M, J) of ids; (B, M) for memories of one word; whatever other embeddings take
        - key_mask: (B, M) of bool, True where a memory takes part
        - ages: (B, M) of integers, 1 for the newest memory and 0 for none; by default the last memory that is
          not empty is the newest
        - output: (B, dim); without a memory that takes part, f(H u)
        - of `weights`: (B, M)

    Raises:
        ValueError: there is neither an embedding nor `vocab_size`; state, memories, mask or ages do not fit.

    Reference:
        Sukhbaatar, Szlam, Weston, Fergus. End-To-End Memory Networks. NIPS 2015. Sections 2 to 4.

    Example:
        >>> hop = MemoryHop(8, vocab_size=40, max_memories=5, padding_id=0)
        >>> story = torch.tensor([[[3, 7, 0], [5, 9, 12], [0, 0, 0]]])  # two sentences and an empty slot
        >>> hop(hop.encode(torch.tensor([[7, 2]])), story).shape
        torch.Size([1, 8])
    """

    def __init__(
        self,
        dim: int,
        *,
        vocab_size: int | None = None,
        input_embedding: nn.Module | None = None,
        output_embedding: nn.Module | None = None,
        encoding: nn.Module | None = None,
        max_memories: int | None = None,
        input_temporal: TemporalEncoding | None = None,
        output_temporal: TemporalEncoding | None = None,
        hidden_map: bool | nn.Module = False,
        activation: Callable[[], nn.Module] | None = None,
        linear_dim: int = 0,
        padding_id: int | None = None,
        std: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if padding_id is None:
            padding_id = getattr(input_embedding, "padding_id", getattr(input_embedding, "padding_idx", None))
        self.dim, self.linear_dim, self.padding_id, self.std = dim, linear_dim, padding_id, std

        def embedding() -> nn.Module:
            if vocab_size is None:
                raise ValueError("vocab_size must be given where an embedding is not")
            return TokenEmbedding(vocab_size, dim, padding_id=padding_id, std=std, device=device, dtype=dtype)

        def temporal() -> TemporalEncoding | None:
            if max_memories is None:
                return None
            return TemporalEncoding(max_memories, dim, std=std, device=device, dtype=dtype)

        self.input_embedding = embedding() if input_embedding is None else input_embedding
        self.output_embedding = embedding() if output_embedding is None else output_embedding
        self.encoding = SentenceEncoding(dim) if encoding is None else encoding
        self.input_temporal = temporal() if input_temporal is None else input_temporal
        self.output_temporal = temporal() if output_temporal is None else output_temporal
        self.hidden_map: nn.Module | None = hidden_map if isinstance(hidden_map, nn.Module) else None
        if hidden_map is True:
            self.hidden_map = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)
            self.reset_parameters()
        self.activation = None if activation is None else activation()

    def reset_parameters(self) -> None:
        """H from N(0, std²), where it is a linear layer; the embeddings start by themselves."""
        if isinstance(self.hidden_map, nn.Linear):
            nn.init.normal_(self.hidden_map.weight, std=self.std)

    def forward(
        self,
        state: Tensor,
        memories: Tensor,
        *,
        key_mask: Tensor | None = None,
        ages: Tensor | None = None,
        linear: bool = False,
    ) -> Tensor:
        """The next state, (B, dim). `linear` leaves the softmax out: the paper's linear start of training."""
        slots = self._slots(state, memories, key_mask, ages)
        if self._tables_do(memories):
            slots = slots._replace(by_tables=True, factors=self._factors(memories, slots.word_mask))
        weights = _weights(self._scores(state, memories, slots), key_mask, linear)
        kept = state if self.hidden_map is None else self.hidden_map(state)
        state = kept + self._read(weights, memories, slots)
        if self.activation is None:
            return state
        n = self.linear_dim
        return torch.cat([state[:, :n], self.activation(state[:, n:])], 1) if n else self.activation(state)

    def weights(
        self,
        state: Tensor,
        memories: Tensor,
        *,
        key_mask: Tensor | None = None,
        ages: Tensor | None = None,
        linear: bool = False,
    ) -> Tensor:
        """p, (B, M): a row sums to one, or to zero where no memory takes part. Scores where `linear`."""
        slots = self._slots(state, memories, key_mask, ages)
        return _weights(self._scores(state, memories, slots), key_mask, linear)

    def encode(self, sentences: Tensor) -> Tensor:
        """Sentences of ids (..., J) as (..., dim) in the input embedding: the question, where B = A."""
        encoded: Tensor = self.encoding(self.input_embedding(sentences), self._words(sentences))
        return encoded

    def extra_repr(self) -> str:
        return f"{self.dim}, linear_dim={self.linear_dim}, padding_id={self.padding_id}"

    def _slots(
        self, state: Tensor, memories: Tensor, key_mask: Tensor | None, ages: Tensor | None
    ) -> "_Slots":
        """Checks all that is given; the ages, where there are temporal encodings."""
        if state.ndim != 2 or state.shape[1] != self.dim:
            raise ValueError(f"state must be (B, {self.dim}), got {tuple(state.shape)}")
        if memories.ndim not in (2, 3) or memories.shape[0] != state.shape[0]:
            raise ValueError(
                f"memories must be (B, M) or (B, M, J) with B = {state.shape[0]}, got {tuple(memories.shape)}"
            )
        shape = (memories.shape[0], memories.shape[1])
        check_mask("key_mask", key_mask, shape)
        word_mask = self._words(memories)
        temporals = [t for t in (self.input_temporal, self.output_temporal) if t is not None]
        if not temporals:
            if ages is not None:
                raise ValueError("ages must be left out of a hop without temporal encodings")
            return _Slots(word_mask, None)
        if ages is None:
            for temporal in temporals:
                check_count(shape[1], temporal.max_memories)
            held = word_mask if word_mask is None or memories.ndim == 2 else word_mask.any(-1)
            held = combine_masks(key_mask, held)
            if held is None:
                held = torch.ones(shape, dtype=torch.bool, device=memories.device)
            ages = recency(held.expand(shape))
        check_ages(ages, shape)
        return _Slots(word_mask, ages)

    def _words(self, memories: Tensor) -> Tensor | None:
        """Which words are no padding."""
        if self.padding_id is None or memories.is_floating_point():
            return None
        return memories != self.padding_id

    def _scores(self, state: Tensor, memories: Tensor, slots: "_Slots") -> Tensor:
        """u · m, (B, M)."""
        if not slots.by_tables:
            keys = self._represent(self.input_embedding, memories, slots)
            scores = self._without_padding((state.unsqueeze(1) @ keys.mT).squeeze(1), memories, slots)
        else:
            table = _table(self.input_embedding)
            scores = table_scores(state, memories, table, slots.factors, skipped=self.padding_id)
        if self.input_temporal is not None and slots.ages is not None:
            scores = scores + table_scores(state, slots.ages, self.input_temporal.rows())
        return scores

    def _read(self, weights: Tensor, memories: Tensor, slots: "_Slots") -> Tensor:
        """o, (B, dim)."""
        if not slots.by_tables:
            values = self._represent(self.output_embedding, memories, slots)
            of_words = self._without_padding(weights, memories, slots)
            read = (of_words.to(values.dtype).unsqueeze(1) @ values).squeeze(1)
        else:
            table = _table(self.output_embedding)
            read = table_sums(weights, memories, table, slots.factors, skipped=self.padding_id)
        if self.output_temporal is not None and slots.ages is not None:
            read = read + table_sums(weights, slots.ages, self.output_temporal.rows())
        return read

    def _represent(self, embedding: nn.Module, memories: Tensor, slots: "_Slots") -> Tensor:
        """m or c as far as the words go, (B, M, dim)."""
        represented: Tensor = embedding(memories)
        if represented.ndim == 4:
            represented = self.encoding(represented, slots.word_mask)
        wanted = (memories.shape[0], memories.shape[1], self.dim)
        if tuple(represented.shape) != wanted:
            raise ValueError(f"memories must be embedded as {wanted}, got {tuple(represented.shape)}")
        return represented

    @staticmethod
    def _without_padding(of_memories: Tensor, memories: Tensor, slots: "_Slots") -> Tensor:
        """Where a memory is one word, no encoding has left the padding out."""
        if memories.ndim == 3 or slots.word_mask is None:
            return of_memories
        return of_memories.masked_fill(~slots.word_mask, 0.0)

    def _tables_do(self, memories: Tensor) -> bool:
        """Whether all is plain tables, and the vocabulary the shorter way."""
        ids = not memories.is_floating_point() and memories.dtype is not torch.bool
        if not ids or type(self.encoding) is not SentenceEncoding:
            return False
        for embedding in self.input_embedding, self.output_embedding:
            if type(embedding) is not TokenEmbedding or embedding.scale != 1.0:
                return False
            if embedding.padding_id not in (None, self.padding_id):
                return False
            if embedding.vocab_size > _IDS_PER_WORD * memories.shape[1:].numel():
                return False
        called = [self.encoding, self.input_embedding, self.output_embedding]
        return not any(module._forward_hooks or module._forward_pre_hooks for module in called)

    def _factors(self, memories: Tensor, word_mask: Tensor | None) -> Factors | None:
        """The encoding's factors, as `table_scores` takes them."""
        if memories.ndim == 2:
            return None
        encoding = self.encoding
        assert isinstance(encoding, SentenceEncoding)
        if encoding.form == "bag" or encoding.max_words is not None:
            word_mask = None  # no place depends on it, and the tables leave padding out
        like = _table(self.input_embedding)
        places, channels = encoding.factors(memories.shape[-1], word_mask, like=like)
        return (places[None, :, :, None] if word_mask is None else places.permute(0, 2, 3, 1)), channels


class _Slots(NamedTuple):
    """What the memories hold, and whether the tables are read in their place."""

    word_mask: Tensor | None
    ages: Tensor | None
    by_tables: bool = False
    factors: Factors | None = None


def _weights(scores: Tensor, key_mask: Tensor | None, linear: bool) -> Tensor:
    if not linear:
        return masked_softmax(scores, key_mask)
    return scores if key_mask is None else scores.masked_fill(~key_mask, 0.0)


def _table(embedding: nn.Module) -> Tensor:
    assert isinstance(embedding, TokenEmbedding)
    return embedding.weight
