"""Captured attention weights are those of the model's own calls, and the model does not notice."""

import math
import sys
from functools import partial

import pytest
import torch
from lamina.blocks import Encoder
from lamina.layers import AdditiveAttention, KeyValueCache, MultiHeadAttention
from lamina.layers._heads import split_heads
from lamina.models import create_model
from lamina.viz import AttentionRecord, attention_rollout, capture_attention
from torch import Tensor, nn


class Attention(nn.Module):
    """One head without a projection of the values, and without a `mask`, which some cannot honour."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(0.5)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        key = query if key is None else key
        weights = self.weights(query, key, key_mask=key_mask)
        return self.dropout(weights) @ (key if value is None else value)

    def weights(self, query: Tensor, key: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        scores = self.query(query) @ (query if key is None else key).mT
        return (
            scores.masked_fill(~key_mask[:, None], -math.inf).softmax(-1)
            if key_mask is not None
            else scores.softmax(-1)
        )


class Model(nn.Module):
    """Self-attention and then cross-attention, with what is no attention between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Attention(5)
        self.between = nn.Linear(5, 5)
        self.second = Attention(5)
        self.calls = 0

    def forward(self, x: Tensor, memory: Tensor, key_mask: Tensor | None = None) -> Tensor:
        x = self.between(self.first(x))
        return self.second(x, memory, memory, key_mask=key_mask)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def test_each_call_is_recorded_under_its_module():
    model, x, memory = Model().eval(), torch.randn(2, 3, 5), torch.randn(2, 7, 5)
    key_mask = torch.arange(7) < torch.tensor([[4], [7]])
    with capture_attention(model) as record:
        model(x, memory, key_mask)
    assert list(record) == ["first", "second"]
    torch.testing.assert_close(record["first"], [model.first.weights(x)])
    [second] = record["second"]
    query = model.between(model.first(x))
    torch.testing.assert_close(second, model.second.weights(query, memory, key_mask=key_mask))
    assert second.shape == (2, 3, 7)
    assert second[0, :, 4:].eq(0).all()
    assert not second.requires_grad


def test_several_calls_and_the_last():
    attention, x, y = Attention(5), torch.randn(2, 3, 5), torch.randn(2, 11, 5)
    with capture_attention(attention) as record:
        attention(x)
        attention(query=y, key=x)
    torch.testing.assert_close(record, AttentionRecord({"": [attention.weights(x), attention.weights(y, x)]}))
    torch.testing.assert_close(record.last(), [attention.weights(y, x)])


def test_a_shared_module_is_recorded_twice_under_its_first_name():
    attention = Attention(5)
    model = nn.Sequential(attention, nn.Tanh(), attention)
    with capture_attention(model) as record:
        model(torch.randn(2, 3, 5))
    assert {name: len(calls) for name, calls in record.items()} == {"0": 2}
    assert not torch.equal(*record["0"])


def test_nested_captures_see_the_same():
    model, arguments = Model(), (torch.randn(2, 3, 5), torch.randn(2, 7, 5))
    with capture_attention(model) as outer:
        with capture_attention(model.second) as inner:
            model(*arguments)
        model(*arguments)
    assert {name: len(calls) for name, calls in outer.items()} == {"first": 2, "second": 2}
    assert {name: len(calls) for name, calls in inner.items()} == {"": 1}
    assert torch.equal(inner[""][0], outer["second"][0])


def test_an_attention_inside_the_weights_of_another_is_not_a_call():
    class Wrapper(Attention):
        def __init__(self) -> None:
            super().__init__(5)
            self.inner = Attention(5)

        def weights(
            self, query: Tensor, key: Tensor | None = None, *, key_mask: Tensor | None = None
        ) -> Tensor:
            return super().weights(self.inner(query), key, key_mask=key_mask)

    wrapper = Wrapper()
    with capture_attention(wrapper) as outer, capture_attention(wrapper.inner) as inner:
        wrapper(torch.randn(2, 3, 5))
    # Once, by the forward: that the capture itself calls `weights` leaves no trace.
    assert {name: len(calls) for name, calls in outer.items()} == {"": 1, "inner": 1}
    assert len(inner[""]) == 1


@pytest.mark.parametrize("training", [True, False])
def test_the_model_does_not_notice(training):
    class Random(Attention):
        """Its weights draw, as those of random hashes do."""

        def weights(
            self, query: Tensor, key: Tensor | None = None, *, key_mask: Tensor | None = None
        ) -> Tensor:
            self.drawn = torch.randn(query.shape[-1])
            return super().weights(query * self.drawn, key, key_mask=key_mask)

    model, x = Random(5).train(training), torch.randn(2, 3, 5, requires_grad=True)
    torch.manual_seed(7)
    expected = model(x)
    [gradient] = torch.autograd.grad(expected, x, torch.ones_like(expected))
    drawn, state = model.drawn, torch.get_rng_state()
    torch.manual_seed(7)
    with capture_attention(model) as record:
        output = model(x)
    assert torch.equal(output, expected)
    assert torch.equal(torch.autograd.grad(output, x, torch.ones_like(output))[0], gradient)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training == training for module in model.modules())
    # What the capture draws is what the forward then draws.
    assert torch.equal(record[""][0], Attention.weights(model, x * drawn))


