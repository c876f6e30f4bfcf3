"""The head that tells masked tokens (Devlin et al., 2019)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskedTokenHead(nn.Module):
    """Scores what each token is, behind a layer of its own, against a table of all tokens.

    .. math:: \\operatorname{logits}_t = \\operatorname{LN}(\\sigma(W h_t + b)) \\, E^\\top + c

    The table is given, since it is the embedding's. Time O(P C V) for P places: it is large, and scoring the
    masked ones alone saves most of it.

    Args:
        dim: C.
        vocab_size: V.
        activation: makes σ.
        norm: makes the norm, called `norm(dim, device=, dtype=)`.

    Shape:
        - tokens: (B, L, dim)
        - table: (vocab_size, dim), E
        - places: (B, P) of integers, the tokens to score; all where not given
        - output: (B, L or P, vocab_size)

    Raises:
        ValueError: the table is not of that shape.

    Reference:
        Devlin, Chang, Lee, Toutanova. BERT: Pre-training of Deep Bidirectional Transformers for Language
        Understanding. NAACL 2019. Section 3.1.

    Example:
        >>> head = MaskedTokenHead(8, 50)
        >>> head(torch.randn(2, 5, 8), torch.randn(50, 8), torch.tensor([[1, 3], [0, 2]])).shape
        torch.Size([2, 2, 50])
    """

    def __init__(
        self,
        dim: int,
        vocab_size: int,
        *,
        activation: Callable[[], nn.Module] = nn.GELU,
        norm: Callable[..., nn.Module] = nn.LayerNorm,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.transform = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.activation = activation()
        self.norm = norm(dim, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(vocab_size, device=device, dtype=dtype))

    def forward(self, tokens: Tensor, table: Tensor, places: Tensor | None = None) -> Tensor:
        wanted = (len(self.bias), self.transform.out_features)
        if table.shape != wanted:
            raise ValueError(f"table must be (vocab_size, dim) = {wanted}, got {tuple(table.shape)}")
        if places is not None:
            tokens = tokens.gather(1, places.unsqueeze(2).expand(-1, -1, tokens.shape[2]))
        return F.linear(self.norm(self.activation(self.transform(tokens))), table, self.bias)
