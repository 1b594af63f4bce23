"""Checks of the CUDA kernels' machine code, without a GPU: see benchmarks.kernels."""

from itertools import product
from pathlib import Path

import pytest

from benchmarks import kernels as report
from benchmarks import machine_code
from benchmarks.kernels import DESIGNS, OPS, OTHER_TRITON, kernels, of_op
from benchmarks.machine_code import STATISTICS, missing
from benchmarks.model import GPUS, KB
from benchmarks.ops.spn import APPLY, MODULATE, REDUCE
from pixnorm.testing import SPECS

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

RTX_3090, H200 = GPUS.values()
SHAPE = (64, 256, 32, 32)


@pytest.fixture(scope="module")
def found():
    return kernels()


def test_every_op_is_registered_with_the_passes_of_its_kernels(found):
    measured = {op.spec_of(head) for op in OPS.values() for head in op.heads}
    in_triton_alone = {of.spec for of in OTHER_TRITON.values() if hasattr(of, "spec")}
    assert measured | in_triton_alone == set(SPECS)
    for op in OPS.values():
        passes = {name.partition(",")[0] for name in op.kernel_passes(1, False)}
        assert bool(op.cuda) == op.spec.cuda_kernels
        assert passes >= {kernel.name for kernel in found if kernel.design and kernel.name in op.cuda}
        assert passes >= set(op.triton.kernels)


def test_all_kernels_pass_the_gates(found):
    assert [f"{kernel}: {violation}" for kernel in found for violation in kernel.violations()] == []


def test_every_kernel_has_aligned_paths_for_all_fast_dtypes(found):
    archs, dtypes = {gpu.arch for gpu in GPUS.values()}, {"float", "BFloat16", "Half"}
    assert {(kernel.gpu.arch, kernel.name) for kernel in found} == set(product(archs, DESIGNS))
    aligned = {(k.gpu.arch, k.name, k.dtype, k.upsample) for k in found if k.columns > 1 and not k.channels_last}
    for op in OPS.values():
        walks = {kernel.name for kernel in found if kernel.design and kernel.name in op.cuda}
        assert aligned >= set(product(archs, walks, dtypes, op.spec.options.get("upsample", (1,))))
    assert aligned >= set(product(archs, (STATISTICS,), dtypes | {"double"}, (1,)))


def test_predictions_follow_from_bytes_and_instructions(found):
    """Reading x and p of (64, 256, 32, 32) in float32, by hand: 128 MB at 4.3 TB/s, fewer than 31 instructions each."""
    (statistics,) = (k for k in found if str(k) == f"{STATISTICS} float x4 sm_90")
    by_bytes, by_instructions = statistics.seconds(SHAPE, OPS["spn"].kernel_passes)
    assert by_bytes == pytest.approx(31.2e-6, rel=0.01)
    assert statistics.instructions < 31
    assert by_instructions == pytest.approx(by_bytes * statistics.instructions / 31.1, rel=0.01)


def test_the_report_has_all_that_is_aligned(found):
    aligned = [kernel for kernel in found if kernel.columns > 1]
    shown = {name: of_op(op, aligned) for name, op in OPS.items()}
    assert {str(kernel) for of in shown.values() for kernel in of} == set(map(str, aligned))
    assert report.predictions(shown).count("\n") == 1 + sum(map(len, shown.values()))
    assert report.layers(aligned).count("\n") == 1 + sum(bool(op.gemm_times) for op in OPS.values()) * 2 * 3 * 4


@pytest.mark.parametrize(
    "op, gpu, forward, backward",
    [
        ("spn", H200, 7 * 15.6, 13 * 15.6),  # passes over 67 MB: GEMMs too are bound by bytes
        ("gconv_mix", H200, 2 * 15.6, 5 * 15.6),
        ("gconv_mix", RTX_3090, 277, 2 * 277),  # products: 2 · 256 operations of each element at 31 TFLOP/s
    ],
)
def test_predictions_of_an_op_by_hand(op, gpu, forward, backward):
    predicted = OPS[op].predicted(gpu, SHAPE, 4, 1)
    assert [1e6 * seconds for seconds in predicted] == pytest.approx([forward, backward], rel=0.01)


def test_each_gate_can_fail():
    """The wrong main loop is a fault too, so most of these kernels have more than one."""
    for gpu in GPUS.values():
        at_fault = kernels([Path(__file__).with_name("kernels_at_fault.cu")])
        faults = {(k.name, k.channels_last): " ".join(k.violations()) for k in at_fault if k.gpu == gpu}
        assert faults[STATISTICS, True] == ""
        assert "4 LDG of 4 bytes, not 4 LDG of 16 bytes" in faults[STATISTICS, False]
        assert "256 bytes of local memory: {'STL" in faults[MODULATE, False]  # an array
        assert "'LDL" in faults[REDUCE, False]  # spills
        assert f"room for {2 if gpu == RTX_3090 else 4} warps, not 12" in faults[APPLY, False]


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(machine_code, "CUDA_HOME", None)
    monkeypatch.setattr("sys.argv", ["kernels"])
    with pytest.raises(SystemExit, match=r"nvcc \(comes with the CUDA toolkit\)"):
        report.main()


@pytest.mark.parametrize(
    "gpu, threads, registers, shared, warps",
    [
        (RTX_3090, 256, 32, 0, 48),
        (RTX_3090, 256, 64, 0, 32),
        (RTX_3090, 128, 96, 0, 20),
        (RTX_3090, 256, 64, 24 * KB, 32),  # 25 KB each with what the system reserves: four blocks
        (RTX_3090, 256, 64, 24 * KB + 1, 24),
        (RTX_3090, 32, 16, 0, 16),
        (H200, 256, 32, 0, 64),
        (H200, 128, 128, 48 * KB, 16),
        (H200, 128, 129, 0, 12),
        (H200, 256, 255, 0, 8),
    ],
)
def test_occupancy_as_nvidia_counts_it(gpu, threads, registers, shared, warps):
    assert gpu.occupancy(threads, registers, shared) == warps
