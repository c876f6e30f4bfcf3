"""The nearest code: its definition, and PyTorch's tiles against it."""

import importlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.kernels import explain, nearest_code, use_backend
from torch import Tensor

module = importlib.import_module("lamina.kernels.nearest_code")  # the package has its function
seeds = st.integers(0, 2**31)
backends = pytest.mark.parametrize("backend", ["reference", "torch"])
on_the_device = pytest.mark.usefixtures("kernels_device")


def excess(indices: Tensor, x: Tensor, codebook: Tensor, middle: Tensor | None = None) -> Tensor:
    """How much longer than the least the chosen squared distance is, in float64, relative to the lengths."""
    x, codebook = x.double(), codebook.double()
    distances = (x.unsqueeze(-2) - codebook).square().sum(-1)
    chosen = distances.gather(-1, indices.unsqueeze(-1)).squeeze(-1)
    least = distances.min(-1)
    middle = codebook.mean(0) if middle is None else middle
    size = (x - middle).norm(dim=-1) + (codebook - middle)[least.indices].norm(dim=-1)
    return (chosen - least.values) / size.square().clamp_min(1e-300)


def in_numpy(x: Tensor, codebook: Tensor) -> Tensor:
    """The formula, one vector and one code at a time; `<` keeps the lower index."""
    x, codebook = x.numpy(), codebook.numpy()
    found = []
    for row in x.reshape(-1, x.shape[-1]):
        best, least = 0, np.inf
        for k, code in enumerate(codebook):
            if (distance := ((row - code) ** 2).sum()) < least:
                best, least = k, distance
        found.append(best)
    return torch.tensor(found, dtype=torch.int64).reshape(x.shape[:-1])


@backends
@given(seed=seeds, count=st.integers(0, 9), codes=st.integers(1, 7), dim=st.integers(1, 5))
def test_is_the_formula(backend, seed, count, codes, dim):
    torch.manual_seed(seed)
    x, codebook = torch.randn(count, dim, dtype=torch.float64), torch.randn(codes, dim, dtype=torch.float64)
    with use_backend(backend):
        actual = nearest_code(x, codebook)
    assert torch.equal(actual, in_numpy(x, codebook))


@on_the_device
@backends
def test_any_leading_dimensions(backend):
    x, codebook = torch.randn(2, 3, 5, 7), torch.randn(11, 7)
    with use_backend(backend):
        whole = nearest_code(x, codebook)
        assert whole.shape == (2, 3, 5)
        assert whole.dtype is torch.int64
        assert torch.equal(nearest_code(x[1, 2, 3], codebook), whole[1, 2, 3])
        assert torch.equal(nearest_code(x.transpose(0, 2), codebook), whole.transpose(0, 2))
        assert nearest_code(x[:, :0], codebook).shape == (2, 0, 5)


@on_the_device
@given(seed=seeds, dim=st.integers(1, 40), copies=st.integers(2, 5), codes=st.integers(1, 40))
def test_of_equal_codes_the_first_by_definition_and_an_equal_one_by_products(seed, dim, copies, codes):
    torch.manual_seed(seed)
    x, codebook = torch.randn(37, dim, dtype=torch.float64), torch.randn(codes, dim, dtype=torch.float64)
    with use_backend("reference"):
        once, repeated = nearest_code(x, codebook), nearest_code(x, codebook.repeat(copies, 1))
    assert torch.equal(repeated, once)
    assert torch.equal(nearest_code(x, codebook.repeat(copies, 1)) % codes, once)


@on_the_device
@backends
@given(seed=seeds, dim=st.integers(1, 4), offset=st.sampled_from([0, 1024]))
def test_of_codes_at_one_distance_the_first(backend, seed, dim, offset):
    torch.manual_seed(seed)
    x, codebook = torch.randint(-2, 3, (37, dim)) + offset, torch.randint(-2, 3, (11, dim)) + offset
    expected = (x.unsqueeze(1) - codebook).square().sum(-1).argmin(-1)
    with use_backend(backend):
        assert torch.equal(nearest_code(x.float(), codebook.float()), expected)


@on_the_device
def test_one_code_far_away_costs_no_precision():
    x, codebook = torch.randn(97, 5), torch.randn(64, 5)
    codebook[0] = 1e4
    assert excess(nearest_code(x, codebook), x, codebook, middle=codebook[1:].mean(0)).max() <= 1e-6


