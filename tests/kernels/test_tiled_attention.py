"""The CPU's tiled attention against the definition: every input, gradient and way to cut it into tiles."""

import math

import pytest
import torch
from lamina.kernels import _score_tiles, _tiled_attention
from lamina.kernels._tiled_attention import attention, definition, tiled_attention
from lamina.kernels.backend import forced_backend
from lamina.kernels.dot_product_attention import attention_weights, dot_product_attention_reference
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

# (B, H, G, Lq, Lk, D, Dv): primes; grouped; one of each; more queries than keys. D = Dv is PyTorch's forward.
SIZES = [(2, 3, 3, 5, 7, 11, 11), (3, 6, 2, 3, 13, 5, 2), (2, 1, 1, 1, 1, 1, 1), (1, 6, 3, 17, 11, 3, 3)]
EMPTY = [(0, 2, 2, 3, 5, 7, 7), (2, 2, 1, 0, 5, 7, 7), (2, 2, 2, 3, 0, 7, 7), (2, 0, 2, 3, 5, 7, 7)]
MASKS = ["none", "key", "query-key", "head", "row without keys"]
SCALE = 0.7
TERMS = 10.0  # of a row: each a product of a cotangent with values, times scale and keys


@pytest.fixture(params=[1, 90, 2**20], ids=["rows", "few", "whole"])
def cells(request, monkeypatch) -> int:
    """Tiles of one row, of some rows or heads, and of everything."""
    monkeypatch.setattr(_score_tiles, "CELLS", request.param)
    return request.param


def draw(sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    batch, heads, groups, queries, keys, dim, value_dim = sizes
    shapes = (batch, heads, queries, dim), (batch, groups, keys, dim), (batch, groups, keys, value_dim)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def draw_mask(kind: str, sizes: tuple[int, ...]) -> Tensor | None:
    batch, heads, _, queries, keys, *_ = sizes
    shape = {"key": (batch, 1, 1, keys), "query-key": (queries, keys), "head": (1, heads, queries, keys)}
    mask = torch.rand(shape.get(kind, (batch, 1, queries, keys))) < 0.6
    if kind == "row without keys":
        mask[:, :, 0] = False
    return None if kind == "none" else mask


def draw_bias(own: tuple[bool, ...], sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    batch, heads, _, queries, keys, *_ = sizes
    shape = [n if has else 1 for n, has in zip((batch, heads, queries, keys), own, strict=True)]
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def both(mask: Tensor | None = None, is_causal: bool = False):
    """Tiled, or the definition where that is asked for."""

    def operation(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        if forced_backend() == "reference":
            return dot_product_attention_reference(
                query, key, value, mask=mask, bias=bias, is_causal=is_causal, scale=SCALE
            )
        return tiled_attention(query, key, value, mask, bias, is_causal, SCALE, 0.0)

    return operation


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_is_as_exact_as_the_definition(sizes, mask, is_causal, dtype, cells, compare):
    inputs = [*draw(sizes, dtype), draw_bias((False, True, True, True), sizes, dtype)]
    compare(both(draw_mask(mask, sizes), is_causal), inputs, backend="torch", terms=TERMS)


@pytest.mark.parametrize("own", [tuple(n >> i & 1 == 1 for i in range(4)) for n in range(16)], ids=str)
@pytest.mark.parametrize("sizes", SIZES[:2], ids=str)
def test_a_bias_of_any_shape_gets_its_gradient(sizes, own, cells, compare):
    compare(both(), [*draw(sizes), draw_bias(own, sizes)], backend="torch", terms=TERMS)


@pytest.mark.parametrize("shape", [(), (7,), (5, 7), (5, 1), (3, 1, 7)], ids=str)
def test_a_bias_and_a_mask_of_few_dimensions(shape, compare):
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    compare(both(torch.rand(shape) < 0.8), [*draw(SIZES[0]), bias], backend="torch", terms=TERMS)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sizes", EMPTY, ids=str)
def test_empty_sizes(sizes, is_causal, compare):
    inputs = [*draw(sizes), draw_bias((True, False, True, True), sizes)]
    compare(both(is_causal=is_causal), inputs, backend="torch", terms=TERMS)
    out = both()(*inputs)
    assert (out == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out, inputs, torch.randn_like(out)))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("how", ["mask", "bias", "causal"])
def test_a_query_without_keys_gives_zero_and_passes_no_gradient(how, dropout, cells):
    inputs = [*draw((2, 3, 3, 5, 3, 7, 2)), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)]
    if how == "bias":
        inputs[3] = torch.full((5, 3), -math.inf, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(5, 3, dtype=torch.bool) if how == "mask" else None
    out = tiled_attention(*inputs[:3], mask, inputs[3], how == "causal", SCALE, dropout)
    gradients = torch.autograd.grad(out, inputs, torch.randn_like(out))
    blind = slice(0, 2) if how == "causal" else slice(None)
    assert (out[:, :, blind] == 0).all()
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[0][:, :, blind] == 0).all()
    assert how == "causal" or all((g == 0).all() for g in gradients)


def test_a_bias_that_excludes_some(cells, compare):
    bias = draw_bias((True, True, True, True), SIZES[1]).detach()
    bias = bias.masked_fill(torch.rand_like(bias) < 0.3, -math.inf).requires_grad_()
    compare(both(), [*draw(SIZES[1]), bias], backend="torch", terms=TERMS)


def test_the_least_finite_bias_excludes_nothing_where_it_is_all(compare):
    bias = torch.full((5, 7), torch.finfo(torch.float32).min, requires_grad=True)
    compare(both(), [*draw(SIZES[0], torch.float32), bias], backend="torch", terms=TERMS)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_any_strides_of_inputs_and_cotangent(dropout, cells):
    sizes = SIZES[0]
    inputs = [*draw(sizes), draw_bias((True, True, True, True), sizes)]
    cotangent = torch.randn(2, 3, 1, 11, dtype=torch.float64)
    outcomes = []
    for make in (torch.Tensor.contiguous, lambda t: t.mT.contiguous().mT):
        torch.manual_seed(1)
        given = [make(t.detach()).requires_grad_() for t in inputs]
        out = tiled_attention(*given[:3], None, given[3], False, SCALE, dropout)
        grad = cotangent.expand(2, 3, 5, 11)
        outcomes.append([out, *torch.autograd.grad(out, given, grad if len(outcomes) else grad.contiguous())])
    torch.testing.assert_close(*outcomes)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)], ids=str)
