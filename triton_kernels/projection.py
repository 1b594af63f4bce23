"""The products with the projection's weight: p = W x, and in backward dx += Wᵀ dp and dW = dp xᵀ.

They are PyTorch's convolutions, so they follow the flag that allows convolutions to use TF32. With few channels the
first two are a kernel of our own, which also computes the statistics, or adds to dx, without another pass over memory.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pixnorm.ops.common import dense, dense_like, is_channels_last, without_autocast
from pixnorm.triton_kernels.common import (
    INTERPRETED,
    accumulator,
    launch,
    power_of_two_from,
    power_of_two_in,
    wrap_triton,
)
from pixnorm.triton_kernels.statistics import store_part

# Arithmetic intensity is C / 4 operations per byte in float32 and C / 2 in half precision. An RTX 3090 balances at 37
# and 74, an H200 at 92 and 184. So up to here the product is memory-bound, and it pays to save the passes of the
# statistics (2 of 7) and of the sum into dx (2 of 5).
MOST_CHANNELS = 128
# Pixels per tile; its statistics take as many bytes as 6 pixels. Outputs are in registers, at most 64 per thread.
PIXELS, CHUNK, WARPS, STAGES = 128, 32, 8, 3


@triton.jit
def rounded_to_tf32(value):
    """Rounds float32 to the nearest TF32; tensor cores by themselves truncate. Other dtypes pass."""
    if value.dtype == tl.float32:
        rounded = ((value.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return tl.where(value == value, rounded, value)  # the GPU's NaN has all bits set, and would overflow
    else:
        return value


@triton.jit
def store_statistics(partials_ptr, part, value, valid, count, channel, C):
    """Stores the part that a (channels, pixels) tile is, in the format of statistics.py."""
    mean = tl.sum(tl.where(valid, value, 0.0), axis=1) / count
    d = tl.where(valid, value - mean[:, None], 0.0)
    count = tl.zeros_like(mean) + count
    store_part(partials_ptr, part, channel, C, count, mean, tl.sum(d * d, axis=1), channel < C)


@triton.jit
def spn_projection_kernel(
    weight_ptr, in_ptr, out_ptr, partials_ptr, N, C, pixels, parts, out_stride, in_stride,
    ADD: tl.constexpr, STATISTICS: tl.constexpr, LAST: tl.constexpr, VECTOR: tl.constexpr,
    OUT: tl.constexpr, PIXELS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out = weight in, or out += weight in, for a tile of pixels and all channels.

    With STATISTICS also stores those of the tile, of in and of out, in the format of statistics.py.
    """
    tile = tl.program_id(0)
    o_pixel = tile * PIXELS + tl.arange(0, PIXELS)
    o_out = tl.arange(0, OUT)
    valid = o_pixel < N * pixels
    count = tl.minimum(N * pixels - tile * PIXELS, PIXELS).to(tl.float32)
    if LAST:
        start = o_pixel.to(tl.int64) * C
        channel = 1
    else:
        n = o_pixel // pixels
        start = n.to(tl.int64) * C * pixels + (o_pixel - n * pixels)
        start = tl.max_contiguous(tl.multiple_of(start, VECTOR), VECTOR)
        channel = pixels
    PRECISION: tl.constexpr = "tf32" if in_ptr.dtype.element_ty == tl.float32 else "ieee"
    total = tl.zeros([OUT, PIXELS], dtype=tl.float32)
    for first in range(0, C, CHUNK):
        o_in = first + tl.arange(0, CHUNK)
        weight = tl.load(
            weight_ptr + o_out[:, None] * out_stride + o_in[None, :] * in_stride,
            mask=(o_out < C)[:, None] & (o_in < C)[None, :],
            other=0.0,
        )
        value = tl.load(
            in_ptr + (o_in[:, None] * channel + start[None, :]), mask=(o_in < C)[:, None] & valid[None, :], other=0.0
        )
        total = tl.dot(rounded_to_tf32(weight), rounded_to_tf32(value), total, input_precision=PRECISION)
        if STATISTICS:
            store_statistics(partials_ptr, tile, value.to(tl.float32), valid[None, :], count, o_in, C)
    pointers = out_ptr + (o_out[:, None] * channel + start[None, :])
    mask = (o_out < C)[:, None] & valid[None, :]
    if ADD:
        total += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    rounded = total.to(out_ptr.dtype.element_ty)
    tl.store(pointers, rounded, mask=mask)
    if STATISTICS:
        store_statistics(partials_ptr, parts + tile, rounded.to(tl.float32), valid[None, :], count, o_out, C)


