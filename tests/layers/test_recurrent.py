"""The network: torch.nn's, its loop's definition, and what must hold for every cell, length and direction."""

import copy
import pickle
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.kernels import use_backend
from lamina.layers import GRUCell, LSTMCell, Recurrent, RecurrentCell, RNNCell
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

seeds = st.integers(0, 2**31)


class NormalisedCell(nn.Module):
    """A user's cell, nothing of Lamina's but the protocol: its state counts steps and holds two memories."""

    def __init__(self, input_dim, hidden_dim, *, device=None, dtype=None):
        super().__init__()
        self.input_dim, self.hidden_dim, self.output_dim = input_dim, hidden_dim, hidden_dim + 1
        self.inner = nn.Linear(input_dim, hidden_dim, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(hidden_dim, device=device, dtype=dtype)
        self.outer = nn.Linear(hidden_dim, self.output_dim, device=device, dtype=dtype)

    def initial_state(self, batch_size, device=None, dtype=None):
        factory = {"device": device, "dtype": dtype or self.outer.weight.dtype}
        return torch.zeros(batch_size, **factory), torch.full(
            (batch_size, 2, self.hidden_dim), 0.5, **factory
        )

    def forward(self, input, state=None):
        steps, memory = state if state is not None else self.initial_state(len(input))
        hidden = self.norm(self.inner(input) + memory.mean(1))
        memory = torch.stack([memory[:, 1], hidden], dim=1)
        return self.outer(hidden), (steps + 1, memory)


CELLS = {
    "tanh": partial(RNNCell, recurrent_bias=True),
    "relu": partial(RNNCell, activation="relu"),
    "lstm": LSTMCell,
    "lstm no bias": partial(LSTMCell, bias=False),
    "lstm projection": partial(LSTMCell, projection_dim=2),
    "gru": GRUCell,
    "gru one bias": partial(GRUCell, recurrent_bias=False),
}
LOOPED = {
    "lstm peepholes": partial(LSTMCell, peepholes=True, projection_dim=2),
    "lstm layer norm": partial(LSTMCell, layer_norm=True, recurrent_bias=True),
    "gru of Cho": partial(GRUCell, reset_after=False),
    "user's": NormalisedCell,
}
every_cell = pytest.mark.parametrize("cell", (CELLS | LOOPED).values(), ids=CELLS | LOOPED)
every_fused_cell = pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
any_cell = st.sampled_from(list((CELLS | LOOPED).values()))
both = pytest.mark.parametrize("bidirectional", [False, True])
PEERS = {"lstm": (LSTMCell, nn.LSTM), "gru": (GRUCell, nn.GRU), "rnn": (RNNCell, nn.RNN)}


def drawn(cell, **options) -> Recurrent:
    """Weights of order one, in float64, so that mistakes show and rounding does not."""
    network = Recurrent(cell, 3, 5, **options, dtype=torch.float64)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    return network


def sequences(batch: int = 4, steps: int = 7) -> Tensor:
    return torch.randn(batch, steps, 3, dtype=torch.float64)


def outcome(network, input, lengths=None, state=None):
    """Output, last state, and the gradients of input, state and parameters for a random cotangent of all."""
    input = input.clone().requires_grad_()
    state = None if state is None else tuple(part.clone().requires_grad_() for part in state)
    output, last = network(input, lengths, state)
    generator = torch.Generator().manual_seed(3)
    results = [output, *last]
    cotangents = [torch.randn(r.shape, generator=generator, dtype=r.dtype) for r in results]
    of = [input, *(state or ()), *network.parameters()]
    kept = [index for index, result in enumerate(results) if result.requires_grad]
    gradients = torch.autograd.grad(
        [results[k] for k in kept], of, [cotangents[k] for k in kept], allow_unused=True
    )
    return [*results, *(torch.zeros_like(t) if g is None else g for g, t in zip(gradients, of, strict=True))]


def looped(*args):
    with use_backend("reference"):
        return outcome(*args)


def random_state(network, batch=4):
    return tuple(torch.randn_like(part) for part in network.initial_state(batch))


@pytest.mark.parametrize("ragged", [False, True])
@both
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", PEERS)
def test_equals_torch(kind, bias, num_layers, bidirectional, ragged):
    cell, peer = PEERS[kind]
    options = {"num_layers": num_layers, "bidirectional": bidirectional}
    theirs = peer(3, 5, bias=bias, batch_first=True, **options, dtype=torch.float64)
    ours = Recurrent(partial(cell, bias=bias, recurrent_bias=bias), 3, 5, **options, dtype=torch.float64)
    ours.load_torch_state_dict(theirs.state_dict())
    lengths = torch.tensor([3, 7, 1, 6]) if ragged else None

    def run(input, lengths, state):
        peers_state = state if kind == "lstm" else state[0]
        if lengths is None:
            output, last = theirs(input, peers_state)
        else:
            packed = pack_padded_sequence(input, lengths, batch_first=True, enforce_sorted=False)
            output, last = theirs(packed, peers_state)
            output, _ = pad_packed_sequence(output, batch_first=True, total_length=7)
        return output, last if kind == "lstm" else (last,)

    run.parameters = lambda: [
        theirs.get_parameter(f"{name}_l{index // ours.directions}{'_reverse' * (index % ours.directions)}")
        for index, made in enumerate(ours.cells)
        for name, _ in made.named_parameters()
    ]
    arguments = sequences(), lengths, random_state(ours)
    expected = outcome(run, *arguments)
    torch.testing.assert_close(outcome(ours, *arguments), expected)
    torch.testing.assert_close(looped(ours, *arguments), expected)


def test_loads_torchs_projection_and_refuses_other_keys():
    theirs = nn.LSTM(3, 5, proj_size=2, num_layers=2, batch_first=True)
    ours = Recurrent(partial(LSTMCell, projection_dim=2, recurrent_bias=True), 3, 5, num_layers=2)
    ours.load_torch_state_dict(theirs.state_dict())
    input = torch.randn(4, 7, 3)
    torch.testing.assert_close(ours(input), theirs(input))
    with pytest.raises(RuntimeError, match="weight_ih_l2"):
        ours.load_torch_state_dict(nn.LSTM(3, 5, proj_size=2, num_layers=3).state_dict())
    with pytest.raises(RuntimeError, match="bias_hh"):
        Recurrent(LSTMCell, 3, 5).load_torch_state_dict(nn.LSTM(3, 5).state_dict())


def test_the_loop_by_hand():
    """Two layers, both directions, ragged: every step of every sequence, one sequence at a time."""
    network = drawn(LSTMCell, num_layers=2, bidirectional=True)
    input, lengths, state = sequences(), torch.tensor([3, 7, 0, 5]), random_state(network)
    with use_backend("reference"):
        output, last = network(input, lengths, state)
    for b, length in enumerate(lengths.tolist()):
        x = input[b : b + 1, :length]
        for layer in range(2):
            sides = []
            for direction in range(2):
                index = 2 * layer + direction
                s, ys = tuple(part[index, b : b + 1] for part in state), {}
                for t in range(length)[:: -1 if direction else 1]:
                    ys[t], s = network.cells[index](x[:, t], s)
                sides.append([ys[t] for t in range(length)])
                torch.testing.assert_close([part[index, b : b + 1] for part in last], list(s))
            x = torch.stack([torch.cat(pair, -1) for pair in zip(*sides, strict=True)], 1) if length else x
        if length:
            torch.testing.assert_close(output[b : b + 1, :length], x)
        assert not output[b, length:].any()


@pytest.mark.parametrize("lengths", [None, [7, 7, 7, 7], [2, 7, 0, 5], [0, 0, 0, 0], [1, 1, 2, 1]])
@both
@every_fused_cell
def test_fused_equals_the_loop(cell, bidirectional, lengths):
    network = drawn(cell, num_layers=2, bidirectional=bidirectional)
    assert network.fused_refusal() is None
    lengths = None if lengths is None else torch.tensor(lengths)
    for state in None, random_state(network):
        arguments = network, sequences(), lengths, state
        torch.testing.assert_close(outcome(*arguments), looped(*arguments))
        with use_backend("reference"):
            strides = network(sequences(), lengths)[0].stride()
        assert network(sequences(), lengths)[0].stride() == strides  # compiled, it is the loop


@pytest.mark.parametrize("cell", LOOPED.values(), ids=LOOPED)
def test_steps_at_once_equal_the_loop(cell):
    """Cells without a routine: the input's share taken for all steps together is no other computation."""
    network = drawn(cell, num_layers=2, bidirectional=True)
    assert network.fused_refusal() is not None
    for lengths in None, torch.tensor([2, 7, 0, 5]):
        arguments = network, sequences(), lengths
        torch.testing.assert_close(outcome(*arguments), looped(*arguments))


def test_routines_run_where_they_can(monkeypatch):
    called = []
    for name in "lstm", "gru", "rnn_tanh", "rnn_relu":
        routine = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, n=name, r=routine: called.append(n) or r(*a))
    for cell in CELLS.values():
        drawn(cell, num_layers=3, bidirectional=True)(sequences())
        drawn(cell)(sequences(), torch.tensor([2, 7, 0, 5]))
    assert called == [n for n in ["rnn_tanh", "rnn_relu", *["lstm"] * 3, *["gru"] * 2] for _ in range(2)]
    with use_backend("reference"):
        drawn(LSTMCell)(sequences())
    for cell in LOOPED.values():
        drawn(cell)(sequences())
    assert len(called) == 14


