"""The additive score: its definition, and against it the Triton kernels and the tiles of a CPU."""

import pytest
import torch
from lamina.kernels import additive_scores, explain, use_backend
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

pytestmark = pytest.mark.usefixtures("kernels_device")

# Off the kernels' block grid, shorter than a block, and longer: (B, Lq, Lk, H).
SIZES = [
    (2, 3, 5, 7),
    (1, 1, 1, 1),
    (1, 33, 18, 6),
    (1, 67, 2, 5),
    (1, 1, 70, 9),
    (2, 3, 4, 70),
    (2, 0, 3, 5),
    (0, 2, 3, 5),
    (2, 3, 0, 5),
    (2, 3, 4, 0),
]
# What the tanh are of decides in which form they are taken: near zero, ordinary, beyond what factors can be.
SCALES = [1e-3, 0.2, 1.0, 6.0, 60.0]
BACKENDS = ["triton", "torch"]
TERMS = 1.0  # a score may be the small difference of larger ones


@pytest.fixture(params=BACKENDS)
def backend(request, kernels_device):
    if request.param == "torch" and kernels_device != "cpu":
        pytest.skip("the tiles are a CPU's")
    return request.param


def draw(sizes, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    batch, queries, keys, hidden = sizes
    query, key = (torch.randn(batch, n, hidden, dtype=dtype) * scale for n in (queries, keys))
    return [t.requires_grad_() for t in (query, key, torch.randn(hidden, dtype=dtype))]


def test_one_score_by_hand():
    query, key = torch.tensor([[[1.0, -2.0]]]), torch.tensor([[[0.5, 0.25]]])
    score = additive_scores(query, key, torch.tensor([3.0, 10.0]))
    assert score.item() == pytest.approx(3 * 0.905148 + 10 * -0.941376, abs=1e-5)


def test_derivatives_of_the_definition():
    inputs = draw((2, 3, 5, 7), torch.float64)
    with use_backend("reference"):
        assert gradcheck(additive_scores, inputs)
        assert gradgradcheck(additive_scores, inputs)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(sizes, backend, compare):
    compare(additive_scores, draw(sizes, torch.float32), backend, terms=TERMS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, backend, compare):
    compare(additive_scores, draw((2, 19, 7, 11), dtype), backend, terms=TERMS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", SCALES)
def test_is_as_exact_for_numbers_of_any_size(scale, dtype, backend, compare):
    """Without `terms`: of small numbers the scores have their own digits."""
    compare(additive_scores, draw((1, 17, 9, 29), dtype, scale), backend)


@pytest.mark.parametrize("scale", SCALES)
def test_float64_keeps_its_precision(scale, backend, compare):
    """There the definition, which is the measure too, errs by nothing."""
    compare(additive_scores, draw((1, 7, 9, 13), torch.float64, scale), backend, terms=32 * TERMS)


@pytest.mark.parametrize("scale", [1.0, 12.0])
def test_opposite_numbers_cancel(scale, backend, compare):
    """Then e^2a e^2b is 1, whatever its factors are."""
    query, key, energy = draw((1, 6, 9, 8), torch.float32, scale)
    key = (-query.detach()[:, :1] + 1e-2 * key.detach()).requires_grad_()
    compare(additive_scores, [query, key, energy], backend, terms=TERMS)


def test_tiles_of_each_form_beside_each_other(backend, compare):
    """A program looks at its own tokens alone: large ones elsewhere change nothing."""
    query, key, energy = (t.detach() for t in draw((2, 40, 10, 6), torch.float32, 0.1))
    query[0, :16] *= 300
    key[1] *= 30
    compare(additive_scores, [t.requires_grad_() for t in (query, key, energy)], backend, terms=TERMS)


@pytest.mark.parametrize("special", [torch.inf, -torch.inf, torch.nan])
def test_infinities_and_nan_give_what_the_definition_gives(special, backend):
    inputs = [t.detach() for t in draw((2, 3, 5, 7), torch.float32)]
    inputs[0][1, 2, 3] = special
    with use_backend("reference"):
        expected = additive_scores(*inputs)
    with use_backend(backend):
        actual = additive_scores(*inputs)
    torch.testing.assert_close(actual, expected, equal_nan=True, atol=1e-5, rtol=1e-5)
    assert actual[0].isfinite().all()


def random_case(seed: int):
    torch.manual_seed(seed)

    def one_of(*options):
        return options[int(torch.randint(len(options), (), device="cpu"))]

    lengths = one_of(1, 2, 15, 16, 17), one_of(1, 3, 8)
    sizes = (one_of(1, 2), *lengths, one_of(1, 2, 3, 5))
    return sizes, one_of(torch.float32, torch.float16, torch.bfloat16), one_of(*SCALES)


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=[pytest.mark.slow] if n >= 40 else []) for n in range(200)]
)
def test_random_shapes(seed, backend, compare):
    sizes, dtype, scale = random_case(seed)
    compare(additive_scores, draw(sizes, dtype, scale), backend, terms=TERMS)


