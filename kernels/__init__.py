"""Operations. Each file holds one: its definition in PyTorch, its checks, and the choice of what runs it."""

from .additive_scores import additive_scores
from .backend import Explanation, explain, operations, use_backend
from .deformable_sampling import deformable_sampling
from .dot_product_attention import dot_product_attention
from .extract_glimpses import extract_glimpses
from .local_attention import local_attention
from .lsh_attention import lsh_attention
from .lsh_buckets import lsh_buckets
from .nearest_code import nearest_code
from .packed_attention import packed_attention
from .score_bias import DistanceBias, TableBias

__all__ = [
    "DistanceBias",
    "Explanation",
    "TableBias",
    "additive_scores",
    "deformable_sampling",
    "dot_product_attention",
    "explain",
    "extract_glimpses",
    "local_attention",
    "lsh_attention",
    "lsh_buckets",
    "nearest_code",
    "operations",
    "packed_attention",
    "use_backend",
]
