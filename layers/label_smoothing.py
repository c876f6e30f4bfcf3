"""Cross entropy with smoothed labels (Szegedy et al., 2016), in which padding has no part."""

import torch
from torch import Tensor, nn

from .token_embedding import check_ids


class LabelSmoothingLoss(nn.Module):
    """Cross entropy against a target that gives a little of its mass to all other tokens, but not to padding.

    .. math:: \\ell = -(1 - \\epsilon) \\log p_y - \\frac{\\epsilon}{V'} \\sum_{v \\ne \\text{pad}} \\log p_v

    V' counts all tokens but padding, y among them. Targets that are padding have no loss. The mean is over
    the others: of a batch of nothing but padding it is 0, not NaN.

    `nn.functional.cross_entropy(label_smoothing=ε, ignore_index=…)`, which this calls where there is no
    padding token, smooths over padding too: a model then learns to give it mass. Code that gives y exactly 1
    - ε and the other V' - 1 tokens ε / (V' - 1) is this with ε V' / (V' - 1) for ε. The smoothed loss of the
    best model is not 0, and its exponential no perplexity: `smoothing=0` gives the one that is.

    Args:
        smoothing: ε.
        padding_id: the token that is no target and gets no mass, if there is one.
        reduction: "mean" over the targets that are not padding, "sum", or "none".

    Shape:
        - logits: (..., V), for example (B, T, V)
        - targets: (...) of integers
        - output: a scalar; as the targets with "none", zero at padding

    Raises:
        ValueError: `smoothing` is not in [0, 1), the reduction is unknown, targets are not integers or their
            shape is not that of the logits without V.

    Reference:
        Szegedy, Vanhoucke, Ioffe, Shlens, Wojna. Rethinking the Inception Architecture for Computer Vision.
        CVPR 2016. Section 7. Vaswani et al. Attention Is All You Need. NIPS 2017. Section 5.4.

    Example:
        >>> loss = LabelSmoothingLoss(0.1, padding_id=0)
        >>> logits, targets = torch.zeros(2, 3, 5), torch.tensor([[4, 1, 0], [2, 0, 0]])
        >>> round(loss(logits, targets).item(), 4)  # the logarithm of 5
        1.6094
    """

    def __init__(
        self,
        smoothing: float = 0.1,
        *,
        padding_id: int | None = None,
        reduction: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= smoothing < 1.0:
            raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
        self.smoothing, self.padding_id, self.reduction = smoothing, padding_id, reduction

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        check_ids("targets", targets)
        if targets.shape != logits.shape[:-1]:
            raise ValueError(
                f"targets must be {tuple(logits.shape[:-1])}, got {tuple(targets.shape)} for logits "
                f"{tuple(logits.shape)}"
            )
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # By the mass alone: log p is never written out for all V.
        mass = logits.logsumexp(-1)
        of_target = logits.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)
        losses = mass - of_target
        if self.smoothing:
            total, tokens = logits.sum(-1), logits.shape[-1]
            if self.padding_id is not None:
                total, tokens = total - logits[..., self.padding_id], tokens - 1
            losses = (1 - self.smoothing) * losses + self.smoothing * (mass - total / tokens)
        counted = torch.ones_like(targets, dtype=torch.bool)
        if self.padding_id is not None:
            counted = targets != self.padding_id
            losses = losses.masked_fill(~counted, 0.0)
        if self.reduction == "none":
            return losses
        if self.reduction == "sum":
            return losses.sum()
        return losses.sum() / counted.sum().clamp(min=1)

    def extra_repr(self) -> str:
        return f"{self.smoothing}, padding_id={self.padding_id}, reduction={self.reduction!r}"
