"""The Triton kernels of deformable sampling against its definition.

On a CPU they run in Triton's interpreter; on a GPU, where TRITON_INTERPRET=0 is set, they are compiled.
"""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from lamina.kernels import deformable_sampling, explain, use_backend
from lamina.layers import DeformableAttention
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

pytestmark = pytest.mark.usefixtures("kernels_device")

FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
SHAPES = [(5, 7), (1, 3), (3, 1)]
SIZES = (2, 5, 2, 3, 20)  # B, Lq, H, P, D
# Of value, locations and weights.
KINDS = {
    "float32": (FLOAT32, FLOAT32, FLOAT32),
    "float16": (FLOAT16, FLOAT32, FLOAT32),
    "bfloat16": (BFLOAT16, FLOAT32, FLOAT32),
    "all float16": (FLOAT16, FLOAT16, FLOAT16),
    "all bfloat16": (BFLOAT16, BFLOAT16, BFLOAT16),
    "mixed": (FLOAT32, FLOAT32, BFLOAT16),
    "narrow locations": (FLOAT32, FLOAT16, FLOAT32),
    "wide weights": (BFLOAT16, FLOAT32, FLOAT64),
}
of_every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
both_ways = pytest.mark.parametrize("deterministic", [False, True], ids=["atomics", "deterministic"])


def draw(sizes=SIZES, shapes=SHAPES, kind=KINDS["float32"]) -> list[Tensor]:
    """Values, locations of which some lie outside, and weights of order one."""
    batch, queries, heads, points, dim = sizes
    samples = batch, queries, heads, len(shapes), points
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, dim)
    locations, weights = 1.6 * torch.rand(*samples, 2) - 0.3, torch.randn(samples)
    inputs = zip((value, locations, weights), kind, strict=True)
    return [t.to(dtype).requires_grad_() for t, dtype in inputs]


def sampled(shapes=SHAPES):
    return lambda value, locations, weights: deformable_sampling(value, shapes, locations, weights)


@contextmanager
def determinism(wanted: bool = True) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def gradients(backend: str, inputs: list[Tensor], cotangent: Tensor, shapes=SHAPES) -> list[Tensor]:
    """The output and the gradients of the inputs that take one."""
    with use_backend(backend):
        out = sampled(shapes)(*inputs)
    return [out, *torch.autograd.grad(out, [t for t in inputs if t.requires_grad], cotangent)]


def assert_as_the_definition(inputs: list[Tensor], cotangent: Tensor, shapes=SHAPES) -> None:
    expected, actual = (gradients(b, inputs, cotangent, shapes) for b in ("reference", "triton"))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@both_ways
@of_every_kind
def test_each_kind(kind, deterministic, compare):
    with determinism(deterministic):
        compare(sampled(), draw((1, 5, 2, 3, 20), kind=kind))


@pytest.mark.parametrize(
    ("sizes", "shapes"),
    [
        ((1, 1, 1, 1, 1), [(1, 1)]),
        ((1, 1, 1, 4, 32), [(9, 4), (5, 2), (3, 1), (2, 1), (1, 1)]),
        ((1, 33, 1, 1, 8), [(4, 4)]),  # a tile of queries and one more
        ((2, 3, 2, 9, 36), [(6, 5), (3, 2)]),  # more points than go together; off a power of two
        ((1, 3, 1, 5, 7), [(2, 9)] * 2),
        ((1, 5, 1, 2, 64), [(3, 5)]),
        ((1, 2, 1, 4, 128), [(3, 5)]),
        ((1, 2, 1, 3, 160), [(3, 5), (1, 2)]),  # more channels than a tile
        ((0, 3, 2, 2, 5), SHAPES),
        ((2, 0, 2, 2, 5), SHAPES),
        ((2, 3, 2, 0, 5), SHAPES),
        ((2, 3, 2, 2, 0), SHAPES),
        ((2, 3, 0, 2, 5), SHAPES),
    ],
    ids=str,
)
@both_ways
def test_sizes(sizes, shapes, deterministic, compare):
    with determinism(deterministic):
        compare(sampled(shapes), draw(sizes, shapes))


@both_ways
@pytest.mark.parametrize("sizes", [(1, 3, 1, 3, 20), (1, 2, 1, 5, 128), (1, 2, 1, 1, 160)], ids=str)
def test_tiles_as_on_a_gpu(sizes, deterministic, compare, monkeypatch):
    """In the interpreter they are larger."""
    from lamina.kernels.fused import deformable_sampling as fused

    monkeypatch.setattr(fused, "NUMBERS", 256)
    with determinism(deterministic):
        compare(sampled([(3, 2)]), draw(sizes, [(3, 2)]))


