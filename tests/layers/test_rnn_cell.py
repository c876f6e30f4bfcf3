"""The simple cell: torch.nn's, and what all cells check and promise."""

import pytest
import torch
from lamina.layers import GRUCell, LSTMCell, RNNCell
from torch import nn

CELLS = [RNNCell, LSTMCell, GRUCell]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_equals_torch(activation, bias):
    theirs = nn.RNNCell(3, 5, nonlinearity=activation, bias=bias)
    ours = RNNCell(3, 5, activation=activation, bias=bias, recurrent_bias=bias)
    ours.load_state_dict(theirs.state_dict())
    input, hidden = torch.randn(2, 3), torch.randn(2, 5)
    output, state = ours(input, (hidden,))
    torch.testing.assert_close(output, theirs(input, hidden))
    torch.testing.assert_close(state, (output,))
    torch.testing.assert_close(ours(input)[0], theirs(input))


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_gradients(activation):
    cell = RNNCell(3, 5, activation=activation, recurrent_bias=True, dtype=torch.float64)
    names, parameters = zip(*cell.named_parameters(), strict=True)

    def step(input, hidden, *values):
        return torch.func.functional_call(cell, dict(zip(names, values, strict=True)), (input, (hidden,)))[0]

    inputs = [torch.randn(2, dim, dtype=torch.float64, requires_grad=True) for dim in (3, 5)]
    assert torch.autograd.gradcheck(step, (*inputs, *parameters))


def test_counts_of_parameters():
    count = lambda cell: sum(p.numel() for p in cell.parameters())  # noqa: E731
    assert count(RNNCell(3, 5)) == 5 * (3 + 5 + 1)
    assert count(RNNCell(3, 5, recurrent_bias=True)) == 5 * (3 + 5 + 2)
    assert count(RNNCell(3, 5, bias=False)) == 5 * (3 + 5)


@pytest.mark.parametrize("make", CELLS)
def test_starts_as_torch(make):
    """Uniform in ±1/sqrt(hidden_dim): never outside, and nearly everywhere inside."""
    cell = make(7, 101)
    for weight in (cell.weight_ih, cell.weight_hh):
        assert weight.abs().max() <= 101**-0.5
        assert weight.max() > 0.9 * 101**-0.5
        assert weight.min() < -0.9 * 101**-0.5


@pytest.mark.parametrize("make", CELLS)
def test_state_before_the_first_step(make):
    cell = make(3, 5, dtype=torch.float64)
    for state, dtype in (
        (cell.initial_state(2), torch.float64),
        (cell.initial_state(2, dtype=torch.float32), torch.float32),
    ):
        assert all(part.shape == (2, 5) and part.dtype is dtype and not part.any() for part in state)
    assert all(part.is_meta for part in cell.initial_state(2, device="meta"))
    input = torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(cell(input), cell(input, cell.initial_state(2)), rtol=0, atol=0)
    assert (cell.input_dim, cell.hidden_dim, cell.output_dim) == (3, 5, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", CELLS)
def test_low_precision_stays_near(make, dtype):
    cell = make(3, 5)
    input, state = torch.randn(2, 3), tuple(torch.randn(2, 5) for _ in cell.state_dims)
    expected = cell(input, state)[0]
    output, (hidden, *_) = cell.to(dtype)(input.to(dtype), tuple(part.to(dtype) for part in state))
    assert output.dtype is hidden.dtype is dtype
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("make", CELLS)
def test_refuses_what_does_not_fit(make):
    with pytest.raises(ValueError, match="input_dim and hidden_dim must be at least 1, got input_dim=0"):
        make(0, 5)
    with pytest.raises(ValueError, match="hidden_dim must be at least 1, got input_dim=3 and hidden_dim=0"):
        make(3, 0)
    with pytest.raises(ValueError, match="recurrent_bias=True is a second bias"):
        make(3, 5, bias=False, recurrent_bias=True)
    cell = make(3, 5)
    with pytest.raises(ValueError, match=r"input must be \(B, input_dim=3\), got \(2, 4\)"):
        cell(torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"input must be \(B, input_dim=3\), got \(3,\)"):
        cell(torch.randn(3))
    with pytest.raises(ValueError, match="state must be of shapes"):
        cell(torch.randn(2, 3), cell.initial_state(7))
    with pytest.raises(ValueError, match="state must be of shapes"):
        cell(torch.randn(2, 3), ())


def test_smallest_sizes_are_allowed():
    assert RNNCell(1, 1)(torch.randn(1, 1))[0].shape == (1, 1)


def test_refuses_other_activations():
    with pytest.raises(ValueError, match="activation must be 'tanh' or 'relu', got 'gelu'"):
        RNNCell(3, 5, activation="gelu")


def test_text_tells_the_options():
    assert "3, 5, bias=True, recurrent_bias=False, activation='relu'" in repr(
        RNNCell(3, 5, activation="relu")
    )
    assert "peepholes=True, projection_dim=2" in repr(LSTMCell(3, 5, peepholes=True, projection_dim=2))
    assert "reset_after=False" in repr(GRUCell(3, 5, reset_after=False))
