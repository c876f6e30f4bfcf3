"""Handwritten digits that need no download: 1,797 real images of 8 x 8 pixels, which scikit-learn ships."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

SIZES = {"train": 1257, "val": 180, "test": 360}
SPLIT_SEED = 0  # any number: it only has to stay what it is


class DigitsData(LightningDataModule):
    """The digits in one fixed split, the same for every seed and recipe.

    1,257 images train, 180 validate (settings were chosen on them), and 360 test, once, at the end. Each part
    has the ten classes in equal shares: scikit-learn's stratified split, from one constant seed. Pixels, 0 to
    16 in the file, are scaled to [0, 1]. The images of one writer may stand in more than one part: the copy
    that scikit-learn ships does not say who wrote which.

    Args:
        batch_size: images a step in training.
        shift: each training image is moved by up to so many pixels along each axis, background comes in.
        rows: whether an image is its rows, (8, 8), as a sequence model reads it, rather than (1, 8, 8).

    Shape:
        - a batch: (B, 1, 8, 8), or (B, 8, 8) with `rows`, and the labels (B,)

    Raises:
        ValueError: `shift` is negative or moves an image out of sight.

    Reference:
        Alpaydin, Kaynak. Optical Recognition of Handwritten Digits. UCI, 1998 (its test set).

    Example:
        >>> from lamina.recipes.digits import DigitsData
        >>> data = DigitsData(batch_size=5)
        >>> data.setup("fit")
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape
        torch.Size([5, 1, 8, 8])
    """

    def __init__(self, batch_size: int, *, shift: int = 0, rows: bool = False) -> None:
        super().__init__()
        if not 0 <= shift < 8:
            raise ValueError(f"shift must lie in [0, 8), got {shift}")
        self.batch_size, self.shift, self.rows = batch_size, shift, rows
        self.parts: dict[str, TensorDataset] = {}

    def setup(self, stage: str) -> None:
        if self.parts:
            return
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32) / 16
        labels = torch.tensor(digits.target, dtype=torch.int64)
        if not self.rows:
            images = images.unsqueeze(1)
        self.parts = {part: TensorDataset(images[i], labels[i]) for part, i in split(digits.target).items()}

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.parts["train"], batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.parts["val"], batch_size=SIZES["val"])

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.parts["test"], batch_size=SIZES["test"])

    def on_after_batch_transfer(
        self, batch: tuple[Tensor, Tensor], dataloader_idx: int
    ) -> tuple[Tensor, Tensor]:
        images, labels = batch
        if self.shift and self.trainer is not None and self.trainer.training:
            images = randomly_shifted(images, self.shift)
        return images, labels


def split(labels: Any) -> dict[str, Tensor]:
    """Part -> the places of its images, of a stratified split that depends on nothing but the labels."""
    from sklearn.model_selection import train_test_split

    rest, test = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=SIZES["test"], stratify=labels, random_state=SPLIT_SEED
    )
    train, val = train_test_split(
        rest, test_size=SIZES["val"], stratify=labels[rest], random_state=SPLIT_SEED
    )
    return {"train": torch.from_numpy(train), "val": torch.from_numpy(val), "test": torch.from_numpy(test)}


def randomly_shifted(images: Tensor, shift: int) -> Tensor:
    """Each image moved on its own, by up to `shift` pixels along its last two axes; background, 0, comes in.

    Draws from the global generator, as all in training does.
    """
    H, W = images.shape[-2:]
    padded = torch.nn.functional.pad(images, (shift,) * 4, value=0.0)
    offsets = torch.randint(0, 2 * shift + 1, (2, len(images)), device=images.device)
    rows = offsets[0, :, None] + torch.arange(H, device=images.device)
    columns = offsets[1, :, None] + torch.arange(W, device=images.device)
    samples = torch.arange(len(images), device=images.device)[:, None, None]
    if images.ndim == 3:
        return padded[samples, rows[:, :, None], columns[:, None, :]]
    # Advanced indices around a slice put their result first: (B, H, W, C).
    return padded[samples, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
