"""What SPN's kernels do for a row of one channel: where lanes are, the mask, the stencils.

All of it is at the resolution of x. With upsampling by U, y has U x U pixels for each of x, the phases (a, b). In phase
a the tap ky of a k-row stencil falls on the row (a + ky - k // 2) // U below; taps that fall on one pixel are merged.
So the stencil of phase a reaches from row (a - k // 2) // U to row (a + k // 2) // U, and no further than REACH.
"""

import triton
import triton.language as tl

from pixnorm.triton_kernels.common import columns_of, load_columns, to_accumulator


@triton.jit
def lanes_of(N, C, H, W, rows, strips, V: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr):
    """Channel, sample, first row and column of each lane, and whether there is such a place.

    The channel is a scalar where a program has one (CHANNELS == 1, NCHW); it always is one that exists. Programs count
    channels first, then positions: a lane's columns, then strips of rows, then samples.
    """
    groups = tl.cdiv(C, CHANNELS)
    o_lane = tl.arange(0, LANES)
    position = (tl.program_id(0) // groups) * (LANES // CHANNELS) + o_lane // CHANNELS
    columns = W // V
    w = (position % columns) * V
    strip = position // columns
    h = (strip % strips) * rows
    n = strip // strips
    if CHANNELS == 1:
        c = tl.program_id(0) % groups
        return c, n, h, w, n < N
    else:
        c = (tl.program_id(0) % groups) * CHANNELS + o_lane % CHANNELS
        return tl.minimum(c, C - 1), n, h, w, (n < N) & (c < C)


@triton.jit
def plane_of(n, c, channels, pixels, LAST: tl.constexpr):
    """Offset of a plane's first pixel."""
    if LAST:
        return n.to(tl.int64) * channels * pixels + c
    else:
        return (n.to(tl.int64) * channels + c) * pixels


@triton.jit
def planes_of(n, c, C, H, W, U: tl.constexpr, LAST: tl.constexpr, ONE_MASK: tl.constexpr):
    """Where the planes of x, y and p begin, how far apart the pixels of x (and y) and of p are; the mask's channel."""
    pixel = 1
    if LAST:
        pixel = C
    plane = plane_of(n, c, C, H * W, LAST)
    y_plane = plane_of(n, c, C, H * W * (U * U), LAST)
    if ONE_MASK:
        return plane, y_plane, plane_of(n, 0, 1, H * W, False), pixel, 1, c * 0
    else:
        return plane, y_plane, plane, pixel, pixel, c


@triton.jit
def channel_value(pointer, c):
    return to_accumulator(tl.load(pointer + c), pointer)


@triton.jit
def taps_of(pointer, c, COUNT: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr):
    """The taps of each lane's channel."""
    taps = ()
    if CHANNELS == 1:
        for tap in tl.static_range(COUNT):
            taps = taps + (channel_value(pointer, c * COUNT + tap),)
    else:  # one load (Triton's compiler is slow where there are many), each lane's part of it in its registers
        PADDED: tl.constexpr = 1 if COUNT == 1 else 16 if COUNT == 9 else 32
        o_tap = tl.arange(0, PADDED)
        tile = tl.load(pointer + (c[:, None] * COUNT + o_tap[None, :]), mask=(o_tap < COUNT)[None, :], other=0.0)
        taps = columns_of(to_accumulator(tile, pointer), PADDED, LANES)
    return taps


@triton.jit
def reciprocal_std(variance, EPS: tl.constexpr):
    return 1.0 / tl.sqrt(variance + EPS)


@triton.jit
def mask_function(c, mask_mean, mask_var, mask_weight, mask_bias, EPS: tl.constexpr):
    """slope and shift of the sigmoid of the normalised p, see ``mask_row``."""
    mean = channel_value(mask_mean, c)
    scale = channel_value(mask_weight, c).to(mean.dtype) * reciprocal_std(channel_value(mask_var, c), EPS)
    shift = channel_value(mask_bias, c).to(mean.dtype) - mean * scale
    return -1.4426950408889634 * scale, -1.4426950408889634 * shift


@triton.jit
def load_row(
    pointer, plane, at, pixel, row, columns, V: tl.constexpr, AROUND: tl.constexpr, HALO: tl.constexpr,
    U: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """V columns of U pixels each, and AROUND such columns to either side; 0 outside of the image.

    Args:
        at: of the first of the V columns, in the plane.
        row: whether the row is inside of the image.
        columns: of ``columns_around``, with HALO.
    """
    values = ()
    for j in tl.static_range(AROUND):
        inside = row & columns[HALO - AROUND + j]
        values = values + load_columns(pointer, plane, at + ((j - AROUND) * U) * pixel, pixel, inside, U, LANES, WIDE)
    values = values + load_columns(pointer, plane, at, pixel, row, V * U, LANES, WIDE)
    for j in tl.static_range(AROUND):
        inside = row & columns[HALO + V + j]
        values = values + load_columns(pointer, plane, at + ((V + j) * U) * pixel, pixel, inside, U, LANES, WIDE)
    return values


@triton.jit
def mask_row(
    p_ptr, plane, pixel, h, w, H, W, live, columns, slope, shift,
    V: tl.constexpr, HALO: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Row h of the mask m = 1 / (1 + 2^(slope p + shift)), HALO columns to either side included; 0 outside."""
    row = live & (h >= 0) & (h < H)
    p = load_row(p_ptr, plane, (h * W + w) * pixel, pixel, row, columns, V, HALO, HALO, 1, LANES, WIDE)
    masks = ()
    for j in tl.static_range(V + 2 * HALO):
        inside = row
        if j < HALO:
            inside = row & columns[j]
        if j >= HALO + V:
            inside = row & columns[j]
        masks = masks + (tl.where(inside, 1.0 / (1.0 + tl.exp2(p[j] * slope + shift)), 0.0),)
    return masks


@triton.jit
def masks_from(
    p_ptr, plane, pixel, h, w, H, W, live, columns, slope, shift, zero,
    V: tl.constexpr, ROWS: tl.constexpr, HALO: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the mask from row h on. (A loop: Triton's compiler is slow where there are many loads.)"""
    masks = ()
    if ROWS > 0:
        outside = ()
        for _ in tl.static_range(V + 2 * HALO):
            outside = outside + (zero,)
        for _ in tl.static_range(ROWS):
            masks = masks + (outside,)
        for i in range(0, ROWS):
            row = mask_row(p_ptr, plane, pixel, h + i, w, H, W, live, columns, slope, shift, V, HALO, LANES, WIDE)
            masks = masks[1:] + (row,)
    return masks


@triton.jit
def stencil(weight_ptr, inverse_ptr, c, K: tl.constexpr, U: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr):
    """Merged taps [a][b][row][column] of w - w* and of w*: a stencil is m ⊛ (w - w*) + in ⊛ w*, in being 1 inside."""
    R: tl.constexpr = K // 2
    weight = taps_of(weight_ptr, c, K * K, LANES, CHANNELS)
    inverse = taps_of(inverse_ptr, c, K * K, LANES, CHANNELS)
    differences = ()
    inverses = ()
    for a in tl.static_range(U):
        differences_of_a = ()
        inverses_of_a = ()
        for b in tl.static_range(U):
            differences_of_b = ()
            inverses_of_b = ()
            for i in tl.static_range((a - R) // U, (a + R) // U + 1):
                difference_row = ()
                inverse_row = ()
                for j in tl.static_range((b - R) // U, (b + R) // U + 1):
                    difference = 0.0
                    total = 0.0
                    for ky in tl.static_range(K):
                        for kx in tl.static_range(K):
                            if (a + ky - R) // U == i:
                                if (b + kx - R) // U == j:
                                    difference += weight[ky * K + kx] - inverse[ky * K + kx]
                                    total += inverse[ky * K + kx]
                    difference_row = difference_row + (difference,)
                    inverse_row = inverse_row + (total,)
                differences_of_b = differences_of_b + (difference_row,)
                inverses_of_b = inverses_of_b + (inverse_row,)
            differences_of_a = differences_of_a + (differences_of_b,)
            inverses_of_a = inverses_of_a + (inverses_of_b,)
        differences = differences + (differences_of_a,)
        inverses = inverses + (inverses_of_a,)
    return differences, inverses


@triton.jit
def columns_around(w, W, V: tl.constexpr, HALO: tl.constexpr):
    """Which of the columns w - HALO to w + V + HALO - 1 are inside of the image; the lane's own V always are."""
    inside = ()
    for j in tl.static_range(HALO):
        inside = inside + (w + j >= HALO,)
    for _ in tl.static_range(V):
        inside = inside + (w >= 0,)
    for j in tl.static_range(HALO):
        inside = inside + (w + (V + j) < W,)
    return inside


@triton.jit
def rows_around(h, H, REACH: tl.constexpr):
    """Which of the rows h - REACH to h + REACH are inside of the image."""
    inside = ()
    for i in tl.static_range(-REACH, REACH + 1):
        inside = inside + ((h + i >= 0) & (h + i < H),)
    return inside


@triton.jit
def inside_sums(inverse, rows, K: tl.constexpr, U: tl.constexpr, REACH: tl.constexpr):
    """Of in ⊛ w* in a row: sums [a][b][column] over the rows of the stencil that are inside of the image."""
    R: tl.constexpr = K // 2
    phases = ()
    for a in tl.static_range(U):
        of_a = ()
        for b in tl.static_range(U):
            sums = ()
            for j in tl.static_range((b + R) // U - (b - R) // U + 1):
                total = 0.0
                for i in tl.static_range((a - R) // U, (a + R) // U + 1):
                    total += tl.where(rows[i + REACH], inverse[a][b][i - (a - R) // U][j], 0.0)
                sums = sums + (total,)
            of_a = of_a + (sums,)
        phases = phases + (of_a,)
    return phases


@triton.jit
def apply_stencil(
    difference, inside, masks, columns, a: tl.constexpr, b: tl.constexpr, column: tl.constexpr,
    K: tl.constexpr, U: tl.constexpr, V: tl.constexpr, REACH: tl.constexpr, HALO: tl.constexpr,
):  # fmt: skip
    """m ⊛ w + (1 - m) ⊛ w* at phase (a, b) of a lane's column.

    Args:
        difference: of ``stencil``.
        inside: of ``inside_sums`` for this row.
        masks: 2 REACH + 1 rows around this one, with HALO columns to either side.
        columns: of ``columns_around``.
    """
    R: tl.constexpr = K // 2
    value = 0.0
    for j in tl.static_range((b - R) // U, (b + R) // U + 1):
        constant = inside[a][b][j - (b - R) // U]
        if column + j < 0:
            constant = tl.where(columns[column + j + HALO], constant, 0.0)
        if column + j >= V:
            constant = tl.where(columns[column + j + HALO], constant, 0.0)
        value += constant
    for i in tl.static_range((a - R) // U, (a + R) // U + 1):
        for j in tl.static_range((b - R) // U, (b + R) // U + 1):
            tap = difference[a][b][i - (a - R) // U][j - (b - R) // U]
            value += tap * masks[i + REACH][column + j + HALO]
    return value
