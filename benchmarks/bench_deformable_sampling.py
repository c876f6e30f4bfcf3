"""Deformable sampling at Deformable DETR's decoder and encoder, and the whole layer, beside transformers."""

import pytest
import torch
import torch.nn.functional as F
from lamina.kernels import deformable_sampling
from lamina.kernels.deformable_sampling import deformable_sampling_reference
from lamina.layers import DeformableAttention

IMAGE = [(100, 134), (50, 67), (25, 34), (13, 17)]  # the levels of a photograph of 800 x 1066
HALF = [(50, 67), (25, 34), (13, 17), (7, 9)]
SIZES = {"decoder-300": (2, 300, IMAGE), "encoder-4484": (1, 4484, HALF), "encoder-17821": (1, 17821, IMAGE)}
HEADS, POINTS, DIM = 8, 4, 32
LAYER = [(104, 136), (52, 68), (26, 34), (13, 17)]


def inputs(batch, queries, shapes):
    """Points some cells around a place of each query's own. None lies near the centre line of a cell, where
    the sample has a kink, and rounding would decide between two derivatives."""
    places = torch.rand(batch, queries, 1, 1, 1, 2)
    sides = torch.tensor([(w, h) for h, w in shapes]).view(-1, 1, 2)
    offsets = 2 * torch.randn(batch, queries, HEADS, len(shapes), POINTS, 2)
    pixels = (places * sides + offsets).floor() + 0.2 + 0.6 * torch.rand_like(offsets)
    weights = torch.randn(batch, queries, HEADS, len(shapes) * POINTS).softmax(-1)
    value = torch.randn(batch, sum(h * w for h, w in shapes), HEADS, DIM)
    return [value, (pixels + 0.5) / sides, weights.unflatten(-1, (len(shapes), POINTS))]


def by_grid_sample(value, shapes, locations, weights):
    out = 0
    for i, level in enumerate(value.split([h * w for h, w in shapes], 1)):
        maps = level.permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, shapes[i])
        grid = 2 * locations[:, :, :, i].transpose(1, 2).flatten(0, 1) - 1
        found = F.grid_sample(maps, grid, align_corners=False).unflatten(0, (len(value), HEADS))
        out = out + (found * weights[:, :, :, i].transpose(1, 2).unsqueeze(2)).sum(-1)
    return out.permute(0, 3, 1, 2)


def by_transformers(value, shapes, locations, weights):
    peer = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    sampled = peer.MultiScaleDeformableAttention()(value, None, shapes, None, locations, weights, 64)
    return sampled.unflatten(-1, (HEADS, DIM))


HOWS = {
    "lamina": deformable_sampling,
    "reference": deformable_sampling_reference,
    "grid_sample": by_grid_sample,
    "transformers": by_transformers,
}


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("how", HOWS)
def bench_deformable_sampling(benchmark, benchmark_op, how, sizes, direction):
    batch, queries, shapes = sizes
    if queries > 10_000 and (how == "reference" or direction != "forward"):
        pytest.skip("over a second a call")
    if how == "transformers":
        pytest.importorskip("transformers")
    benchmark.group = f"deformable_sampling {(batch, queries)} {direction}"
    other = by_grid_sample if how == "lamina" else deformable_sampling
    benchmark_op(
        lambda value, *at: HOWS[how](value, shapes, *at),
        inputs(batch, queries, shapes),
        backward=direction == "forward+backward",
        reference=lambda value, *at: other(value, shapes, *at),
        flops=9 * batch * queries * HEADS * len(shapes) * POINTS * DIM,
    )


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("how", ["lamina", "transformers"])
def bench_deformable_attention(benchmark, benchmark_op, how, direction):
    """The decoder's layer as it starts: its offsets are whole cells, so a lattice keeps off the kinks."""
    peer = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    benchmark.group = f"DeformableAttention {direction}"
    ours = DeformableAttention()
    torch.nn.init.normal_(ours.scores.weight, std=0.05)
    config = peer.DeformableDetrConfig(d_model=256, num_feature_levels=4)
    theirs = peer.DeformableDetrMultiscaleDeformableAttention(config, num_heads=HEADS, n_points=POINTS)
    pairs = [("sampling_offsets", "offsets"), ("attention_weights", "scores")]
    pairs += [("value_proj", "value"), ("output_proj", "out")]
    for their, our in pairs:
        getattr(theirs, their).load_state_dict(getattr(ours, our).state_dict())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours, theirs = ours.to(device), theirs.to(device)
    sides = torch.tensor([136, 104])
    places = ((torch.rand(2, 300, 2) * sides).floor() + 0.75) / sides
    shapes = torch.tensor(LAYER, device=device)

    def layer(query, value):
        return ours(query, places.to(query.device), value, LAYER)

    def other(query, value):
        return theirs(
            query,
            encoder_hidden_states=value,
            reference_points=places.to(query.device)[:, :, None].expand(-1, -1, 4, -1),
            spatial_shapes=shapes,
            spatial_shapes_list=LAYER,
        )[0]

    backward = direction == "forward+backward"
    of = [getattr(ours, our) for _, our in pairs], [getattr(theirs, their) for their, _ in pairs]
    parameters = [
        [p for module in modules for p in module.parameters()] if backward else () for modules in of
    ]
    timed = (layer, other) if how == "lamina" else (other, layer)
    parameters = parameters if how == "lamina" else parameters[::-1]
    benchmark_op(
        timed[0],
        [torch.randn(2, 300, 256), torch.randn(2, sum(h * w for h, w in LAYER), 256)],
        backward=backward,
        parameters=parameters[0],
        reference=timed[1],
        reference_parameters=parameters[1],
    )
