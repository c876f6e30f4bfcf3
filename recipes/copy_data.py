"""The copy task: sequences of random symbols, to be written as they are read. No file is needed."""

from collections.abc import Iterator

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

TEST_SEED = 0  # any number: it only has to stay what it is


class CopyData(LightningDataModule):
    """Random sequences, new ones in each epoch for training, and the same for every seed in the test.

    Args:
        batch_size: sequences a step.
        batches: steps an epoch.
        shortest: symbols of a sequence.
        longest: symbols of a sequence.
        vocab_size: tokens, of which 0 is padding, 1 the start and 2 the end.
        tests: sequences of the test.

    Shape:
        - a batch: source (B, longest) with an end token, target (B, longest + 2) from start to end; padding
          behind both

    Raises:
        ValueError: there is no symbol, or the lengths are out of order.

    Source:
        Vaswani et al. (2017) have no such task; it is the usual first check of an implementation.

    Example:
        >>> from lamina.recipes.copy_data import CopyData
        >>> data = CopyData(batch_size=5, batches=2)
        >>> data.setup("fit")
        >>> source, target = next(iter(data.train_dataloader()))
        >>> source.shape, target.shape
        (torch.Size([5, 21]), torch.Size([5, 22]))
    """

    def __init__(
        self,
        batch_size: int,
        *,
        batches: int = 100,
        shortest: int = 10,
        longest: int = 20,
        vocab_size: int = 11,
        tests: int = 1000,
    ) -> None:
        super().__init__()
        if vocab_size < 4:
            raise ValueError(f"vocab_size must be at least 4, a symbol beside three others, got {vocab_size}")
        if not 0 < shortest <= longest:
            raise ValueError(f"shortest and longest must rise from 1, got {shortest} and {longest}")
        self.batch_size, self.batches, self.tests = batch_size, batches, tests
        self.sizes = shortest, longest, vocab_size

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(TEST_SEED)
        self.test = [draw(*self.sizes, generator) for _ in range(self.tests)]
        self.val = [draw(*self.sizes, generator) for _ in range(200)]

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(_Drawn(self.batches * self.batch_size, self.sizes), batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(self.val, batch_size=200)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(self.test, batch_size=250)  # type: ignore[arg-type]


class _Drawn(Dataset[tuple[Tensor, Tensor]]):
    """Draws from the global generator, which each epoch starts anew."""

    def __init__(self, number: int, sizes: tuple[int, int, int]) -> None:
        self.number, self.sizes = number, sizes

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index >= self.number:
            raise IndexError(index)
        return draw(*self.sizes)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[n] for n in range(self.number))


def draw(
    shortest: int, longest: int, vocab_size: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """One sequence: as source with its end, and as target from start to end."""
    length = int(torch.randint(shortest, longest + 1, (), generator=generator))
    symbols = torch.randint(3, vocab_size, (length,), generator=generator)
    source, target = torch.zeros(longest + 1, dtype=torch.long), torch.zeros(longest + 2, dtype=torch.long)
    source[:length], source[length] = symbols, 2
    target[0], target[1 : length + 2] = 1, source[: length + 1]
    return source, target
