"""What stands in the pictures: arrays, labels, panels; and that a file is whole or not there."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from lamina.viz import (
    plot_attention,
    plot_attention_over_images,
    plot_confusion_matrix,
    plot_learning_curves,
)

pytest.importorskip("matplotlib")

NAN = math.nan


def panels(figure) -> list:
    """The axes without the colour bar's."""
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def pixels(figure) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())


def test_an_alignment():
    weights = torch.rand(3, 5, dtype=torch.float64).requires_grad_()
    figure = plot_attention(weights, query_labels=list("abc"), key_labels=["v", "w", "x", "y", "z"])
    [axes] = panels(figure)
    [image] = axes.images
    np.testing.assert_array_equal(image.get_array(), weights.detach().numpy())
    assert image.get_cmap().name == "viridis"
    assert image.get_clim() == (0, pytest.approx(weights.max().item()))
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b", "c"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["v", "w", "x", "y", "z"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("key", "query")
    assert len(figure.axes) == 2  # with the colour bar


def test_heads_share_one_scale():
    weights = torch.rand(5, 2, 3).bfloat16()
    axes = panels(plot_attention(weights))
    assert [a.get_title() for a in axes] == [f"head {head}" for head in range(5)]
    for head, a in enumerate(axes):
        np.testing.assert_array_equal(a.images[0].get_array(), weights[head].double().numpy())
        assert a.images[0].get_clim() == (0, weights.max().item())
    # Four a row: the fifth stands below the first.
    assert axes[4].get_subplotspec().colspan.start == 0
    assert axes[4].get_subplotspec().get_gridspec().get_geometry() == (2, 4)
    assert [bool(a.get_ylabel()) for a in axes] == [True, False, False, False, True]
    assert [bool(a.get_xlabel()) for a in axes] == [False, True, True, True, True]


def test_ticks_without_labels_are_whole_numbers():
    figure = plot_attention(torch.rand(2, 3))
    figure.canvas.draw()
    assert {tick % 1 for tick in (*panels(figure)[0].get_xticks(), *panels(figure)[0].get_yticks())} == {0}


@pytest.mark.parametrize("weights", [torch.zeros(3, 5), torch.full((3, 5), NAN)], ids=["zero", "nan"])
def test_weights_without_a_scale_are_drawn_too(weights):
    pixels(plot_attention(weights))


@pytest.mark.parametrize(
    ("shape", "labels", "message"),
    [
        ((5,), {}, r"weights must be a non-empty \(Lq, Lk\) or \(H, Lq, Lk\), got shape \(5,\)"),
        ((1, 2, 3, 5), {}, r"got shape \(1, 2, 3, 5\)"),
        ((3, 0), {}, r"got shape \(3, 0\)"),
        ((3, 5), {"query_labels": list("ab")}, "query_labels must have 3 entries, got 2"),
        ((3, 5), {"key_labels": list("abc")}, "key_labels must have 5 entries, got 3"),
    ],
)
def test_attention_refuses(shape, labels, message):
    with pytest.raises(ValueError, match=message):
        plot_attention(torch.zeros(shape), **labels)


def test_images_and_their_overlays():
    images, attention = torch.randn(3, 1, 8, 10), torch.rand(3, 2, 5)
    figure = plot_attention_over_images(images, attention, titles=["a", "b", "c"])
    axes = panels(figure)
    assert len(axes) == 6
    for index in range(3):
        above, below = axes[2 * index : 2 * index + 2]
        assert above.get_title() == ["a", "b", "c"][index]
        grey = (images[index, 0] - images[index].min()) / (images[index].max() - images[index].min())
        drawn = np.asarray(above.images[0].get_array())
        np.testing.assert_allclose(drawn, np.repeat(grey.double().numpy()[..., None], 3, -1), atol=1e-6)
        patches, veil = below.images
        np.testing.assert_array_equal(patches.get_array(), attention[index].double().numpy())
        assert patches.get_clim() == (0, attention.max().item())
        assert tuple(patches.get_extent()) == (-0.5, 9.5, 7.5, -0.5)
        np.testing.assert_allclose(veil.get_array()[..., 3], 0.4 * grey.numpy(), atol=1e-6)
        assert not above.get_xticks().size
        assert not below.get_yticks().size
        # The overlay stands under its image.
        assert above.get_subplotspec().colspan == below.get_subplotspec().colspan
        assert above.get_subplotspec().rowspan.start + 1 == below.get_subplotspec().rowspan.start


