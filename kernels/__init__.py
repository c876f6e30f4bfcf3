"""Operations. Each file holds one: its definition in PyTorch, its checks, and the choice of what runs it."""

from .additive_attention import additive_attention
from .additive_scores import additive_scores
from .attentive_gru import attentive_gru
from .backend import Explanation, explain, operations, use_backend
from .code_sums import code_sums
from .deformable_sampling import deformable_sampling
from .dot_product_attention import dot_product_attention
from .extract_glimpses import extract_glimpses
from .local_attention import local_attention
from .low_rank_attention import low_rank_attention
from .lsh_attention import lsh_attention
from .lsh_buckets import lsh_buckets
from .lstm_sequence import lstm_sequence
from .nearest_code import nearest_code
from .packed_attention import packed_attention
from .score_bias import DistanceBias, TableBias

__all__ = [
    "DistanceBias",
    "Explanation",
    "TableBias",
    "additive_attention",
    "additive_scores",
    "attentive_gru",
    "code_sums",
    "deformable_sampling",
    "dot_product_attention",
    "explain",
    "extract_glimpses",
    "local_attention",
    "low_rank_attention",
    "lsh_attention",
    "lsh_buckets",
    "lstm_sequence",
    "nearest_code",
    "operations",
    "packed_attention",
    "use_backend",
]
