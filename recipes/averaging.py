"""The mean of a model's last checkpoints, with which it is tested and saved (Vaswani et al., section 6.1)."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class CheckpointAverage(Callback):
    """Keeps the weights of the last epochs, and puts their mean into the model before the test.

    The kept weights are part of the training's own checkpoint, so that an interrupted run ends with the same
    mean. Whatever is no float (a count) is the last epoch's.

    Args:
        last: of how many epochs; 0 or 1 leaves the last one's weights as they are.
    """

    def __init__(self, last: int) -> None:
        self.last = last
        self.kept: list[dict[str, Tensor]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.last > 1:
            state = {n: t.detach().cpu().clone() for n, t in pl_module.state_dict().items()}
            self.kept = [*self.kept, state][-self.last :]

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.kept:
            pl_module.load_state_dict(mean_of(self.kept))
            self.kept = []

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.kept = state_dict["kept"]


def mean_of(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each tensor, in float64 on the way; of what is no float, the last."""
    mean = {}
    for name, last in states[-1].items():
        if last.is_floating_point():
            last = torch.stack([state[name].double() for state in states]).mean(0).to(last.dtype)
        mean[name] = last
    return mean
