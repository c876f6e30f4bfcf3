"""Reformer: transformers' model with its weights and buckets, memory that depth does not grow, any length."""

import itertools
from dataclasses import replace

import pytest
import torch
from lamina.blocks import Decoding, beam_search, greedy_search
from lamina.layers import LocalAttention, LSHAttention, MultiHeadAttention
from lamina.models import Reformer, ReformerConfig, create_model
from lamina.models.checkpoints.reformer import config_of, load_state
from torch import nn

SMALL = ReformerConfig(
    vocab_size=13,
    dim=12,
    depth=2,
    layers=("local", "lsh"),
    num_heads=2,
    head_dim=5,
    hidden_dim=7,
    axial_shape=(4, 6),
    axial_dims=(5, 7),
    chunk_size=4,
    num_hashes=3,
    num_buckets=(2, 4),
    dropout=0.0,
)
IDS = torch.randint(13, (2, 24), generator=torch.Generator().manual_seed(1))


def randomised(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture
def theirs():
    transformers = pytest.importorskip("transformers")
    config = transformers.ReformerConfig(
        vocab_size=13,
        hidden_size=12,
        attn_layers=["local", "lsh"],
        num_attention_heads=2,
        attention_head_size=5,
        feed_forward_size=7,
        axial_pos_shape=[4, 6],
        axial_pos_embds_dim=[5, 7],
        lsh_attn_chunk_length=4,
        local_attn_chunk_length=4,
        num_hashes=3,
        num_buckets=[2, 4],
        is_decoder=True,
        hash_seed=7,
        hidden_dropout_prob=0.0,
        lsh_attention_probs_dropout_prob=0.0,
        local_attention_probs_dropout_prob=0.0,
    )
    model = randomised(transformers.ReformerModelWithLMHead(config).double())
    nn.init.zeros_(model.lm_head.bias)  # which their version 5 holds, and never adds
    return model


@pytest.fixture
def their_rotations(monkeypatch):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        rotations = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    monkeypatch.setattr("lamina.layers.lsh_attention.seeded_normals", lambda seed, shape: rotations)


def test_equals_transformers(theirs, their_rotations):
    """Logits, and the gradient of every parameter through both reversible stacks."""
    ours = Reformer(config_of(theirs.config.to_dict()), dtype=torch.float64)
    assert replace(ours.config, circular=False) == replace(SMALL, norm_eps=1e-12, max_length=4096)
    load_state(ours, theirs.state_dict())
    expected, actual = theirs.train()(IDS).logits, ours.train()(IDS)
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(actual)
    expected.backward(cotangent)  # autograd.grad does not see what their reversible layers accumulate
    found = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    found["lm_head.bias"] = cotangent.sum((0, 1))
    gradients = Reformer(ours.config, dtype=torch.float64)
    load_state(gradients, found)
    of_ours = torch.autograd.grad(actual, list(ours.parameters()), cotangent)
    for (name, wanted), got in zip(gradients.named_parameters(), of_ours, strict=True):
        torch.testing.assert_close(got, wanted, msg=lambda text, name=name: f"{name}: {text}")


def test_a_folder_loads(theirs, their_rotations, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours = Reformer.from_published(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(ours(IDS), theirs.eval()(IDS).logits)
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        Reformer.from_published(tmp_path / "nothing")


def test_other_models_are_refused(theirs):
    config = theirs.config.to_dict()
    for changes, message in (
        ({"model_type": "bert"}, "model_type must be 'reformer', got 'bert'"),
        ({"local_attn_chunk_length": 8}, "must be one number, got 4 and 8"),
        ({"hidden_act": "mish"}, "hidden_act must be one of relu, gelu, gelu_new, got 'mish'"),
    ):
        with pytest.raises(ValueError, match=message):
            config_of(config | changes)


@pytest.mark.parametrize("training", [True, False])
def test_reversible_equals_the_plain_stack(training):
    torch.manual_seed(3)
    plain = randomised(Reformer(replace(SMALL, reversible=False), dtype=torch.float64)).train(training)
    reversible = Reformer(SMALL, dtype=torch.float64).train(training)
    reversible.load_state_dict(plain.state_dict())
    expected, actual = plain(IDS), reversible(IDS)
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(actual)
    torch.testing.assert_close(
        torch.autograd.grad(actual, list(reversible.parameters()), cotangent),
        torch.autograd.grad(expected, list(plain.parameters()), cotangent),
    )


@pytest.mark.parametrize("streams", ["concatenate", "mean"])
def test_rotations_that_are_redrawn_are_the_same_when_computed_again(streams):
    """Else a reversible stack would have the gradients of another hashing."""
    torch.manual_seed(3)
    config = replace(SMALL, redraw=True, dropout=0.3, streams=streams)
    plain = randomised(Reformer(replace(config, reversible=False), dtype=torch.float64)).train()
    reversible = Reformer(config, dtype=torch.float64).train()
    reversible.load_state_dict(plain.state_dict())
    outputs, gradients = [], []
    cotangent = torch.randn(2, 24, 13, dtype=torch.float64)
    for model in plain, reversible:
        torch.manual_seed(4)
        outputs.append(model(IDS))
        gradients.append(torch.autograd.grad(outputs[-1], list(model.parameters()), cotangent))
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)
    assert not torch.allclose(plain(IDS), outputs[0])
    assert torch.equal(plain.eval()(IDS), plain(IDS))


def test_the_mean_of_the_streams_is_half_as_wide():
    model = randomised(Reformer(replace(SMALL, streams="mean"), dtype=torch.float64)).eval()
    assert model.head.weight.shape == (13, 12)
    x = model.positions(model.embedding(IDS))
    y1, y2 = model.blocks(x, is_causal=True)
    torch.testing.assert_close(model(IDS), model.head(model.norm((y1 + y2) / 2)))


def test_a_chunked_feed_forward_equals_the_whole():
    plain = randomised(Reformer(SMALL, dtype=torch.float64))
    chunked = Reformer(replace(SMALL, chunk_feed_forward=5), dtype=torch.float64)
    chunked.load_state_dict(plain.state_dict())
    torch.testing.assert_close(chunked(IDS), plain(IDS))


@pytest.mark.parametrize("length", [1, 3, 4, 17, 24])
@pytest.mark.parametrize("is_causal", [True, False])
def test_any_length_is_taken(length, is_causal):
    model = randomised(Reformer(replace(SMALL, is_causal=is_causal), dtype=torch.float64))
    logits = model(IDS[:, :length])
    assert logits.shape == (2, length, 13)
    assert logits.isfinite().all()


def test_padding_has_no_influence():
    """Where the number of buckets does not follow the length."""
    model = randomised(Reformer(SMALL, dtype=torch.float64)).eval()
    key_mask = torch.arange(24) < 17
    alone = model(IDS[:, :17])
    torch.testing.assert_close(model(IDS, key_mask=key_mask.expand(2, -1))[:, :17], alone)


def test_a_causal_model_sees_no_later_token():
    """With one chunk, in which hashing decides nothing."""
    model = randomised(Reformer(replace(SMALL, chunk_size=24), dtype=torch.float64)).eval()
    other = IDS.clone()
    other[:, 15:] = 5
    torch.testing.assert_close(model(other)[:, :15], model(IDS)[:, :15])
    both = Reformer(replace(SMALL, chunk_size=24, is_causal=False), dtype=torch.float64).eval()
    both.load_state_dict(model.state_dict())
    assert not torch.allclose(both(other)[:, :15], both(IDS)[:, :15])


def test_one_chunk_of_unit_keys_is_full_attention_whatever_the_hashes():
    one, many = (
        Reformer(replace(SMALL, layers=("lsh",), chunk_size=24, num_hashes=n), dtype=torch.float64).eval()
        for n in (1, 3)
    )
    many.load_state_dict(randomised(one).state_dict())
    torch.testing.assert_close(many(IDS), one(IDS))


def test_layers_alternate_as_configured():
    config = replace(SMALL, depth=5, layers=("local", "local", "lsh"), scaling="root", hash_seed=3)
    kinds = [block.first.layer for block in Reformer(config, device="meta").blocks.blocks]
    assert [type(k) for k in kinds] == [
        LocalAttention,
        LocalAttention,
        LSHAttention,
        LocalAttention,
        LocalAttention,
    ]
    assert kinds[2].scale == 5**-0.5
    assert kinds[2].seed == 5
    assert Reformer(SMALL, device="meta").blocks.blocks[1].first.layer.scale == 1.0


def test_any_attention_takes_its_place():
    for model in (
        Reformer(SMALL, attention=MultiHeadAttention),
        Reformer(replace(SMALL, attention="MultiHeadAttention")),
    ):
        assert isinstance(model.blocks.blocks[1].first.layer, MultiHeadAttention)
        assert model(IDS).shape == (2, 24, 13)


@pytest.mark.parametrize("layers", [("lsh",), ("local", "lsh"), ("lsh", "local")], ids=str)
def test_it_writes_what_the_whole_pass_would(layers):
    model = randomised(Reformer(replace(SMALL, layers=layers), dtype=torch.float64)).eval()
    assert isinstance(model.decoding(), Decoding)
    assert (model.decoding().cache is not None) == (layers == ("local", "lsh"))
    options = {"max_length": 9, "end_id": 2}
    found = greedy_search(model.decoding(), IDS[:, :5], **options)
    tokens = IDS[:, :5]
    for _ in range(9):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    for b in range(2):
        length = int(found.lengths[b])
        assert torch.equal(found.best[b, :length], tokens[b, 5 : 5 + length])
    assert beam_search(model.decoding(), IDS[:, :5], num_beams=2, **options).tokens.shape[:2] == (2, 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": ("local", "local", "lsh"), "depth": 3},
        {"layers": ("local", "lsh"), "circular": True, "look_ahead": 1},
        {"layers": ("local",), "axial_shape": None, "max_length": 24},
        {"layers": ("lsh",), "depth": 1, "num_buckets": None},
        {"attention": "MultiHeadAttention"},
    ],
    ids=str,
)
def test_with_a_cache_logits_are_those_of_the_whole_pass(changes):
    torch.manual_seed(0)
    model = randomised(Reformer(replace(SMALL, **changes), dtype=torch.float64)).eval()
    cached, uncached = model.decoding(use_cache=True), model.decoding(use_cache=False)
    for start, stop in itertools.pairwise([0, 7, 8, 9, 12, *range(13, 25)]):
        step = IDS[:, start:stop]
        expected = model(IDS[:, :stop])[:, -1]
        torch.testing.assert_close(cached(step), expected)
        torch.testing.assert_close(uncached(step), expected)
    beams = {"num_beams": 3, "max_length": 5, "end_id": 2}
    found, expected = (
        beam_search(model.decoding(use_cache=use_cache), IDS[:, :7], **beams) for use_cache in (True, False)
    )
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.scores, expected.scores)


