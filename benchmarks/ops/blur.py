"""The machine code of the blur, in Triton. It has no measurements of its own."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

from benchmarks.machine_code import Moves, moves
from benchmarks.triton_code import DTYPES, TRITON_GPUS, Configuration, TritonKernel, Wanted
from pixnorm.testing import BLUR, Case
from pixnorm.testing.blur import DOWN, UP

KERNEL = "blur2d_kernel"
OPTIONS = {"": {}, "up": UP, "down": DOWN}
# Loads and stores of a step as it is, up, and down: in channels_last of pixels, in NCHW of vectors.
PIXELS, VECTORS = ((9, 1), (12, 4), (16, 1)), ((3, 1), (4, 2), (4, 1))


class Neighbours(TritonKernel):
    """There is no loop. Pixels move by 16 bytes, in NCHW those of the smaller one of x and y by 8 and neighbours along
    w one by one."""

    @property
    def moves(self) -> Moves:
        return self.code.all_moves

    @property
    def design(self) -> Moves:
        arguments = self.launch.arguments
        steps = arguments["CHANNELS"] * arguments["STEPS"] // (arguments["V"] * self.code.threads)
        up, down = arguments["UP"], arguments["DOWN"]
        loads, stores = (PIXELS if self.channels_last else VECTORS)[up + 2 * down]
        x, y = (arguments["PAIRS" if larger else "V"] * self.itemsize for larger in (down, up))
        return moves("LDG", x, count=loads * steps) + moves("STG", y, count=stores * steps)

    def may_move(self, beyond: Moves) -> bool:
        return not beyond or (not self.channels_last and {*beyond} == {("LDG", self.itemsize)})


@dataclass(frozen=True, order=True)
class BlurConfiguration(Configuration):
    kernels: ClassVar = {KERNEL: Neighbours}
    spec: ClassVar = BLUR
    modelled = False

    resample: str = ""

    @property
    def options(self) -> str:
        return self.resample

    def cases(self) -> Iterator[Case]:
        yield Case((4, 64, 64, 64), "", OPTIONS[self.resample])

    @classmethod
    def selection(cls) -> list[Wanted]:
        """Float32 and bfloat16 in both layouts, on the GPUs in turn; float64. Half is as bfloat16."""
        usual = [cls(*of) for of in product(("float", "BFloat16"), (False, True), OPTIONS)]
        found = [Wanted(of, TRITON_GPUS[i % len(TRITON_GPUS)]) for i, of in enumerate(usual)]
        return [*found, Wanted(cls("double", resample="down"), TRITON_GPUS[0])]

    @classmethod
    def everything(cls) -> list[Wanted]:
        return [Wanted(cls(*of), gpu) for *of, gpu in product(DTYPES, (False, True), OPTIONS, TRITON_GPUS)]
