"""What a layer chooses, kept for its second run in a backward pass.

A second run has the inputs of the first to rounding only. Where two buckets are nearly equal it would now and
then choose the other one, and be another function than the one whose gradient is wanted.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

Find = Callable[[], Tensor]
Chooser = Callable[[Find, torch.dtype], Tensor]


def choice(find: Find, kept_as: torch.dtype) -> Tensor:
    """What `find` gives, or in a second run, of the type `kept_as`, what it gave in the first.

    It must not draw random numbers, as a second run does without it.
    """
    return find() if torch.compiler.is_compiling() else _chooser.get()(find, kept_as)


class Choices:
    """What one run of a layer chose, in order."""

    def __init__(self, made: list[Tensor] | None = None) -> None:
        self.made = [] if made is None else made

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within the block every choice is kept; it may be one of a second run itself."""
        outer = _chooser.get()

        def keep(find: Find, kept_as: torch.dtype) -> Tensor:
            found = outer(find, kept_as)
            self.made.append(found.to(kept_as))
            return found

        with _chosen_by(keep):
            yield

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within the block what was kept is given, in order."""
        left = iter(self.made)

        def give(find: Find, kept_as: torch.dtype) -> Tensor:
            found = next(left, None)
            return find() if found is None else found

        with _chosen_by(give):
            yield


def _find(find: Find, kept_as: torch.dtype) -> Tensor:
    return find()


_chooser: ContextVar[Chooser] = ContextVar("chooser", default=_find)


@contextmanager
def _chosen_by(chooser: Chooser) -> Iterator[None]:
    token = _chooser.set(chooser)
    try:
        yield
    finally:
        _chooser.reset(token)