class Forgetful(MultiHeadAttention):
    def forward(self, query, *, key_mask=None, is_causal=False):
        return super().forward(query, key_mask=key_mask, is_causal=is_causal)


def test_a_cache_is_refused_where_it_would_give_other_logits():
    for changes, attention, message in (
        (
            {"layers": ("lsh", "local")},
            None,
            "use_cache must be False: hashed attention sorts.*block 0 gives",
        ),
        ({"layers": ("local", "lsh", "lsh"), "depth": 3}, None, "block 1 gives"),
        ({}, Forgetful, "use_cache must be False: Forgetful keeps nothing"),
    ):
        model = Reformer(replace(SMALL, **changes), attention=attention)
        assert model.decoding().cache is None
        with pytest.raises(ValueError, match=message):
            model.decoding(use_cache=True)
    with pytest.raises(ValueError, match="is_causal must be set"):
        Reformer(replace(SMALL, is_causal=False)).decoding()


def test_it_generates_greedily_and_with_beams():
    model = randomised(Reformer(replace(SMALL, chunk_size=24), dtype=torch.float64)).eval()
    options = {"max_length": 6, "end_id": 2, "padding_id": 1}
    greedy = greedy_search(model.decoding(), IDS[:, :5], **options)
    assert torch.equal(model.generate(IDS[:, :5], **options).tokens, greedy.tokens)
    beams = {"num_beams": 3, "length_penalty": 0.5}
    wanted = beam_search(model.decoding(), IDS[:, :5], **beams, **options)
    found = model.generate(IDS[:, :5], **beams, **options)
    assert torch.equal(found.tokens, wanted.tokens)
    torch.testing.assert_close(found.scores, wanted.scores)


