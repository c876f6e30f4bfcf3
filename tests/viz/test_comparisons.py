"""Lines and bars that stand beside one another, and the spectrum of attention."""

import pytest
import torch
from lamina.viz import attention_spectrum, plot_bars, plot_lines

pytest.importorskip("matplotlib")

PANELS = {
    "time": {"k = 2": [(8, 1.5), (16, 2.0)], "k = 4": [(16, 1.2), (32, 3.0)]},
    "memory": {"k = 4": [(16, 5.0)]},
}


def test_lines_have_one_colour_a_name_in_all_panels(tmp_path):
    references = {
        "time": {"k = 4": [(16, 9.0), (32, 9.5)], "k = 8": [(16, 1.0)]},
        "other": {"k = 4": [(1, 1.0)]},
    }
    figure = plot_lines(
        PANELS,
        x="n",
        y="times",
        log="xy",
        references=references,
        reference="theirs",
        path=tmp_path / "lines.png",
    )
    time, memory = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["time", "memory"]
    assert (time.get_xlabel(), time.get_ylabel(), time.get_xscale(), time.get_yscale()) == (
        "n",
        "times",
        "log",
        "log",
    )
    two, four, theirs = time.lines
    assert list(zip(two.get_xdata(), two.get_ydata(), strict=True)) == PANELS["time"]["k = 2"]
    assert list(theirs.get_ydata()) == [9.0, 9.5]
    assert (theirs.get_linestyle(), four.get_linestyle()) == (":", "-")
    assert four.get_color() == theirs.get_color() == memory.lines[0].get_color() != two.get_color()
    assert list(time.get_xticks()) == [8, 16, 32]
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["k = 2", "k = 4", "theirs"]
    assert (tmp_path / "lines.png").stat().st_size > 0


def test_long_lines_have_no_points_and_a_legend_says_only_what_is_there():
    figure = plot_lines({"": {"a": [(n, n * n) for n in range(40)]}}, x="n", reference="nothing")
    [line] = figure.axes[0].lines
    assert line.get_marker() == "None"
    assert figure.axes[0].get_xscale() == "linear"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a"]


@pytest.mark.parametrize("panels", [{}, {"time": {}}, {"time": {"a": []}}])
def test_lines_without_a_point(panels):
    with pytest.raises(ValueError, match="panels must hold at least one panel, and each a point"):
        plot_lines(panels, x="n")


def test_bars_begin_at_zero_and_have_one_colour_a_name(tmp_path):
    figure = plot_bars(
        {"loss": {"full": 4.0, "local": 4.5}, "ms": {"full": 90.0, "local": 30.0}},
        references={"loss": {"unigram": 6.5}},
        path=tmp_path / "bars.png",
    )
    loss, ms = figure.axes
    assert [bar.get_width() for bar in loss.patches] == [4.0, 4.5]
    assert [bar.get_width() for bar in ms.patches] == [90.0, 30.0]
    assert {bar.get_x() for bar in (*loss.patches, *ms.patches)} == {0}
    assert [label.get_text() for label in loss.get_yticklabels()] == ["full", "local"]
    assert loss.patches[1].get_facecolor() == ms.patches[1].get_facecolor() != ms.patches[0].get_facecolor()
    [line] = loss.lines
    assert list(line.get_xdata()) == [6.5, 6.5]
    assert "unigram" in [text.get_text() for text in loss.texts]
    assert {"90", "30"} <= {text.get_text() for text in ms.texts}
    assert (tmp_path / "bars.png").stat().st_size > 0


@pytest.mark.parametrize("panels", [{}, {"loss": {}}])
def test_bars_without_a_number(panels):
    with pytest.raises(ValueError, match="panels must hold at least one panel, and each a number"):
        plot_bars(panels)


def test_the_spectrum_of_a_known_matrix():
    """Two orthogonal directions of weight 3 and 1: three quarters, then all."""
    q, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    p, _ = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))
    matrix = 3 * torch.outer(q[0], p[0]) + torch.outer(q[1], p[1])
    expected = torch.tensor([0.75, 1, 1, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(attention_spectrum(matrix[None]), expected[None])
    batch = torch.stack([matrix, torch.eye(5, 7, dtype=torch.float64)])[:, None].expand(2, 3, 5, 7)
    mean = (expected + torch.arange(1, 6) / 5) / 2
    torch.testing.assert_close(attention_spectrum(batch), mean.expand(3, 5))


def test_a_matrix_of_nothing_has_no_spectrum_and_half_precision_is_widened():
    assert attention_spectrum(torch.zeros(2, 3, 4)).count_nonzero() == 0
    weights = torch.rand(2, 3, 5, 5).softmax(-1).bfloat16().requires_grad_()
    spectrum = attention_spectrum(weights)
    assert (spectrum.shape, spectrum.dtype, spectrum.requires_grad) == ((3, 5), torch.float32, False)
    torch.testing.assert_close(spectrum[:, -1], torch.ones(3))


@pytest.mark.parametrize("shape", [(5, 5), (0, 2, 5, 5), (1, 2, 3, 4, 5)])
def test_a_spectrum_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"weights must be a non-empty \(B, H, Lq, Lk\) or \(H, Lq, Lk\)"):
        attention_spectrum(torch.zeros(shape))