def test_full_lengths_are_not_packed(monkeypatch):
    network, input = drawn(LSTMCell), sequences()
    expected = network(input)
    monkeypatch.setattr("lamina.layers._fused_recurrent.pack_padded_sequence", None)
    torch.testing.assert_close(network(input, torch.full((4,), 7)), expected, rtol=0, atol=0)


def test_a_subclass_and_a_hook_are_heard():
    class Halved(LSTMCell):
        def forward(self, input, state=None):
            output, state = super().forward(input, state)
            return output / 2, state

    torch.manual_seed(1)
    plain = Recurrent(LSTMCell, 3, 5)
    halved = Recurrent(Halved, 3, 5)
    halved.load_state_dict(plain.state_dict())
    input = torch.randn(4, 7, 3)
    assert "Halved" in halved.fused_refusal()
    torch.testing.assert_close(halved(input)[0], plain(input)[0] / 2)

    seen = []
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        handle = getattr(plain.cells[0], register)(lambda *args: seen.append(args[0]))
        expected = plain(input)[0]
        handle.remove()
        torch.testing.assert_close(plain(input)[0], expected)
    assert len(seen) == 2 * 7


def test_parametrised_weights_are_used():
    network = Recurrent(GRUCell, 3, 5)
    input = torch.randn(4, 7, 3)
    before = network(input)[0]
    prune.l1_unstructured(network.cells[0], "weight_hh", amount=0.5)
    with use_backend("reference"):
        expected = network(input)[0]
    torch.testing.assert_close(network(input)[0], expected)
    assert (expected - before).abs().max() > 1e-3