@pytest.mark.parametrize("positions", [{}, {"axial_shape": None, "max_length": 24}])
def test_without_an_end_it_writes_as_far_as_there_are_positions(positions):
    model = randomised(Reformer(replace(SMALL, **positions))).eval()
    found = model.generate(IDS[:, :20])
    assert found.tokens.shape == (2, 1, 4)
    assert (found.lengths == 4).all()
    assert model.generate(IDS).tokens.shape == (2, 1, 0)
    with pytest.raises(ValueError, match="is_causal must be set"):
        Reformer(replace(SMALL, is_causal=False)).generate(IDS)


def test_positions_are_as_many_as_the_paper_s():
    model = create_model("reformer_enwik8", device="meta")
    assert sum(p.numel() for p in model.positions.parameters()) == 128 * 256 + 512 * 512
    wide = create_model("reformer_enwik8", dim=1024, axial_dims=(256, 768), device="meta")
    assert sum(p.numel() for p in wide.positions.parameters()) == 425_984


def kept_bytes(depth: int) -> int:
    """What is saved for the backward pass."""
    held = {}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model = Reformer(replace(SMALL, depth=depth, dim=48, axial_dims=(24, 24), hidden_dim=96))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(IDS.repeat(8, 1))
    return sum(size for at, size in held.items() if at not in weights)


def test_what_is_kept_does_not_grow_with_depth():
    assert kept_bytes(12) <= 1.2 * kept_bytes(3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ()}, "layers must be 'lsh' and 'local', one at the least"),
        ({"layers": ("full",)}, r"got \('full',\)"),
        ({"scaling": "paper"}, "scaling must be 'unit' or 'root', got 'paper'"),
        ({"streams": "sum"}, "streams must be 'concatenate' or 'mean', got 'sum'"),
        ({"activation": "swish"}, "activation must be one of"),
    ],
)
def test_bad_configurations_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_a_saved_configuration_has_its_tuples():
    config = ReformerConfig(layers=["lsh"], axial_shape=[2, 3], axial_dims=None, num_buckets=[2, 4])
    assert (config.layers, config.axial_shape, config.num_buckets) == (("lsh",), (2, 3), (2, 4))
