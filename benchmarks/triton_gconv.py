"""GConv's Triton kernels: see ``benchmarks.triton_code``. Gates of their own (``GConvKernel.violations``):

- The main loop multiplies on tensor cores (on sm_90 by the instruction of four warps), doubles where tensor cores take
  them at speed; float32 that must not be rounded never does.
- Both operands arrive by 16 bytes, and by copies that no thread waits for, so that loads and products overlap:
  features and weights have 16 bytes side by side in all layouts. One is otherwise: features in channels_last, for the
  gradient of the weight. There tensor cores sum over pixels, and want those side by side: it is the copy to shared
  memory that turns them, element by element. Two bytes are too few for such a copy, so half precision goes through
  registers, by 16.
- What else is loaded are the scales, and they are few: one for each channel, or, where a tile has several samples, as
  many as features.
"""

from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from math import prod
from typing import ClassVar
from unittest.mock import patch

from benchmarks.model import kernel_bytes
from benchmarks.triton_code import DTYPES, PARKED, TRITON_GPUS, Configuration, TritonKernel, Wanted
from pixnorm import testing
from pixnorm.testing import GCONV_MIX, Case

FORWARD = "gconv_mix_fwd_kernel"
GRAD_INPUT, GRAD_WEIGHT = "gconv_mix_bwd_input_kernel", "gconv_mix_bwd_weight_kernel"
KERNELS = FORWARD, GRAD_INPUT, GRAD_WEIGHT
# Of u: planes so large that a tile is a part of one, and so small that it has several.
LARGE, SMALL = (64, 256, 32, 32), (64, 256, 4, 4)
MULTIPLIERS = ("HGMMA", "HMMA", "DMMA")
# Multiplications and additions that instructions are counted by: those of an element of u that has so many channels.
CHANNELS = 256


