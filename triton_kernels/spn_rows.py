"""What SPN's kernels do for a row of one channel: the mask, the stencils, which neighbours are inside the image.

All of it is at the resolution of x. With upsampling by U, each pixel of x is U x U pixels of y, the phases (a, b). In
phase a, row ky of a k x k stencil falls on the row (a + ky - k // 2) // U below this one, and taps that fall on the
same pixel are merged. So the stencil of phase a covers the rows (a - k // 2) // U to (a + k // 2) // U, at most REACH
away.

Arguments that occur everywhere:
    META: compile-time constants. K, U; V, LANES, CHANNELS (see ``Walk``); REACH; AROUND, the columns to either side
        whose gradients are computed; HALO, those whose mask is; LAST, channels_last; ONE_MASK, whether p has one
        channel; WIDE and P_WIDE, whether adjacent columns of x (y) and of p are adjacent in memory; ACTIVATED, SLOPE;
        EPS; GROUPED, whether samples have groups with parameters of their own, and rows if GAMMA_BIAS, BETA_BIAS.
    size: N, C, H, W, G, and the rows and strips of the walk.
    lane: its channel c and the mask's; sample n, first row h and first column w; live, whether it exists; columns,
        whether each of the columns w - HALO to w + V + HALO - 1 is inside the image.
    x_plane, y_plane, p_plane: the lane's plane of these tensors: offset, and stride of a pixel.
    mask: pointer to p and plane of it, and slope and shift of ``mask_row``.
    norm: x̂ = x rstd + centre.
    taps: of gamma and beta, as ``stencil`` merges them, and what a sample adds to all pixels of γ and β.
    h: the row that is worked on.
"""

import triton
import triton.language as tl

from pixnorm.triton_kernels.common import columns_of, load_columns, record, to_accumulator

META_FIELDS = tl.constexpr(
    "K U V REACH AROUND HALO LANES CHANNELS LAST ONE_MASK WIDE P_WIDE ACTIVATED SLOPE EPS GROUPED GAMMA_BIAS BETA_BIAS"
)
SIZE_FIELDS = tl.constexpr("N C H W G rows strips")
PARAMETER_FIELDS = tl.constexpr(
    "mean var mask_mean mask_var mask_weight mask_bias gamma gamma_inv beta beta_inv gamma_bias beta_bias index"
)


@triton.jit
def group_at(index_ptr, n, G):
    """Groups out of range count as the nearest."""
    return tl.minimum(tl.maximum(tl.load(index_ptr + n), 0), G - 1)


@triton.jit
def parameters_of_sample(parameters, lane, size, META: tl.constexpr):
    """The pointers to parameters and rows, moved to those of the lane's sample."""
    if META.GROUPED:
        group = group_at(parameters.index, lane.n, size.G)
        of_mask = group * (1 if META.ONE_MASK else size.C)
        of_taps = group * size.C * (META.K * META.K)
        of_row = lane.n * size.C
        return record(PARAMETER_FIELDS)(
            parameters.mean, parameters.var, parameters.mask_mean, parameters.mask_var,
            parameters.mask_weight + of_mask, parameters.mask_bias + of_mask,
            parameters.gamma + of_taps, parameters.gamma_inv + of_taps,
            parameters.beta + of_taps, parameters.beta_inv + of_taps,
            parameters.gamma_bias + of_row, parameters.beta_bias + of_row, parameters.index,
        )  # fmt: skip
    else:
        return parameters


@triton.jit
def functions_of(p_ptr, p_plane, parameters, lane, META: tl.constexpr):
    """mask, norm and taps.

    Args:
        parameters: pointers to the statistics, the mask's affine parameters, the taps and the rows.
    """
    slope, shift = mask_function(lane.mask_channel, parameters, META)
    rstd = reciprocal_std(channel_value(parameters.var, lane.c), META)
    centre = -channel_value(parameters.mean, lane.c) * rstd
    gamma, gamma_inverse = stencil(parameters.gamma, parameters.gamma_inv, lane.c, META)
    beta, beta_inverse = stencil(parameters.beta, parameters.beta_inv, lane.c, META)
    gamma_bias = 0.0
    beta_bias = 0.0
    if META.GAMMA_BIAS:
        gamma_bias = channel_value(parameters.gamma_bias, lane.c).to(rstd.dtype)
    if META.BETA_BIAS:
        beta_bias = channel_value(parameters.beta_bias, lane.c).to(rstd.dtype)
    mask = record("pointer plane slope shift")(p_ptr, p_plane, slope, shift)
    norm = record("rstd centre")(rstd, centre)
    taps = record("gamma gamma_inverse gamma_bias beta beta_inverse beta_bias")(
        gamma, gamma_inverse, gamma_bias, beta, beta_inverse, beta_bias
    )
    return mask, norm, taps


