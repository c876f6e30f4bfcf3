"""Reversible layers: they equal the plain stack in all that autograd can see, and keep two streams."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lamina.kernels import lsh_buckets
from lamina.layers import FeedForward, LSHAttention, MultiHeadAttention, Reversible, ReversibleBlock
from lamina.layers._choices import Choices, choice
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.parallel import DistributedDataParallel

seeds = st.integers(0, 2**31)
WIDE = {"dtype": torch.float64}


def mlp(dim: int = 5, dropout: float = 0.0, **factory) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(dim, **factory), nn.Linear(dim, dim, **factory), nn.Tanh(), nn.Dropout(dropout)
    )


def pair(
    depth: int = 3, first: Callable[..., nn.Module] = mlp, second: Callable[..., nn.Module] = mlp, **options
) -> tuple[Reversible, Reversible]:
    """A stack that recomputes, and its plain twin."""
    stack = Reversible(ReversibleBlock(first(**options), second(**options)) for _ in range(depth))
    plain = copy.deepcopy(stack)
    plain.recompute = False
    return stack, plain


def outcome(stack: nn.Module, inputs: list[Tensor], seed: int = 3, **given) -> list[Tensor | None]:
    """Outputs, and the gradients of inputs and parameters for a random cotangent."""
    torch.manual_seed(seed)
    outputs = stack(*inputs, **given)
    torch.manual_seed(seed + 1)
    cotangents = [torch.randn_like(y) for y in outputs]
    leaves = [t for t in (*inputs, *stack.parameters()) if t.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)]


def streams(*shape: int, requires_grad: bool = True, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for _ in range(2)]


@given(seed=seeds, depth=st.integers(0, 4), dropout=st.sampled_from([0.0, 0.4]))
def test_equals_the_formula_and_the_plain_stack(seed, depth, dropout):
    torch.manual_seed(seed)
    stack, plain = pair(depth, dropout=dropout, **WIDE)
    inputs = streams(2, 3, 5)
    torch.manual_seed(3)
    y1, y2 = inputs
    for block in stack.blocks:
        y1 = y1 + block.first(y2)
        y2 = y2 + block.second(y1)
    actual = outcome(stack, inputs)
    assert torch.equal(actual[0], y1)
    assert torch.equal(actual[1], y2)
    torch.testing.assert_close(actual, outcome(plain, inputs), rtol=1e-9, atol=1e-9)


def test_equals_the_plain_stack_in_float32():
    stack, plain = pair(12, dim=16)
    inputs = streams(2, 7, 16, dtype=torch.float32)
    torch.testing.assert_close(outcome(stack, inputs), outcome(plain, inputs), rtol=1e-4, atol=1e-5)


def test_one_input_is_both_streams():
    stack, plain = pair(dropout=0.3, **WIDE)
    x = torch.randn(2, 3, 5, requires_grad=True, **WIDE)
    actual = outcome(stack, [x])
    torch.testing.assert_close(actual, outcome(plain, [x]))
    two = outcome(plain, [x.detach().requires_grad_(), x.detach().requires_grad_()])
    torch.testing.assert_close(actual[:3], [two[0], two[1], two[2] + two[3]])


def attention_stacks(depth: int = 2, dropout: float = 0.0, **factory) -> tuple[Reversible, Reversible]:
    return pair(
        depth,
        lambda **f: MultiHeadAttention(6, 2, dropout=dropout, **f),
        lambda **f: FeedForward(6, 11, dropout=dropout, **f),
        **factory,
    )


@settings(max_examples=8)
@given(seed=seeds)
def test_masks_go_to_the_first_layer(seed):
    torch.manual_seed(seed)
    stack, plain = attention_stacks(dropout=0.2, **WIDE)
    inputs = streams(2, 7, 6)
    given_masks = {"key_mask": torch.rand(2, 7) < 0.7, "mask": torch.rand(7, 7) < 0.8, "is_causal": True}
    for left_out in None, "key_mask", "mask", "is_causal":
        options = {name: value for name, value in given_masks.items() if name != left_out}
        torch.testing.assert_close(outcome(stack, inputs, **options), outcome(plain, inputs, **options))
    torch.manual_seed(3)
    y1, y2 = inputs
    for block in plain.blocks:
        y1 = y1 + block.first(y2, **given_masks)
        y2 = y2 + block.second(y1)
    torch.testing.assert_close(outcome(stack, inputs, **given_masks)[:2], [y1, y2])


@given(seed=seeds)
def test_masked_and_later_tokens_have_no_influence(seed):
    torch.manual_seed(seed)
    stack, _ = attention_stacks(**WIDE)
    x = torch.randn(2, 7, 6, requires_grad=True, **WIDE)
    key_mask = torch.rand(2, 7) < 0.6
    for given_masks, hidden in (
        ({"key_mask": key_mask}, ~key_mask),
        ({"is_causal": True}, torch.arange(7).expand(2, 7) >= 4),
    ):
        y = stack(x, **given_masks)
        other = stack(torch.where(hidden.unsqueeze(-1), 9.0, x), **given_masks)
        shown = ~hidden
        for a, b in zip(y, other, strict=True):
            torch.testing.assert_close(a[shown], b[shown])
        (gradient,) = torch.autograd.grad([t[shown] for t in y], x, [torch.randn_like(t[shown]) for t in y])
        assert not gradient[hidden].any()


def test_a_layer_that_takes_no_mask_says_so():
    stack, _ = pair()
    with pytest.raises(TypeError, match="key_mask"):
        stack(torch.randn(2, 3, 5), key_mask=torch.ones(2, 3, dtype=torch.bool))


class Chooses(nn.Module):
    """Twice as much where the input is above a threshold, which a choice has told."""

    def __init__(self, dim: int = 5, **factory) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(dim, dim, **factory), 0

    def found(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x > 0.3

    def forward(self, x: Tensor) -> Tensor:
        above = choice(lambda: self.found(x), torch.bool)
        return (
            torch.where(choice(lambda: ~self.found(x), torch.bool), 1.0, 1.0 + above.double())
            * self.linear(x).tanh()
        )


def test_a_second_run_chooses_as_the_first():
    stack, plain = pair(first=Chooses, **WIDE)
    inputs = streams(2, 3, 5)
    torch.testing.assert_close(outcome(stack, inputs), outcome(plain, inputs))
    assert [block.first.calls for block in stack.blocks] == [2, 2, 2]


def test_a_stack_within_a_stack_chooses_as_the_first():
    class Within(nn.Module):
        def __init__(self, **factory) -> None:
            super().__init__()
            self.inner = Reversible(ReversibleBlock(Chooses(**factory), mlp(**factory)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)[0]

    stack, plain = pair(2, first=Within, **WIDE)
    inputs = streams(2, 3, 5)
    torch.testing.assert_close(outcome(stack, inputs), outcome(plain, inputs))
    assert {block.first.calls for outer in stack.blocks for block in outer.first.inner.blocks} == {2}


def test_what_the_first_run_did_not_choose_is_chosen():
    with Choices([torch.tensor(1)]).again():
        assert [choice(lambda n=n: torch.tensor(n), torch.int16).item() for n in (2, 3)] == [1, 3]
    assert choice(lambda: torch.tensor(4), torch.int16).item() == 4


class Loud(nn.Sequential):
    """Large outputs, so that the inputs come back with large errors."""

    def forward(self, x: Tensor) -> Tensor:
        return 1000 * super().forward(x)


def test_the_backward_pass_hashes_nothing(monkeypatch):
    calls = []

    def hashing(*args, **options):
        calls.append(args)
        return lsh_buckets(*args, **options)

    monkeypatch.setattr("lamina.layers.lsh_attention.lsh_buckets", hashing)
    stack = Reversible(ReversibleBlock(LSHAttention(8, 2, chunk_size=4), mlp(8)) for _ in range(2))
    y1, y2 = stack(torch.randn(2, 13, 8))
    assert len(calls) == 2
    (y1 + y2).sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("redraw", [False, True])
def test_hashing_near_ties_is_that_of_the_first_run(redraw):
    """Else a token that comes back into another bucket has the gradient of another function."""
    torch.manual_seed(0)
    stack, plain = pair(
        4,
        lambda: nn.Sequential(nn.LayerNorm(16), LSHAttention(16, 2, chunk_size=8, redraw=redraw)),
        lambda: Loud(mlp(16)),
    )
    inputs = streams(2, 512, 16, dtype=torch.float32)
    for found, expected in zip(outcome(stack, inputs)[2:], outcome(plain, inputs)[2:], strict=True):
        assert (found - expected).abs().max() < 3e-3 * expected.abs().max()


def test_inverse_gives_the_inputs_back():
    block = ReversibleBlock(MultiHeadAttention(6, 2, **WIDE), FeedForward(6, **WIDE))
    x1, x2 = streams(2, 7, 6)
    given_masks = {"key_mask": torch.rand(2, 7) < 0.7, "mask": torch.rand(7, 7) < 0.8, "is_causal": True}
    torch.testing.assert_close(
        block.inverse(*block(x1, x2, **given_masks), **given_masks), (x1, x2), rtol=1e-12, atol=1e-12
    )
    assert not torch.allclose(block.inverse(*block(x1, x2, **given_masks))[0], x1)
    without = ReversibleBlock(mlp(6, **WIDE), mlp(6, **WIDE))  # whose layers take no mask at all
    torch.testing.assert_close(without.inverse(*without(x1, x2)), (x1, x2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("which", [(True, False), (False, True), (False, False)])
def test_inputs_without_gradients(which):
    stack, plain = pair(dropout=0.3, **WIDE)
    inputs = [
        x.requires_grad_(on) for x, on in zip(streams(2, 3, 5, requires_grad=False), which, strict=True)
    ]
    torch.testing.assert_close(outcome(stack, inputs), outcome(plain, inputs))


def test_frozen_parameters():
    stack, plain = pair(dropout=0.3, **WIDE)
    for each in stack, plain:
        each.blocks[1].requires_grad_(False)
        each.blocks[0].second[1].bias.requires_grad_(False)
    inputs = streams(2, 3, 5)
    torch.testing.assert_close(outcome(stack, inputs), outcome(plain, inputs))
    for each in stack, plain:
        each.requires_grad_(False)
    torch.testing.assert_close(outcome(stack, inputs), outcome(plain, inputs))


@pytest.mark.parametrize("shared", ["block", "layer", "both layers", "weight"])
def test_shared_parameters(shared):
    stack, _ = pair(3, dropout=0.3, **WIDE)
    if shared == "block":
        stack.blocks[2] = stack.blocks[0]
    elif shared == "layer":
        stack.blocks[2].first = stack.blocks[0].first
    elif shared == "both layers":
        stack.blocks[1].second = stack.blocks[1].first
    else:
        stack.blocks[1].second[1].weight = stack.blocks[2].first[1].weight
    plain = copy.deepcopy(stack)
    plain.recompute = False
    inputs = streams(2, 3, 5)
    torch.testing.assert_close(outcome(stack, inputs), outcome(plain, inputs))


class Constant(nn.Module):
    """Depends on a parameter and not on its input, or on neither."""

    def __init__(self, *, learned: bool = True, **factory):
        super().__init__()
        self.value = nn.Parameter(torch.randn(5, **factory), requires_grad=learned)
        self.unused = nn.Parameter(torch.randn(3, **factory))

    def forward(self, x: Tensor) -> Tensor:
        return self.value.expand_as(x)


@pytest.mark.parametrize("learned", [False, True])
def test_layers_that_do_not_look_at_their_input(learned):
    stack, plain = pair(2, partial(Constant, learned=learned), **WIDE)
    inputs = streams(2, 3, 5)
    actual, expected = outcome(stack, inputs), outcome(plain, inputs)
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if e is not None:
            torch.testing.assert_close(a, e)


def test_one_output_alone_can_be_used():
    stack, plain = pair(dropout=0.3, **WIDE)
    (x,) = streams(2, 3, 5)[:1]
    for i in range(2):
        gradients = []
        for each in stack, plain:
            torch.manual_seed(3)
            y = each(x)[i]
            leaves = [x, *each.parameters()]
            found = torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)
            gradients.append(
                [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]
            )
        torch.testing.assert_close(*gradients)


def test_backward_fills_grad_and_adds_to_it():
    stack, plain = pair(**WIDE)
    x = torch.randn(2, 3, 5, **WIDE)
    for each in stack, plain:
        for _ in range(2):
            y1, y2 = each(x)
            (y1.sin() + y2.cos()).sum().backward()
    for ours, theirs in zip(stack.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_graph_can_be_kept_and_the_stack_used_twice():
    stack, plain = pair(dropout=0.3, **WIDE)
    x = torch.randn(2, 3, 5, requires_grad=True, **WIDE)
    results = []
    for each in stack, plain:
        torch.manual_seed(3)
        y = torch.stack(each(*each(x))).sin()
        leaves = [x, *each.parameters()]
        results.append(torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True))
        results.append(torch.autograd.grad(y, leaves, torch.ones_like(y)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x, torch.ones_like(y))


def test_without_gradients_nothing_is_kept():
    stack, plain = pair(dropout=0.3)
    x = torch.randn(2, 3, 5, requires_grad=True)
    for context in torch.no_grad, torch.inference_mode:
        with context():
            torch.manual_seed(3)
            y = stack(x)
            torch.manual_seed(3)
            torch.testing.assert_close(y, plain(x))
        assert not y[0].requires_grad


def test_the_backward_pass_leaves_the_random_stream_alone():
    stack, _ = pair(dropout=0.3)
    y1, y2 = stack(torch.randn(2, 3, 5))
    torch.rand(7)
    stream = torch.get_rng_state()
    (y1 + y2).sum().backward()
    assert torch.equal(torch.get_rng_state(), stream)


def test_layers_that_draw_in_evaluation_are_recomputed_with_their_draws():
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rand_like(x)

    stack, plain = pair(3, lambda: nn.Sequential(Noise(), nn.Linear(5, 5)), Noise)
    inputs = streams(2, 3, 5)
    stack, plain = stack.double().eval(), plain.double().eval()
    torch.testing.assert_close(outcome(stack, inputs), outcome(plain, inputs))


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_is_that_of_the_forward_pass(inside):
    stack, plain = attention_stacks(3)
    seen = set()
    stack.blocks[1].second.up.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    x = torch.randn(2, 7, 6, requires_grad=True)
    results = []
    for each in stack, plain:
        with torch.autocast("cpu", torch.bfloat16):
            y1, y2 = each(x)
            if inside:
                y1, y2 = y1 * 1, y2 * 1
        assert y1.dtype is torch.float32
        leaves = [x, *each.parameters()]
        results.append([y1, y2, *torch.autograd.grad((y1, y2), leaves, (torch.ones_like(y1),) * 2)])
    assert seen == {torch.bfloat16}
    for ours, theirs in zip(*results, strict=True):
        error = (ours - theirs).norm() / theirs.norm().clamp_min(1e-3)
        assert error < 1e-3, "recomputed in another precision"


def test_autocast_hands_no_one_a_weight_without_its_gradient():
    shared = nn.Linear(5, 5)
    stack = Reversible([ReversibleBlock(shared, nn.Tanh())])
    gradients = []
    for recompute in True, False:
        stack.recompute = recompute
        with torch.autocast("cpu", torch.bfloat16):
            y1, y2 = stack(torch.ones(2, 3, 5))
            z = shared(torch.ones(2, 3, 5))
        loss = (y1 + y2).sum() + 3 * z.float().sum()
        gradients.append(torch.autograd.grad(loss, [shared.weight, shared.bias]))
    torch.testing.assert_close(*gradients, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    stack, plain = pair(2, dim=8)
    stack, plain = stack.to(dtype), plain.to(dtype)
    inputs = streams(2, 3, 8, dtype=dtype)
    for a, e in zip(outcome(stack, inputs), outcome(plain, inputs), strict=True):
        assert a.dtype is dtype
        torch.testing.assert_close(a, e, rtol=0.1, atol=0.1)


def test_streams_that_widen_on_the_way_get_gradients_of_their_own_dtype():
    class Wide(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float())

    stack, plain = pair(2, lambda: Wide(5, 5), lambda: Wide(5, 5))
    inputs = [torch.randn(2, 3, 5).bfloat16().requires_grad_() for _ in range(2)]
    actual, expected = outcome(stack, inputs), outcome(plain, inputs)
    assert actual[0].dtype is torch.float32
    assert actual[2].dtype is torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)
    seen = []
    stack.blocks[0].first.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    outcome(stack, inputs)
    assert seen == [torch.bfloat16] * 2


def kept(stack: nn.Module, x: Tensor) -> int:
    """Bytes that a call keeps for its backward pass, without the parameters."""
    held, own = {}, {t.untyped_storage().data_ptr() for t in stack.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = stack(x)
    assert y[0].requires_grad
    return sum(held.values())


def test_what_is_kept_does_not_grow_with_depth():
    x = torch.randn(4, 128, 8)
    (short, short_plain), (deep, deep_plain) = pair(3, dim=8, dropout=0.1), pair(12, dim=8, dropout=0.1)
    assert kept(short, x) == kept(deep, x) == 2 * 4 * x.numel()
    assert kept(deep_plain, x) > 3.5 * kept(short_plain, x)


def peak(call: Callable[[], object]) -> int:
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        call()
    held = most = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_peak_memory_does_not_grow_with_depth():
    x = torch.randn(4, 512, 16, requires_grad=True)

    def step(stack: nn.Module) -> None:
        y1, y2 = stack(x)
        torch.autograd.grad((y1, y2), [x, *stack.parameters()], (y1.detach(), y2.detach()))

    short, deep = pair(3, dim=16, dropout=0.1), pair(12, dim=16, dropout=0.1)
    assert peak(lambda: step(deep[0])) <= 1.2 * peak(lambda: step(short[0]))
    assert peak(lambda: step(deep[1])) >= 3 * peak(lambda: step(short[1]))


def test_hooks_run_and_see_the_same_again():
    stack, _ = pair(2, dropout=0.5)
    seen = []
    stack.blocks[1].second.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    backward = []
    stack.blocks[0].first[1].register_full_backward_hook(lambda module, grad_in, grad_out: backward.append(1))
    y1, y2 = stack(torch.randn(2, 3, 5))
    (y1 + y2).sum().backward()
    first, again = seen
    assert torch.equal(first == 0, again == 0)
    torch.testing.assert_close(first, again)
    assert backward == [1]


def test_gradcheck():
    stack, plain = pair(2, dim=3, **WIDE)
    inputs = streams(2, 2, 3)
    assert gradcheck(stack, inputs)
    assert gradgradcheck(plain, inputs)


def test_a_second_derivative_is_refused_with_the_way_out():
    stack, _ = pair()
    x = torch.randn(2, 3, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"no second derivative .* make it with recompute=False"):
        torch.autograd.grad(stack(x)[0].sum(), x, create_graph=True)


def test_exchanged_parameters_are_refused():
    stack, plain = pair()
    x = torch.randn(2, 3, 5)
    others = {name: p.detach().clone().requires_grad_() for name, p in stack.named_parameters()}
    y1, _ = torch.func.functional_call(plain, others, x)
    y1.sum().backward()
    assert others["blocks.0.first.1.weight"].grad is not None
    y1, _ = torch.func.functional_call(stack, others, x)
    with pytest.raises(
        RuntimeError, match=r"parameter of a reversible stack was exchanged .* recompute=False"
    ):
        y1.sum().backward()


@pytest.mark.parametrize("what", ["parameter", "mask", "output"])
def test_changes_in_place_before_the_backward_pass_are_noticed(what):
    stack, _ = attention_stacks()
    key_mask = torch.ones(2, 7, dtype=torch.bool)
    y1, y2 = stack(torch.randn(2, 7, 6), key_mask=key_mask)
    loss = (y1 + y2).sum()
    with torch.no_grad():
        changed = {"parameter": stack.blocks[0].second.up.weight, "mask": key_mask, "output": y1}[what]
        changed.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_compiles_to_a_plain_stack():
    torch._dynamo.reset()
    stack, plain = pair(1, **WIDE)
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    inputs = streams(2, 3, 5)
    torch.testing.assert_close(outcome(compiled, inputs), outcome(plain, inputs))


@pytest.mark.parametrize("unused", [False, True])
def test_data_parallel_training(unused, tmp_path):
    stack, plain = pair(2, dropout=0.3)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(stack, find_unused_parameters=unused)
        for _ in range(2):
            for each in parallel, plain:
                torch.manual_seed(3)
                each.zero_grad()
                y1, y2 = each(torch.randn(2, 3, 5))
                (y1.sin() + y2).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for ours, theirs in zip(stack.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (1, 1, 5), (5,)])
def test_any_shape(shape):
    stack, plain = pair(2, **WIDE)
    inputs = streams(*shape)
    torch.testing.assert_close(outcome(stack, inputs), outcome(plain, inputs))


def test_no_block_gives_the_inputs_back():
    x1, x2 = streams(2, 3, 5)
    assert Reversible([])(x1, x2) == (x1, x2)


def test_wrong_blocks_are_refused():
    with pytest.raises(ValueError, match="blocks must be ReversibleBlocks, got Linear at 1"):
        Reversible([ReversibleBlock(mlp(), mlp()), nn.Linear(5, 5)])


@pytest.mark.parametrize("recompute", [False, True])
def test_layers_that_change_the_shape_are_refused(recompute):
    x = torch.randn(2, 3, 5)
    for name, layers in ("first", (nn.Linear(5, 1), mlp())), ("second", (mlp(), nn.Linear(5, 1))):
        stack = Reversible([ReversibleBlock(*layers)], recompute=recompute)
        with pytest.raises(ValueError, match=rf"{name} must keep the shape .* \(2, 3, 5\), got \(2, 3, 1\)"):
            stack(x)


def test_repr_tells_of_a_plain_stack():
    assert "recompute" not in repr(Reversible([]))
    assert "recompute=False" in repr(Reversible([], recompute=False))


def test_is_the_sequence_of_reformer_pytorch():
    reversible = pytest.importorskip("reformer_pytorch.reversible")
    stack, _ = pair(4, dim=6, dropout=0.2)
    theirs = reversible.ReversibleSequence(
        nn.ModuleList(
            [nn.ModuleList([copy.deepcopy(b.first), copy.deepcopy(b.second)]) for b in stack.blocks]
        )
    )
    x1, x2 = streams(2, 7, 6, dtype=torch.float32)
    joined = torch.cat([x1, x2], -1).detach().requires_grad_()
    c1, c2 = torch.randn(2, 7, 6), torch.randn(2, 7, 6)
    torch.manual_seed(3)
    y1, y2 = stack(x1, x2)
    torch.manual_seed(3)
    y = theirs(joined)
    torch.testing.assert_close(torch.cat([y1, y2], -1), y)
    torch.autograd.backward((y1, y2), (c1, c2))
    y.backward(torch.cat([c1, c2], -1))
    torch.testing.assert_close(torch.cat([x1.grad, x2.grad], -1), joined.grad)
    for block, other in zip(stack.blocks, theirs.blocks, strict=True):
        for ours, peer in (block.first, other.f.net), (block.second, other.g.net):
            for p, q in zip(ours.parameters(), peer.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad)