def random_case(seed: int):
    """Sizes, levels and dtypes, drawn over all that the kernel takes."""
    torch.manual_seed(seed)

    def one_of(*options):
        return options[int(torch.randint(len(options), (), device="cpu"))]

    points, dim = one_of(1, 2, 3, 4, 5, 8, 11), one_of(1, 3, 8, 16, 20, 32, 36, 72, 130)
    sizes = one_of(1, 1, 2), one_of(1, 2, 7, 17), one_of(1, 1, 2), points, dim
    shapes = [(one_of(1, 2, 5, 7), one_of(1, 3, 4, 11)) for _ in range(one_of(1, 1, 2, 4))]
    return sizes, shapes, one_of(*KINDS.values()), one_of(False, False, False, True)


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=[pytest.mark.slow] if n >= 40 else []) for n in range(200)]
)
def test_random_shapes(seed, compare):
    sizes, shapes, kind, deterministic = random_case(seed)
    inputs = draw(sizes, shapes, kind)
    with use_backend("triton"):
        assert explain(deformable_sampling, inputs[0], shapes, *inputs[1:]).chosen == "triton"
    with determinism(deterministic):
        compare(sampled(shapes), inputs)


@both_ways
@pytest.mark.parametrize("wanted", [w for n in (1, 2) for w in itertools.combinations(range(3), n)], ids=str)
def test_gradients_of_some_inputs_alone(wanted, deterministic):
    inputs = [t.detach().requires_grad_(n in wanted) for n, t in enumerate(draw((1, 5, 2, 3, 20)))]
    with determinism(deterministic):
        assert_as_the_definition(inputs, torch.randn(1, 5, 2, 20))


@both_ways
@pytest.mark.parametrize("how", ["stride 0", "transposed", "in part"])
def test_cotangents_of_any_stride(how, deterministic):
    cotangent = {
        "stride 0": torch.randn(()).expand(1, 5, 2, 20),
        "transposed": torch.randn(20, 2, 5, 1).permute(3, 2, 1, 0),
        "in part": torch.randn(1, 5, 2, 40)[..., ::2],
    }[how]
    with determinism(deterministic):
        assert_as_the_definition(draw((1, 5, 2, 3, 20)), cotangent)


@pytest.mark.parametrize("layout", ["transposed", "in part", "expanded"])
def test_inputs_of_any_stride(layout):
    def laid_out(t: Tensor) -> Tensor:
        if layout == "transposed":
            return t.transpose(1, -1).contiguous().transpose(1, -1)
        if layout == "in part":
            return torch.cat([t, t], -1)[..., : t.shape[-1]]
        return t[:1].expand(t.shape)

    inputs = [laid_out(t.detach()).requires_grad_() for t in draw()]
    assert_as_the_definition(inputs, torch.randn(2, 5, 2, 20))


@both_ways
@pytest.mark.parametrize("place", [-0.7, 1.7, 1e30, math.inf, -math.inf])
def test_outside_there_is_nothing_to_find_nor_to_learn(place, deterministic):
    inputs = draw((1, 3, 1, 2, 5), SHAPES[:2])
    inputs[1] = torch.full_like(inputs[1], place).requires_grad_()
    with determinism(deterministic):
        found = gradients("triton", inputs, torch.randn(1, 3, 1, 5), SHAPES[:2])
    assert all((t == 0).all() for t in found)


@both_ways
def test_a_location_that_is_nan_shows_and_harms_no_other(deterministic):
    value, locations, weights = draw()
    with torch.no_grad():
        whole = locations.clone()
        locations[0, 1, 0, 1, 2, 0] = math.nan
    cotangent = torch.randn(2, 5, 2, 20)
    with determinism(deterministic):
        out, of_value, of_locations, _ = gradients("triton", [value, locations, weights], cotangent)
    with use_backend("reference"):
        expected = sampled()(value, whole, weights)
    assert out[0, 1, 0].isnan().all()
    broken = gradients("reference", [value, locations, weights], cotangent)[2]
    torch.testing.assert_close(of_locations, broken, atol=1e-4, rtol=1e-4, equal_nan=True)
    assert of_value.isfinite().all()
    others = torch.ones(out.shape[:3], dtype=torch.bool)
    others[0, 1, 0] = False
    torch.testing.assert_close(out[others], expected[others])


