"""The Triton kernels of low-rank attention against its definition.

On a CPU they run in Triton's interpreter; on a GPU, where TRITON_INTERPRET=0 is set, they are compiled.
"""

import pytest
import torch
from lamina.kernels import explain, low_rank_attention, use_backend
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

pytestmark = pytest.mark.usefixtures("kernels_device")

# B, heads of queries and of columns, Lq, k, D, Dv: off the tiles, shorter than one, and longer.
SIZES = (2, 2, 1, 37, 21, 24, 16)
MORE_HEADS = (2, 4, 2, 37, 21, 24, 16)
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
TERMS = 4.0  # what cancels in a gradient of a softmax: dP and its mean, of inputs drawn from N(0, 1)
SUMMED = 16.0  # in float32, where of one column nothing is left


def draw(sizes, dtype: torch.dtype) -> list[Tensor]:
    batch, heads, groups, queries, columns, dim, value_dim = sizes
    shapes = (batch, heads, queries, dim), (batch, groups, columns, dim), (batch, groups, columns, value_dim)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def masked(sizes) -> Tensor:
    return torch.rand(sizes[0], sizes[4]) < 0.6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_masked", [False, True])
def test_is_as_exact_as_the_definition(is_masked, dtype, compare):
    mask = masked(MORE_HEADS) if is_masked else None
    compare(low_rank_attention, draw(MORE_HEADS, dtype), terms=TERMS, key_mask=mask)


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 1, 1, 1, 1),
        (1, 2, 1, 1, 67, 40, 40),
        (1, 2, 2, 67, 1, 16, 8),
        (2, 3, 3, 129, 64, 8, 8),  # a tile and a row of queries; columns that fill theirs
        (1, 2, 1, 5, 128, 64, 64),  # two blocks of columns
        (1, 1, 1, 33, 31, 80, 128),
        (0, 2, 1, 5, 7, 16, 16),
        (2, 2, 1, 0, 7, 16, 16),
        (2, 2, 1, 5, 0, 16, 16),
    ],
    ids=str,
)
def test_sizes(sizes, compare):
    compare(low_rank_attention, draw(sizes, torch.float32), terms=SUMMED, key_mask=masked(sizes))


@pytest.mark.parametrize("columns", [256, 200])
def test_all_columns_that_fit_in_half_precision(columns, compare):
    sizes = (1, 1, 1, 70, columns, 64, 32)
    compare(low_rank_attention, draw(sizes, torch.bfloat16), terms=TERMS)


def test_programs_that_take_several_tiles(compare, monkeypatch):
    """As where there are many queries: each program walks them, and the columns' sums come in parts."""
    from lamina.kernels.fused import low_rank_attention as fused

    monkeypatch.setattr(fused, "_PROGRAMS", 5)
    inputs = draw((1, 2, 1, 16 * 5 + 3, 18, 16, 8), torch.float32)
    monkeypatch.setattr(fused, "tiles", lambda *a, _of=fused.tiles: _of(*a)._replace(rows=16))
    compare(low_rank_attention, inputs, terms=TERMS)


def random_case(seed: int):
    """Sizes, a mask and a dtype, drawn over all that the kernel takes."""
    torch.manual_seed(seed)

    def one_of(*options):
        return options[int(torch.randint(len(options), (), device="cpu"))]

    heads = one_of(1, 2, 3, 4)
    groups = one_of(*(n for n in (1, 2, 3) if heads % n == 0))
    dims = one_of(1, 8, 13, 16, 32, 40, 64), one_of(1, 8, 16, 24, 64)
    lengths = one_of(1, 2, 15, 16, 17, 31, 70, 130), one_of(1, 3, 15, 16, 33, 64, 100, 128)
    sizes = (one_of(1, 2), heads, groups, *lengths, *dims)
    return sizes, one_of(None, masked(sizes)), one_of(torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=[pytest.mark.slow] if n >= 40 else []) for n in range(200)]
)
def test_random_shapes(seed, compare):
    sizes, mask, dtype = random_case(seed)
    inputs = draw(sizes, dtype)
    with use_backend("triton"):
        assert explain(low_rank_attention, *inputs).chosen == "triton"
    terms = SUMMED if dtype is torch.float32 else TERMS
    compare(low_rank_attention, inputs, terms=terms, key_mask=mask)


