"""Low-rank attention: its formula, plain attention at full rank, the package `linformer`, and sharing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lamina.kernels import use_backend
from lamina.layers import LengthProjection, LowRankAttention, MultiHeadAttention
from lamina.viz import capture_attention
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

sizes, seeds = st.integers(1, 9), st.integers(0, 2**31)
LONGEST, RANK = 11, 3  # from one token on, so that a sequence is shorter than the rank, as long, and longer
KINDS = ["linear", "mean", "max", "conv"]
SHARES = ["key_value", "heads", "none"]
every_kind = pytest.mark.parametrize("kind", KINDS)
kinds, shares = st.sampled_from(KINDS), st.sampled_from(SHARES)
every_share = pytest.mark.parametrize("share", SHARES)


def draw(kind: str = "linear", share: str = "key_value", **options) -> LowRankAttention:
    """A layer with weights of order one, and biases that are not zero."""
    options = {"max_length": LONGEST, "rank": RANK, "num_kv_heads": 2} | options
    layer = LowRankAttention(8, 4, projection=kind, share=share, dtype=torch.float64, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def formula(layer: LowRankAttention, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor) -> Tensor:
    """The paper's equation 7, one row of the batch and one head at a time: the projection after W, b."""
    rows, groups = [], layer.num_heads // layer.num_kv_heads
    for b in range(len(query)):
        heads = []
        for h in range(layer.num_heads):
            there = key_mask[b : b + 1]
            own = slice(h * layer.head_dim, (h + 1) * layer.head_dim)
            of = h // groups
            shared = slice(of * layer.head_dim, (of + 1) * layer.head_dim)
            q = layer.query(query[b])[:, own]
            k, v = layer.key(key[b])[:, shared], layer.value(value[b])[:, shared]

            def projected(by: LengthProjection, tokens: Tensor, of=of, there=there) -> Tensor:
                if by.heads == 1:
                    return by(tokens[None, None], key_mask=there)[0, 0]
                tiled = tokens.expand(1, by.heads, -1, -1)
                return by(tiled, key_mask=there)[0, of]

            exists = layer.key_projection.column_mask(there)[0]
            scores = q @ projected(layer.key_projection, k).T / math.sqrt(layer.head_dim)
            weights = scores[:, exists].softmax(-1)
            heads.append(weights @ projected(layer.value_projection, v)[exists])
        rows.append(layer.out(torch.cat(heads, -1)))
    return torch.stack(rows)


@settings(max_examples=80)
@given(kind=kinds, share=shares, seed=seeds, queries=sizes, keys=sizes)
def test_equals_its_formula(kind, share, seed, queries, keys):
    """Where the matrix is shared and linear this compares two orders: mixed before W and after it."""
    torch.manual_seed(seed)
    layer, query, key, value = draw(kind, share), x(3, queries, 8), x(3, keys, 8), x(3, keys, 8)
    key_mask = torch.rand(3, keys) < 0.7
    torch.testing.assert_close(
        layer(query, key, value, key_mask=key_mask), formula(layer, query, key, value, key_mask)
    )
    everywhere = torch.ones_like(key_mask)
    torch.testing.assert_close(layer(query, key), formula(layer, query, key, key, everywhere))
    torch.testing.assert_close(layer(key), formula(layer, key, key, key, everywhere))


@every_share
@pytest.mark.parametrize("kind", ["linear", "mean", "conv"])
def test_the_cheaper_order_has_the_gradients_of_the_other(kind, share):
    layer, tokens = draw(kind, share), x(2, 7, 8).requires_grad_()
    key_mask = torch.tensor([[True] * 7, [True] * 2 + [False] * 2 + [True] * 3])
    of = [tokens, *layer.parameters()]
    cotangent = x(2, 7, 8)
    actual = torch.autograd.grad(layer(tokens, key_mask=key_mask), of, cotangent)
    expected = torch.autograd.grad(formula(layer, tokens, tokens, tokens, key_mask), of, cotangent)
    torch.testing.assert_close(actual, expected)


