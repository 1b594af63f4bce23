"""The Triton kernels as machine code, for GPUs that need not be there; ``benchmarks.kernels`` prints what is found.

Compiled is what the ops launch: the launches are recorded on meta tensors, and block sizes stand in triton_kernels
alone. Triton specialises its kernels; this is how it does where tensors are aligned and sizes are multiples of 16. Each
op has a file of its own, ``benchmarks.triton_spn`` and ``benchmarks.triton_gconv``: what it is specialised on, and what
its kernels should look like. The gates of all (``TritonKernel.violations``; ops have more):

- Nothing that a thread has in registers spills in the main loop, and beside it no more than ``PARKED`` bytes.
- The main loop has the loads and stores of the design.
- Room for two warps for each of the four schedulers.
"""

import multiprocessing
import os
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar, NamedTuple
from unittest.mock import patch

import torch

from benchmarks import machine_code
from benchmarks.machine_code import BUILD, Function, listed, read
from benchmarks.model import GPU, GPUS, OTHER_GPUS, WARP
from pixnorm.ops._dispatch import triton_obstacle

DTYPES = {"float": torch.float32, "BFloat16": torch.bfloat16, "Half": torch.float16, "double": torch.float64}
IN_SIGNATURES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64"}
TRITON_GPUS = sorted((GPUS | OTHER_GPUS).values())

LEAST_WARPS = 8
# Bytes of local memory: ptxas puts a number or two there, and fetches it once, where that makes room for more warps.
PARKED = 16


@dataclass(frozen=True, order=True)
class Configuration:
    """What a call of an op is specialised on; each op has more."""

    of_kernel: ClassVar[type["TritonKernel"]]
    upsample = 1  # no field, as not all have it

    dtype: str
    channels_last: bool = False

    @property
    def layout(self) -> str:
        return "channels_last" if self.channels_last else "contiguous"

    @property
    def options(self) -> str:
        """The rest of it, in words."""
        raise NotImplementedError

    def call(self) -> None:
        """A forward and a backward in training, on meta tensors: the functions that launch kernels, not the ops."""
        raise NotImplementedError

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "NCHW"
        return ", ".join([self.dtype, layout, *["up"] * (self.upsample == 2), *[self.options] * bool(self.options)])


class Wanted(NamedTuple):
    """Kernels to look at: those of a configuration, on a GPU; all that it has, if none is named."""

    configuration: Configuration
    gpu: GPU
    kernels: tuple[str, ...] = ()


# ---- launches, and what they compile to ----


class Launch(NamedTuple):
    """A kernel, specialised for a call of it: what Triton compiles.

    Attributes:
        configuration: one that it is part of.
        module, kernel: where it is defined, and its name.
        signature: types of all arguments.
        constants: those that are known when it is compiled.
        attributes: of the others: by what they can be divided.
        options: of the compiler.
    """

    configuration: Configuration
    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list]
    options: dict[str, int]

    @classmethod
    def of(cls, configuration: Configuration, kernel, arguments: dict[str, Any]) -> "Launch":
        """As Triton does: by what addresses and, if the kernel allows, sizes are multiples of 16, and sizes are 1."""
        constants = {param.name: arguments[param.name] for param in kernel.params if param.is_constexpr}
        signature, attributes = {}, {}
        for i, name in enumerate(kernel.arg_names):
            value = 1 if name in constants else arguments[name]
            if isinstance(value, torch.Tensor):
                signature[name] = IN_SIGNATURES[value.dtype]
            else:
                specialised = name in constants or not kernel.params[i].do_not_specialize
                signature[name] = "constexpr" if value == 1 and specialised else "i32"
            if signature[name] == "constexpr":
                constants.setdefault(name, value)
            elif isinstance(value, torch.Tensor) or (specialised and value % 16 == 0):
                attributes[i,] = [["tt.divisibility", 16]]
        of_compiler = {name: value for name, value in arguments.items() if name not in kernel.arg_names}
        return cls(configuration, kernel.fn.__module__, kernel.__name__, signature, constants, attributes, of_compiler)

    def __str__(self) -> str:
        return f"{self.kernel} {self.configuration}"

    def key(self, *but: str) -> str:
        """The same one for what compiles to the same code."""
        return repr([value for name, value in self._asdict().items() if name not in ("configuration", *but)])


def launches(configuration: Configuration) -> list[Launch]:
    """Those of a forward and a backward in training."""
    _import_kernels()
    from pixnorm import triton_kernels

    found = {}

    def record(wrapped, grid, **arguments):
        kernel = getattr(wrapped, "kernel", wrapped)
        launch = Launch.of(configuration, kernel, arguments)
        # Calls of two shapes may have most of them, and differ in what their sizes can be divided by.
        found.setdefault(launch.key("signature", "attributes"), launch)

    with ExitStack() as recording:
        for entry in pkgutil.iter_modules(triton_kernels.__path__):
            module = import_module(f"{triton_kernels.__name__}.{entry.name}")
            if hasattr(module, "launch"):
                recording.enter_context(patch.object(module, "launch", record))
        configuration.call()
    return list(found.values())


def compiled(launch: Launch, gpu: GPU) -> tuple[Function, int]:
    """The machine code, and the bytes of shared memory that a launch asks for."""
    _import_kernels()
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.cache import get_cache_manager

    kernel = getattr(import_module(launch.module), launch.kernel)
    source = ASTSource(kernel, launch.signature, launch.constants, launch.attributes)
    target = GPUTarget("cuda", int(gpu.arch.removeprefix("sm_")), WARP)
    done = triton.compile(source, target=target, options=launch.options)
    (code,) = read(Path(get_cache_manager(done.hash).get_file(f"{launch.kernel}.cubin")))
    return code, done.metadata.shared


