"""The sums of the vectors of each code: their definition, and the Triton kernel against it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.kernels import code_sums, explain, use_backend
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

pytestmark = pytest.mark.usefixtures("kernels_device")

# N, K, D: one, off the chunks, codes over several chunks, one code for all, codes without a vector.
SIZES = [
    (1, 1, 1),
    (63, 7, 5),
    (130, 2, 17),
    (193, 1, 67),
    (65, 500, 3),
    (300, 13, 130),
    (0, 3, 5),
    (7, 3, 0),
]


def draw(sizes, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    count, codes, dim = sizes
    return torch.randn(count, dim, dtype=dtype, requires_grad=True), torch.randint(codes, (count,))


@given(seed=st.integers(0, 2**31), codes=st.integers(1, 5), masked=st.booleans())
def test_definition_is_the_sum_of_those_that_chose_a_code(seed, codes, masked):
    torch.manual_seed(seed)
    x, indices = torch.randn(3, 5, 2, dtype=torch.float64), torch.randint(codes, (3, 5))
    mask = torch.rand(3, 5) < 0.6 if masked else None
    actual = code_sums(x, indices, codes, mask=mask)
    taking_part = torch.ones(3, 5, dtype=torch.bool) if mask is None else mask
    expected = torch.stack([x[(indices == k) & taking_part].sum(0) for k in range(codes)])
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_what_takes_no_part_has_no_influence(backend):
    x, indices, mask = torch.randn(70, 3), torch.randint(7, (70,)), torch.rand(70) < 0.5
    with use_backend(backend):
        expected = code_sums(x[mask], indices[mask], 7)
        x[~mask], indices[~mask] = torch.nan, 10**9
        torch.testing.assert_close(code_sums(x, indices, 7, mask=mask), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_fused_is_as_exact_as_the_definition(sizes, dtype, compare):
    x, indices = draw(sizes, dtype)
    compare(lambda x: code_sums(x, indices, sizes[1]), [x])


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=[pytest.mark.slow] if n >= 40 else []) for n in range(200)]
)
def test_random_cases(seed, compare):
    torch.manual_seed(seed)

    def one_of(*options):
        return options[int(torch.randint(len(options), (), device="cpu"))]

    codes, dim = one_of(1, 2, 3, 9, 40, 200), one_of(1, 2, 7, 16, 33, 64, 80)
    shape = one_of((1,), (64,), (129,), (2, 35), (3, 2, 17), (260,))
    dtype = one_of(torch.float32, torch.float16, torch.bfloat16)
    x = torch.randn(*shape, dim, dtype=dtype, requires_grad=True)
    popular = one_of(1, 1, 4)  # the higher, the more vectors have the first codes
    indices = (codes * torch.rand(shape) ** popular).to(one_of(torch.int64, torch.int32)).clamp_max(codes - 1)
    mask = one_of(None, torch.rand(shape) < 0.7, torch.zeros(shape, dtype=torch.bool))
    compare(lambda x: code_sums(x, indices, codes, mask=mask), [x])


def test_a_vector_that_is_no_number_stays_with_its_code():
    x, indices = torch.randn(60, 3), torch.arange(60) % 7
    x[9] = torch.nan
    with use_backend("triton"):
        sums = code_sums(x, indices, 7)
    assert sums[2].isnan().all()
    assert sums[[0, 1, 3, 4, 5, 6]].isfinite().all()


def test_inputs_and_cotangents_of_any_stride(compare):
    indices = torch.randint(5, (2, 40))
    for x in (
        torch.randn(2, 6, 40).mT,
        torch.randn(2, 40, 12)[..., ::2],
        torch.randn(1, 40, 6).expand(2, 40, 6),
    ):
        compare(lambda x: code_sums(x, indices, 5), [x.detach().requires_grad_()])
    x = torch.randn(2, 40, 6, requires_grad=True)
    cotangent = torch.randn(6, 1).expand(6, 5).mT
    with use_backend("triton"):
        (gradient,) = torch.autograd.grad(code_sums(x, indices.T.contiguous().T, 5), x, cotangent)
    assert torch.equal(gradient, cotangent[indices])


def test_gradients_to_second_order():
    x, indices = draw((5, 3, 2), torch.float64)
    mask = torch.tensor([True, True, False, True, True])
    for backend in "reference", "triton":
        with use_backend(backend):
            assert gradcheck(lambda x: code_sums(x, indices, 3, mask=mask), x)
            assert gradgradcheck(lambda x: code_sums(x, indices, 3, mask=mask), x)


def test_thirty_runs_are_equal():
    x, indices = draw((150, 4, 16))
    with use_backend("triton"):
        runs = [code_sums(x, indices, 4) for _ in range(30)]
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_sums_of_halves_are_float32_also_under_autocast(kernels_device):
    x, indices = draw((130, 3, 5), torch.bfloat16)
    with torch.autocast(kernels_device, torch.bfloat16), use_backend("triton"):
        sums = code_sums(x, indices, 3)
    assert sums.dtype is torch.float32
    (gradient,) = torch.autograd.grad(sums, x, torch.randn_like(sums))
    assert gradient.dtype is torch.bfloat16


def test_is_registered():
    from lamina.kernels.fused.code_sums import code_sums as fused

    torch.library.opcheck(fused, [*draw((70, 5, 3)), 5])
    torch.library.opcheck(fused, [*draw((9, 5, 3), torch.float16), 5])


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_and_keeps_its_numbers(backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(code_sums, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for count in 31, 70:
        x, indices = draw((count, 7, 3))
        mask, cotangent = torch.rand(count) < 0.7, torch.randn(7, 3)
        with use_backend(backend):
            expected, actual = (of(x, indices, 7, mask=mask) for of in (code_sums, compiled))
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, x, cotangent), torch.autograd.grad(expected, x, cotangent)
        )


def test_forward_derivatives_take_the_definition():
    x, indices = draw((9, 3, 2), torch.float64)
    with use_backend("triton"), pytest.warns(UserWarning, match="forward-mode"):
        _, tangent = torch.func.jvp(lambda x: code_sums(x, indices, 3), (x.detach(),), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, code_sums(torch.ones_like(x), indices, 3))


def test_says_which_path_runs():
    told = explain(code_sums, torch.randn(3, 5, device="cpu"), torch.zeros(3, dtype=torch.int64), 7)
    assert told.chosen == "reference"
    assert "not on" in told.refusals["triton"]


NONE = torch.zeros(3, dtype=torch.int64, device="cpu")
GOOD = {"x": torch.ones(3, 5, device="cpu"), "indices": NONE, "num_codes": 7}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_codes": 0}, "num_codes must be at least 1, got 0"),
        ({"x": GOOD["x"].long()}, "x must be .* of floats, got torch.int64"),
        ({"x": torch.ones((), device="cpu")}, r"x must be \(..., D\) of floats, got torch.float32 \(\)"),
        ({"indices": NONE[:2]}, r"indices must be .* shape \(3,\), .*\(2,\)"),
        ({"indices": NONE.float()}, "indices must be int64 or int32 .*, got torch.float32"),
        ({"mask": NONE}, "mask must be bool .*, got torch.int64"),
        ({"mask": NONE[:1] == 0}, r"mask must be bool of shape \(3,\), .*, got torch.bool \(1,\)"),
    ],
)
def test_bad_inputs_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        code_sums(**(GOOD | wrong))


def test_compiles_for_hopper(for_sm90):
    compiled = for_sm90("code_sums.py", "float32-64", "bfloat16-300", "float16-3", "one code")
    assert [k["kernel"] for k in compiled] == ["chunks_kernel", "parts_kernel"] * 4
    assert all(kernel["atomics"] == 0 for kernel in compiled)


@pytest.mark.gpu
def test_addresses_beyond_31_bits():
    indices = torch.randint(1000, (2**23 + 5,))
    x = torch.ones(2**23 + 5, 256, dtype=torch.bfloat16)
    with use_backend("triton"):
        sums = code_sums(x, indices, 1000)
    assert torch.equal(sums[:, 255], torch.bincount(indices, minlength=1000).float())
