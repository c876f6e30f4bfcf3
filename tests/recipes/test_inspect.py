"""`lamina show` and `lamina info`: what they tell is true, and it is printed."""

import platform
from io import StringIO

import pytest
import torch
from lamina import __version__
from lamina.kernels import operations
from lamina.models import list_models
from lamina.recipes import RecipeError, inspect
from rich.console import Console


def printed(function, *arguments, width: int = 200) -> str:
    text = StringIO()
    function(*arguments, Console(file=text, width=width))
    return text.getvalue()


def test_show_a_model_of_the_paper():
    text = printed(inspect.show_model, "vit_base_patch16_224")
    assert "vit_base_patch16_224  ViT  (1, 1000)  86,567,656 parameters" in text
    assert "12 × EncoderBlock  (1, 197, 768)  7,087,872 parameters each" in text
    assert "(1, 3, 224, 224)" in text
    N, L, C = 196, 197, 768
    products = N * C * C + 12 * (4 * L * C * C + 2 * L * L * C + 8 * L * C * C) + 1000 * C
    assert f"17.6 G ({products:,})" in text
    assert f"35.1 G ({2 * products:,}; one multiply-add is two)" in text


@pytest.mark.parametrize("name", list_models())
def test_every_model_can_be_shown(name):
    text = printed(inspect.show_model, name)
    assert text.splitlines()[0].startswith(name)
    for heading in ("input", "parameters", "multiply-adds", "FLOPs"):
        assert f"\n{heading}" in text


def test_showing_a_model_computes_and_draws_nothing():
    state = torch.get_rng_state()
    printed(inspect.show_model, "vit_huge_patch14_224")
    assert torch.equal(torch.get_rng_state(), state)


def test_show_a_recipe(monkeypatch):
    recipe = inspect.get_recipe("vit_digits")
    monkeypatch.setattr(inspect, "list_recipes", lambda: ["how_digits"])
    monkeypatch.setattr(inspect, "get_recipe", {"how_digits": recipe}.__getitem__)
    shown, of_the_model = (
        printed(inspect.show_model, name).splitlines() for name in ("how_digits", recipe.model)
    )
    assert shown[0] == of_the_model[0].replace(recipe.model, "how_digits")
    assert shown[1:] == of_the_model[1:]


def test_a_narrow_terminal_loses_nothing():
    text = printed(inspect.show_model, "vit_digits", width=30)
    assert "multiply-adds" in text


@pytest.mark.parametrize(("name", "near"), [("vit_digit", "vit_digits"), ("lstm_digts", "lstm_digits")])
def test_an_unknown_name_tells_the_near_ones(name, near):
    with pytest.raises(ValueError, match=f"^no model or recipe '{name}'; did you mean .*{near}"):
        printed(inspect.show_model, name)


def test_a_far_name_tells_all():
    with pytest.raises(ValueError, match=r"^no model or recipe '!'; there are: .*lstm_digits, .*vit_digits"):
        printed(inspect.show_model, "!")


def test_versions(monkeypatch):
    monkeypatch.setattr(inspect, "LIBRARIES", ("einops", "no-such-library"))
    found = dict(inspect.versions())
    assert list(found) == ["lamina", "python", "torch", "einops", "no-such-library"]
    assert found["lamina"] == __version__
    assert found["python"].startswith(platform.python_version())
    assert found["torch"] == torch.__version__
    assert found["einops"][0].isdigit()
    assert found["no-such-library"] == "not installed"


def test_devices_without_an_accelerator(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    found = dict(inspect.devices())
    assert f"{torch.get_num_threads()} threads" in found["cpu"]
    assert found["cuda"] == ("no device" if torch.version.cuda else "PyTorch is built without it")


def test_devices_with_two(monkeypatch):
    class Card:
        name, major, minor, total_memory = "Card", 9, 0, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Card)
    found = dict(inspect.devices())
    assert found["cuda:0"] == found["cuda:1"] == "Card, capability 9.0, 80 GiB"
    assert "cuda" not in found


def test_every_operation_has_its_typical_call():
    assert set(inspect.TYPICAL_CALLS) == set(operations())


def test_kernel_paths_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    paths = {path.operation: path for path in inspect.kernel_paths()}
    assert set(paths) == set(operations())
    for path in paths.values():
        assert path.device == "cpu"
        assert path.refusals["triton"]
        assert path.chosen not in path.refusals
    assert paths["dot_product_attention"].chosen == "torch"
    assert paths["additive_scores"].chosen == "reference"


def test_info_prints_it_all():
    text = printed(inspect.info, width=300)
    for words in ("Versions", "Devices", "Kernels", __version__, torch.__version__, *operations()):
        assert words in text
    for path in inspect.kernel_paths():
        assert all(reason in text for reason in path.refusals.values())
    assert "runs" in text


def test_a_library_that_is_missing_is_said_to_be(monkeypatch):
    monkeypatch.setattr(inspect, "LIBRARIES", ("no-such-library",))
    assert "no-such-library  not installed" in printed(inspect.info)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1 k"), (1_234_567, "1.23 M"), (35_000_000_000, "35 G"), (10**12, "1 T")],
)
def test_short_numbers(count, text):
    assert inspect._short(count) == text


def test_an_unknown_name_is_one_line_on_the_command_line():
    with pytest.raises(RecipeError):
        printed(inspect.show_model, "vit_digit")
