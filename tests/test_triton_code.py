"""Checks of the machine code of the Triton kernels, without a GPU: see benchmarks.triton_code."""

import os
from dataclasses import replace
from itertools import product

import pytest

from benchmarks import kernels as report
from benchmarks import triton_gconv, triton_spn, triton_statistics
from benchmarks.model import KB
from benchmarks.triton_code import (
    LEAST_WARPS,
    TRITON_GPUS,
    Processes,
    compiled,
    missing,
    triton_kernels,
)
from benchmarks.triton_gconv import FORWARD, GRAD_WEIGHT, KERNELS, GConvKernel
from benchmarks.triton_spn import APPLY, MODULATE, REDUCE, STATISTICS, WALKS, SPNConfiguration, SPNKernel
from benchmarks.triton_statistics import StatisticsKernel

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


@pytest.fixture(scope="module")
def processes():
    with Processes() as processes:
        yield processes


@pytest.fixture(scope="module")
def all_found(processes):
    ops = triton_spn, triton_gconv, triton_statistics
    return triton_kernels(processes, [wanted for op in ops for wanted in op.selection()])


@pytest.fixture(scope="module")
def found(all_found):
    return [kernel for kernel in all_found if isinstance(kernel, SPNKernel)]


@pytest.fixture(scope="module")
def of_gconv(all_found):
    return [kernel for kernel in all_found if isinstance(kernel, GConvKernel)]


def test_all_kernels_pass_the_gates(all_found):
    assert [f"{kernel}: {violation}" for kernel in all_found for violation in kernel.violations()] == []


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


def test_selection_has_every_kernel_of_gconv_for_every_gpu_and_on_all_kinds_of_cores(of_gconv):
    assert {(k.gpu.arch, k.name) for k in of_gconv} == set(product({gpu.arch for gpu in TRITON_GPUS}, KERNELS))
    usual = {(k.name, k.dtype, k.channels_last) for k in of_gconv if k.dtype != "double" and not k.strict}
    assert usual == set(product(KERNELS, ("float", "BFloat16"), (False, True)))
    assert {(k.name, k.small_planes) for k in of_gconv} == set(product(KERNELS, (False, True)))
    assert {k.multiplier for k in of_gconv} == {"HGMMA", "HMMA", "DMMA", None}


def test_selection_has_statistics_of_instances(all_found):
    """Those of large planes in NCHW may be the same code as batch norm's, and then are SPN's."""
    found = {(k.channels_last, k.small_planes) for k in all_found if isinstance(k, StatisticsKernel)}
    assert found >= {(True, False), (False, True), (True, True)}


def test_predictions_follow_from_bytes_and_instructions(found):
    """By hand: reading x and p of shape (64, 256, 32, 32) in float32 is 128 MB at 4.3 TB/s."""
    (statistics,) = (kernel for kernel in found if (kernel.gpu.arch, kernel.name) == ("sm_90", STATISTICS))
    assert statistics.dtype == "float"
    by_bytes, by_instructions = statistics.seconds((64, 256, 32, 32))
    assert by_bytes == pytest.approx(31.2e-6, rel=0.01)
    assert by_instructions == pytest.approx(by_bytes * statistics.instructions / 31.1, rel=0.01)
    assert report.predictions(found).count("\n") == 1 + len(found)


def test_predictions_of_a_product(of_gconv):
    """By hand, GConv of the same shape: 128 MB at 1.83 TB/s; 2 · 256 operations per element at 125 TFLOP/s."""
    (forward,) = (k for k in of_gconv if (k.gpu.arch, k.name) == ("sm_80", FORWARD))
    assert str(forward.launch.configuration) == "float, NCHW, TF32"
    by_bytes, by_instructions, by_products = forward.seconds((64, 256, 32, 32))
    assert by_bytes == pytest.approx(73.3e-6, rel=0.01)
    assert by_products == pytest.approx(68.7e-6, rel=0.01)
    elements_per_second = 108 * 1.41e9 * 128 / forward.instructions
    assert by_instructions == pytest.approx(64 * 256 * 32 * 32 / elements_per_second, rel=0.01)
    assert report.predictions(of_gconv).count("\n") == 1 + len(of_gconv)


def test_each_gate_can_fail(found, processes):
    """Take kernels that pass, and make one thing worse at a time."""
    of = {k.name: k for k in found if k.walks and k.launch.configuration == SPNConfiguration("float")}
    modulate, reduce, apply = (of[name] for name in (MODULATE, REDUCE, APPLY))
    unaligned = modulate.launch._replace(attributes={})
    few_registers = reduce.launch._replace(options=reduce.launch.options | {"maxnreg": 96})
    many_channels = apply.launch._replace(constants=apply.launch.constants | {"CHANNELS": 32})
    at_fault = [(launch, modulate.gpu) for launch in (unaligned, few_registers, many_channels)]
    faults = _faults(processes, at_fault)
    assert "not 2 LDG of 16 bytes, 1 STG of 16 bytes" in faults[0]
    assert "bytes of local memory: {" in faults[1] and "'STL" in faults[1]
    assert "bytes of shared memory, ['BAR" in faults[2]
    crowded = modulate._replace(gpu=modulate.gpu._replace(registers=16 * KB))
    assert crowded.violations() == [f"room for {crowded.warps} warps, not {LEAST_WARPS}"]


def test_each_gate_of_gconv_can_fail(of_gconv, processes):
    """Take kernels that pass, and make one thing worse at a time."""
    of = {k.name: k for k in of_gconv if k.gpu.arch == "sm_80" and k.dtype != "double"}
    forward, grad_weight = of[FORWARD], of[GRAD_WEIGHT]
    unaligned = grad_weight.launch._replace(attributes={})
    not_rounded = forward.launch._replace(constants=forward.launch.constants | {"TF32": False})
    faults = _faults(processes, [(unaligned, forward.gpu), (not_rounded, forward.gpu)])
    assert "LDGSTS of 16 bytes" in faults[0] and "moves in the main loop" in faults[0]
    assert "multiplies by no tensor cores, not HMMA" in faults[1]
    must_not_round = replace(forward.launch.configuration, strict=True)
    rounded = forward._replace(launch=forward.launch._replace(configuration=must_not_round))
    assert rounded.violations() == ["multiplies by ['HMMA'] tensor cores, not None"]
    loads_again = forward.code._replace(main_loop=forward.code.main_loop + ["LDG.E"] * 4)
    assert "not 8 LDGSTS of 16 bytes" in " ".join(forward._replace(code=loads_again).violations())
    shares_much = forward._replace(shared=forward.gpu.shared_per_block + 1)
    assert shares_much.violations() == [f"room for 0 warps, not {LEAST_WARPS}"]


def _faults(processes: Processes, at_fault: list) -> list[str]:
    codes = zip(at_fault, processes.map(compiled, at_fault), strict=True)
    return [" ".join(launch.configuration.of_kernel(gpu, *code, launch).violations()) for (launch, gpu), code in codes]


def test_the_message_names_what_a_compiler_died_on(processes):
    with pytest.raises(RuntimeError, match=r"^3 5: the compiler died"):
        processes.map(_exit, [(3, 5)])
    assert processes.map(divmod, [(7, 2)] * 3) == [(3, 1)] * 3
    with pytest.raises(RuntimeError, match=r"^7 0: .*zero"):
        processes.map(divmod, [(7, 0)])


def _exit(status: int, _) -> None:
    os._exit(status)
