"""The Triton kernels of LSH attention against its definition, for every option and pairs of them.

On a CPU they run in Triton's interpreter; on a GPU, where TRITON_INTERPRET=0 is set, they are compiled.
"""

import itertools

import pytest
import torch
from lamina.kernels import explain, lsh_attention, use_backend
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

pytestmark = pytest.mark.usefixtures("kernels_device")

# B, H, L, D, Dv, rounds and the size of a chunk: off the tiles, and several chunks in one.
SIZES = (2, 1, 37, 24, 16, 2, 11)
ALONE = (1, 1, 37, 24, 16, 2, 11)
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
TERMS = 4.0  # what cancels in a gradient of a softmax, of inputs drawn from N(0, 1)
SUMMED = 16.0  # in float32, where of one key nothing is left
BUCKETS = 4
FEATURES = {
    "causal": {"is_causal": True},
    "mask": {},
    "ring": {"circular": True},
    "own bucket": {"same_bucket": True},
    "once": {"deduplicate": True},
    "far": {"look_back": 2, "look_ahead": 1, "scale": 0.3},
    "ahead": {"look_back": 0, "look_ahead": 1},
}
PAIRS = [pair for pair in itertools.combinations(FEATURES, 2) if pair != ("far", "ahead")]


def draw(sizes, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """What takes gradients, and the buckets."""
    batch, heads, length, dim, value_dim, rounds, _ = sizes
    shapes = (batch, heads, length, dim), (batch, heads, length, value_dim)
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    return inputs, torch.randint(BUCKETS, (batch, heads, rounds, length))


def attend(names, sizes=SIZES, dtype: torch.dtype = torch.float32, **options):
    """The operation with these features as a function of its differentiable inputs, and the inputs."""
    inputs, buckets = draw(sizes, dtype)
    for name in names:
        options |= FEATURES[name]
    if "mask" in names:
        options["key_mask"] = torch.rand(sizes[0], sizes[2]) < 0.7

    def operation(query_key, value):
        return lsh_attention(query_key, value, buckets, num_buckets=BUCKETS, chunk_size=sizes[-1], **options)

    return operation, inputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FEATURES)
def test_each_feature(name, dtype, compare):
    compare(*attend([name], dtype=dtype), terms=TERMS)


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_each_pair_of_features(pair, compare):
    compare(*attend(pair, ALONE), terms=TERMS)


@pytest.mark.parametrize("more", [[], ["ahead"], ["far", "causal", "mask"]], ids=str)
def test_pairs_of_one_bucket_in_a_ring_that_count_once(more, compare):
    compare(*attend(["ring", "own bucket", "once", *more], (1, 1, 29, 24, 16, 2, 4)), terms=SUMMED)


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 8, 8, 1, 1),
        (1, 2, 1, 8, 8, 2, 4),
        (1, 2, 67, 40, 72, 1, 16),  # one round: nothing to combine
        (1, 1, 130, 16, 16, 2, 64),  # a tile is a chunk; the last is of two tokens
        (1, 1, 70, 16, 16, 2, 128),  # one chunk holds them all
        (1, 1, 90, 64, 64, 2, 32),
        (1, 2, 35, 128, 128, 2, 16),
        (1, 1, 33, 192, 256, 1, 16),
        (0, 2, 5, 16, 16, 2, 4),
        (2, 0, 5, 16, 16, 2, 4),
        (2, 2, 0, 16, 16, 2, 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("names", [["causal"], ["mask", "ring"]], ids=" and ".join)
def test_sizes(names, sizes, compare):
    compare(*attend(names, sizes), terms=SUMMED)


def random_case(seed: int):
    """Options, sizes and a dtype, drawn over all that the kernel takes."""
    torch.manual_seed(seed)

    def one_of(*options):
        return options[int(torch.randint(len(options), (), device="cpu"))]

    length = one_of(1, 2, 15, 16, 17, 31, 48, 66)
    dims = one_of(8, 13, 16, 32, 40, 64, 72, 96), one_of(8, 16, 24, 64, 80)
    sizes = (1, 1, length, *dims, one_of(1, 2, 3), one_of(1, 3, 8, 16, 24, 32, 64))
    names = [
        n for n in ("causal", "mask", "ring", "own bucket", "once") if torch.rand((), device="cpu") < 0.3
    ]
    reach = {"look_back": one_of(0, 1, 1, 2, 5), "look_ahead": one_of(0, 0, 1, 3)}
    if sizes[-1] == 1:  # which would be a loop of an iteration a token
        reach = {"look_back": 1, "look_ahead": 0}
    return names, sizes, one_of(torch.float32, torch.float32, torch.float16, torch.bfloat16), reach


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=[pytest.mark.slow] if n >= 40 else []) for n in range(200)]
)
def test_random_cases(seed, compare):
    names, sizes, dtype, reach = random_case(seed)
    compare(*attend(names, sizes, dtype, **reach), terms=SUMMED if dtype is torch.float32 else TERMS)


