"""The Triton kernels as machine code, for GPUs that need not be there; ``benchmarks.kernels`` prints what is found.

Compiled is what SPN launches: the launches are recorded on meta tensors, and block sizes stand in triton_kernels alone.
Triton specialises its kernels; this is how it does where tensors are aligned and sizes are multiples of 16. The gates
(``TritonKernel.violations``):

- Nothing that a thread has in registers spills in the main loop, and beside it no more than ``PARKED`` bytes. Doubles
  and 5 x 5 taps may.
- The main loop has the loads and stores of the design, 16 bytes of a row of y at once in NCHW. (Beside them it loads
  neighbours, which are few bytes.)
- No lane waits for another while it walks: no barrier and no shared memory in the main loop, and in NCHW nowhere in
  the kernel. Triton puts them where what is computed next lies otherwise over the threads.
- Room for two warps for each of the four schedulers.
"""

import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from math import prod
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from benchmarks import machine_code
from benchmarks.machine_code import BUILD, Function, listed, read
from benchmarks.model import GPU, GPUS, OTHER_GPUS, WARP, kernel_bytes
from pixnorm import testing
from pixnorm.ops._dispatch import _triton_obstacle
from pixnorm.testing import SPN, Case

DTYPES = {"float": torch.float32, "BFloat16": torch.bfloat16, "Half": torch.float16, "double": torch.float64}
IN_SIGNATURES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64"}
TRITON_GPUS = sorted((GPUS | OTHER_GPUS).values())

STATISTICS, PROJECTION = "spn_statistics_kernel", "spn_projection_kernel"
MODULATE, REDUCE, APPLY = WALKS = "spn_fwd_modulate_kernel", "spn_bwd_reduce_kernel", "spn_bwd_apply_kernel"
# Of x: so few channels that the projection is a kernel of our own, and so many that it is not. In the first its
# statistics have so many parts that they are added up in two steps.
SHAPES = ((32, 64, 64, 64), (4, 256, 64, 64))
LEAST_WARPS = 8
# Bytes of local memory: ptxas puts a number or two there, and fetches it once, where that makes room for more warps.
PARKED = 16


class Configuration(NamedTuple):
    """What a call of SPN is specialised on."""

    dtype: str
    channels_last: bool = False
    upsample: int = 1
    relu: bool = False
    kernel_size: int = 3
    one_mask: bool = False

    @property
    def options(self) -> str:
        taps = [f"k = {self.kernel_size}"] * (self.kernel_size != 3)
        return ", ".join(["relu"] * self.relu + taps + ["one mask"] * self.one_mask)

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "NCHW"
        return ", ".join([self.dtype, layout, *["up"] * (self.upsample == 2), *[self.options] * bool(self.options)])


def selection() -> list[tuple[Configuration, GPU]]:
    """Few enough for every run of the tests; ``everything`` is for ``python -m benchmarks.kernels --all``.

    In float32 and in bfloat16, each row of the tables of block sizes is here for one GPU: of the four pairs of layout
    and upsampling each GPU has one, and in bfloat16 the opposite one. So each GPU has each kernel that walks in both;
    the others it has in the one that comes first. What else there is, in NCHW, for one GPU each. Half is as bfloat16.
    """
    walks = [(last, upsample, upsample == 2) for last, upsample in product((False, True), (1, 2))]
    found = []
    for i, gpu in enumerate(TRITON_GPUS):
        of_both = [Configuration("float", *walks[i]), Configuration("BFloat16", *walks[~i])]
        found += [(of, gpu) for of in (of_both if i % 2 == 0 else of_both[::-1])]
    others = [
        Configuration("double"),
        Configuration("float", kernel_size=1),
        Configuration("float", kernel_size=5),
        Configuration("float", one_mask=True),
    ]
    return found + list(zip(others, TRITON_GPUS, strict=True))


def everything() -> list[tuple[Configuration, GPU]]:
    """All that kernels are specialised on, for all GPUs."""
    options = product(DTYPES, (False, True), (1, 2), (False, True), ((3, False), (3, True), (1, False), (5, False)))
    configurations = [Configuration(*of_x, *of_parameters) for *of_x, of_parameters in options]
    return list(product(configurations, TRITON_GPUS))


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
    def of(cls, configuration: Configuration, kernel, arguments: tuple, options: dict[str, Any]) -> "Launch":
        """As Triton does: by what addresses and, if the kernel allows, sizes are multiples of 16, and sizes are 1."""
        constants = {name: options[name] for name in kernel.arg_names if name in options}
        signature, attributes = {}, {}
        for i, name in enumerate(kernel.arg_names):
            value = 1 if name in constants else arguments[i]
            if isinstance(value, torch.Tensor):
                signature[name] = IN_SIGNATURES[value.dtype]
            else:
                specialised = name in constants or not kernel.params[i].do_not_specialize
                signature[name] = "constexpr" if value == 1 and specialised else "i32"
            if signature[name] == "constexpr":
                constants.setdefault(name, value)
            elif isinstance(value, torch.Tensor) or (specialised and value % 16 == 0):
                attributes[i,] = [["tt.divisibility", 16]]
        of_compiler = {name: value for name, value in options.items() if name not in constants}
        return cls(configuration, kernel.fn.__module__, kernel.__name__, signature, constants, attributes, of_compiler)

    def __str__(self) -> str:
        return f"{self.name} {self.configuration}"

    @property
    def name(self) -> str:
        """The kernel's, with what it is there for where that are two things."""
        if self.kernel == PROJECTION:
            return f"{PROJECTION}, {'forward' if self.constants['STATISTICS'] else 'backward'}"
        return self.kernel

    @property
    def walks(self) -> bool:
        return self.kernel in WALKS

    def key(self, *but: str) -> str:
        """The same one for what compiles to the same code."""
        return repr([value for name, value in self._asdict().items() if name not in ("configuration", *but)])


