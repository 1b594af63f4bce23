"""What the machine code of the Triton kernels shows, without a GPU: see benchmarks.triton_code."""

import os
from itertools import product

import pytest

from benchmarks import kernels as report
from benchmarks.model import KB
from benchmarks.triton_code import (
    APPLY,
    LEAST_WARPS,
    MODULATE,
    REDUCE,
    STATISTICS,
    TRITON_GPUS,
    WALKS,
    Processes,
    TritonKernel,
    compiled,
    missing,
    triton_kernels,
)

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


@pytest.fixture(scope="module")
def processes():
    with Processes() as processes:
        yield processes


@pytest.fixture(scope="module")
def found(processes):
    return triton_kernels(processes)


def test_all_kernels_pass_the_gates(found):
    assert [f"{kernel}: {violation}" for kernel in found for violation in kernel.violations()] == []


def test_selection_has_every_kernel_for_every_gpu_and_every_row_of_the_block_sizes(found):
    usual = [kernel for kernel in found if kernel.dtype in ("float", "BFloat16")]
    names = {kernel.name for kernel in found}
    assert len(names) == 9
    assert {(k.gpu.arch, k.name) for k in found} == set(product({gpu.arch for gpu in TRITON_GPUS}, names))
    rows = {(k.name, k.channels_last, k.upsample, k.itemsize) for k in usual if k.walks}
    assert rows == set(product(WALKS, (False, True), (1, 2), (4, 2)))
    others = {(k.name, k.dtype == "double", k.kernel_size, k.one_mask) for k in found if k.walks}
    for kernel in WALKS:
        assert {(kernel, True, 3, False), (kernel, False, 1, False), (kernel, False, 5, False)} < others
        assert (kernel, False, 3, True) in others


def test_predictions_follow_from_bytes_and_instructions(found):
    """Reading x and p of (64, 256, 32, 32) in float32, by hand: 128 MB at 4.3 TB/s."""
    (statistics,) = (kernel for kernel in found if (kernel.gpu.arch, kernel.name) == ("sm_90", STATISTICS))
    assert statistics.dtype == "float"
    by_bytes, by_instructions = statistics.seconds((64, 256, 32, 32))
    assert by_bytes == pytest.approx(31.2e-6, rel=0.01)
    assert by_instructions == pytest.approx(by_bytes * statistics.instructions / 31.1, rel=0.01)
    assert report.predictions(found).count("\n") == 1 + len(found)


def test_each_gate_can_fail(found, processes):
    """Of what passes, one thing is made worse at a time."""
    of = {k.name: k for k in found if k.walks and k.launch.configuration == ("float", False, 1, False, 3, False)}
    modulate, reduce, apply = (of[name] for name in (MODULATE, REDUCE, APPLY))
    unaligned = modulate.launch._replace(attributes={})
    few_registers = reduce.launch._replace(options=reduce.launch.options | {"maxnreg": 96})
    many_channels = apply.launch._replace(constants=apply.launch.constants | {"CHANNELS": 32})
    at_fault = [(launch, modulate.gpu) for launch in (unaligned, few_registers, many_channels)]
    codes = zip(at_fault, processes.map(compiled, at_fault), strict=True)
    faults = [" ".join(TritonKernel(gpu, *code, launch).violations()) for (launch, gpu), code in codes]
    assert "not 2 LDG of 16 bytes, 1 STG of 16 bytes" in faults[0]
    assert "bytes of local memory: {" in faults[1] and "'STL" in faults[1]
    assert "bytes of shared memory, ['BAR" in faults[2]
    crowded = modulate._replace(gpu=modulate.gpu._replace(registers=16 * KB))
    assert crowded.violations() == [f"room for {crowded.warps} warps, not {LEAST_WARPS}"]


def test_a_compiler_that_dies_is_told_with_what_it_worked_on(processes):
    with pytest.raises(RuntimeError, match=r"^3 5: the compiler died"):
        processes.map(_exit, [(3, 5)])
    assert processes.map(divmod, [(7, 2)] * 3) == [(3, 1)] * 3
    with pytest.raises(RuntimeError, match=r"^7 0: .*zero"):
        processes.map(divmod, [(7, 0)])


def _exit(status: int, _) -> None:
    os._exit(status)