def test_one_chunk_in_a_ring_is_seen_once_whatever_the_reach(compare):
    for rounds, length in (1, 9), (2, 9), (3, 20):
        sizes = (1, 1, length, 8, 8, rounds, 16)
        compare(
            *attend(["ring", "own bucket"], sizes, look_back=4, look_ahead=3, is_causal=True), terms=SUMMED
        )


def test_a_token_that_sees_no_other_is_itself_exactly():
    value = torch.randn(1, 1, 30, 16, requires_grad=True)
    query_key = torch.randn(1, 1, 30, 16, requires_grad=True)
    for rounds in 1, 3:
        buckets = torch.arange(30).expand(1, 1, rounds, 30)
        with use_backend("triton"):
            out = lsh_attention(query_key, value, buckets, num_buckets=30, chunk_size=8, same_bucket=True)
        cotangent = torch.randn_like(out)
        found = torch.autograd.grad(out, (query_key, value), cotangent)
        assert torch.equal(out, value)
        assert torch.equal(found[0], torch.zeros_like(query_key))
        assert torch.equal(found[1], cotangent)


def test_what_takes_no_part_is_not_read():
    (query_key, value), buckets = draw(SIZES, torch.float32)
    key_mask = torch.rand(2, 37) < 0.6
    hidden = ~key_mask[:, None, :, None]
    inputs = [t.detach().masked_fill(hidden, torch.nan).requires_grad_() for t in (query_key, value)]
    for rounds in 1, 2:
        with use_backend("triton"):
            out = lsh_attention(
                *inputs, buckets[:, :, :rounds], num_buckets=BUCKETS, chunk_size=11, key_mask=key_mask
            )
        found = torch.autograd.grad(out, inputs, torch.randn_like(out))
        for tensor in (out, *found):
            assert (tensor.masked_select(hidden) == 0).all()
            assert tensor.isfinite().all()


@pytest.mark.parametrize("size", [1e-30, 1e4])
def test_queries_of_any_size_have_finite_gradients(size):
    operation, (query_key, value) = attend(["causal"])
    query_key = (size * query_key.detach()).requires_grad_()
    with use_backend("triton"):
        out = operation(query_key, value)
    found = torch.autograd.grad(out, (query_key, value), torch.randn_like(out))
    assert all(t.isfinite().all() for t in (out, *found))


def test_float16_keeps_the_gradients_of_long_and_short_queries(compare):
    """One over a length is taken off the products, where 1e-4 would leave few of float16's bits."""
    for size in 1e-2, 3e3:
        operation, (query_key, value) = attend([], dtype=torch.float16, scale=1 / size)
        query_key = (size * query_key.detach()).requires_grad_()
        compare(operation, [query_key, value], terms=TERMS / size)


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

    operation, inputs = attend(["mask"])
    compare(operation, [laid_out(t.detach()).requires_grad_() for t in inputs], terms=TERMS)


def test_a_mask_and_buckets_that_broadcast(compare):
    inputs, buckets = draw(SIZES, torch.float32)
    shared = buckets[:1, :1].expand_as(buckets)
    for shape in (1, 37), (2, 1):
        key_mask = torch.rand(shape) < 0.7
        compare(
            lambda *x, mask=key_mask: lsh_attention(
                *x, shared, num_buckets=BUCKETS, chunk_size=11, key_mask=mask
            ),
            inputs,
            terms=TERMS,
        )


@pytest.mark.parametrize("how", ["stride 0", "transposed", "in part"])
def test_cotangents_of_any_stride(how):
    operation, inputs = attend(["causal"])
    cotangent = {
        "stride 0": torch.ones(()).expand(2, 1, 37, 16),
        "transposed": torch.randn(16, 37, 1, 2).permute(3, 2, 1, 0),
        "in part": torch.randn(2, 1, 37, 32)[..., ::2],
    }[how]
    with use_backend("reference"):
        expected = torch.autograd.grad(operation(*inputs), inputs, cotangent)
    with use_backend("triton"):
        actual = torch.autograd.grad(operation(*inputs), inputs, cotangent)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("names", [["far"], ["ahead"]], ids=str)