class GConvKernel(TritonKernel):
    @property
    def rows(self) -> int:
        """Pixels of a tile."""
        return self.launch.constants["PIXELS"] * self.launch.constants["SAMPLES"]

    @property
    def operands(self) -> tuple[int, int]:
        """Elements of both that a round multiplies: features, then weights or features."""
        columns = self.launch.constants["COLUMNS"]
        if self.name == GRAD_WEIGHT:
            return self.rows * columns, self.rows * columns
        chunk = self.launch.constants["CHUNK"]
        return self.rows * chunk, chunk * columns

    @property
    def multiplier(self) -> str | None:
        """The tensor cores' instruction of the design."""
        if self.dtype == "double":
            return "DMMA" if self.gpu.arch in ("sm_80", "sm_90") else None
        return None if self.strict else "HGMMA" if self.gpu.arch == "sm_90" else "HMMA"

    @property
    def design(self) -> Counter[tuple[str, int]]:
        found = Counter()

        def add(kind: str, width: int, elements: int) -> None:
            found[kind, width] += elements * self.itemsize // (width * self.code.threads)

        one, other = self.operands
        add("LDGSTS", 16, one)
        if self.name != GRAD_WEIGHT or not self.channels_last or not self.multiplier:
            add("LDGSTS", 16, other)
        elif self.itemsize == 2:
            add("LDG", 16, other)
        else:
            add("LDGSTS", self.itemsize, other)
        if self.name == FORWARD and not self.strict:
            add("LDGSTS", 16, self.scales)
        return found

    @property
    def scales(self) -> int:
        """Elements of a tile of them; 0 where a tile has one sample, or does not scale what it multiplies."""
        several = self.launch.constants["SAMPLES"] > 1 and self.name != GRAD_INPUT
        return self.operands[0] if several else 0

    def may_move(self, beyond: Counter[tuple[str, int]]) -> bool:
        """The scales, and of one sample no more than 16 bytes a thread."""
        moved = sum(width * count for (_, width), count in beyond.items())
        return moved <= self.rounds * max(16, self.scales * self.itemsize // self.code.threads)

    @property
    def rounds(self) -> int:
        wide, designed = (
            sum(n for (_, width), n in of.items() if width == 16) for of in (self.code.moves, self.design)
        )
        return max(1, wide // designed)

    @property
    def instructions(self) -> float:
        """Per element of u that has ``CHANNELS`` channels."""
        one, _ = self.operands
        products = one * self.launch.constants["COLUMNS"]
        return CHANNELS * len(self.code.main_loop) * self.code.threads / (self.rounds * products)

    @property
    def may_spill(self) -> bool:
        # With 80 of its 255 registers taken, ptxas of Triton 3.8 puts six numbers of two bytes there; that of 3.7 none.
        newer = tuple(map(int, version("triton").split(".")[:2])) >= (3, 8)
        return newer and self.gpu.arch == "sm_80" and self.small_planes and self.code.local <= PARKED

    def violations(self) -> list[str]:
        found = super().violations()
        used = {opcode.split(".")[0] for opcode in self.code.main_loop} & {*MULTIPLIERS}
        if used != {self.multiplier} - {None}:
            found.append(f"multiplies by {sorted(used) or 'no'} tensor cores, not {self.multiplier}")
        return found

    def seconds(self, x: tuple[int, ...]) -> tuple[float, ...] | None:
        if self.small_planes or self.dtype == "double":
            return None
        moved = kernel_bytes(x, self.itemsize, 1, self.channels_last)[self.name]
        products = prod(x) * x[1]
        speed = self.gpu.tensor[self.itemsize] if self.multiplier else self.gpu.without_tensor
        return (
            moved / self.gpu.copy,
            products / CHANNELS * self.instructions / self.gpu.issue,
            2 * products / speed,
        )


@dataclass(frozen=True, order=True)
class GConvConfiguration(Configuration):
    of_kernel: ClassVar[type[TritonKernel]] = GConvKernel

    strict: bool = False
    small_planes: bool = False

    @property
    def options(self) -> str:
        rounding = ["strict" if self.strict else "TF32"] * (self.dtype == "float")
        return ", ".join(rounding + ["small planes"] * self.small_planes)

    def call(self) -> None:
        from pixnorm.triton_kernels import gconv

        case = Case(SMALL if self.small_planes else LARGE, "")
        dtype = DTYPES[self.dtype]
        tensors = GCONV_MIX.inputs(case, dtype, parameter_dtype=dtype, layout=self.layout, device="meta")
        with patch.object(testing.gconv, "ops_of", lambda impl: (gconv.gconv_mix_fwd, gconv.gconv_mix_bwd)):
            for function, (*arguments, _) in GCONV_MIX.kernel_calls("triton", tensors, {}):
                function(*arguments, not self.strict)


def selection() -> list[Wanted]:
    """Few enough for every run of the tests; ``everything`` is for ``python -m benchmarks.kernels --all``.

    In TF32 and in bfloat16 a kernel is here in both layouts and with both sizes of planes, each for another GPU; and a
    GPU has three of the four, each for another kernel. What else there is, once. Half is as bfloat16.
    """
    usual = [
        GConvConfiguration("float"),
        GConvConfiguration("BFloat16", channels_last=True),
        GConvConfiguration("BFloat16", small_planes=True),
        GConvConfiguration("float", channels_last=True, small_planes=True),
    ]
    found = [
        Wanted(usual[(i + j) % 4], gpu, (kernel,))
        for (i, kernel), (j, gpu) in product(enumerate(KERNELS), enumerate(TRITON_GPUS))
    ]
    others = [(GConvConfiguration("double"), GRAD_INPUT), (GConvConfiguration("float", strict=True), FORWARD)]
    return found + [Wanted(of, gpu, (kernel,)) for (of, kernel), gpu in zip(others, TRITON_GPUS, strict=False)]


def everything() -> list[Wanted]:
    """All that kernels are specialised on where sizes are aligned, for all GPUs."""
    rounded = product(DTYPES, (False, True), (False,), (False, True))
    strict = product(("float",), (False, True), (True,), (False, True))
    configurations = [GConvConfiguration(*of) for of in (*rounded, *strict)]
    return [Wanted(*pair) for pair in product(configurations, TRITON_GPUS)]
