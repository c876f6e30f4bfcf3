"""The digits: their split, their order, and their shifts."""

import hashlib

import pytest
import torch
from lamina.recipes.digits import SIZES, DigitsData, randomly_shifted, split
from sklearn.datasets import load_digits


@pytest.fixture(scope="module")
def places():
    return split(load_digits().target)


def test_the_split_has_its_sizes_and_no_image_twice(places):
    assert {part: len(i) for part, i in places.items()} == SIZES == {"train": 1257, "val": 180, "test": 360}
    assert sorted(torch.cat(list(places.values())).tolist()) == list(range(1797))


def test_the_split_never_changes(places):
    """A result is only comparable with earlier ones while this holds."""
    held_out = torch.cat([places["val"], places["test"]]).numpy().astype("<i8")
    assert hashlib.sha256(held_out.tobytes()).hexdigest()[:16] == "d76916b56def45bb"


def test_every_part_has_the_classes_in_equal_shares(places):
    labels = torch.tensor(load_digits().target)
    whole = labels.bincount() / len(labels)
    for i in places.values():
        torch.testing.assert_close(labels[i].bincount() / len(i), whole, atol=0.006, rtol=0)


@pytest.mark.parametrize(("rows", "shape"), [(False, (5, 1, 8, 8)), (True, (5, 8, 8))])
def test_a_batch(rows, shape):
    data = DigitsData(5, rows=rows)
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == shape
    assert images.dtype == torch.float32
    assert labels.shape == (5,)
    pixels = data.parts["train"].tensors[0]
    assert (pixels.min().item(), pixels.max().item()) == (0.0, 1.0)


def test_all_images_are_seen_in_each_epoch_and_the_test_in_one_batch():
    data = DigitsData(64)
    data.setup("fit")
    assert sum(len(labels) for _, labels in data.train_dataloader()) == 1257
    assert [len(labels) for _, labels in data.val_dataloader()] == [180]
    assert [len(labels) for _, labels in data.test_dataloader()] == [360]


@pytest.mark.parametrize("shape", [(53, 7, 11), (53, 1, 7, 11), (53, 3, 7, 11)])
def test_a_shifted_image_is_the_image_elsewhere_on_background(shape):
    images = torch.rand(shape)
    shifted = randomly_shifted(images, 2)
    assert shifted.shape == images.shape
    padded = torch.nn.functional.pad(images, (2,) * 4, value=0.0)
    seen = set()
    for image, result in zip(padded, shifted, strict=True):
        crops = {(i, j): image[..., i : i + 7, j : j + 11] for i in range(5) for j in range(5)}
        found = [place for place, crop in crops.items() if torch.equal(crop, result)]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 5  # each image has its own shift, along both axes


def test_only_training_images_are_shifted():
    class Trainer:
        training = True

    data = DigitsData(64, shift=1)
    images, labels = torch.rand(64, 1, 8, 8), torch.zeros(64)
    data.trainer = Trainer()
    assert not torch.equal(data.on_after_batch_transfer((images, labels), 0)[0], images)
    data.trainer.training = False
    assert torch.equal(data.on_after_batch_transfer((images, labels), 0)[0], images)


@pytest.mark.parametrize("shift", [-1, 8])
def test_a_shift_out_of_sight(shift):
    with pytest.raises(ValueError, match=rf"shift must lie in \[0, 8\), got {shift}"):
        DigitsData(64, shift=shift)
