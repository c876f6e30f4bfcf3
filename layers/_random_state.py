"""The random streams and the autocast of a moment, to run a computation again as it ran then."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states


class RandomState:
    """Where the global random streams stand: the CPU's, and those of the devices of `tensors`."""

    def __init__(self, *tensors: Tensor) -> None:
        self.kind = next((t.device.type for t in tensors if t.device.type not in ("cpu", "meta")), "cuda")
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(*tensors)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.states, device_type=self.kind)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within the block the streams may be moved; behind it they are where they were."""
        with torch.random.fork_rng(self.devices, device_type=self.kind):
            yield


class Autocast:
    """The autocast in force for the CPU and for a device, to be entered again in a backward pass.

    Without its cache: a weight that is cast where no gradients are kept is for no one who keeps them.
    """

    def __init__(self, device: str) -> None:
        kinds = {"cpu", device} if torch.amp.is_autocast_available(device) else {"cpu"}
        self.kinds = [(k, torch.get_autocast_dtype(k), torch.is_autocast_enabled(k)) for k in sorted(kinds)]

    @contextmanager
    def again(self) -> Iterator[None]:
        with ExitStack() as stack:
            for kind, dtype, enabled in self.kinds:
                stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            yield
