"""SPN's Triton kernels: see ``benchmarks.triton_code``. Gates of their own (``SPNKernel.violations``):

- Nothing spills, but for doubles and 5 x 5 taps.
- The main loop loads and stores 16 bytes of a row of y at once in NCHW. (Beside them it loads neighbours, which are few
  bytes.)
- No lane waits for another while it walks: no barrier and no shared memory in the main loop, and in NCHW nowhere in
  the kernel. Triton puts them where what is computed next lies otherwise over the threads.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import ClassVar
from unittest.mock import patch

import torch

from benchmarks.model import kernel_bytes
from benchmarks.triton_code import DTYPES, TRITON_GPUS, Configuration, TritonKernel, Wanted
from pixnorm import testing
from pixnorm.testing import SPN, Case

STATISTICS, PROJECTION = "statistics_kernel", "spn_projection_kernel"
MODULATE, REDUCE, APPLY = WALKS = "spn_fwd_modulate_kernel", "spn_bwd_reduce_kernel", "spn_bwd_apply_kernel"
# Of x: so few channels that the projection is a kernel of our own, and so many that it is not. In the first its
# statistics have so many parts that they are added up in two steps.
SHAPES = ((32, 64, 64, 64), (4, 256, 64, 64))


class SPNKernel(TritonKernel):
    @property
    def name(self) -> str:
        if self.launch.kernel == PROJECTION:
            return f"{PROJECTION}, {'forward' if self.launch.constants['STATISTICS'] else 'backward'}"
        return self.launch.kernel

    @property
    def walks(self) -> bool:
        return self.launch.kernel in WALKS

    @property
    def design(self) -> Counter[tuple[str, int]]:
        """But for neighbours and what is one number a channel.

        Reduce and apply have p twice: for the mask of the row below, and for p̂ of the row above.
        """
        constants, found = self.launch.constants, Counter()

        def add(kind: str, elements: int, itemsize: int = self.itemsize, wide: bool = True, count: int = 1) -> None:
            width = min(16, elements * itemsize) if wide else itemsize
            found[kind, width] += count * elements * itemsize // width

        if self.launch.kernel == STATISTICS:
            add("LDG", constants["ROWS"] * constants["COLUMNS"] // self.code.threads)
        elif self.launch.kernel == PROJECTION:
            for outer in (constants["OUT"], constants["PIXELS"]):  # of the weight and of x, by way of shared memory
                add("LDGSTS", constants["CHUNK"] * outer // self.code.threads)
        elif self.walks:
            row, one_mask, wide = self.columns, self.one_mask, not self.channels_last
            y = {"elements": row * self.upsample, "wide": wide, "count": self.upsample}
            add("LDG", row, wide=wide or one_mask)
            add("LDG", row, wide=wide)
            if self.launch.kernel == MODULATE:
                add("STG", **y)
            else:
                add("LDG", **y)
            if self.launch.kernel == REDUCE and one_mask:
                add("STG", row, max(4, self.itemsize), wide)  # dm
            elif self.launch.kernel != MODULATE:
                add("LDG", row, wide=wide or one_mask)  # p, or, with one mask, the finished dp
            if self.launch.kernel == APPLY:
                add("STG", row, wide=wide, count=1 if one_mask else 2)
        return found

    @property
    def rounds(self) -> int:
        kind = next((kind for kind, _ in self.design if kind == "STG"), "LDG")
        counted = [sum(count for move, count in of.items() if move[0] == kind) for of in (self.code.moves, self.design)]
        return 1 if kind == "LDG" else max(1, counted[0] // max(1, counted[1]))

    @property
    def instructions(self) -> float:
        """Per element of y; for the statistics and the projection, per element. What a halo costs is not in it."""
        constants = self.launch.constants
        elements = self.columns * self.upsample**2
        if self.launch.kernel == STATISTICS:
            elements = constants["ROWS"] * constants["COLUMNS"] / self.code.threads
        elif self.launch.kernel == PROJECTION:
            elements = constants["CHUNK"] * constants["PIXELS"] / self.code.threads
        return len(self.code.main_loop) / (self.rounds * elements)

    @property
    def may_spill(self) -> bool:
        return self.dtype == "double" or self.kernel_size == 5

    def may_move(self, beyond: Counter[tuple[str, int]]) -> bool:
        # Statistics of the projection's tiles are stored as they come.
        return not self.walks or not any(kind == "STG" for kind, _ in beyond)

    def violations(self) -> list[str]:
        found = super().violations()
        code = self.code.main_loop if self.channels_last else self.code.opcodes
        waits = sorted({opcode for opcode in code if opcode.startswith(("BAR", "LDS", "STS"))})
        if self.walks and (waits or (self.shared and not self.channels_last)):
            found.append(f"{self.shared} bytes of shared memory, {waits}")
        return found

    def seconds(self, x: tuple[int, ...]) -> tuple[float, ...] | None:
        if self.one_mask or not self.design:
            return None
        # In both layouts the bytes of channels_last: apply never writes a copy of x here.
        moved = kernel_bytes(x, self.itemsize, self.upsample, channels_last=True)[self.name]
        elements = prod(x) * (self.upsample**2 if self.walks else 2 if self.launch.kernel == STATISTICS else 1)
        return moved / self.gpu.copy, elements * self.instructions / self.gpu.issue


@dataclass(frozen=True, order=True)
class SPNConfiguration(Configuration):
    of_kernel: ClassVar[type[TritonKernel]] = SPNKernel

    upsample: int = 1
    relu: bool = False
    kernel_size: int = 3
    one_mask: bool = False

    @property
    def options(self) -> str:
        taps = [f"k = {self.kernel_size}"] * (self.kernel_size != 3)
        return ", ".join(["relu"] * self.relu + taps + ["one mask"] * self.one_mask)

    def call(self) -> None:
        from pixnorm.triton_kernels import spn

        options = {"upsample": self.upsample, "activation": "relu" if self.relu else None}
        sizes = {"kernel_size": self.kernel_size} | ({"masks": 1} if self.one_mask else {})
        dtype = DTYPES[self.dtype]
        parameters = dtype if dtype == torch.float64 else torch.float32
        with patch.object(testing.spn, "ops_of", lambda impl: (spn.spn_fwd, spn.spn_bwd)):
            for shape in SHAPES:
                case = Case(shape, "", options, sizes=sizes)
                tensors = SPN.inputs(case, dtype, parameter_dtype=parameters, layout=self.layout, device="meta")
                for function, arguments in SPN.kernel_calls("triton", tensors, options):
                    function(*arguments)


def selection() -> list[Wanted]:
    """Few enough for every run of the tests; ``everything`` is for ``python -m benchmarks.kernels --all``.

    In float32 and in bfloat16, each row of the tables of block sizes is here for one GPU: of the four pairs of layout
    and upsampling each GPU has one, and in bfloat16 the opposite one. So each GPU has each kernel that walks in both;
    the others it has in the one that comes first. What else there is, in NCHW, for one GPU each. Half is as bfloat16.
    """
    walks = [(last, upsample, upsample == 2) for last, upsample in product((False, True), (1, 2))]
    found = []
    for i, gpu in enumerate(TRITON_GPUS):
        of_both = [SPNConfiguration("float", *walks[i]), SPNConfiguration("BFloat16", *walks[~i])]
        first, second = of_both if i % 2 == 0 else of_both[::-1]
        found += [Wanted(first, gpu), Wanted(second, gpu, WALKS)]
    others = [
        SPNConfiguration("double"),
        SPNConfiguration("float", kernel_size=1),
        SPNConfiguration("float", kernel_size=5),
        SPNConfiguration("float", one_mask=True),
    ]
    return found + [Wanted(of, gpu, WALKS) for of, gpu in zip(others, TRITON_GPUS, strict=True)]


def everything() -> list[Wanted]:
    """All that kernels are specialised on, for all GPUs."""
    options = product(DTYPES, (False, True), (1, 2), (False, True), ((3, False), (3, True), (1, False), (5, False)))
    configurations = [SPNConfiguration(*of_x, *of_parameters) for *of_x, of_parameters in options]
    return [Wanted(*pair) for pair in product(configurations, TRITON_GPUS)]
