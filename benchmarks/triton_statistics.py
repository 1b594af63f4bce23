"""The Triton kernels for statistics, as instance norm calls them: see ``benchmarks.triton_code``.

Batch norm's, which SPN launches too, are in ``benchmarks.triton_spn``. The gates are those of all kernels: vectors of
16 bytes, no spills, room for enough warps.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch

from benchmarks.triton_code import DTYPES, TRITON_GPUS, Configuration, TritonKernel, Wanted

STATISTICS = "statistics_kernel"
# So many pixels that a sample has several parts, few enough that they are merged in one step; and planes of one tile.
LARGE, SMALL = (4, 64, 256, 256), (64, 256, 8, 8)


class StatisticsKernel(TritonKernel):
    @property
    def design(self) -> Counter[tuple[str, int]]:
        if self.launch.kernel != STATISTICS:
            return Counter()
        constants = self.launch.constants
        elements = constants["ROWS"] * constants["COLUMNS"]
        return Counter({("LDG", 16): max(1, elements * self.itemsize // (16 * self.code.threads))})

    @property
    def rounds(self) -> int:
        return 1

    @property
    def instructions(self) -> float:
        """Per element."""
        constants = self.launch.constants
        return len(self.code.main_loop) * self.code.threads / (constants["ROWS"] * constants["COLUMNS"])

    def seconds(self, x: tuple[int, ...]) -> None:
        return None


@dataclass(frozen=True, order=True)
class StatisticsConfiguration(Configuration):
    of_kernel: ClassVar[type[TritonKernel]] = StatisticsKernel

    small_planes: bool = False

    @property
    def options(self) -> str:
        return "instance" + ", small planes" * self.small_planes

    def call(self) -> None:
        from pixnorm.triton_kernels.statistics import statistics

        formats = {"memory_format": torch.channels_last} if self.channels_last else {}
        shape = SMALL if self.small_planes else LARGE
        x = torch.empty(shape, dtype=DTYPES[self.dtype], device="meta").contiguous(**formats)
        statistics([x], instance=True)


def selection() -> list[Wanted]:
    """Each kernel in both layouts and with both sizes of planes, for the GPUs in turn."""
    usual = product(("float", "BFloat16"), (False, True), (False, True))
    found = [Wanted(StatisticsConfiguration(*of), TRITON_GPUS[i % len(TRITON_GPUS)]) for i, of in enumerate(usual)]
    return [*found, Wanted(StatisticsConfiguration("double"), TRITON_GPUS[0])]


def everything() -> list[Wanted]:
    configurations = [StatisticsConfiguration(*of) for of in product(DTYPES, (False, True), (False, True))]
    return [Wanted(*pair) for pair in product(configurations, TRITON_GPUS)]
