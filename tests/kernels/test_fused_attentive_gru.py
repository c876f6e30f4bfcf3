"""The registered loop of decoders that attend, and its Triton kernels against the definition.

On a CPU the kernels run in Triton's interpreter; on a GPU, where TRITON_INTERPRET=0 is set, compiled.
"""

import pytest
import torch
from lamina.kernels import attentive_gru, explain, use_backend
from lamina.kernels._attentive_gru_loop import loop
from lamina.kernels.fused import _recurrent_graphs as graphs
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

pytestmark = pytest.mark.usefixtures("kernels_device")

SIZES = (2, 2, 37, 17, 29, 19)  # T, B, H, C, A, S: a tile of keys and some
TERMS = 4.0  # what a parameter's gradient sums over times and batch, and may cancel
both = pytest.mark.parametrize("backend", ["torch", "triton"])


def draw(sizes=SIZES, dtype=torch.float32, mask=None):
    """The operation as a function of its inputs, giving one tensor; and the inputs."""
    steps, batch, size, channels, hidden, length = sizes

    def some(*shape: int, over: int = 1) -> Tensor:
        return (torch.randn(shape, dtype=dtype) / over**0.5).requires_grad_()

    key_mask = None
    if mask is not None:
        key_mask = torch.rand(batch, length) < mask

    def operation(*inputs):
        return torch.cat([t.flatten() for t in attentive_gru(*inputs, key_mask=key_mask)])

    return operation, [
        some(steps, batch, 3 * size),
        some(batch, size),
        some(3 * size, size, over=size),
        some(3 * size, channels, over=channels),
        some(hidden, size, over=size),
        some(batch, length, hidden),
        some(batch, length, channels),
        some(hidden),
    ]


@pytest.mark.parametrize("mask", [None, 0.6, 0.0])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
def test_each_dtype(dtype, mask, compare):
    operation, inputs = draw(dtype=dtype, mask=mask)
    compare(operation, inputs, terms=TERMS)


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 1, 1, 1),
        (1, 1, 130, 5, 3, 2),  # units, then channels, then hidden units of more than one program
        (1, 1, 5, 130, 3, 2),
        (1, 1, 5, 3, 130, 2),
        (67, 1, 3, 2, 2, 3),  # more than one chunk
        (3, 0, 5, 4, 3, 6),
    ],
    ids=str,
)
def test_sizes(sizes, compare):
    operation, inputs = draw(sizes)
    compare(operation, inputs, terms=4 * TERMS)


@both
def test_no_key_and_no_step(backend):
    for sizes in (3, 2, 5, 4, 3, 0), (0, 2, 5, 4, 3, 6):
        operation, inputs = draw(sizes, torch.float64)
        with use_backend("reference"):
            expected = operation(*inputs)
        with use_backend(backend):
            actual = operation(*inputs)
        torch.testing.assert_close(actual, expected)
        if sizes[0]:
            cotangent = torch.randn_like(expected)
            torch.testing.assert_close(
                torch.autograd.grad(actual, inputs[:4], cotangent),
                torch.autograd.grad(expected, inputs[:4], cotangent),
            )


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=[pytest.mark.slow] if n >= 40 else []) for n in range(120)]
)
def test_random_shapes(seed, compare):
    torch.manual_seed(seed)

    def one_of(*options):
        return options[int(torch.randint(len(options), (), device="cpu"))]

    dtype = one_of(torch.float32, torch.float32, torch.float16, torch.bfloat16)
    few = () if dtype.itemsize == 2 else (1, 3)  # of one rounding it is chance which path errs more
    sizes = (one_of(1, 2, 3), one_of(1, 2), *(one_of(*few, 16, 17, 64, 130) for _ in range(3)))
    sizes = (*sizes, one_of(1, 2, 15, 16, 17, 33))
    operation, inputs = draw(sizes, dtype, one_of(None, 0.3, 0.8))
    with use_backend("triton"):
        assert explain(attentive_gru, *inputs).chosen == "triton"
    compare(operation, inputs, terms=4 * TERMS)


