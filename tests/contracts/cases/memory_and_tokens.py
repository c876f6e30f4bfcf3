"""Memory hops and their encodings, token embeddings, class tokens and maxout."""

import torch
from contracts.case import Case
from lamina.layers import (
    ClassToken,
    LabelSmoothingLoss,
    Maxout,
    MemoryHop,
    SentenceEncoding,
    TemporalEncoding,
    TokenEmbedding,
)
from torch import Tensor, nn

STORY = torch.tensor([[[3, 7, 0, 0], [5, 9, 12, 4], [2, 0, 0, 0], [0, 0, 0, 0], [1, 8, 8, 3]]]).repeat(
    3, 1, 1
)
WORDS = torch.tensor([[True] * 4, [True] * 3 + [False], [True, True, False, False], [False] * 4, [True] * 4])
SLOTS = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [False] * 5])


def story(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 6, dtype=dtype), STORY


def words_in_memory(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 6, dtype=dtype), STORY[:, :, 0]


def features(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 6, dtype=dtype), torch.randn(3, 5, 7, dtype=dtype)


CASES = [
    Case(
        "MemoryHop",
        lambda **factory: MemoryHop(6, vocab_size=13, padding_id=0, max_memories=5, **factory),
        story,
        dynamic=((0,), (0,)),
    ),
    Case(
        "MemoryHop large-vocabulary",
        lambda **factory: MemoryHop(6, vocab_size=211, padding_id=0, max_memories=5, **factory),
        story,
        dynamic=((0,), (0,)),
    ),
    Case(
        "MemoryHop masked",
        lambda **factory: MemoryHop(
            6, vocab_size=13, max_memories=7, encoding=SentenceEncoding(6, form="code"), **factory
        ),
        story,
        lambda dtype: {"key_mask": SLOTS, "linear": True},
        dynamic=((), ()),
    ),
    Case(
        "MemoryHop words",
        lambda **factory: MemoryHop(
            6, vocab_size=13, max_memories=5, hidden_map=True, activation=nn.ReLU, linear_dim=3, **factory
        ),
        words_in_memory,
        dynamic=((0,), (0,)),
    ),
    Case(
        "MemoryHop features",
        lambda **factory: MemoryHop(
            6,
            input_embedding=nn.Linear(7, 6, **factory),
            output_embedding=nn.Linear(7, 6, **factory),
            **factory,
        ),
        features,
        dynamic=((0,), (0, 1)),
    ),
    Case(
        "SentenceEncoding",
        lambda **factory: SentenceEncoding(6),
        lambda dtype: (torch.randn(3, 5, 4, 6, dtype=dtype),),
        dynamic=((0, 1, 2),),
    ),
    Case(
        "SentenceEncoding masked",
        lambda **factory: SentenceEncoding(6, form="code", max_words=9),
        lambda dtype: (torch.randn(3, 5, 4, 6, dtype=dtype), WORDS),
        dynamic=((0,), ()),
    ),
    Case(
        "TemporalEncoding",
        lambda **factory: TemporalEncoding(5, 6, **factory),
        lambda dtype: (torch.randn(3, 5, 6, dtype=dtype),),
    ),
    Case(
        "TemporalEncoding masked",
        lambda **factory: TemporalEncoding(5, 6, **factory),
        lambda dtype: (torch.randn(3, 5, 6, dtype=dtype),),
        lambda dtype: {"key_mask": SLOTS},
        dynamic=((),),
    ),
    Case(
        "TokenEmbedding",
        lambda **factory: TokenEmbedding(13, 6, padding_id=0, scale=True, **factory),
        lambda dtype: (STORY[0],),
        dynamic=((0,),),
    ),
    Case(
        "TokenEmbedding tied",
        lambda **factory: Tied(TokenEmbedding(13, 6, padding_id=0, **factory)),
        lambda dtype: (STORY[0],),
        dynamic=((0,),),
    ),
    Case(
        "ClassToken",
        lambda **factory: ClassToken(6, **factory),
        lambda dtype: (torch.randn(3, 5, 6, dtype=dtype),),
        dynamic=((0, 1),),
    ),
    Case(
        "LabelSmoothingLoss",
        lambda **factory: LabelSmoothingLoss(0.1, padding_id=0, reduction="none", **factory),
        lambda dtype: (torch.randn(3, 5, 7, dtype=dtype), torch.tensor([[1, 2, 0, 0, 0], [3] * 5, [0] * 5])),
        dynamic=((0, 1), (0, 1)),
    ),
    Case(
        "ClassToken distillation",
        lambda **factory: ClassToken(6, distillation=True, **factory),
        lambda dtype: (torch.randn(3, 5, 6, dtype=dtype),),
        dynamic=((0, 1),),
    ),
    Case(
        "Maxout",
        lambda **factory: Maxout(7, 5, pieces=3, **factory),
        lambda dtype: (torch.randn(3, 11, 7, dtype=dtype),),
        dynamic=((0, 1),),
    ),
]


class Tied(nn.Module):
    """The embedding as input and output of one model."""

    def __init__(self, embedding: TokenEmbedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding.logits(self.embedding(ids))