class Doubled(nn.Module):
    """Stands for an adapter that a user puts around a projection."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.weight, self.bias = linear, linear.weight, linear.bias

    def forward(self, tokens: Tensor) -> Tensor:
        return 2 * self.linear(tokens)


@pytest.mark.parametrize("name", ["key", "value"])
def test_what_stands_in_place_of_a_projection_is_called(name):
    layer, tokens = draw(), x(2, 7, 8)
    linear = getattr(layer, name)
    setattr(layer, name, Doubled(linear))
    actual = layer(tokens)
    setattr(layer, name, linear)
    with torch.no_grad():
        linear.weight.mul_(2)
        linear.bias.mul_(2)
    torch.testing.assert_close(actual, layer(tokens))


@every_share
@every_kind
@pytest.mark.parametrize("length", [7, LONGEST])
def test_full_rank_with_the_identity_is_plain_attention(kind, share, length):
    layer, plain = draw(kind, share, rank=LONGEST), MultiHeadAttention(8, 4, num_kv_heads=2).double()
    with torch.no_grad():
        for projection in layer.key_projection, layer.value_projection:
            if kind == "linear":
                projection.weight.copy_(torch.eye(LONGEST))
            if kind == "conv":
                projection.weight.fill_(1)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "projection" not in k})
    tokens, key_mask = x(2, LONGEST, 8).requires_grad_(), torch.arange(LONGEST).expand(2, -1) < length
    if kind == "linear":
        # E makes a column of zeros of a masked token, and a softmax counts it in.
        key_mask = None
    actual, expected = layer(tokens, key_mask=key_mask), plain(tokens, key_mask=key_mask)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    of, of_plain = (
        [tokens, *(m.get_parameter(n) for n, _ in plain.named_parameters())] for m in (layer, plain)
    )
    cotangent = torch.randn_like(actual)
    torch.testing.assert_close(
        torch.autograd.grad(actual, of, cotangent), torch.autograd.grad(expected, of_plain, cotangent)
    )
    if kind != "max":
        weights = layer.weights(tokens, key_mask=key_mask)
        torch.testing.assert_close(weights, plain.weights(tokens, key_mask=key_mask))


def twins(tied: bool, one_kv_head: bool = False) -> tuple[LowRankAttention, nn.Module]:
    """Ours, and `linformer`'s with the same weights. `tied` is its share_kv, which ties W_k to W_v too."""
    linformer = pytest.importorskip("linformer")
    theirs = linformer.LinformerSelfAttention(
        8, LONGEST, k=RANK, heads=4, share_kv=tied, one_kv_head=one_kv_head
    ).double()
    share = "key_value" if tied else "heads"
    ours = draw(share=share, num_kv_heads=1 if one_kv_head else 4)
    with torch.no_grad():
        for linear, weight in (
            (ours.query, theirs.to_q.weight),
            (ours.key, theirs.to_k.weight),
            (ours.value, theirs.to_k.weight if tied else theirs.to_v.weight),
        ):
            linear.weight.copy_(weight)
            linear.bias.zero_()
        ours.out.load_state_dict(theirs.to_out.state_dict())
        ours.key_projection.weight.copy_(theirs.proj_k.T)
        if not tied:
            ours.value_projection.weight.copy_(theirs.proj_v.T)
    return ours, theirs


@pytest.mark.parametrize("one_kv_head", [False, True])
@pytest.mark.parametrize("length", [1, 7, LONGEST])
def test_equals_the_package_linformer(length, one_kv_head):
    ours, theirs = twins(tied=False, one_kv_head=one_kv_head)
    tokens, cotangent = x(2, length, 8).requires_grad_(), x(2, length, 8)
    out, expected = ours(tokens), theirs(tokens)
    torch.testing.assert_close(out, expected)
    of = [tokens, ours.query.weight, ours.key.weight, ours.value.weight, ours.out.weight, ours.out.bias]
    of_theirs = [tokens, *(theirs.get_submodule(f"to_{part}").weight for part in "qkv")]
    of_theirs += [theirs.to_out.weight, theirs.to_out.bias]
    torch.testing.assert_close(
        torch.autograd.grad(out, of, cotangent, retain_graph=True),
        torch.autograd.grad(expected, of_theirs, cotangent, retain_graph=True),
    )
    matrices = [ours.key_projection.weight, ours.value_projection.weight]
    transposed = torch.autograd.grad(expected, [theirs.proj_k, theirs.proj_v], cotangent)
    for actual, e in zip(torch.autograd.grad(out, matrices, cotangent), transposed, strict=True):
        torch.testing.assert_close(actual[0], e.T)


