"""The CUDA C++ kernels, compiled by nvcc for GPUs that need not be there, and their gates (``machine_code.Kernel``)."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

from benchmarks.machine_code import BUILD, ROOT, STATISTICS, Function, Kernel, Moves, moves, read, run
from benchmarks.model import GPU, GPUS, KB, WARP
from setup import NVCC_FLAGS, STABLE_ABI

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
FLAGS = ["-cubin", "-std=c++20", *COMMON_NVCC_FLAGS, *NVCC_FLAGS, "-DUSE_CUDA", f"-D{'='.join(STABLE_ABI)}"]
ITEMSIZES = {"double": 8, "float": 4, "BFloat16": 2, "Half": 2}
WARPS_OF_DOUBLE = 8  # enough, and all that its registers allow


class Design(NamedTuple):
    """What a kernel template is designed for.

    Memory latency is about 700 ns, in which a copy moves 7 KB per SM of an RTX 3090 and 23 KB per SM of an H200: enough
    warps must fit to keep that many bytes in flight, at a few 16-byte loads per thread.
    """

    warps: dict[str, int]  # that an SM must have room for, by architecture
    moves: Callable[["CudaKernel"], Moves] = lambda kernel: Counter()  # of one round of the main loop; none: unchecked
    numbers: Callable[["CudaKernel"], int] = lambda kernel: 0  # of dynamic shared memory per block, as csrc launches it
    loads: Callable[["CudaKernel"], int] = lambda kernel: 0  # in flight per thread, a round, where inputs are streamed
    share: Callable[["CudaKernel"], float] = lambda kernel: 1  # of a vector's outputs, that a round computes
    sizes: tuple[str, ...] = ("columns", "upsample")  # its template arguments that are numbers


@dataclass(frozen=True)
class CudaKernel(Kernel):
    """An instance of a kernel template."""

    asked: Design
    name: str
    dtype: str
    columns: int
    upsample: int
    channels_last: bool
    relu: bool
    kernel_size: int

    may_spill, modelled = False, True

    @classmethod
    def of(cls, code: Function, gpu: GPU, designs: dict[str, Design]) -> "CudaKernel":
        name, arguments = re.search(r"(\w+)<(.*?)>\(", code.signature).groups()
        if name not in designs:
            raise ValueError(f"no file of benchmarks/ops has a design for {name}")
        dtype, *values = arguments.replace("c10::", "").split(", ")
        numbers = [int(value) for value in values if value.isdigit()]
        sizes = {"columns": 1, "upsample": 1, "kernel_size": 3} | dict(zip(designs[name].sizes, numbers, strict=False))
        channels_last, relu, *_ = [value == "true" for value in values if not value.isdigit()] + [False, False]
        return cls(gpu, code, designs[name], name, dtype, channels_last=channels_last, relu=relu, **sizes)

    def __str__(self) -> str:
        options = ["channels_last"] * self.channels_last + ["up"] * (self.upsample == 2) + ["relu"] * self.relu
        options += [f"k = {self.kernel_size}"] * (self.kernel_size != 3)
        return " ".join([self.name, self.dtype, f"x{self.columns}", *options, self.gpu.arch])

    @property
    def options(self) -> str:
        return "relu" * self.relu

    @property
    def itemsize(self) -> int:
        return ITEMSIZES[self.dtype]

    @property
    def block_warps(self) -> int:
        return self.code.threads // WARP

    @property
    def shared(self) -> int:
        """Bytes of shared memory of the largest block."""
        static = max(0, self.code.shared - (KB if self.gpu.capability >= (9, 0) else 0))
        return static + self.asked.numbers(self) * max(self.itemsize, 4)

    @property
    def warps_needed(self) -> int:
        needed = self.asked.warps[self.gpu.arch]
        return min(needed, WARPS_OF_DOUBLE) if self.dtype == "double" else needed

    @property
    def design(self) -> Moves:
        return self.asked.moves(self)

    @property
    def elements(self) -> float:
        return self.columns * (self.asked.loads(self) or self.upsample**2) * self.asked.share(self)

    def work(self, x: tuple[int, ...], reads: int) -> float:
        return prod(x) * reads if self.asked.loads(self) else super().work(x, reads)


def _loads_of_statistics(kernel: CudaKernel) -> int:
    return 2 if kernel.channels_last and kernel.columns > 4 else 4


# Kernels of no op, or of several.
SHARED = {
    STATISTICS: Design(
        {"sm_86": 24, "sm_90": 32},  # half of all: 4 loads per thread are 2 KB a warp
        lambda k: moves("LDG", 16 if k.columns > 1 else k.itemsize, count=_loads_of_statistics(k)),
        lambda k: 2 * k.code.threads * k.columns if k.channels_last else k.block_warps,
        _loads_of_statistics,
    ),
    "finish_statistics_kernel": Design({"sm_86": 1, "sm_90": 1}, numbers=lambda k: 3 * k.code.threads),
    "update_running_kernel": Design({"sm_86": 1, "sm_90": 1}),  # moves a few KB
}


def kernels(designs: dict[str, Design], sources: Iterable[Path] = SOURCES) -> list[CudaKernel]:
    """All instances for all of ``GPUS``, in the order of the designs; compiles what has changed."""
    jobs = list(product(sorted(sources, key=lambda source: -source.stat().st_size), GPUS.values()))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        codes = pool.map(lambda job: read(_compiled(job[0], job[1].arch)), jobs)
        found = [CudaKernel.of(code, gpu, designs) for (_, gpu), of in zip(jobs, codes, strict=True) for code in of]
    order = list(designs).index
    return sorted(found, key=lambda k: (k.gpu, order(k.name), k.dtype, k.columns, k.upsample, k.channels_last, k.relu))


def _compiled(source: Path, arch: str) -> Path:
    """The cubin, named after a hash of what goes into it."""
    command = ["nvcc", f"-arch={arch}", *FLAGS, *(f"-I{path}" for path in (ROOT / "csrc", *include_paths())), source]
    headers = sorted([*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.cuh")])
    made_of = [*map(str, command), torch.__version__, run("nvcc", "--version")]
    made_of += [path.read_text() for path in (source, *headers)]
    key = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    cubin = BUILD / f"{source.stem}.{arch}.{key}.cubin"
    if not cubin.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        part = cubin.with_suffix(f".{os.getpid()}")
        run(*command, "-o", part)
        part.rename(cubin)
        for old in BUILD.glob(f"{source.stem}.{arch}.*"):
            if key not in old.name:
                old.unlink(missing_ok=True)
    return cubin
