"""Settings: their ranges, and their changes on the command line."""

from dataclasses import dataclass

import pytest
from lamina.recipes import ImageSettings, RecipeError, Settings, override
from lamina.recipes.settings import changed

BASE = ImageSettings(epochs=7, learning_rate=0.5)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("epochs=3", "epochs", 3),
        ("learning_rate=1e-3", "learning_rate", 0.001),
        ("learning_rate=2", "learning_rate", 2.0),
        (" shift = 1 ", "shift", 1),
    ],
)
def test_a_setting_is_changed_with_its_type(text, name, value):
    settings, model = override(BASE, [text])
    assert getattr(settings, name) == value
    assert type(getattr(settings, name)) is type(getattr(BASE, name))
    assert model == {}
    assert changed(settings, BASE) == {name: value}


def test_settings_of_other_types():
    @dataclass(frozen=True, kw_only=True)
    class Other(Settings):
        loss: str = "l1"
        paired: bool = True

    settings, _ = override(Other(epochs=1, learning_rate=1.0), ["loss=1", "paired=false"])
    assert (settings.loss, settings.paired) == ("1", False)


def test_what_begins_with_model_goes_to_the_model():
    settings, model = override(
        BASE, ["model.depth=4", "model.cell=gru", "model.bidirectional=True", "model.x=none"]
    )
    assert settings == BASE
    assert model == {"depth": 4, "cell": "gru", "bidirectional": True, "x": None}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("epochs", "key=value, got 'epochs'"),
        ("=3", "key=value, got '=3'"),
        ("epochs=", "key=value"),
        ("epoch=3", "no setting 'epoch'; did you mean epochs?"),
        ("qqq=3", "settings: batch_size, epochs, "),
        ("epochs=many", "'epochs' must be of type int, got 'many'"),
        ("epochs=2.5", "'epochs' must be of type int, got '2.5'"),
        ("epochs=true", "'epochs' must be of type int"),
        ("learning_rate=fast", "'learning_rate' must be of type float"),
        ("epochs=0", "epochs must be at least 1, got 0"),
        ("batch_size=-1", "batch_size must be at least 1, got -1"),
        ("learning_rate=0", "learning_rate must be above 0, got 0"),
        ("weight_decay=-0.1", "weight_decay must not be negative, got -0.1"),
        ("threads=-1", "threads must not be negative, got -1"),
        ("label_smoothing=1", r"label_smoothing must lie in \[0, 1\), got 1"),
        ("shift=-1", "shift must not be negative, got -1"),
    ],
)
def test_what_is_wrong_is_named(text, match):
    with pytest.raises(RecipeError, match=match):
        override(BASE, [text])


def test_what_is_not_asked_for_does_nothing():
    plain = ImageSettings(epochs=1, learning_rate=1.0)
    optional = ("weight_decay", "warmup_epochs", "label_smoothing", "gradient_clip", "threads", "shift")
    assert [getattr(plain, name) for name in optional] == [0] * len(optional)