def test_equals_the_package_linformer_with_keys_and_values_tied():
    ours, theirs = twins(tied=True)
    tokens, context = x(2, 7, 8).requires_grad_(), x(2, 5, 8).requires_grad_()
    cotangent, out, expected = x(2, 7, 8), ours(tokens, context), theirs(tokens, context=context)
    torch.testing.assert_close(out, expected)
    actual = torch.autograd.grad(
        out,
        [tokens, context, ours.key.weight, ours.value.weight, ours.key_projection.weight],
        cotangent,
    )
    wanted = torch.autograd.grad(expected, [tokens, context, theirs.to_k.weight, theirs.proj_k], cotangent)
    torch.testing.assert_close(actual[:2], wanted[:2])
    torch.testing.assert_close(actual[2] + actual[3], wanted[2])
    torch.testing.assert_close(actual[4][0], wanted[3].T)


def twelve_layers(share: str, by_layer: bool, n: int = 24, k: int = 4) -> nn.ModuleList:
    one = LengthProjection(n, k, device="meta") if by_layer else None
    return nn.ModuleList(
        LowRankAttention(24, 12, max_length=n, rank=k, share=share, key_projection=one, device="meta")
        for _ in range(12)
    )


@pytest.mark.parametrize(
    ("share", "by_layer", "count"),
    [("none", False, 288), ("heads", False, 24), ("key_value", False, 12), ("key_value", True, 1)],
)
def test_distinct_projections_of_the_paper(share, by_layer, count):
    layers = twelve_layers(share, by_layer)
    matrices = [m.weight for m in layers.modules() if isinstance(m, LengthProjection)]
    assert sum(len(matrix) for matrix in matrices) == count
    extra = sum(p.numel() for p in layers.parameters()) - 12 * (4 * 24 * 24 + 4 * 24)
    assert extra == count * 24 * 4


def test_a_matrix_for_all_layers_has_65536_weights():
    shared = LengthProjection(512, 128, device="meta")
    layers = [LowRankAttention(8, key_projection=shared, device="meta") for _ in range(2)]
    assert layers[0].value_projection is layers[1].key_projection is shared
    assert sum(p.numel() for p in shared.parameters()) == 65_536


def test_layers_that_share_a_projection_both_teach_it():
    first = draw()
    second = draw(key_projection=first.key_projection)
    tokens, cotangent = x(2, 7, 8), x(2, 7, 8)
    weight = first.key_projection.weight
    alone = [torch.autograd.grad(layer(tokens), weight, cotangent)[0] for layer in (first, second)]
    (together,) = torch.autograd.grad(first(tokens) + second(tokens), weight, cotangent)
    torch.testing.assert_close(together, alone[0] + alone[1])


@settings(max_examples=80)
@given(kind=kinds, share=shares, seed=seeds, queries=sizes, keys=sizes, padding=sizes)
def test_what_is_masked_has_no_influence(kind, share, seed, queries, keys, padding):
    torch.manual_seed(seed)
    padding = min(padding, LONGEST - keys)
    layer, query, key = draw(kind, share), x(2, queries, 8), x(2, keys, 8)
    padded = torch.cat([key, torch.full((2, padding, 8), 1e3).double()], dim=1).requires_grad_()
    key_mask = torch.arange(keys + padding).expand(2, -1) < keys
    out, expected = layer(query, padded, key_mask=key_mask), layer(query, key)
    torch.testing.assert_close(out, expected)
    parameters, cotangent = list(layer.parameters()), torch.randn_like(out)
    gradient, *of_parameters = torch.autograd.grad(out, [padded, *parameters], cotangent)
    assert (gradient[:, keys:] == 0).all()
    torch.testing.assert_close(of_parameters, list(torch.autograd.grad(expected, parameters, cotangent)))


