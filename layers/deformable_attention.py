"""Multi-scale deformable attention (Zhu et al., 2021)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..kernels.checks import check_key_mask
from ..kernels.deformable_sampling import (
    check_length,
    check_spatial_shapes,
    deformable_sampling,
    sampling_weights,
)
from ._heads import head_size, start_projections


class DeformableAttention(nn.Module):
    """Each query looks at a few points around its reference point, in each level of a feature pyramid.

    .. math:: o_q = \\sum_h W_h \\left[ \\sum_{l, p} A_{hlqp} \\,
              (W'_h x^l)\\left( r_q + \\Delta_{hlqp} \\right) \\right],
              \\quad A_{hq} = \\operatorname{softmax}_{l, p}(W^A z_q), \\quad \\Delta_q = W^\\Delta z_q

    where x^l(r) is a bilinear sample of level l at the location r, zero outside of it. The offsets are
    predicted in cells of the level that they sample: a query with the reference point r looks at
    `r + offset / (w_l, h_l)`. A reference box (x, y, w, h) is sampled at `(x, y) + offset / P * (w, h) / 2`,
    so that at the start the last point of a head lies on its border. One level is the single-scale case.

    The signature is its own. Nothing is compared with a key: the places come from the query alone, so there
    are reference points and the levels' shapes in place of keys, and a `mask` or `bias` over queries and
    keys, or `is_causal`, would have nothing to act on. Values at which `key_mask` is False are zeroed after
    their projection, as in the original: a sample there still has its share of the attention.

    It equals `DeformableDetrMultiscaleDeformableAttention` of transformers, and the authors' CUDA operation,
    except that there is nothing to compile, that `spatial_shapes` are plain integers, and that half precision
    works: the locations stay in float32 whatever the dtype, also under autocast. `num_heads` need be no power
    of two. Time O(Lq (C² + C S P) + Lk C²), memory as that of `lamina.kernels.deformable_sampling`: linear in
    both lengths.

    Args:
        dim: C, size of a query and of the output.
        num_heads: H.
        num_levels: S.
        num_points: P, sampling points of a head in each level.
        value_dim: size of a value before its projection; `dim` where it is not given.
        bias: whether the projections of the values and of the output have one. Those of the offsets and of
            the weights always do: the first points lie where the bias of the offsets is.

    Shape:
        - query: (B, Lq, dim)
        - reference_points: (B, Lq, 2) or (B, Lq, S, 2) as (x, y), or (…, 4) as boxes (x, y, w, h), x and y of
          the centre. All in [0, 1] of a level; where the levels are padded, of the padded level.
        - value: (B, Lk, value_dim), the levels one after the other, each row by row
        - spatial_shapes: (h, w) of each level, as plain integers
        - key_mask: (B, Lk) of bool, True where a value takes part
        - output: (B, Lq, dim); a query that samples padding or the outside alone gives the bias of the output
          projection alone

    Raises:
        ValueError: the heads do not divide `dim`, a size is less than one, or a shape or mask does not fit.

    Reference:
        Zhu et al. Deformable DETR: Deformable Transformers for End-to-End Object Detection. ICLR 2021.
        Section 4.1 and appendix A.2, A.4.

    Example:
        >>> attention = DeformableAttention(64, num_heads=8, num_levels=2)
        >>> shapes = [(8, 12), (4, 6)]
        >>> query, reference_points = torch.randn(2, 5, 64), torch.rand(2, 5, 2)
        >>> attention(query, reference_points, torch.randn(2, 120, 64), shapes).shape
        torch.Size([2, 5, 64])
    """

    def __init__(
        self,
        dim: int = 256,
        num_heads: int = 8,
        *,
        num_levels: int = 4,
        num_points: int = 4,
        value_dim: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in ("num_heads", num_heads), ("num_levels", num_levels), ("num_points", num_points):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.head_dim = head_size(dim, num_heads)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.num_levels, self.num_points = dim, num_heads, num_levels, num_points
        samples = num_heads * num_levels * num_points
        self.offsets = nn.Linear(dim, 2 * samples, **factory)
        self.scores = nn.Linear(dim, samples, **factory)
        self.value = nn.Linear(dim if value_dim is None else value_dim, dim, bias=bias, **factory)
        self.out = nn.Linear(dim, dim, bias=bias, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in the paper: head h looks in the direction 2πh / H, its point p at p + 1 cells by the larger
        coordinate; all points weigh the same; the values and the output are Xavier-uniform with zero bias."""
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.scores.weight)
        nn.init.zeros_(self.scores.bias)
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1)
        offsets = directions[:, None, None] * steps[:, None]
        with torch.no_grad():
            self.offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        start_projections(self.value, self.out)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        *,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """The output, (B, Lq, dim). Shapes as above."""
        locations, weights = self.sampling(query, reference_points, spatial_shapes)
        check_length("value", value.shape[1], spatial_shapes)
        check_key_mask(key_mask, (value.shape[0], value.shape[1]))
        values = self.value(value)
        if key_mask is not None:
            values = values.masked_fill(~key_mask.unsqueeze(-1), 0.0)
        values = rearrange(values, "b n (h d) -> b n h d", h=self.num_heads)
        heads = deformable_sampling(values, spatial_shapes, locations, weights)
        return self.out(heads.flatten(2))

    def sampling(
        self, query: Tensor, reference_points: Tensor, spatial_shapes: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Where each query looks, (B, Lq, H, S, P, 2) as (x, y) in [0, 1] of the level, and how much it
        weighs what it finds there, (B, Lq, H, S, P), which sums to one over levels and points. At least
        float32."""
        self._check(query, reference_points, spatial_shapes)
        points = {"h": self.num_heads, "s": self.num_levels, "p": self.num_points}
        offsets = rearrange(self.offsets(query), "b l (h s p c) -> b l h s p c", **points, c=2)
        scores = self.scores(query).unflatten(-1, (self.num_heads, -1))
        dtype = torch.promote_types(torch.promote_types(reference_points.dtype, query.dtype), torch.float32)
        offsets, references = offsets.to(dtype), reference_points.to(dtype)
        if references.ndim == 3:
            references = references.unsqueeze(2)
        references = references[:, :, None, :, None]
        if references.shape[-1] == 2:
            cells = torch.tensor([(w, h) for h, w in spatial_shapes], dtype=dtype, device=query.device)
            locations = references + offsets / cells[:, None]
        else:
            locations = references[..., :2] + offsets * (references[..., 2:] * (0.5 / self.num_points))
        weights = scores.to(dtype).softmax(-1).unflatten(-1, (self.num_levels, -1))
        return locations, weights

    def weights(
        self,
        query: Tensor,
        reference_points: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        *,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """What each cell counts in each output, (B, H, Lq, Lk): `forward` is it times the projected values.

        A row sums to one where all its samples lie inside the levels and off the padding, else to less. For
        looking at: it is as large as the weights of an attention over all cells.
        """
        weights = sampling_weights(spatial_shapes, *self.sampling(query, reference_points, spatial_shapes))
        weights = weights.transpose(1, 2)
        check_key_mask(key_mask, (len(weights), weights.shape[-1]))
        return weights if key_mask is None else weights.masked_fill(~key_mask[:, None, None], 0.0)

    def extra_repr(self) -> str:
        points = f"num_levels={self.num_levels}, num_points={self.num_points}"
        return f"dim={self.dim}, num_heads={self.num_heads}, {points}"

    def _check(
        self, query: Tensor, reference_points: Tensor, spatial_shapes: Sequence[tuple[int, int]]
    ) -> None:
        check_spatial_shapes(spatial_shapes)
        if len(spatial_shapes) != self.num_levels:
            raise ValueError(
                f"spatial_shapes must have num_levels={self.num_levels} entries, got {len(spatial_shapes)}"
            )
        if query.ndim != 3 or query.shape[-1] != self.dim:
            raise ValueError(f"query must be (B, Lq, {self.dim}), got {tuple(query.shape)}")
        found = tuple(reference_points.shape)
        wanted = (*query.shape[:2], self.num_levels)[: len(found) - 1]
        if len(found) not in (3, 4) or found[:-1] != wanted or found[-1] not in (2, 4):
            raise ValueError(
                f"reference_points must be (B, Lq, 2 or 4) or (B, Lq, S, 2 or 4) with (B, Lq, S) = "
                f"{(*query.shape[:2], self.num_levels)}, got {found}"
            )
