"""Steps of a recurrence from a CUDA graph: a launch costs the GPU about a microsecond, and Python nothing.

A graph reads and writes memory of its own. A call copies its inputs there, replays, and copies the outputs
out, which is little beside steps that wait for one another.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

KEPT = 32  # graphs, the latest used
SHORTEST = 4  # steps that a graph is worth its copies for

Steps = Callable[[Sequence[Tensor | None], Sequence[Tensor], Any], None]


class Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor | None]
    outputs: list[Tensor]


_recorded: OrderedDict[Hashable, Recorded | None] = OrderedDict()
_lock = Lock()  # two threads must not fill the same buffers


def replay(
    steps: Steps, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor], options: Hashable
) -> None:
    """`steps(inputs, outputs, options)`, which reads the former and writes all of the latter.

    The first call of its kind runs as it stands, for it may be the last; the second is recorded.
    """
    if not _may_record(inputs[0]):
        steps(inputs, outputs, options)
        return
    key = (steps, options, torch.get_float32_matmul_precision(), *map(_kind, (*inputs, *outputs)))
    with _lock, torch.cuda.device_of(inputs[0]):
        seen = key in _recorded
        recorded = _recorded.pop(key, None)
        if seen and recorded is None:
            recorded = _record(steps, inputs, outputs, options)
        _recorded[key] = recorded
        if len(_recorded) > KEPT:
            _recorded.popitem(last=False)
        if recorded is None:
            steps(inputs, outputs, options)
        else:
            _copy(recorded.inputs, inputs)
            recorded.graph.replay()
            _copy(outputs, recorded.outputs)


def _record(
    steps: Steps, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor], options: Hashable
) -> Recorded:
    own_inputs = [None if t is None else torch.zeros_like(t) for t in inputs]
    own_outputs = [torch.empty_like(t) for t in outputs]
    run = partial(steps, own_inputs, own_outputs, options)
    run()  # a kernel that is compiled for these buffers' alignment must be loaded before
    return Recorded(_capture(run), own_inputs, own_outputs)


def _capture(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    # Other threads, a loader that pins memory say, may go on meanwhile.
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
        run()
    return graph


def _may_record(tensor: Tensor | None) -> bool:
    """Not off a GPU, for few steps, or where all runs are to be the same to the last bit, as a product in a
    graph, with another workspace, need not be. Nor on any but the default stream: others are recorded
    themselves, or warmed up for it as in `torch.compile(mode="reduce-overhead")`, and ours would keep memory
    of theirs."""
    if tensor is None or not tensor.is_cuda or tensor.shape[0] < SHORTEST:
        return False
    device = tensor.device
    on_default = torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
    return on_default and not torch.are_deterministic_algorithms_enabled()


def _kind(tensor: Tensor | None) -> Hashable:
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def _copy(to: Sequence[Tensor | None], source: Sequence[Tensor | None]) -> None:
    for target, tensor in zip(to, source, strict=True):
        if target is not None and tensor is not None:
            target.copy_(tensor)