def test_cells_of_several_kinds_are_looped():
    made = iter([LSTMCell(3, 5), LSTMCell(5, 5, bias=False)])
    network = Recurrent(lambda *_, **__: next(made), 3, 5, num_layers=2)
    assert "not all of one kind" in network.fused_refusal()
    assert network(torch.randn(4, 7, 3))[0].shape == (4, 7, 5)
    assert "no routine" in Recurrent(partial(LSTMCell, peepholes=True), 3, 5).fused_refusal()


def test_learned_initial_states_are_used():
    class Learned(GRUCell):
        def initial_state(self, batch_size, device=None, dtype=None):
            return (torch.full((batch_size, self.hidden_dim), 0.3),)

    network = Recurrent(Learned, 3, 5)
    input = torch.randn(4, 7, 3)
    torch.testing.assert_close(network(input), network(input, state=(torch.full((1, 4, 5), 0.3),)))


@given(
    seed=seeds,
    cell=any_cell,
    bidirectional=st.booleans(),
    poison=st.sampled_from([torch.nan, torch.inf, 1e30]),
)
def test_padding_has_no_influence(seed, cell, bidirectional, poison):
    """Not on outputs, states or gradients, whatever it holds; its own gradient is zero."""
    torch.manual_seed(seed)
    network = drawn(cell, num_layers=2, bidirectional=bidirectional)
    lengths, input, state = torch.randint(0, 8, (4,)), sequences(), random_state(network)
    padding = torch.arange(7) >= lengths.unsqueeze(1)
    clean, poisoned = (
        outcome(network, input.masked_fill(padding.unsqueeze(-1), value), lengths, state)
        for value in (0, poison)
    )
    torch.testing.assert_close(poisoned, clean, rtol=0, atol=0)
    assert all(t.isfinite().all() for t in poisoned)
    output, input_gradient = clean[0], clean[1 + len(state)]
    assert not output[padding].any()
    assert not input_gradient[padding].any()


