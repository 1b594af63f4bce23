"""What the machine code of the kernels proves, without a GPU: ``python -m benchmarks.kernels``.

Compiles csrc/cuda for every GPU of ``benchmarks.model.GPUS``; then Triton's kernels, which have gates of their own in
``benchmarks.triton_code``: a selection of their configurations, or, with ``--all``, all of them, for an hour or two.
Three gates (``Kernel.violations``):

- No local memory: no stack, no load and no store of it. That is also where registers spill.
- The main loop moves every element once, and as many bytes at once as the design says: 16 where rows are aligned.
- Registers and shared memory leave room for as many warps as the design counts on (``WARPS``).

The main loop and the model's bytes then give a prediction: a kernel takes as long as the largest of its bytes, at the
speed of a copy, its instructions, at one a cycle and scheduler, and, if it multiplies matrices, its products, at the
speed of large ones. Counted is the whole body of the loop, also what only rows at a border run: an upper bound for a
row. Not counted are the rows above and below a strip, which are worked on twice, and what comes before and after the
loop.
"""

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, product
from math import prod
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

from benchmarks import triton_code, triton_gconv, triton_spn, triton_statistics
from benchmarks.machine_code import ROOT, Function, functions, listed, missing
from benchmarks.model import GPU, GPUS, KB, WARP, gemm_times, kernel_bytes
from benchmarks.triton_code import Processes, TritonKernel, triton_kernels

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ITEMSIZES = {"double": 8, "float": 4, "BFloat16": 2, "Half": 2}

STATISTICS, MODULATE = "spn_statistics_kernel", "spn_fwd_modulate_kernel"
REDUCE, APPLY = "spn_bwd_reduce_kernel", "spn_bwd_apply_kernel"
FINISH, RUNNING = "spn_bwd_finish_kernel", "update_running_kernel"

# Warps that an SM must have room for. Memory answers after some 700 ns; in that time a copy moves 7 KB per SM of an RTX
# 3090, and 23 KB per SM of an H200. A thread has a few loads of 16 bytes (or as many together) under way:
WARPS = {
    STATISTICS: {"sm_86": 24, "sm_90": 32},  # half of all; 4 loads, 2 KB a warp
    MODULATE: {"sm_86": 16, "sm_90": 16},  # 2 loads, 16 KB of reads; a third of its traffic is stores
    REDUCE: {"sm_86": 12, "sm_90": 12},  # 3 loads, 18 KB; more would cost it the sums that it keeps in registers
    APPLY: {"sm_86": 12, "sm_90": 12},  # 3 loads, 18 KB of reads; about half of its traffic is stores
    FINISH: {"sm_86": 1, "sm_90": 1},  # these two move a few KB in all
    RUNNING: {"sm_86": 1, "sm_90": 1},
}

WARPS_OF_DOUBLE = 8  # is enough, and all that its registers allow

SHAPES = [("float", (64, 256, 32, 32)), ("BFloat16", (64, 256, 32, 32)), ("float", (32, 64, 128, 128))]  # of y


