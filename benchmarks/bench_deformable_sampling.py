"""Deformable sampling at Deformable DETR's decoder and encoder, and the whole layer, beside transformers.

On a GPU the kernel is timed in bfloat16 too. The peers then sample in float32: of locations in half precision
they would be off by a part of a cell.
"""

import pytest
import torch
import torch.nn.functional as F
from lamina.kernels import deformable_sampling, use_backend
from lamina.kernels.deformable_sampling import deformable_sampling_reference
from lamina.layers import DeformableAttention

GPU = torch.cuda.is_available()
DTYPES = ("float32", "bfloat16") if GPU else ("float32",)  # a CPU is not asked for halves
IMAGE = [(100, 134), (50, 67), (25, 34), (13, 17)]  # the levels of a photograph of 800 x 1066
HALF = [(50, 67), (25, 34), (13, 17), (7, 9)]
SIZES = {"decoder-300": (2, 300, IMAGE), "encoder-4484": (1, 4484, HALF), "encoder-17821": (1, 17821, IMAGE)}
if GPU:
    SIZES |= {"encoder-2x17821": (2, 17821, IMAGE)}
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
    for i, level in enumerate(value.float().split([h * w for h, w in shapes], 1)):
        maps = level.permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, shapes[i])
        grid = 2 * locations[:, :, :, i].transpose(1, 2).flatten(0, 1) - 1
        found = F.grid_sample(maps, grid, align_corners=False).unflatten(0, (len(value), HEADS))
        out = out + (found * weights[:, :, :, i].transpose(1, 2).unsqueeze(2)).sum(-1)
    return out.permute(0, 3, 1, 2).to(value.dtype)


def by_transformers(value, shapes, locations, weights):
    peer = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    of = peer.MultiScaleDeformableAttention()
    sampled = of(value.float(), None, shapes, None, locations, weights, 64)
    return sampled.unflatten(-1, (HEADS, DIM)).to(value.dtype)


def by_msda_triton(value, shapes, locations, weights):
    """Its own choice would sample by `grid_sample` where its kernel fails, without a word."""
    peer = pytest.importorskip("msda_triton.frontend")
    sides = torch.tensor(shapes, device=value.device)
    sampled = peer.triton_multiscale_deformable_attention(
        value.float(), sides, locations, weights, "zeros", False
    )
    return sampled.to(value.dtype)


def on(backend):
    def sampled(*inputs):
        with use_backend(backend):
            return deformable_sampling(*inputs)

    return sampled


def determined(deterministic):
    def sampled(*inputs):
        torch.use_deterministic_algorithms(deterministic)  # left so, as it is the backward pass that asks
        return deformable_sampling(*inputs)

    return sampled


HOWS = {
    "lamina": deformable_sampling,
    "reference": deformable_sampling_reference,
    "grid_sample": by_grid_sample,
    "transformers": by_transformers,
}
if GPU:
    HOWS |= {
        "deterministic": determined(True),
        "torch": on("torch"),
        "compiled grid_sample": torch.compile(by_grid_sample),
        "msda_triton": by_msda_triton,
    }


@pytest.fixture
def any_algorithm():
    yield
    torch.use_deterministic_algorithms(False)


def least_bytes(value, locations, weights, backward):
    """Everything read or written once; the sums of the values' gradient are in float32."""
    outputs = weights[..., 0, 0].numel() * DIM * value.element_size()
    moved = value.nbytes + locations.nbytes + weights.nbytes + outputs
    return moved + backward * (moved + locations.nbytes + weights.nbytes + 4 * value.numel())


@pytest.mark.usefixtures("any_algorithm")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("how", HOWS)
def bench_deformable_sampling(benchmark, benchmark_op, how, sizes, direction, dtype):
    batch, queries, shapes = sizes
    backward = direction == "forward+backward"
    if not GPU and queries > 10_000 and (how == "reference" or backward):
        pytest.skip("over a second a call")
    if how == "deterministic" and not backward:
        pytest.skip("its forward pass is the same")
    if how == "transformers":
        pytest.importorskip("transformers")
    if how == "msda_triton":
        pytest.importorskip("msda_triton")
    benchmark.group = f"deformable_sampling {(batch, queries)} {dtype} {direction}"
    other = {"lamina": by_grid_sample, "deterministic": determined(False)}.get(how, deformable_sampling)
    value, locations, weights = inputs(batch, queries, shapes)
    value = value.to(getattr(torch, dtype))
    benchmark_op(
        lambda value, *at: HOWS[how](value, shapes, *at),
        [value, locations, weights],
        backward=backward,
        reference=lambda value, *at: other(value, shapes, *at),
        flops=(40 if backward else 10) * batch * queries * HEADS * len(shapes) * POINTS * DIM,
        bytes_moved=least_bytes(value, locations, weights, backward),
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
