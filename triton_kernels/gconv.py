"""GConv's mixing in Triton: products whose features are scaled on the way in, and finished on the way out.

Forward reads u and writes y; backward reads dy and u and writes du, and reads dy and u again for the gradient of the
weight. A tile is some pixels by some channels. What is scaled is the left operand, which tensor cores take from
registers, so a tile's rows are pixels: of large planes, those of one sample, of small planes, those of several.
"""

from typing import NamedTuple

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
    to_accumulator,
    wrap_triton,
)
from pixnorm.triton_kernels.projection import rounded_to_tf32


class Blocks(NamedTuple):
    """Sizes of the tiles of a product: its rows (pixels), its columns and what it sums over at a time."""

    rows: int
    columns: int
    chunk: int
    warps: int
    stages: int


# On tensor cores the tile of sums is 64 registers of a thread; half as many where there are other things to keep: two
# more tiles of float32 at the end, scales of several samples, addresses that do not follow each other. Without tensor
# cores, and in double, the operands need room too.
TENSOR_CORES = Blocks(rows=128, columns=128, chunk=32, warps=8, stages=3)
TENSOR_CORES_CROWDED = TENSOR_CORES._replace(columns=64)
PLAIN = Blocks(rows=64, columns=64, chunk=16, warps=8, stages=2)
DOUBLE = Blocks(rows=32, columns=32, chunk=16, warps=4, stages=2)
# Programs that sum up the gradient of the weight: two for each multiprocessor of an H200, and as many on every GPU, so
# that sums are the same ones.
PROGRAMS = 264


@triton.jit
def pixels_of(
    tile, N, C, pixels, of_sample, LAST: tl.constexpr, VECTOR: tl.constexpr, PIXELS: tl.constexpr, SAMPLES: tl.constexpr
):
    """Of each row of a tile: its sample (one for all, if SAMPLES is 1), its offset, and whether it exists.

    Samples of more pixels than a tile has have several, `of_sample`.
    """
    o_row = tl.arange(0, SAMPLES * PIXELS)
    if SAMPLES == 1:
        sample = tile // of_sample
        pixel = (tile - sample * of_sample) * PIXELS + o_row
    else:
        sample = tile * SAMPLES + o_row // PIXELS
        pixel = o_row % PIXELS
    valid = (sample < N) & (pixel < pixels)
    if LAST:
        start = sample.to(tl.int64) * (pixels * C) + pixel * C
    else:
        start = sample.to(tl.int64) * (pixels * C) + pixel
        start = tl.max_contiguous(tl.multiple_of(start, VECTOR), VECTOR)
    return sample, start, valid


@triton.jit
def scales_of(s_ptr, sample, o_channel, exists, N, C, SAMPLES: tl.constexpr):
    """The scales of some channels, for each row, or one row for all where the sample is one."""
    if SAMPLES == 1:
        return tl.load(s_ptr + (sample.to(tl.int64) * C + o_channel), mask=exists, other=0.0)[None, :]
    else:
        mask = (sample < N)[:, None] & exists[None, :]
        return tl.load(s_ptr + (sample.to(tl.int64)[:, None] * C + o_channel[None, :]), mask=mask, other=0.0)


@triton.jit
def operand(value, like, TF32: tl.constexpr, WIDE: tl.constexpr):
    """As the product takes it: in the dtype of the tensors. WIDE is for an interpreter that cannot multiply it."""
    value = value.to(like.dtype.element_ty)
    if WIDE:
        return value.to(tl.float32)
    elif TF32:
        return rounded_to_tf32(value)
    else:
        return value


@triton.jit
def load_features(pointer, start, o_channel, valid, exists, channel):
    """A (rows, channels) tile, 0 beyond the tensor's."""
    pointers = pointer + (start[:, None] + o_channel[None, :] * channel)
    return tl.load(pointers, mask=valid[:, None] & exists[None, :], other=0.0)


@triton.jit
def add_product(
    total, in_ptr, s_ptr, weight_ptr, sample, start, valid, o_out, N, C, channel, out_stride, in_stride,
    SCALED: tl.constexpr, TF32: tl.constexpr, WIDE: tl.constexpr, SAMPLES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """total += in weight, (rows, out channels); with SCALED, in is scaled first."""
    PRECISION: tl.constexpr = "tf32" if TF32 else "ieee"
    for first in range(0, C, CHUNK):
        o_in = first + tl.arange(0, CHUNK)
        exists = o_in < C
        weight = tl.load(
            weight_ptr + (o_in[:, None] * in_stride + o_out[None, :] * out_stride),
            mask=exists[:, None] & (o_out < C)[None, :],
            other=0.0,
        )
        value = load_features(in_ptr, start, o_in, valid, exists, channel)
        if SCALED:
            value = to_accumulator(value, in_ptr) * to_accumulator(
                scales_of(s_ptr, sample, o_in, exists, N, C, SAMPLES), in_ptr
            )
        left = operand(value, in_ptr, TF32, WIDE)
        right = operand(weight, in_ptr, TF32, WIDE)
        total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=total.dtype)
    return total