@given(seed=seeds, cell=any_cell, bidirectional=st.booleans())
def test_a_sequence_in_a_batch_is_as_alone(seed, cell, bidirectional):
    torch.manual_seed(seed)
    network = drawn(cell, num_layers=2, bidirectional=bidirectional)
    input, lengths = sequences(), torch.randint(1, 8, (4,))
    output, last = network(input, lengths)
    for b, length in enumerate(lengths.tolist()):
        alone, alone_last = network(input[b : b + 1, :length])
        torch.testing.assert_close(output[b : b + 1, :length], alone)
        torch.testing.assert_close([part[:, b : b + 1] for part in last], list(alone_last))


@given(seed=seeds, cell=any_cell)
def test_the_backward_half_reads_the_reversed_sequence(seed, cell):
    torch.manual_seed(seed)
    two_way, one_way = drawn(cell, bidirectional=True), drawn(cell)
    one_way.cells[0].load_state_dict(two_way.cells[1].state_dict())
    input, dim = sequences(), one_way.output_dim
    output, last = two_way(input)
    reversed_output, reversed_last = one_way(input.flip(1))
    torch.testing.assert_close(output[..., dim:], reversed_output.flip(1))
    torch.testing.assert_close([part[1:] for part in last], list(reversed_last))
    one_way.cells[0].load_state_dict(two_way.cells[0].state_dict())
    torch.testing.assert_close(output[..., :dim], one_way(input)[0])


