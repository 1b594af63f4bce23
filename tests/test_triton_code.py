"""Checks of the machine code of the Triton kernels, without a GPU: see benchmarks.triton_code."""

import os
from dataclasses import replace
from itertools import product

import pytest
import torch

from benchmarks import kernels as report
from benchmarks.kernels import OPS, OTHER_TRITON
from benchmarks.machine_code import STATISTICS
from benchmarks.model import KB
from benchmarks.ops import blur, label_conv, modulate, style
from benchmarks.ops.gconv import FORWARD, GRAD_WEIGHT, KERNELS
from benchmarks.ops.spn import APPLY, MODULATE, REDUCE, WALKS, SPNConfiguration
from benchmarks.triton_code import (
    DTYPES,
    TRITON_GPUS,
    Launch,
    Pointer,
    Processes,
    TritonKernel,
    compiled,
    kernel_of,
    kernels,
    missing,
)
from pixnorm.testing.modulate import ROWS

triton = pytest.importorskip("triton")
pytestmark = [pytest.mark.cpu, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

SHAPE = (64, 256, 32, 32)
IN_TRITON = [name for name, op in OPS.items() if op.triton]


@pytest.fixture(scope="module")
def processes():
    with Processes() as processes:
        yield processes


@pytest.fixture(scope="module")
def found(processes):
    """By op."""
    # A kernel that several launch is the first one's.
    configurations = {name: op.triton for name, op in OPS.items() if op.triton} | OTHER_TRITON
    all_found = kernels(processes, [wanted for of in configurations.values() for wanted in of.selection()])
    return {
        name: [kernel for kernel in all_found if isinstance(kernel.launch.configuration, of)]
        for name, of in configurations.items()
    }


@pytest.fixture(scope="module")
def of_spn(found):
    return found["spn"]


@pytest.fixture(scope="module")
def of_gconv(found):
    return found["gconv_mix"]


@pytest.mark.parametrize("op", [*IN_TRITON, *OTHER_TRITON])
def test_all_kernels_pass_the_gates(found, op):
    assert [f"{kernel}: {violation}" for kernel in found[op] for violation in kernel.violations()] == []


def test_selection_has_statistics_of_instances_for_every_gpu(found):
    names = (STATISTICS, "finish_statistics_kernel")
    assert {(k.gpu.arch, k.name) for k in found["statistics"]} == set(product((g.arch for g in TRITON_GPUS), names))


def test_selection_has_both_kernels_of_label_convolution_for_every_gpu(found):
    kernels = label_conv.FORWARD, label_conv.GRADIENT
    assert {(k.gpu.arch, k.name) for k in found["label_conv"]} == set(product((g.arch for g in TRITON_GPUS), kernels))
    usual = {(k.name, k.dtype, k.channels_last) for k in found["label_conv"] if k.dtype != "double"}
    assert usual == set(product(kernels, ("float", "BFloat16"), (False, True)))
    assert {k.multiplier for k in found["label_conv"] if k.name == label_conv.GRADIENT} == {"HMMA", "DMMA", None}


def test_selection_has_every_kernel_of_stylegans_epilogues(found):
    designed = {*style.STREAMS, *style.RESIDENT}
    names = {*designed, style.FINISH}
    ours = {(k.gpu.arch, k.name) for k in found["style_epilogue"] if k.name in names}
    assert ours == set(product((g.arch for g in TRITON_GPUS), names))
    usual = {
        (k.name, k.dtype, k.channels_last)
        for k in found["style_epilogue"]
        if k.name in designed and k.dtype != "double"
    }
    assert usual == set(product(designed, ("float", "BFloat16"), (False, True)))
    assert {k.name for k in found["style_epilogue"] if k.dtype == "double"} >= designed


@pytest.mark.parametrize("op", IN_TRITON)
def test_selection_has_every_kernel_for_every_gpu(found, op):
    passes, designed = OPS[op].kernel_passes(1, True), OPS[op].triton.kernels
    names = {kernel.name for kernel in found[op]}
    assert {(k.gpu.arch, k.name) for k in found[op]} == set(product({gpu.arch for gpu in TRITON_GPUS}, names))
    in_cuda_alone = OPS[op].cuda.keys() - designed.keys()
    assert names >= passes.keys() - in_cuda_alone
    assert {k.launch.kernel for k in found[op] if k.design} - {STATISTICS} == set(designed)


def test_selection_has_every_row_of_the_block_sizes_of_spn(of_spn):
    assert len({kernel.name for kernel in of_spn}) == 10
    walks = [kernel for kernel in of_spn if kernel.name in WALKS]
    usual = {(k.grouped, k.name, k.channels_last, k.upsample, k.itemsize) for k in walks if k.dtype != "double"}
    of_groups = {(True, name, *of) for name in WALKS for of in ((False, 1, 4), (True, 2, 2))}
    assert usual == {*product((False,), WALKS, (False, True), (1, 2), (4, 2)), *of_groups}
    others = {(k.name, k.dtype == "double", k.kernel_size, k.one_mask) for k in walks}
    for kernel in WALKS:
        assert {(kernel, True, 3, False), (kernel, False, 1, False), (kernel, False, 5, False)} < others
        assert (kernel, False, 3, True) in others


def test_selection_has_every_kernel_of_gconv_on_all_kinds_of_cores(of_gconv):
    assert {kernel.name for kernel in of_gconv} == set(KERNELS)
    usual = {(k.name, k.dtype, k.channels_last) for k in of_gconv if k.dtype != "double" and not k.strict}
    assert usual == set(product(KERNELS, ("float", "BFloat16"), (False, True)))
    assert {(k.name, k.small_planes) for k in of_gconv} == set(product(KERNELS, (False, True)))
    assert {k.multiplier for k in of_gconv} == {"HGMMA", "HMMA", "DMMA", None}


def test_predictions_follow_from_bytes_and_instructions(of_spn):
    """Reading x and p of (64, 256, 32, 32) in float32, by hand: 128 MB at 4.3 TB/s."""
    (statistics,) = (kernel for kernel in of_spn if (kernel.gpu.arch, kernel.name) == ("sm_90", STATISTICS))
    assert statistics.dtype == "float"
    by_bytes, by_instructions = statistics.seconds(SHAPE, OPS["spn"].kernel_passes)
    assert by_bytes == pytest.approx(31.2e-6, rel=0.01)
    assert by_instructions == pytest.approx(by_bytes * statistics.instructions / 31.1, rel=0.01)


def test_predictions_of_a_product(of_gconv):
    """By hand, GConv of the same shape: 128 MB at 1.83 TB/s; 2 · 256 operations per element at 125 TFLOP/s."""
    (forward,) = (k for k in of_gconv if (k.gpu.arch, k.name) == ("sm_80", FORWARD))
    assert str(forward.launch.configuration) == "float, NCHW, TF32"
    by_bytes, by_instructions, by_products = forward.seconds(SHAPE, OPS["gconv_mix"].kernel_passes)
    assert by_bytes == pytest.approx(73.3e-6, rel=0.01)
    assert by_products == pytest.approx(68.7e-6, rel=0.01)
    elements_per_second = 108 * 1.41e9 * 128 / forward.instructions
    assert by_instructions == pytest.approx(64 * 256 * 32 * 32 / elements_per_second, rel=0.01)


def test_the_report_has_a_row_for_each_kernel(found):
    of_ops = {name: found[name] for name in IN_TRITON}
    assert report.predictions(of_ops).count("\n") == 1 + sum(map(len, of_ops.values()))


def test_each_gate_can_fail(of_spn, processes):
    """Of what passes, one thing is made worse at a time."""
    of = {k.name: k for k in of_spn if k.name in WALKS and k.launch.configuration == SPNConfiguration("float")}
    modulate, reduce, apply = (of[name] for name in (MODULATE, REDUCE, APPLY))
    few_registers = reduce.launch._replace(options=reduce.launch.options | {"maxnreg": 96})
    many_channels = apply.launch._replace(arguments=apply.launch.arguments | {"CHANNELS": 32})
    at_fault = (_unaligned(modulate.launch), few_registers, many_channels)
    faults = _faults(processes, [(launch, modulate.gpu) for launch in at_fault])
    assert "not 2 LDG of 16 bytes, 1 STG of 16 bytes" in faults[0]
    assert "bytes of local memory: {" in faults[1] and "'STL" in faults[1]
    assert "bytes of shared memory, ['BAR" in faults[2]
    crowded = replace(modulate, gpu=modulate.gpu._replace(registers=16 * KB))
    assert crowded.violations() == [f"room for {crowded.warps} warps, not {TritonKernel.warps_needed}"]


def test_each_gate_of_gconv_can_fail(of_gconv, processes):
    """Take kernels that pass, and make one thing worse at a time."""
    of = {k.name: k for k in of_gconv if k.gpu.arch == "sm_80" and k.dtype != "double"}
    forward, grad_weight = of[FORWARD], of[GRAD_WEIGHT]
    not_rounded = forward.launch._replace(arguments=forward.launch.arguments | {"TF32": False})
    faults = _faults(processes, [(_unaligned(grad_weight.launch), forward.gpu), (not_rounded, forward.gpu)])
    assert "LDGSTS of 16 bytes" in faults[0] and "moves in the main loop" in faults[0]
    assert "multiplies by no tensor cores, not HMMA" in faults[1]
    must_not_round = replace(forward.launch.configuration, strict=True)
    rounded = replace(forward, launch=forward.launch._replace(configuration=must_not_round))
    assert rounded.violations() == ["multiplies by ['HMMA'] tensor cores, not None"]
    loads_again = forward.code._replace(main_loop=forward.code.main_loop + ["LDG.E"] * 4)
    assert "not 8 LDGSTS of 16 bytes" in " ".join(replace(forward, code=loads_again).violations())
    shares_much = replace(forward, shared=forward.gpu.shared_per_block + 1)
    assert shares_much.violations() == [f"room for 0 warps, not {TritonKernel.warps_needed}"]


def test_each_gate_of_modulated_norm_can_fail(found, processes):
    """Take kernels that pass, and make one thing worse at a time."""
    of = {
        k.name: k
        for k in found["modulate"]
        if k.dtype == "float" and not k.channels_last and k.upsample == 1 and k.affine == ROWS and k.activated
    }
    reduce, forward, backward = (of[name] for name in (modulate.REDUCE, *modulate.RESIDENT))
    crowded = backward.launch._replace(arguments=backward.launch.arguments | {"PIXELS": 16384})
    at_fault = [_unaligned(of[modulate.FORWARD].launch), _unaligned(reduce.launch), _unaligned(forward.launch), crowded]
    faults = _faults(processes, [(launch, forward.gpu) for launch in at_fault])
    assert all("moves in the main loop" in fault and "of 4 bytes" in fault for fault in faults[:3])
    assert "bytes of local memory" in faults[3]
    twice = forward.code._replace(opcodes=forward.code.opcodes | {"LDG.E.128.CONSTANT.X": 4})
    assert "moves in the main loop" in " ".join(replace(forward, code=twice).violations())
    loads_again = reduce.code._replace(main_loop=[*reduce.code.main_loop, "LDG.E.128"])
    assert "moves in the main loop" in " ".join(replace(reduce, code=loads_again).violations())
    few = replace(backward, gpu=backward.gpu._replace(registers=16 * KB))
    assert few.violations() == [f"room for {few.warps} warps, not {TritonKernel.warps_needed}"]


def test_each_gate_of_label_convolution_can_fail(found, processes):
    """Take kernels that pass, and make one thing worse at a time."""
    of = {k.name: k for k in found["label_conv"] if k.dtype == "float" and not k.channels_last and k.k == 3}
    forward, gradient = of[label_conv.FORWARD], of[label_conv.GRADIENT]
    many = gradient.launch._replace(arguments=gradient.launch.arguments | {"LABELS": 128, "CHANNELS": 128})
    at_fault = [_unaligned(forward.launch), _unaligned(gradient.launch), many]
    faults = _faults(processes, [(launch, gradient.gpu) for launch in at_fault])
    assert "LDG of 4 bytes" in faults[0] and "moves in the main loop" in faults[0]
    assert "moves in the main loop" in faults[1]
    assert "bytes of local memory" in faults[2]
    in_double = replace(gradient.launch.configuration, dtype="double")
    assert "not DMMA" in " ".join(
        replace(gradient, gpu=TRITON_GPUS[0], launch=gradient.launch._replace(configuration=in_double)).violations()
    )


def test_each_gate_of_stylegans_epilogues_can_fail(found, processes):
    """Take kernels that pass, and make one thing worse at a time."""
    of = {k.name: k for k in found["style_epilogue"] if k.dtype == "float" and not k.channels_last}
    stream, planes = of["style_epilogue_bwd_kernel"], of["style_norm_bwd_resident_kernel"]
    crowded = planes.launch._replace(arguments=planes.launch.arguments | {"PIXELS": 32768})
    faults = _faults(processes, [(of, stream.gpu) for of in (_unaligned(stream.launch), crowded)])
    assert "moves in the main loop" in faults[0] and "LDG of 4 bytes" in faults[0]
    assert "bytes of local memory" in faults[1]
    loads_noise_again = stream.code._replace(main_loop=[*stream.code.main_loop, "LDG.E.128"])
    assert "moves in the main loop" in " ".join(replace(stream, code=loads_noise_again).violations())
    twice = planes.code._replace(opcodes=planes.code.opcodes | {"LDG.E.128.CONSTANT.X": 8})
    assert "moves in the main loop" in " ".join(replace(planes, code=twice).violations())


def test_each_gate_of_the_blur_can_fail(found, processes):
    """Take kernels that pass, and make one thing worse at a time."""
    kernels = {(k.channels_last, k.launch.arguments["UP"]): k for k in found["blur"] if k.dtype == "float"}
    assert len(kernels) == 4 and {k.name for k in found["blur"]} == {blur.KERNEL}
    faults = _faults(processes, [(_unaligned(kernel.launch), kernel.gpu) for kernel in kernels.values()])
    assert all("moves in the main loop" in fault and "of 4 bytes" in fault for fault in faults)
    last = kernels[True, False]
    twice = last.code._replace(opcodes=last.code.opcodes | {"LDG.E.128.X": 1})
    assert "moves in the main loop" in " ".join(replace(last, code=twice).violations())


def _unaligned(launch: Launch) -> Launch:
    pointers = {name: Pointer(of.dtype, 4) for name, of in launch.arguments.items() if isinstance(of, Pointer)}
    return launch._replace(arguments=launch.arguments | pointers, sizes=dict.fromkeys(launch.sizes, 17))


def _faults(processes: Processes, at_fault: list) -> list[str]:
    codes = processes.map(compiled, at_fault)
    return [" ".join(kernel_of(*job, *code).violations()) for job, code in zip(at_fault, codes, strict=True)]


def test_launches_are_bound_by_position_and_by_name():
    """To the arguments of the kernel; sizes are told apart as Triton specialises on them."""
    kernel = triton.jit(_kernel, do_not_specialize=["free"])
    x, configuration = torch.empty(3, device="meta"), SPNConfiguration("float")
    by_name = {"x_ptr": x, "one": 1, "many": 48, "odd": 3, "free": 32, "BLOCK": 64, "num_warps": 2}
    launch = Launch.of(configuration, kernel, (), by_name)
    assert launch.arguments == {"x_ptr": Pointer(DTYPES["float"]), "BLOCK": 64}
    assert launch.sizes == {"one": 1, "many": 16, "odd": 17, "free": 17}
    assert launch.options == {"num_warps": 2}
    assert launch == Launch.of(configuration, kernel, (x, 1, 48, 3, 32), {"BLOCK": 64, "num_warps": 2})
    assert launch == Launch.of(configuration, kernel, (x, 1, 16), {"odd": 5, "free": 1, "BLOCK": 64, "num_warps": 2})


def _kernel(x_ptr, one, many, odd, free, BLOCK: triton.language.constexpr):
    pass


def test_a_compiler_that_dies_is_told_with_what_it_worked_on(processes):
    with pytest.raises(RuntimeError, match=r"^3 5: the compiler died"):
        processes.map(_exit, [(3, 5)])
    assert processes.map(divmod, [(7, 2)] * 3) == [(3, 1)] * 3
    with pytest.raises(RuntimeError, match=r"^7 0: .*zero"):
        processes.map(divmod, [(7, 0)])


def _exit(status: int, _) -> None:
    os._exit(status)


def test_the_gates_of_spatial_scale_can_fail(found):
    """Selected for every GPU; tensors that are loaded again and again."""
    names = {(k.gpu.arch, k.name) for k in found["spatial_scale"]}
    assert names == set(product((g.arch for g in TRITON_GPUS), style.SCALES))
    for kernel in found["spatial_scale"]:
        assert not kernel.violations()
        tensors = ["LDG.E.128"] * (8 * int(kernel.elements) * kernel.itemsize // 16)
        again = kernel.code._replace(main_loop=[*kernel.code.main_loop, *tensors])
        assert "moves in the main loop" in " ".join(replace(kernel, code=again).violations())
