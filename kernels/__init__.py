"""Operations. Each file holds one: its definition in PyTorch, its checks, and the choice of what runs it."""

from .additive_scores import additive_scores
from .backend import Explanation, explain, operations, use_backend
from .dot_product_attention import dot_product_attention

__all__ = ["Explanation", "additive_scores", "dot_product_attention", "explain", "operations", "use_backend"]