@both
@pytest.mark.parametrize("place", range(8))
def test_gradients_of_some_inputs_alone(place, backend):
    operation, inputs = draw((2, 2, 3, 4, 5, 6), torch.float64)
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
    """And of any stride."""
    _, inputs = draw((3, 2, 3, 4, 5, 6), torch.float64)
    outcomes = []
    for path in "reference", backend:
        with use_backend(path):
            result = attentive_gru(*inputs)[which]
        cotangent = torch.arange(1.0, 1 + result.shape[2], dtype=torch.float64).expand(result.shape)
        outcomes.append(torch.autograd.grad(result, inputs, cotangent, materialize_grads=True))
    torch.testing.assert_close(outcomes[1], outcomes[0])


@both
@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded"])
def test_inputs_of_any_stride(layout, backend, compare):
    def laid_out(t: Tensor) -> Tensor:
        t = t.detach()
        if layout == "sliced":
            return torch.cat([t, t], -1)[..., : t.shape[-1]]
        if layout == "transposed" and t.ndim > 1:
            return t.mT.contiguous().mT
        return t[:1].expand(t.shape) if layout == "expanded" else t

    operation, inputs = draw(mask=0.6)
    compare(operation, [laid_out(t).requires_grad_() for t in inputs], backend, terms=TERMS)


def test_derivatives():
    operation, inputs = draw((2, 1, 2, 3, 2, 3), torch.float64)
    with use_backend("triton"):
        assert gradcheck(operation, inputs, fast_mode=True)
        assert gradgradcheck(operation, inputs, fast_mode=True)


@pytest.mark.parametrize("fused", [False, True])
def test_is_registered(fused):
    _, inputs = draw((2, 2, 3, 4, 5, 6))
    torch.library.opcheck(loop, [*inputs, torch.rand(2, 6) < 0.7, fused])
    inputs[0].requires_grad_(False)
    inputs[6].requires_grad_(False)
    torch.library.opcheck(loop, [*inputs, None, fused])


@both
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_and_keeps_its_numbers(backend, dynamic):
    operation, inputs = draw((2, 2, 3, 4, 5, 6), mask=0.7)
    torch._dynamo.reset()
    compiled = torch.compile(operation, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with use_backend(backend):
        expected, actual = operation(*inputs), compiled(*inputs)
        cotangent = torch.randn_like(expected)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent)
        )


@both
def test_backward_passes_are_equal(backend):
    operation, inputs = draw()
    torch.use_deterministic_algorithms(True)
    try:
        with use_backend(backend):
            cotangent = torch.randn_like(operation(*inputs))
            runs = [torch.autograd.grad(operation(*inputs), inputs, cotangent) for _ in range(4)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@both
def test_autocast_casts_what_is_multiplied(backend, kernels_device):
    operation, inputs = draw()
    expected = operation(*inputs)
    with torch.autocast(kernels_device, torch.bfloat16), use_backend(backend):
        out = operation(*inputs)
        gradients = torch.autograd.grad(out, inputs, torch.randn_like(out), retain_graph=True)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.1)
    gradients += torch.autograd.grad(out, inputs, torch.randn_like(out))
    assert all(g.dtype is torch.float32 for g in gradients)


@pytest.mark.parametrize("mask", [None, 0.6])
def test_recorded_steps_are_the_same_for_other_inputs(mask, monkeypatch, kernels_device):
    """As on a GPU, but that on a CPU nothing is captured: recorded steps run again, on their own memory."""

    class Replayed:
        def __init__(self, run):
            self.replay = run

    if kernels_device == "cpu":
        monkeypatch.setattr(graphs, "_may_record", lambda tensor: len(tensor) >= graphs.SHORTEST)
        monkeypatch.setattr(graphs, "_capture", Replayed)
    graphs._recorded.clear()
    for call in range(3):
        operation, inputs = draw((5, 2, 3, 4, 5, 6), mask=mask)
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
        assert [entry is None for entry in graphs._recorded.values()] == [call == 0] * 2
    graphs._recorded.clear()


FITTING = ["bfloat16-1000-50-mask", "float32-512-64", "float16-5-7-mask", "float32-512-8192-mask"]


def test_compiles_for_hopper(for_sm90):
    compiled = for_sm90("attentive_gru.py", *FITTING)
    there = ["_scores_kernel", "_context_kernel", "_reset_kernel", "_update_kernel"]
    back = ["_update_backward_kernel", "_reset_backward_kernel", "_scores_backward_kernel"]
    assert [k["kernel"] for k in compiled] == (there + back) * len(FITTING)
    assert not any(k["atomics"] for k in compiled)  # every run gives the same
