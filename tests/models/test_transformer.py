"""The Transformer: the sizes of its table 3, torch.nn.Transformer with its weights, decoding, padding."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from lamina.blocks import Decoding, beam_search
from lamina.layers import LocalAttention, LowRankAttention, LSHAttention, SinusoidalPositions
from lamina.models import Transformer, TransformerConfig, create_model
from lamina.models.checkpoints.torch_transformer import load_state
from torch import nn

# Millions, as the paper's table 3 rounds them; what is said of each row is what differs from the base.
TABLE_3 = [
    ({}, 65),
    ({"num_heads": 1}, 65),
    ({"num_heads": 4}, 65),
    ({"num_heads": 16}, 65),
    ({"num_heads": 32}, 65),
    ({"head_dim": 16, "value_head_dim": 64}, 58),
    ({"head_dim": 32, "value_head_dim": 64}, 60),
    ({"encoder_depth": 2, "decoder_depth": 2}, 36),
    ({"encoder_depth": 4, "decoder_depth": 4}, 50),
    ({"encoder_depth": 8, "decoder_depth": 8}, 80),
    ({"dim": 256, "head_dim": 32}, 28),
    ({"dim": 1024, "head_dim": 128}, 168),
    ({"hidden_dim": 1024}, 53),
    ({"hidden_dim": 4096}, 90),
    ({"dropout": 0.0}, 65),
    ({"dropout": 0.2}, 65),
]
SMALL = TransformerConfig(
    vocab_size=13, dim=12, encoder_depth=2, decoder_depth=2, num_heads=3, hidden_dim=7, norm_eps=1e-5
)
SOURCE = torch.tensor([[5, 3, 9, 4, 2], [7, 12, 2, 0, 0], [6, 2, 0, 0, 0]])
TARGET = torch.tensor([[1, 4, 6, 3], [1, 8, 3, 5], [1, 9, 9, 10]])


def randomised(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_parameters_are_as_many_as_the_paper_s():
    base, big = (create_model(f"transformer_{n}", device="meta").num_parameters() for n in ("base", "big"))
    assert base == 63_045_632  # with 37,000 tokens; the paper's 65 million has some 40,000
    assert big == 214_171_648
    assert abs(base / 65e6 - 1) < 0.035
    assert abs(big / 213e6 - 1) < 0.035


@pytest.mark.parametrize(("changes", "millions"), TABLE_3, ids=str)
def test_every_row_of_table_3_differs_by_as_many(changes, millions):
    """The paper does not say how large the vocabulary is: with 41,000 tokens all rows come out."""
    base = TransformerConfig(vocab_size=41_000)
    ours, of_base = (Transformer(c, device="meta").num_parameters() for c in (replace(base, **changes), base))
    assert abs((ours - of_base) / 1e6 - (millions - 65)) <= 0.6
    assert abs(ours / 1e6 - millions) <= 0.6


def torch_s(config: TransformerConfig) -> nn.Transformer:
    """PyTorch's model of that size."""
    theirs = nn.Transformer(
        config.dim,
        config.num_heads,
        config.encoder_depth,
        config.decoder_depth,
        config.hidden_dim,
        batch_first=True,
        norm_first=config.norm_first,
        dtype=torch.float64,
    )
    return randomised(theirs)


@pytest.mark.parametrize("norm_first", [False, True])
def test_equals_torch_s_transformer(norm_first):
    """Outputs and gradients, on a padded batch; theirs has no embeddings, so ours stand around it."""
    config = replace(SMALL, bias=True, final_norm=True, norm_first=norm_first)
    theirs, ours = torch_s(config), randomised(Transformer(config, dtype=torch.float64))
    load_state(ours, theirs.state_dict())
    padding = SOURCE == 0
    table = ours.target_embedding.weight.detach().clone().requires_grad_()

    def embedded(ids):
        x = nn.functional.embedding(ids, table, padding_idx=0) * 12**0.5
        return x + SinusoidalPositions(12).table(ids.shape[1], dtype=torch.float64)

    hidden = theirs(
        embedded(SOURCE),
        embedded(TARGET),
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64),
        src_key_padding_mask=padding,
        memory_key_padding_mask=padding,
    )
    fixed = torch.arange(13) == 0  # padding's row takes no gradient, neither in nor out
    expected = hidden @ torch.where(fixed[:, None], table.detach(), table).T
    actual = ours(SOURCE, TARGET)
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(actual)
    (of_table,) = torch.autograd.grad(expected, table, cotangent, retain_graph=True)
    of_ours = torch.autograd.grad(
        actual,
        [ours.target_embedding.weight, ours.encoder.blocks[0].feed_forward.up.weight],
        cotangent,
    )
    (of_up,) = torch.autograd.grad(expected, theirs.encoder.layers[0].linear1.weight, cotangent)
    torch.testing.assert_close(of_ours, (of_table, of_up))


