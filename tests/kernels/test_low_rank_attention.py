"""Low-rank attention as an operation: its definition, its choice of path, and what it refuses."""

import pytest
import torch
from lamina.kernels import dot_product_attention, explain, low_rank_attention, use_backend
from lamina.kernels.low_rank_attention import MOST_COLUMNS, low_rank_attention_reference, most_columns
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

on_the_device = pytest.mark.usefixtures("kernels_device")


def draw(queries: int = 7, columns: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = (2, 4, queries, 3), (2, 2, columns, 3), (2, 2, columns, 11)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@on_the_device
def test_is_the_formula():
    query, key, value = draw()
    key_mask = torch.tensor([[True, False, True, True, False], [False] * 5])
    out = low_rank_attention(query, key, value, key_mask=key_mask, scale=0.7)
    for h in range(4):
        scores = 0.7 * query[0, h] @ key[0, h // 2, key_mask[0]].T
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        torch.testing.assert_close(out[0, h], weights @ value[0, h // 2, key_mask[0]])
    assert (out[1] == 0).all()


@on_the_device
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("queries", [7, 60])
def test_equals_attention_to_as_many_keys(backend, queries):
    inputs = draw(queries)
    key_mask = torch.tensor([[True, False, True, True, False], [True] * 5])
    with use_backend(backend):
        actual = low_rank_attention(*inputs, key_mask=key_mask)
    expected = dot_product_attention(*inputs, mask=key_mask[:, None, None])
    torch.testing.assert_close(actual, expected)
    reference = low_rank_attention_reference(*inputs, key_mask=key_mask)
    torch.testing.assert_close(actual, reference)


@on_the_device
def test_is_twice_differentiable():
    inputs = [t.detach()[:1, :2, :3, :2].requires_grad_() for t in draw()]
    key_mask = torch.tensor([[True, False, True]])
    assert gradcheck(lambda *t: low_rank_attention(*t, key_mask=key_mask), inputs)
    assert gradgradcheck(lambda *t: low_rank_attention(*t, key_mask=key_mask), inputs)


@on_the_device
def test_dropout_is_of_the_weights():
    query = key = torch.zeros(2, 4, 64, 16)
    left = low_rank_attention(query, key, torch.eye(64).expand(2, 4, 64, 64), dropout=0.3) * 64
    assert (left == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)


@on_the_device
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_and_keeps_its_numbers(dynamic):
    inputs, cotangent = draw(60), torch.randn(2, 4, 60, 11).double()
    key_mask = torch.rand(2, 5) < 0.7
    compiled = torch.compile(low_rank_attention, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    outs = [of(*inputs, key_mask=key_mask) for of in (compiled, low_rank_attention)]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(out, inputs, cotangent) for out in outs))


def refusal(dtype: torch.dtype, *, queries: int = 2048, columns: int = 64, dim: int = 64, **options) -> str:
    """Why the kernel is not taken, by tensors that are on no device; empty where it is."""
    shapes = (1, 2, queries, dim), (1, 2, columns, dim), (1, 2, columns, dim)
    inputs = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
    return explain(low_rank_attention, *inputs, **options).refusals.get("triton", "")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    module = __import__("sys").modules[low_rank_attention.__module__]
    monkeypatch.setattr(module, "triton_refusal", lambda *tensors: None)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_the_kernel_is_chosen_by_sizes_alone():
    assert refusal(torch.bfloat16) == refusal(torch.float16, columns=256) == ""
    assert refusal(torch.bfloat16, queries=1024, dim=128, columns=128) == ""
    assert "below 1024 queries" in refusal(torch.bfloat16, queries=1023)
    assert "of heads 64 wide 256 columns fit on chip, here are 257" in refusal(torch.bfloat16, columns=257)
    assert "of heads 65 wide 128 columns fit" in refusal(torch.bfloat16, columns=129, dim=65)
    assert "at most 128 wide in the kernel, these 129" in refusal(torch.bfloat16, dim=129)
    assert "unmeasured" in refusal(torch.float32)
    assert "dropped" in refusal(torch.bfloat16, dropout=0.1)
    assert "has no torch.complex64" in refusal(torch.complex64)
    with use_backend("triton"):  # a wish needs no reason to be faster
        assert refusal(torch.float32, queries=1, columns=128) == ""
        assert "128 columns fit" in refusal(torch.float32, columns=129)


def test_on_a_cpu_the_kernel_is_refused_with_the_reason():
    told = explain(low_rank_attention, *draw(60))
    assert told.chosen == "torch"
    assert "not on a CUDA device" in told.refusals["triton"]
    assert "no key" in explain(low_rank_attention, *draw(60, 0)).refusals["torch"]


def test_the_configurations_hold_as_many_columns_as_are_taken():
    from lamina.kernels.fused.low_rank_attention import tiles

    for dtype in torch.float16, torch.bfloat16, torch.float32, torch.float64:
        for size, columns in MOST_COLUMNS[dtype.itemsize].items():
            assert most_columns(dtype, size) == columns
            assert tiles("forward", dtype, size, 4096, columns).columns == columns


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 4, 7, 3), (2, 2, 5, 4), (2, 2, 5, 4)),  # sizes of heads
        ((2, 4, 7, 3), (2, 3, 5, 3), (2, 3, 5, 3)),  # three serve four
        ((2, 4, 7, 3), (2, 0, 5, 3), (2, 0, 5, 3)),
        ((2, 4, 7, 3), (2, 2, 5, 3), (2, 2, 6, 3)),  # columns
        ((2, 4, 7, 3), (1, 2, 5, 3), (1, 2, 5, 3)),  # batches
        ((4, 7, 3), (2, 5, 3), (2, 5, 3)),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_named(shapes):
    with pytest.raises(ValueError, match=r"expected query \(B, H, Lq, D\), key \(B, G, k, D\)"):
        low_rank_attention(*map(torch.randn, shapes))


def test_what_else_does_not_fit_is_named():
    query, key, value = draw()
    with pytest.raises(ValueError, match="share one dtype"):
        low_rank_attention(query, key.float(), value)
    with pytest.raises(ValueError, match=r"key_mask must be \(B, k\) = \(2, 5\)"):
        low_rank_attention(query, key, value, key_mask=torch.ones(5).bool())
    with pytest.raises(ValueError, match=r"key_mask must broadcast to \(2, 5\)"):
        low_rank_attention(query, key, value, key_mask=torch.ones(2, 7).bool())
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\)"):
        low_rank_attention(query, key, value, dropout=1.0)