def test_hooks_are_removed():
    model, arguments = Model(), (torch.randn(2, 3, 5), torch.randn(2, 7, 5))
    with capture_attention(model) as record:
        assert hooks(model) == 2
    assert hooks(model) == 0
    model(*arguments)
    assert record == {}


@pytest.mark.parametrize("wrong", ["in the block", "in the weights", "in the forward"])
def test_hooks_are_removed_on_an_error(wrong):
    model, x, memory = Model(), torch.randn(2, 3, 5), torch.randn(2, 7, 5)
    if wrong == "in the weights":
        model.second.query = nn.Linear(13, 5)
    if wrong == "in the forward":
        model.between = nn.Linear(13, 5)
    with pytest.raises((RuntimeError, KeyError)), capture_attention(model):  # noqa: PT012
        model(x, memory)
        raise KeyError
    assert hooks(model) == 0
    # And nothing stays marked as being computed.
    other = Attention(5)
    with capture_attention(other) as record:
        other(x)
    assert len(record[""]) == 1


def test_hooks_of_the_user_stay():
    attention, seen = Attention(5), []
    attention.register_forward_pre_hook(lambda module, args: seen.append(args))
    with capture_attention(attention):
        attention(torch.randn(2, 3, 5))
    attention(torch.randn(2, 3, 5))
    assert len(seen) == 2


def test_device():
    attention = Attention(5).to("meta")
    with capture_attention(attention) as record:
        attention(torch.randn(2, 3, 5, device="meta"))
    assert record[""][0].is_meta
    attention = Attention(5)
    with capture_attention(attention, device="meta") as record:
        assert not attention(torch.randn(2, 3, 5)).is_meta
    assert record[""][0].is_meta


def test_a_cache_is_refused_plainly_and_none_is_none():
    attention, x = Attention(5), torch.randn(2, 3, 5)
    with capture_attention(attention) as record:
        attention(x, cache=None)
    assert len(record[""]) == 1
    wanted = r"^cache must be left out while attention is captured, got a KeyValueCache: .* 0 \(Attention\)"
    with pytest.raises(ValueError, match=wanted), capture_attention(nn.ModuleList([attention])):
        attention(x, cache=KeyValueCache())
    assert hooks(attention) == 0


def test_a_model_without_attention_is_refused():
    class Weighted(nn.Linear):
        def weights(self) -> Tensor:
            return self.weight

    model = nn.Sequential(Weighted(3, 5), nn.ParameterList())
    with (
        pytest.raises(ValueError, match=r"a method weights\(query, \.\.\.\), Sequential has none"),
        capture_attention(model),
    ):
        pass


def test_multi_head_attention():
    attention = MultiHeadAttention(6, num_heads=3, dropout=0.5)
    query, key, value = torch.randn(2, 5, 6), torch.randn(2, 7, 6), torch.randn(2, 7, 6)
    options = {
        "key_mask": torch.arange(7) < torch.tensor([[3], [7]]),
        "mask": torch.rand(5, 7) < 0.7,
        "bias": torch.randn(3, 5, 7),
        "is_causal": True,
    }
    with capture_attention(attention) as record:
        attention(query, key, value, **options)
    [weights] = record[""]
    assert weights.shape == (2, 3, 5, 7)
    torch.testing.assert_close(weights, attention.weights(query, key, **options))
    # These are the weights that the fused path applies.
    values = split_heads(attention.value(value), 3)
    heads = (weights @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention.eval()(query, key, value, **options), attention.out(heads))


def test_additive_attention_takes_no_dense_mask():
    attention = AdditiveAttention(3, 5, 7)
    query, key, key_mask = torch.randn(2, 3, 3), torch.randn(2, 11, 5), torch.rand(2, 11) < 0.5
    with capture_attention(attention) as record:
        attention(query, key, torch.randn(2, 11, 13), key_mask=key_mask)
    torch.testing.assert_close(record[""], [attention.weights(query, key, key_mask=key_mask)])


