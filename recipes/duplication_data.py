"""The duplication task: 0w0w, a sequence of random symbols twice. No file is needed."""

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

TEST_SEED = 0  # any number: it only has to stay what it is


class DuplicationData(LightningDataModule):
    """Sequences 0w0w with w of L / 2 - 1 symbols, new ones for training, the same for every seed in the test.

    The first copy cannot be foretold, the second can, from what stands L / 2 places before it.

    Args:
        batch_size: sequences a step.
        batches: steps an epoch.
        length: L.
        symbols: w is drawn from 1 to this number.
        tests: sequences of the test.

    Shape:
        - a batch: (B, length) of integers

    Raises:
        ValueError: the length is odd or leaves no symbol, or there are none.

    Source:
        Kitaev, Kaiser, Levskaya. Reformer: The Efficient Transformer. ICLR 2020. Section 5.

    Example:
        >>> from lamina.recipes.duplication_data import DuplicationData
        >>> data = DuplicationData(batch_size=5, batches=2)
        >>> data.setup("fit")
        >>> ids = next(iter(data.train_dataloader()))
        >>> ids.shape, torch.equal(ids[:, :32], ids[:, 32:])
        (torch.Size([5, 64]), True)
    """

    def __init__(
        self, batch_size: int, *, batches: int = 200, length: int = 64, symbols: int = 127, tests: int = 1000
    ) -> None:
        super().__init__()
        if length < 4 or length % 2:
            raise ValueError(
                f"length must be even and at least 4, two copies of 0 and a symbol, got {length}"
            )
        if symbols < 1:
            raise ValueError(f"symbols must be at least 1, got {symbols}")
        self.batch_size, self.batches, self.tests = batch_size, batches, tests
        self.sizes = length, symbols

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(TEST_SEED)
        self.test = draw(self.tests, *self.sizes, generator)
        self.val = draw(200, *self.sizes, generator)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(_Drawn(self.batches, self.batch_size, self.sizes), batch_size=None)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.val, batch_size=50)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.test, batch_size=50)  # type: ignore[arg-type]


class _Drawn(Dataset[Tensor]):
    """Whole batches from the global generator, which each epoch starts anew."""

    def __init__(self, batches: int, batch_size: int, sizes: tuple[int, int]) -> None:
        self.batches, self.batch_size, self.sizes = batches, batch_size, sizes

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> Tensor:
        if index >= self.batches:
            raise IndexError(index)
        return draw(self.batch_size, *self.sizes)


def draw(number: int, length: int, symbols: int, generator: torch.Generator | None = None) -> Tensor:
    """So many sequences, (number, length)."""
    copy = torch.zeros(number, length // 2, dtype=torch.long)
    copy[:, 1:] = torch.randint(1, symbols + 1, (number, length // 2 - 1), generator=generator)
    return torch.cat([copy, copy], 1)
