"""The Triton kernels of the nearest code: the index of float64, whatever the scan's products are made of.

On a CPU they run in Triton's interpreter, where what is multiplied is rounded as on a GPU.
"""

import importlib

import pytest
import torch
from lamina.kernels import explain, nearest_code, use_backend
from torch import Tensor

pytestmark = pytest.mark.usefixtures("kernels_device")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SOME_DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
# N, K, D: off the tiles, one, a tile and one more, channels in several products, codes in several parts.
SIZES = [
    (1, 1, 1),
    (67, 13, 5),
    (129, 65, 64),
    (1, 700, 24),
    (131, 17, 129),
    (37, 41, 300),
    (140, 1031, 33),
    (5, 1100, 261),
]


def distances(x: Tensor, codebook: Tensor) -> Tensor:
    """All of them squared, in float64, in the kernel's formula."""
    x, codebook = x.double(), codebook.double()
    return torch.stack([(row - codebook).square().sum(-1) for row in x.reshape(-1, x.shape[-1])])


def check(x: Tensor, codebook: Tensor) -> Tensor:
    """The chosen distance is the least but for the last bits of float64; the index is returned."""
    with use_backend("triton"):
        assert explain(nearest_code, x, codebook).chosen == "triton"
        index = nearest_code(x, codebook)
    assert index.dtype is torch.int64
    assert index.shape == x.shape[:-1]
    every = distances(x, codebook)
    chosen = every.gather(1, index.reshape(-1, 1)).squeeze(1)
    assert (chosen <= every.min(1).values * (1 + 1e-13)).all()
    return index


@pytest.mark.parametrize("dtype", SOME_DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(sizes, dtype, unwritten_memory_is_nan):
    count, codes, dim = sizes
    check(torch.randn(count, dim).to(dtype), torch.randn(codes, dim).to(dtype))


@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float16, torch.bfloat16)],
    ids=str,
)
def test_dtypes_may_differ(dtypes):
    check(torch.randn(70, 40).to(dtypes[0]), torch.randn(90, 40).to(dtypes[1]))


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.float64, torch.float16)], ids=str)
def test_float64(dtypes):
    check(torch.randn(35, 40).to(dtypes[0]), torch.randn(70, 40).to(dtypes[1]))