def test_black_pixels_show_the_colour_of_their_patch():
    images = torch.zeros(1, 8, 8)
    images[0, 0, 0] = 1.0  # else there is no range to stretch
    figure = plot_attention_over_images(images, torch.tensor([[[0.0, 0.25], [0.5, 1.0]]]))
    shown, below = pixels(figure), panels(figure)[1]
    box = below.get_window_extent()
    for row, column, share in [(0, 1, 0.25), (1, 0, 0.5), (1, 1, 1.0)]:
        x, y = int(box.x0 + box.width * (column + 0.5) / 2), int(box.y1 - box.height * (row + 0.5) / 2)
        expected = np.array(below.images[0].get_cmap()(share)) * 255
        np.testing.assert_allclose(shown[len(shown) - 1 - y, x], expected, atol=2)


def test_colour_images_and_flat_attention():
    images, attention = torch.rand(2, 3, 6, 8), torch.rand(2, 6)
    axes = panels(plot_attention_over_images(images, attention, grid=(3, 2)))
    np.testing.assert_array_equal(axes[3].images[0].get_array(), attention[1].reshape(3, 2).double().numpy())
    low, high = images[1].min(), images[1].max()
    expected = ((images[1] - low) / (high - low)).permute(1, 2, 0)
    np.testing.assert_allclose(axes[2].images[0].get_array(), expected.numpy(), atol=1e-6)


def test_the_figure_has_the_proportions_of_its_images():
    """What stands side by side and on top of each other fills it, but for margins."""
    for height, width in [(4, 4), (3, 12), (8, 4)]:
        figure = plot_attention_over_images(torch.rand(4, height, width), torch.rand(4, 1, 1))
        across, down = figure.get_size_inches()
        assert down == pytest.approx(2 * 1.5 * height / width, abs=0.5)
        assert across == pytest.approx(4 * 1.5, abs=1)


def test_many_images_take_several_rows():
    axes = panels(plot_attention_over_images(torch.rand(11, 4, 4), torch.rand(11, 2, 2)))
    places = [(a.get_subplotspec().rowspan.start, a.get_subplotspec().colspan.start) for a in axes]
    assert len(set(places)) == 22
    assert places[10:12] == [(0, 5), (1, 5)]
    assert places[12:14] == [(2, 0), (3, 0)]
    assert places[-2:] == [(2, 4), (3, 4)]


def test_an_image_of_one_value_is_drawn():
    axes = panels(plot_attention_over_images(torch.full((1, 4, 4), 7.0), torch.rand(1, 2, 2)))
    assert (np.asarray(axes[0].images[0].get_array()) == 0).all()


@pytest.mark.parametrize(
    ("images", "attention", "options", "message"),
    [
        (
            (8, 8),
            (1, 2, 2),
            {},
            r"images must be a non-empty \(B, C, H, W\) or \(B, H, W\), got shape \(8, 8\)",
        ),
        ((1, 2, 8, 8), (1, 2, 2), {}, "images must have one or three channels, got 2"),
        ((3, 8, 8), (2, 2, 2), {}, "attention must have one map per image, got 2 for 3 images"),
        ((1, 8, 8), (1, 4), {}, r"grid must be given for a flat attention \(B, N\), got shape \(1, 4\)"),
        ((1, 8, 8), (1, 5), {"grid": (2, 2)}, r"got \(2, 2\) for N=5 \(a class token is no patch"),
        ((1, 8, 8), (1, 2, 3), {"grid": (3, 2)}, r"grid must be that of attention, got \(3, 2\)"),
        ((1, 8, 8), (4,), {}, r"attention must be a non-empty .*, got shape \(4,\)"),
        ((1, 8, 8), (1, 2, 2), {"titles": ["a", "b"]}, "titles must have 1 entries, got 2"),
    ],
)
def test_images_refuse(images, attention, options, message):
    with pytest.raises(ValueError, match=message):
        plot_attention_over_images(torch.zeros(images), torch.zeros(attention), **options)