def test_a_compiled_model_runs_eagerly_inside_and_compiled_after():
    traced = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        def run(*arguments: Tensor):
            traced.append(1)
            return graph(*arguments)

        return run

    model = Model().eval()
    model.second = torch.compile(model.second, backend=backend)  # a compiled part of a compiled model
    compiled = torch.compile(model, backend=backend)
    x, memory = torch.randn(2, 3, 5), torch.randn(2, 7, 5)
    expected = compiled(x, memory)
    before = len(traced)
    with capture_attention(compiled) as record:
        torch.testing.assert_close(compiled(x, memory), expected)
    assert len(traced) == before
    assert list(record) == ["first", "second"]
    torch.testing.assert_close(record["first"], [model.first.weights(x)])
    compiled(x, memory)
    assert len(traced) > before
    assert len(record["first"]) == 1


def test_capturing_does_not_import_the_compiler(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    monkeypatch.setattr(torch.compiler, "set_stance", None)
    with capture_attention(Attention(5)):
        pass
    assert "torch._dynamo" not in sys.modules


def test_rollout_by_hand():
    first = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [0.1, 0.9]]])[None]  # its mean: 0.3, 0.7
    second = torch.tensor([[[0.2, 0.8], [0.0, 1.0]]])  # one head
    # (second + I) / 2 = [[0.6, 0.4], [0, 1]]; (first + I) / 2 = [[1, 0], [0.15, 0.85]]
    expected = torch.tensor([[[0.66, 0.34], [0.15, 0.85]]])
    torch.testing.assert_close(attention_rollout([first, second]), expected)


def test_rollout_without_skip_is_the_product():
    layers = [torch.rand(2, 3, 5, 5, dtype=torch.float64).softmax(-1) for _ in range(3)]
    product = layers[2].mean(1) @ layers[1].mean(1) @ layers[0].mean(1)
    torch.testing.assert_close(attention_rollout(layers, skip=0), product)
    torch.testing.assert_close(attention_rollout(layers, skip=1)[1], torch.eye(5, dtype=torch.float64))


def test_rollout_of_a_masked_row_keeps_its_own_token():
    weights = torch.tensor([[[0.0, 0.0], [0.5, 0.5]]])
    torch.testing.assert_close(
        attention_rollout([weights, weights], skip=0.0), torch.tensor([[[1.0, 0.0], [0.75, 0.25]]])
    )


def test_rollout_rows_sum_to_one_in_low_precision():
    layers = [torch.rand(2, 3, 67, 67).softmax(-1).bfloat16() for _ in range(12)]
    rollout = attention_rollout(layers)
    assert rollout.dtype == torch.float32
    torch.testing.assert_close(rollout.sum(-1), torch.ones(2, 67))


@pytest.mark.parametrize(
    ("layers", "skip", "message"),
    [
        ([], 0.5, "weights must hold one tensor per layer, got none"),
        ([torch.rand(2, 3, 5, 7)], 0.5, r"got \(2, 3, 5, 7\) in layer 0"),
        ([torch.rand(2, 3, 5, 5), torch.rand(2, 3, 7, 7)], 0.5, r"got \(2, 3, 7, 7\) in layer 1"),
        ([torch.rand(5, 5)], 0.5, r"got \(5, 5\) in layer 0"),
        ([torch.rand(2, 5, 5)], 1.5, r"skip must lie in \[0, 1\], got 1.5"),
        ([torch.rand(2, 5, 5)], -0.5, r"skip must lie in \[0, 1\], got -0.5"),
    ],
)
def test_rollout_refuses(layers, skip, message):
    with pytest.raises(ValueError, match=message):
        attention_rollout(layers, skip=skip)


def test_a_vision_transformer():
    model = create_model("vit_digits", depth=3, attention=partial(MultiHeadAttention, num_kv_heads=2)).eval()
    images = torch.randn(5, 1, 8, 8)
    expected = model(images)
    with capture_attention(model) as record:
        assert torch.equal(model(images), expected)
    assert list(record) == [f"encoder.blocks.{i}.attention" for i in range(3)]
    assert {weights.shape for [weights] in record.values()} == {(5, 4, 17, 17)}
    block = model.encoder.blocks[0]
    tokens = model.class_token(model.patches(images))
    tokens = block.attention_norm(model.positions(tokens, grid=(4, 4)))
    torch.testing.assert_close(record["encoder.blocks.0.attention"], [block.attention.weights(tokens)])
    rollout = attention_rollout(record.last())
    torch.testing.assert_close(rollout.sum(-1), torch.ones(5, 17))


def test_a_stack_that_decodes_with_a_cache_says_so():
    encoder = Encoder(6, depth=2, num_heads=2)
    wanted = r"cache must be left out .* blocks\.0\.attention \(MultiHeadAttention\)"
    with pytest.raises(ValueError, match=wanted), capture_attention(encoder):
        encoder(torch.randn(2, 3, 6), cache=encoder.make_cache())