def test_cells_that_no_sample_is_near_are_not_read():
    """Of samples outside, the definition reads the first cell, times zero."""
    value, locations, weights = draw((1, 7, 2, 3, 20), [(4, 6)])
    with torch.no_grad():
        drawn = torch.rand(locations.shape[:-1])
        locations[..., 0] = torch.where(drawn < 0.5, 0.35 + drawn / 2, 1 + drawn)  # off the outer columns
        value[:, ::6] = value[:, 5::6] = torch.nan
    found = gradients("triton", [value, locations, weights], torch.randn(1, 7, 2, 20), [(4, 6)])
    assert all(t.isfinite().all() for t in found)


@pytest.mark.parametrize("kind", [KINDS["float32"], KINDS["bfloat16"]], ids=["float32", "bfloat16"])
def test_its_derivative_at_the_centres_of_cells_is_that_of_the_definition(kind):
    """There the samples of a model lie at its start. Of two derivatives, rounding must choose the same."""
    shapes = [(7, 11), (13, 3)]
    value, locations, weights = draw((2, 60, 1, 1, 8), shapes, kind)
    cells = torch.stack([torch.randint(n, (*locations.shape[:3], 2, 1)) for n in (3, 7)], -1)
    sides = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float32).view(2, 1, 2)
    locations = ((cells + 0.5) / sides).requires_grad_()
    inputs = [value, locations, weights]
    cotangent = torch.randn(2, 60, 1, 8, dtype=value.dtype)
    expected, actual = (gradients(b, inputs, cotangent, shapes)[2] for b in ("reference", "triton"))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_half_precision_is_summed_in_float32():
    """512 samples of one cell, each a 512th of 4.004: in half precision they would not add up to it."""
    value = torch.full((1, 1, 1, 1), 4.004, dtype=FLOAT16)
    locations, weights = torch.full((1, 1, 1, 1, 512, 2), 0.5), torch.full((1, 1, 1, 1, 512), 1 / 512)
    with use_backend("triton"):
        out = deformable_sampling(value, [(1, 1)], locations, weights)
    assert out.dtype is FLOAT16
    assert torch.equal(out, value)


def test_thirty_backward_passes_are_equal(kernels_device):
    inputs = draw((1, 17, 1, 4, 8), [(2, 2)])  # many samples of each cell
    cotangent = torch.randn(1, 17, 1, 8)
    count = 30 if kernels_device == "cuda" else 3  # the interpreter has one thread
    with determinism(), use_backend("triton"):
        out = sampled([(2, 2)])(*inputs)
        runs = [torch.autograd.grad(out, inputs, cotangent, retain_graph=True) for _ in range(count)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_the_deterministic_pass_counts_in_as_many_bits_as_it_needs(monkeypatch):
    from lamina.kernels.fused import deformable_sampling as fused

    inputs = draw((1, 5, 2, 3, 20))
    cotangent = torch.randn(1, 5, 2, 20)
    sorted_in, collected = [], fused._collected

    def watched(call, keys, grad):
        sorted_in.append(keys.dtype)
        return collected(call, keys, grad)

    monkeypatch.setattr(fused, "_collected", watched)
    outcomes = []
    for bits in 31, 5:
        monkeypatch.setattr(fused, "NARROW", 2**bits)
        with determinism():
            outcomes.append(gradients("triton", inputs, cotangent))
    assert sorted_in == [torch.int32, torch.int64]
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@both_ways
def test_gradients(deterministic):
    shapes = [(2, 2), (1, 2)]
    inputs = draw((1, 2, 1, 1, 2), shapes, (FLOAT64,) * 3)
    with use_backend("triton"), determinism(deterministic):
        assert gradcheck(sampled(shapes), inputs, fast_mode=deterministic)
        assert deterministic or gradgradcheck(sampled(shapes), inputs, fast_mode=True)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_the_second_derivative_of_one_input_alone(wanted):
    inputs = [t.detach().requires_grad_(n == wanted) for n, t in enumerate(draw((1, 3, 2, 2, 3), [(2, 3)]))]

    def penalty(backend):
        with use_backend(backend):
            out = sampled([(2, 3)])(*inputs)
        (first,) = torch.autograd.grad(out.pow(3).sum(), inputs[wanted], create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), inputs[wanted])

    torch.testing.assert_close(penalty("triton"), penalty("reference"))


