"""The feed-forward network in chunks: what it computes, and what it keeps."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.blocks import EncoderBlock
from lamina.layers import ChunkedFeedForward, FeedForward
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

sizes, seeds = st.integers(1, 6), st.integers(0, 2**31)
WIDE = {"dtype": torch.float64}


def pair(
    *args: int, chunk_size: int = 2, recompute: bool = True, **options
) -> tuple[ChunkedFeedForward, FeedForward]:
    chunked = ChunkedFeedForward(*args, chunk_size=chunk_size, recompute=recompute, **options)
    whole = FeedForward(*args, **options)
    whole.load_state_dict(chunked.state_dict())
    return chunked, whole


def outcome(layer: nn.Module, x: Tensor, cotangent: Tensor) -> list[Tensor | None]:
    leaves = [t for t in (x, *layer.parameters()) if t.requires_grad]
    y = layer(x)
    return [y, *torch.autograd.grad(y, leaves, cotangent)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation", [nn.GELU, nn.PReLU, partial(nn.ReLU, inplace=True)])
@given(seed=seeds, length=st.integers(0, 11), chunk_size=sizes)
def test_equals_the_whole_with_its_gradients(activation, recompute, gated, bias, seed, length, chunk_size):
    torch.manual_seed(seed)
    options = {"gated": gated, "bias": bias, "activation": lambda: activation().double()}
    chunked, whole = pair(3, 5, chunk_size=chunk_size, recompute=recompute, **options, **WIDE)
    x, cotangent = torch.randn(2, length, 3, requires_grad=True, **WIDE), torch.randn(2, length, 3, **WIDE)
    torch.testing.assert_close(outcome(chunked, x, cotangent), outcome(whole, x, cotangent))
    with torch.no_grad():
        torch.testing.assert_close(chunked(x), whole(x))


@pytest.mark.parametrize("frozen", ["up", "gate", "down", "weights", "x"])
def test_what_takes_no_gradient_gets_none(frozen):
    chunked, whole = pair(3, 5, gated=True, **WIDE)
    x = torch.randn(7, 3, requires_grad=frozen != "x", **WIDE)
    for layer in chunked, whole:
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(frozen not in ("weights", name.split(".")[0]))
    cotangent = torch.randn(7, 3, **WIDE)
    torch.testing.assert_close(outcome(chunked, x, cotangent), outcome(whole, x, cotangent))


def test_a_weight_of_two_layers_gets_the_gradients_of_both():
    chunked, whole = pair(3, 5, gated=True, **WIDE)
    for layer in chunked, whole:
        layer.gate.weight = layer.up.weight
    x, cotangent = torch.randn(7, 3, requires_grad=True, **WIDE), torch.randn(7, 3, **WIDE)
    torch.testing.assert_close(outcome(chunked, x, cotangent), outcome(whole, x, cotangent))


def test_any_leading_dimensions_and_any_stride():
    chunked, whole = pair(3, chunk_size=4)
    x = torch.randn(2, 5, 7, 3)
    for y in x, x[0], x[0, 0], x[0, 0, 0], x.transpose(0, 2), x[:, ::2], x[:, :0]:
        torch.testing.assert_close(chunked(y), whole(y))
        assert chunked(y).shape == y.shape


def test_a_cotangent_of_any_stride():
    chunked, whole = pair(3, **WIDE)
    x = torch.randn(5, 7, 3, requires_grad=True, **WIDE)
    for cotangent in (
        torch.ones(1, 1, 1, **WIDE).expand(5, 7, 3),
        torch.randn(3, 7, 5, **WIDE).transpose(0, 2),
    ):
        torch.testing.assert_close(outcome(chunked, x, cotangent), outcome(whole, x, cotangent))


@pytest.mark.parametrize("plain", [False, True])
def test_no_more_than_a_chunk_of_tokens_at_a_time(plain):
    layer, seen = ChunkedFeedForward(3, 5, chunk_size=4), []
    part = layer.activation
    if plain:  # a hook would turn it off, so the function itself is watched
        part.forward = lambda x: seen.append(tuple(x.shape)) or torch.nn.functional.gelu(x)
    else:
        part.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    x = torch.randn(2, 5, 3, requires_grad=True)
    y = layer(x)
    assert seen == [(4, 5), (4, 5), (2, 5)]
    y.backward(torch.randn_like(y))
    assert sorted(seen[3:]) == [(2, 5), (4, 5), (4, 5)], "the hidden layer was kept, or computed more often"
    seen.clear()
    with torch.no_grad():
        layer(x)
    assert seen == [(4, 5), (4, 5), (2, 5)]


def tokens_at_a_time(layer: ChunkedFeedForward) -> list[int]:
    seen: list[int] = []
    layer.activation.register_forward_hook(lambda *args: seen.append(args[2].shape[:-1].numel()))
    return seen


def test_what_fits_into_one_chunk_is_not_computed_again():
    layer = ChunkedFeedForward(3, 5, chunk_size=4)
    seen = tokens_at_a_time(layer)
    layer(torch.randn(2, 2, 3)).sum().backward()
    assert seen == [4]


def test_without_recomputing_a_call_is_chunked_where_it_keeps_nothing():
    layer, x = ChunkedFeedForward(3, 5, chunk_size=4, recompute=False), torch.randn(2, 5, 3)
    seen = tokens_at_a_time(layer)
    layer(x)
    with torch.no_grad():
        layer(x)
    layer.requires_grad_(False)(x)
    assert seen == [10, 4, 4, 2, 4, 4, 2]


def kept(layer: nn.Module, x: Tensor) -> int:
    """Bytes that a call keeps for its backward pass, without x and the parameters."""
    held, own = {}, {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    assert y.requires_grad
    return sum(held.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_training_keeps_no_hidden_layer(dropout):
    chunked, whole = pair(4, 64, chunk_size=16, dropout=dropout)
    x = torch.randn(2, 512, 4)
    hidden = 4 * 64 * 1024
    assert kept(whole, x) > hidden
    assert kept(chunked, x) <= 4 * x.numel()
    chunked.recompute = False
    assert kept(chunked, x) > hidden


def peak(call) -> int:
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    held = most = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("training", [False, True])
def test_no_hidden_layer_is_ever_whole(training, dropout):
    chunked, whole = pair(4, 1024, chunk_size=64, dropout=dropout)
    x, hidden = torch.randn(2, 1024, 4, requires_grad=training), 4 * 1024 * 2048

    def step(layer: nn.Module) -> None:
        with torch.set_grad_enabled(training):
            y = layer(x)
        if training:
            torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))

    assert peak(partial(step, whole)) > hidden
    assert peak(partial(step, chunked)) < hidden / 4


@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_is_recomputed_with_its_draws(recompute):
    layer = ChunkedFeedForward(3, 5, dropout=0.5, chunk_size=4, recompute=recompute, **WIDE)

    def of(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return layer(x)

    assert gradcheck(of, torch.randn(11, 3, requires_grad=True, **WIDE))


def test_dropout_draws_for_each_chunk_and_moves_the_stream_once():
    layer, x = ChunkedFeedForward(3, 5, dropout=0.5, chunk_size=50), torch.ones(1, 100, 3, requires_grad=True)
    y = layer(x)
    first, second = y.chunk(2, 1)
    assert not torch.equal(first, second)
    stream = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), stream)


@pytest.mark.parametrize("options", [{}, {"gated": True}, {"activation": nn.PReLU}])
def test_first_and_second_derivatives(options):
    layer = ChunkedFeedForward(3, 2, chunk_size=2, **options).double()
    x = torch.randn(2, 3, 3, requires_grad=True, **WIDE)
    assert gradcheck(layer, x)
    if "activation" not in options:
        assert gradgradcheck(layer, x)
    whole = FeedForward(3, 2, **options).double()
    whole.load_state_dict(layer.state_dict())
    penalties = []
    for each in layer, whole:
        (slope,) = torch.autograd.grad(each(x).sin().sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(slope.square().sum(), [x, each.up.weight, each.down.weight]))
    torch.testing.assert_close(*penalties)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    chunked, whole = pair(6, 11, chunk_size=3, dtype=dtype)
    x, cotangent = torch.randn(7, 6, dtype=dtype, requires_grad=True), torch.randn(7, 6, dtype=dtype)
    for a, e in zip(outcome(chunked, x, cotangent), outcome(whole, x, cotangent), strict=True):
        torch.testing.assert_close(a, e, rtol=0.03, atol=0.03)


def test_autocast_is_that_of_the_forward_pass():
    chunked, whole = pair(6, 11, chunk_size=3)
    x, cotangent = torch.randn(7, 6, requires_grad=True), torch.randn(7, 6).bfloat16()
    results = []
    for layer in chunked, whole:
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype is torch.bfloat16
        results.append([y, *torch.autograd.grad(y, [x, *layer.parameters()], cotangent)])
    torch.testing.assert_close(*results, rtol=0.02, atol=0.02)


def test_a_backward_pass_inside_autocast_keeps_its_precision():
    layer, x = ChunkedFeedForward(6, 11, chunk_size=3), torch.randn(7, 6, requires_grad=True)
    y, cotangent = layer(x), torch.randn(7, 6)
    leaves = [x, *layer.parameters()]
    expected = torch.autograd.grad(y, leaves, cotangent, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(torch.autograd.grad(y, leaves, cotangent), expected, rtol=0, atol=0)


def test_hooks_and_other_layers_in_place_of_the_linear_ones_are_honoured():
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x = torch.randn(7, 3)
    for name in "up", "gate", "down":
        chunked, whole = pair(3, 5, gated=True)
        for layer in chunked, whole:
            other = Doubled(*getattr(layer, name).weight.shape[::-1])
            other.load_state_dict(getattr(layer, name).state_dict())
            setattr(layer, name, other)
        torch.testing.assert_close(chunked(x), whole(x))
        chunked, whole = pair(3, 5, gated=True)
        plain = whole(x)
        for layer in chunked, whole:
            getattr(layer, name).register_forward_hook(lambda module, args, output: 2 * output)
        torch.testing.assert_close(chunked(x), whole(x))
        assert not torch.allclose(whole(x), plain)


def test_a_random_activation_is_recomputed_with_its_draws():
    layer = ChunkedFeedForward(3, 5, activation=nn.RReLU, chunk_size=4, **WIDE)

    def of(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return layer(x)

    assert gradcheck(of, torch.randn(11, 3, requires_grad=True, **WIDE))


def test_a_weight_changed_before_the_backward_pass_is_noticed():
    layer = ChunkedFeedForward(3, chunk_size=2)
    y = layer(torch.randn(7, 3))
    with torch.no_grad():
        layer.up.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_graph_can_be_kept_and_used_twice():
    chunked, whole = pair(3, **WIDE)
    x = torch.randn(7, 3, requires_grad=True, **WIDE)
    y = chunked(chunked(x))
    cotangent = torch.randn_like(x)
    once = torch.autograd.grad(y, [x, *chunked.parameters()], cotangent, retain_graph=True)
    again = torch.autograd.grad(y, [x, *chunked.parameters()], cotangent)
    torch.testing.assert_close(once, again, rtol=0, atol=0)
    torch.testing.assert_close(
        once, torch.autograd.grad(whole(whole(x)), [x, *whole.parameters()], cotangent)
    )


def test_works_on_the_meta_device():
    layer = ChunkedFeedForward(3, chunk_size=2, device="meta")
    assert layer(torch.empty(2, 7, 3, device="meta")).shape == (2, 7, 3)


@given(seed=seeds, length=sizes)
def test_tokens_do_not_meet(seed, length):
    torch.manual_seed(seed)
    layer, x = ChunkedFeedForward(3, chunk_size=2), torch.randn(2, length, 3)
    order = torch.randperm(length)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


def test_stands_in_an_encoder_block():
    block = EncoderBlock(8, 2, feed_forward=partial(ChunkedFeedForward, chunk_size=3), dropout=0.1)
    plain = EncoderBlock(8, 2, dropout=0.1)
    plain.load_state_dict(block.state_dict())
    x = torch.randn(2, 7, 8)
    assert block(x).shape == x.shape
    torch.testing.assert_close(block.eval()(x), plain.eval()(x))
    assert isinstance(EncoderBlock(8, 2, feed_forward=ChunkedFeedForward).feed_forward, ChunkedFeedForward)


@pytest.mark.parametrize("recompute", [False, True])
def test_is_the_chunked_network_of_reformer_pytorch(recompute):
    peer = pytest.importorskip("reformer_pytorch.reformer_pytorch")
    theirs = peer.Chunk(4, peer.FeedForward(6, mult=3, activation=nn.GELU), along_dim=-2)
    ours = ChunkedFeedForward(6, 18, chunk_size=3, recompute=recompute)
    ours.up.load_state_dict(theirs.fn.w1.state_dict())
    ours.down.load_state_dict(theirs.fn.w2.state_dict())
    x, cotangent = torch.randn(2, 11, 6, requires_grad=True), torch.randn(2, 11, 6)
    torch.testing.assert_close(outcome(ours, x, cotangent), outcome(theirs, x, cotangent))


def test_copies_keep_their_chunks():
    layer = copy.deepcopy(ChunkedFeedForward(3, chunk_size=5, recompute=False))
    assert (layer.chunk_size, layer.recompute) == (5, False)
    assert repr(layer).splitlines()[1].strip() == "chunk_size=5, recompute=False"
    assert "recompute" not in repr(ChunkedFeedForward(3))


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_a_chunk_of_nothing_is_refused(chunk_size):
    with pytest.raises(ValueError, match=f"chunk_size must be at least 1, got chunk_size={chunk_size}"):
        ChunkedFeedForward(3, chunk_size=chunk_size)
