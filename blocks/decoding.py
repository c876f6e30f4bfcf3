"""Greedy and beam search over any model that writes a sequence token by token."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Decoding(Protocol):
    """What a search asks of a model: one object for one batch, which remembers what it has read.

    A Transformer keeps its keys and values in it, a recurrent network its state; a model without a memory
    keeps the tokens, and reads them all again at each step.

    Shape:
        - tokens: (N, T) of integers, the new ones of each of N sequences: at first all that is given, then
          one
        - output: (N, V), scores of the token that follows, before the softmax; -inf for what must not

    Source:
        Lamina's convention.

    Example:
        >>> class Counting:  # the next token is the last one and one
        ...     def __call__(self, tokens):
        ...         return torch.nn.functional.one_hot((tokens[:, -1] + 1) % 5, 5).float()
        ...
        ...     def reorder(self, rows): ...
        >>> greedy_search(Counting(), torch.tensor([[0]]), max_length=9, end_id=4).best
        tensor([[1, 2, 3, 4]])
    """

    def __call__(self, tokens: Tensor) -> Tensor: ...

    def reorder(self, rows: Tensor) -> None:
        """Goes on with the sequences at the indices `rows`, (N',), in that order."""
        ...


class Generated(NamedTuple):
    """What a search has found.

    Args:
        tokens: (B, K, T), without what was given, best first; padding behind the end token.
        lengths: (B, K), the end token counted, where there is one.
        scores: (B, K), by which they are sorted: log-probabilities over the length's penalty. -inf where a
            search has found fewer.

    Source:
        Lamina's convention.

    Example:
        >>> found = Generated(torch.zeros(2, 3, 7), torch.zeros(2, 3), torch.zeros(2, 3))
        >>> found.best.shape
        torch.Size([2, 7])
    """

    tokens: Tensor
    lengths: Tensor
    scores: Tensor

    @property
    def best(self) -> Tensor:
        """(B, T)."""
        return self.tokens[:, 0]


@torch.no_grad()
def greedy_search(
    decoding: Decoding | Callable[[Tensor], Tensor],
    prompt: Tensor,
    *,
    max_length: int | Tensor,
    end_id: int,
    padding_id: int = 0,
) -> Generated:
    """Takes the likeliest token at each step.

    Args:
        decoding: the model at work; it is never asked to reorder.
        prompt: (B, T) of integers, which is given: a start token at the least. No padding.
        max_length: the most tokens that are written, one number or (B,).
        end_id: the token behind which a sequence is over.
        padding_id: what stands behind that.

    Returns:
        The sequences as `Generated`, K = 1; the score is the sum of log-probabilities.

    Raises:
        ValueError: the prompt is no matrix of integers with a column, or `max_length` does not fit.

    Reference:
        Sutskever, Vinyals, Le. Sequence to Sequence Learning with Neural Networks. NIPS 2014. Section 3.2.

    Example:
        >>> table = torch.eye(4).roll(1, 1)  # 0 -> 1 -> 2 -> 3
        >>> step = lambda tokens: table[tokens[:, -1]]
        >>> greedy_search(step, torch.tensor([[0]]), max_length=5, end_id=3).best
        tensor([[1, 2, 3]])
    """
    limits = _check(prompt, max_length)
    scores, length = prompt.new_zeros(len(prompt), dtype=torch.float32), torch.zeros_like(limits)
    alive, last, written = limits > 0, prompt, []
    while bool(alive.any()):
        log_p = _log_probabilities(decoding(last))
        best, token = log_p.max(-1)
        written.append(token.masked_fill(~alive, padding_id))
        scores += best.masked_fill(~alive, 0.0)
        length += alive
        alive = alive & (token != end_id) & (length < limits)
        last = written[-1].unsqueeze(1)
    tokens = torch.stack(written, 1) if written else prompt.new_empty(len(prompt), 0)
    return Generated(tokens.unsqueeze(1), length.unsqueeze(1), scores.unsqueeze(1))


@torch.no_grad()
def beam_search(
    decoding: Decoding,
    prompt: Tensor,
    *,
    num_beams: int = 4,
    length_penalty: float = 0.6,
    max_length: int | Tensor,
    end_id: int,
    padding_id: int = 0,
) -> Generated:
    """Keeps the `num_beams` likeliest beginnings of each sequence, and goes on with all of them.

    .. math:: s(Y) = \\frac{\\log p(Y)}{\\operatorname{lp}(Y)}, \\qquad
              \\operatorname{lp}(Y) = \\left( \\frac{5 + \\lvert Y \\rvert}{6} \\right)^\\alpha

    A beginning that ends among the likeliest is set aside with its score. A search is over once no beginning
    can become better than the K that were set aside, whatever its length; then the result is what no wait
    would change. One that is cut off by `max_length` counts only where nothing of that batch row has ended.
    All rows of the batch go together; a row that is done costs steps, but changes no more.

    With one beam and a penalty of 0 it is `greedy_search`. The penalty is that of Wu et al., which the
    Transformer took with α = 0.6 and four beams.

    Args:
        decoding: the model at work. It reads the prompt once, and is then asked to reorder at each step.
        prompt: (B, T) of integers, which is given: a start token at the least. No padding.
        num_beams: K.
        length_penalty: α; 0 for none.
        max_length: the most tokens that are written, one number or (B,).
        end_id: the token behind which a sequence is over.
        padding_id: what stands behind that.

    Returns:
        The K best as `Generated`.

    Raises:
        ValueError: the prompt is no matrix of integers with a column, `num_beams` is less than one,
            `length_penalty` is negative, or `max_length` does not fit.

    Reference:
        Wu et al. Google's Neural Machine Translation System. 2016. arXiv:1609.08144. Section 7. Vaswani et
        al. Attention Is All You Need. NIPS 2017. Section 6.1.

    Example:
        >>> class Table:  # token 1 is the likelier beginning, but 2 is surely followed by the end, 3
        ...     p = torch.tensor([[0, 0.6, 0.4, 0], [0, 0.3, 0.3, 0.4], [0, 0, 0, 1], [0, 0, 0, 1]])
        ...
        ...     def __call__(self, tokens):
        ...         return self.p[tokens[:, -1]].log()
        ...
        ...     def reorder(self, rows): ...
        >>> beam_search(Table(), torch.tensor([[0]]), num_beams=2, max_length=3, end_id=3).best
        tensor([[2, 3]])
    """
    limits = _check(prompt, max_length)
    if num_beams < 1:
        raise ValueError(f"num_beams must be at least 1, got {num_beams}")
    if length_penalty < 0:
        raise ValueError(f"length_penalty must be at least 0, got {length_penalty}")
    batch, device = len(prompt), prompt.device
    steps = int(limits.max()) if batch else 0
    done = _Finished(batch, num_beams, steps, padding_id, device)
    rows = torch.arange(batch, device=device).unsqueeze(1)
    totals = torch.zeros(batch, 1, device=device).masked_fill(limits.unsqueeze(1) <= 0, -torch.inf)
    tokens, last = prompt.new_empty(batch, 1, 0), prompt
    for length in range(1, steps + 1):
        if bool((totals == -torch.inf).all()):
            break
        log_p = _log_probabilities(decoding(last)).unflatten(0, (batch, -1))
        beams, vocabulary = log_p.shape[1:]
        # Twice as many candidates as beams: if all beams end, there are as many that go on.
        candidates = (totals.unsqueeze(2) + log_p).flatten(1)
        best, cell = candidates.topk(min(2 * num_beams, candidates.shape[1]), -1)
        beam, token = cell // vocabulary, cell % vocabulary
        grown = torch.cat([tokens[rows, beam], token.unsqueeze(2)], 2)
        ended = token == end_id
        penalty = ((5 + length) / 6) ** length_penalty
        among = torch.arange(best.shape[1], device=device) < num_beams
        done.add(grown, torch.where(ended & among, best, -torch.inf) / penalty)
        going = best.masked_fill(ended, -torch.inf)
        cut = (limits == length).unsqueeze(1)
        done.add(grown, torch.where(cut & ~done.any, going, -torch.inf) / penalty)

        totals, kept = going.topk(min(num_beams, going.shape[1]), -1)
        tokens, beam = grown[rows, kept], beam.gather(1, kept)
        # What the best could still become: log-probabilities only fall, and a penalty is largest at the end.
        hope = totals[:, :1] / ((5 + limits.unsqueeze(1)) / 6) ** length_penalty
        totals = totals.masked_fill(cut | (hope <= done.scores[:, -1:]), -torch.inf)
        last = tokens[:, :, -1].reshape(-1, 1)
        decoding.reorder((beam + beams * rows).flatten())
    return done.found()


class _Finished:
    """The best K that have ended, of each row of the batch."""

    def __init__(self, batch: int, num_beams: int, steps: int, padding_id: int, device: torch.device) -> None:
        self.tokens = torch.full((batch, num_beams, steps), padding_id, dtype=torch.long, device=device)
        self.lengths = torch.zeros(batch, num_beams, dtype=torch.long, device=device)
        self.scores = torch.full((batch, num_beams), -torch.inf, device=device)
        self.padding_id = padding_id

    @property
    def any(self) -> Tensor:
        """(B, 1) of bool."""
        return self.scores[:, :1] > -torch.inf

    def add(self, tokens: Tensor, scores: Tensor) -> None:
        """Takes (B, N, T) with scores (B, N), -inf for what is not to be taken."""
        short = self.tokens.shape[2] - tokens.shape[2]
        padded = torch.nn.functional.pad(tokens, (0, short), value=self.padding_id)
        lengths = torch.full_like(scores, tokens.shape[2], dtype=torch.long)
        self.scores, places = torch.cat([self.scores, scores], 1).topk(self.scores.shape[1], -1)
        self.lengths = torch.cat([self.lengths, lengths], 1).gather(1, places)
        everything = torch.cat([self.tokens, padded], 1)
        self.tokens = everything.gather(1, places.unsqueeze(2).expand(-1, -1, everything.shape[2]))

    def found(self) -> Generated:
        """What is missing is empty. No column is padding alone."""
        missing = self.scores == -torch.inf
        lengths = self.lengths.masked_fill(missing, 0)
        longest = int(lengths.max()) if lengths.numel() else 0
        tokens = self.tokens.masked_fill(missing.unsqueeze(2), self.padding_id)
        return Generated(tokens[:, :, :longest], lengths, self.scores)


def _log_probabilities(scores: Tensor) -> Tensor:
    return scores.log_softmax(-1, dtype=torch.float32)


def _check(prompt: Tensor, max_length: int | Tensor) -> Tensor:
    """The limits of each sequence, (B,)."""
    if prompt.ndim != 2 or prompt.shape[1] == 0 or prompt.is_floating_point() or prompt.dtype is torch.bool:
        raise ValueError(
            "prompt must be (B, T) of integers with T at least 1, "
            f"got {tuple(prompt.shape)} of {prompt.dtype}"
        )
    limits = torch.as_tensor(max_length, device=prompt.device)
    if limits.ndim > 1 or (limits.ndim and len(limits) != len(prompt)) or limits.is_floating_point():
        raise ValueError(
            f"max_length must be an integer or ({len(prompt)},) of them, "
            f"got {tuple(limits.shape)} of {limits.dtype}"
        )
    return limits.long().expand(len(prompt))