def test_gradients_of_some_inputs(wanted, dropout):
    inputs = [*draw(SIZES[1]), draw_bias((False, True, True, True), SIZES[1])]
    seed = torch.tensor([5]) if dropout else None
    out = attention(*inputs[:3], None, inputs[3], False, SCALE, dropout, seed)
    cotangent = torch.randn_like(out)
    every = torch.autograd.grad(out, inputs, cotangent)
    some = [t.detach().requires_grad_(n in wanted) for n, t in enumerate(inputs)]
    out = attention(*some[:3], None, some[3], False, SCALE, dropout, seed)
    found = torch.autograd.grad(out, [some[n] for n in wanted], cotangent)
    torch.testing.assert_close(found, tuple(every[n] for n in wanted))


@pytest.mark.parametrize("seed", [None, torch.tensor([3])], ids=["whole", "dropout"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_derivatives_are_the_numeric_ones(is_causal, seed, monkeypatch):
    monkeypatch.setattr(_score_tiles, "CELLS", 10)
    sizes = (1, 4, 2, 3, 5, 2, 3)
    mask = draw_mask("row without keys", sizes)
    inputs = [*draw(sizes), draw_bias((False, True, True, True), sizes)]

    def operation(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        dropout = 0.3 if seed is not None else 0.0
        return attention(query, key, value, mask, bias, is_causal, SCALE, dropout, seed)

    assert gradcheck(operation, inputs)
    assert gradgradcheck(operation, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["none", "key", "row without keys"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_dropout_is_that_of_the_definition(sizes, is_causal, mask, dtype, cells, unwritten_memory_is_nan):
    inputs = [*draw(sizes, dtype), draw_bias((True, False, True, True), sizes, dtype)]
    rest = (is_causal, SCALE, 0.4, torch.tensor([7]))
    taking_part = draw_mask(mask, sizes)
    outcomes = []
    for operation in (attention, definition):
        out = operation(*inputs[:3], taking_part, inputs[3], *rest)
        assert out.dtype is dtype
        generator = torch.Generator().manual_seed(2)
        cotangent = torch.randn(out.shape, generator=generator).to(dtype)
        outcomes.append([out, *torch.autograd.grad(out, inputs, cotangent)])
    tolerance = {"rtol": 2e-2, "atol": 4e-2} if dtype is torch.bfloat16 else {}
    torch.testing.assert_close(*outcomes, **tolerance)


def kept_weights(batch: int, length: int, dropout: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of equal scores: 1 / length / (1 - dropout), or nothing."""
    tokens = torch.zeros(batch, 1, length, 1, dtype=dtype)
    values = torch.eye(length, dtype=dtype).expand(batch, 1, length, length)
    return tiled_attention(tokens, tokens, values, None, None, False, 1.0, dropout)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dropout", [0.01, 0.1, 0.5, 0.9])
def test_so_many_are_dropped_and_the_mean_stays(dropout, dtype):
    weights = kept_weights(7, 211, dropout, dtype)
    spread = math.sqrt(dropout * (1 - dropout) / weights.numel())
    assert (weights == 0).double().mean().item() == pytest.approx(dropout, abs=4 * spread)
    left = weights[weights != 0]
    torch.testing.assert_close(left, torch.full_like(left, 1 / 211 / (1 - dropout)))


def test_dropped_weights_have_no_pattern():
    """Neighbours in a row or column, the same place of other tiles, and any shift agree as chance would."""
    dropped = (kept_weights(16, 256, 0.5) == 0).double().mul_(2).sub_(1)[:, 0]
    shifts = [(b, i, j) for b in (0, 1, 5) for i in (0, 1, 2, 7, 128) for j in (0, 1, 2, 3, 64)]
    for shift in shifts[1:]:
        agreement = (dropped * dropped.roll(shift, (0, 1, 2))).mean().item()
        assert abs(agreement) < 4.5 / math.sqrt(dropped.numel()), shift
    for dim in (0, 1, 2):  # sums over a line of fair signs vary as much as the line is long
        variance = dropped.sum(dim).square().mean().item() / dropped.shape[dim]
        assert variance == pytest.approx(1, abs=0.1)


def test_the_seed_of_torch_is_that_of_dropout():
    first, second = kept_weights(2, 31, 0.5), kept_weights(2, 31, 0.5)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    torch.testing.assert_close(kept_weights(2, 31, 0.5), first, rtol=0, atol=0)


@pytest.mark.parametrize("dropout", [1e-12, 1 - 1e-12])
def test_the_least_and_the_most_dropout_are_finite(dropout):
    weights = kept_weights(2, 31, dropout)
    assert weights.isfinite().all()
    assert (weights != 0).all() if dropout < 0.5 else (weights == 0).all()


def test_passes_are_the_same_each_time():
    inputs = [*draw((2, 4, 2, 67, 53, 8, 8), torch.float32), torch.randn(4, 67, 53, requires_grad=True)]
    cotangent = torch.randn(2, 4, 67, 8)
    outcomes = []
    for _ in range(3):
        torch.manual_seed(1)
        out = tiled_attention(*inputs[:3], None, inputs[3], True, SCALE, 0.2)
        outcomes.append([out, *torch.autograd.grad(out, inputs, cotangent)])
    for other in outcomes[1:]:
        torch.testing.assert_close(other, outcomes[0], rtol=0, atol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("sizes", SIZES[:2], ids=str)
def test_is_registered(sizes, dropout):
    inputs = [*draw(sizes), draw_bias((False, True, True, True), sizes)]
    seed = torch.tensor([5]) if dropout else None
    rest = (draw_mask("key", sizes), inputs[3], True, SCALE, dropout, seed)
    torch.library.opcheck(attention, (*inputs[:3], *rest))
    out = attention(*inputs[:3], *rest).detach()
    detached = [t.detach() for t in inputs]
    for needed in [True, True, True, True], [True, False, False, False]:
        arguments = (torch.randn_like(out), needed, *detached[:3], rest[0], detached[3], *rest[2:])
        torch.library.opcheck(_tiled_attention._attention_backward, arguments)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiles_whole_and_keeps_its_numbers(dropout):
    def operation(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, seed: Tensor | None) -> Tensor:
        return attention(query, key, value, None, bias, False, SCALE, dropout, seed).cos()

    seed = torch.tensor([5]) if dropout else None
    compiled = torch.compile(operation, fullgraph=True, dynamic=True)
    for sizes in (2, 3, 3, 5, 7, 11, 11), (3, 4, 2, 6, 8, 11, 11):
        inputs = [*draw(sizes, torch.float32), draw_bias((False, True, True, True), sizes, torch.float32)]
        expected, actual = operation(*inputs, seed), compiled(*inputs, seed)
        torch.testing.assert_close(actual, expected)
        cotangent = torch.randn_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent)
        )


def test_the_wrapper_compiles_with_a_seed_of_its_own():
    inputs = [*draw(SIZES[0], torch.float32), torch.randn(5, 7, requires_grad=True)]

    def operation(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return tiled_attention(query, key, value, None, bias, False, SCALE, 0.5).cos()

    compiled = torch.compile(operation, fullgraph=True, dynamic=True)
    first, second = compiled(*inputs), compiled(*inputs)
    assert not torch.equal(first, second)
    gradients = torch.autograd.grad(first, inputs, torch.randn_like(first))
    assert all(g.isfinite().all() for g in gradients)


def test_a_checkpoint_drops_the_same():
    inputs = [*draw(SIZES[0]), torch.randn(5, 7, dtype=torch.float64, requires_grad=True)]
    cotangent = torch.randn(2, 3, 5, 11, dtype=torch.float64)

    def operation(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return tiled_attention(query, key, value, None, bias, False, SCALE, 0.5)

    outcomes = []
    for again in (False, True):
        torch.manual_seed(1)
        if again:
            out = torch.utils.checkpoint.checkpoint(operation, *inputs, use_reentrant=False)
        else:
            out = operation(*inputs)
        outcomes.append(torch.autograd.grad(out, inputs, cotangent))
    torch.testing.assert_close(*outcomes)


def test_exports():
    class Attend(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
            return tiled_attention(query, key, value, None, bias, True, SCALE, 0.0)

    inputs = (*draw(SIZES[0]), draw_bias((False, True, True, True), SIZES[0]))
    program = torch.export.export(Attend(), inputs)
    torch.testing.assert_close(program.module()(*inputs), Attend()(*inputs))


def test_neighbouring_heads_share_a_key():
    query, key, value = draw((1, 4, 2, 3, 5, 7, 2))
    weights = attention_weights(query, key, scale=SCALE)
    out = tiled_attention(query, key, value, None, None, False, SCALE, 0.0)
    torch.testing.assert_close(out[:, :2], weights[:, :2] @ value[:, :1])
    torch.testing.assert_close(out[:, 2:], weights[:, 2:] @ value[:, 1:])


@pytest.mark.parametrize("cells", [1, 20, 90, 300, 1000])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_tiles_are_small_and_meet_each_score_once(sizes, is_causal, cells, monkeypatch):
    monkeypatch.setattr(_score_tiles, "CELLS", cells)
    query, key, _ = draw(sizes)
    batch, heads, groups, queries, keys, *_ = sizes
    met = torch.zeros(batch, heads, queries, keys)
    for block in _score_tiles.blocks(query, key, is_causal):
        assert all((t.batches, t.groups) == (block[0].batches, block[0].groups) for t in block)
        for tile in block:
            part = tile.cells_of(met)
            part += 1
            assert part.numel() <= max(cells, heads // groups * keys)
    visible = torch.ones(queries, keys).tril(keys - queries if is_causal else keys) > 0
    assert (met[..., visible] == 1).all()
    assert (met <= 1).all()
