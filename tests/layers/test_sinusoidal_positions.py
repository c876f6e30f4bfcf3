"""Sinusoidal positions: the paper's formula, any length, and in two dimensions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.layers import SinusoidalPositions, SinusoidalPositions2d

dims, lengths, offsets = st.integers(1, 11), st.integers(0, 13), st.integers(0, 1000)


def one(position: int, channel: int, dim: int, base: float) -> float:
    """The paper's formula, channel by channel."""
    angle = position / base ** ((channel - channel % 2) / dim)
    return math.cos(angle) if channel % 2 else math.sin(angle)


@given(dim=dims, length=lengths, offset=offsets, base=st.sampled_from([10000.0, 7.0]))
def test_is_the_formula(dim, length, offset, base):
    table = SinusoidalPositions(dim, base=base).table(length, offset, dtype=torch.float64)
    expected = np.array([[one(offset + m, c, dim, base) for c in range(dim)] for m in range(length)])
    np.testing.assert_allclose(table.numpy(), expected.reshape(length, dim), rtol=0, atol=1e-11)


@given(dim=dims, length=lengths)
def test_halves_are_the_same_numbers_in_another_order(dim, length):
    by_turns = SinusoidalPositions(dim).table(length)
    halves = SinusoidalPositions(dim, interleaved=False).table(length)
    assert torch.equal(halves, torch.cat([by_turns[:, ::2], by_turns[:, 1::2]], 1))


def test_a_shift_is_a_rotation():
    """The reason that the paper gives: P(m + k) is a linear function of P(m), whatever m is."""
    positions = SinusoidalPositions(6)
    table = positions.table(29, dtype=torch.float64)
    shift = torch.linalg.lstsq(table[:-5], table[5:]).solution
    torch.testing.assert_close(table[:-5] @ shift, table[5:])


def test_tokens_that_do_not_stand_side_by_side_have_positions_of_their_own():
    positions, x = SinusoidalPositions(5), torch.randn(2, 3, 5, dtype=torch.float64)
    table, of_rows = positions.table(9, dtype=torch.float64), torch.tensor([[0, 1, 2], [8, 0, 3]])
    torch.testing.assert_close(positions(x, positions=of_rows), x + table[of_rows])
    torch.testing.assert_close(positions(x[0], positions=of_rows[0], offset=4), positions(x[0], offset=4))
    with pytest.raises(ValueError, match=r"positions must be \(3,\) or \(2, 3\), got \(2,\)"):
        positions(x, positions=torch.tensor([0, 1]))


def test_adds_the_table():
    positions, x = SinusoidalPositions(7), torch.randn(2, 5, 7)
    torch.testing.assert_close(positions(x) - x, positions.table(5).expand(2, -1, -1))
    steps = [positions(x[:, m : m + 1], offset=m) for m in range(5)]
    assert torch.equal(torch.cat(steps, 1), positions(x))
    assert torch.equal(positions(x[0]), positions(x)[0])
    assert not [*positions.parameters(), *positions.buffers()]


def test_low_precision_rounds_the_table_only():
    table = SinusoidalPositions(8).table(3, 5000)
    for dtype in torch.float16, torch.bfloat16:
        assert torch.equal(SinusoidalPositions(8).table(3, 5000, dtype=dtype), table.to(dtype))
        assert SinusoidalPositions(8).to(dtype)(torch.zeros(1, 3, 8, dtype=dtype)).dtype is dtype
    assert table.dtype is torch.float32
    assert SinusoidalPositions(8).table(3, device="meta").device.type == "meta"


@given(half=st.integers(1, 5), rows=lengths, cols=lengths, interleaved=st.booleans())
def test_a_cell_has_its_row_and_its_column(half, rows, cols, interleaved):
    table = SinusoidalPositions2d(2 * half, base=7.0, interleaved=interleaved).table(rows, cols)
    axis = SinusoidalPositions(half, base=7.0, interleaved=interleaved)
    image = table.view(rows, cols, 2 * half)
    assert torch.equal(image[..., :half], axis.table(rows).unsqueeze(1).expand(rows, cols, half))
    assert torch.equal(image[..., half:], axis.table(cols).expand(rows, cols, half))


def test_a_part_of_a_grid_has_the_positions_of_the_whole():
    positions = SinusoidalPositions2d(8)
    whole, part = positions.table(5, 7).view(5, 7, 8), positions.table(3, 2).view(3, 2, 8)
    assert torch.equal(part, whole[:3, :2])


def test_adds_the_table_in_two_dimensions():
    positions, x = SinusoidalPositions2d(6), torch.randn(2, 15, 6)
    torch.testing.assert_close(positions(x, (3, 5)) - x, positions.table(3, 5).expand(2, -1, -1))
    assert not torch.equal(positions(x, (3, 5)), positions(x, (5, 3)))
    half = positions(x.half(), (3, 5))
    assert half.dtype is torch.float16
    assert torch.equal(half, x.half() + positions.table(3, 5).half())


def test_two_dimensions_are_computed_in_float64_for_float64():
    table = SinusoidalPositions2d(4).table(1, 1000, dtype=torch.float64)
    assert table[999, 2].item() == pytest.approx(math.sin(999), abs=1e-14)
    assert SinusoidalPositions2d(4).table(2, 3, device="meta").device.type == "meta"


@pytest.mark.parametrize("part", [SinusoidalPositions, SinusoidalPositions2d])
def test_wrong_channels_are_named(part):
    grid = ((1, 5),) if part is SinusoidalPositions2d else ()
    for shape in (2, 5, 7), (6,):
        with pytest.raises(ValueError, match=r"x must be \(B, L, 6\), got"):
            part(6)(torch.randn(shape), *grid)


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="dim must be at least 1, got dim=0"):
        SinusoidalPositions(0)
    for dim in 7, 0, -2:
        with pytest.raises(ValueError, match=f"dim must be even and positive, got dim={dim}"):
            SinusoidalPositions2d(dim)
    with pytest.raises(ValueError, match=r"one token a cell of grid=\(3, 4\)"):
        SinusoidalPositions2d(6)(torch.randn(2, 15, 6), (3, 4))


def test_repr_tells_its_form():
    assert repr(SinusoidalPositions(6)) == "SinusoidalPositions(6, base=10000.0, interleaved=True)"
    assert repr(SinusoidalPositions2d(6)) == "SinusoidalPositions2d(6, base=10000.0, interleaved=True)"