def random_case(seed: int) -> tuple[Tensor, Tensor]:
    """Vectors and codes of drawn sizes, dtypes, lengths and offsets; some are equal."""
    torch.manual_seed(seed)

    def one_of(*options):
        return options[int(torch.randint(len(options), (), device="cpu"))]

    count, codes = one_of(1, 3, 64, 128, 130, 200), one_of(1, 2, 31, 64, 65, 130, 520)
    dim = one_of(1, 2, 8, 15, 16, 17, 32, 64, 72, 128, 140, 270)
    dtypes = one_of(*[(d, d) for d in DTYPES], (torch.bfloat16, torch.float32), (torch.float32,) * 2)
    x, codebook = torch.randn(count, dim), torch.randn(codes, dim)
    if torch.float32 in dtypes:  # halves would round to copies of one code: right, but long
        offset = one_of(0, 5, 200)
        x, codebook = x * one_of(1.0, 1e-2) + offset, codebook * one_of(1.0, 1e-3, 30.0) + offset
    else:
        x, codebook = x + one_of(0.0, 1.0), codebook * one_of(1.0, 30.0)
    if one_of(False, True):
        chosen = torch.randint(codes, (count,))
        x = codebook[chosen] + one_of(0.0, 1e-4, 1e-2) * torch.randn(count, dim)
    if one_of(False, False, True):
        codebook[torch.randint(codes, (min(codes // 2, 20),))] = codebook[0].clone()
    return x.to(dtypes[0]), codebook.to(dtypes[1])


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=[pytest.mark.slow] if n >= 40 else []) for n in range(200)]
)
def test_random_cases(seed, unwritten_memory_is_nan):
    check(*random_case(seed))


def test_codes_that_tf32_cannot_tell_apart():
    """A hundred and fifty codes at nearly one distance: rounded products alone choose another for most."""
    x = torch.randn(40, 64)
    codebook = torch.randn(1, 64) + 1e-5 * torch.randn(150, 64)
    index = check(x, codebook)
    near, from_codes = rounded(x - codebook.mean(0)), rounded(codebook - codebook.mean(0))
    alone = ((codebook - codebook.mean(0)).square().sum(-1) - 2 * near @ from_codes.T).argmin(-1)
    assert torch.equal(index, distances(x, codebook).argmin(-1))
    x = 100 * x  # now the mean's own rounding, too, is as large as what tells the codes apart
    index = check(x, codebook)
    alone = (codebook.square().sum(-1) - 2 * rounded(x) @ rounded(codebook).T).argmin(-1)
    assert (index != alone).float().mean() > 0.5


def rounded(x: Tensor) -> Tensor:
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


@pytest.mark.parametrize("dtype", SOME_DTYPES)
def test_of_codes_at_one_distance_the_first(dtype):
    x, codebook = torch.randint(-2, 3, (67, 3)), torch.randint(-2, 3, (80, 3))
    expected = (x.unsqueeze(1) - codebook).square().sum(-1).argmin(-1)
    with use_backend("triton"):
        assert torch.equal(nearest_code(x.to(dtype), codebook.to(dtype)), expected)
        copies = torch.randn(1, 3).expand(80, 3)
        assert not nearest_code(torch.randn(67, 3).to(dtype), copies.to(dtype)).any()


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-18, 1e18, 1e25])
def test_squares_that_float32_does_not_hold(scale):
    """Against float64, which holds them: the definition in float32 does not."""
    check(scale * torch.randn(33, 8), scale * torch.randn(47, 8))
    check(torch.randn(33, 8), scale * torch.randn(47, 8))
    check(scale * torch.randn(33, 8), torch.randn(47, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_number_is_what_it_is_to_the_definition(dtype):
    x, codebook = torch.randn(9, 4), torch.randn(90, 4)
    x[1, 2], x[4, 0], x[5] = torch.nan, torch.inf, -torch.inf

    def outcome(backend: str, codebook: Tensor) -> Tensor:
        with use_backend(backend):
            return nearest_code(x.to(dtype), codebook.to(dtype))

    assert torch.equal(outcome("triton", codebook), outcome("reference", codebook))
    codebook[:, 1] = torch.inf
    assert torch.equal(outcome("triton", codebook), outcome("reference", codebook))
    codebook = torch.randn(90, 4)
    codebook[70, 3] = codebook[81, 1] = torch.inf
    assert torch.equal(outcome("triton", codebook), outcome("reference", codebook))
    codebook[80, 3] = codebook[89, 1] = torch.nan
    expected = outcome("reference", codebook)
    assert torch.equal(outcome("triton", codebook), expected)
    assert (expected[[0, 2, 3]] == 80).all()


def test_one_code_far_away():
    x, codebook = torch.randn(70, 16), torch.randn(80, 16)
    codebook[3] = 1e6
    check(x, codebook)
    check(x.bfloat16(), codebook.bfloat16())


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (3, 0)])
def test_nothing_to_search_or_to_search_by(shape):
    with use_backend("triton"):
        found = nearest_code(torch.randn(shape), torch.randn(7, shape[-1]))
    assert found.shape == shape[:-1]
    assert not found.any()


def test_inputs_of_any_stride():
    x, codebook = torch.randn(2, 12, 5, 7), torch.randn(6, 31)
    check(x.transpose(1, 2)[..., :6], codebook.T)
    check(x.permute(0, 2, 3, 1), torch.randn(9, 24)[:, ::2])
    check(torch.randn(1, 6).expand(5, 6), codebook.T)
    check(torch.randn(6), codebook.T)


