"""The registered loop of LSTM sequences, and its Triton kernels against the definition, for every feature.

On a CPU the kernels run in Triton's interpreter; on a GPU, where TRITON_INTERPRET=0 is set, compiled.
"""

import itertools

import pytest
import torch
from lamina.kernels import explain, lstm_sequence, use_backend
from lamina.kernels._lstm_loop import loop
from lamina.kernels.fused import _recurrent_graphs as graphs
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

pytestmark = pytest.mark.usefixtures("kernels_device")

FEATURES = ("peepholes", "gate_gain", "cell_gain", "projection", "lengths", "reverse")
BLOCK = ("peepholes", "lengths"), (4, 2, 300)  # units for more than one program, where none has all
TERMS = 4.0  # what a parameter's gradient sums over times and batch, and may cancel
both = pytest.mark.parametrize("backend", ["torch", "triton"])


def draw(names, sizes=(3, 2, 37), dtype=torch.float32):
    """The operation as a function of its differentiable inputs, giving one tensor; and these inputs.

    So many units that what is normalised over them does not vanish by chance, which would be all rounding.
    """
    steps, batch, size = sizes
    outputs = max(1, size // 2) if "projection" in names else size

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype).requires_grad_()

    tensors = {"peepholes": some(3, size)} if "peepholes" in names else {}
    if "gate_gain" in names:
        tensors["gate_gain"] = some(4 * size)
    if "cell_gain" in names:
        tensors |= {"cell_gain": some(size), "cell_bias": some(size)}
    if "projection" in names:
        tensors["projection"] = some(outputs, size)
    lengths = torch.randint(0, steps + 1, (batch,)) if "lengths" in names else None
    weight = (torch.randn(4 * size, outputs, dtype=dtype) / outputs**0.5).requires_grad_()

    def operation(projected, weight, hidden, memory, *rest):
        given = dict(zip(tensors, rest, strict=True))
        output, (hidden, memory) = lstm_sequence(
            projected, weight, (hidden, memory), lengths=lengths, reverse="reverse" in names, **given
        )
        return torch.cat([output.flatten(), hidden.flatten(), memory.flatten()])

    return operation, [
        some(steps, batch, 4 * size), weight, some(batch, outputs), some(batch, size), *tensors.values()
    ]  # fmt: skip


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", FEATURES)
def test_each_feature(name, dtype, compare):
    operation, inputs = draw([name], dtype=dtype)
    compare(operation, inputs, terms=TERMS)


@pytest.mark.parametrize("pair", itertools.combinations(FEATURES, 2), ids=" and ".join)
def test_each_pair_of_features(pair, compare):
    operation, inputs = draw(pair)
    compare(operation, inputs, terms=TERMS)


@pytest.mark.parametrize(
    ("names", "sizes"),
    [
        BLOCK,
        (FEATURES[:5], (2, 1, 130)),
        (FEATURES, (1, 3, 1)),
        ((), (67, 1, 3)),  # more than one chunk
        (FEATURES, (3, 0, 5)),
    ],
    ids=str,
)
def test_sizes(names, sizes, compare):
    operation, inputs = draw(names, sizes)
    compare(operation, inputs, terms=4 * TERMS)


def random_case(seed: int):
    """Sizes, features and a dtype, drawn over all that the kernels take."""
    torch.manual_seed(seed)

    def one_of(*options):
        return options[int(torch.randint(len(options), (), device="cpu"))]

    names = [n for n in FEATURES if torch.rand((), device="cpu") < 0.5]
    dtype = one_of(torch.float32, torch.float32, torch.float16, torch.bfloat16)
    normalises = "gate_gain" in names or "cell_gain" in names
    few = () if dtype.itemsize == 2 or normalises else (1, 2, 5, 8)  # of few the variance may be none
    sizes = (one_of(1, 2, 3, 5), one_of(1, 2), one_of(*few, 16, 17, 31, 64, 100, 257))
    return names, sizes, dtype


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=[pytest.mark.slow] if n >= 40 else []) for n in range(200)]
)
def test_random_shapes(seed, compare):
    names, sizes, dtype = random_case(seed)
    operation, inputs = draw(names, sizes, dtype)
    with use_backend("triton"):
        assert explain(lstm_sequence, *inputs[:2]).chosen == "triton"
    # A norm multiplies what cancels by one over a deviation, which may be small.
    normalises = "gate_gain" in names or "cell_gain" in names
    compare(operation, inputs, terms=(64 if normalises else 4) * TERMS)


