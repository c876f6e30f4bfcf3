"""BERT's optimiser: Adam without the correction of its averages, with weight decay beside the gradient."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .schedules import warmup_then_line

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from .settings import Settings


def bert_adam(task: "LightningModule", settings: "Settings") -> dict[str, Any]:
    """What `configure_optimizers` gives: BertAdam, a warm-up, and a line down to zero.

    Matrices and tables decay, biases and norms do not.
    """
    matrices = [p for p in task.parameters() if p.ndim > 1]
    others = [p for p in task.parameters() if p.ndim <= 1]
    optimizer = BertAdam(
        [{"params": matrices}, {"params": others, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )
    steps = int(task.trainer.estimated_stepping_batches)
    warmup = round(steps * settings.warmup_epochs / settings.epochs)
    scheduler = LambdaLR(optimizer, lambda step: warmup_then_line(step + 1, warmup, steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class BertAdam(Optimizer):
    """Adam as the authors of BERT trained with it.

    .. math:: m \\leftarrow \\beta_1 m + (1 - \\beta_1) g, \\quad
              v \\leftarrow \\beta_2 v + (1 - \\beta_2) g^2, \\quad
              w \\leftarrow w - \\eta \\left( \\frac{m}{\\sqrt v + \\epsilon} + \\lambda w \\right)

    `torch.optim.AdamW` divides m and v by 1 - β^t, so that its first steps are full ones. Without that the
    first step is (1 - β₁) / √(1 - β₂), some three times as large, and falls; which the warm-up is for.

    Args:
        params: as of every optimiser of PyTorch.
        lr: η.
        betas: β₁, β₂.
        eps: ε.
        weight_decay: λ; the authors give norms and biases none.

    Raises:
        ValueError: a value is out of its range.

    Reference:
        Devlin, Chang, Lee, Toutanova. BERT. NAACL 2019. Appendix A.2, and `optimization.py` of its code.

    Example:
        >>> from lamina.recipes.bert_adam import BertAdam
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> weight.grad = torch.ones(1)
        >>> BertAdam([weight], lr=0.1, weight_decay=0.0).step()
        >>> round(weight.item(), 4)  # 1 - 0.1 · 0.1 / √0.001
        0.6838
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0:
            raise ValueError(
                f"lr, eps and weight_decay must not be negative, got {lr}, {eps}, {weight_decay}"
            )
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            given: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            if not given:
                continue
            for p in given:
                if not self.state[p]:
                    self.state[p] = {"mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
            gradients = [p.grad for p in given if p.grad is not None]
            means, squares = ([self.state[p][name] for p in given] for name in ("mean", "square"))
            first, second = group["betas"]
            torch._foreach_lerp_(means, gradients, 1 - first)
            torch._foreach_mul_(squares, second)
            torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
            roots = torch._foreach_sqrt(squares)
            torch._foreach_add_(roots, group["eps"])
            if group["weight_decay"]:  # of the weights as they were
                torch._foreach_mul_(given, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_addcdiv_(given, means, roots, -group["lr"])
        return loss