class Kernel(NamedTuple):
    """An instance of a kernel template, as it is for one GPU.

    Attributes:
        gpu: what it is compiled for.
        code: what became of it.
        name: of the template.
        dtype, columns, upsample, channels_last, relu: its arguments, where it has them.
    """

    gpu: GPU
    code: Function
    name: str
    dtype: str
    columns: int
    upsample: int
    channels_last: bool
    relu: bool

    @classmethod
    def of(cls, code: Function, gpu: GPU) -> "Kernel":
        name, arguments = re.search(r"(\w+)<(.*?)>\(", code.signature).groups()
        if name not in WARPS:
            raise ValueError(f"benchmarks.kernels does not know {name}: how many warps at once does it count on?")
        dtype, *values = arguments.replace("c10::", "").split(", ")
        columns, upsample, *_ = [int(value) for value in values if value.isdigit()] + [1, 1]
        channels_last, relu, *_ = [value == "true" for value in values if not value.isdigit()] + [False, False]
        return cls(gpu, code, name, dtype, columns, upsample, channels_last, relu)

    def __str__(self) -> str:
        options = ["channels_last"] * self.channels_last + ["up"] * (self.upsample == 2) + ["relu"] * self.relu
        return " ".join([self.name, self.dtype, f"x{self.columns}", *options, self.gpu.arch])

    @property
    def options(self) -> str:
        return "relu" if self.relu else ""

    @property
    def itemsize(self) -> int:
        return ITEMSIZES[self.dtype]

    @property
    def shared(self) -> int:
        """Bytes of shared memory of the largest block, as the kernel's launch in csrc asks for them."""
        threads, channels, sums = self.code.threads, WARP if self.channels_last else 1, 38
        warps = threads // WARP
        table = (18 + 32 * self.upsample + 36) * channels
        exchange = 4 * threads if self.channels_last else 0  # for each number that neighbours exchange
        walk = table + 2 * self.upsample * exchange
        numbers = {
            STATISTICS: 2 * threads * self.columns if self.channels_last else warps,
            MODULATE: table + max(exchange, 6 * warps * channels),
            REDUCE: max(walk, sums * (warps // 2 * WARP if self.channels_last else warps)),
            APPLY: walk if self.channels_last else table + 4 + sums * warps,
            FINISH: sums * warps,
            RUNNING: 0,
        }
        static = max(0, self.code.shared - (KB if self.gpu.capability >= (9, 0) else 0))
        return static + numbers[self.name] * max(self.itemsize, 4)

    @property
    def warps(self) -> int:
        """The warps that an SM has room for."""
        return self.gpu.occupancy(self.code.threads, self.code.registers, self.shared)

    @property
    def warps_needed(self) -> int:
        needed = WARPS[self.name][self.gpu.arch]
        return min(needed, WARPS_OF_DOUBLE) if self.dtype == "double" else needed

    # ---- the main loop ----

    @property
    def design(self) -> Counter[tuple[str, int]]:
        """The ``Function.moves`` of one round: for a row of x; for statistics, the loads that are under way together.

        In NCHW a thread moves what it owns of a row at once: of y 16 bytes, and so behind an upsampling 8 of x. In
        channels_last it moves an element at once, and a warp those of 32 channels side by side (that they are side by
        side is not to be seen here). Statistics are read by 16 bytes in both.
        """
        if self.channels_last and self.name != STATISTICS:
            x, y = (self.itemsize, self.columns), (self.itemsize, self.columns * self.upsample**2)
        else:
            row = 16 if self.columns > 1 else self.upsample * self.itemsize  # of y, in bytes
            x, y = (row // self.upsample, 1), (row, self.upsample)
        # In channels_last reduce reads p twice, the second time from the L1 cache, for want of registers.
        p_twice = self.channels_last and self.dtype != "double"
        rows = {
            STATISTICS: [("LDG", *x)] * self.unrolled,
            MODULATE: [("LDG", *x)] * 2 + [("STG", *y)],
            REDUCE: [("LDG", *x)] * (3 if p_twice else 2) + [("LDG", *y)],
            APPLY: [("LDG", *x)] * 2 + [("LDG", *y)] + [("STG", *x)] * (2 if self.channels_last else 3),
        }
        moves = Counter()
        for kind, width, count in rows.get(self.name, []):
            moves[kind, width] += count
        return moves

    @property
    def unrolled(self) -> int:
        """Of statistics: the loads that are under way together."""
        return 2 if self.channels_last and self.columns > 4 else 4

    @property
    def rounds(self) -> int:
        """How many the main loop has."""
        return max(1, self.code.moves.total() // max(1, self.design.total()))

    @property
    def instructions(self) -> float:
        """Per element of y; for statistics, per element. What a halo costs is not in it."""
        elements = self.columns * (self.unrolled if self.name == STATISTICS else self.upsample**2)
        return len(self.code.main_loop) / (self.rounds * elements)

    # ---- what follows ----

    def violations(self) -> list[str]:
        """The gates that it does not pass, and why."""
        found = []
        if self.code.local or self.code.local_moves:
            found.append(f"{self.code.local} bytes of local memory: {self.code.local_moves}")
        moves, wanted = self.code.moves, {move: self.rounds * count for move, count in self.design.items()}
        if self.design and moves != wanted:
            found.append(f"moves in the main loop: {listed(moves)}, not {listed(self.design)}")
        if self.warps < self.warps_needed:
            found.append(f"room for {self.warps} warps, not {self.warps_needed}")
        return found

    def seconds(self, x: tuple[int, ...]) -> tuple[float, float]:
        """Predictions for an input of that shape: by bytes, and by instructions."""
        moved = kernel_bytes(x, self.itemsize, self.upsample, self.channels_last)[self.name]
        elements = prod(x) * (2 if self.name == STATISTICS else self.upsample**2)
        return moved / self.gpu.copy, elements * self.instructions / self.gpu.issue


def input_shape(y: tuple[int, ...], upsample: int) -> tuple[int, ...]:
    n, c, h, w = y
    return n, c, h // upsample, w // upsample


def kernels(sources: Iterable[Path] = SOURCES) -> list[Kernel]:
    """All instances for all GPUs; compiles what has changed."""
    jobs = list(product(sorted(sources, key=lambda source: -source.stat().st_size), GPUS.values()))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        read = list(pool.map(lambda job: functions(job[0], job[1].arch), jobs))
    found = [Kernel.of(code, gpu) for (_, gpu), codes in zip(jobs, read, strict=True) for code in codes]
    return sorted(found, key=lambda kernel: (kernel.gpu, list(WARPS).index(kernel.name), kernel[3:]))


# ---- the report ----


def gates(found: list[Kernel] | list[TritonKernel]) -> str:
    """A line for the instances of a kernel on a GPU: the most that they take, and the fewest warps."""
    rows = []
    for (arch, name), kernels_of_name in groupby(found, lambda kernel: (kernel.gpu.arch, kernel.name)):
        group = list(kernels_of_name)
        rows.append(
            (
                *(name, arch, len(group)),
                sum(any(width == 16 for _, width in kernel.design) for kernel in group),
                max(kernel.code.registers for kernel in group),
                max(kernel.shared for kernel in group),
                f"{min(kernel.warps for kernel in group)} (≥ {min(kernel.warps_needed for kernel in group)})",
                max(kernel.code.local for kernel in group),
                sum(bool(kernel.violations()) for kernel in group),
            )
        )
    headers = ("kernel", "arch", "instances", "by 16 bytes", "registers", "shared", "warps", "local", "at fault")
    return tabulate(rows, headers, "github", disable_numparse=True)


def predictions(found: list[Kernel] | list[TritonKernel]) -> str:
    """A line for each instance; times are in µs."""
    rows = []
    for kernel in found:
        inputs = [(dtype, input_shape(y, kernel.upsample)) for dtype, y in SHAPES]
        seconds = [kernel.seconds(x) for _, x in inputs]
        known = [times and dtype == kernel.dtype for times, (dtype, _) in zip(seconds, inputs, strict=True)]
        rows.append(
            (
                *(kernel.gpu.arch, kernel.name, kernel.dtype, kernel.columns, kernel.upsample),
                "channels_last" if kernel.channels_last else "NCHW",
                kernel.options,
                *(kernel.code.registers, kernel.code.local, kernel.shared),
                f"{kernel.warps} ({kernel.warps / kernel.gpu.warps:.0%})",
                f"{kernel.instructions:.1f}",
                _bound(*seconds[0]) if seconds[0] else "",
                *(f"{1e6 * max(times):.0f}" if of else "" for times, of in zip(seconds, known, strict=True)),
            )
        )
    headers = ("arch", "kernel", "dtype", "columns", "up", "layout", "options", "registers", "local", "shared", "warps")
    headers += ("instructions", "bound", *(_titled(dtype, y) for dtype, y in SHAPES))
    return tabulate(rows, headers, "github", disable_numparse=True)


def _bound(*times: float) -> str:
    longest, name = max(zip(times, ("bytes", "issue", "products")[: len(times)], strict=True), key=lambda of: of[0])
    return name if name == "bytes" else f"{name}, {longest / times[0]:.1f}x"


def layers(found: list[Kernel]) -> str:
    """A line for SPN and one for up → SPN → ReLU; times are in µs, and in brackets those of the bytes alone."""
    rows = []
    for gpu, (dtype, y), upsample, last in product(GPUS.values(), SHAPES, (1, 2), (False, True)):
        x = input_shape(y, upsample)
        times = {kernel.name: kernel.seconds(x) for kernel in found if _in_layer(kernel, gpu, dtype, upsample, last)}
        row = [gpu.arch, _titled(dtype, y), upsample, "channels_last" if last else "NCHW"]
        gemms = gemm_times(gpu, x, ITEMSIZES[dtype])
        for gemm, names in zip(gemms, ((STATISTICS, MODULATE), (REDUCE, APPLY)), strict=True):
            predicted, by_bytes = sum(max(times[name]) for name in names), sum(times[name][0] for name in names)
            row += [f"{1e6 * gemm:.0f}", f"{1e6 * predicted:.0f} ({1e6 * by_bytes:.0f})"]
        rows.append(row)
    headers = ("arch", "y", "up", "layout", "GEMM", "forward", "GEMMs", "backward")
    return tabulate(rows, headers, "github", disable_numparse=True)


def _in_layer(kernel: Kernel, gpu: GPU, dtype: str, upsample: int, channels_last: bool) -> bool:
    if (kernel.gpu, kernel.dtype, kernel.channels_last) != (gpu, dtype, channels_last):
        return False
    fits = kernel.upsample == upsample and kernel.relu == (kernel.name == REDUCE and upsample == 2)
    return fits or kernel.name == STATISTICS


def _titled(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {'x'.join(map(str, shape))}"


def _print_gates(title: str, found: list[Kernel] | list[TritonKernel]) -> list[str]:
    faults = [f"{kernel}: {violation}" for kernel in found for violation in kernel.violations()]
    print(f"\n## {title}", gates(found), *faults, sep="\n\n")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="show all, not only the usual paths; of Triton, compile all")
    arguments = parser.parse_args()
    if lacking := missing():
        sys.exit(f"the CUDA kernels cannot be compiled: {lacking}")
    found = kernels()
    walking = [kernel for kernel in found if kernel.design]
    usual = [kernel for kernel in walking if kernel.columns > 1 and kernel.dtype in ("float", "BFloat16")]
    faults = _print_gates("Gates", found)
    if all(kernel.code.moves for kernel in walking):  # else there is no main loop to go by
        print("\n## Predictions", "From the machine code; µs, for y of these shapes.", sep="\n\n", end="\n\n")
        print(predictions(walking if arguments.all else usual))
        print("\n## Predictions of the layer", layers(usual), sep="\n\n")
    if lacking := triton_code.missing():
        sys.exit(f"Triton's kernels cannot be compiled: {lacking}")
    ops = (triton_spn, triton_gconv, triton_statistics)
    wanted = [one for op in ops for one in (op.everything() if arguments.all else op.selection())]
    with Processes() as processes:
        of_triton = triton_kernels(processes, wanted)
    faults += _print_gates("Triton", of_triton)
    shown = of_triton if arguments.all else [kernel for kernel in of_triton if kernel.name in triton_gconv.KERNELS]
    print("\n## Predictions of Triton's", predictions(shown), sep="\n\n")
    sys.exit(f"{len(faults)} gates are not passed" if faults else 0)


if __name__ == "__main__":
    main()
