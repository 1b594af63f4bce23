"""``python -m benchmarks.gpu.precompile --cache DIR``: compile what tests and benchmarks will launch in Triton.

The ops are called on meta tensors, and what they launch is compiled by Triton's own path and not run: so what lies in
the cache afterwards is what a launch looks for. ``--arch 90`` needs no GPU.
"""

import argparse
import multiprocessing
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from multiprocessing.managers import SyncManager
from pathlib import Path
from queue import Queue

import torch

from benchmarks.goals import BATCHES
from benchmarks.gpu.processes import end_with_parent
from benchmarks.ops import OPS
from benchmarks.triton_code import PretendedGPU, in_place_of_launch
from pixnorm.testing import DENSE_LAYOUTS, DTYPES, SPECS, Case, OpSpec, evaluate

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
    """As the benchmarks call the op; the same kernels serve many shapes, and then cost no time here."""
    if op := OPS.get(spec.name):
        for shape, head in product(dict.fromkeys([*op.shapes.gpu, *op.shapes.kernels, *op.shapes.small]), op.heads):
            yield op.case(head, shape)
        for batch, (shape, head) in product(BATCHES[False], op.step.calls):
            yield Case((batch, *shape[1:]), "", head.options, sizes=head.sizes)


def compile_only(wrapped, grid, **arguments) -> None:
    """In the place of ``launch``."""
    getattr(wrapped, "kernel", wrapped).run(grid=grid, warmup=True, **arguments)


def compile_call(spec: OpSpec, case: Case, dtype, parameter_dtype, layout: str, tf32: bool) -> None:
    """The kernels of a forward and a backward."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    tensors = spec.inputs(case, dtype, parameter_dtype=parameter_dtype, layout=layout, device="meta")
    evaluate(spec, spec.call("triton"), tensors, case.options)


@contextmanager
def compiling(arch: int | None) -> Iterator[None]:
    """While it lasts, ops in Triton compile their kernels and do not launch them."""
    if arch is not None:
        import triton

        triton.runtime.driver.set_active(PretendedGPU(arch))
    with in_place_of_launch(compile_only):
        yield


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
