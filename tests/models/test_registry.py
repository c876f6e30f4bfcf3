"""Models by name, and the folders that they save to and load from."""

import dataclasses
import json
from functools import partial

import pytest
import torch
from contracts.case import tensors
from lamina.layers import AdditiveAttention, MultiHeadAttention
from lamina.models import (
    RecurrentClassifier,
    ViT,
    ViTConfig,
    create_model,
    list_models,
    model_config,
)
from lamina.models.parts import describe_part, find_part
from lamina.models.registry import register_presets
from torch import nn


def randomised(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_lists_by_pattern_in_order():
    assert list_models("*_digits") == ["lstm_digits", "vit_digits"]
    assert list_models("vit_base_patch*224") == ["vit_base_patch16_224", "vit_base_patch32_224"]
    assert list_models() == sorted(list_models())
    assert list_models("nothing*") == []


@pytest.mark.parametrize("name", list_models())
def test_every_preset_makes_its_model_without_memory(name):
    model = create_model(name, device="meta")
    assert model.config == model_config(name)
    inputs = model.example_inputs(2, device="meta")
    first, *others = tensors(model(*inputs))
    assert all(output.is_meta and len(output) == 2 for output in (first, *others))
    if hasattr(model.config, "num_classes"):
        assert first.shape == (2, model.config.num_classes)
    elif hasattr(model.config, "vocab_size"):  # a vector for each token, or scores of all
        assert first.shape[:-1] == inputs[-1].shape
        assert first.shape[-1] in (model.config.dim, model.config.vocab_size)


def test_overrides_replace_fields():
    model = create_model("vit_digits", num_classes=3, dim=16, dtype=torch.float64)
    assert model.config == dataclasses.replace(model_config("vit_digits"), num_classes=3, dim=16)
    assert model(torch.randn(2, 1, 8, 8).double()).shape == (2, 3)


def test_unknown_names_are_answered_with_near_ones():
    with pytest.raises(ValueError, match=r"no model 'vit_digit'; did you mean vit_digits"):
        create_model("vit_digit")
    with pytest.raises(
        ValueError, match=r"no setting 'num_class'; did you mean num_classes.*its settings are"
    ):
        create_model("vit_digits", num_class=3)
    with pytest.raises(ValueError, match="named 'vit_digits' is registered already"):
        register_presets(ViT, {"vit_digits": ViTConfig()})


@pytest.mark.parametrize("name", ["vit_digits", "lstm_digits"])
def test_a_folder_brings_the_model_back(name, tmp_path, capsys):
    model = randomised(create_model(name))
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = type(model).from_pretrained(tmp_path / "new" / "folder").eval()
    assert loaded.config == model.config
    inputs = model.example_inputs(3)
    assert torch.equal(loaded(*inputs), model(*inputs))
    assert {f.name for f in (tmp_path / "new" / "folder").iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    assert capsys.readouterr().out == ""


def test_tuples_survive_json(tmp_path):
    model = create_model("vit_digits", image_size=(8, 4), patch_size=(4, 2))
    model.save_pretrained(tmp_path)
    assert ViT.from_pretrained(tmp_path).config == model.config


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    model = randomised(create_model("lstm_digits"))
    model.save_pretrained(tmp_path / "model")
    before = {f.name: f.read_bytes() for f in (tmp_path / "model").iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecurrentClassifier, "_save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        randomised(model).save_pretrained(tmp_path / "model")
    assert {f.name: f.read_bytes() for f in (tmp_path / "model").iterdir()} == before
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


def test_missing_damaged_and_foreign_weights_are_named(tmp_path):
    model = create_model("lstm_digits")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        RecurrentClassifier.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "away").read_bytes()[:100])
    with pytest.raises(Exception, match=r"(?i)header"):
        RecurrentClassifier.from_pretrained(tmp_path)
    (tmp_path / "away").rename(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_layers": 2}))
    with pytest.raises(RuntimeError, match="Missing key"):
        RecurrentClassifier.from_pretrained(tmp_path)


def additive(dim: int, num_heads: int, **factory) -> nn.Module:
    return AdditiveAttention(dim, dim, 5, **factory)


def test_lamina_s_own_attention_is_saved_with_its_options(tmp_path):
    grouped = partial(MultiHeadAttention, num_kv_heads=2, bias=False)
    model = randomised(create_model("vit_digits", attention=grouped))
    assert model.encoder.blocks[0].attention.num_kv_heads == 2
    model.save_pretrained(tmp_path)
    loaded = ViT.from_pretrained(tmp_path).eval()
    (images,) = model.example_inputs()
    assert torch.equal(loaded(images), model(images))


def test_an_attention_of_the_user_s_own_has_to_be_given_again(tmp_path):
    model = randomised(create_model("vit_digits", attention=additive))
    assert isinstance(model.encoder.blocks[0].attention, AdditiveAttention)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no part 'additive'.*from_pretrained\(folder, attention=…\)"):
        ViT.from_pretrained(tmp_path)
    loaded = ViT.from_pretrained(tmp_path, attention=additive).eval()
    (images,) = model.example_inputs()
    assert torch.equal(loaded(images), model(images))


def test_parts_are_described_as_plain_data():
    assert describe_part(MultiHeadAttention) == "MultiHeadAttention"
    assert describe_part(partial(MultiHeadAttention, bias=False)) == {
        "name": "MultiHeadAttention",
        "options": {"bias": False},
    }
    assert describe_part(partial(MultiHeadAttention, qk_norm=nn.RMSNorm)) is None
    assert describe_part(additive) is None
    assert find_part("MultiHeadAttention") is MultiHeadAttention
    assert find_part({"name": "MultiHeadAttention", "options": {"bias": False}}).keywords == {"bias": False}
    with pytest.raises(ValueError, match="no part 'causal_mask'"):
        find_part("causal_mask")


def test_counts_shared_parameters_once_and_trainable_ones_alone():
    model = create_model("lstm_digits")
    total = model.num_parameters()
    assert total == sum(p.numel() for p in model.parameters())
    model.head.weight.requires_grad_(False)
    assert model.num_parameters(trainable_only=True) == total - model.head.weight.numel()
