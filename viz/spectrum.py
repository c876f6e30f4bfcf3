"""The spectrum of attention: how few singular values hold most of it."""

import torch
from torch import Tensor


def attention_spectrum(weights: Tensor) -> Tensor:
    """How much of an attention's matrices their largest singular values hold.

    .. math:: s_m = \\frac{\\sum_{i \\le m} \\sigma_i}{\\sum_i \\sigma_i}

    Near one at a small m, a matrix of rank m can stand for it.

    Args:
        weights: (B, H, Lq, Lk) or (H, Lq, Lk), such as `capture_attention` records.

    Returns:
        (H, min(Lq, Lk)) in float32 at least: s_1, s_2, …, the mean over the batch; the last is one. Zero
        where a matrix is zero.

    Raises:
        ValueError: `weights` has another shape, or is empty.

    Reference:
        Wang, Li, Khabsa, Fang, Ma. Linformer: Self-Attention with Linear Complexity. arXiv:2006.04768, 2020.
        Section 3 and figure 1.

    Example:
        >>> from lamina.viz import attention_spectrum
        >>> shares = attention_spectrum(torch.full((1, 2, 5, 5), 0.2))
        >>> [round(share, 4) for share in shares[:, 0].tolist()]  # all rows alike: rank one
        [1.0, 1.0]
    """
    if weights.ndim not in (3, 4) or weights.numel() == 0:
        raise ValueError(
            f"weights must be a non-empty (B, H, Lq, Lk) or (H, Lq, Lk), got shape {tuple(weights.shape)}"
        )
    precise = weights.detach().to(torch.promote_types(weights.dtype, torch.float32))
    values = torch.linalg.svdvals(precise)
    shares = values.cumsum(-1) / values.sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    return shares.mean(0) if weights.ndim == 4 else shares
