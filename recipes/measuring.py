"""Time and memory of a call, on the GPU where there is one, else on the CPU."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter, process_time

import torch


def device() -> str:
    """Where all is measured: "cuda" or "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def seconds(call: Callable[[], object]) -> float:
    """How long one call takes, by `clock`."""
    start = clock()
    call()
    return clock() - start


def clock() -> float:
    """The time in seconds, once a GPU has done its work.

    Where one thread computes on a CPU it is the process's own: what a neighbour takes of the core, or a
    stopped process waits, is not counted. With more threads it is the wall's, as on a GPU.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return perf_counter()
    return process_time() if torch.get_num_threads() == 1 else perf_counter()


def seconds_by_turns(calls: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """The seconds of each call in each round, after one round that warms up.

    The calls take turns: on a machine with neighbours only what is timed side by side can be compared. So
    take the ratio within a round, or the least of the rounds: what interrupts a call only adds to it.

    Example:
        >>> from lamina.recipes.measuring import seconds_by_turns
        >>> times = seconds_by_turns([lambda: 1 + 1, lambda: 2 + 2], rounds=5)
        >>> len(times), len(times[0])
        (2, 5)
    """
    for call in calls:
        seconds(call)
    turns = [[seconds(call) for call in calls] for _ in range(rounds)]
    return [list(of_call) for of_call in zip(*turns, strict=True)]


class Peak:
    """What `peak_memory` found: `bytes`, once its block has ended."""

    bytes: float = 0.0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """The most memory that PyTorch holds in the block beyond what it held before.

    On a CPU what was there before counts as held to the end, even where the block frees it.
    """
    peak = Peak()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated() - before
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # of the profiler, which tells of its start and end
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        yield peak
    held = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak.bytes = max(peak.bytes, held)


def peak_bytes(call: Callable[[], object]) -> float:
    """The most memory that a call holds beyond what was held before it.

    Example:
        >>> from lamina.recipes.measuring import peak_bytes
        >>> peak_bytes(lambda: torch.ones(1000).sum()) >= 4000
        True
    """
    with peak_memory() as peak:
        call()
    return peak.bytes