@both
@pytest.mark.parametrize("place", [0, 1, 2, 3, 4, 5, 6, 8])
def test_gradients_of_some_inputs_alone(place, backend):
    operation, inputs = draw(FEATURES[:5], (2, 2, 5), torch.float64)
    with use_backend("reference"):
        out = operation(*inputs)
        cotangent = torch.randn_like(out)
        expected = torch.autograd.grad(out, inputs[place], cotangent)
    for n, tensor in enumerate(inputs):
        tensor.requires_grad_(n == place)
    with use_backend(backend):
        actual = torch.autograd.grad(operation(*inputs), inputs[place], cotangent)
    torch.testing.assert_close(actual, expected)


@both
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_cotangent_of_one_result_alone(which, backend):
    _, (projected, weight, hidden, memory) = draw((), (2, 2, 5), torch.float64)

    def result():
        output, state = lstm_sequence(projected, weight, (hidden, memory))
        return (output, *state)[which]

    with use_backend("reference"):
        expected = torch.autograd.grad(result(), [projected, weight, memory], torch.ones_like(result()))
    with use_backend(backend):
        actual = torch.autograd.grad(result(), [projected, weight, memory], torch.ones_like(result()))
    torch.testing.assert_close(actual, expected)


@both
@pytest.mark.parametrize("layout", ["batch first", "sliced", "transposed", "expanded"])
def test_inputs_of_any_stride(layout, backend, compare):
    def laid_out(t: Tensor) -> Tensor:
        t = t.detach()
        if layout == "batch first" and t.ndim == 3:
            return t.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "sliced":
            return torch.cat([t, t], -1)[..., : t.shape[-1]]
        if layout == "transposed" and t.ndim > 1:
            return t.mT.contiguous().mT
        return t[:1].expand(t.shape) if layout == "expanded" else t

    names = FEATURES[:5] if layout != "expanded" else ("peepholes", "projection", "lengths")
    operation, inputs = draw(names)
    compare(operation, [laid_out(t).requires_grad_() for t in inputs], backend, terms=TERMS)


@both
@pytest.mark.parametrize("how", ["stride 0", "transposed", "in part"])
def test_cotangents_of_any_stride(how, backend):
    _, (projected, weight, hidden, memory, peepholes) = draw(("peepholes",), (3, 2, 5), torch.float64)
    inputs = [projected, weight, hidden, memory, peepholes]
    cotangent = {
        "stride 0": torch.ones((), dtype=torch.float64).expand(3, 2, 5),
        "transposed": torch.randn(5, 2, 3, dtype=torch.float64).permute(2, 1, 0),
        "in part": torch.randn(3, 2, 10, dtype=torch.float64)[..., ::2],
    }[how]
    outcomes = []
    for path in "reference", backend:
        with use_backend(path):
            output, _ = lstm_sequence(projected, weight, (hidden, memory), peepholes=peepholes)
        outcomes.append(torch.autograd.grad(output, inputs, cotangent))
    torch.testing.assert_close(outcomes[1], outcomes[0])


@pytest.mark.parametrize("names", [("peepholes", "lengths"), FEATURES], ids=["peepholes", "all"])
def test_derivatives(names):
    operation, inputs = draw(names, (2, 1, 3), torch.float64)
    with use_backend("triton"):
        assert gradcheck(operation, inputs, fast_mode=True)
        if names is not FEATURES:  # the definition's: those of every feature are in test_lstm_sequence.py
            assert gradgradcheck(operation, inputs, fast_mode=True)