def _import_kernels() -> None:
    if obstacle := triton_obstacle("meta"):
        raise RuntimeError(obstacle)


class Processes:
    """One for each core; each takes half a GB. An assertion in Triton's compiler ends the process that it is in."""

    def __enter__(self) -> "Processes":
        # Kernels that are interpreted cannot be compiled.
        surroundings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(BUILD / "triton")}
        self._environment = patch.dict(os.environ, surroundings)
        self._environment.start()
        self._idle: SimpleQueue[ProcessPoolExecutor] = SimpleQueue()
        for _ in range(min(16, os.cpu_count() or 1)):
            self._idle.put(self._start())
        return self

    def __exit__(self, *_) -> None:
        while not self._idle.empty():
            self._idle.get().shutdown()
        self._environment.stop()

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def map(self, function: Callable, jobs: Iterable[tuple]) -> list:
        """``function`` of each job. Raises RuntimeError with the job that failed."""

        def run(job: tuple):
            process = self._idle.get()
            try:
                return process.submit(function, *job).result()
            except BrokenProcessPool:
                process = self._start()
                raise RuntimeError(f"{_titled(job)}: the compiler died") from None
            except Exception as error:
                raise RuntimeError(f"{_titled(job)}: {error}") from error
            finally:
                self._idle.put(process)

        with ThreadPoolExecutor(self._idle.qsize()) as threads:
            return list(threads.map(run, jobs))


def _titled(job: tuple) -> str:
    return " ".join(part.arch if isinstance(part, GPU) else str(part) for part in job)


# ---- what the machine code shows ----


class TritonKernel(NamedTuple):
    """A launch, as it is for one GPU: what the reports ask of ``benchmarks.kernels.Kernel`` this answers too.

    Each op has a class of its own, which knows ``design`` and what follows from it.
    """

    gpu: GPU
    code: Function
    shared: int
    launch: Launch

    def __str__(self) -> str:
        return f"{self.name} {self.launch.configuration} {self.gpu.arch}"

    def __getattr__(self, name: str):
        """Of the configuration."""
        return getattr(self.launch.configuration, name)

    @property
    def name(self) -> str:
        """The kernel's, with what it is there for where that are two things."""
        return self.launch.kernel

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def columns(self) -> int:
        """Of x that a lane has."""
        return self.launch.constants.get("V", 1)

    @property
    def warps(self) -> int:
        """The warps that an SM has room for."""
        return self.gpu.occupancy(self.code.threads, self.code.registers, self.shared)

    @property
    def warps_needed(self) -> int:
        return LEAST_WARPS

    @property
    def design(self) -> Counter[tuple[str, int]]:
        """The ``Function.moves`` that a round of the main loop must have."""
        raise NotImplementedError

    @property
    def rounds(self) -> int:
        """How many the main loop has."""
        raise NotImplementedError

    @property
    def instructions(self) -> float:
        """Of the main loop, per element."""
        raise NotImplementedError

    @property
    def may_spill(self) -> bool:
        return False

    def may_move(self, beyond: Counter[tuple[str, int]]) -> bool:
        """Whether the main loop may have these moves that are not of the design."""
        return True

    def violations(self) -> list[str]:
        """The gates that it does not pass, and why."""
        found = []
        in_loop = any(opcode in self.code.local_moves for opcode in self.code.main_loop)
        if (in_loop or self.code.local > PARKED) and not self.may_spill:
            found.append(f"{self.code.local} bytes of local memory: {self.code.local_moves}")
        wanted = Counter({move: self.rounds * count for move, count in self.design.items()})
        if wanted - self.code.moves or not self.may_move(self.code.moves - wanted):
            found.append(f"moves in the main loop: {listed(self.code.moves)}, not {listed(self.design)}")
        if self.warps < self.warps_needed:
            found.append(f"room for {self.warps} warps, not {self.warps_needed}")
        return found

    def seconds(self, x: tuple[int, ...]) -> tuple[float, ...] | None:
        """Predictions for an input of that shape: by bytes, by instructions, and, if it multiplies, by products.

        None where there is no model.
        """
        raise NotImplementedError


def missing() -> str | None:
    """What this machine lacks. Neither a GPU nor the CUDA toolkit is needed."""
    if find_spec("triton") is None:
        return "not found: triton"
    return machine_code.missing(["nvdisasm", "cuobjdump", "c++filt"])


def triton_kernels(processes: Processes, wanted: Iterable[Wanted]) -> list[TritonKernel]:
    """The kernels that are wanted, each as it is for the GPU beside it; compiles what has changed."""
    wanted = list(wanted)
    configurations = list(dict.fromkeys(of for of, *_ in wanted))
    recorded = dict(zip(configurations, processes.map(launches, [(of,) for of in configurations]), strict=True))
    jobs = {}
    for of, gpu, kernels in wanted:
        for launch in recorded[of]:
            if not kernels or launch.kernel in kernels:
                jobs.setdefault((gpu.arch, launch.key()), (launch, gpu))
    slow_first = sorted(jobs.values(), key=lambda job: "reduce" not in job[0].kernel)
    codes = processes.map(compiled, slow_first)
    compiled_jobs = zip(slow_first, codes, strict=True)
    found = [launch.configuration.of_kernel(gpu, *code, launch) for (launch, gpu), code in compiled_jobs]
    return sorted(
        found, key=lambda kernel: (kernel.gpu, kernel.name, type(kernel).__name__, kernel.launch.configuration)
    )