def test_a_model_of_other_sizes_is_refused():
    config = replace(SMALL, bias=True, final_norm=True)
    theirs = torch_s(config).state_dict()
    with pytest.raises(ValueError, match=r"unknown to us: encoder.norm.weight, encoder.norm.bias, decoder"):
        load_state(Transformer(replace(config, final_norm=False)), theirs)
    with pytest.raises(ValueError, match=r"missing in it: encoder.blocks.2.attention_norm.weight"):
        load_state(Transformer(replace(config, encoder_depth=3)), theirs)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
def test_a_packed_source_equals_a_padded_one(positions):
    """Logits, and the gradient of every parameter."""
    model = randomised(Transformer(replace(SMALL, positions=positions), dtype=torch.float64))
    expected, actual = model(SOURCE, TARGET), model(SOURCE, TARGET, packed=True)
    torch.testing.assert_close(actual, expected)
    memory, key_mask = model.encode(SOURCE, packed=True)
    assert memory[~key_mask].count_nonzero() == 0
    cotangent, of = torch.randn_like(expected), list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(actual, of, cotangent), torch.autograd.grad(expected, of, cotangent)
    )
    with pytest.raises(TypeError, match=r"LocalAttention.forward.* 'packing'"):
        Transformer(SMALL, attention=partial(LocalAttention, window=4)).encode(SOURCE, packed=True)


def test_padding_has_no_influence():
    model = randomised(Transformer(SMALL, dtype=torch.float64))
    longer = nn.functional.pad(SOURCE, (0, 3))
    torch.testing.assert_close(model(longer, TARGET), model(SOURCE, TARGET))
    alone = model(SOURCE[2:, :2], TARGET[2:])
    torch.testing.assert_close(model(SOURCE, TARGET)[2:], alone)


def test_later_targets_have_no_influence():
    model = randomised(Transformer(SMALL, dtype=torch.float64))
    other = TARGET.clone()
    other[:, 2:] = 11
    torch.testing.assert_close(model(SOURCE, other)[:, :2], model(SOURCE, TARGET)[:, :2])
    assert not torch.allclose(model(SOURCE, other)[:, 2:], model(SOURCE, TARGET)[:, 2:])


@pytest.mark.parametrize("changes", [{}, {"norm_first": True, "positions": "learned"}], ids=str)
def test_decoding_by_steps_equals_the_whole(changes):
    model = randomised(Transformer(replace(SMALL, **changes), dtype=torch.float64))
    memory, key_mask = model.encode(SOURCE)
    whole, cache = model.decode(TARGET, memory, key_mask), model.decoder.make_cache()
    steps = [model.decode(TARGET[:, t : t + 1], memory, key_mask, cache=cache) for t in range(4)]
    torch.testing.assert_close(torch.cat(steps, 1), whole)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("rows", [[2, 0], [0, 0, 1, 1, 2, 2], [1, 1, 1]])
def test_a_reordered_decoding_goes_on_with_other_rows(use_cache, rows):
    """Of the same source, and then of another."""
    model, beams = randomised(Transformer(SMALL, dtype=torch.float64)), torch.tensor([0, 0, 1, 1, 2, 2])
    decoding, rows = model.decoding(SOURCE, use_cache=use_cache), torch.tensor(rows)
    decoding(TARGET[:, :1])
    decoding.reorder(beams)
    decoding(TARGET[beams, 1:2] + torch.tensor([[0], [1]] * 3))  # two beams of each source
    decoding.reorder(torch.tensor([1, 0, 2, 2, 4, 5]))
    begun = torch.cat(
        [TARGET[beams, :1], TARGET[beams, 1:2] + torch.tensor([[1], [0], [0], [0], [0], [1]])], 1
    )
    decoding.reorder(rows)
    found = decoding(TARGET[beams[rows], 2:3])
    whole = model.decoding(SOURCE[beams[rows]], use_cache=False)
    torch.testing.assert_close(found, whole(torch.cat([begun[rows], TARGET[beams[rows], 2:3]], 1)))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generating_with_a_cache_equals_generating_without(num_beams):
    model = randomised(Transformer(SMALL, dtype=torch.float64))
    options = {"max_length": 9, "end_id": 2}
    prompt = torch.full((3, 1), 1)
    cached, plain = (
        beam_search(model.decoding(SOURCE, use_cache=use), prompt, num_beams=num_beams, **options)
        for use in (True, False)
    )
    assert torch.equal(cached.tokens, plain.tokens)
    torch.testing.assert_close(cached.scores, plain.scores)


