"""What recipes of sequences share: schedules, averaged checkpoints, the copy task, the model's task."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.models import Transformer, TransformerConfig
from lamina.recipes import SequenceSettings, get_recipe
from lamina.recipes.averaging import CheckpointAverage, mean_of
from lamina.recipes.copy_data import CopyData, draw
from lamina.recipes.schedules import noam_peak, warmup_then_inverse_root, warmup_then_line
from lamina.recipes.sequence_to_sequence import SequenceToSequence
from torch import nn

SETTINGS = SequenceSettings(epochs=2, learning_rate=0.01, warmup_steps=5)
SMALL = TransformerConfig(
    vocab_size=11, dim=12, encoder_depth=1, decoder_depth=1, num_heads=3, hidden_dim=7, dropout=0.0
)


@given(dim=st.integers(1, 2048), warmup=st.integers(1, 8000), step=st.integers(1, 100_000))
def test_the_schedule_is_the_paper_s(dim, warmup, step):
    ours = noam_peak(dim, warmup) * warmup_then_inverse_root(step, warmup)
    assert ours == pytest.approx(dim**-0.5 * min(step**-0.5, step * warmup**-1.5))


def test_the_schedule_begins_at_step_one():
    assert warmup_then_inverse_root(0, 10) == warmup_then_inverse_root(1, 10) == 0.1
    assert warmup_then_inverse_root(5, 0) == pytest.approx(5**-0.5)


def test_bert_s_schedule_is_two_lines():
    factors = [warmup_then_line(step, 4, 24) for step in range(25)]
    assert factors[:5] == [0, 0.25, 0.5, 0.75, 1]
    assert factors[14] == pytest.approx(0.5)
    assert factors[24] == 0
    assert warmup_then_line(3, 3, 3) == 0


def test_the_mean_is_of_each_float():
    states = [{"a": torch.full((2,), float(n)), "n": torch.tensor(n)} for n in range(4)]
    mean = mean_of(states)
    assert torch.equal(mean["a"], torch.full((2,), 1.5))
    assert mean["n"] == 3


def test_the_last_epochs_are_averaged_before_the_test():
    model, average = nn.Linear(1, 1, bias=False), CheckpointAverage(3)
    for n in range(5):
        nn.init.constant_(model.weight, n)
        average.on_train_epoch_end(None, model)
    resumed = CheckpointAverage(3)
    resumed.load_state_dict(average.state_dict())
    resumed.on_test_start(None, model)
    assert model.weight.item() == 3
    nn.init.constant_(model.weight, 7)
    resumed.on_test_start(None, model)  # a second test is of what is there
    assert model.weight.item() == 7


@pytest.mark.parametrize("last", [0, 1])
def test_no_average_keeps_nothing(last):
    model, average = nn.Linear(1, 1), CheckpointAverage(last)
    average.on_train_epoch_end(None, model)
    assert average.state_dict() == {"kept": []}


@given(seed=st.integers(0, 2**31), shortest=st.integers(1, 5), more=st.integers(0, 4))
def test_a_target_is_its_source(seed, shortest, more):
    generator = torch.Generator().manual_seed(seed)
    source, target = draw(shortest, shortest + more, 7, generator)
    assert len(source) == shortest + more + 1
    length = int((source == 2).nonzero())
    assert shortest <= length <= shortest + more
    assert ((source[:length] >= 3) & (source[:length] < 7)).all()
    assert (source[length + 1 :] == 0).all()
    assert target[0] == 1
    assert torch.equal(target[1:], source)


def test_the_test_is_the_same_for_all_and_training_is_not():
    data = CopyData(5, batches=2, tests=6)
    data.setup("fit")
    again = CopyData(5, tests=6)
    again.setup("test")
    assert all(torch.equal(a[0], b[0]) for a, b in zip(data.test, again.test, strict=True))
    loader = data.train_dataloader()
    first, second = (next(iter(loader))[0] for _ in range(2))
    assert not torch.equal(first, second)
    assert len(loader) == len(list(loader)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 3}, "vocab_size must be at least 4"),
        ({"shortest": 3, "longest": 2}, "shortest and longest must rise from 1, got 3 and 2"),
    ],
)
def test_bad_data_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        CopyData(5, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps must not be negative, got -1"),
        ({"average_last": -1}, "average_last must not be negative"),
        ({"length_penalty": -0.5}, "length_penalty must not be negative"),
        ({"num_beams": 0}, "num_beams must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SequenceSettings(epochs=1, learning_rate=0.1, **options)


def logging(task):
    logged = {}
    task.log = lambda name, value, **options: logged.__setitem__(name, torch.as_tensor(value).item())
    return logged


def test_the_loss_is_of_the_token_that_follows():
    """With the target from its start to its end: nothing is asked of the start, and nothing of padding."""
    task = SequenceToSequence(Transformer(SMALL), SETTINGS)
    logged = logging(task)
    source, target = torch.tensor([[5, 4, 2]]), torch.tensor([[1, 7, 9, 2, 0]])
    loss = task.training_step((source, target), 0)
    log_p = task.model(source, target[:, :-1]).log_softmax(-1)[0]
    expected = -(log_p[0, 7] + log_p[1, 9] + log_p[2, 2]) / 3
    torch.testing.assert_close(loss, expected)
    task.validation_step((source, target), 0)
    assert logged["val/loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_test_counts_what_is_written_without_a_mistake():
    task = SequenceToSequence(Transformer(SMALL), SETTINGS)
    logged = logging(task)
    written = torch.tensor([[5, 2, 0], [5, 2, 0], [5, 2, 0]])
    task.write = lambda source: written
    target = torch.tensor([[1, 5, 2, 0, 0], [1, 5, 6, 2, 0], [1, 5, 0, 0, 0]])
    task.test_step((torch.zeros(3, 1), target), 0)
    task.on_test_epoch_end()
    assert logged["test/exact_match"] == pytest.approx(100 / 3)


def test_the_optimiser_is_the_paper_s():
    task = SequenceToSequence(Transformer(SMALL), SETTINGS)
    configured = task.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    assert optimizer.defaults["betas"] == (0.9, 0.98)
    assert optimizer.defaults["eps"] == 1e-9
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.01 * min(step / 5, math.sqrt(5 / step)) for step in range(1, 21)])


def test_copying_is_learned_in_small(tmp_path, lamina):
    """A run of seconds from end to end: tested with averaged weights, and drawn."""
    small = [
        "transformer_copy",
        "--seed",
        "1",
        "--set",
        "epochs=2",
        "--set",
        "batch_size=4",
        "--accelerator",
        "cpu",
    ]
    small += ["--set", "model.dim=12", "--set", "model.hidden_dim=7", "--set", "num_beams=2"]
    answer = lamina("reproduce", *small, "--out", tmp_path)
    assert answer.status == 1  # the bar is missed, nothing else
    assert "below the bar" in answer.err
    (run,) = (tmp_path / "transformer_copy").iterdir()
    assert (run / "attention_to_the_source.png").stat().st_size > 0
    assert Transformer.from_pretrained(run / "model").config.dim == 12


def test_the_bar_is_no_mistake_at_all():
    assert get_recipe("transformer_copy").metric.bar == 100
