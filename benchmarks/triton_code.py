"""The Triton kernels, compiled for GPUs that need not be there; the gates are in ``benchmarks.machine_code``.

What is compiled is what the ops launch: launches are recorded on meta tensors, so block sizes stand in triton_kernels
alone. Pointers are aligned; sizes are specialised as Triton does it: on 1, on multiples of 16, and on nothing.
"""

import multiprocessing
import os
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from math import prod
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar, NamedTuple
from unittest.mock import patch

import torch

from benchmarks import machine_code
from benchmarks.machine_code import BUILD, STATISTICS, Function, Kernel, Moves, moves, read
from benchmarks.model import GPU, GPUS, OTHER_GPUS, WARP
from pixnorm import ops
from pixnorm.ops._dispatch import triton_obstacle
from pixnorm.testing import Case, OpSpec

DTYPES = {"float": torch.float32, "BFloat16": torch.bfloat16, "Half": torch.float16, "double": torch.float64}
TRITON_GPUS = sorted((GPUS | OTHER_GPUS).values())


@dataclass(frozen=True, order=True)
class Configuration:
    """What a call of an op is specialised on. An op's subclass has more fields, and says which kernels to compile:
    ``selection()`` in every run of the tests, ``everything()`` with ``--all``.
    """

    kernels: ClassVar[dict[str, type["TritonKernel"]]]  # those with a design
    spec: ClassVar[OpSpec]
    upsample = 1  # no field, as not all have it
    modelled = True  # whether there are predictions
    may_spill = False
    options = ""  # the other fields, in words

    dtype: str
    channels_last: bool = False

    def cases(self) -> Iterable[Case]:
        """Calls that together launch every kernel of the configuration."""
        raise NotImplementedError

    def arguments(self, given: tuple) -> tuple:
        """Those of an op, from the ones that the harness gives."""
        return given

    def run(self) -> None:
        """Forward and backward of all cases in training, on meta tensors."""
        parameters = torch.float32 if self.spec.float32_parameters and self.dtype != "double" else DTYPES[self.dtype]
        layout = "channels_last" if self.channels_last else "contiguous"
        for case in self.cases():
            given = {"parameter_dtype": parameters, "layout": layout, "device": "meta"}
            tensors = self.spec.inputs(case, DTYPES[self.dtype], **given)
            for function, arguments in self.spec.kernel_calls("triton", tensors, case.options):
                function(*self.arguments(arguments))

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "NCHW"
        return ", ".join([self.dtype, layout, *["up"] * (self.upsample == 2), *[self.options] * bool(self.options)])


class Wanted(NamedTuple):
    """Kernels to compile for a GPU: those named of a configuration, or all."""

    configuration: Configuration
    gpu: GPU
    kernels: tuple[str, ...] = ()


# ---- launches, and what they compile to ----


@dataclass(frozen=True)
class Pointer:
    """A tensor, as Triton sees it when it compiles."""

    dtype: torch.dtype
    address: int = 0

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True)
class PretendedGPU:
    """A driver for Triton that compiles for a compute capability, 90 for 9.0, and cannot launch."""

    arch: int

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, WARP)

    def get_current_device(self) -> int:
        return self.arch  # kernels remember the target of a device

    def get_current_stream(self, device: int) -> int:
        return 0


class Launch(NamedTuple):
    """A kernel specialised for a call."""

    configuration: Configuration  # one that launches it
    module: str
    kernel: str
    arguments: dict[str, Any]
    sizes: dict[str, int]  # the arguments that are no pointers, and not known at compile time
    options: dict[str, int]  # of the compiler

    @classmethod
    def of(cls, configuration: Configuration, kernel, arguments: tuple, options: dict[str, Any]) -> "Launch":
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | options
        known, sizes = {}, {}
        for parameter in kernel.params:
            value = given.pop(parameter.name)
            if isinstance(value, torch.Tensor):
                known[parameter.name] = Pointer(value.dtype)
            elif parameter.is_constexpr:
                known[parameter.name] = value
            else:  # one size stands for all that compile to the same code
                any_size = parameter.do_not_specialize or (value != 1 and value % 16)
                sizes[parameter.name] = 17 if any_size else min(value, 16)
        return cls(configuration, kernel.fn.__module__, kernel.__name__, known, sizes, given)

    def __str__(self) -> str:
        return f"{self.kernel} {self.configuration}"