def test_without_gradients_nothing_is_kept():
    operation, inputs = draw(FEATURES, (3, 2, 5))
    with use_backend("triton"):
        expected = operation(*inputs).detach()
        with torch.no_grad():
            torch.testing.assert_close(operation(*inputs), expected, rtol=0, atol=0)
    projected, weight, hidden, memory, *parameters = inputs
    arguments = [projected, hidden, memory, weight, *parameters, torch.tensor([2, 1]), 1e-5, False]
    for fused in False, True:
        kept, nothing = (loop(*arguments, fused, kept)[2:] for kept in (True, False))
        assert not sum(t.numel() for t in nothing)
        assert [t.shape[0] for t in kept] == [4, 3, 3, 3]


@pytest.mark.parametrize(
    ("fused", "kept"),
    [
        (False, True),
        (True, False),
        pytest.param(False, False, marks=pytest.mark.slow),
        pytest.param(True, True, marks=pytest.mark.slow),
    ],
)
def test_is_registered(fused, kept):
    for names in (), FEATURES:
        _, (projected, weight, hidden, memory, *rest) = draw(names, (3, 2, 5))
        parameters = rest if names else [None] * 5
        lengths = torch.tensor([3, 1]) if names else None
        arguments = [projected, hidden, memory, weight, *parameters, lengths, 1e-5, bool(names)]
        if not kept:
            arguments = [t.detach() if isinstance(t, Tensor) else t for t in arguments]
        torch.library.opcheck(loop, [*arguments, fused, kept])


@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [
        ("torch", True),
        ("triton", False),
        pytest.param("torch", False, marks=pytest.mark.slow),
        pytest.param("triton", True, marks=pytest.mark.slow),
    ],
)
def test_compiles_whole_and_keeps_its_numbers(backend, dynamic):
    operation, inputs = draw(FEATURES[:5], (3, 2, 5))
    torch._dynamo.reset()
    compiled = torch.compile(operation, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with use_backend(backend):
        expected, actual = operation(*inputs), compiled(*inputs)
        cotangent = torch.randn_like(expected)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent)
        )