def test_parts_of_the_codes_give_what_the_whole_gives(monkeypatch):
    fused = importlib.import_module("lamina.kernels.fused.nearest_code")
    x, codebook = torch.randn(300, 9), torch.randn(600, 9)
    codebook[500:] = codebook[:100]
    x[5, 0] = torch.nan
    outcomes = []
    for programs in 1, 2, 1000:
        monkeypatch.setattr(fused, "_PROGRAMS", programs)
        outcomes.append(fused.nearest_code(x, codebook))
    assert torch.equal(outcomes[0], outcomes[1])
    assert torch.equal(outcomes[0], outcomes[2])


def test_no_gradient_and_no_trace_of_one():
    x, codebook = torch.randn(13, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    with use_backend("triton"):
        assert not nearest_code(x, codebook).requires_grad


def test_autocast_costs_no_precision(kernels_device):
    with torch.autocast(kernels_device, torch.bfloat16):
        check(torch.randn(70, 40), torch.randn(90, 40))


def test_is_registered():
    from lamina.kernels.fused.nearest_code import nearest_code as fused

    torch.library.opcheck(fused, [torch.randn(2, 3, 8), torch.randn(11, 8)])
    torch.library.opcheck(fused, [torch.randn(3, 8).bfloat16(), torch.randn(9, 8)])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(nearest_code, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for count, codes in (31, 7), (67, 11):
        x, codebook = torch.randn(2, count, 5), torch.randn(codes, 5)
        with use_backend("triton"):
            assert torch.equal(compiled(x, codebook), nearest_code(x, codebook))


def test_says_why_it_does_not_run():
    x, codebook = torch.randn(3, 5, device="cpu"), torch.randn(7, 5, device="cpu")
    assert "not on a CUDA device" in explain(nearest_code, x, codebook).refusals["triton"]
    with use_backend("triton"):
        told = explain(nearest_code, x.to(torch.float8_e5m2), codebook)
    assert "the kernel has no torch.float8_e5m2 with torch.float32" in told.refusals["triton"]


def test_forward_derivatives_do_not_meet_the_kernel():
    x, codebook = torch.randn(3, 5), torch.randn(7, 5)
    with use_backend("triton"):
        value, tangent = torch.func.jvp(lambda x: nearest_code(x, codebook), (x,), (torch.ones_like(x),))
    assert torch.equal(value, nearest_code(x, codebook))
    assert not tangent.any()


# And the bytes of registers that a kernel may spill, as it reads vectors of many channels.
COMPILED = [
    (("float32-64-whole", "bfloat16-256-whole", "mixed-64-parts"), 0),
    (("float32-128-parts",), 112),
    *(
        pytest.param(cases, spilled, marks=pytest.mark.slow)
        for cases, spilled in [
            (("float32-512-parts", "float16-100-parts"), 0),
            (("float32-256-whole",), 112),
            (("bfloat16-3-parts", "bfloat16-64-whole", "bfloat16-128-parts", "bfloat16-512-parts"), 0),
            (("float16-64-parts", "float16-320-whole", "float32-64-parts", "float32-512-whole"), 0),
            (("float32-128-whole", "float32-256-parts", "mixed-100-whole", "mixed-256-parts"), 112),
            (("mixed-320-parts", "float64-3-whole", "float64-64-parts"), 8),
        ]
    ),
]


@pytest.mark.parametrize(("cases", "spilled"), COMPILED)
def test_compiles_for_hopper(for_sm90, cases, spilled):
    compiled = for_sm90("nearest_code.py", *cases, spilled=spilled)
    for case in cases:
        names = [kernel["kernel"] for kernel in compiled if kernel["case"] == case]
        expected = ["codes_kernel", "nearest_kernel", "merged_kernel"]
        assert names == (expected if case.endswith("parts") else expected[:2])
    for kernel in compiled:
        assert kernel["atomics"] == 0, kernel  # every run gives the same
        assert (kernel["tensor_cores"] > 0) == (kernel["kernel"] == "nearest_kernel"), kernel


@pytest.mark.gpu
def test_addresses_beyond_31_bits():
    codebook = torch.randn(1024, 256, dtype=torch.bfloat16)
    chosen = torch.randint(1024, (2**23 + 5,))
    with use_backend("triton"):
        assert torch.equal(nearest_code(codebook[chosen], codebook), chosen)
