"""Tiles of CHANNELS channels and PIXELS pixels of one sample, which kernels without neighbours go over.

[channel][pixel] in NCHW, [pixel][channel] in channels_last: either way the last axis is contiguous in memory and moves
as vectors of up to 16 bytes. Numbers of channels are broadcast along the pixels, and sums are taken along them.

Kernels give what they know at compile time as META, a record with at least LAST, V, CHANNELS and PIXELS (see
``Tiling``), and sizes as a record with at least C, pixels and parts.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixnorm.ops.common import is_channels_last
from pixnorm.triton_kernels.common import SIZES, WARP, power_of_two_from, power_of_two_in, record, to_accumulator

# Elements of the largest tensor per tile: each of 128 threads moves two vectors of 16 bytes of a tensor at once (in
# float32 four).
TILE, TILE_OF_DOUBLE, WARPS = 2048, 1024, 4
# Bytes per pixel of a tile in channels_last, at least; of whole planes shorter ones where planes are large.
RUN, SHORT_RUN = 128, 32
# Whole planes that stay in registers: a thread has EACH of their elements, or more where that would take more than
# MOST_WARPS.
EACH, MOST_WARPS = 16, 16
# Programs in total where planes are large: enough to fill any GPU, and few partial sums.
PROGRAMS = 4096
NOT_SPECIALISED = [*SIZES, "pixels", "tiles", "partials"]


class Tiling(NamedTuple):
    """How the kernels walk over x. It depends on the shape alone, so sums have the same order on every GPU.

    Attributes:
        columns: adjacent elements of x that are one vector.
        channels, pixels: of a tile.
        tiles: per program.
        parts: programs for the same channels of a sample.
        programs: in total.
        warps: per program.
    """

    columns: int
    channels: int
    pixels: int
    tiles: int
    parts: int
    programs: int
    warps: int

    @classmethod
    def of(cls, x: Tensor, upsample: int = 1, per_pixel: bool = False, share: int = 1) -> "Tiling":
        """Of up to TILE / share elements of y.

        With ``per_pixel`` something is loaded for each pixel, and shared by as many channels as a thread can have: in
        NCHW a row of the tile is one vector of each thread.
        """
        n, c, h, w = x.shape
        itemsize = x.element_size()
        channels_last = is_channels_last(x)
        tile = (TILE_OF_DOUBLE if x.dtype == torch.float64 else TILE) // upsample // max(1, share)
        vector = 16 // itemsize
        planes = power_of_two_from(h * w)
        if channels_last:
            columns = power_of_two_in(c, vector)
            channels = min(power_of_two_from(c), max(RUN // itemsize, tile // planes))
            pixels = max(1, min(planes, tile // channels))
        else:
            columns = power_of_two_in(h * w, vector) if upsample == 1 else power_of_two_in(w, vector // upsample)
            pixels = min(planes, tile, WARPS * WARP * vector if per_pixel else tile)
            channels = min(power_of_two_from(c), tile // pixels)
        of_sample, blocks = triton.cdiv(h * w, pixels), triton.cdiv(c, channels)
        tiles = triton.cdiv(of_sample, max(1, PROGRAMS // max(1, n * blocks)))
        parts = triton.cdiv(of_sample, tiles)
        vectors = channels * pixels // columns
        return cls(columns, channels, pixels, tiles, parts, n * blocks * parts, max(1, min(WARPS, vectors // WARP)))

    @classmethod
    def of_planes(cls, x: Tensor, most: int) -> "Tiling | None":
        """A tile of whole planes per program, of up to so many elements (float64: half as many); None if too large."""
        n, c, h, w = x.shape
        itemsize, planes = x.element_size(), power_of_two_from(h * w)
        tile, most = (TILE_OF_DOUBLE, most // 2) if x.dtype == torch.float64 else (TILE, most)
        vector, channels = 16 // itemsize, max(1, tile // planes)
        if is_channels_last(x):
            channels = max(SHORT_RUN // itemsize, min(max(RUN // itemsize, channels), most // planes))
        channels = min(channels, power_of_two_from(c))
        if channels * planes > most:
            return None
        columns = power_of_two_in(c if is_channels_last(x) else h * w, vector)
        warps = max(1, min(MOST_WARPS, channels * planes // (EACH * WARP)))
        return cls(columns, channels, planes, 1, 1, n * triton.cdiv(c, channels), warps)


@triton.jit
def place_of_program(size, META: tl.constexpr):
    """The sample, first channel and part of a plane's pixels of a program; neighbours are adjacent in memory.

    Sizes are rounded to vectors, which changes nothing but tells the compiler that masks are of whole vectors.
    """
    blocks = tl.cdiv(size.C, META.CHANNELS)
    program = tl.program_id(0)
    if META.LAST:
        block = program % blocks
        part = (program // blocks) % size.parts
        channels = (size.C // META.V) * META.V
        pixels = size.pixels
    else:
        part = program % size.parts
        block = (program // size.parts) % blocks
        channels = size.C
        pixels = (size.pixels // META.V) * META.V
    n = (program // (blocks * size.parts)).to(tl.int64)
    return record("n c part channels pixels")(n, block * META.CHANNELS, part, channels, pixels)


@triton.jit
def tile_at(place, first, META: tl.constexpr):
    """Offsets in a sample of x, and which exist, of the tile from pixel ``first`` on."""
    o_channel = tl.arange(0, META.CHANNELS)
    o_pixel = tl.arange(0, META.PIXELS)
    if META.LAST:
        starts = tl.multiple_of((first + o_pixel) * place.channels + place.c, META.V)
        offset = starts[:, None] + o_channel[None, :]
        exists = (o_pixel < place.pixels - first)[:, None] & (o_channel < place.channels - place.c)[None, :]
    else:
        starts = tl.multiple_of((place.c + o_channel) * place.pixels + first, META.V)
        # No more adjacent pixels than a vector, so that a thread's pixels of x and of y are the same.
        pixel = tl.max_contiguous(tl.multiple_of(o_pixel, META.V), META.V)
        offset = starts[:, None] + pixel[None, :]
        exists = (o_channel < place.channels - place.c)[:, None] & (o_pixel < place.pixels - first)[None, :]
    return record("offset exists")(offset, exists)


@triton.jit
def of_channels(pointer, place, PER_SAMPLE: tl.constexpr, META: tl.constexpr):
    """One number for each channel of a tile, to be broadcast along its pixels."""
    o_channel = tl.arange(0, META.CHANNELS)
    if PER_SAMPLE:
        pointer += place.n * place.channels
    value = tl.load(pointer + place.c + o_channel, mask=o_channel < place.channels - place.c, other=0.0)
    value = to_accumulator(value, pointer)
    if META.LAST:
        return value[None, :]
    else:
        return value[:, None]


@triton.jit
def of_pixels(pointer, place, first, META: tl.constexpr):
    """One number for each pixel of a tile of a sample, to be broadcast along its channels."""
    o_pixel = tl.arange(0, META.PIXELS)
    exists = o_pixel < place.pixels - first
    if META.LAST:
        value = tl.load(pointer + (first + o_pixel)[:, None], mask=exists[:, None], other=0.0)
    else:
        pixel = tl.max_contiguous(tl.multiple_of(first + o_pixel, META.V), META.V)
        value = tl.load(pointer + pixel[None, :], mask=exists[None, :], other=0.0)
    return to_accumulator(value, pointer)


@triton.jit
def norm_of(mean_ptr, var_ptr, place, META: tl.constexpr):
    """META has INSTANCE (whether statistics are those of a sample) and EPS too."""
    mean = of_channels(mean_ptr, place, META.INSTANCE, META)
    var = of_channels(var_ptr, place, META.INSTANCE, META)
    return record("mean rstd")(mean, 1.0 / tl.sqrt(var + META.EPS))


@triton.jit
def load_tile(pointer, at):
    return to_accumulator(tl.load(pointer + at.offset, mask=at.exists, other=0.0), pointer)


@triton.jit
def store_tile(pointer, at, tile):
    tl.store(pointer + at.offset, tile.to(pointer.dtype.element_ty), mask=at.exists)


@triton.jit
def sum_of_planes(tile, META: tl.constexpr):
    return tl.sum(tile, axis=0 if META.LAST else 1, keep_dims=True)


@triton.jit
def store_of_planes(pointer, place, value, META: tl.constexpr):
    """One number for each plane of a tile, (N, C)."""
    o_channel = tl.arange(0, META.CHANNELS)
    value = tl.reshape(value, [META.CHANNELS]).to(pointer.dtype.element_ty)
    to = pointer + (place.n * place.channels + place.c) + o_channel
    tl.store(to, value, mask=o_channel < place.channels - place.c)


@triton.jit
def moments_of_planes(tile, exists, pixels, META: tl.constexpr):
    """Mean and biased variance of whole planes, and their elements less the mean; the tile is 0 beyond the planes."""
    each = 1.0 / tl.cast(pixels, tile.dtype)
    about = sum_of_planes(tile, META) * each
    d = tl.where(exists, tile - about, 0.0)
    # What the rounding of the first mean has left.
    rest = sum_of_planes(d, META) * each
    d = tl.where(exists, d - rest, 0.0)
    return about + rest, sum_of_planes(d * d, META) * each, d