@every_kind
@every_share
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("length", [2, 7])  # below the rank and above it: either order of the products
def test_a_row_without_keys_gives_the_bias_of_the_output_and_no_gradient(kind, share, backend, length):
    layer, tokens = draw(kind, share), x(2, length, 8).requires_grad_()
    key_mask = torch.tensor([[False], [True]]).expand(2, length)
    with use_backend(backend):
        out = layer(tokens, key_mask=key_mask)
    torch.testing.assert_close(out[0], layer.out.bias.expand(length, 8), rtol=0, atol=0)
    but_out = [p for name, p in layer.named_parameters() if not name.startswith("out")]
    gradients = torch.autograd.grad(out[0], [tokens, *but_out], x(length, 8))
    assert all((gradient == 0).all() for gradient in gradients)
    if kind != "max":
        weights = layer.weights(tokens, key_mask=key_mask)
        assert (weights[0] == 0).all()
        assert (layer.column_weights(tokens, key_mask=key_mask)[0] == 0).all()


@every_kind
def test_a_sequence_without_tokens_gives_the_bias_of_the_output(kind):
    layer = draw(kind)
    torch.testing.assert_close(layer(x(2, 5, 8), x(2, 0, 8)), layer.out.bias.expand(2, 5, 8))
    assert layer(x(2, 0, 8)).shape == (2, 0, 8)
    assert layer(x(0, 5, 8)).shape == (0, 5, 8)


@settings(max_examples=80)
@given(
    kind=st.sampled_from(["linear", "mean", "conv"]),
    share=shares,
    seed=seeds,
    queries=sizes,
    keys=sizes,
    masked=st.booleans(),
)
def test_the_output_is_the_weights_times_the_values(kind, share, seed, queries, keys, masked):
    torch.manual_seed(seed)
    layer, query, key = draw(kind, share), x(2, queries, 8), x(2, keys, 8)
    key_mask = torch.rand(2, keys) < 0.7 if masked else None
    weights = layer.weights(query, key, key_mask=key_mask)
    assert weights.shape == (2, 4, queries, keys)
    values = layer.value(key).unflatten(-1, (2, 2)).transpose(1, 2).repeat_interleave(2, 1)
    expected = layer.out((weights @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(query, key, key_mask=key_mask), expected)
    if key_mask is not None:
        assert (weights.masked_select(~key_mask[:, None, None]) == 0).all()


@every_kind
def test_weights_of_columns_sum_to_one(kind):
    layer, tokens = draw(kind), x(2, 7, 8)
    key_mask = torch.arange(7) < torch.tensor([[7], [2]])
    weights = layer.column_weights(tokens, key_mask=key_mask)
    assert weights.shape == (2, 4, 7, 3 if kind == "linear" else 2)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 7).double())
    if kind != "linear":
        assert (weights[1, ..., 1] == 0).all()


def test_values_of_a_maximum_have_no_weights():
    with pytest.raises(ValueError, match='kind "max" has no matrix, and its values no weights'):
        draw("max").weights(x(2, 7, 8))


def test_its_weights_are_captured():
    layer, tokens, key_mask = draw(), x(2, 7, 8), torch.ones(2, 7).bool()
    with capture_attention(layer) as record:
        layer(tokens, key_mask=key_mask)
    torch.testing.assert_close(record[""], [layer.weights(tokens, key_mask=key_mask)])


@given(seed=seeds, length=sizes)
def test_rows_of_a_batch_and_queries_do_not_meet(seed, length):
    torch.manual_seed(seed)
    layer, tokens = draw(), x(3, length, 8)
    out = layer(tokens)
    torch.testing.assert_close(layer(tokens[1:2]), out[1:2])
    torch.testing.assert_close(layer(tokens[:, :1], tokens), out[:, :1])


