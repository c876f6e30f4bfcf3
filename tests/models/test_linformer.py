"""Linformer: how many projections there are, BERT where they are the identity, padding."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from lamina.layers import LocalAttention, MultiHeadAttention
from lamina.models import Bert, BertConfig, Linformer, LinformerConfig, create_model
from torch import nn

SMALL = LinformerConfig(
    vocab_size=23, padding_id=0, max_length=8, dim=12, depth=2, num_heads=3, hidden_dim=7, rank=5
)
IDS = torch.tensor([[5, 3, 9, 4, 2], [7, 12, 2, 0, 0], [6, 2, 0, 0, 0]])


def randomised(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize(
    ("share", "projections"), [("none", 288), ("heads", 24), ("key_value", 12), ("layers", 1)]
)
def test_there_are_as_many_projections_as_the_paper_counts(share, projections):
    """12 layers of 12 heads, each with an E and an F of 512 x 128: 288, 24, 12 and 1 of them."""
    model = create_model("linformer_base", share=share, device="meta")
    weights = {id(p): p.numel() for n, p in model.named_parameters() if "_projection." in n}
    assert sum(weights.values()) == projections * 512 * 128


def test_a_rank_for_each_layer():
    model = Linformer(replace(SMALL, rank=(3, 6)))
    ranks = [
        block.attention.key_projection(torch.randn(1, 1, 8, 4)).shape[2]
        for block in model.bert.encoder.blocks
    ]
    assert ranks == [3, 6]


@pytest.mark.parametrize("share", ["none", "heads", "key_value", "layers"])
def test_full_rank_and_the_identity_is_bert(share):
    ours = randomised(Linformer(replace(SMALL, share=share, rank=8), dtype=torch.float64))
    for name, parameter in ours.named_parameters():
        if "_projection." in name:
            with torch.no_grad():
                parameter.copy_(torch.eye(8, dtype=torch.float64).expand_as(parameter))
    body = BertConfig(
        vocab_size=23, max_length=8, num_segments=0, dim=12, depth=2, num_heads=3, hidden_dim=7, norm_eps=1e-5
    )
    bert = Bert(body, pooler=False, dtype=torch.float64).eval()
    state = {n: t for n, t in ours.bert.state_dict().items() if "_projection" not in n}
    bert.load_state_dict(state)
    whole = torch.randint(1, 23, (2, 8))
    torch.testing.assert_close(ours.bert(whole), bert(whole))


@pytest.mark.parametrize("projection", ["linear", "mean", "max", "conv"])
def test_padding_has_no_influence(projection):
    model = randomised(Linformer(replace(SMALL, projection=projection, rank=4), dtype=torch.float64))
    padded = model(nn.functional.pad(IDS, (0, 3)))
    for b, length in enumerate((5, 3, 2)):
        torch.testing.assert_close(padded[b, :length], model(IDS[b : b + 1, :length])[0])


def attentions(model: Linformer) -> list[nn.Module]:
    return [block.attention for block in model.bert.encoder.blocks]


@pytest.mark.parametrize("share", ["heads", "layers"])
def test_with_full_attention_it_is_bert_with_a_head(share):
    ours = randomised(
        Linformer(replace(SMALL, share=share, attention="MultiHeadAttention"), dtype=torch.float64)
    )
    assert not [name for name, _ in ours.named_parameters() if "_projection" in name]
    body = BertConfig(
        vocab_size=23, max_length=8, num_segments=0, dim=12, depth=2, num_heads=3, hidden_dim=7, norm_eps=1e-5
    )
    bert = Bert(body, pooler=False, dtype=torch.float64).eval()
    bert.load_state_dict(ours.bert.state_dict())
    expected = ours.head(bert(IDS), bert.embedding.weight)
    torch.testing.assert_close(ours(IDS), expected)


def test_another_attention_is_named_made_or_described(tmp_path):
    options = {"max_length": 8, "rank": 3, "share": "none"}
    described = Linformer(
        replace(SMALL, attention={"name": "LowRankAttention", "options": options}, attention_dropout=0.3)
    )
    assert [(a.key_projection.rank, a.key_projection.heads) for a in attentions(described)] == [(3, 3)] * 2
    assert [a.dropout for a in attentions(described)] == [0.0] * 2  # another layer brings its own
    assert [a.dropout for a in attentions(Linformer(replace(SMALL, attention_dropout=0.3)))] == [0.3] * 2
    full = create_model("linformer_small", attention=MultiHeadAttention, attention_dropout=0.3)
    assert [(type(a), a.dropout) for a in attentions(full)] == [(MultiHeadAttention, 0.3)] * 2
    local = Linformer(SMALL, attention=partial(LocalAttention, window=2)).eval()
    assert {type(a) for a in attentions(local)} == {LocalAttention}
    made = create_model("linformer_small", attention=partial(LocalAttention, window=2)).eval()
    made.save_pretrained(tmp_path)
    loaded = Linformer.from_pretrained(tmp_path).eval()
    assert [a.window for a in attentions(loaded)] == [2, 2]
    assert torch.equal(loaded(IDS), made(IDS))


def test_places_are_scored_as_the_whole_is():
    model = randomised(Linformer(SMALL, dtype=torch.float64))
    places = torch.tensor([[1, 3], [0, 2], [1, 0]])
    whole = model(IDS)
    assert whole.shape == (3, 5, 23)
    torch.testing.assert_close(
        model(IDS, places=places), whole.gather(1, places.unsqueeze(2).expand(-1, -1, 23))
    )


def test_it_starts_with_the_deviation_that_is_asked_for():
    for std in (0.02, 0.3):
        model = Linformer(replace(SMALL, vocab_size=5000, std=std))
        table = model.bert.embedding.weight
        assert table.abs().max() <= 2 * std
        assert table.std().item() == pytest.approx(0.88 * std, rel=0.02)  # cut at two deviations
        query = model.bert.encoder.blocks[0].attention.query.weight
        assert query.abs().max() > std


def test_it_has_no_pooler():
    model = Linformer(SMALL)
    with pytest.raises(ValueError, match="pooler must be True for a model that pools"):
        model.bert.pool(torch.zeros(1, 2, 12))


def test_it_saves_and_loads_what_is_shared(tmp_path):
    model = randomised(Linformer(replace(SMALL, share="layers")))
    model.save_pretrained(tmp_path)
    loaded = Linformer.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(IDS), model(IDS))
    first, second = (block.attention for block in loaded.bert.encoder.blocks)
    assert first.key_projection is second.value_projection
    ranks = Linformer(replace(SMALL, rank=(3, 6)))
    ranks.save_pretrained(tmp_path / "ranks")
    assert Linformer.from_pretrained(tmp_path / "ranks").config.rank == (3, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": "all"}, "share must be none, heads, key_value or layers, got 'all'"),
        ({"std": 0.0}, "std must be above 0, got 0.0"),
        ({"rank": (3, 4, 5)}, r"rank must be one number or 2, one a layer, got \(3, 4, 5\)"),
        ({"rank": (3, 4), "share": "layers"}, "rank must be one number where all layers share"),
    ],
)
def test_bad_configurations_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)
