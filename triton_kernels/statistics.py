"""Mean and biased variance of one or two tensors, per channel or per channel and sample; the same bits on every run.

Statistics are those of G groups of samples: of one group, as in batch norm, or of one per sample, as in instance norm.
The first stage reduces parts of a group to [tensor][group][part][count, mean, sum of squared differences from it][C];
a part never straddles two groups. The second stage merges the parts of a group by the formula for pooled variance,
which does not cancel where the mean is large.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixnorm.ops.common import dense, is_channels_last
from pixnorm.triton_kernels.common import (
    WARP,
    accumulator,
    launch,
    power_of_two_from,
    power_of_two_in,
    to_accumulator,
    wrap_triton,
)

# Elements per tile; a thread has 16 (float64: 8), each with a running mean and sum of squares in registers.
TILE, TILE_OF_DOUBLE, WARPS = 2048, 1024, 4
# Bytes per row of a tile in channels_last.
RUN = 128
# Programs in total, and tiles per program at least: enough to fill any GPU, and few parts to merge.
PROGRAMS, LEAST_TILES = 2048, 4
# Parts that one program merges; if there are more, blocks of BLOCK parts are merged first.
MOST_PARTS, BLOCK = 512, 64


@triton.jit
def store_part(partials_ptr, part, channel, C, count, mean, squares, exists):
    """Writes one part of some channels; ``part`` counts those of all tensors and groups."""
    row = part.to(tl.int64) * 3
    tl.store(partials_ptr + row * C + channel, count, mask=exists)
    tl.store(partials_ptr + (row + 1) * C + channel, mean, mask=exists)
    tl.store(partials_ptr + (row + 2) * C + channel, squares, mask=exists)


@triton.jit
def welford(value, valid, seen, mean, squares):
    """Adds one more value, the ``seen``-th, to the mean and the sum of squares of each element of a tile."""
    d = value - mean
    next_mean = mean + d * (1.0 / seen)
    squares = tl.where(valid, squares + d * (value - next_mean), squares)
    return tl.where(valid, next_mean, mean), squares


@triton.jit
def pooled(count, mean, squares, first, AXIS: tl.constexpr):
    """Count, mean and sum of squares of all elements along an axis of a tile; ``first`` is the one in front."""
    about = tl.sum(tl.where(first, mean, 0.0), axis=AXIS, keep_dims=True)
    whole = tl.sum(count, axis=AXIS, keep_dims=True)
    of_all = about + tl.sum(count * (mean - about), axis=AXIS, keep_dims=True) / whole
    d = mean - of_all
    return whole, of_all, tl.sum(squares + count * d * d, axis=AXIS, keep_dims=True)


@triton.jit
def statistics_kernel(
    x_ptr, other_ptr, partials_ptr, C, pixels, rows, groups, parts, tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Welford's algorithm over the tiles of a part, independently for each element of the tile; then their sum.

    Rows of a tile are pixels in channels_last; in NCHW, vectors of pixels of one channel. A group has ``rows`` of them.
    In NCHW there is one group: statistics per sample are those of one sample with N C channels.
    """
    tensor = tl.program_id(2)
    part = tl.program_id(1)
    data = x_ptr
    if tensor == 1:
        data = other_ptr
    o_row = tl.arange(0, ROWS)
    o_column = tl.arange(0, COLUMNS)
    if LAST:
        blocks = tl.cdiv(C, COLUMNS)
        group = tl.program_id(0) // blocks
        channel = (tl.program_id(0) - group * blocks) * COLUMNS + o_column
        in_row = channel < C
        data += group.to(tl.int64) * rows * C
        part_of_all = (tensor * groups + group) * parts + part
    else:
        c = tl.program_id(0)
        per_plane = pixels // COLUMNS
        in_row = o_column < COLUMNS
        part_of_all = tensor * parts + part

    begin = part * tiles * ROWS
    end = tl.minimum(begin + tiles * ROWS, rows)
    zero = to_accumulator(tl.zeros([ROWS, COLUMNS], dtype=tl.float32), x_ptr)
    mean = zero
    squares = zero
    seen = to_accumulator(tl.zeros([1, 1], dtype=tl.float32), x_ptr)
    for first in range(begin, end, ROWS):
        row = first + o_row
        valid = (row < end)[:, None] & in_row[None, :]
        if LAST:
            offset = row.to(tl.int64)[:, None] * C + channel[None, :]
        else:
            n = row // per_plane
            start = (n.to(tl.int64) * C + c) * pixels + (row - n * per_plane) * COLUMNS
            offset = tl.multiple_of(start, COLUMNS)[:, None] + o_column[None, :]
        value = to_accumulator(tl.load(data + offset, mask=valid, other=0.0), x_ptr)
        seen += 1.0
        mean, squares = welford(value, valid, seen, mean, squares)

    # In how many tiles each row was valid.
    times = tl.maximum((end - begin - o_row + (ROWS - 1)) // ROWS, 0)
    count = to_accumulator(times, x_ptr)[:, None] + zero
    first = (o_row == 0)[:, None]
    if LAST:
        whole, of_all, of_squares = pooled(count, mean, squares, first, 0)
        store_part(partials_ptr, part_of_all, channel[None, :], C, whole, of_all, of_squares, in_row[None, :])
    else:
        first_mean = tl.where(first, mean, 0.0)
        about = tl.sum(tl.sum(tl.where((o_column == 0)[None, :], first_mean, 0.0), axis=1), axis=0)
        whole = tl.sum(tl.sum(count, axis=1), axis=0)
        of_all = about + tl.sum(tl.sum(count * (mean - about), axis=1), axis=0) / whole
        d = mean - of_all
        of_squares = tl.sum(tl.sum(squares + count * d * d, axis=1), axis=0)
        store_part(partials_ptr, part_of_all, c, C, whole, of_all, of_squares, None)


@triton.jit
def merged(partials_ptr, begin, end, channel, C, PARTS: tl.constexpr):
    """Count, mean and sum of squares of some channels over the parts begin to end, at least one; PARTS at a time."""
    exists = channel < C
    o_part = tl.arange(0, PARTS)
    about = tl.load(partials_ptr + (begin * 3 + 1) * C + channel, mask=exists, other=0.0)
    whole = tl.zeros_like(about)
    shifted = tl.zeros_like(about)
    for first in range(begin, end, PARTS):
        part = first + o_part
        at = (part.to(tl.int64) * 3 * C)[:, None] + channel[None, :]
        valid = (part < end)[:, None] & exists[None, :]
        count = tl.load(partials_ptr + at, mask=valid, other=0.0)
        mean = tl.load(partials_ptr + (at + C), mask=valid, other=0.0)
        whole += tl.sum(count, axis=0)
        shifted += tl.sum(tl.where(valid, count * (mean - about[None, :]), 0.0), axis=0)
    of_all = about + shifted / tl.where(exists, whole, 1.0)
    squares = tl.zeros_like(about)
    for first in range(begin, end, PARTS):
        part = first + o_part
        at = (part.to(tl.int64) * 3 * C)[:, None] + channel[None, :]
        valid = (part < end)[:, None] & exists[None, :]
        count = tl.load(partials_ptr + at, mask=valid, other=0.0)
        mean = tl.load(partials_ptr + (at + C), mask=valid, other=0.0)
        square = tl.load(partials_ptr + (at + C + C), mask=valid, other=0.0)
        d = mean - of_all[None, :]
        squares += tl.sum(tl.where(valid, square + count * d * d, 0.0), axis=0)
    return whole, of_all, squares


@triton.jit
def channels_of_group(C, CHANNELS: tl.constexpr):
    """Which group of which tensor (they are counted together), and which of its channels, this program has."""
    blocks = tl.cdiv(C, CHANNELS)
    group = tl.program_id(0) // blocks
    return group, (tl.program_id(0) - group * blocks) * CHANNELS + tl.arange(0, CHANNELS)


@triton.jit
def merge_statistics_kernel(
    partials_ptr, merged_ptr, C, parts, merged_parts, BLOCK: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Merges BLOCK parts into one."""
    group, channel = channels_of_group(C, CHANNELS)
    block = tl.program_id(1)
    of_group = partials_ptr + group.to(tl.int64) * parts * 3 * C
    end = tl.minimum(block * BLOCK + BLOCK, parts)
    whole, mean, squares = merged(of_group, block * BLOCK, end, channel, C, PARTS)
    store_part(merged_ptr, group * merged_parts + block, channel, C, whole, mean, squares, channel < C)


@triton.jit
def finish_statistics_kernel(
    partials_ptr, mean_ptr, var_ptr, other_mean_ptr, other_var_ptr, C, groups, parts,
    PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and variance from all parts of a group."""
    group, channel = channels_of_group(C, CHANNELS)
    of_group = partials_ptr + group.to(tl.int64) * parts * 3 * C
    whole, mean, squares = merged(of_group, 0, parts, channel, C, PARTS)
    tensor = group // groups
    if tensor == 1:
        mean_ptr = other_mean_ptr
        var_ptr = other_var_ptr
    at = (group - tensor * groups).to(tl.int64) * C + channel
    tl.store(mean_ptr + at, mean, mask=channel < C)
    tl.store(var_ptr + at, squares / whole, mask=channel < C)


class Layout(NamedTuple):
    """Samples, channels and pixels as the kernels count them, and groups of samples."""

    n: int
    c: int
    pixels: int
    groups: int

    @classmethod
    def of(cls, x: Tensor, instance: bool) -> "Layout":
        n, c, h, w = x.shape
        if instance and not is_channels_last(x):
            return cls(1, n * c, h * w, 1)
        return cls(n, c, h * w, n if instance else 1)


def partial_statistics(tensors: list[Tensor], instance: bool = False) -> Tensor:
    """The first stage, for one or two tensors of one shape and layout: (tensors, groups, parts, 3, C)."""
    x = tensors[0]
    channels_last = is_channels_last(x)
    n, c, pixels, groups = Layout.of(x, instance)
    tile = TILE_OF_DOUBLE if x.dtype == torch.float64 else TILE
    if channels_last:
        columns = min(RUN // x.element_size(), power_of_two_from(c))
        blocks, rows = triton.cdiv(c, columns), n * pixels // groups
    else:
        columns = power_of_two_in(pixels, 16 // x.element_size())
        blocks, rows = c, n * (pixels // columns)
    rows_of_tile = tile // columns
    if instance:  # small planes need smaller tiles, and fewer warps
        rows_of_tile = min(rows_of_tile, max(WARP, power_of_two_from(rows)))
    vectors = rows_of_tile * columns * x.element_size() // 16
    wanted = max(1, PROGRAMS // (blocks * groups * len(tensors)))
    tiles = max(LEAST_TILES, triton.cdiv(triton.cdiv(rows, rows_of_tile), wanted))
    parts = triton.cdiv(rows, rows_of_tile * tiles)
    partials = torch.empty((len(tensors), groups, parts, 3, c), dtype=accumulator(x), device=x.device)
    launch(
        wrap_triton(statistics_kernel),
        (blocks * groups, parts, len(tensors)),
        x_ptr=x,
        other_ptr=tensors[-1],
        partials_ptr=partials,
        C=c,
        pixels=pixels,
        rows=rows,
        groups=groups,
        parts=parts,
        tiles=tiles,
        ROWS=rows_of_tile,
        COLUMNS=columns,
        LAST=channels_last,
        num_warps=max(1, min(WARPS, vectors // WARP)),
    )
    return partials


def finish_statistics(partials: Tensor) -> list[Tensor]:
    """The second stage: mean and variance of each tensor, (groups, C) each, or (C,) if there is one group."""
    tensors, groups, parts, _, c = partials.shape
    channels = min(32, power_of_two_from(c))
    programs = triton.cdiv(c, channels) * groups * tensors
    blocks = {"PARTS": 32, "CHANNELS": channels, "num_warps": WARPS}
    if parts > MOST_PARTS:
        fewer = triton.cdiv(parts, BLOCK)
        shape = tensors, groups, fewer, 3, c
        merged_partials = torch.empty(shape, dtype=partials.dtype, device=partials.device)
        launch(
            wrap_triton(merge_statistics_kernel),
            (programs, fewer),
            partials_ptr=partials,
            merged_ptr=merged_partials,
            C=c,
            parts=parts,
            merged_parts=fewer,
            BLOCK=BLOCK,
            **blocks,
        )
        return finish_statistics(merged_partials)
    # Allocate all four even for one tensor: what a kernel writes must not alias, as torch.compile may copy it. And by
    # torch.empty, as torch.compile merges equal calls of new_empty into one.
    shape = (c,) if groups == 1 else (groups, c)
    found = [torch.empty(shape, dtype=partials.dtype, device=partials.device) for _ in range(4)]
    names = ("mean_ptr", "var_ptr", "other_mean_ptr", "other_var_ptr")
    launch(
        wrap_triton(finish_statistics_kernel),
        (programs,),
        partials_ptr=partials,
        **dict(zip(names, found, strict=True)),
        C=c,
        groups=groups,
        parts=parts,
        **blocks,
    )
    return found[: 2 * tensors]


def statistics(tensors: list[Tensor], instance: bool) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of one or two tensors of one shape: (T, G, C) each, contiguous.

    Args:
        tensors: (N, C, H, W) each.
        instance: statistics of each sample, G = N; else of all, G = 1.
    """
    n, c = tensors[0].shape[:2]
    shape = (-1, n if instance else 1, c)
    x = dense(tensors[0], tensors[0])
    if x.numel() == 0:
        empty = x.new_zeros((len(tensors), *shape[1:]), dtype=accumulator(x))
        return empty, empty.clone()
    found = finish_statistics(partial_statistics([x, *(dense(t, x) for t in tensors[1:])], instance))
    if len(tensors) == 1:
        return found[0].view(shape), found[1].view(shape)
    return torch.stack(found[::2]).view(shape), torch.stack(found[1::2]).view(shape)