def test_forward_derivatives_take_the_definition():
    inputs = tuple(t.detach() for t in draw((1, 3, 2, 2, 5)))
    tangents = tuple(torch.randn_like(t) for t in inputs)
    with use_backend("triton"), pytest.warns(UserWarning, match="forward-mode"):
        _, actual = torch.func.jvp(sampled(), inputs, tangents)
    with use_backend("reference"):
        _, expected = torch.func.jvp(sampled(), inputs, tangents)
    torch.testing.assert_close(actual, expected)


def test_is_registered():
    from lamina.kernels.fused.deformable_sampling import deformable_sampling, deformable_sampling_backward

    value, locations, weights = draw((1, 3, 1, 2, 5), [(2, 3)])
    torch.library.opcheck(deformable_sampling, (value, [2, 3], locations, weights))
    value, locations, weights = (t.detach() for t in draw((1, 3, 1, 2, 5), [(2, 3)], KINDS["bfloat16"]))
    grad = torch.randn(1, 3, 1, 5, dtype=BFLOAT16)
    for needed in [True, True, True], [False, True, False]:
        inputs = grad, needed, value, [2, 3], locations, weights
        torch.library.opcheck(deformable_sampling_backward, inputs, test_utils="test_faketensor")


class Sampled(torch.nn.Module):
    """Of maps, whose sides the levels' shapes come from."""

    def forward(self, first, second, locations, weights):
        value = torch.cat([m.permute(0, 3, 4, 1, 2).flatten(1, 2) for m in (first, second)], 1)
        shapes = [(m.shape[3], m.shape[4]) for m in (first, second)]
        return deformable_sampling(value, shapes, locations, weights)


def maps(batch: int, queries: int, height: int, width: int) -> list[Tensor]:
    shapes = (height, width), (height + 1, 2)
    _, locations, weights = draw((batch, queries, 2, 3, 5), shapes)
    return [*(torch.randn(batch, 2, 5, *shape, requires_grad=True) for shape in shapes), locations, weights]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_and_keeps_its_numbers(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(Sampled(), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for sizes in [(2, 5, 3, 4), (3, 7, 4, 5)] if dynamic else [(2, 5, 3, 4)]:
        inputs = maps(*sizes)
        with use_backend("triton"):
            expected, actual = Sampled()(*inputs), compiled(*inputs)
        cotangent = torch.randn_like(expected)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent)
        )


def test_exports_saves_loads_and_gives_the_same_numbers(tmp_path):
    batch, queries = torch.export.Dim("batch"), torch.export.Dim("queries")
    height, width = torch.export.Dim("height"), torch.export.Dim("width")
    both = {0: batch, 1: queries}
    sides = {0: batch, 3: height, 4: width}, {0: batch, 3: height + 1}
    with use_backend("triton"):
        example = tuple(t.detach() for t in maps(2, 5, 3, 4))
        program = torch.export.export(Sampled(), example, dynamic_shapes=(*sides, both, both), strict=False)
    torch.export.save(program, tmp_path / "sampled.pt2")
    loaded = torch.export.load(tmp_path / "sampled.pt2")
    assert any("lamina.deformable_sampling" in str(node.target) for node in loaded.graph.nodes)
    for sizes in (2, 5, 3, 4), (3, 7, 4, 6):
        inputs = [t.detach() for t in maps(*sizes)]
        with use_backend("reference"):
            expected = Sampled()(*inputs)
        torch.testing.assert_close(loaded.module()(*inputs), expected)


def test_under_autocast_the_locations_stay_in_float32(kernels_device):
    layer = DeformableAttention(16, num_heads=2, num_levels=2, num_points=2).to(kernels_device)
    query, value, places = torch.randn(1, 5, 16), torch.randn(1, 18, 16), torch.rand(1, 5, 2)
    outcomes = []
    for backend in "reference", "triton":
        with torch.autocast(kernels_device, BFLOAT16), use_backend(backend):
            out = layer(query, places, value, [(3, 4), (2, 3)])
        outcomes.append([out, *torch.autograd.grad(out.float().pow(2).sum(), list(layer.parameters()))])
    assert out.dtype is BFLOAT16
    torch.testing.assert_close(*outcomes, atol=5e-2, rtol=5e-2)


def test_explain_says_why(kernels_device):
    value, locations, weights = draw((1, 3, 2, 2, 5))
    told = explain(deformable_sampling, value, SHAPES, locations, weights)
    if kernels_device == "cuda":
        assert told.chosen == "triton"
    else:
        assert told.chosen == "torch"
        assert told.refusals["triton"] == "the tensors are on cpu, not on a CUDA device"
    with use_backend("triton"):
        assert explain(deformable_sampling, value, SHAPES, locations, weights).chosen == "triton"
        narrow = weights.detach().to(torch.float8_e4m3fn)
        told = explain(deformable_sampling, value, SHAPES, locations, narrow)
    assert told.refusals["triton"] == "the kernel has no torch.float8_e4m3fn"
    assert told.chosen == "torch"


