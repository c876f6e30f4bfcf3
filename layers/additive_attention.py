"""Additive attention (Bahdanau et al., 2015)."""

import torch
from torch import Tensor, nn

from ..kernels import additive_attention, additive_scores
from ..kernels.checks import check_bias
from ..kernels.masking import masked_softmax, resolve_mask
from .masking import attention_mask


class AdditiveAttention(nn.Module):
    """Attention whose score is a one-layer tanh network of query and key.

    .. math:: a_{ij} = \\operatorname{softmax}_j \\left( v^\\top \\tanh(W q_i + U k_j) \\right),
              \\quad o_i = \\sum_j a_{ij} x_j

    It has one head, and does not project the values: the paper's context is a mean of the annotations
    themselves. Time O(Lq Lk hidden_dim); memory as that of `lamina.kernels.additive_attention`, and
    where weights are dropped as that of `lamina.kernels.additive_scores`.

    Args:
        query_dim: size of a query.
        key_dim: size of a key; the values may have any size.
        hidden_dim: size of the tanh layer.
        dropout: probability with which an attention weight is dropped in training.

    Shape:
        - query: (B, Lq, query_dim)
        - key: (B, Lk, key_dim); the queries where it is not given
        - value: (B, Lk, D); the keys where it is not given
        - key_mask: (B, Lk) of bool, True where a key takes part
        - mask: bool, broadcastable to (B, 1, Lq, Lk)
        - bias: float, broadcastable to (B, 1, Lq, Lk), added to the scores
        - output: (B, Lq, D); zero where no key takes part

    Raises:
        ValueError: the sizes of query or key are not those of the layer, or a mask does not fit.

    Reference:
        Bahdanau, Cho, Bengio. Neural Machine Translation by Jointly Learning to Align and
        Translate. ICLR 2015. Section 3.1 and appendix A.1.2.

    Example:
        >>> attention = AdditiveAttention(query_dim=6, key_dim=4, hidden_dim=8)
        >>> attention(torch.randn(2, 3, 6), torch.randn(2, 5, 4)).shape
        torch.Size([2, 3, 4])
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        hidden_dim: int,
        *,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.query = nn.Linear(query_dim, hidden_dim, bias=False, device=device, dtype=dtype)
        self.key = nn.Linear(key_dim, hidden_dim, bias=False, device=device, dtype=dtype)
        self.energy = nn.Linear(hidden_dim, 1, bias=False, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The paper's appendix B.1: small Gaussian projections, zero energy."""
        nn.init.normal_(self.query.weight, std=0.001)
        nn.init.normal_(self.key.weight, std=0.001)
        nn.init.zeros_(self.energy.weight)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """The mean of the values under the attention weights, (B, Lq, D). Shapes as above."""
        key = query if key is None else key
        value = key if value is None else value
        if self.training and self.dropout.p:
            weights = self.weights(query, key, key_mask=key_mask, mask=mask, bias=bias, is_causal=is_causal)
            return self.dropout(weights).to(value.dtype) @ value
        given = self._taking_part(query, key, key_mask, mask, bias)
        return additive_attention(
            self.query(query),
            self.key(key),
            self.energy.weight[0],
            value,
            mask=_without_heads(given),
            bias=_without_heads(bias),
            is_causal=is_causal,
        )

    def weights(
        self,
        query: Tensor,
        key: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """The attention weights, (B, Lq, Lk): each row sums to one, or to zero with no key to attend."""
        key = query if key is None else key
        given = self._taking_part(query, key, key_mask, mask, bias)
        scores = additive_scores(self.query(query), self.key(key), self.energy.weight[0]).unsqueeze(1)
        if bias is not None:
            scores = scores + bias
        taking_part = resolve_mask(given, bias, is_causal, scores.shape[2], scores.shape[3], query.device)
        return masked_softmax(scores, taking_part).squeeze(1)

    def _taking_part(
        self, query: Tensor, key: Tensor, key_mask: Tensor | None, mask: Tensor | None, bias: Tensor | None
    ) -> Tensor | None:
        """Both masks as one, that broadcasts to (B, 1, Lq, Lk); all that is given, checked."""
        self._check(query, key)
        shape = (query.shape[0], 1, query.shape[1], key.shape[1])
        check_bias(bias, shape)
        return attention_mask(key_mask, mask, shape)

    def _check(self, query: Tensor, key: Tensor) -> None:
        for name, tensor, projection in ("query", query, self.query), ("key", key, self.key):
            if tensor.ndim != 3 or tensor.shape[-1] != projection.in_features:
                raise ValueError(
                    f"{name} must be (B, L, {projection.in_features}), got {tuple(tensor.shape)}"
                )


def _without_heads(cells: Tensor | None) -> Tensor | None:
    """(…, 1, Lq, Lk) as (…, Lq, Lk): there is one head."""
    return cells.squeeze(1) if cells is not None and cells.ndim == 4 else cells