def test_rows_without_columns_give_zero_and_pass_no_gradient():
    query, key, value = draw(SIZES, torch.float32)
    mask = torch.stack([torch.zeros(21).bool(), torch.ones(21).bool()])
    with use_backend("triton"):
        out = low_rank_attention(query, key, value, key_mask=mask)
    gradients = torch.autograd.grad(out, (query, key, value), torch.randn_like(out))
    assert (out[0] == 0).all()
    assert (out[1] != 0).any()
    assert all((g[0] == 0).all() and g.isfinite().all() for g in gradients)


def test_large_scores_do_not_overflow(compare):
    query, key, value = draw(MORE_HEADS, torch.float32)
    inputs = [(50 * query).detach(), (50 * key).detach(), value.detach()]
    compare(low_rank_attention, [t.requires_grad_() for t in inputs], terms=50 * SUMMED)


@pytest.mark.parametrize("layout", ["tokens", "sliced", "transposed", "expanded"])
def test_inputs_of_any_stride(layout, compare):
    def laid_out(t: Tensor) -> Tensor:
        if layout == "tokens":
            return t.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "sliced":
            return torch.cat([t, t], -1)[..., : t.shape[-1]]
        if layout == "transposed":
            return t.mT.contiguous().mT
        return t[:1].expand(t.shape)

    inputs = [laid_out(t.detach()).requires_grad_() for t in draw(SIZES, torch.float32)]
    mask = laid_out(masked(SIZES)[None, None])[0, 0]
    compare(low_rank_attention, inputs, terms=TERMS, key_mask=mask)


@pytest.mark.parametrize("shape", [(1, 21), (2, 1)])
def test_masks_that_broadcast(shape, compare):
    compare(low_rank_attention, draw(SIZES, torch.float32), terms=TERMS, key_mask=torch.rand(shape) < 0.7)


@pytest.mark.parametrize("how", ["stride 0", "transposed", "in part"])
def test_cotangents_of_any_stride(how):
    inputs = draw(SIZES, torch.float32)
    cotangent = {
        "stride 0": torch.ones(()).expand(2, 2, 37, 16),
        "transposed": torch.randn(16, 37, 2, 2).permute(3, 2, 1, 0),
        "in part": torch.randn(2, 2, 37, 32)[..., ::2],
    }[how]
    found = []
    for backend in "reference", "triton":
        with use_backend(backend):
            found.append(torch.autograd.grad(low_rank_attention(*inputs), inputs, cotangent))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("wanted", [[0], [1], [2], [0, 2]])
def test_gradients_of_some_inputs_alone(wanted):
    inputs, cotangent = draw(SIZES, torch.float32), torch.randn(2, 2, 37, 16)
    with use_backend("reference"):
        expected = torch.autograd.grad(low_rank_attention(*inputs), inputs, cotangent)
    for n, tensor in enumerate(inputs):
        tensor.requires_grad_(n in wanted)
    with use_backend("triton"):
        actual = torch.autograd.grad(low_rank_attention(*inputs), [inputs[n] for n in wanted], cotangent)
    torch.testing.assert_close(actual, tuple(expected[n] for n in wanted), atol=1e-4, rtol=1e-4)


def test_first_and_second_derivatives():
    inputs = draw((1, 1, 1, 2, 3, 2, 1), torch.float64)
    mask = torch.tensor([[True, False, True]])
    with use_backend("triton"):
        assert gradcheck(lambda *t: low_rank_attention(*t, key_mask=mask), inputs)
        assert gradgradcheck(lambda *t: low_rank_attention(*t, key_mask=mask), inputs, fast_mode=True)


def test_the_mass_of_the_softmax_has_a_gradient():
    from lamina.kernels.fused.low_rank_attention import attention, definition

    inputs, cotangent = draw(SIZES, torch.float64), torch.randn(2, 2, 37, dtype=torch.float64)
    found = [
        torch.autograd.grad(f(*inputs, None, 0.2)[1], inputs[:2], cotangent) for f in (attention, definition)
    ]
    torch.testing.assert_close(*found)