@contextmanager
def in_place_of_launch(function: Callable) -> Iterator[None]:
    """Ops in Triton run eagerly, and call ``function(kernel, grid, *arguments, **options)`` in place of ``launch``."""
    import_kernels()
    from pixnorm import triton_kernels

    kernels, wrappers = (
        [import_module(f"{package.__name__}.{entry.name}") for entry in pkgutil.iter_modules(package.__path__)]
        for package in (triton_kernels, ops)
    )
    functions = {name: value for module in kernels for name, value in vars(module).items()}

    def plain(name: str, backward: str = "bwd") -> tuple[Callable, Callable]:
        return functions[f"{name}_fwd"], functions[f"{name}_{backward}"]

    with ExitStack() as stack:
        for module in (module for module in kernels if hasattr(module, "launch")):
            stack.enter_context(patch.object(module, "launch", function))
        for module in (module for module in wrappers if hasattr(module, "triton_ops")):
            stack.enter_context(patch.object(module, "triton_ops", plain))
        yield


def import_kernels() -> None:
    if obstacle := triton_obstacle("meta"):
        raise RuntimeError(obstacle)


def launches(configuration: Configuration) -> list[Launch]:
    """Those of a configuration's calls."""
    found: dict[str, Launch] = {}

    def record(wrapped, grid, *arguments, **options) -> None:
        launch = Launch.of(configuration, getattr(wrapped, "kernel", wrapped), arguments, options)
        constant = [name for name, size in launch.sizes.items() if size == 1]
        found.setdefault(repr(launch._replace(sizes=constant)), launch)  # once, whatever divides the sizes of a case

    with in_place_of_launch(record):
        configuration.run()
    return list(found.values())


def compiled(launch: Launch, gpu: GPU) -> tuple[Function, int]:
    """The machine code, and the bytes of shared memory that a launch asks for."""
    import_kernels()
    import triton
    from triton.runtime.cache import get_cache_manager

    triton.runtime.driver.set_active(PretendedGPU(int(gpu.arch.removeprefix("sm_"))))
    kernel = getattr(import_module(launch.module), launch.kernel)
    done = kernel.run(grid=(1,), warmup=True, **launch.arguments, **launch.sizes, **launch.options)
    (code,) = read(Path(get_cache_manager(done.hash).get_file(f"{launch.kernel}.cubin")))
    return code, done.metadata.shared


class Processes:
    """Compilers, one per core and half a GB each, in processes: an assertion in Triton's compiler ends its own."""

    def __enter__(self) -> "Processes":
        # Interpreted kernels cannot be compiled.
        surroundings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(BUILD / "triton")}
        self._environment = patch.dict(os.environ, surroundings)
        self._environment.start()
        self._idle: SimpleQueue[ProcessPoolExecutor | None] = SimpleQueue()  # None: not started yet
        for _ in range(min(16, os.cpu_count() or 1)):
            self._idle.put(None)
        return self

    def __exit__(self, *_) -> None:
        while not self._idle.empty():
            if process := self._idle.get():
                process.shutdown()
        self._environment.stop()

    def map(self, function: Callable, jobs: Iterable[tuple]) -> list:
        """``function`` of each job. Raises RuntimeError with the job that failed."""

        def run(job: tuple):
            process = self._idle.get() or ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            titled = " ".join(part.arch if isinstance(part, GPU) else str(part) for part in job)
            try:
                return process.submit(function, *job).result()
            except BrokenProcessPool:
                process = None
                raise RuntimeError(f"{titled}: the compiler died") from None
            except Exception as error:
                raise RuntimeError(f"{titled}: {error}") from error
            finally:
                self._idle.put(process)

        with ThreadPoolExecutor(self._idle.qsize()) as threads:
            return list(threads.map(run, jobs))


# ---- what the machine code shows ----


@dataclass(frozen=True)
class TritonKernel(Kernel):
    """A launch, compiled for one GPU. Subclasses have designs; without one, the main loop is not checked."""

    shared: int
    launch: Launch

    warps_needed = 8  # two for each of the four schedulers
    parked = 16  # ptxas may spill a number or two that it loads once, where that makes room for more warps
    copies_x = False

    def __str__(self) -> str:
        return f"{self.name} {self.launch.configuration} {self.gpu.arch}"

    @property
    def may_spill(self) -> bool:
        # With registers to spare, ptxas of Triton 3.8 spills up to 32 bytes in some loops; that of 3.7 none.
        newer = tuple(map(int, version("triton").split(".")[:2])) >= (3, 8)
        return self.launch.configuration.may_spill or (newer and self.code.local <= 32)

    def __getattr__(self, name: str):
        """Of the configuration."""
        return getattr(self.launch.configuration, name)

    @property
    def name(self) -> str:
        """The kernel's name, and its role where it has two."""
        return self.launch.kernel

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def columns(self) -> int:
        return self.launch.arguments.get("V", 1)

    def counts_rounds(self, kind: str, width: int) -> bool:
        return False

    def may_move(self, beyond: Moves) -> bool:
        return True