def test_a_panel_a_metric_and_a_colour_a_run():
    histories = {
        "seed 0": {
            "train_loss": [3.0, 2.0, 1.0],
            "val_loss": [3.5, 2.5, 1.5],
            "val_accuracy": [0.1, 0.5, 0.9],
        },
        "seed 1": {"train_loss": [3.0, 2.0], "val_loss": [3.5, 2.5]},
    }
    figure = plot_learning_curves(histories)
    loss, accuracy = figure.axes
    assert (loss.get_title(), accuracy.get_title()) == ("loss", "accuracy")
    lines = {line.get_label(): line for line in loss.lines}
    assert set(lines) == {"seed 0 train", "seed 0 val", "seed 1 train", "seed 1 val"}
    assert list(lines["seed 0 val"].get_xdata()) == [1, 2, 3]
    assert list(lines["seed 0 val"].get_ydata()) == [3.5, 2.5, 1.5]
    assert list(lines["seed 1 train"].get_xdata()) == [1, 2]
    assert (lines["seed 0 train"].get_linestyle(), lines["seed 0 val"].get_linestyle()) == ("--", "-")
    assert (
        lines["seed 0 train"].get_color() == lines["seed 0 val"].get_color() == accuracy.lines[0].get_color()
    )
    assert lines["seed 0 val"].get_color() != lines["seed 1 val"].get_color()
    assert [line.get_label() for line in accuracy.lines] == ["seed 0 val"]
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["seed 0", "seed 1", "train", "val"]
    assert loss.get_xlim() == (0.5, 3.5)


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("train/loss", "loss"),
        ("val_top_5", "top 5"),
        ("test_loss", "loss"),
        ("learning_rate", "learning rate"),
        ("train_", "train "),
        ("training_loss", "training loss"),
    ],
)
def test_names_of_metrics(name, title):
    assert plot_learning_curves({"a": {name: [1.0]}}).axes[0].get_title() == title


def test_gaps():
    histories = {"a": {"loss": [1.0, None, 2.0, math.inf, 3.0, 4.0], "empty": [], "nothing": [NAN, NAN]}}
    loss, empty, nothing = plot_learning_curves(histories).axes
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), [1.0, NAN, 2.0, NAN, 3.0, 4.0])
    # A value between gaps is a point, which a line alone would not show.
    assert loss.lines[0].get_marker() == "o"
    assert len(empty.lines[0].get_ydata()) == 0
    assert np.isnan(nothing.lines[0].get_ydata()).all()
    [solid] = plot_learning_curves({"a": {"loss": [1.0, 2.0, None]}}).axes
    assert solid.lines[0].get_marker() == "None"
    pixels(loss.figure)


def test_a_single_epoch_is_a_point():
    [axes] = plot_learning_curves({"a": {"loss": [1.0]}}).axes
    assert axes.lines[0].get_marker() == "o"


def test_four_metrics_take_two_rows():
    figure = plot_learning_curves({"a": {name: [1.0, 2.0] for name in "abcd"}})
    assert [axes.get_subplotspec().rowspan.start for axes in figure.axes] == [0, 0, 0, 1]


@pytest.mark.parametrize("histories", [{}, {"seed 0": {}}])
def test_curves_refuse(histories):
    with pytest.raises(ValueError, match=r"histories must hold at least one run with one metric, got \{"):
        plot_learning_curves(histories)


