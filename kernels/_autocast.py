"""What autocast means for a registered operation, which it does not reach by itself."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def as_autocast(*tensors: Tensor) -> list[Tensor]:
    """In autocast's dtype, where it is on."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [t.to(torch.get_autocast_dtype(device)) for t in tensors]


def no_autocast(device: str) -> AbstractContextManager[Any]:
    """Inside, tensors stay what they are. There are devices that autocast does not know: "meta" is one."""
    known = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if known else nullcontext()