def launches(configuration: Configuration) -> list[Launch]:
    """Those of a forward and a backward in training."""
    _import_kernels()
    from pixnorm.triton_kernels import projection, spn, statistics

    found = {}

    def record(wrapped, grid, *arguments, **options):
        kernel = getattr(wrapped, "kernel", wrapped)
        launch = Launch.of(configuration, kernel, arguments, options)
        # Both shapes have most of them, and differ in what their sizes can be divided by.
        found.setdefault(launch.key("signature", "attributes"), launch)

    options = {"upsample": configuration.upsample, "activation": "relu" if configuration.relu else None}
    sizes = {"kernel_size": configuration.kernel_size} | ({"masks": 1} if configuration.one_mask else {})
    dtype = DTYPES[configuration.dtype]
    parameters = dtype if dtype == torch.float64 else torch.float32
    layout = "channels_last" if configuration.channels_last else "contiguous"
    with ExitStack() as recording:
        recording.enter_context(patch.object(testing.spn, "_ops", lambda impl: (spn.spn_fwd, spn.spn_bwd)))
        for module in (spn, statistics, projection):
            recording.enter_context(patch.object(module, "launch", record))
        for shape in SHAPES:
            case = Case(shape, "", options, sizes=sizes)
            tensors = SPN.inputs(case, dtype, parameter_dtype=parameters, layout=layout, device="meta")
            for function, arguments in SPN.kernel_calls("triton", tensors, options):
                function(*arguments)
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
    if obstacle := _triton_obstacle("meta"):
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
    """A launch, as it is for one GPU: what the reports ask of ``benchmarks.kernels.Kernel`` this answers too."""

    gpu: GPU
    code: Function
    shared: int
    launch: Launch

    def __str__(self) -> str:
        return f"{self.launch} {self.gpu.arch}"

    def __getattr__(self, name: str):
        """Of the configuration."""
        return getattr(self.launch.configuration, name)

    @property
    def name(self) -> str:
        return self.launch.name

    @property
    def walks(self) -> bool:
        return self.launch.walks

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
        """The ``Function.moves`` of a round of the main loop, but for neighbours and what is one number a channel.

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
        """How many the main loop has."""
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

    def violations(self) -> list[str]:
        """The gates that it does not pass, and why."""
        found = []
        in_loop = any(opcode in self.code.local_moves for opcode in self.code.main_loop)
        if (in_loop or self.code.local > PARKED) and self.dtype != "double" and self.kernel_size < 5:
            found.append(f"{self.code.local} bytes of local memory: {self.code.local_moves}")
        wanted = Counter({move: self.rounds * count for move, count in self.design.items()})
        # Statistics of the projection's tiles are stored as they come.
        beyond = [move for move in self.code.moves - wanted if move[0] == "STG"] if self.walks else []
        if wanted - self.code.moves or beyond:
            found.append(f"moves in the main loop: {listed(self.code.moves)}, not {listed(self.design)}")
        code = self.code.main_loop if self.channels_last else self.code.opcodes
        waits = sorted({opcode for opcode in code if opcode.startswith(("BAR", "LDS", "STS"))})
        if self.walks and (waits or (self.shared and not self.channels_last)):
            found.append(f"{self.shared} bytes of shared memory, {waits}")
        if self.warps < self.warps_needed:
            found.append(f"room for {self.warps} warps, not {self.warps_needed}")
        return found

    def seconds(self, x: tuple[int, ...]) -> tuple[float, float] | None:
        """Predictions for an input of that shape: by bytes, and by instructions. None where there is no model."""
        if self.one_mask or not self.design:
            return None
        # In both layouts the bytes of channels_last: apply never writes a copy of x here.
        moved = kernel_bytes(x, self.itemsize, self.upsample, channels_last=True)[self.name]
        elements = prod(x) * (self.upsample**2 if self.walks else 2 if self.launch.kernel == STATISTICS else 1)
        return moved / self.gpu.copy, elements * self.instructions / self.gpu.issue


def missing() -> str | None:
    """What this machine lacks. Neither a GPU nor the CUDA toolkit is needed."""
    if find_spec("triton") is None:
        return "not found: triton"
    return machine_code.missing(["nvdisasm", "cuobjdump", "c++filt"])


def triton_kernels(processes: Processes, all_of_them: bool = False) -> list[TritonKernel]:
    """Those of ``selection`` or of ``everything``, each as it is for the GPU beside it; compiles what has changed."""
    wanted = everything() if all_of_them else selection()
    configurations = list(dict.fromkeys(configuration for configuration, _ in wanted))
    recorded = dict(zip(configurations, processes.map(launches, [(of,) for of in configurations]), strict=True))
    jobs = {}
    for of, gpu in wanted:
        for launch in recorded[of]:
            key = launch.key() if all_of_them or launch.walks else launch.name
            jobs.setdefault((gpu.arch, key), (launch, gpu))
    slow_first = sorted(jobs.values(), key=lambda job: (job[0].kernel == REDUCE, job[0].configuration[1:]))[::-1]
    codes = processes.map(compiled, slow_first)
    found = [TritonKernel(gpu, *code, launch) for (launch, gpu), code in zip(slow_first, codes, strict=True)]
    return sorted(found, key=lambda kernel: (kernel.gpu, kernel.name, kernel.launch.configuration))
