"""The machine code of the blur, in Triton. It has no measurements of its own."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

from benchmarks.triton_code import DTYPES, TRITON_GPUS, Configuration, Wanted
from pixnorm.testing import BLUR, Case
from pixnorm.testing.blur import DOWN, UP

OPTIONS = {"": {}, "up": UP, "down": DOWN}


@dataclass(frozen=True, order=True)
class BlurConfiguration(Configuration):
    """The kernel has no loop, so the gates are the usual ones, and how y is written."""

    kernels: ClassVar = {}
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