@given(seed=seeds, cell=any_cell, cut=st.integers(0, 7))
def test_the_state_carries_over(seed, cell, cut):
    torch.manual_seed(seed)
    network, input = drawn(cell, num_layers=2), sequences()
    whole, last = network(input)
    first, state = network(input[:, :cut])
    second, state = network(input[:, cut:], state=state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(state, last)


@given(seed=seeds, cell=any_cell, step=st.integers(1, 6))
def test_one_direction_is_causal(seed, cell, step):
    torch.manual_seed(seed)
    network, input = drawn(cell, num_layers=2), sequences().requires_grad_()
    output = network(input)[0]
    (gradient,) = torch.autograd.grad(output[:, :step], input, torch.randn_like(output[:, :step]))
    assert not gradient[:, step:].any()
    assert (gradient[:, step - 1].abs().sum(-1) > 0).any() or cell is CELLS["relu"]


@every_cell
def test_states_of_empty_sequences_stay(cell):
    network = drawn(cell, num_layers=2, bidirectional=True)
    state = random_state(network)
    output, last = network(sequences(), torch.tensor([0, 3, 0, 7]), state)
    assert not output[[0, 2]].any()
    for old, new in zip(state, last, strict=True):
        torch.testing.assert_close(new[:, [0, 2]], old[:, [0, 2]], rtol=0, atol=0)
        assert all((new[k, b] != old[k, b]).any() for k in range(4) for b in (1, 3))


@pytest.mark.parametrize(("batch", "steps"), [(4, 0), (0, 7), (0, 0), (1, 1)])
@every_cell
def test_smallest_batches(cell, batch, steps):
    network = drawn(cell, num_layers=2, bidirectional=True)
    for lengths in None, torch.full((batch,), steps):
        output, last = network(sequences(batch, steps), lengths)
        assert output.shape == (batch, steps, network.output_dim)
        torch.testing.assert_close(
            [part.shape for part in last], [p.shape for p in network.initial_state(batch)]
        )
    if steps == 0:
        torch.testing.assert_close(last, network.initial_state(batch))


@pytest.mark.parametrize("cell", [LSTMCell, partial(GRUCell, reset_after=False)], ids=["fused", "loop"])
def test_dropout_is_between_layers_in_training(cell):
    input, lengths = sequences(), torch.tensor([7, 3, 5, 6])
    for one in (drawn(cell, dropout=0.9), drawn(cell, num_layers=3, dropout=0.9).eval()):
        expected = one(input, lengths)
        torch.testing.assert_close(one(input, lengths), expected, rtol=0, atol=0)
    network = drawn(cell, num_layers=2, dropout=1.0)
    changed, again = network(input), network(input + 1)
    torch.testing.assert_close(changed[0], again[0])  # the second layer sees nothing of the input
    assert (changed[1][0][0] - again[1][0][0]).abs().max() > 1e-2  # the first sees it all
    assert (changed[0] != 0).all()  # what leaves the network is not dropped
    half = drawn(cell, num_layers=2, dropout=0.5)
    assert (half(input)[0] - half(input)[0]).abs().max() > 1e-3


def test_variants_of_lstms_are_one_operation(monkeypatch):
    from lamina.kernels import _lstm_loop

    called = []
    registered = _lstm_loop.loop
    monkeypatch.setattr(_lstm_loop, "loop", lambda *args: called.append(args) or registered(*args))
    network = drawn(LOOPED["lstm peepholes"], num_layers=2, bidirectional=True)
    network(sequences(), torch.tensor([2, 7, 0, 5]))
    assert len(called) == 4  # a layer, a direction
    drawn(LOOPED["gru of Cho"])(sequences())
    drawn(LSTMCell)(sequences())
    with use_backend("reference"):
        network(sequences())
    assert len(called) == 4


def test_second_derivatives_of_variants_need_no_other_backend():
    network = drawn(partial(LSTMCell, peepholes=True, layer_norm=True), bidirectional=True)
    input = sequences(2, 3).requires_grad_()
    run = lambda input: network(input, torch.tensor([3, 2]))[0]  # noqa: E731
    assert torch.autograd.gradgradcheck(run, (input,), fast_mode=True)


def test_second_derivatives_through_the_loop():
    network, input = drawn(LSTMCell, bidirectional=True), sequences(2, 3).requires_grad_()

    def run(input):
        output, last = network(input, torch.tensor([3, 2]))
        return output, *last

    with use_backend("reference"):
        assert torch.autograd.gradcheck(run, (input,), fast_mode=True)
        assert torch.autograd.gradgradcheck(run, (input,), fast_mode=True)


@every_cell
def test_gradients(cell):
    network = drawn(cell, bidirectional=True)
    lengths, state = torch.tensor([3, 2]), tuple(p.requires_grad_() for p in random_state(network, 2))
    run = lambda x, *state: (network(x, lengths, state)[0], *network(x, None, state)[1])  # noqa: E731
    assert torch.autograd.gradcheck(run, (sequences(2, 3).requires_grad_(), *state), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "cell",
    [LSTMCell, GRUCell, RNNCell, partial(LSTMCell, peepholes=True), partial(LSTMCell, layer_norm=True)],
)
def test_low_precision_stays_near(cell, dtype):
    network, input = Recurrent(cell, 3, 5, num_layers=2), torch.randn(4, 7, 3)
    for lengths in None, torch.tensor([7, 3, 0, 5]):
        expected = network(input, lengths)[0]
        output, (hidden, *_) = copy.deepcopy(network).to(dtype)(input.to(dtype), lengths)
        assert output.dtype is hidden.dtype is dtype
        torch.testing.assert_close(output.float(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    "cell",
    [LSTMCell, GRUCell, RNNCell, partial(LSTMCell, peepholes=True), partial(LSTMCell, layer_norm=True)],
)
def test_autocast(cell):
    network, input, lengths = (
        Recurrent(cell, 3, 5, num_layers=2),
        torch.randn(4, 7, 3),
        torch.tensor([7, 3, 0, 5]),
    )
    expected = network(input, lengths)[0]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(network(input, lengths)[0].float(), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("cell", [LSTMCell, partial(GRUCell, reset_after=False)], ids=["fused", "loop"])
def test_lengths_do_not_break_the_graph(cell):
    """One graph for other lengths, and for lengths that reach the end."""
    network, input = drawn(cell, bidirectional=True), sequences(4, 3)
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="eager", dynamic=True)
    for lengths in [3, 1, 0, 2], [2, 2, 3, 0], [3, 3, 3, 3]:
        torch.testing.assert_close(
            compiled(input, torch.tensor(lengths)), network(input, torch.tensor(lengths))
        )


@pytest.mark.parametrize("cell", [LSTMCell, GRUCell])
def test_compiled_training_on_data_that_takes_no_gradient(cell):
    """The ordinary case. In float32 PyTorch's LSTM is oneDNN's, which cannot be compiled for training."""
    network, input = Recurrent(cell, 3, 5, num_layers=2), torch.randn(4, 3, 3)
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    results = []
    for run in network, compiled:
        output = run(input)[0]
        generator = torch.Generator().manual_seed(3)
        cotangent = torch.randn(output.shape, generator=generator)
        results.append([output, *torch.autograd.grad(output, list(network.parameters()), cotangent)])
    torch.testing.assert_close(results[1], results[0])


def test_compiled_training_of_an_lstm_takes_any_number_of_steps():
    """Not unrolled: of all steps there is one operation, whatever the lengths."""
    network = Recurrent(LSTMCell, 3, 5, num_layers=2, bidirectional=True)
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for steps in 7, 11, 13:
            input, lengths = torch.randn(4, steps, 3), torch.tensor([steps, 3, 0, 5])
            expected, actual = network(input, lengths)[0], compiled(input, lengths)[0]
            torch.testing.assert_close(actual, expected)
            cotangent, parameters = torch.randn_like(expected), list(network.parameters())
            torch.testing.assert_close(
                torch.autograd.grad(actual, parameters, cotangent),
                torch.autograd.grad(expected, parameters, cotangent),
            )


def test_exported_with_lengths_there_is_pytorch_alone():
    network, lengths = Recurrent(partial(LSTMCell, peepholes=True), 3, 5), torch.tensor([3, 2])
    program = torch.export.export(network, (torch.randn(2, 3, 3), lengths), strict=False)
    assert not any("lamina" in str(node.target) for node in program.graph.nodes)


def test_compiled_inference_takes_any_number_of_steps():
    network = Recurrent(LSTMCell, 3, 5).eval()
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for steps in 7, 11, 13:
            input = torch.randn(4, steps, 3)
            torch.testing.assert_close(compiled(input), network(input))


def test_exported_it_is_one_operation():
    network, input = Recurrent(LSTMCell, 3, 5), torch.randn(4, 7, 3)
    program = torch.export.export(network, (input,), strict=False)
    assert any("lstm" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(input), network(input))


def test_lengths_of_any_integer_type_and_without_data():
    network, input = drawn(LSTMCell), sequences()
    expected = network(input, torch.tensor([7, 3, 0, 5]))
    for dtype in torch.int32, torch.uint8, torch.int16:
        torch.testing.assert_close(network(input, torch.tensor([7, 3, 0, 5], dtype=dtype)), expected)
    meta = network.to("meta")
    assert meta(input.to("meta"), torch.tensor([7, 3, 0, 5], device="meta"))[0].shape == (4, 7, 5)


def test_the_second_bias_of_a_copy_is_zero_too():
    network, input = drawn(LSTMCell), sequences()
    expected = network(input)
    for twin in copy.deepcopy(network), pickle.loads(pickle.dumps(network)):
        torch.testing.assert_close(twin(input), expected, rtol=0, atol=0)
    assert [*network.state_dict()] == ["cells.0.weight_ih", "cells.0.weight_hh", "cells.0.bias_ih"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cell", [LSTMCell, GRUCell, RNNCell, partial(LSTMCell, projection_dim=2)])
@both
def test_cudnn_finds_the_weights_in_one_piece(cell, bidirectional, recwarn):
    network = Recurrent(cell, 3, 5, num_layers=2, bidirectional=bidirectional)
    input, lengths = torch.randn(4, 7, 3), torch.tensor([7, 3, 0, 5])
    expected = network(input, lengths)
    for placed in network.cuda(), copy.deepcopy(network), pickle.loads(pickle.dumps(network)):
        output, last = placed(input.cuda(), lengths)
        torch.testing.assert_close(output.cpu(), expected[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close([p.cpu() for p in last], list(expected[1]), rtol=1e-3, atol=1e-4)
    assert not [w for w in recwarn if "contiguous chunk" in str(w.message)]


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        Recurrent(LSTMCell, 3, 5, num_layers=0)
    for dropout in -0.1, 1.1:
        with pytest.raises(ValueError, match=f"dropout must be a probability, got {dropout}"):
            Recurrent(LSTMCell, 3, 5, dropout=dropout)
    with pytest.raises(ValueError, match="cell must make a RecurrentCell, got Linear"):
        Recurrent(nn.Linear, 3, 5)
    network = Recurrent(LSTMCell, 3, 5, num_layers=2)
    input = torch.randn(4, 7, 3)
    for wrong in (input[0], input[..., :2]):
        with pytest.raises(ValueError, match=r"input must be \(B, T, input_dim=3\), got"):
            network(wrong)
    with pytest.raises(ValueError, match=r"state must be of shapes \[\(2, 4, 5\), \(2, 4, 5\)\], got"):
        network(input, state=(torch.zeros(2, 4, 5),))
    with pytest.raises(ValueError, match="state must be of shapes"):
        network(input, state=(torch.zeros(2, 3, 5), torch.zeros(2, 3, 5)))


@pytest.mark.parametrize("cell", [LSTMCell, NormalisedCell])
def test_refuses_wrong_lengths(cell):
    network, input = Recurrent(cell, 3, 5), torch.randn(4, 7, 3)
    for wrong in (
        torch.ones(4),
        torch.ones(4, dtype=torch.bool),
        torch.ones(3).long(),
        torch.ones(4, 1).long(),
    ):
        with pytest.raises(ValueError, match=r"lengths must be \(B=4,\) of integers, got"):
            network(input, wrong)
    for wrong in [7, 8, 1, 1], [7, -1, 1, 1]:
        with pytest.raises(ValueError, match="lengths must lie between 0 and T=7, got"):
            network(input, torch.tensor(wrong))


def test_protocol_and_text():
    assert isinstance(GRUCell(3, 5), RecurrentCell)
    assert isinstance(NormalisedCell(3, 5), RecurrentCell)
    assert not isinstance(nn.LSTMCell(3, 5), RecurrentCell)
    network = Recurrent(LSTMCell, 3, 5, bidirectional=True)
    assert (network.input_dim, network.hidden_dim, network.output_dim) == (3, 5, 10)
    assert Recurrent(NormalisedCell, 3, 5, num_layers=2, bidirectional=True).output_dim == 12
    assert "3, 5, num_layers=1, bidirectional=True, dropout=0.0" in repr(network)
