"""Memory that a call saves for backward, and its peak."""

import ctypes
import platform
from pathlib import Path

import pytest
import torch
from test_ops import name_of

from pixnorm.testing import DENSE_LAYOUTS, DTYPES, GCONV_MIX, SPN, Case, saved_bytes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.emulated
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("dtype, parameter_dtype", DTYPES, ids=name_of)
def test_saved_for_backward(spec, variant, kernel, dtype, parameter_dtype, layout):
    case = Case((4, 8, 16, 16), "", variant)
    tensors = spec.inputs(case, dtype, parameter_dtype=parameter_dtype, layout=layout)
    given = spec.leaves(tensors) | spec.constants(tensors)
    kept = saved_bytes(lambda: spec.function(**given, **case.options, impl=kernel), given.values())
    more = kept - spec.saved_bytes(case, dtype)
    assert more == 0 or (spec.composite and 0 < more < tensors[spec.first].nbytes)


def resident_bytes(which):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(which):
            return 1024 * int(line.split()[1])


def peak_of_process(function):
    """Peak memory of a call, PyTorch's or not, beyond that of the process before."""
    ctypes.CDLL(None).malloc_trim(0)  # free memory that is reused would not be counted
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident_bytes("VmRSS")
    result = function()
    peak = resident_bytes("VmHWM") - before
    del result
    return peak


def peak_of_gpu(function):
    """Peak memory of PyTorch's allocator during a call, beyond that before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


@pytest.mark.parametrize("kernel", ["native"], indirect=True)  # the convolutions of other impls have workspaces
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="reads peak memory from /proc, with glibc")
@pytest.mark.parametrize(
    "spec, layout, upsample, dtype, copies",
    [
        (SPN, "contiguous", 1, torch.float32, 0),
        (SPN, "contiguous", 2, torch.bfloat16, 0),
        (SPN, "channels_last", 2, torch.float32, 0),
        (SPN, "channels_last", 1, torch.bfloat16, 0),
        (SPN, "padded_pixels", 1, torch.float32, 1),
        (GCONV_MIX, "contiguous", 1, torch.float32, 0),
        (GCONV_MIX, "channels_last", 1, torch.bfloat16, 0),
    ],
    ids=name_of,
)
def test_no_hidden_copy(spec, kernel, layout, upsample, dtype, copies):
    """Forward allocates y and the saved tensors, backward a gradient; the rest does not grow with the batch.

    On a GPU backward also allocates the gradient of p, and in NCHW a transposed x for a GEMM. The copy of an input with
    other strides is the only exception, and shows that the test detects copies.
    """
    options = {"upsample": upsample, "activation": "relu"} if spec is SPN else {}
    saved = int(spec is SPN)  # p
    tensors = spec.inputs(Case((512 // dtype.itemsize, 64, 32, 32), "", options), dtype, layout=layout)
    leaves = spec.leaves(tensors)
    one, on_gpu = tensors[spec.first].numel() * dtype.itemsize, tensors[spec.first].is_cuda
    assert one == 32 * 2**20
    peak_bytes, small = (peak_of_gpu, 2 * 2**20) if on_gpu else (peak_of_process, 14 * 2**20)
    held = 2 + (layout != "channels_last") if on_gpu else 1

    def forward():
        return spec.function(**leaves, **options, impl=kernel)

    y = forward()
    grad_y = torch.randn_like(y)

    def backward():
        return torch.autograd.grad(y, list(leaves.values()), grad_y, retain_graph=True)

    backward()  # one-time allocations of oneDNN or cuBLAS
    peak = peak_bytes(forward)
    assert abs(peak - (upsample**2 + saved + copies) * one) <= small
    assert peak_bytes(backward) <= (held + copies) * one + small