@triton.jit
def lane_of(size, META: tl.constexpr):
    """The lanes of a program.

    The channel is clamped to one that exists; it is a scalar where a program has only one (CHANNELS == 1). Programs are
    ordered by channel first, then by position: columns of a row, strips of a plane, samples. If GROUPED, no program has
    two samples, and n is a scalar.
    """
    CHANNELS: tl.constexpr = META.CHANNELS
    blocks = tl.cdiv(size.C, CHANNELS)
    o_lane = tl.arange(0, META.LANES)
    part = tl.program_id(0) // blocks
    columns = size.W // META.V
    if META.GROUPED:
        parts = tl.cdiv(size.strips * columns, META.LANES // CHANNELS)
        n = part // parts
        part = part % parts
    position = part * (META.LANES // CHANNELS) + o_lane // CHANNELS
    w = (position % columns) * META.V
    strip = position // columns
    h = (strip % size.strips) * size.rows
    if META.GROUPED:
        live = strip < size.strips
    else:
        n = strip // size.strips
        live = n < size.N
    if CHANNELS == 1:
        c = tl.program_id(0) % blocks
    else:
        channel = (tl.program_id(0) % blocks) * CHANNELS + o_lane % CHANNELS
        c = tl.minimum(channel, size.C - 1)
        live = live & (channel < size.C)
    mask_channel = c
    if META.ONE_MASK:
        mask_channel = c * 0
    inside = columns_around(w, size.W, META)
    return record("c mask_channel n h w live columns")(c, mask_channel, n, h, w, live, inside)


@triton.jit
def plane_of(n, c, channels, pixels, LAST: tl.constexpr):
    """The plane of channel c of sample n."""
    if LAST:
        return record("offset pixel")(n.to(tl.int64) * channels * pixels + c, channels)
    else:
        return record("offset pixel")((n.to(tl.int64) * channels + c) * pixels, 1)


@triton.jit
def planes_of(lane, size, META: tl.constexpr):
    """The planes of x, y and p; that of dx, for one, is that of x."""
    pixels = size.H * size.W
    x_plane = plane_of(lane.n, lane.c, size.C, pixels, META.LAST)
    y_plane = plane_of(lane.n, lane.c, size.C, pixels * (META.U * META.U), META.LAST)
    if META.ONE_MASK:
        return x_plane, y_plane, plane_of(lane.n, 0, 1, pixels, False)
    else:
        return x_plane, y_plane, x_plane


@triton.jit
def channel_value(pointer, c):
    return to_accumulator(tl.load(pointer + c), pointer)


@triton.jit
def taps_of(pointer, c, META: tl.constexpr):
    """The K x K taps of each lane's channel."""
    COUNT: tl.constexpr = META.K * META.K
    taps = ()
    if META.CHANNELS == 1:
        for tap in tl.static_range(COUNT):
            taps = taps + (channel_value(pointer, c * COUNT + tap),)
    else:  # one load of a tile: Triton compiles slowly where there are many loads of tensors
        PADDED: tl.constexpr = 1 if COUNT == 1 else 16 if COUNT == 9 else 32
        o_tap = tl.arange(0, PADDED)
        tile = tl.load(pointer + (c[:, None] * COUNT + o_tap[None, :]), mask=(o_tap < COUNT)[None, :], other=0.0)
        taps = columns_of(to_accumulator(tile, pointer), PADDED, META.LANES)
    return taps


@triton.jit
def reciprocal_std(variance, META: tl.constexpr):
    return 1.0 / tl.sqrt(variance + META.EPS)


@triton.jit
def mask_function(c, parameters, META: tl.constexpr):
    """Slope and shift of ``mask_row``: normalisation, the mask's affine function and log2(e) in one."""
    mean = channel_value(parameters.mask_mean, c)
    rstd = reciprocal_std(channel_value(parameters.mask_var, c), META)
    scale = channel_value(parameters.mask_weight, c).to(mean.dtype) * rstd
    shift = channel_value(parameters.mask_bias, c).to(mean.dtype) - mean * scale
    return -1.4426950408889634 * scale, -1.4426950408889634 * shift


@triton.jit
def zeros_of(pointer, META: tl.constexpr):
    """Zero in every lane, in the dtype of sums."""
    return to_accumulator(tl.zeros([META.LANES], dtype=tl.float32), pointer)


@triton.jit
def load_row(
    pointer, plane, at, row, columns, AROUND: tl.constexpr, U: tl.constexpr, WIDE: tl.constexpr, META: tl.constexpr
):  # fmt: skip
    """V columns of U pixels each, and AROUND such columns to either side; 0 outside the image.

    Args:
        at: first pixel of the V columns.
        row: whether the row is inside the image.
        columns: of the lane.
    """
    V: tl.constexpr = META.V
    values = ()
    for j in tl.static_range(AROUND):
        inside = row & columns[META.HALO - AROUND + j]
        values = values + load_columns(pointer, plane, at + (j - AROUND) * U, inside, U, META.LANES, WIDE)
    values = values + load_columns(pointer, plane, at, row, V * U, META.LANES, WIDE)
    for j in tl.static_range(AROUND):
        inside = row & columns[META.HALO + V + j]
        values = values + load_columns(pointer, plane, at + (V + j) * U, inside, U, META.LANES, WIDE)
    return values


@triton.jit
def mask_row(mask, h, lane, size, META: tl.constexpr):
    """Row h of the mask m = 1 / (1 + 2^(slope p + shift)) with its halo; 0 outside the image."""
    HALO: tl.constexpr = META.HALO
    row = lane.live & (h >= 0) & (h < size.H)
    p = load_row(mask.pointer, mask.plane, h * size.W + lane.w, row, lane.columns, HALO, 1, META.P_WIDE, META)
    masks = ()
    for j in tl.static_range(META.V + 2 * HALO):
        inside = row
        if j < HALO:
            inside = row & lane.columns[j]
        if j >= HALO + META.V:
            inside = row & lane.columns[j]
        masks = masks + (tl.where(inside, 1.0 / (1.0 + tl.exp2(p[j] * mask.slope + mask.shift)), 0.0),)
    return masks


@triton.jit
def masks_from(mask, h, lane, size, META: tl.constexpr):
    """The first 2 REACH rows of the mask, from row h on. (A loop, as many loads compile slowly.)"""
    ROWS: tl.constexpr = 2 * META.REACH
    masks = ()
    if ROWS > 0:
        outside = ()
        for _ in tl.static_range(META.V + 2 * META.HALO):
            outside = outside + (zeros_of(mask.pointer, META),)
        for _ in tl.static_range(ROWS):
            masks = masks + (outside,)
        for i in range(0, ROWS):
            masks = masks[1:] + (mask_row(mask, h + i, lane, size, META),)
    return masks


@triton.jit
def stencil(weight_ptr, inverse_ptr, c, META: tl.constexpr):
    """Taps w - w* and w*, merged by phase: [a][b][row][column].

    A stencil is m ⊛ (w - w*) + in ⊛ w*, where ``in`` is 1 inside the image and 0 outside.
    """
    K: tl.constexpr = META.K
    U: tl.constexpr = META.U
    R: tl.constexpr = K // 2
    weight = taps_of(weight_ptr, c, META)
    inverse = taps_of(inverse_ptr, c, META)
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
def columns_around(w, W, META: tl.constexpr):
    """Whether each of the columns w - HALO to w + V + HALO - 1 is inside the image; the lane's own V always are."""
    HALO: tl.constexpr = META.HALO
    inside = ()
    for j in tl.static_range(HALO):
        inside = inside + (w + j >= HALO,)
    for _ in tl.static_range(META.V):
        inside = inside + (w >= 0,)
    for j in tl.static_range(HALO):
        inside = inside + (w + (META.V + j) < W,)
    return inside


@triton.jit
def rows_around(h, H, META: tl.constexpr):
    """Whether each of the rows h - REACH to h + REACH is inside the image."""
    inside = ()
    for i in tl.static_range(-META.REACH, META.REACH + 1):
        inside = inside + ((h + i >= 0) & (h + i < H),)
    return inside


@triton.jit
def inside_sums(inverse, bias, rows, META: tl.constexpr):
    """Column sums of w* over the stencil rows that are inside the image, [a][b][column]: in ⊛ w*, but for its columns.

    Args:
        bias: added to the middle column, which is always inside.
        rows: of ``rows_around``.
    """
    U: tl.constexpr = META.U
    R: tl.constexpr = META.K // 2
    phases = ()
    for a in tl.static_range(U):
        of_a = ()
        for b in tl.static_range(U):
            sums = ()
            for j in tl.static_range((b + R) // U - (b - R) // U + 1):
                total = 0.0
                if META.GROUPED:
                    if j + (b - R) // U == 0:
                        total = bias
                for i in tl.static_range((a - R) // U, (a + R) // U + 1):
                    total += tl.where(rows[i + META.REACH], inverse[a][b][i - (a - R) // U][j], 0.0)
                sums = sums + (total,)
            of_a = of_a + (sums,)
        phases = phases + (of_a,)
    return phases


@triton.jit
def apply_stencil(
    difference, inside, masks, columns, a: tl.constexpr, b: tl.constexpr, column: tl.constexpr, META: tl.constexpr
):  # fmt: skip
    """m ⊛ w + (1 - m) ⊛ w* at phase (a, b) of a lane's column.

    Args:
        difference: w - w*, of ``stencil``.
        inside: of ``inside_sums``, for this row.
        masks: 2 REACH + 1 rows around this one, with their halos.
        columns: of the lane.
    """
    U: tl.constexpr = META.U
    R: tl.constexpr = META.K // 2
    HALO: tl.constexpr = META.HALO
    value = 0.0
    for j in tl.static_range((b - R) // U, (b + R) // U + 1):
        constant = inside[a][b][j - (b - R) // U]
        if column + j < 0:
            constant = tl.where(columns[column + j + HALO], constant, 0.0)
        if column + j >= META.V:
            constant = tl.where(columns[column + j + HALO], constant, 0.0)
        value += constant
    for i in tl.static_range((a - R) // U, (a + R) // U + 1):
        for j in tl.static_range((b - R) // U, (b + R) // U + 1):
            tap = difference[a][b][i - (a - R) // U][j - (b - R) // U]
            value += tap * masks[i + META.REACH][column + j + HALO]
    return value
