"""GConv's mixing in Triton: matrix products with a fused prologue (scaling) and epilogue (sums).

Forward reads u and writes y; backward reads dy and u and writes du, and reads dy and u again for the gradient of the
weight. The scaled operand is the left one, which tensor cores can take from registers; so the rows of a tile are pixels
(of one sample if planes are large, of several if they are small), and its columns are channels.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixnorm.ops.common import dense, dense_like, is_channels_last
from pixnorm.ops.gconv import gconv_mix_bwd_fake, gconv_mix_fwd_fake
from pixnorm.triton_kernels.common import (
    INTERPRETED,
    accumulator,
    launch,
    op_of_kernels,
    power_of_two_from,
    power_of_two_in,
    record,
    to_accumulator,
    wrap_triton,
)
from pixnorm.triton_kernels.projection import rounded_to_tf32


class Blocks(NamedTuple):
    """Block sizes of a product: rows (pixels) and columns of a tile, and the chunk that it sums over at a time."""

    rows: int
    columns: int
    chunk: int
    warps: int
    stages: int


# On tensor cores the tile of sums takes 64 registers per thread; half as many where other things need registers: two
# more float32 tiles in the epilogue, scales of several samples, or scattered addresses. Without tensor cores, and in
# float64, the operands are in registers too.
TENSOR_CORES = Blocks(rows=128, columns=128, chunk=32, warps=8, stages=3)
TENSOR_CORES_CROWDED = TENSOR_CORES._replace(columns=64)
PLAIN = Blocks(rows=64, columns=64, chunk=16, warps=8, stages=2)
DOUBLE = Blocks(rows=32, columns=32, chunk=16, warps=4, stages=2)
# Programs for the gradient of the weight: two per SM of an H200, and the same number on every GPU, so that the order of
# sums does not depend on the GPU.
PROGRAMS = 264


# Compile-time constants that the functions below take as META; see ``_options``.
META_FIELDS = tl.constexpr("LAST TF32 WIDE VECTOR PIXELS SAMPLES COLUMNS CHUNK")
# ``of_sample`` is the number of tiles per sample.
SIZE_FIELDS = tl.constexpr("N C pixels of_sample")


@triton.jit
def rows_of(tile, size, META: tl.constexpr):
    """The rows of a tile, which are pixels: sample (one for all rows if SAMPLES is 1), offset, whether it exists.

    Samples with more pixels than a tile has rows take several tiles.
    """
    PIXELS: tl.constexpr = META.PIXELS
    o_row = tl.arange(0, META.SAMPLES * PIXELS)
    if META.SAMPLES == 1:
        sample = tile // size.of_sample
        pixel = (tile - sample * size.of_sample) * PIXELS + o_row
    else:
        sample = tile * META.SAMPLES + o_row // PIXELS
        pixel = o_row % PIXELS
    valid = (sample < size.N) & (pixel < size.pixels)
    if META.LAST:
        start = sample.to(tl.int64) * (size.pixels * size.C) + pixel * size.C
    else:
        start = sample.to(tl.int64) * (size.pixels * size.C) + pixel
        start = tl.max_contiguous(tl.multiple_of(start, META.VECTOR), META.VECTOR)
    return record("sample start valid")(sample, start, valid)


@triton.jit
def scales_of(s_ptr, rows, o_channel, size, META: tl.constexpr):
    """The scales of some channels: (rows, channels), or (1, channels) if all rows are of one sample."""
    exists = o_channel < size.C
    if META.SAMPLES == 1:
        return tl.load(s_ptr + (rows.sample.to(tl.int64) * size.C + o_channel), mask=exists, other=0.0)[None, :]
    else:
        mask = (rows.sample < size.N)[:, None] & exists[None, :]
        return tl.load(s_ptr + (rows.sample.to(tl.int64)[:, None] * size.C + o_channel[None, :]), mask=mask, other=0.0)


@triton.jit
def operand(value, like, META: tl.constexpr):
    """The value as ``tl.dot`` takes it: in the dtype of the tensors; with WIDE in float32 (see ``_options``)."""
    value = value.to(like.dtype.element_ty)
    if META.WIDE:
        return value.to(tl.float32)
    elif META.TF32:
        return rounded_to_tf32(value)
    else:
        return value


@triton.jit
def features_at(pointer, rows, o_channel, size, META: tl.constexpr):
    """Pointers to a (rows, channels) tile, and which of it exists."""
    stride = 1 if META.LAST else size.pixels
    pointers = pointer + (rows.start[:, None] + o_channel[None, :] * stride)
    return pointers, rows.valid[:, None] & (o_channel < size.C)[None, :]


@triton.jit
def load_features(pointer, rows, o_channel, size, META: tl.constexpr):
    pointers, exists = features_at(pointer, rows, o_channel, size, META)
    return tl.load(pointers, mask=exists, other=0.0)


@triton.jit
def add_product(
    total, in_ptr, s_ptr, weight_ptr, out_stride, in_stride, rows, o_out, size, SCALED: tl.constexpr, META: tl.constexpr
):  # fmt: skip
    """total += in weight, (rows, out channels); with SCALED, in is scaled first."""
    PRECISION: tl.constexpr = "tf32" if META.TF32 else "ieee"
    for first in range(0, size.C, META.CHUNK):
        o_in = first + tl.arange(0, META.CHUNK)
        weight = tl.load(
            weight_ptr + (o_in[:, None] * in_stride + o_out[None, :] * out_stride),
            mask=(o_in < size.C)[:, None] & (o_out < size.C)[None, :],
            other=0.0,
        )
        value = load_features(in_ptr, rows, o_in, size, META)
        if SCALED:
            scale = to_accumulator(scales_of(s_ptr, rows, o_in, size, META), in_ptr)
            value = to_accumulator(value, in_ptr) * scale
        left = operand(value, in_ptr, META)
        right = operand(weight, in_ptr, META)
        total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=total.dtype)
    return total


@triton.jit
def gconv_mix_fwd_kernel(
    u_ptr, s_ptr, weight_ptr, bias_ptr, y_ptr, N, C, pixels, of_sample,
    BIAS: tl.constexpr, LAST: tl.constexpr, TF32: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
    PIXELS: tl.constexpr, SAMPLES: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """y = u + (s u) Wᵀ + bias, a tile of pixels and output channels. Consecutive programs share a tile of u."""
    META: tl.constexpr = record(META_FIELDS)(LAST, TF32, WIDE, VECTOR, PIXELS, SAMPLES, COLUMNS, CHUNK)
    size = record(SIZE_FIELDS)(N, C, pixels, of_sample)
    blocks = tl.cdiv(C, COLUMNS)
    program = tl.program_id(0)
    tile = program // blocks
    o_out = (program - tile * blocks) * COLUMNS + tl.arange(0, COLUMNS)
    rows = rows_of(tile, size, META)
    # Start the sums with what is added to the product: it is exact there.
    total = to_accumulator(load_features(u_ptr, rows, o_out, size, META), u_ptr)
    if BIAS:
        total += to_accumulator(tl.load(bias_ptr + o_out, mask=o_out < C, other=0.0), u_ptr)[None, :]
    total = add_product(total, u_ptr, s_ptr, weight_ptr, C, 1, rows, o_out, size, True, META)
    pointers, exists = features_at(y_ptr, rows, o_out, size, META)
    tl.store(pointers, total.to(y_ptr.dtype.element_ty), mask=exists)


@triton.jit
def gconv_mix_bwd_input_kernel(
    grad_ptr, u_ptr, s_ptr, weight_ptr, grad_u_ptr, partials_ptr, N, C, pixels, of_sample,
    LAST: tl.constexpr, TF32: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
    PIXELS: tl.constexpr, SAMPLES: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """h = dy W, du = dy + s h, and for each sample the sums of u h over the tile's pixels, (tiles, N, C)."""
    META: tl.constexpr = record(META_FIELDS)(LAST, TF32, WIDE, VECTOR, PIXELS, SAMPLES, COLUMNS, CHUNK)
    size = record(SIZE_FIELDS)(N, C, pixels, of_sample)
    blocks = tl.cdiv(C, COLUMNS)
    program = tl.program_id(0)
    tile = program // blocks
    o_out = (program - tile * blocks) * COLUMNS + tl.arange(0, COLUMNS)
    rows = rows_of(tile, size, META)
    total = tl.zeros([SAMPLES * PIXELS, COLUMNS], dtype=partials_ptr.dtype.element_ty)
    h = add_product(total, grad_ptr, s_ptr, weight_ptr, 1, C, rows, o_out, size, False, META)
    grad = to_accumulator(load_features(grad_ptr, rows, o_out, size, META), u_ptr)
    scale = to_accumulator(scales_of(s_ptr, rows, o_out, size, META), u_ptr)
    pointers, exists = features_at(grad_u_ptr, rows, o_out, size, META)
    tl.store(pointers, (grad + scale * h).to(grad_u_ptr.dtype.element_ty), mask=exists)
    product = h * to_accumulator(load_features(u_ptr, rows, o_out, size, META), u_ptr)
    if SAMPLES == 1:
        part = (tile - rows.sample * of_sample) * N + rows.sample
        tl.store(partials_ptr + (part.to(tl.int64) * C + o_out), tl.sum(product, axis=0), mask=o_out < C)
    else:
        sums = tl.sum(tl.reshape(product, [SAMPLES, PIXELS, COLUMNS]), axis=1)
        o_sample = tile * SAMPLES + tl.arange(0, SAMPLES)
        to = partials_ptr + (o_sample.to(tl.int64)[:, None] * C + o_out[None, :])
        tl.store(to, sums, mask=(o_sample < N)[:, None] & (o_out < C)[None, :])


