"""Learned positions: the table, and its true interpolation to other lengths and grids."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from lamina.layers import LearnedPositions, LearnedPositions2d
from PIL import Image
from scipy import ndimage
from torch.autograd import gradcheck

seeds, sides = st.integers(0, 2**31), st.integers(1, 9)
modes = pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])


def test_adds_the_rows_of_its_places():
    positions, x = LearnedPositions(11, 3), torch.randn(2, 5, 3)
    torch.testing.assert_close(positions(x, offset=6) - x, positions.weight[6:].expand(2, -1, -1))
    steps = [positions(x[:, m : m + 1], offset=m) for m in range(5)]
    assert torch.equal(torch.cat(steps, 1), positions(x))
    assert positions.table(0, 11).shape == (0, 3)


def test_interpolates_only_what_is_longer():
    positions, fixed = LearnedPositions(7, 3, interpolate=True), LearnedPositions(7, 3)
    fixed.load_state_dict(positions.state_dict())
    x = torch.randn(2, 7, 3)
    assert torch.equal(positions(x[:, :5], offset=2), fixed(x[:, :5], offset=2))
    assert torch.equal(positions(x), fixed(x))


@given(seed=seeds, rows=sides, more=sides)
def test_a_longer_sequence_is_drawn_out_linearly(seed, rows, more):
    torch.manual_seed(seed)
    positions = LearnedPositions(rows, 3, interpolate=True, dtype=torch.float64)
    length = rows + more
    weight = positions.weight.detach().numpy()
    places = np.linspace(0, rows - 1, length)
    expected = np.stack([np.interp(places, np.arange(rows), weight[:, c]) for c in range(3)], 1)
    np.testing.assert_allclose(positions.table(length).detach().numpy(), expected, atol=1e-12)


def test_fourteen_by_fourteen_to_twenty_four_as_the_vit_authors_do():
    positions = LearnedPositions2d((14, 14), 5, num_prefix_tokens=1)
    image = positions.weight.detach().numpy().reshape(14, 14, 5)
    expected = ndimage.zoom(image, (24 / 14, 24 / 14, 1), order=1)
    table = positions.table((24, 24)).detach()
    np.testing.assert_allclose(table[1:].numpy().reshape(24, 24, 5), expected, rtol=0, atol=1e-6)
    assert torch.equal(table[:1], positions.prefix)


@given(seed=seeds, old=st.tuples(sides, sides), new=st.tuples(sides, sides))
def test_bilinear_is_the_zoom_of_scipy_on_every_grid(seed, old, new):
    torch.manual_seed(seed)
    positions = LearnedPositions2d(old, 3, dtype=torch.float64)
    image = positions.weight.detach().numpy().reshape(*old, 3)
    expected = ndimage.zoom(image, (new[0] / old[0], new[1] / old[1], 1), order=1)
    assume(expected.shape[:2] == new)  # scipy rounds the size that a float factor gives
    table = positions.table(new).detach().numpy()
    np.testing.assert_allclose(table.reshape(*new, 3), expected, rtol=0, atol=1e-12)


@given(seed=seeds, old=st.tuples(sides, sides), new=st.tuples(sides, sides))
def test_bicubic_is_the_resize_of_pillow_on_every_grid(seed, old, new):
    torch.manual_seed(seed)
    positions = LearnedPositions2d(old, 1, interpolation="bicubic")
    image = Image.fromarray(positions.weight.detach().numpy().reshape(old), mode=None)
    expected = np.asarray(image.resize((new[1], new[0]), Image.Resampling.BICUBIC))
    table = positions.table(new).detach().numpy()
    np.testing.assert_allclose(table.reshape(new), expected, rtol=0, atol=1e-6)


@modes
def test_interpolation_is_truly_two_dimensional(interpolation):
    """A table that counts its rows, and beside it its columns, still does so on a grid of another form.

    To slice a table of two dimensions as if it had one is a known fault: row 1 of a narrower grid would
    then hold places of row 0.
    """
    positions = LearnedPositions2d((5, 7), 2, interpolation=interpolation)
    rows, cols = torch.meshgrid(torch.arange(5.0), torch.arange(7.0), indexing="ij")
    positions.weight.data = torch.stack([rows, cols], -1).view(35, 2)
    for grid in (3, 11), (11, 3), (2, 2):
        table = positions.table(grid).view(*grid, 2)
        assert table[..., 0].std(1).max() < 1e-5, "a row index changes along its row"
        assert table[..., 1].std(0).max() < 1e-5, "a column index changes along its column"
        assert (table[..., 0].diff(dim=0) > 0.1).all()
        assert (table[..., 1].diff(dim=1) > 0.1).all()
        assert table.mean((0, 1)).tolist() == pytest.approx([2, 3], abs=1e-4)


@modes
def test_its_own_grid_is_not_interpolated(interpolation):
    positions = LearnedPositions2d((3, 5), 7, interpolation=interpolation, num_prefix_tokens=2)
    expected = torch.cat([positions.prefix, positions.weight])
    for table in positions.table(), positions.table((3, 5)), positions.table([3, 5]):
        assert torch.equal(table, expected)
    x = torch.randn(2, 17, 7)
    assert torch.equal(positions(x), x + expected)
    assert torch.equal(positions(x, (3, 5)), x + expected)


@modes
def test_low_precision_interpolates_in_float32(interpolation):
    for low in torch.float16, torch.bfloat16:
        positions = LearnedPositions2d((3, 5), 7, interpolation=interpolation, dtype=low)
        line = LearnedPositions(5, 7, interpolate=True, dtype=low)
        expected = positions.to(low).table((7, 4)), line.table(11)
        wide = positions.float().table((7, 4)), line.float().table(11)
        assert torch.equal(expected[0], wide[0].to(low))
        assert torch.equal(expected[1], wide[1].to(low))


@modes
def test_autocast_does_not_lower_the_precision(interpolation):
    positions = LearnedPositions2d((3, 5), 7, interpolation=interpolation)
    expected = positions.table((7, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(positions.table((7, 4)), expected)


@modes
def test_shapes_are_known_without_memory(interpolation):
    positions = LearnedPositions2d((3, 5), 7, interpolation=interpolation, device="meta")
    assert positions(torch.empty(2, 28, 7, device="meta"), (7, 4)).shape == (2, 28, 7)


@modes
def test_gradients_flow_through_the_interpolation(interpolation):
    positions = LearnedPositions2d(
        (3, 2), 2, interpolation=interpolation, num_prefix_tokens=1, dtype=torch.float64
    )
    x = torch.randn(1, 1 + 20, 2, dtype=torch.float64)

    def call(weight, prefix):
        return torch.func.functional_call(positions, {"weight": weight, "prefix": prefix}, (x, (5, 4)))

    assert gradcheck(call, (positions.weight, positions.prefix))
    line = LearnedPositions(3, 2, interpolate=True, dtype=torch.float64)
    assert gradcheck(lambda w: torch.func.functional_call(line, {"weight": w}, x), (line.weight,))


def test_starts_normal():
    line, grid = LearnedPositions(101, 53), LearnedPositions2d((11, 13), 53, num_prefix_tokens=41)
    for weight in line.weight, grid.weight, grid.prefix:
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert abs(weight.mean().item()) < 0.002
        assert weight.abs().max() > 0.05  # not truncated at two deviations
    assert grid.weight.shape == (143, 53)
    assert LearnedPositions2d((2, 3), 5).prefix is None


def test_reset_parameters_fills_what_was_made_without_memory():
    for part in LearnedPositions(7, 3, device="meta"), LearnedPositions2d((2, 3), 3, device="meta"):
        filled = part.to_empty(device="cpu")
        filled.weight.data.fill_(torch.nan)
        filled.reset_parameters()
        assert filled.weight.isfinite().all()


@modes
def test_compiles_for_several_grids(interpolation):
    positions = LearnedPositions2d((3, 5), 7, interpolation=interpolation, num_prefix_tokens=1)
    compiled = torch.compile(positions, fullgraph=True, dynamic=True, backend="aot_eager")
    for grid in (3, 5), (7, 2), (4, 11):
        x = torch.randn(2, 1 + grid[0] * grid[1], 7)
        torch.testing.assert_close(compiled(x, grid), positions(x, grid))


def test_tokens_that_do_not_stand_side_by_side_have_positions_of_their_own():
    positions, x = LearnedPositions(7, 3), torch.randn(2, 5, 3)
    of_rows = torch.tensor([[0, 1, 2, 3, 4], [6, 0, 0, 2, 1]])
    torch.testing.assert_close(positions(x, positions=of_rows), x + positions.weight[of_rows])
    torch.testing.assert_close(positions(x, positions=of_rows[0]), positions(x))
    torch.testing.assert_close(positions(x[0], positions=of_rows[0], offset=2), positions(x[0], offset=2))
    with pytest.raises(ValueError, match=r"positions must be \(5,\) or \(2, 5\), got \(2,\)"):
        positions(x, positions=torch.tensor([0, 1]))


def test_a_length_beyond_the_table_is_refused_with_what_to_do():
    with pytest.raises(
        ValueError, match="max_length=7, got length=5 at offset=3: make the layer with max_length=8"
    ):
        LearnedPositions(7, 3)(torch.randn(2, 5, 3), offset=3)
    with pytest.raises(ValueError, match="offset must be 0 beyond max_length=7, got offset=3"):
        LearnedPositions(7, 3, interpolate=True)(torch.randn(2, 5, 3), offset=3)
    with pytest.raises(ValueError, match="offset must be at least 0, got offset=-1"):
        LearnedPositions(7, 3)(torch.randn(2, 5, 3), offset=-1)


@pytest.mark.parametrize("shape", [(2, 5, 4), (3,)])
def test_wrong_channels_are_named(shape):
    with pytest.raises(ValueError, match=r"x must be \(B, L, 3\), got"):
        LearnedPositions(7, 3)(torch.randn(shape))


@pytest.mark.parametrize(
    ("shape", "grid"), [((2, 6, 3), None), ((2, 7, 4), None), ((2, 7, 3), (3, 3)), ((3,), None)]
)
def test_wrong_tokens_are_named(shape, grid):
    with pytest.raises(ValueError, match=r"for 1 prefix tokens and grid=\((2|3), 3\), got"):
        LearnedPositions2d((2, 3), 3, num_prefix_tokens=1)(torch.randn(shape), grid)


def test_an_unknown_interpolation_is_refused():
    with pytest.raises(ValueError, match="interpolation must be 'bilinear' or 'bicubic', got 'nearest'"):
        LearnedPositions2d((2, 3), 3, interpolation="nearest")


def test_repr_tells_its_sizes():
    assert repr(LearnedPositions(7, 3)) == "LearnedPositions(7, 3, interpolate=False)"
    expected = "LearnedPositions2d((2, 3), 5, interpolation='bilinear', num_prefix_tokens=1)"
    assert repr(LearnedPositions2d((2, 3), 5, num_prefix_tokens=1)) == expected
    assert "num_prefix_tokens=0" in repr(LearnedPositions2d((2, 3), 5))
