"""Scores and sums of sentences that are never embedded, by way of the whole vocabulary.

A sentence is m = sum_r channels[r] * sum_j places[r, j] * table[id_j]. So its product with a state is a sum
over its words of scalars, which one product of the state with the table holds for all words; and a weighted
sum of sentences is a product of the words' total weights with the table.
"""

from torch import Tensor

Factors = tuple[Tensor, Tensor]  # places (B or 1, R, J, M or 1), channels (R, C)


def table_scores(
    state: Tensor, ids: Tensor, table: Tensor, factors: Factors | None = None, *, skipped: int | None = None
) -> Tensor:
    """state · memory, (B, M), of state (B, C) and table (V, C).

    Memories are ids (B, M, J) with their factors, or single words (B, M), which have none. Words of the id
    `skipped` have no part.
    """
    by_id = (state if factors is None else state.unsqueeze(1) * factors[1]) @ table.mT
    if skipped is not None:
        by_id.select(-1, skipped).zero_()
    if factors is None:
        return by_id.gather(1, ids.long())
    # Memories last: the sum over words then runs along contiguous rows.
    by_word = by_id.gather(2, _index(ids, factors)).unflatten(2, (ids.shape[2], ids.shape[1]))
    return (by_word * factors[0]).sum((1, 2))


def table_sums(
    weights: Tensor, ids: Tensor, table: Tensor, factors: Factors | None = None, *, skipped: int | None = None
) -> Tensor:
    """The sum of the memories, (B, C), weighted by weights (B, M). Arguments as of `table_scores`."""
    if factors is None:
        by_id = weights.new_zeros(weights.shape[0], table.shape[0]).scatter_add_(1, ids.long(), weights)
    else:
        by_word = (weights[:, None, None, :] * factors[0]).flatten(2)
        by_id = by_word.new_zeros(*by_word.shape[:2], table.shape[0])
        by_id = by_id.scatter_add_(2, _index(ids, factors), by_word)
    if skipped is not None:
        by_id.select(-1, skipped).zero_()
    sums = by_id.to(table.dtype) @ table
    return sums if factors is None else (sums * factors[1]).sum(1)


def _index(ids: Tensor, factors: Factors) -> Tensor:
    return ids.mT.flatten(1).long().unsqueeze(1).expand(-1, len(factors[1]), -1)
