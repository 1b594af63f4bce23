"""What the machine code of the kernels proves, without a GPU: ``python -m benchmarks.kernels``.

Compiles csrc/cuda for ``benchmarks.model.GPUS``, and a selection of the Triton kernels, or with ``--all`` all of them,
for an hour or two. Gates and predictions are explained in ``benchmarks.machine_code``, designs stand in benchmarks/ops.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby, product
from pathlib import Path

from tabulate import tabulate

from benchmarks import cuda_code, machine_code, triton_code
from benchmarks.machine_code import Kernel
from benchmarks.model import GPUS
from benchmarks.ops import OPS
from benchmarks.ops.blur import BlurConfiguration
from benchmarks.ops.conditional_spn import ClassParametersConfiguration
from benchmarks.ops.label_conv import LabelConvConfiguration
from benchmarks.ops.style import SpatialScaleConfiguration
from benchmarks.registry import Op

DESIGNS = {**cuda_code.SHARED, **{name: design for op in OPS.values() for name, design in op.cuda.items()}}
SHAPES = [("float", (64, 256, 32, 32)), ("BFloat16", (64, 256, 32, 32)), ("float", (32, 64, 128, 128))]  # of y
# Of several ops, or of one that is not measured.
OTHER_TRITON = {
    "statistics": triton_code.StatisticsConfiguration,
    "label_conv": LabelConvConfiguration,
    "class_parameters": ClassParametersConfiguration,
    "blur": BlurConfiguration,
    "spatial_scale": SpatialScaleConfiguration,
}
LAYOUTS = {False: "NCHW", True: "channels_last"}


def kernels(sources: Iterable[Path] = cuda_code.SOURCES) -> list[cuda_code.CudaKernel]:
    return cuda_code.kernels(DESIGNS, sources)


def of_op(op: Op, found: Iterable[Kernel]) -> list[Kernel]:
    """The kernels whose passes the op knows."""
    return [kernel for kernel in found if kernel.name in op.kernel_passes(1, False)]


def input_shape(y: tuple[int, ...], upsample: int) -> tuple[int, ...]:
    return *y[:2], y[2] // upsample, y[3] // upsample


def titled(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {'x'.join(map(str, shape))}"


def gates(found: Iterable[Kernel]) -> str:
    """A row for the instances of a kernel on a GPU: the most that they use, and the fewest warps."""
    rows = []
    for (arch, name), of_name in groupby(found, lambda kernel: (kernel.gpu.arch, kernel.name)):
        group = list(of_name)
        by_16 = sum(any(width == 16 for _, width in kernel.design) for kernel in group)
        registers, local = (max(getattr(kernel.code, of) for kernel in group) for of in ("registers", "local"))
        warps = f"{min(kernel.warps for kernel in group)} (≥ {min(kernel.warps_needed for kernel in group)})"
        shared, at_fault = max(kernel.shared for kernel in group), sum(bool(k.violations()) for k in group)
        rows.append((name, arch, len(group), by_16, registers, shared, warps, local, at_fault))
    headers = ("kernel", "arch", "instances", "by 16 bytes", "registers", "shared", "warps", "local", "at fault")
    return tabulate(rows, headers, "github", disable_numparse=True)


def predictions(found: dict[str, Sequence[Kernel]]) -> str:
    """A row for each instance, by op; times are in µs."""
    rows = []
    for name, kernel in ((name, kernel) for name, of in found.items() for kernel in of):
        seconds = [kernel.seconds(input_shape(y, kernel.upsample), OPS[name].kernel_passes) for _, y in SHAPES]
        known = [of and dtype == kernel.dtype for of, (dtype, _) in zip(seconds, SHAPES, strict=True)]
        rows.append(
            (
                *(name, kernel.gpu.arch, kernel.name, kernel.dtype, kernel.columns, kernel.upsample),
                *(LAYOUTS[kernel.channels_last], kernel.options, kernel.code.registers, kernel.code.local),
                *(kernel.shared, f"{kernel.warps} ({kernel.warps / kernel.gpu.warps:.0%})"),
                *(f"{kernel.instructions:.1f}", bound(*seconds[0]) if seconds[0] else ""),
                *(f"{1e6 * max(of):.0f}" if shown else "" for of, shown in zip(seconds, known, strict=True)),
            )
        )
    headers = ("op", "arch", "kernel", "dtype", "columns", "up", "layout", "options", "registers", "local", "shared")
    headers += ("warps", "instructions", "bound", *(titled(*of) for of in SHAPES))
    return tabulate(rows, headers, "github", disable_numparse=True)


def bound(*times: float) -> str:
    longest, name = max(zip(times, ("bytes", "issue", "products")[: len(times)], strict=True), key=lambda of: of[0])
    return name if name == "bytes" else f"{name}, {longest / times[0]:.1f}x"


def layers(found: Sequence[cuda_code.CudaKernel]) -> str:
    """A row per op and head: upsampled ones with ReLU. Times are in µs, in brackets those of the bytes alone."""
    rows = []
    by_options = sorted(found, key=lambda kernel: (kernel.upsample, kernel.relu, kernel.columns))
    for name, gpu, (dtype, y), upsample, last in product(OPS, GPUS.values(), SHAPES, (1, 2), (False, True)):
        if not OPS[name].gemm_times:  # an op of one sequence of kernels, beside GEMMs
            continue
        x, passes = input_shape(y, upsample), OPS[name].kernel_passes
        seconds = {  # of each kernel the instance with most of the head's options
            kernel.name: kernel.seconds(x, passes)
            for kernel in of_op(OPS[name], by_options)
            if (kernel.gpu, kernel.dtype, kernel.channels_last) == (gpu, dtype, last)
            and kernel.upsample <= upsample
            and kernel.relu <= (upsample == 2)
        }
        row = [name, gpu.arch, titled(dtype, y), upsample, LAYOUTS[last]]
        for gemm, backward in zip(OPS[name].gemm_times(gpu, x, cuda_code.ITEMSIZES[dtype]), (False, True), strict=True):
            times = [of for kernel, of in seconds.items() if ("_bwd_" in kernel) == backward]
            row += [f"{1e6 * gemm:.0f}", f"{1e6 * sum(map(max, times)):.0f} ({1e6 * sum(of[0] for of in times):.0f})"]
        rows.append(row)
    headers = ("op", "arch", "y", "up", "layout", "GEMM", "forward", "GEMMs", "backward")
    return tabulate(rows, headers, "github", disable_numparse=True)


def checked(title: str, found: Iterable[Kernel]) -> list[str]:
    """Print the gates; what fails."""
    faults = [f"{kernel}: {violation}" for kernel in found for violation in kernel.violations()]
    print(f"\n## {title}", gates(found), *faults, sep="\n\n", flush=True)
    return faults


def check_cuda(show_all: bool) -> list[str]:
    found = kernels()
    faults = checked("Gates", found)
    usual = [kernel for kernel in found if kernel.columns > 1 and kernel.dtype in ("float", "BFloat16")]
    if all(kernel.code.moves for kernel in found if kernel.design):  # otherwise there is no main loop to go by
        shown = {name: of_op(op, found if show_all else usual) for name, op in OPS.items() if op.cuda}
        print("\n## Predictions", "From the machine code; µs, for y of these shapes.", predictions(shown), sep="\n\n")
        print("\n## Predictions of the layer", layers(usual), sep="\n\n")
    return faults


def check_triton(show_all: bool) -> list[str]:
    configurations = [*OTHER_TRITON.values(), *(op.triton for op in OPS.values() if op.triton)]
    wanted = [one for of in configurations for one in (of.everything if show_all else of.selection)()]
    with triton_code.Processes() as processes:
        found = triton_code.kernels(processes, wanted)
    faults = checked("Triton", found)
    # Ops with CUDA kernels have predictions of those.
    shown = {
        name: [kernel for kernel in found if isinstance(kernel.launch.configuration, op.triton)]
        for name, op in OPS.items()
        if op.triton and (show_all or not op.cuda)
    }
    print("\n## Predictions of Triton's", predictions(shown), sep="\n\n")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="compile and show everything, not only the usual paths")
    arguments, faults = parser.parse_args(), []
    for language, module, check in (("CUDA", machine_code, check_cuda), ("Triton", triton_code, check_triton)):
        if lacking := module.missing():
            sys.exit(f"the {language} kernels cannot be compiled: {lacking}")
        faults += check(arguments.all)
    sys.exit(f"{len(faults)} gates are not passed" if faults else 0)


if __name__ == "__main__":
    main()