def test_generation_writes_no_padding_and_no_start_and_keeps_the_paper_s_length():
    model = randomised(Transformer(SMALL))
    last = model.decoder.blocks[-1].feed_forward_norm
    with torch.no_grad():  # the decoder gives ones, of which the end is never likely
        last.weight.zero_()
        last.bias.fill_(1.0)
        model.target_embedding.weight[2] = -100
    found = model.generate(SOURCE, num_beams=2)
    assert found.lengths.tolist() == [[55, 55], [53, 53], [52, 52]]
    for b in range(3):
        length = int(found.lengths[b, 0])
        assert not torch.isin(found.best[b, :length], torch.tensor([0, 1])).any()
        assert (found.best[b, length:] == 0).all()


def test_learned_positions_bound_what_is_generated():
    model = randomised(Transformer(replace(SMALL, positions="learned", max_length=11)))
    assert model.generate(SOURCE, num_beams=1).tokens.shape[2] <= 11


def test_a_model_at_work_is_a_decoding():
    assert isinstance(Transformer(SMALL).decoding(SOURCE), Decoding)


@pytest.mark.parametrize(
    ("attention", "options"),
    [
        (LSHAttention, {"attention": "LSHAttention"}),
        (LocalAttention, {"attention": {"name": "LocalAttention", "options": {"window": 2}}}),
        (
            LowRankAttention,
            {
                "attention": {"name": "LowRankAttention", "options": {"max_length": 16, "rank": 4}},
                "decoder_attention": "MultiHeadAttention",
            },
        ),
    ],
    ids=["LSH", "local", "low rank"],
)
def test_any_attention_takes_its_place(attention, options):
    model = Transformer(replace(SMALL, **options)).eval()
    assert isinstance(model.encoder.blocks[0].attention, attention)
    logits = model(SOURCE, TARGET)
    assert logits.shape == (3, 4, 13)
    logits.sum().backward()
    assert model.generate(SOURCE, num_beams=2, max_length=3).tokens.shape[:2] == (3, 2)


def test_an_attention_of_one_s_own():
    made = []

    def mine(dim, num_heads, **options):
        made.append(dim)
        return LocalAttention(dim, num_heads, **options)

    assert Transformer(SMALL, attention=partial(mine))(SOURCE, TARGET).shape == (3, 4, 13)
    assert made == [12] * 4


@pytest.mark.parametrize(
    ("changes", "tables"),
    [({}, 1), ({"source_vocab_size": 17}, 2), ({"tie_output": False}, 1)],
    ids=str,
)
def test_tables_are_shared_as_configured(changes, tables):
    model = Transformer(replace(SMALL, **changes))
    weights = {id(p) for n, p in model.named_parameters() if n.endswith("embedding.weight")}
    assert len(weights) == tables
    assert (model.head is None) == ("tie_output" not in changes)
    assert model(SOURCE, TARGET).shape == (3, 4, 13)


def test_it_begins_with_tokens_of_deviation_one():
    torch.manual_seed(0)
    model = Transformer(replace(SMALL, vocab_size=5000, dim=96, num_heads=3))
    assert model.source_embedding(torch.arange(1, 5000)).std().item() == pytest.approx(1, abs=0.02)
    assert (model.encoder.blocks[0].feed_forward.up.bias == 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "rotary"}, "positions must be 'sinusoidal' or 'learned', got 'rotary'"),
        ({"activation": "swish"}, "activation must be one of gelu, gelu_tanh, relu, got 'swish'"),
        ({"end_id": 13}, "end_id must be from 0 to 12, got 13"),
        ({"end_id": 1}, "must differ, got 0, 1 and 1"),
    ],
)
def test_bad_configurations_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_bad_input_is_named():
    model = Transformer(replace(SMALL, positions="learned", max_length=4))
    with pytest.raises(ValueError, match="length must be at most max_length=4, got length=5"):
        model(SOURCE, TARGET)
    with pytest.raises(ValueError, match="ids must be integers"):
        model(SOURCE.float(), TARGET)
