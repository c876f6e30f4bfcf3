"""What an input must be, asked before any work: errors name the argument, what was found, what is wanted."""

import torch
from torch import Tensor


def check_mask(name: str, mask: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raises ValueError where `mask` is not boolean or does not broadcast to `shape`."""
    if mask is None:
        return
    if mask.dtype is not torch.bool:
        raise ValueError(
            f"{name} must be boolean with True where a place takes part, got {mask.dtype}; "
            "a float to add to the scores is `bias`"
        )
    check_broadcast(name, mask, shape)


def check_broadcast(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError where `tensor` does not broadcast to `shape`."""
    fits = tensor.ndim <= len(shape)
    if fits and tensor.ndim:
        wanted = shape[-tensor.ndim :]
        fits = all(have == 1 or have == want for have, want in zip(tensor.shape, wanted, strict=True))
    if not fits:
        raise ValueError(f"{name} must broadcast to {tuple(shape)}, got {tuple(tensor.shape)}")


def check_key_mask(key_mask: Tensor | None, shape: tuple[int, int], letters: str = "(B, Lk)") -> None:
    """Raises ValueError where `key_mask` is not boolean, or is no matrix that broadcasts to `shape`."""
    if key_mask is not None and key_mask.ndim != 2:
        raise ValueError(f"key_mask must be {letters} = {tuple(shape)}, got {tuple(key_mask.shape)}")
    check_mask("key_mask", key_mask, shape)


def check_bias(bias: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raises ValueError where `bias` is no float, or does not broadcast to the scores' `shape`."""
    if bias is None:
        return
    if not bias.is_floating_point():
        raise ValueError(
            f"bias must be a float that is added to the scores, got {bias.dtype}; a bool is `mask`"
        )
    check_broadcast("bias", bias, shape)


def check_dropout(dropout: float) -> None:
    """Raises ValueError where `dropout` is no probability below one."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")


def check_key_lengths(key_lengths: Tensor | None, batch: int) -> None:
    """Raises ValueError where `key_lengths` is no vector of `batch` integers; which ones is not looked at."""
    if key_lengths is None:
        return
    integers = not key_lengths.is_floating_point() and key_lengths.dtype is not torch.bool
    if tuple(key_lengths.shape) != (batch,) or not integers:
        found = f"{tuple(key_lengths.shape)} of {key_lengths.dtype}"
        raise ValueError(f"key_lengths must be ({batch},) of integers, got {found}")


def check_window(window: tuple[int | None, int | None] | None) -> None:
    """Raises ValueError where `window` is no pair of bounds, each None or not negative."""
    if window is not None and (len(window) != 2 or any(bound is not None and bound < 0 for bound in window)):
        raise ValueError(f"window must be (before, after), each None or at least 0, got {window}")
