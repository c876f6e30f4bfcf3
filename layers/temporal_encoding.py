"""How long ago a memory was (Sukhbaatar et al., 2015, section 4.1), and the noise that regularises it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.checks import check_mask


class TemporalEncoding(nn.Module):
    """Adds to each memory a learned vector for its age: 1 for the most recent one.

    .. math:: m_i' = m_i + T(a_i)

    Ages count from the end, so the newest memory has the same vector in every story, however long. A memory
    of age 0 gets nothing: that is an empty slot. By default the last memory is the newest, or the last one in
    `key_mask`, and what is not in `key_mask` is empty.

    `LearnedPositions` counts from the start. In the released code the time is one more word of a sentence,
    weighted as the last one; here T is added as it is, as in the paper. Time and memory O(M C).

    Args:
        max_memories: rows of T: the highest age.
        dim: C, channels of a memory.
        std: deviation of the initial T, which is normal.
        device: where the parameter is.
        dtype: of the parameter.

    Shape:
        - memories: (B, M, dim)
        - ages: (B, M) of integers from 0 to `max_memories`, where they are not the default
        - key_mask: (B, M) of bool, True where a slot holds a memory
        - output: as memories

    Raises:
        ValueError: the memories have not `dim` channels; there are more than `max_memories` of them and no
            ages; `ages` are no integers or do not fit; `key_mask` is not boolean or does not fit.

    Reference:
        Sukhbaatar, Szlam, Weston, Fergus. End-To-End Memory Networks. NIPS 2015. Section 4.1.

    Example:
        >>> encoding = TemporalEncoding(50, 8)
        >>> encoding(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        max_memories: int,
        dim: int,
        *,
        std: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.max_memories, self.std = max_memories, std
        self.weight = nn.Parameter(torch.empty(max_memories, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, std²)."""
        nn.init.normal_(self.weight, std=self.std)

    def forward(
        self, memories: Tensor, *, ages: Tensor | None = None, key_mask: Tensor | None = None
    ) -> Tensor:
        dim = self.weight.shape[1]
        if memories.ndim != 3 or memories.shape[-1] != dim:
            raise ValueError(f"memories must be (B, M, {dim}), got {tuple(memories.shape)}")
        slots = (memories.shape[0], memories.shape[1])
        check_mask("key_mask", key_mask, slots)
        if ages is None:
            check_count(slots[1], self.max_memories)
            if key_mask is None:
                return memories + self.weight[: slots[1]].flip(0)
            ages = recency(key_mask.expand(slots))
        check_ages(ages, slots)
        return memories + F.embedding(ages, self.rows())

    def rows(self) -> Tensor:
        """(1 + max_memories, dim): the vector of each age, zero for age 0."""
        return F.pad(self.weight, (0, 0, 1, 0))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}, std={self.std}"


def temporal_noise_ages(
    key_mask: Tensor, max_memories: int, *, noise: float = 0.1, generator: torch.Generator | None = None
) -> Tensor:
    """Ages of memories between which random gaps are left, the noise with which memory networks are trained.

    A story of T memories gets n more, empty, slots, n uniform on 0 … ceil(noise · T), at random places: the
    ages are a random subset of 1 … T + n, in order. No sentence is blanked out. Ages beyond `max_memories`
    are lowered to it, as in the released code.

    Args:
        key_mask: (B, M) of bool, True where a slot holds a memory, the newest last.
        max_memories: the highest age, rows of the `TemporalEncoding`.
        noise: the most empty slots, as a part of the memories; 0 for none.
        generator: from which the draws come, on the mask's device; torch's own stream where it is not given.

    Returns:
        (B, M) of int64: from 1, falling from memory to memory; 0 where `key_mask` is False.

    Raises:
        ValueError: `key_mask` is not a boolean (B, M), or `noise` is negative.

    Reference:
        Sukhbaatar et al. End-To-End Memory Networks. NIPS 2015. Section 4.1, "learning time invariance by
        injecting random noise", and the authors' released code.

    Example:
        >>> key_mask = torch.ones(1, 4, dtype=torch.bool)
        >>> temporal_noise_ages(key_mask, max_memories=50, noise=0.0)
        tensor([[4, 3, 2, 1]])
    """
    if key_mask.ndim != 2 or key_mask.dtype is not torch.bool:
        raise ValueError(
            f"key_mask must be a boolean (B, M), got shape {tuple(key_mask.shape)} of {key_mask.dtype}"
        )
    if noise < 0:
        raise ValueError(f"noise must be at least 0, got {noise}")
    batch, slots = key_mask.shape
    held = key_mask.sum(-1, keepdim=True)
    rounding = 1e-4  # in float32, 0.3 * 50 is a little more than 15
    most = (held * noise - rounding).ceil().clamp(min=0)
    uniform = torch.rand(batch, 1, generator=generator, device=key_mask.device)
    gaps = torch.minimum((uniform * (most + 1)).floor(), most)
    width = slots + max(0, math.ceil(slots * noise - rounding))
    place = torch.arange(width, device=key_mask.device)
    order = torch.rand(batch, width, generator=generator, device=key_mask.device)
    order = order.masked_fill(place >= held + gaps, 2.0)
    taken = order.argsort(-1).argsort(-1) < held
    ages = place.masked_fill(~taken, width).sort(-1).values + 1
    newest_first = recency(key_mask)
    ages = ages.gather(1, (newest_first - 1).clamp(min=0)).clamp(max=max_memories)
    return ages.masked_fill(newest_first == 0, 0)


def recency(key_mask: Tensor) -> Tensor:
    """(B, M): 1 for the last True of a row, 2 for the one before, and 0 where there is False."""
    return key_mask.flip(-1).cumsum(-1).flip(-1) * key_mask


def check_ages(ages: Tensor, slots: tuple[int, int]) -> None:
    """Raises ValueError where `ages` is not (B, M) of integers."""
    if tuple(ages.shape) != slots or ages.is_floating_point() or ages.dtype is torch.bool:
        raise ValueError(f"ages must be {slots} of integers, got {tuple(ages.shape)} of {ages.dtype}")


def check_count(memories: int, max_memories: int) -> None:
    """Raises ValueError where the default ages would go beyond the table."""
    if memories > max_memories:
        raise ValueError(
            f"memories must be at most max_memories={max_memories}, got {memories}: keep the newest, make "
            "the encoding larger, or give ages"
        )
