"""``python -m benchmarks.gpu.precompile --cache DIR``: compile what tests and benchmarks will launch in Triton.

The ops are called on meta tensors, and what they launch is compiled by Triton's own path and not run: so what lies in
the cache afterwards is what a launch looks for. ``--arch 90`` needs no GPU.
"""

import argparse
import multiprocessing
import os
import pkgutil
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from importlib import import_module
from itertools import product
from multiprocessing.managers import SyncManager
from pathlib import Path
from queue import Queue
from unittest.mock import patch

import torch

import pixnorm.ops
from benchmarks.gpu.cases import BATCHES, KERNEL_SHAPES, LAYER_SHAPES, MIXING_SHAPES, SMALL_SHAPES
from benchmarks.gpu.processes import end_with_parent
from benchmarks.test_spn import HEADS
from benchmarks.test_spn import case as case_of
from pixnorm.ops._dispatch import triton_obstacle
from pixnorm.testing import DENSE_LAYOUTS, DTYPES, SPECS, SPN, Case, OpSpec, evaluate

# Of x, beside those of the benchmarks: what the first checks and the tests of many things are called with.
SHAPES = ((3, 17, 7, 10), (8, 64, 32, 32), (2, 3, 4, 5), (4, 64, 16, 16))


def jobs() -> Iterator[tuple]:
    """Op, case, dtypes, layout, whether TF32 is allowed; what is needed first comes first."""
    for (dtype, parameters), tf32 in product(DTYPES, (True, False)):
        if tf32 and dtype != torch.float32:
            continue
        for spec in SPECS:
            if (dtype, parameters) in spec.dtypes:
                for case, layout in product([*checked(spec), *measured(spec)], DENSE_LAYOUTS):
                    yield spec.name, case, dtype, parameters, layout, tf32
    for spec in SPECS:
        for case, (dtype, parameters), layout in product(spec.cases, spec.dtypes, DENSE_LAYOUTS):
            if spec.in_rotation(case, dtype, parameters, layout):
                yield spec.name, case, dtype, parameters, layout, False


def checked(spec: OpSpec) -> Iterator[Case]:
    for shape, variant in product(SHAPES, spec.variants):
        yield Case(shape, "", variant)


def measured(spec: OpSpec) -> Iterator[Case]:
    """As ``benchmarks.gpu.cases`` calls the op; the same kernels serve many shapes, and then cost no time here."""
    in_generators = [(batch, 256, side, side) for batch, side in product(BATCHES, (4, 8, 16, 32))]
    if spec is SPN:
        for shape in dict.fromkeys((*LAYER_SHAPES, *KERNEL_SHAPES, *SMALL_SHAPES, *in_generators)):
            for head in HEADS:
                yield case_of(head, shape)
            yield Case(shape, "", {"activation": "relu"})
    else:
        for shape in dict.fromkeys((*MIXING_SHAPES, *in_generators)):
            yield Case(shape, "", sizes={"bias": 0})


class PretendedGPU:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(wrapped, grid, **arguments) -> None:
    """In the place of ``launch``."""
    getattr(wrapped, "kernel", wrapped).run(grid=grid, warmup=True, **arguments)


def compile_call(spec: OpSpec, case: Case, dtype, parameter_dtype, layout: str, tf32: bool) -> None:
    """The kernels of a forward and a backward."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    tensors = spec.inputs(case, dtype, parameter_dtype=parameter_dtype, layout=layout, device="meta")
    evaluate(spec, spec.call("triton"), tensors, case.options)


def compiling(arch: int | None) -> ExitStack:
    """While it lasts, ops in Triton call what launches their kernels, which compiles them instead."""
    if arch is not None:
        import triton

        triton.runtime.driver.set_active(PretendedGPU(arch))
    if obstacle := triton_obstacle("meta"):  # imports the kernels
        raise SystemExit(obstacle)
    from pixnorm import triton_kernels

    kernels, ops = (
        [import_module(f"{package.__name__}.{entry.name}") for entry in pkgutil.iter_modules(package.__path__)]
        for package in (triton_kernels, pixnorm.ops)
    )
    functions = {name: value for module in kernels for name, value in vars(module).items()}
    stack = ExitStack()
    for module in (module for module in kernels if hasattr(module, "launch")):
        stack.enter_context(patch.object(module, "launch", compile_only))
    for module in (module for module in ops if hasattr(module, "triton_ops")):
        plain = {"new": lambda name: (functions[f"{name}_fwd"], functions[f"{name}_bwd"])}
        stack.enter_context(patch.object(module, "triton_ops", **plain))
    return stack


def work(queue: Queue, arch: int | None, counts: dict[str, int]) -> None:
    """Take jobs until there are none."""
    end_with_parent()
    specs = {spec.name: spec for spec in SPECS}
    with compiling(arch):
        while (job := queue.get()) is not None:
            try:
                compile_call(specs[job[0]], *job[1:])
                counts["done"] += 1
            except Exception:  # what does not compile shows in the tests too
                counts["failed"] += 1
                print(job, traceback.format_exc(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, metavar="DIR", help="Triton's cache")
    parser.add_argument("--arch", type=int, help="compute capability, 90 for 9.0; by default that of this GPU")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--first", type=int, metavar="N", help="of the calls, to try this")
    arguments = parser.parse_args()
    os.environ |= {"TRITON_CACHE_DIR": str(arguments.cache.absolute()), "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    os.nice(10)
    context = multiprocessing.get_context("spawn")
    manager = SyncManager(ctx=context)
    manager.start(end_with_parent)
    with manager:
        queue, counts = manager.Queue(), manager.dict(done=0, failed=0)
        for job in (*[*jobs()][: arguments.first], *[None] * arguments.processes):
            queue.put(job)
        given = queue, arguments.arch, counts
        workers = [context.Process(target=work, args=given) for _ in range(arguments.processes)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        print(f"compiled the kernels of {counts['done']} calls; {counts['failed']} failed", flush=True)
        raise SystemExit(counts["failed"] > 0)


if __name__ == "__main__":
    main()
