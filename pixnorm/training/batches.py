"""The order of the data: an endless sequence of shuffled epochs, of which any part can be had at once."""

from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

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


def loader(data: Dataset, batches: Batches, workers: int, device: torch.device) -> DataLoader[Any]:
    """Batches of the data; what the workers do does not depend on PyTorch's global generator."""
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(batches.seed),
    )