def fits(x: Tensor, weight: Tensor, allow_tf32: bool) -> bool:
    """Whether this product is one for the kernel."""
    if weight.shape[0] != weight.shape[1] or x.shape[1] > MOST_CHANNELS or x.numel() == 0:
        return False
    if x.dtype == torch.float32 and torch.version.hip:  # few AMD GPUs have TF32
        return False
    if x.dtype == torch.bfloat16 and INTERPRETED:  # the interpreter's bfloat16 products are wrong
        return False
    return x.dtype in (torch.float16, torch.bfloat16) or (x.dtype == torch.float32 and allow_tf32)


def _launch(weight: Tensor, strides: tuple[int, int], x: Tensor, out: Tensor, partials: Tensor | None) -> None:
    n, c, h, w = x.shape
    channels_last = is_channels_last(x)
    parts = triton.cdiv(n * h * w, PIXELS)
    vector = 1 if channels_last else power_of_two_in(h * w, 16 // x.element_size())
    launch(
        wrap_triton(spn_projection_kernel),
        (parts,),
        weight_ptr=weight,
        in_ptr=x,
        out_ptr=out,
        partials_ptr=weight if partials is None else partials,
        N=n,
        C=c,
        pixels=h * w,
        parts=parts,
        out_stride=strides[0],
        in_stride=strides[1],
        ADD=partials is None,
        STATISTICS=partials is not None,
        LAST=channels_last,
        VECTOR=vector,
        OUT=max(16, power_of_two_from(c)),
        PIXELS=PIXELS,
        CHUNK=CHUNK,
        num_warps=WARPS,
        num_stages=STAGES,
    )


def project(x: Tensor, weight: Tensor, allow_tf32: bool, statistics: bool) -> tuple[Tensor, Tensor | None]:
    """p = conv1x1(x), in x's layout; and the partial statistics of x and p, if wanted and if our kernel runs."""
    if not (statistics and fits(x, weight, allow_tf32)):
        with without_autocast(x.device):
            p = F.conv2d(x, weight)
        # PyTorch chooses the layout of p by that of the weight, and by dtype.
        if p.shape[1] == 1:
            return p.as_strided(p.shape, (p[0].numel(), p[0].numel(), p.shape[3], 1)), None
        return dense(p, x), None
    n, c, h, w = x.shape
    p = dense_like(x)
    parts = triton.cdiv(n * h * w, PIXELS)
    partials = torch.empty((2, 1, parts, 3, c), dtype=accumulator(x), device=x.device)
    _launch(weight, (c, 1), x, p, partials)
    return p, partials


def add_backward(dx: Tensor, dp: Tensor, x: Tensor, weight: Tensor, allow_tf32: bool) -> Tensor:
    """Adds Wᵀ dp to dx, and returns dW."""
    if fits(x, weight, allow_tf32):
        _launch(weight, (1, x.shape[1]), dp, dx, None)
        return grad_weight(dp, x, weight)
    from_dp, d_weight = _convolution_backward(dp, x, weight, True)
    dx.add_(from_dp)
    return d_weight


def grad_weight(dp: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """dW = dp xᵀ."""
    return _convolution_backward(dp, x, weight, False)[1]


def _convolution_backward(dp: Tensor, x: Tensor, weight: Tensor, of_input: bool) -> tuple[Tensor, Tensor]:
    options = [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [of_input, True, False]
    before = torch.backends.cudnn.deterministic
    try:
        torch.backends.cudnn.deterministic = True  # the same bits on each run
        return torch.ops.aten.convolution_backward(dp, x, weight, None, *options)[:2]
    finally:
        torch.backends.cudnn.deterministic = before
