"""The order of the data: an endless sequence of shuffled epochs, of which any part can be had at once."""

from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from pixnorm.training.cli import UsageError
from pixnorm.training.seeds import seed_of


class Batches(Sampler[list[int]]):
    """Indices of the batches of one process, from a given batch on.

    The position of a run is the number of batches that it has had: nothing else needs to be saved.

    Args:
        length: of the data.
        batch: of all processes together; each has an equal part.
        seed: of the shuffling.
        start: the first batch.
        rank, world: of this process, and how many there are.
    """

    def __init__(self, length: int, batch: int, seed: int, start: int = 0, rank: int = 0, world: int = 1):
        if length < 1 or batch % world:
            raise ValueError(f"cannot divide batches of {batch} from {length} images among {world} processes")
        self.length, self.batch, self.seed, self.start, self.rank, self.world = length, batch, seed, start, rank, world
        self._epochs: dict[int, torch.Tensor] = {}

    def __iter__(self) -> Iterator[list[int]]:
        local = self.batch // self.world
        for i in count(self.start):
            first = i * self.batch + self.rank * local
            yield [self._at(position) for position in range(first, first + local)]

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self.length)
        if epoch not in self._epochs:
            rng = torch.Generator().manual_seed(seed_of(self.seed, "epoch", epoch))
            self._epochs[epoch] = torch.randperm(self.length, generator=rng)
            for old in [known for known in self._epochs if known < epoch - self.batch // self.length - 1]:
                del self._epochs[old]
        return int(self._epochs[epoch][offset])


class _Tried(Dataset[Any]):
    """Data with a UsageError in the place of what cannot be read: raised in a worker, it would lose its one line."""

    def __init__(self, data: Dataset[Any]):
        self.data = data

    def __getitem__(self, index: int) -> Any:
        try:
            return self.data[index]
        except UsageError as error:
            return error


def _collated(items: list[Any]) -> Any:
    return next((item for item in items if isinstance(item, UsageError)), None) or default_collate(items)


def loaded(data: Dataset[Any], batches: Batches, workers: int, device: torch.device) -> Iterator[Any]:
    """Batches of the data; what the workers do does not depend on PyTorch's global generator.

    Raises:
        UsageError: a file cannot be read.
    """
    loader = DataLoader(
        _Tried(data),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collated,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(batches.seed),
    )
    for batch in loader:
        if isinstance(batch, UsageError):
            raise batch
        yield batch
