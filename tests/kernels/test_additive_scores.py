"""The additive score: its definition, and the Triton kernels against it."""

import pytest
import torch
from lamina.kernels import additive_scores, use_backend
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

pytestmark = pytest.mark.usefixtures("kernels_device")

# Off the kernels' block grid, shorter than a block, and longer: (B, Lq, Lk, H).
SIZES = [(2, 3, 5, 7), (1, 1, 1, 1), (2, 37, 41, 13), (1, 67, 2, 53), (2, 0, 3, 5), (0, 2, 3, 5)]


def draw(batch: int, queries: int, keys: int, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = (batch, queries, hidden), (batch, keys, hidden), (hidden,)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def test_one_score_by_hand():
    query, key = torch.tensor([[[1.0, -2.0]]]), torch.tensor([[[0.5, 0.25]]])
    score = additive_scores(query, key, torch.tensor([3.0, 10.0]))
    assert score.item() == pytest.approx(3 * 0.905148 + 10 * -0.941376, abs=1e-5)


def test_gradients_of_the_definition():
    inputs = draw(2, 3, 5, 7, torch.float64)
    assert gradcheck(additive_scores, inputs)
    assert gradgradcheck(additive_scores, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
def test_fused_is_as_exact_as_the_definition(sizes, dtype, compare):
    compare(additive_scores, draw(*sizes, dtype))


def test_fused_takes_inputs_of_any_stride(compare):
    query, key, energy = draw(2, 3, 5, 7, torch.float32)
    strided = (
        query.detach().mT.contiguous().mT,
        key.detach().mT.contiguous().mT,
        energy.detach().repeat_interleave(2)[::2],
    )
    compare(additive_scores, [t.requires_grad_() for t in strided])


def test_second_derivatives_of_the_fused_operation():
    inputs = draw(1, 2, 3, 2, torch.float64)  # each element costs runs of the interpreter
    with use_backend("triton"):
        assert gradgradcheck(additive_scores, inputs)


def test_fused_takes_a_transposed_gradient():
    inputs = draw(1, 5, 3, 2, torch.float32)
    cotangent = torch.randn(1, 3, 5).transpose(1, 2)
    expected = torch.autograd.grad(additive_scores(*inputs), inputs, cotangent)
    with use_backend("triton"):
        actual = torch.autograd.grad(additive_scores(*inputs), inputs, cotangent)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_compiles_whole_and_keeps_its_numbers(backend):
    inputs, cotangent = draw(2, 3, 5, 7, torch.float32), torch.randn(2, 3, 5)
    expected = torch.autograd.grad(additive_scores(*inputs), inputs, cotangent)
    compiled = torch.compile(additive_scores, fullgraph=True, dynamic=True)
    with use_backend(backend):
        actual = torch.autograd.grad(compiled(*inputs), inputs, cotangent)
    torch.testing.assert_close(actual, expected)


def test_fused_is_registered():
    from lamina.kernels.fused.additive_scores import additive_scores as fused

    torch.library.opcheck(fused, draw(2, 3, 5, 7, torch.float32))


def test_float64_keeps_its_precision(compare):
    compare(additive_scores, draw(2, 3, 5, 7, torch.float64))


def test_autocast_brings_the_inputs_together(kernels_device):
    query, key, energy = draw(2, 3, 5, 7, torch.float32)
    for backend in "reference", "triton":
        with torch.autocast(kernels_device, torch.bfloat16), use_backend(backend):
            assert additive_scores(query.bfloat16(), key.bfloat16(), energy).dtype is torch.bfloat16


def test_forward_derivatives_take_the_definition():
    inputs = [t.detach() for t in draw(2, 3, 5, 7, torch.float64)]
    tangents = [torch.randn_like(t) for t in inputs]
    with use_backend("triton"), pytest.warns(UserWarning, match="forward-mode"):
        _, actual = torch.func.jvp(additive_scores, tuple(inputs), tuple(tangents))
    with use_backend("reference"):
        _, expected = torch.func.jvp(additive_scores, tuple(inputs), tuple(tangents))
    assert actual.abs().max() > 0
    torch.testing.assert_close(actual, expected)


def test_dtypes_must_agree():
    query, key, energy = draw(2, 3, 5, 7, torch.float32)
    with pytest.raises(ValueError, match=r"share one dtype, got torch.float32, torch.float64"):
        additive_scores(query, key.double(), energy)


@pytest.mark.parametrize("shapes", [((2, 3, 4), (2, 5, 6), (4,)), ((2, 3, 4), (1, 5, 4), (4,))])
def test_wrong_shapes_are_named(shapes):
    with pytest.raises(ValueError, match=r"expected query \(B, Lq, H\)"):
        additive_scores(*map(torch.randn, shapes))