def test_confusion_matrix():
    matrix = torch.tensor([[6, 2, 0], [0, 0, 0], [1, 0, 11]])
    figure = plot_confusion_matrix(matrix, labels=["a", "b", "c"])
    [axes] = panels(figure)
    [image] = axes.images
    # The colours are shares of the row; a class without samples is zero.
    np.testing.assert_allclose(image.get_array(), [[6 / 8, 2 / 8, 0], [0, 0, 0], [1 / 12, 0, 11 / 12]])
    assert image.get_clim() == (0, 1)
    numbers = {text.get_position(): text for text in axes.texts}
    assert {(row, column): int(text.get_text()) for (column, row), text in numbers.items()} == {
        (row, column): matrix[row, column].item() for row in range(3) for column in range(3)
    }
    assert (numbers[0, 0].get_color(), numbers[1, 0].get_color()) == ("black", "white")
    assert numbers[2, 0].get_alpha() < numbers[0, 0].get_alpha()
    assert axes.get_title() == "85.0 % of 20 right"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    assert [text.get_text() for text in axes.get_xticklabels()] == ["a", "b", "c"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b", "c"]


def test_large_counts_are_written_out():
    [axes] = panels(plot_confusion_matrix(torch.tensor([[12_345_678]])))
    assert axes.texts[0].get_text() == "12345678"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0"]


def test_long_labels_stand_upright():
    [axes] = panels(plot_confusion_matrix(torch.eye(2), labels=["a", "long name"]))
    assert {text.get_rotation() for text in axes.get_xticklabels()} == {90}


@pytest.mark.parametrize(("classes", "numbers"), [(40, 1600), (41, 0)])
def test_many_classes_have_no_numbers(classes, numbers):
    [axes] = panels(plot_confusion_matrix(torch.eye(classes)))
    assert len(axes.texts) == numbers


def test_an_empty_matrix_of_counts():
    [axes] = panels(plot_confusion_matrix(torch.zeros(3, 3)))
    assert axes.get_title() == "0.0 % of 0 right"


@pytest.mark.parametrize(
    ("matrix", "labels", "message"),
    [
        (torch.zeros(3), None, r"matrix must be a non-empty \(K, K\), got shape \(3,\)"),
        (torch.zeros(2, 3), None, r"matrix must be square \(K, K\), got shape \(2, 3\)"),
        (torch.tensor([[1, -2], [0, 3]]), None, "matrix must hold counts of zero or more, got -2"),
        (torch.tensor([[NAN]]), None, "matrix must hold counts of zero or more, got nan"),
        (torch.zeros(2, 2), ["a"], "labels must have 2 entries, got 1"),
    ],
)
def test_confusion_refuses(matrix, labels, message):
    with pytest.raises(ValueError, match=message):
        plot_confusion_matrix(matrix, labels=labels)


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: plot_attention(torch.rand(3, 5), path=path),
        lambda path: plot_attention_over_images(torch.rand(2, 8, 8), torch.rand(2, 4, 4), path=path),
        lambda path: plot_learning_curves({"a": {"loss": [1.0, 2.0]}}, path=path),
        lambda path: plot_confusion_matrix(torch.eye(3), path=path),
    ],
    ids=["attention", "images", "curves", "confusion"],
)
def test_a_picture_is_written(draw, tmp_path):
    figure = draw(tmp_path / "picture.png")
    data = (tmp_path / "picture.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert data.rstrip().endswith(b"IEND\xaeB`\x82")
    assert os.listdir(tmp_path) == ["picture.png"]
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    assert (width, height) == pytest.approx(tuple(figure.get_size_inches() * 150), abs=1)
    draw(None)
    assert os.listdir(tmp_path) == ["picture.png"]


def test_the_suffix_chooses_the_format(tmp_path):
    plot_confusion_matrix(torch.eye(3), path=tmp_path / "picture.svg")
    assert b"<svg" in (tmp_path / "picture.svg").read_bytes()
    plot_confusion_matrix(torch.eye(3), path=str(tmp_path / "bare"))
    assert (tmp_path / "bare").read_bytes().startswith(b"\x89PNG")


def test_an_earlier_picture_survives_a_failed_write(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def full(self, file, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    path = tmp_path / "picture.png"
    path.write_bytes(b"earlier")
    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space left"):
        plot_confusion_matrix(torch.eye(3), path=path)
    assert path.read_bytes() == b"earlier"
    assert os.listdir(tmp_path) == ["picture.png"]


def test_drawing_is_no_global_event():
    code = """
import sys, torch
import lamina.viz
assert "matplotlib" not in sys.modules
figure = lamina.viz.plot_confusion_matrix(torch.eye(3))
lamina.viz.plot_attention(torch.rand(3, 5), key_labels=list("abcde"))
lamina.viz.plot_attention_over_images(torch.rand(2, 8, 8), torch.rand(2, 4, 4))
lamina.viz.plot_learning_curves({"a": {"loss": [1.0, 2.0]}})
assert "matplotlib.pyplot" not in sys.modules
assert type(figure.canvas).__name__ == "FigureCanvasAgg"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (
        lambda: plot_attention(torch.rand(3, 5)),
        lambda: plot_attention_over_images(torch.rand(2, 8, 8), torch.rand(2, 4, 4)),
        lambda: plot_learning_curves({"a": {"loss": [1.0]}}),
        lambda: plot_confusion_matrix(torch.eye(3)),
    ):
        with pytest.raises(ImportError, match=r'pip install "lamina\[recipes\]"'):
            draw()