# Dtypes of values and places, head size, levels, points, and ways.
ALL_WAYS = ("forward", "backward", "values", "places", "deterministic")
THREE_WAYS = ("forward", "backward", "deterministic")
COMPILED = {
    "usual": [
        ("bfloat16-float32-32-4-4", THREE_WAYS),
        ("float32-float32-20-1-3", ALL_WAYS),
    ],
    "others": [
        ("float32-float32-32-4-4", ("forward", "backward")),
        ("float16-float32-36-1-8", ("forward", "backward")),
        ("bfloat16-float32-160-1-4", ("forward", "backward")),
        ("bfloat16-bfloat16-64-1-8", THREE_WAYS),
        ("float32-float32-32-5-16", THREE_WAYS),
        ("float16-float32-36-5-3", THREE_WAYS),
        ("float32-float32-7-4-4", THREE_WAYS),
        ("float32-float32-1-1-1", THREE_WAYS),
        ("float32-float32-128-5-16", THREE_WAYS),
        ("bfloat16-float32-256-5-8", THREE_WAYS),
        ("float64-float64-32-4-4", THREE_WAYS),
        ("bfloat16-float64-20-4-4", THREE_WAYS),
    ],
}


@pytest.mark.parametrize("configs", ["usual", pytest.param("others", marks=pytest.mark.slow)])
def test_compiles_for_hopper(for_sm90, configs):
    """The atomics take four channels each where a head has a multiple of four: a quarter as many."""
    launches = [(f"{name}-{way}", way) for name, ways in COMPILED[configs] for way in ways]
    compiled = for_sm90("deformable_sampling.py", *(case for case, _ in launches))
    for case, way in launches:
        found = [kernel for kernel in compiled if kernel["case"] == case]
        expected = ["forward_kernel" if way == "forward" else "backward_kernel"]
        expected += ["collect_kernel"] if way == "deterministic" else []
        assert [kernel["kernel"] for kernel in found] == expected
        for kernel in found:
            assert (kernel["atomics"] > 0) == (way in ("backward", "values")), kernel
            fours = int(case.split("-")[2]) % 4 == 0 and "float64" not in case
            assert kernel["vector_atomics"] == (kernel["atomics"] if fours else 0), kernel


def test_pictures_of_any_size_compile_no_kernel(for_sm90):
    compiled = for_sm90("deformable_sampling.py", "sizes 0", "sizes 1", "sizes 2")
    kernels = {(kernel["kernel"], kernel["hash"]) for kernel in compiled}
    # Of the backward kernel one has atomics and one has not.
    expected = ["backward_kernel", "backward_kernel", "collect_kernel", "forward_kernel"]
    assert sorted(name for name, _ in kernels) == expected


@pytest.mark.gpu
@both_ways
def test_a_cuda_graph_replays_forward_and_backward(deterministic):
    inputs, cotangent = draw((2, 50, 8, 4, 32)), torch.randn(2, 50, 8, 32)

    def step() -> list[Tensor]:
        out = sampled()(*inputs)
        return [out, *torch.autograd.grad(out, inputs, cotangent)]

    with determinism(deterministic), use_backend("triton"):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = step()
        fresh = draw((2, 50, 8, 4, 32))
        with torch.no_grad():
            for old, new in zip(inputs, fresh, strict=True):
                old.copy_(new)
        graph.replay()
        torch.testing.assert_close(replayed, step())


@pytest.mark.gpu
@both_ways
def test_addresses_beyond_31_bits(deterministic):
    batch, side, heads, dim = 9, 1024, 8, 32  # of the values 2.4e9 numbers
    value = torch.zeros(batch, side * side, heads, dim, dtype=BFLOAT16).requires_grad_()
    with torch.no_grad():
        value[-1, -1] = 3.0
    locations = torch.ones(batch, 1, heads, 1, 1, 2) - 0.5 / side
    weights = torch.ones(batch, 1, heads, 1, 1)
    with use_backend("triton"), determinism(deterministic):
        out = deformable_sampling(value, [(side, side)], locations, weights)
        (found,) = torch.autograd.grad(out, value, torch.ones_like(out))
    assert (out[-1] == 3).all()
    assert (out[:-1] == 0).all()
    assert (found[:, -1] == 1).all()