@pytest.mark.parametrize(
    ("kind", "share"), [("linear", "key_value"), ("linear", "none"), ("mean", "heads"), ("conv", "none")]
)
def test_second_derivatives(kind, share):
    layer, tokens = draw(kind, share), x(1, 4, 8).requires_grad_()
    key_mask = torch.tensor([[True, False, True, True]])

    def call(tokens: Tensor) -> Tensor:
        return layer(tokens, key_mask=key_mask)

    with use_backend("reference"):
        assert gradcheck(call, (tokens,))
        assert gradgradcheck(call, (tokens,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_kind
def test_low_precision_stays_near(kind, dtype):
    layer, tokens = draw(kind, "heads"), x(2, 7, 8).to(dtype)
    exact = layer(tokens.double())
    actual = layer.to(dtype)(tokens)
    assert actual.dtype is dtype
    assert ((actual.double() - exact).norm() / exact.norm()).item() < 0.03


def test_dropout_is_of_the_weights_and_in_training_only():
    layer, tokens = draw(dropout=0.5), x(2, 5, 8)
    assert not torch.equal(layer(tokens), layer(tokens))
    layer.eval()
    assert torch.equal(layer(tokens), layer(tokens))


def test_starts_xavier_uniform_with_zero_bias_and_leaves_a_shared_projection_alone():
    shared = LengthProjection(16, 4)
    before = shared.weight.clone()
    layer = LowRankAttention(64, 4, key_projection=shared)
    layer.reset_parameters()
    assert torch.equal(shared.weight, before)
    bound = (6 / 128) ** 0.5
    for projection in layer.query, layer.key, layer.value, layer.out:
        assert projection.weight.abs().max() <= bound
        assert projection.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert (projection.bias == 0).all()


def test_defaults_are_one_matrix_of_rank_256_and_no_bias_where_none_is_asked_for():
    layer = LowRankAttention(8, 2, max_length=300, bias=False, head_dim=3, device="meta")
    assert layer.value_projection is layer.key_projection
    assert layer.key_projection.weight.shape == (1, 256, 300)
    assert all(linear.bias is None for linear in (layer.query, layer.key, layer.value, layer.out))
    assert layer.query.weight.shape == (6, 8)


def test_it_refuses_to_be_causal_and_says_why():
    for method in "forward", "weights", "column_weights":
        with pytest.raises(ValueError, match="is_causal must be False: each column mixes all places"):
            getattr(draw(), method)(x(2, 3, 8), is_causal=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": None, "num_heads": 3}, "num_heads must divide dim, got dim=8 and num_heads=3"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads, got num_heads=4 and num_kv_heads=3"),
        ({"share": "layers"}, "share must be one of key_value, heads, none, got 'layers'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"max_length": None}, "max_length must be given where key_projection is not"),
        ({"rank": 12}, "rank must be from 1 to max_length=11, got 12"),
        (
            {"value_projection": LengthProjection(11, 3)},
            "value_projection must be given together with key_pro",
        ),
        (
            {"key_projection": LengthProjection(11, 3, heads=2)},
            "key_projection must have 1 or num_kv_heads=4",
        ),
        (
            {"key_projection": LengthProjection(11, 3), "value_projection": LengthProjection(11, 4)},
            "must give the same columns, got max_length=11, rank=3, .* and max_length=11, rank=4",
        ),
        (
            {
                "key_projection": LengthProjection(11, 3),
                "value_projection": LengthProjection(11, 3, kind="conv"),
            },
            "must give the same columns, got .*kind='linear' and .*kind='conv'",
        ),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LowRankAttention(8, **({"num_heads": 4, "max_length": LONGEST, "rank": RANK} | options))


@pytest.mark.parametrize(
    ("shapes", "key_mask", "message"),
    [
        (((2, 12, 8),), None, "key must have at most max_length=11 tokens, got 12"),
        (
            ((2, 3, 8), (2, 5, 8), (2, 4, 8)),
            None,
            r"key \(B, Lk, C\) and value \(B, Lk, C\), got \(2, 3, 8\)",
        ),
        (((2, 3, 8), (3, 5, 8)), None, r"got \(2, 3, 8\), \(3, 5, 8\) and \(3, 5, 8\)"),
        (((2, 3, 8),), torch.ones(3).bool(), r"key_mask must be \(B, Lk\) = \(2, 3\), got \(3,\)"),
        (((2, 3, 8),), torch.ones(2, 4).bool(), r"key_mask must broadcast to \(2, 3\), got \(2, 4\)"),
        (((2, 3, 8),), torch.ones(2, 3), "key_mask must be boolean"),
    ],
)
def test_bad_inputs_are_named(shapes, key_mask, message):
    with pytest.raises(ValueError, match=message):
        draw()(*(x(*shape) for shape in shapes), key_mask=key_mask)


@pytest.mark.parametrize("name", ["mask", "bias", "cache"])
def test_what_it_cannot_honour_is_no_argument(name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        draw()(x(2, 3, 8), **{name: None})