@pytest.mark.parametrize("wanted", [0, 1])
def test_the_gradient_of_one_input_alone(wanted, names):
    operation, inputs = attend(names)
    cotangent = torch.randn(2, 1, 37, 16)
    with use_backend("triton"):
        expected = torch.autograd.grad(operation(*inputs), inputs, cotangent)
        inputs[1 - wanted].requires_grad_(False)
        (actual,) = torch.autograd.grad(operation(*inputs), inputs[wanted], cotangent)
    assert torch.equal(actual, expected[wanted])


@pytest.mark.parametrize("names", [["causal", "mask"], ["once", "ring"]], ids=str)
def test_second_derivatives(names):
    operation, inputs = attend(names, (1, 1, 5, 2, 1, 2, 2), torch.float64)
    with use_backend("triton"):
        assert gradcheck(operation, inputs, fast_mode=True)
        assert gradgradcheck(operation, inputs, fast_mode=True)


def seeded(operation, inputs, seed: int, backend: str = "triton") -> Tensor:
    torch.manual_seed(seed)
    with use_backend(backend):
        return operation(*inputs)


def test_dropout_drops_its_part_and_keeps_the_mean():
    query_key = torch.zeros(1, 2, 64, 16)  # of 63 others each weighs the same
    value = torch.eye(64).expand(1, 2, 64, 64)
    buckets = torch.zeros(1, 2, 1, 64).long()

    def operation(query_key, value):
        return lsh_attention(query_key, value, buckets, num_buckets=1, chunk_size=64, dropout=0.3)

    left = seeded(operation, (query_key, value), 0) * 63
    others = left[~torch.eye(64).bool().expand_as(left)]
    assert ((others == 0) | ((others - 1 / 0.7).abs() < 1e-4)).all()
    assert (others == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    rows, heads = left.flatten(0, 2), left.transpose(0, 1).flatten(1)
    assert not torch.equal(rows[0], rows[1])
    assert not torch.equal(heads[0], heads[1])
    assert torch.equal(left, seeded(operation, (query_key, value), 0) * 63)
    assert not torch.equal(left, seeded(operation, (query_key, value), 1) * 63)


def test_dropout_takes_from_a_token_that_sees_no_other_too():
    value, buckets = torch.ones(1, 2, 120, 1), torch.arange(120).expand(1, 2, 2, 120)
    out = seeded(
        lambda x, v: lsh_attention(
            x, v, buckets, num_buckets=120, chunk_size=60, same_bucket=True, dropout=0.3
        ),
        (torch.randn(1, 2, 120, 8), value),
        0,
    )
    assert sorted({round(x, 4) for x in out.flatten().tolist()}) == [0.0, round(1 / 0.7, 4)]
    assert (out == 0).float().mean().item() == pytest.approx(0.3, abs=0.1)


@pytest.mark.parametrize(
    ("names", "sizes"),
    [
        (["far"], SIZES),
        (["ring", "own bucket"], ALONE),
        (["ahead", "mask"], SIZES),
        (["far"], (1, 2, 9, 8, 8, 1, 32)),  # all in one chunk
    ],
    ids=str,
)
def test_gradients_drop_what_the_output_dropped(names, sizes):
    """Against the definition, which is told what was left: by `create_graph`, which takes it."""
    operation, inputs = attend(names, sizes, torch.float64, dropout=0.3)
    cotangent = torch.randn(*sizes[:3], sizes[4], dtype=torch.float64)

    def gradients(create_graph: bool) -> list[Tensor]:
        out = seeded(operation, inputs, 3)
        return [out, *torch.autograd.grad(out, inputs, cotangent, create_graph=create_graph)]

    torch.testing.assert_close(gradients(False), gradients(True))


@pytest.mark.parametrize("names", [["far"], ["ring", "own bucket"], ["mask", "once"]], ids=str)
def test_the_definition_of_the_second_derivative_gives_the_same_output(names, monkeypatch):
    from lamina.kernels.fused import lsh_attention as fused

    operation, inputs = attend(names, dtype=torch.float64, dropout=0.3)
    actual = seeded(operation, inputs, 5)
    monkeypatch.setattr(fused, "lsh_attention", lambda *given: (fused.definition(*given),))
    torch.testing.assert_close(seeded(operation, inputs, 5), actual)


def test_is_registered():
    from lamina.kernels.fused.lsh_attention import kept_weights, lsh_attention, lsh_attention_backward

    inputs, buckets = draw((1, 1, 9, 8, 8, 2, 4), torch.float32)
    labels, order = buckets.sort(dim=-1, stable=True)
    key_mask = torch.ones(1, 9).bool()
    plain = [*inputs, order, None, None, key_mask, 4, 1, 0, False, True, 1.0, 0.0, None]
    special = [
        *inputs, order, labels.short(), order.argsort(-1).int(), None, 4, 1, 1, True, False, 0.3, 0.2,
        torch.tensor([5]),
    ]  # fmt: skip
    for given in plain, special:
        torch.library.opcheck(lsh_attention, given)
    out, lse = lsh_attention(*plain)
    given = [t.detach() if isinstance(t, Tensor) else t for t in plain]
    backward = [torch.randn_like(out), out.detach(), lse, [True, False], *given]
    torch.library.opcheck(lsh_attention_backward, backward)
    torch.library.opcheck(kept_weights, [torch.tensor([5]), 0.2, [1, 2, 3, 13], 4, 1, 0])


@pytest.mark.parametrize(("names", "dynamic"), [(["causal"], True), (["ring", "once", "mask"], False)])
def test_compiles_whole_and_keeps_its_numbers(names, dynamic):
    operation, inputs = attend(names, (1, 2, 37, 16, 8, 2, 16))
    cotangent = torch.randn(1, 2, 37, 8)
    with use_backend("triton"):
        expected = operation(*inputs)
        actual = torch.compile(operation, fullgraph=True, dynamic=dynamic, backend="aot_eager")(*inputs)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent)
    )