def test_is_registered():
    from lamina.kernels.fused.low_rank_attention import attention

    inputs = draw((1, 2, 1, 5, 7, 8, 8), torch.float32)
    torch.library.opcheck(attention, [*inputs, torch.rand(1, 1, 1, 7) < 0.7, 0.3])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_and_keeps_its_numbers(dynamic):
    sizes = (1, 2, 1, 19, 23, 16, 8)
    inputs, mask, cotangent = draw(sizes, torch.float32), masked(sizes), torch.randn(1, 2, 19, 8)
    with use_backend("triton"):
        expected = low_rank_attention(*inputs, key_mask=mask)
        compiled = torch.compile(low_rank_attention, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        actual = compiled(*inputs, key_mask=mask)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(o, inputs, cotangent) for o in (actual, expected)))


def test_backward_passes_are_equal(monkeypatch):
    from lamina.kernels.fused import low_rank_attention as fused

    monkeypatch.setattr(fused, "tiles", lambda *a, _of=fused.tiles: _of(*a)._replace(rows=16))
    inputs, cotangent = draw((1, 2, 1, 33, 5, 16, 8), torch.float32), torch.randn(1, 2, 33, 8)
    torch.use_deterministic_algorithms(True)
    try:
        with use_backend("triton"):
            runs = [torch.autograd.grad(low_rank_attention(*inputs), inputs, cotangent) for _ in range(6)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_autocast_casts_what_is_multiplied(kernels_device):
    inputs = draw(SIZES, torch.float32)
    with torch.autocast(kernels_device, torch.bfloat16), use_backend("triton"):
        out = low_rank_attention(*inputs)
    assert out.dtype is torch.bfloat16
    gradients = torch.autograd.grad(out, inputs, torch.randn_like(out))
    assert all(g.dtype is torch.float32 for g in gradients)


def test_forward_derivatives_take_the_definition():
    inputs = [t.detach() for t in draw((1, 2, 1, 3, 4, 2, 2), torch.float64)]
    tangents = [torch.randn_like(t) for t in inputs]
    with use_backend("triton"), pytest.warns(UserWarning, match="forward-mode"):
        _, actual = torch.func.jvp(low_rank_attention, tuple(inputs), tuple(tangents))
    with use_backend("reference"):
        _, expected = torch.func.jvp(low_rank_attention, tuple(inputs), tuple(tangents))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("dtype", "cases"),
    [
        ("bfloat16", "64-256 80-100 64-200-masked"),
        ("float32", "64-128"),
        pytest.param("bfloat16", "64-64 128-128", marks=pytest.mark.slow),
        pytest.param("float32", "80-60 128-64", marks=pytest.mark.slow),
        pytest.param("float16", "32-64 64-128 64-256 128-64", marks=pytest.mark.slow),
        pytest.param("float64", "64-128", marks=pytest.mark.slow),
    ],
)
def test_compiles_for_hopper(for_sm90, dtype, cases):
    compiled = for_sm90("low_rank_attention.py", *(f"{dtype}-{case}" for case in cases.split()))
    expected = ["forward_kernel", "query_kernel", "column_kernel"] * len(cases.split())
    assert [kernel["kernel"] for kernel in compiled] == expected
    for kernel in compiled:
        assert kernel["atomics"] == 0, kernel  # every run gives the same
        assert kernel["tensor_cores"] > 0, kernel


@pytest.mark.gpu
def test_addresses_beyond_31_bits():
    shapes = (16, 33, 2**16, 64), (16, 33, 128, 64), (16, 33, 128, 64)  # of the queries 2.2e9 numbers
    query, key, value = (torch.randn(shape, dtype=torch.bfloat16) for shape in shapes)
    with use_backend("triton"):
        out = low_rank_attention(query, key, value)
    with use_backend("reference"):
        expected = low_rank_attention(query[-1:], key[-1:], value[-1:])
    torch.testing.assert_close(out[-1:], expected, atol=2e-2, rtol=2e-2)