MULTIPLIERS = ("HGMMA", "HMMA", "DMMA")


class ProductKernel(TritonKernel):
    """A kernel that multiplies matrices, with one gate more: by which tensor cores."""

    @property
    def multiplier(self) -> str | None:
        """The tensor-core instruction of the design, None for products without."""
        raise NotImplementedError

    def violations(self) -> list[str]:
        found = super().violations()
        used = {opcode.split(".")[0] for opcode in self.code.main_loop} & {*MULTIPLIERS}
        if used != {self.multiplier} - {None}:
            found.append(f"multiplies by {sorted(used) or 'no'} tensor cores, not {self.multiplier}")
        return found


class TileKernel(TritonKernel):
    """A kernel that goes over the tiles of triton_kernels/tiles.py."""

    @property
    def elements(self) -> float:
        """Of x, per thread and round."""
        return self.launch.arguments["CHANNELS"] * self.launch.arguments["PIXELS"] / self.code.threads

    def work(self, x: tuple[int, ...], reads: int) -> float:
        return prod(x)


class PlanesKernel(TileKernel):
    """One whose only tile has whole planes, so that there is no loop."""

    @property
    def moves(self) -> Moves:
        return self.code.all_moves

    @property
    def instructions(self) -> float:
        return sum(self.code.opcodes.values()) / self.elements


class StatisticsKernel(TritonKernel):
    @property
    def design(self) -> Moves:
        return moves("LDG", max(16, int(self.elements) * self.itemsize))

    @property
    def elements(self) -> float:
        return self.launch.arguments["ROWS"] * self.launch.arguments["COLUMNS"] / self.code.threads

    def work(self, x: tuple[int, ...], reads: int) -> float:
        return prod(x) * reads


SHARED = {STATISTICS: StatisticsKernel}  # kernels of several ops


@dataclass(frozen=True, order=True)
class StatisticsConfiguration(Configuration):
    """Statistics of instances. Those of batches are compiled with the ops that launch them."""

    kernels: ClassVar = {}
    modelled = False

    small_planes: bool = False

    @property
    def options(self) -> str:
        return "instance" + ", small planes" * self.small_planes

    def run(self) -> None:
        from pixnorm.triton_kernels.statistics import statistics

        # A plane of one tile; and so large that it has several parts, which are merged in one step.
        shape = (64, 256, 8, 8) if self.small_planes else (4, 64, 256, 256)
        formats = {"memory_format": torch.channels_last} if self.channels_last else {}
        x = torch.empty(shape, dtype=DTYPES[self.dtype], device="meta").contiguous(**formats)
        statistics([x], instance=True)

    @classmethod
    def selection(cls) -> list[Wanted]:
        """Each kernel in both layouts and with both sizes of planes, on the GPUs in turn."""
        usual = product(("float", "BFloat16"), (False, True), (False, True))
        found = [Wanted(cls(*of), TRITON_GPUS[i % len(TRITON_GPUS)]) for i, of in enumerate(usual)]
        return [*found, Wanted(cls("double"), TRITON_GPUS[0])]

    @classmethod
    def everything(cls) -> list[Wanted]:
        configurations = [cls(*of) for of in product(DTYPES, (False, True), (False, True))]
        return [Wanted(*pair) for pair in product(configurations, TRITON_GPUS)]


def missing() -> str | None:
    """What this machine lacks. Neither a GPU nor the CUDA toolkit is needed."""
    tools = "nvdisasm", "cuobjdump", "c++filt"
    return machine_code.missing(tools) if find_spec("triton") else "not found: triton"


def kernel_of(launch: Launch, gpu: GPU, code: Function, shared: int) -> TritonKernel:
    return (SHARED | launch.configuration.kernels).get(launch.kernel, TritonKernel)(gpu, code, shared, launch)


def kernels(processes: Processes, wanted: Sequence[Wanted]) -> list[TritonKernel]:
    """The kernels that are wanted; compiles what has changed."""
    configurations = list(dict.fromkeys(of for of, *_ in wanted))
    recorded = dict(zip(configurations, processes.map(launches, [(of,) for of in configurations]), strict=True))
    jobs = {}
    for of, gpu, kernels in wanted:
        for launch in recorded[of]:
            if not kernels or launch.kernel in kernels:
                jobs.setdefault((gpu.arch, repr(launch[1:])), (launch, gpu))
    slow_first = sorted(jobs.values(), key=lambda job: "reduce" not in job[0].kernel)
    codes = processes.map(compiled, slow_first)
    found = [kernel_of(*job, *code) for job, code in zip(slow_first, codes, strict=True)]
    return sorted(found, key=lambda kernel: (kernel.gpu, kernel.name, str(kernel.launch.configuration)))