@on_the_device
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (67, 13, 5), (700, 1024, 64), (1031, 1500, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_errs_no_more_than_rounding(dtype, sizes, offset):
    count, codes, dim = sizes
    x, codebook = torch.randn(count, dim) + offset, torch.randn(codes, dim) + offset
    x, codebook = x.to(dtype), codebook.to(dtype)
    assert excess(nearest_code(x, codebook), x, codebook).max() <= 8 * torch.finfo(torch.float32).eps


@on_the_device
def test_indices_are_those_of_float64_where_no_two_codes_are_close():
    x, codebook = torch.randn(2053, 64), torch.randn(1024, 64)
    assert torch.equal(nearest_code(x, codebook), nearest_code(x.double(), codebook.double()))


@on_the_device
@pytest.mark.parametrize("tile", [(1, 1), (333, 31), (1000, 30), (7, 16), (1001, 1024)])
def test_tiles_cover_every_vector_and_every_code(tile, monkeypatch, unwritten_memory_is_nan):
    x, codebook = torch.randint(-2, 3, (97, 3)).double(), torch.randint(-2, 3, (31, 3)).double()
    with use_backend("reference"):
        expected = nearest_code(x, codebook)  # many of them tie
    monkeypatch.setattr(module, "_TILE", tile)
    assert torch.equal(nearest_code(x, codebook), expected)
    x, codebook = torch.randn(1000, 5, dtype=torch.float64), torch.randn(31, 5, dtype=torch.float64)
    with use_backend("reference"):
        expected = nearest_code(x, codebook)
    if tile != (1, 1):
        assert torch.equal(nearest_code(x, codebook), expected)


def test_no_more_than_a_tile_of_scores_exists():
    x, codebook = torch.randn(3000, 4), torch.randn(3000, 4)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        nearest_code(x, codebook)
    sizes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert max(sizes) <= 4 * 2**19  # all scores are 36 MB


@on_the_device
def test_what_is_no_number_still_gives_an_index():
    x = torch.tensor([[torch.nan, 0.0], [torch.inf, 0.0], [0.0, 0.0]])
    for backend in "reference", "torch":
        with use_backend(backend):
            found = nearest_code(x, torch.randn(5, 2))
        assert ((found >= 0) & (found < 5)).all()


def test_autocast_costs_no_precision():
    x, codebook = torch.randn(211, 64), torch.randn(97, 64)
    expected = nearest_code(x, codebook)
    torch._dynamo.reset()
    compiled = torch.compile(nearest_code, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_code(x, codebook), expected)
        assert torch.equal(compiled(x, codebook), expected)


@on_the_device
def test_dtypes_may_differ():
    x, codebook = torch.randn(13, 5, dtype=torch.bfloat16), torch.randn(7, 5)
    assert torch.equal(nearest_code(x, codebook), nearest_code(x.float(), codebook))


@on_the_device
def test_no_gradient_and_no_trace_of_one():
    x, codebook = torch.randn(13, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    assert not nearest_code(x, codebook).requires_grad


@pytest.mark.parametrize("backend", [None, "reference"])
def test_compiles_whole_with_dynamic_shapes(backend):
    torch._dynamo.reset()
    compiled = torch.compile(nearest_code, fullgraph=True, dynamic=True, backend="aot_eager")
    for count, codes in (31, 7), (67, 11):
        x, codebook = torch.randn(2, count, 5), torch.randn(codes, 5)
        expected = nearest_code(x, codebook)
        with use_backend(backend or "torch"):
            assert torch.equal(compiled(x, codebook), expected)


def test_says_which_path_runs():
    told = explain(nearest_code, torch.randn(3, 5), torch.randn(7, 5))
    assert (told.chosen, set(told.refusals)) == ("torch", {"triton"})


@pytest.mark.parametrize("codebook", [torch.randn(7), torch.randn(0, 5), torch.randn(2, 7, 5)])
def test_a_wrong_codebook_is_refused(codebook):
    with pytest.raises(ValueError, match=r"codebook must be \(K, D\) with at least one code, got"):
        nearest_code(torch.randn(3, 5), codebook)


@pytest.mark.parametrize("x", [torch.randn(3, 4), torch.randn(())])
def test_wrong_vectors_are_refused(x):
    with pytest.raises(ValueError, match=r"x must be \(..., D\) with D = 5, got"):
        nearest_code(x, torch.randn(7, 5))


def test_integers_are_refused():
    with pytest.raises(ValueError, match=r"must be floats, got torch\.int64 and torch\.float32"):
        nearest_code(torch.ones(3, 5, dtype=torch.int64), torch.randn(7, 5))