def test_one_graph_takes_any_number_of_steps():
    torch._dynamo.reset()
    compiled = torch.compile(lstm_sequence, fullgraph=True, backend="aot_eager", dynamic=True)
    weight = torch.randn(20, 5, requires_grad=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for steps in 7, 11, 70:
            projected = torch.randn(steps, 3, 20)
            torch.testing.assert_close(compiled(projected, weight), lstm_sequence(projected, weight))


@both
def test_backward_passes_are_equal(backend):
    operation, inputs = draw(FEATURES[:5], (3, 2, 5))
    torch.use_deterministic_algorithms(True)
    try:
        with use_backend(backend):
            out = operation(*inputs)
            cotangent = torch.randn_like(out)
            runs = [torch.autograd.grad(operation(*inputs), inputs, cotangent) for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@both
def test_autocast_casts_what_is_multiplied(backend, kernels_device):
    operation, inputs = draw(FEATURES[:5], (3, 2, 5))
    expected = operation(*inputs)
    with torch.autocast(kernels_device, torch.bfloat16), use_backend(backend):
        out = operation(*inputs)
        gradients = torch.autograd.grad(out, inputs, torch.randn_like(out), retain_graph=True)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.1)
    gradients += torch.autograd.grad(out, inputs, torch.randn_like(out))
    assert all(g.dtype is torch.float32 for g in gradients)


class Replayed:
    """In place of a CUDA graph: what it would do again, on the same memory."""

    def __init__(self, run):
        self.replay = run


@pytest.fixture
def recorded(monkeypatch):
    """As on a GPU, but that nothing is captured: recorded steps run again, on memory of their own."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(graphs, "_may_record", lambda tensor: len(tensor) >= graphs.SHORTEST)
        monkeypatch.setattr(graphs, "_capture", Replayed)
    graphs._recorded.clear()
    yield graphs._recorded
    graphs._recorded.clear()


@pytest.mark.parametrize("names", [("peepholes",), FEATURES], ids=["peepholes", "all"])
def test_recorded_steps_are_the_same_for_other_inputs(names, recorded):
    """The first call runs as it is, the second records, the third replays."""
    for call in range(3):
        operation, inputs = draw(names, (5, 2, 5))
        with use_backend("reference"):
            expected = operation(*inputs)
        with use_backend("triton"):
            actual = operation(*inputs)
        cotangent = torch.randn_like(expected)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            torch.autograd.grad(actual, inputs, cotangent),
            torch.autograd.grad(expected, inputs, cotangent),
            rtol=1e-4,
            atol=1e-4,
        )
        assert len(recorded) == 2  # four steps there and back; the fifth is alone
        assert all((entry is None) == (call == 0) for entry in recorded.values())


def test_few_graphs_are_kept_and_those_of_the_last_calls(recorded, monkeypatch):
    monkeypatch.setattr(graphs, "KEPT", 3)
    weight = torch.randn(4, 1)
    with use_backend("triton"), torch.no_grad():
        for batch in 1, 2, 1, 3, 4:
            lstm_sequence(torch.randn(4, batch, 4), weight)
    assert [key[3][0][1] for key in recorded] == [1, 3, 4]
    assert [entry is not None for entry in recorded.values()] == [True, False, False]


def test_nothing_is_recorded_where_it_must_not_be(kernels_device):
    steps = torch.zeros(8, 1, 4)
    assert graphs._may_record(steps) == (kernels_device == "cuda")
    assert not graphs._may_record(steps[:3])
    assert not graphs._may_record(None)
    torch.use_deterministic_algorithms(True)
    try:
        assert not graphs._may_record(steps)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", [("peepholes",), FEATURES], ids=["peepholes", "all"])
def test_graphs_on_a_gpu(names, dtype):
    """Replays, with their sizes changing in between, on streams of one's own, and captured by others."""
    graphs._recorded.clear()
    drawn = [draw(names, (steps, 8, 64), dtype) for steps in (70, 37, 128, 70, 37, 128, 70)]

    def outcome(operation, inputs):
        out = operation(*inputs)
        generator = torch.Generator("cuda").manual_seed(3)
        cotangent = torch.randn(out.shape, generator=generator, dtype=dtype)
        return [out, *torch.autograd.grad(out, inputs, cotangent)]

    with use_backend("triton"):
        replayed = [outcome(*one) for one in drawn]
        assert any(entry is not None for entry in graphs._recorded.values())
        with torch.cuda.stream(torch.cuda.Stream()):
            launched = [outcome(*one) for one in drawn]
        torch.cuda.synchronize()
        tolerance = 1e-4 if dtype is torch.float32 else 0.05
        for a, b in zip(replayed, launched, strict=True):
            for x, y in zip(a, b, strict=True):
                torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * float(y.abs().max()))
        operation, inputs = drawn[0]
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            captured = operation(*inputs)
        graph.replay()
        torch.testing.assert_close(captured, replayed[0][0], rtol=tolerance, atol=tolerance)


VARIANTS = ("peepholes", "norms", "peepholes norms lengths", "peepholes projection")
FITTING = ["bfloat16-512-peepholes norms lengths", "bfloat16-512-peepholes projection", "float32-5-norms"]
MORE = [f"bfloat16-512-{variant}" for variant in VARIANTS[:2]]
MORE += ["float16-2048-peepholes norms lengths", "float32-2048-norms"]
SPILLING = ["bfloat16-1000-peepholes norms lengths", "float32-4096-peepholes norms lengths"]


@pytest.mark.parametrize(
    ("cases", "spilled"),
    [
        pytest.param(FITTING, 0, id="fit"),
        pytest.param(MORE, 0, id="fit too", marks=pytest.mark.slow),
        pytest.param(SPILLING, 512, id="spill", marks=pytest.mark.slow),
    ],
)
def test_compiles_for_hopper(for_sm90, cases, spilled):
    """A program that normalises four thousand units spills some registers, of a thousand two."""
    compiled = for_sm90("lstm_sequence.py", *cases, spilled=spilled)
    assert [k["kernel"] for k in compiled] == ["_forward_kernel", "_backward_kernel"] * len(cases)
    assert not any(k["atomics"] for k in compiled)  # every run gives the same