def test_compiled_once_it_takes_many_lengths():
    compiled = torch.compile(
        lambda x, v, b: lsh_attention(x, v, b, num_buckets=BUCKETS, chunk_size=8, circular=True),
        fullgraph=True, dynamic=True, backend="aot_eager",
    )  # fmt: skip
    for length in 37, 50, 20:
        inputs, buckets = draw((1, 2, length, 16, 8, 2, 8), torch.float32)
        with use_backend("triton"):
            actual = compiled(*inputs, buckets)
            expected = lsh_attention(*inputs, buckets, num_buckets=BUCKETS, chunk_size=8, circular=True)
        torch.testing.assert_close(actual, expected)


def test_thirty_backward_passes_are_equal(kernels_device):
    operation, inputs = attend(["ring"], (1, 1, 21, 16, 16, 2, 8))
    cotangent = torch.randn(1, 1, 21, 16)
    count = 30 if kernels_device == "cuda" else 3  # the interpreter has one thread
    torch.use_deterministic_algorithms(True)
    try:
        with use_backend("triton"):
            runs = [torch.autograd.grad(operation(*inputs), inputs, cotangent) for _ in range(count)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_autocast_casts_what_is_multiplied(dtypes, kernels_device):
    operation, inputs = attend(["causal"])
    inputs = [t.detach().to(dtype).requires_grad_() for t, dtype in zip(inputs, dtypes, strict=True)]
    outcomes = []
    for backend in "reference", "triton":
        with torch.autocast(kernels_device, torch.bfloat16), use_backend(backend):
            out = operation(*inputs)
        outcomes.append([out, *torch.autograd.grad(out, inputs, torch.ones_like(out))])
    for expected, actual in zip(*outcomes, strict=True):
        assert actual.dtype == expected.dtype
        assert (actual - expected).norm() < 0.02 * expected.norm()


def test_forward_derivatives_take_the_definition():
    operation, inputs = attend(["causal"], dtype=torch.float64)
    inputs = tuple(t.detach() for t in inputs)
    tangents = tuple(torch.randn_like(t) for t in inputs)
    with use_backend("triton"), pytest.warns(UserWarning, match="forward-mode"):
        _, actual = torch.func.jvp(operation, inputs, tangents)
    with use_backend("reference"):
        _, expected = torch.func.jvp(operation, inputs, tangents)
    torch.testing.assert_close(actual, expected)


def test_explain_says_why():
    def refusal(*sizes: int, dtype: torch.dtype = torch.float32) -> str:
        x = torch.empty(sizes, dtype=dtype)
        explanation = explain(lsh_attention, x, x, torch.zeros(1, 1, 2, sizes[2]).long())
        return explanation.refusals.get("triton", explanation.chosen)

    if not torch.empty(0).is_cuda:
        assert "not on a CUDA device" in refusal(1, 1, 4, 8)
    with use_backend("triton"):
        assert refusal(1, 1, 4, 8) == refusal(1, 1, 4, 8, dtype=torch.float64) == "triton"
        assert "at most 256 wide" in refusal(1, 1, 4, 260)
        assert "has no torch.int32" in refusal(1, 1, 4, 8, dtype=torch.int32)


@pytest.mark.parametrize(
    ("dtype", "widths", "message"),
    [
        (torch.float16, (256, 256), None),
        (torch.float16, (64, 257), "at most 256 wide in the kernel, these 257"),
        (torch.float32, (128, 128), None),
        (torch.float32, (160, 64), "float32 heads wider than 128"),
        (torch.float32, (64, 160), "float32 heads wider than 128"),
        (torch.float64, (64, 64), "float64 the kernel is made for tests"),
    ],
    ids=str,
)
def test_what_the_kernel_of_a_gpu_refuses(dtype, widths, message):
    with FakeTensorMode():
        inputs = [torch.empty(1, 2, 9, width, device="cuda", dtype=dtype) for width in widths]
        buckets = torch.empty(1, 2, 3, 9, device="cuda", dtype=torch.int64)
        explanation = explain(lsh_attention, *inputs, buckets)
    assert explanation.chosen == ("triton" if message is None else "reference")
    assert message is None or message in explanation.refusals["triton"]


@pytest.mark.gpu
def test_addresses_beyond_31_bits():
    batch, length = 3, 2**16
    query_key, value = (torch.randn(batch, 16, length, 64, dtype=torch.bfloat16) for _ in range(2))
    buckets = torch.randint(64, (batch, 16, 12, length))  # of the rounds' outputs 2.4e9 numbers
    options = {"num_buckets": 64, "chunk_size": 64, "is_causal": True}
    with use_backend("triton"), torch.no_grad():
        out = lsh_attention(query_key, value, buckets, **options)
        alone = lsh_attention(query_key[-1:, -1:], value[-1:, -1:], buckets[-1:, -1:], **options)
    torch.testing.assert_close(out[-1:, -1:], alone)


@pytest.mark.gpu
def test_twenty_lengths_compile_few_kernels():
    from lamina.kernels.fused._lsh_forward import forward_kernel

    def compiled() -> int:
        return sum(len(cache[0]) for cache in forward_kernel.device_caches.values())

    before = compiled()
    for length in range(1029, 1049):
        inputs, buckets = draw((1, 2, length, 64, 64, 2, 64), torch.float16)
        with use_backend("triton"):
            lsh_attention(*inputs, buckets, num_buckets=BUCKETS, chunk_size=64)
    assert compiled() - before <= 4  # strides that sixteen divides, or does not


# Bytes of registers that a kernel may spill into local memory.
COMPILED = [
    ("bfloat16-64", ("once", "dropout"), 16),
    ("bfloat16-128", ("causal",), 16),
    ("float32-64", ("wide",), 64),
    pytest.param(
        "bfloat16-64",
        ("causal", "wide", "ring", "own", "small", "large", "single"),
        16,
        marks=pytest.mark.slow,
    ),
    pytest.param("float16-80", ("ring", "wide"), 16, marks=pytest.mark.slow),
    pytest.param("bfloat16-16", ("causal", "dropout"), 16, marks=pytest.mark.slow),
    pytest.param("bfloat16-128", ("ring", "own", "once", "dropout"), 64, marks=pytest.mark.slow),
    pytest.param("bfloat16-256", ("causal", "ring", "dropout"), 64, marks=pytest.mark.slow),
    pytest.param("float32-64", ("causal", "once", "dropout"), 64, marks=pytest.mark.slow),
    pytest.param("float32-128", ("causal", "wide", "dropout"), 128, marks=pytest.mark.slow),
    pytest.param("float32-256", ("causal",), 1024, marks=pytest.mark.slow),
    pytest.param("float64-64", ("causal",), 8192, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "features", "spilled"), COMPILED)
def test_compiles_for_hopper(for_sm90, kind, features, spilled):
    compiled = for_sm90("lsh_attention.py", *(f"{kind}-{f}" for f in features), spilled=spilled)
    for feature in features:
        names = [k["kernel"] for k in compiled if k["case"] == f"{kind}-{feature}"]
        combined = [] if feature == "single" else ["combine_kernel"]
        more = ["kept_kernel"] if feature == "dropout" else []
        assert names == ["forward_kernel", *combined, "facts_kernel", "backward_kernel", *more]
    for kernel in compiled:
        assert kernel["atomics"] == 0, kernel  # every run gives the same
        if kernel["kernel"] in ("forward_kernel", "backward_kernel") and not kind.startswith("float64"):
            assert kernel["tensor_cores"] > 0, kernel