@triton.jit
def gconv_mix_bwd_weight_kernel(
    grad_ptr, u_ptr, s_ptr, weights_ptr, biases_ptr, N, C, pixels, of_sample, tiles,
    BIAS: tl.constexpr, LAST: tl.constexpr, TF32: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
    PIXELS: tl.constexpr, SAMPLES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dWᵀ = (s u)ᵀ dy and the sums of dy, over every parts-th tile: one (in, out) block of one partial sum."""
    META: tl.constexpr = record(META_FIELDS)(LAST, TF32, WIDE, VECTOR, PIXELS, SAMPLES, COLUMNS, SAMPLES * PIXELS)
    size = record(SIZE_FIELDS)(N, C, pixels, of_sample)
    blocks = tl.cdiv(C, COLUMNS)
    block = tl.program_id(0)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    in_block = block // blocks
    o_in = in_block * COLUMNS + tl.arange(0, COLUMNS)
    o_out = (block - in_block * blocks) * COLUMNS + tl.arange(0, COLUMNS)
    PRECISION: tl.constexpr = "tf32" if TF32 else "ieee"
    total = tl.zeros([COLUMNS, COLUMNS], dtype=weights_ptr.dtype.element_ty)
    sums = tl.zeros([COLUMNS], dtype=weights_ptr.dtype.element_ty)
    for tile in range(part, tiles, parts):
        rows = rows_of(tile, size, META)
        value = to_accumulator(load_features(u_ptr, rows, o_in, size, META), u_ptr)
        value *= to_accumulator(scales_of(s_ptr, rows, o_in, size, META), u_ptr)
        grad = load_features(grad_ptr, rows, o_out, size, META)
        left = tl.trans(operand(value, u_ptr, META))
        total = tl.dot(left, operand(grad, u_ptr, META), total, input_precision=PRECISION, out_dtype=total.dtype)
        if BIAS:
            sums += tl.sum(to_accumulator(grad, u_ptr), axis=0)
    to = weights_ptr + part.to(tl.int64) * C * C
    mask = (o_in < C)[:, None] & (o_out < C)[None, :]
    tl.store(to + (o_out[None, :] * C + o_in[:, None]), total, mask=mask)
    if BIAS:
        if in_block == 0:
            tl.store(biases_ptr + (part * C + o_out), sums, mask=o_out < C)


def _blocks_of(u: Tensor, allow_tf32: bool, of_grad_input: bool = False) -> Blocks:
    if u.dtype == torch.float64:
        return DOUBLE
    if u.dtype == torch.float32 and not allow_tf32:
        return PLAIN
    _, c, h, w = u.shape
    crowded = h * w < TENSOR_CORES.rows or c % 16 or (not is_channels_last(u) and h * w % 16)
    return TENSOR_CORES_CROWDED if crowded or (u.dtype == torch.float32 and of_grad_input) else TENSOR_CORES


class Tiles(NamedTuple):
    """How tiles are laid out over the pixels of u.

    Attributes:
        pixels, samples: per tile.
        of_sample: tiles per sample.
        count: tiles in total.
    """

    pixels: int
    samples: int
    of_sample: int
    count: int

    @classmethod
    def over(cls, u: Tensor, rows: int) -> "Tiles":
        n, _, h, w = u.shape
        pixels = min(rows, power_of_two_from(h * w))
        samples = rows // pixels
        of_sample = triton.cdiv(h * w, pixels)
        return cls(pixels, samples, of_sample, triton.cdiv(n, samples) if samples > 1 else n * of_sample)


def _options(u: Tensor, allow_tf32: bool, of: Blocks, tiles: Tiles) -> dict[str, Any]:
    """Sizes and compile-time constants that all kernels have."""
    n, c, h, w = u.shape
    pixels = h * w
    return {
        "N": n,
        "C": c,
        "pixels": pixels,
        "of_sample": tiles.of_sample,
        "LAST": is_channels_last(u),
        "TF32": u.dtype == torch.float32 and allow_tf32 and not torch.version.hip,  # few AMD GPUs have it
        "WIDE": INTERPRETED and u.dtype == torch.bfloat16,  # the interpreter's bfloat16 products are wrong
        "VECTOR": power_of_two_in(pixels, 16 // u.element_size()),
        "PIXELS": tiles.pixels,
        "SAMPLES": tiles.samples,
        "COLUMNS": min(of.columns, max(16, power_of_two_from(u.shape[1]))),
        "num_warps": of.warps,
        "num_stages": of.stages,
    }


def gconv_mix_fwd(u: Tensor, s: Tensor, mix_weight: Tensor, bias: Tensor | None, allow_tf32: bool) -> Tensor:
    y = dense_like(u)
    if u.numel() == 0:
        return y
    u, s, mix_weight = dense(u, y), s.contiguous(), mix_weight.contiguous()
    of = _blocks_of(u, allow_tf32)
    tiles = Tiles.over(u, of.rows)
    options = _options(u, allow_tf32, of, tiles)
    launch(
        wrap_triton(gconv_mix_fwd_kernel),
        (tiles.count * triton.cdiv(u.shape[1], options["COLUMNS"]),),
        u_ptr=u,
        s_ptr=s,
        weight_ptr=mix_weight,
        bias_ptr=mix_weight if bias is None else bias.contiguous(),
        y_ptr=y,
        BIAS=bias is not None,
        CHUNK=of.chunk,
        **options,
    )
    return y


def gconv_mix_bwd(
    grad_y: Tensor, u: Tensor, s: Tensor, mix_weight: Tensor, has_bias: bool, allow_tf32: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_u = dense_like(u)
    n, c = u.shape[:2]
    if u.numel() == 0:
        return grad_u, s.new_zeros((n, c)), s.new_zeros((c, c)), s.new_zeros((c if has_bias else 0,))
    grad_y, u, s, mix_weight = dense(grad_y, grad_u), dense(u, grad_u), s.contiguous(), mix_weight.contiguous()
    of = _blocks_of(u, allow_tf32, of_grad_input=True)
    tiles = Tiles.over(u, of.rows)
    options = _options(u, allow_tf32, of, tiles)

    def sums(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=accumulator(u), device=u.device)

    partials = sums(tiles.of_sample, n, c)
    launch(
        wrap_triton(gconv_mix_bwd_input_kernel),
        (tiles.count * triton.cdiv(c, options["COLUMNS"]),),
        grad_ptr=grad_y,
        u_ptr=u,
        s_ptr=s,
        weight_ptr=mix_weight,
        grad_u_ptr=grad_u,
        partials_ptr=partials,
        CHUNK=of.chunk,
        **options,
    )

    # For the gradient of the weight, the rows of a tile are the chunk.
    of = _blocks_of(u, allow_tf32)
    tiles = Tiles.over(u, of.chunk)
    options = _options(u, allow_tf32, of, tiles)
    blocks = triton.cdiv(c, options["COLUMNS"])
    parts = max(1, min(tiles.count, triton.cdiv(PROGRAMS, blocks * blocks)))
    weights, biases = sums(parts, c, c), sums(parts, c if has_bias else 0)
    launch(
        wrap_triton(gconv_mix_bwd_weight_kernel),
        (blocks * blocks, parts),
        grad_ptr=grad_y,
        u_ptr=u,
        s_ptr=s,
        weights_ptr=weights,
        biases_ptr=biases if has_bias else partials,
        tiles=tiles.count,
        BIAS=has_bias,
        **options,
    )
    return grad_u, *(t.sum(0).to(u.dtype) for t in (partials, weights, biases))


gconv_mix_fwd_triton = op_of_kernels("pixnorm::gconv_mix_fwd_triton", mutates_args=())(gconv_mix_fwd)
gconv_mix_bwd_triton = op_of_kernels("pixnorm::gconv_mix_bwd_triton", mutates_args=())(gconv_mix_bwd)
# Shapes, dtypes and strides are those of the native ops.
gconv_mix_fwd_triton.register_fake(gconv_mix_fwd_fake)
gconv_mix_bwd_triton.register_fake(gconv_mix_bwd_fake)
