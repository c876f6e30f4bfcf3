"""Stacks of memory hops with tied weights (Sukhbaatar et al., 2015, section 2.2)."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import nn

from .memory_hop import MemoryHop
from .sentence_encoding import SentenceEncoding


def memory_hops(
    num_hops: int,
    vocab_size: int,
    dim: int,
    *,
    tying: Literal["adjacent", "layerwise"] = "adjacent",
    encoding: nn.Module | None = None,
    max_memories: int | None = None,
    activation: Callable[[], nn.Module] | None = None,
    linear_dim: int = 0,
    padding_id: int | None = None,
    std: float = 0.1,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.ModuleList:
    """Hops whose embeddings are tied as in the paper, to be called one after the other.

    "adjacent": the output embedding of a hop is the input embedding of the next, so there are K + 1 tables
    (V, C). The question goes through `hops[0].encode`, and `hops[-1].output_embedding.logits` gives the
    answer, which makes the paper's B = A¹ and Wᵀ = Cᴷ. "layerwise": all hops have the same two tables, and
    one linear map H of the state, like a recurrent network. Temporal encodings are tied as the embeddings.

    A tied module is one module at several places: it counts once among the parameters, and stands in the
    state dict under each of its names.

    Args:
        num_hops: K.
        vocab_size: V.
        dim: C.
        tying: which weights are shared.
        encoding, max_memories, activation, linear_dim, padding_id, std: as of `MemoryHop`.
        device: where the parameters are.
        dtype: of the parameters.

    Returns:
        K `MemoryHop`s.

    Raises:
        ValueError: `num_hops` is less than 1, or `tying` is unknown.

    Reference:
        Sukhbaatar, Szlam, Weston, Fergus. End-To-End Memory Networks. NIPS 2015. Section 2.2.

    Example:
        >>> hops = memory_hops(3, vocab_size=40, dim=8, padding_id=0)
        >>> question, story = torch.randint(1, 40, (2, 6)), torch.randint(1, 40, (2, 5, 7))
        >>> state = hops[0].encode(question)
        >>> for hop in hops:
        ...     state = hop(state, story)
        >>> hops[-1].output_embedding.logits(state).shape
        torch.Size([2, 40])
    """
    if num_hops < 1:
        raise ValueError(f"num_hops must be at least 1, got {num_hops}")
    if tying not in ("adjacent", "layerwise"):
        raise ValueError(f"tying must be 'adjacent' or 'layerwise', got {tying!r}")
    make = partial(
        MemoryHop,
        dim,
        vocab_size=vocab_size,
        encoding=SentenceEncoding(dim) if encoding is None else encoding,
        max_memories=max_memories,
        activation=activation,
        linear_dim=linear_dim,
        padding_id=padding_id,
        std=std,
        device=device,
        dtype=dtype,
    )
    hops = [make(hidden_map=tying == "layerwise")]
    while len(hops) < num_hops:
        last = hops[-1]
        if tying == "adjacent":
            hop = make(input_embedding=last.output_embedding, input_temporal=last.output_temporal)
        else:
            hop = make(
                input_embedding=last.input_embedding,
                output_embedding=last.output_embedding,
                input_temporal=last.input_temporal,
                output_temporal=last.output_temporal,
                hidden_map=last.hidden_map or False,
            )
        hops.append(hop)
    return nn.ModuleList(hops)
