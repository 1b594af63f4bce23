"""Mean and biased variance of each channel of x and of p = conv1x1(x), in two stages, the same bits on every run.

The first stage leaves [tensor][part][count, mean, sum of squares about it][C]; the parts of a channel are added up by
the formula for groups, which loses no digits where the mean is far from zero.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixnorm.ops.common import is_channels_last
from pixnorm.triton_kernels.common import (
    accumulator,
    launch,
    power_of_two_from,
    power_of_two_in,
    to_accumulator,
    wrap_triton,
)

# Elements of a tile, in registers with a mean and a sum of squares each: 16 (double: 8) a thread.
TILE, TILE_OF_DOUBLE, WARPS = 2048, 1024, 4
# Channels of a tile in channels_last: 128 bytes side by side.
RUN = 128
# Programs in all, and the fewest tiles of one: enough for any GPU, few to add up.
PROGRAMS, LEAST_TILES = 2048, 4
# Parts that one program adds up in turn; of more, groups are added up first.
MOST_PARTS, GROUP = 512, 64


@triton.jit
def spn_statistics_kernel(
    x_ptr, p_ptr, partials_ptr, N, C, pixels, parts, tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Welford's sums over the tiles of a part. NCHW: rows are vectors of a channel; channels_last: they are pixels."""
    tensor = tl.program_id(2)
    part = tl.program_id(1)
    c = tl.program_id(0)
    data = x_ptr
    if tensor == 1:
        data = p_ptr
    o_row = tl.arange(0, ROWS)
    o_column = tl.arange(0, COLUMNS)
    if LAST:
        rows = N * pixels
        channel = c * COLUMNS + o_column
        in_row = channel < C
    else:
        per_plane = pixels // COLUMNS
        rows = N * per_plane
        in_row = o_column < COLUMNS

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
        d = value - mean
        next_mean = mean + d * (1.0 / seen)
        squares = tl.where(valid, squares + d * (value - next_mean), squares)
        mean = tl.where(valid, next_mean, mean)

    # How often each row of the tile was valid.
    times = tl.maximum((end - begin - o_row + (ROWS - 1)) // ROWS, 0)
    count = to_accumulator(times, x_ptr)[:, None] + zero
    first_mean = tl.where((o_row == 0)[:, None], mean, 0.0)
    if LAST:
        about = tl.sum(first_mean, axis=0)
        whole = tl.sum(count, axis=0)
        of_all = about + tl.sum(count * (mean - about[None, :]), axis=0) / whole
        d = mean - of_all[None, :]
        of_squares = tl.sum(squares + count * d * d, axis=0)
        to = partials_ptr + (tensor * parts + part).to(tl.int64) * 3 * C + channel
        tl.store(to, whole, mask=in_row)
        tl.store(to + C, of_all, mask=in_row)
        tl.store(to + 2 * C, of_squares, mask=in_row)
    else:
        about = tl.sum(tl.sum(tl.where((o_column == 0)[None, :], first_mean, 0.0), axis=1), axis=0)
        whole = tl.sum(tl.sum(count, axis=1), axis=0)
        of_all = about + tl.sum(tl.sum(count * (mean - about), axis=1), axis=0) / whole
        d = mean - of_all
        of_squares = tl.sum(tl.sum(squares + count * d * d, axis=1), axis=0)
        to = partials_ptr + (tensor * parts + part).to(tl.int64) * 3 * C + c
        tl.store(to, whole)
        tl.store(to + C, of_all)
        tl.store(to + 2 * C, of_squares)


@triton.jit
def merged(from_ptr, begin, end, C, channel, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    """Count, mean and sum of squares of some channels, over the parts from begin to end, one at least.

    Args:
        from_ptr: the tensor's parts.
    """
    exists = channel < C
    o_part = tl.arange(0, PARTS)
    about = tl.load(from_ptr + (begin * 3 + 1) * C + channel, mask=exists, other=0.0)
    whole = tl.zeros_like(about)
    shifted = tl.zeros_like(about)
    for first in range(begin, end, PARTS):
        at = ((first + o_part) * 3 * C)[:, None] + channel[None, :]
        valid = (first + o_part < end)[:, None] & exists[None, :]
        count = tl.load(from_ptr + at, mask=valid, other=0.0)
        mean = tl.load(from_ptr + (at + C), mask=valid, other=0.0)
        whole += tl.sum(count, axis=0)
        shifted += tl.sum(tl.where(valid, count * (mean - about[None, :]), 0.0), axis=0)
    of_all = about + shifted / tl.where(exists, whole, 1.0)
    squares = tl.zeros_like(about)
    for first in range(begin, end, PARTS):
        at = ((first + o_part) * 3 * C)[:, None] + channel[None, :]
        valid = (first + o_part < end)[:, None] & exists[None, :]
        count = tl.load(from_ptr + at, mask=valid, other=0.0)
        mean = tl.load(from_ptr + (at + C), mask=valid, other=0.0)
        square = tl.load(from_ptr + (at + 2 * C), mask=valid, other=0.0)
        d = mean - of_all[None, :]
        squares += tl.sum(tl.where(valid, square + count * d * d, 0.0), axis=0)
    return whole, of_all, squares


@triton.jit
def spn_merge_statistics_kernel(
    partials_ptr, merged_ptr, C, parts, groups, GROUP: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr
):
    """GROUP parts become one, of some channels of one tensor."""
    group = tl.program_id(1)
    tensor = tl.program_id(2)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    of_tensor = partials_ptr + (tensor * parts).to(tl.int64) * 3 * C
    end = tl.minimum(group * GROUP + GROUP, parts)
    whole, mean, squares = merged(of_tensor, group * GROUP, end, C, channel, PARTS, CHANNELS)
    to = merged_ptr + (tensor * groups + group).to(tl.int64) * 3 * C + channel
    tl.store(to, whole, mask=channel < C)
    tl.store(to + C, mean, mask=channel < C)
    tl.store(to + 2 * C, squares, mask=channel < C)


@triton.jit
def spn_finish_statistics_kernel(
    partials_ptr, x_mean_ptr, x_var_ptr, p_mean_ptr, p_var_ptr, C, parts,
    PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The statistics of some channels of one tensor from all parts."""
    tensor = tl.program_id(1)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    of_tensor = partials_ptr + (tensor * parts).to(tl.int64) * 3 * C
    whole, mean, squares = merged(of_tensor, 0, parts, C, channel, PARTS, CHANNELS)
    mean_ptr = x_mean_ptr
    var_ptr = x_var_ptr
    if tensor == 1:
        mean_ptr = p_mean_ptr
        var_ptr = p_var_ptr
    tl.store(mean_ptr + channel, mean, mask=channel < C)
    tl.store(var_ptr + channel, squares / whole, mask=channel < C)


def partial_statistics(tensors: tuple[Tensor, ...]) -> Tensor:
    """The first stage, of one or two tensors of one shape and layout: (tensors, parts, 3, C)."""
    first, last = tensors[0], tensors[-1]
    n, c, h, w = first.shape
    channels_last = is_channels_last(first)
    tile = TILE_OF_DOUBLE if first.dtype == torch.float64 else TILE
    if channels_last:
        columns = min(RUN // first.element_size(), power_of_two_from(c))
        groups, rows = triton.cdiv(c, columns), n * h * w
    else:
        columns = power_of_two_in(h * w, 16 // first.element_size())
        groups, rows = c, n * (h * w // columns)
    rows_of_tile = tile // columns
    wanted = max(1, PROGRAMS // (groups * len(tensors)))
    tiles = max(LEAST_TILES, triton.cdiv(triton.cdiv(rows, rows_of_tile), wanted))
    parts = triton.cdiv(rows, rows_of_tile * tiles)
    partials = torch.empty((len(tensors), parts, 3, c), dtype=accumulator(first), device=first.device)
    launch(
        wrap_triton(spn_statistics_kernel), (groups, parts, len(tensors)), first, last, partials,
        n, c, h * w, parts, tiles, ROWS=rows_of_tile, COLUMNS=columns, LAST=channels_last, num_warps=WARPS,
    )  # fmt: skip
    return partials


def finish_statistics(partials: Tensor) -> list[Tensor]:
    """The second stage: mean and variance of each tensor."""
    tensors, parts, _, c = partials.shape
    channels = min(32, power_of_two_from(c))
    blocks = {"PARTS": 32, "CHANNELS": channels, "num_warps": WARPS}
    if parts > MOST_PARTS:
        groups = triton.cdiv(parts, GROUP)
        grouped = torch.empty((tensors, groups, 3, c), dtype=partials.dtype, device=partials.device)
        grid = triton.cdiv(c, channels), groups, tensors
        launch(
            wrap_triton(spn_merge_statistics_kernel), grid, partials, grouped, c, parts, groups, GROUP=GROUP, **blocks
        )
        return finish_statistics(grouped)
    # Also what is not there for one tensor: each pointer is to memory of its own, so that the compiler may copy any.
    found = [torch.empty((c,), dtype=partials.dtype, device=partials.device) for _ in range(4)]
    grid = triton.cdiv(c, channels), tensors
    launch(wrap_triton(spn_finish_statistics_kernel), grid, partials, *found, c, parts, **blocks)
    return found[: 2 * tensors]