@pytest.mark.parametrize("cells", [1, 300, 4000])
def test_the_tiles_of_a_cpu_may_be_of_any_size(cells, compare, monkeypatch, kernels_device):
    from lamina.kernels import _additive_tiles

    if kernels_device != "cpu":
        pytest.skip("the tiles are a CPU's")
    monkeypatch.setattr(_additive_tiles, "CELLS", cells)
    for scale in 0.1, 1.0, 60.0:
        compare(additive_scores, draw((5, 11, 13, 7), torch.float32, scale), "torch", terms=TERMS)


@pytest.mark.parametrize("batches", [1, 2000])
def test_the_kernels_tiles_may_be_of_any_size(batches, compare, monkeypatch):
    from lamina.kernels.fused import _additive_launch

    monkeypatch.setattr(_additive_launch, "_PROGRAMS", batches)  # 1: the largest tiles; 2000: the smallest
    compare(additive_scores, draw((1, 66, 3, 3), torch.float32), terms=TERMS)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_inputs_of_any_stride(layout, backend, compare):
    def laid_out(t: Tensor) -> Tensor:
        if layout == "transposed":
            return t.mT.contiguous().mT if t.ndim > 1 else t.repeat_interleave(2)[::2]
        if layout == "sliced":
            return torch.cat([t, t], -1)[..., : t.shape[-1]]
        return t[:1].expand(t.shape)

    inputs = [laid_out(t.detach()).requires_grad_() for t in draw((2, 3, 5, 7), torch.float32)]
    compare(additive_scores, inputs, backend, terms=TERMS)


@pytest.mark.parametrize("how", ["stride 0", "transposed", "in part"])
def test_cotangents_of_any_stride(how, backend):
    inputs = draw((2, 5, 3, 4), torch.float32)
    cotangent = {
        "stride 0": torch.ones(()).expand(2, 5, 3),
        "transposed": torch.randn(3, 5, 2).permute(2, 1, 0),
        "in part": torch.randn(2, 5, 6)[..., ::2],
    }[how]
    found = []
    for path in "reference", backend:
        with use_backend(path):
            found.append(torch.autograd.grad(additive_scores(*inputs), inputs, cotangent))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("wanted", [[0], [1], [2], [0, 2], [1, 2], [0, 1]])
def test_gradients_of_some_inputs_alone(wanted, backend):
    inputs, cotangent = draw((2, 5, 3, 4), torch.float32), torch.randn(2, 5, 3)
    with use_backend("reference"):
        expected = torch.autograd.grad(additive_scores(*inputs), inputs, cotangent)
    for n, tensor in enumerate(inputs):
        tensor.requires_grad_(n in wanted)
    with use_backend(backend):
        actual = torch.autograd.grad(additive_scores(*inputs), [inputs[n] for n in wanted], cotangent)
    torch.testing.assert_close(actual, tuple(expected[n] for n in wanted))


def test_first_and_second_derivatives(backend):
    inputs = draw((1, 2, 2, 1), torch.float64)  # each element costs runs of the interpreter
    with use_backend(backend):
        assert gradcheck(additive_scores, inputs)
        assert gradgradcheck(additive_scores, inputs)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("path", ["reference", "triton", "torch", None])
