"""Learning rates over the steps, as factors of their peak."""

import math


def warmup_then_cosine(step: int, warmup: int, steps: int) -> float:
    """From near zero up to one, then down to zero along half a cosine."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min((step - warmup) / max(steps - warmup, 1), 1.0)))


def warmup_then_inverse_root(step: int, warmup: int) -> float:
    """The Transformer's: up to one in a line, then down with the root of the step, which is counted from 1.

    With `noam_peak` for the peak it is the paper's d^-0.5 min(step^-0.5, step warmup^-1.5).
    """
    step = max(step, 1)
    return min(step / max(warmup, 1), (max(warmup, 1) / step) ** 0.5)


def warmup_then_line(step: int, warmup: int, steps: int) -> float:
    """BERT's: up to one in a line, then down to zero in another; the step is counted from 1."""
    if step < warmup:
        return step / warmup
    return max(steps - step, 0) / max(steps - warmup, 1)


def noam_peak(dim: int, warmup: int) -> float:
    """The learning rate at which the paper's schedule turns."""
    return float((dim * warmup) ** -0.5)
