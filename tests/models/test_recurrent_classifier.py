"""The recurrent classifier: PyTorch's LSTM and a linear layer with the same weights, and its padding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.models import RecurrentClassifier, RecurrentClassifierConfig, create_model
from torch import nn


def classifier(**config) -> RecurrentClassifier:
    config = {"input_dim": 3, "hidden_dim": 5, "num_classes": 7} | config
    return RecurrentClassifier(RecurrentClassifierConfig(**config)).double().eval()


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_classifies_the_last_state(cell, num_layers, bidirectional):
    model = classifier(cell=cell, num_layers=num_layers, bidirectional=bidirectional)
    x = torch.randn(2, 11, 3).double()
    output, _ = model.recurrent(x)
    last = output[:, -1, :5]
    if bidirectional:  # the backward reading ends at the first step
        last = torch.cat([last, output[:, 0, 5:]], dim=-1)
    torch.testing.assert_close(model(x), model.head(last))


def test_equals_torch():
    model, theirs = classifier(), nn.LSTM(3, 5, batch_first=True).double()
    (cell,) = (m for m in model.modules() if hasattr(m, "weight_hh"))
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(cell.weight_ih)
        theirs.weight_hh_l0.copy_(cell.weight_hh)
        theirs.bias_ih_l0.copy_(cell.bias_ih)
        theirs.bias_hh_l0.zero_()
    x = torch.randn(2, 11, 3).double()
    torch.testing.assert_close(model(x), model.head(theirs(x)[1][0][0]))


@given(seed=st.integers(0, 2**31), lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_padding_has_no_influence(seed, lengths):
    torch.manual_seed(seed)
    model = classifier(bidirectional=True)
    x = torch.randn(len(lengths), max(lengths), 3).double()
    batch = model(x, torch.tensor(lengths))
    for i, length in enumerate(lengths):
        torch.testing.assert_close(batch[i : i + 1], model(x[i : i + 1, :length]))


def test_digits_preset_reads_rows():
    model = create_model("lstm_digits")
    assert model(torch.randn(4, 8, 8)).shape == (4, 10)
    # Four gates of 64 units over 8 inputs and 64 states, one bias each; and the classifier.
    assert model.num_parameters() == 4 * 64 * (8 + 64 + 1) + 64 * 10 + 10


def test_dropout_stands_before_the_classifier_and_between_layers():
    model = create_model("lstm_digits", num_layers=2, dropout=0.5)
    assert model.dropout.p == 0.5
    assert model.recurrent.dropout == 0.5
    x = torch.randn(4, 8, 8)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_a_bad_cell_is_named():
    with pytest.raises(ValueError, match="cell must be one of rnn, lstm, gru, got 'ntm'"):
        create_model("lstm_digits", cell="ntm")