def test_compiles_whole_and_keeps_its_numbers(path, dynamic):
    from contextlib import nullcontext

    inputs, cotangent = draw((2, 3, 5, 7), torch.float32), torch.randn(2, 3, 5)
    expected = torch.autograd.grad(additive_scores(*inputs), inputs, cotangent)
    compiled = torch.compile(additive_scores, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with nullcontext() if path is None else use_backend(path):
        actual = torch.autograd.grad(compiled(*inputs), inputs, cotangent)
    torch.testing.assert_close(actual, expected)


def test_compiled_once_for_all_lengths(kernels_device):
    compiled = torch.compile(additive_scores, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.compiler.set_stance("default"):
        compiled(*draw((2, 3, 5, 7), torch.float32))
    with torch.compiler.set_stance("fail_on_recompile"):
        for queries, keys in (2, 9), (40, 31), (300, 20):
            inputs = draw((2, queries, keys, 7), torch.float32)
            torch.testing.assert_close(compiled(*inputs), additive_scores(*inputs))


def test_both_are_registered(kernels_device):
    from lamina.kernels._additive_tiles import tiled_scores
    from lamina.kernels.fused.additive_scores import additive_scores as fused

    torch.library.opcheck(fused, draw((2, 3, 5, 7), torch.float32))
    if kernels_device == "cpu":
        torch.library.opcheck(tiled_scores, draw((2, 3, 5, 7), torch.float32))


def test_backward_passes_are_equal(backend):
    inputs, cotangent = draw((1, 17, 2, 3), torch.float32), torch.randn(1, 17, 2)
    torch.use_deterministic_algorithms(True)
    try:
        with use_backend(backend):
            runs = [torch.autograd.grad(additive_scores(*inputs), inputs, cotangent) for _ in range(6)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_autocast_brings_the_inputs_together(kernels_device):
    query, key, energy = draw((2, 3, 5, 7), torch.float32)
    for path in "reference", "triton", "torch":
        with torch.autocast(kernels_device, torch.bfloat16), use_backend(path):
            assert additive_scores(query.bfloat16(), key.bfloat16(), energy).dtype is torch.bfloat16


@pytest.mark.filterwarnings("ignore:additive_scores does not run on:UserWarning")
def test_forward_derivatives_take_the_definition(backend):
    inputs = [t.detach() for t in draw((2, 3, 5, 7), torch.float64)]
    tangents = [torch.randn_like(t) for t in inputs]
    with use_backend(backend):
        _, actual = torch.func.jvp(additive_scores, tuple(inputs), tuple(tangents))
    with use_backend("reference"):
        _, expected = torch.func.jvp(additive_scores, tuple(inputs), tuple(tangents))
    assert actual.abs().max() > 0
    torch.testing.assert_close(actual, expected)


def test_transforms_take_the_definition_on_a_cpu(kernels_device):
    if kernels_device != "cpu":
        pytest.skip("the tiles are a CPU's")
    inputs = [t.detach() for t in draw((2, 60, 60, 40), torch.float64)]
    assert explain(additive_scores, *inputs).chosen == "torch"
    gradient = torch.func.grad(lambda *t: additive_scores(*t).sum())(*inputs)
    leaves = [t.requires_grad_() for t in inputs]
    torch.testing.assert_close(gradient, torch.autograd.grad(additive_scores(*leaves).sum(), leaves[0])[0])


def test_on_a_cpu_the_sizes_decide(kernels_device):
    if kernels_device != "cpu":
        pytest.skip("the tiles are a CPU's")

    def told(*sizes: int):
        return explain(additive_scores, *draw(sizes, torch.float32))

    assert told(2, 64, 32, 33).chosen == "torch"
    assert told(2, 64, 32, 32).chosen == "reference"
    assert told(2, 3, 500, 64).chosen == told(2, 500, 3, 64).chosen == "reference"
    assert "the definition is as fast on a CPU" in told(2, 3, 5, 7).refusals["torch"]
    assert "not on a CUDA device" in told(2, 3, 5, 7).refusals["triton"]
    with use_backend("torch"):
        assert told(2, 3, 5, 7).chosen == "torch"


def test_dtypes_must_agree():
    query, key, energy = draw((2, 3, 5, 7), torch.float32)
    with pytest.raises(ValueError, match=r"share one dtype, got torch.float32, torch.float64"):
        additive_scores(query, key.double(), energy)


@pytest.mark.parametrize(
    "shapes", [((2, 3, 4), (2, 5, 6), (4,)), ((2, 3, 4), (1, 5, 4), (4,)), ((3, 4), (5, 4), (4,))]
)
def test_wrong_shapes_are_named(shapes):
    with pytest.raises(ValueError, match=r"expected query \(B, Lq, H\)"):
        additive_scores(*map(torch.randn, shapes))


@pytest.mark.parametrize(
    ("dtype", "cases"),
    [
        ("bfloat16", "step document"),
        ("float32", "translation"),
        pytest.param("bfloat16", "translation page", marks=pytest.mark.slow),
        pytest.param("float32", "step page document", marks=pytest.mark.slow),
        pytest.param("float16", "document", marks=pytest.mark.slow),
    ],
)
def test_compiles_for_hopper(for_sm90, dtype, cases):
    compiled = for_sm90("additive_scores.py", *(f"{dtype}-{case}" for case in cases.split()))
    expected = ["spread_kernel"] * 2 + ["scores_kernel"] + ["spread_kernel"] * 2 + ["backward_kernel"] * 2
    assert [kernel["kernel"] for kernel in compiled] == expected * len(cases.split())
    assert all(kernel["atomics"] == 0 for kernel in compiled)


@pytest.mark.gpu
def test_addresses_beyond_31_bits():
    inputs = [torch.randn(*shape, dtype=torch.bfloat16) for shape in ((40, 2**16, 16), (40, 1024, 16), (16,))]
    with use_backend("triton"):
        scores = additive_scores(*inputs)  # 2.7e9 of them
    with use_backend("reference"):
        expected = additive_scores(inputs[0][-1:, -8:], inputs[1][-1:], inputs[2])
    torch.testing.assert_close(scores[-1:, -8:], expected, atol=5e-2, rtol=2e-2)