@triton.jit
def gconv_mix_fwd_kernel(
    u_ptr, s_ptr, weight_ptr, bias_ptr, y_ptr, N, C, pixels, of_sample,
    BIAS: tl.constexpr, LAST: tl.constexpr, TF32: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
    PIXELS: tl.constexpr, SAMPLES: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """y = u + (s u) Wᵀ + bias, a tile of pixels and output channels; programs of one tile of u follow each other."""
    blocks = tl.cdiv(C, COLUMNS)
    program = tl.program_id(0)
    tile = program // blocks
    o_out = (program - tile * blocks) * COLUMNS + tl.arange(0, COLUMNS)
    exists = o_out < C
    channel = 1 if LAST else pixels
    sample, start, valid = pixels_of(tile, N, C, pixels, of_sample, LAST, VECTOR, PIXELS, SAMPLES)
    # What is added goes first into the sums, exactly.
    total = to_accumulator(load_features(u_ptr, start, o_out, valid, exists, channel), u_ptr)
    if BIAS:
        total += to_accumulator(tl.load(bias_ptr + o_out, mask=exists, other=0.0), u_ptr)[None, :]
    total = add_product(
        total, u_ptr, s_ptr, weight_ptr, sample, start, valid, o_out, N, C, channel, C, 1,
        True, TF32, WIDE, SAMPLES, CHUNK,
    )  # fmt: skip
    pointers = y_ptr + (start[:, None] + o_out[None, :] * channel)
    tl.store(pointers, total.to(y_ptr.dtype.element_ty), mask=valid[:, None] & exists[None, :])


@triton.jit
def gconv_mix_bwd_input_kernel(
    grad_ptr, u_ptr, s_ptr, weight_ptr, grad_u_ptr, partials_ptr, N, C, pixels, of_sample,
    LAST: tl.constexpr, TF32: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
    PIXELS: tl.constexpr, SAMPLES: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """h = dy W, du = dy + s h, and of each sample the sums of u h over the tile's pixels, (tiles, N, C)."""
    blocks = tl.cdiv(C, COLUMNS)
    program = tl.program_id(0)
    tile = program // blocks
    o_out = (program - tile * blocks) * COLUMNS + tl.arange(0, COLUMNS)
    exists = o_out < C
    channel = 1 if LAST else pixels
    sample, start, valid = pixels_of(tile, N, C, pixels, of_sample, LAST, VECTOR, PIXELS, SAMPLES)
    total = tl.zeros([SAMPLES * PIXELS, COLUMNS], dtype=partials_ptr.dtype.element_ty)
    h = add_product(
        total, grad_ptr, s_ptr, weight_ptr, sample, start, valid, o_out, N, C, channel, 1, C,
        False, TF32, WIDE, SAMPLES, CHUNK,
    )  # fmt: skip
    grad = to_accumulator(load_features(grad_ptr, start, o_out, valid, exists, channel), u_ptr)
    scale = to_accumulator(scales_of(s_ptr, sample, o_out, exists, N, C, SAMPLES), u_ptr)
    pointers = grad_u_ptr + (start[:, None] + o_out[None, :] * channel)
    tl.store(pointers, (grad + scale * h).to(grad_u_ptr.dtype.element_ty), mask=valid[:, None] & exists[None, :])
    product = h * to_accumulator(load_features(u_ptr, start, o_out, valid, exists, channel), u_ptr)
    if SAMPLES == 1:
        part = (tile - sample * of_sample) * N + sample
        tl.store(partials_ptr + (part.to(tl.int64) * C + o_out), tl.sum(product, axis=0), mask=exists)
    else:
        sums = tl.sum(tl.reshape(product, [SAMPLES, PIXELS, COLUMNS]), axis=1)
        o_sample = tile * SAMPLES + tl.arange(0, SAMPLES)
        to = partials_ptr + (o_sample.to(tl.int64)[:, None] * C + o_out[None, :])
        tl.store(to, sums, mask=(o_sample < N)[:, None] & exists[None, :])


@triton.jit
def gconv_mix_bwd_weight_kernel(
    grad_ptr, u_ptr, s_ptr, weights_ptr, biases_ptr, N, C, pixels, of_sample, tiles,
    BIAS: tl.constexpr, LAST: tl.constexpr, TF32: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
    PIXELS: tl.constexpr, SAMPLES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dWᵀ = (s u)ᵀ dy and the sums of dy, over every parts-th tile: one (in, out) block of one of the parts."""
    blocks = tl.cdiv(C, COLUMNS)
    block = tl.program_id(0)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    in_block = block // blocks
    o_in = in_block * COLUMNS + tl.arange(0, COLUMNS)
    o_out = (block - in_block * blocks) * COLUMNS + tl.arange(0, COLUMNS)
    channel = 1 if LAST else pixels
    PRECISION: tl.constexpr = "tf32" if TF32 else "ieee"
    total = tl.zeros([COLUMNS, COLUMNS], dtype=weights_ptr.dtype.element_ty)
    sums = tl.zeros([COLUMNS], dtype=weights_ptr.dtype.element_ty)
    for tile in range(part, tiles, parts):
        sample, start, valid = pixels_of(tile, N, C, pixels, of_sample, LAST, VECTOR, PIXELS, SAMPLES)
        value = to_accumulator(load_features(u_ptr, start, o_in, valid, o_in < C, channel), u_ptr)
        value *= to_accumulator(scales_of(s_ptr, sample, o_in, o_in < C, N, C, SAMPLES), u_ptr)
        grad = load_features(grad_ptr, start, o_out, valid, o_out < C, channel)
        left = tl.trans(operand(value, u_ptr, TF32, WIDE))
        total = tl.dot(left, operand(grad, u_ptr, TF32, WIDE), total, input_precision=PRECISION, out_dtype=total.dtype)
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
    """How tiles of so many rows lie over the pixels of u.

    Attributes:
        pixels, samples: of a tile.
        of_sample: tiles that a sample has.
        count: of all.
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


def _options(u: Tensor, allow_tf32: bool, of: Blocks, tiles: Tiles) -> dict:
    pixels = u.shape[2] * u.shape[3]
    return {
        "LAST": is_channels_last(u),
        "TF32": u.dtype == torch.float32 and allow_tf32 and not torch.version.hip,  # few of AMD's GPUs have it
        "WIDE": INTERPRETED and u.dtype == torch.bfloat16,
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
    n, c, h, w = u.shape
    of = _blocks_of(u, allow_tf32)
    tiles = Tiles.over(u, of.rows)
    options = _options(u, allow_tf32, of, tiles)
    grid = (tiles.count * triton.cdiv(c, options["COLUMNS"]),)
    launch(
        wrap_triton(gconv_mix_fwd_kernel), grid, u, s, mix_weight, mix_weight if bias is None else bias.contiguous(), y,
        n, c, h * w, tiles.of_sample, BIAS=bias is not None, CHUNK=of.chunk, **options,
    )  # fmt: skip
    return y


def gconv_mix_bwd(
    grad_y: Tensor, u: Tensor, s: Tensor, mix_weight: Tensor, has_bias: bool, allow_tf32: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_u = dense_like(u)
    n, c, h, w = u.shape
    if u.numel() == 0:
        return grad_u, s.new_zeros((n, c)), s.new_zeros((c, c)), s.new_zeros((c if has_bias else 0,))
    grad_y, u, s, mix_weight = dense(grad_y, grad_u), dense(u, grad_u), s.contiguous(), mix_weight.contiguous()
    of = _blocks_of(u, allow_tf32, of_grad_input=True)
    tiles = Tiles.over(u, of.rows)
    options = _options(u, allow_tf32, of, tiles)
    grid = (tiles.count * triton.cdiv(c, options["COLUMNS"]),)

    def sums(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=accumulator(u), device=u.device)

    partials = sums(tiles.of_sample, n, c)
    launch(
        wrap_triton(gconv_mix_bwd_input_kernel), grid, grad_y, u, s, mix_weight, grad_u, partials,
        n, c, h * w, tiles.of_sample, CHUNK=of.chunk, **options,
    )  # fmt: skip

    # Of the gradient of the weight, the rows of a tile are what is summed over at a time.
    of = _blocks_of(u, allow_tf32)
    tiles = Tiles.over(u, of.chunk)
    options = _options(u, allow_tf32, of, tiles)
    blocks = triton.cdiv(c, options["COLUMNS"])
    parts = max(1, min(tiles.count, triton.cdiv(PROGRAMS, blocks * blocks)))
    weights, biases = sums(parts, c, c), sums(parts, c if has_bias else 0)
    launch(
        wrap_triton(gconv_mix_bwd_weight_kernel), (blocks * blocks, parts), grad_y, u, s, weights,
        biases if has_bias else partials, n, c, h * w, tiles.of_sample, tiles.count, BIAS=has_bias, **options,
    )  # fmt: skip
    return grad_u, *(t.sum(0).to(u.dtype) for t in (partials, weights, biases))


gconv_mix_fwd_triton = op_of_kernels("pixnorm::gconv_mix_fwd_triton", mutates_args=())(gconv_mix_fwd)
gconv_mix_bwd_triton = op_of_kernels("pixnorm::gconv_mix_bwd_triton", mutates_args=())(gconv_mix_bwd)
# Shapes, dtypes and strides are those of the native ops.
gconv_mix_fwd_triton.register_fake(gconv_mix_fwd_fake)
gconv_mix_bwd_triton.register_fake(gconv_mix_bwd_fake)
