"""Modulated norm's Triton kernels that stream over x; see modulate.py.

Nothing needs neighbours, so kernels go over tiles (tiles.py). With upsampling by U a tile of x is U tiles of y in NCHW,
one for each row of the U x U pixels, and U^2 in channels_last: the phases.
"""

import triton
import triton.language as tl

from pixnorm.triton_kernels.common import activated, activation_gradient, record, to_accumulator
from pixnorm.triton_kernels.statistics import merged
from pixnorm.triton_kernels.tiles import (
    NOT_SPECIALISED,
    load_tile,
    norm_of,
    of_channels,
    place_of_program,
    store_tile,
    tile_at,
)

# Kinds of gamma and beta: the number of their dimensions (0 where there are none).
VECTOR, ROWS, MAPS = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)

META_FIELDS = tl.constexpr("U LAST V CHANNELS PIXELS AFFINE INSTANCE ACTIVATED SLOPE OFFSET EPS")
SIZE_FIELDS = tl.constexpr("C pixels W parts tiles")


@triton.jit
def upsampled_tile_at(place, first, W, phase: tl.constexpr, META: tl.constexpr):
    """The same of y, for a phase (a, b), or a in NCHW. Pixel p = h W + w of x is 2 (p + h W) + 2 a W + b of y."""
    if META.U == 1:
        tile = tile_at(place, first, META)
        offset = tile.offset
        exists = tile.exists
    elif META.LAST:
        o_channel = tl.arange(0, META.CHANNELS)
        o_pixel = tl.arange(0, META.PIXELS)
        p = first + o_pixel
        at = 2 * (p + p // W * W) + (phase // 2) * 2 * W + phase % 2
        starts = tl.multiple_of(at * place.channels + place.c, META.V)
        offset = starts[:, None] + o_channel[None, :]
        exists = (o_pixel < place.pixels - first)[:, None] & (o_channel < place.channels - place.c)[None, :]
    else:
        o_channel = tl.arange(0, META.CHANNELS)
        o_pixel = tl.arange(0, 2 * META.PIXELS)
        p = first + o_pixel // 2
        at = 2 * (p + p // W * W) + phase * 2 * W + o_pixel % 2
        # W is a multiple of V, so the pixels of a vector are in one row.
        at = tl.max_contiguous(tl.multiple_of(at, 2 * META.V), 2 * META.V)
        starts = tl.multiple_of((place.c + o_channel) * (place.pixels * 4), 2 * META.V)
        offset = starts[:, None] + at[None, :]
        exists = (o_channel < place.channels - place.c)[:, None] & (o_pixel < 2 * (place.pixels - first))[None, :]
    return record("offset exists")(offset, exists)


@triton.jit
def spread(tile, META: tl.constexpr):
    """A tile of x at the pixels of a phase: in NCHW each twice."""
    if META.U == 2:
        if not META.LAST:
            tile = tl.reshape(tl.join(tile, tile), [META.CHANNELS, 2 * META.PIXELS])
    return tile


@triton.jit
def fold(tile, META: tl.constexpr):
    """The adjoint of ``spread``: sums over the pixels of a phase that come from one of x."""
    if META.U == 2:
        if not META.LAST:
            even, odd = tl.split(tl.reshape(tile, [META.CHANNELS, META.PIXELS, 2]))
            tile = even + odd
    return tile


@triton.jit
def merged_norm(partials_ptr, mean_ptr, var_ptr, partials, place, PARTS: tl.constexpr, META: tl.constexpr):
    """The same from the partial statistics of a batch, PARTS at a time; one of the programs writes them."""
    channel = place.c + tl.arange(0, META.CHANNELS)
    whole, mean, squares = merged(partials_ptr, 0, partials, channel, place.channels, PARTS)
    exists = channel < place.channels
    var = squares / tl.where(exists, whole, 1.0)
    writes = exists & (place.n == 0) & (place.part == 0)
    tl.store(mean_ptr + channel, mean, mask=writes)
    tl.store(var_ptr + channel, var, mask=writes)
    rstd = 1.0 / tl.sqrt(var + META.EPS)
    if META.LAST:
        return record("mean rstd")(mean[None, :], rstd[None, :])
    else:
        return record("mean rstd")(mean[:, None], rstd[:, None])


@triton.jit
def rows_of(gamma_ptr, beta_ptr, norm, place, META: tl.constexpr):
    """Scale and shift of each channel, in the dtype of sums."""
    if (META.AFFINE == ROWS) | (META.AFFINE == VECTOR):
        gamma = META.OFFSET + of_channels(gamma_ptr, place, META.AFFINE == ROWS, META).to(norm.mean.dtype)
        beta = of_channels(beta_ptr, place, META.AFFINE == ROWS, META).to(norm.mean.dtype)
    else:
        gamma = tl.full([1, 1], 1.0, norm.mean.dtype)
        beta = tl.full([1, 1], 0.0, norm.mean.dtype)
    return record("gamma beta")(gamma, beta)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def modulate_fwd_kernel(
    x_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, y_ptr, partials_ptr, C, pixels, W, parts, tiles, partials,
    PARTS: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, AFFINE: tl.constexpr, INSTANCE: tl.constexpr,
    U: tl.constexpr, ACTIVATED: tl.constexpr, SLOPE: tl.constexpr,
    LAST: tl.constexpr, V: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """y = act((o + γ) x̂ + β). Merges partial statistics first, unless PARTS is 0."""
    META: tl.constexpr = record(META_FIELDS)(
        U=U, LAST=LAST, V=V, CHANNELS=CHANNELS, PIXELS=PIXELS, AFFINE=AFFINE, INSTANCE=INSTANCE, ACTIVATED=ACTIVATED,
        SLOPE=SLOPE, OFFSET=OFFSET, EPS=EPS,
    )  # fmt: skip
    PHASES: tl.constexpr = U * U if LAST else U
    place = place_of_program(record(SIZE_FIELDS)(C, pixels, W, parts, tiles), META)
    if PARTS > 0:
        norm = merged_norm(partials_ptr, mean_ptr, var_ptr, partials, place, PARTS, META)
    else:
        norm = norm_of(mean_ptr, var_ptr, place, META)
    rows = rows_of(gamma_ptr, beta_ptr, norm, place, META)
    start = tl.multiple_of(place.n * C * pixels, V)
    end = tl.minimum((place.part + 1) * tiles, tl.cdiv(pixels, PIXELS))
    for tile in range(place.part * tiles, end):
        first = tile * PIXELS
        x_hat = (load_tile(x_ptr + start, tile_at(place, first, META)) - norm.mean) * norm.rstd
        if AFFINE == MAPS:
            x_hat = spread(x_hat, META)
            for phase in tl.static_range(PHASES):
                at = upsampled_tile_at(place, first, W, phase, META)
                gamma = OFFSET + load_tile(gamma_ptr + start * (U * U), at)
                y = gamma * x_hat + load_tile(beta_ptr + start * (U * U), at)
                if ACTIVATED:
                    y = activated(y, SLOPE)
                store_tile(y_ptr + start * (U * U), at, y)
        else:
            y = rows.gamma * x_hat + rows.beta
            if ACTIVATED:
                y = activated(y, SLOPE)
            y = spread(y.to(y_ptr.dtype.element_ty), META)
            for phase in tl.static_range(PHASES):
                store_tile(y_ptr + start * (U * U), upsampled_tile_at(place, first, W, phase, META), y)


@triton.jit
def summed_gradient(dy_ptr, rows, x_hat, place, first, W, META: tl.constexpr):
    """dy', of y before its activation, summed over the pixels of y that are one of x; with rows or none.

    The sign of y is the same for all of them.
    """
    PHASES: tl.constexpr = META.U * META.U if META.LAST else META.U
    total = fold(load_tile(dy_ptr, upsampled_tile_at(place, first, W, 0, META)), META)
    for phase in tl.static_range(1, PHASES):
        total += fold(load_tile(dy_ptr, upsampled_tile_at(place, first, W, phase, META)), META)
    if META.ACTIVATED:
        total = activation_gradient(rows.gamma * x_hat + rows.beta, total, META.SLOPE)
    return total


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def modulate_bwd_reduce_kernel(
    dy_ptr, x_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, d_gamma_ptr, d_beta_ptr, sums_ptr,
    C, pixels, W, parts, tiles,
    EPS: tl.constexpr, OFFSET: tl.constexpr, AFFINE: tl.constexpr, INSTANCE: tl.constexpr, U: tl.constexpr,
    ACTIVATED: tl.constexpr, SLOPE: tl.constexpr,
    LAST: tl.constexpr, V: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Sums [N][part][dy', dy' x̂][C], with maps of γ dy' and γ dy' x̂; maps' gradients are written here too."""
    META: tl.constexpr = record(META_FIELDS)(
        U=U, LAST=LAST, V=V, CHANNELS=CHANNELS, PIXELS=PIXELS, AFFINE=AFFINE, INSTANCE=INSTANCE, ACTIVATED=ACTIVATED,
        SLOPE=SLOPE, OFFSET=OFFSET, EPS=EPS,
    )  # fmt: skip
    PHASES: tl.constexpr = U * U if LAST else U
    place = place_of_program(record(SIZE_FIELDS)(C, pixels, W, parts, tiles), META)
    norm = norm_of(mean_ptr, var_ptr, place, META)
    rows = rows_of(gamma_ptr, beta_ptr, norm, place, META)
    start = tl.multiple_of(place.n * C * pixels, V)
    zero = to_accumulator(tl.zeros([PIXELS, CHANNELS] if LAST else [CHANNELS, PIXELS], dtype=tl.float32), x_ptr)
    sum_d = zero
    sum_dx = zero
    end = tl.minimum((place.part + 1) * tiles, tl.cdiv(pixels, PIXELS))
    for tile in range(place.part * tiles, end):
        first = tile * PIXELS
        x_hat = (load_tile(x_ptr + start, tile_at(place, first, META)) - norm.mean) * norm.rstd
        if AFFINE == MAPS:
            d = zero
            large = spread(x_hat, META)
            for phase in tl.static_range(PHASES):
                at = upsampled_tile_at(place, first, W, phase, META)
                dy = load_tile(dy_ptr + start * (U * U), at)
                gamma = OFFSET + load_tile(gamma_ptr + start * (U * U), at)
                if ACTIVATED:
                    beta = load_tile(beta_ptr + start * (U * U), at)
                    dy = activation_gradient(gamma * large + beta, dy, SLOPE)
                store_tile(d_beta_ptr + start * (U * U), at, dy)
                store_tile(d_gamma_ptr + start * (U * U), at, dy * large)
                # Zero outside the image, also where γ was not read.
                d += fold(gamma * dy, META)
        else:
            d = summed_gradient(dy_ptr + start * (U * U), rows, x_hat, place, first, W, META)
        sum_d += d
        sum_dx += d * x_hat
    o_channel = tl.arange(0, CHANNELS)
    exists = o_channel < place.channels - place.c
    to = sums_ptr + (place.n * parts + place.part) * 2 * C + place.c + o_channel
    tl.store(to, tl.sum(sum_d, axis=0 if LAST else 1), mask=exists)
    tl.store(to + C, tl.sum(sum_dx, axis=0 if LAST else 1), mask=exists)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def modulate_bwd_finish_kernel(
    sums_ptr, gamma_ptr, d_gamma_ptr, d_beta_ptr, means_ptr, N, C, parts, count,
    OFFSET: tl.constexpr, AFFINE: tl.constexpr, INSTANCE: tl.constexpr,
    SAMPLES: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Adds the parts up: the gradients of rows, and the means [group][dy γ, dy γ x̂][C] that backward subtracts.

    Σ dy γ = Σ_n γ_n dβ_n and Σ dy γ x̂ = Σ_n γ_n dγ_n. Maps are in the sums already.
    """
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    o_part = tl.arange(0, PARTS)
    of_c = c < C
    nothing = to_accumulator(tl.zeros([CHANNELS], dtype=tl.float32), sums_ptr)
    d_beta = nothing
    d_gamma = nothing
    mean_g = nothing
    mean_gx = nothing
    # Groups' numbers of pixels are at most 2^31, beyond float32's integers but not beyond its range.
    each = 1.0 / (to_accumulator(tl.full([], 1.0, tl.float32), sums_ptr) * count)
    for first in range(0, N, SAMPLES):
        n = (first + tl.arange(0, SAMPLES)).to(tl.int64)
        exists = (n < N)[:, None] & of_c[None, :]
        zero = to_accumulator(tl.zeros([SAMPLES, CHANNELS], dtype=tl.float32), sums_ptr)
        sum_d = zero
        sum_dx = zero
        for first_part in range(0, parts, PARTS):
            part = first_part + o_part
            at = ((n[:, None] * parts + part[None, :]) * 2 * C)[:, :, None] + c[None, None, :]
            valid = ((n < N)[:, None] & (part < parts)[None, :])[:, :, None] & of_c[None, None, :]
            sum_d += tl.sum(tl.load(sums_ptr + at, mask=valid, other=0.0), axis=1)
            sum_dx += tl.sum(tl.load(sums_ptr + (at + C), mask=valid, other=0.0), axis=1)
        row = n[:, None] * C + c[None, :]
        g = sum_d
        gx = sum_dx
        if (AFFINE == ROWS) | (AFFINE == VECTOR):
            if AFFINE == ROWS:
                gamma = tl.load(gamma_ptr + row, mask=exists, other=0.0)
                tl.store(d_beta_ptr + row, sum_d.to(d_beta_ptr.dtype.element_ty), mask=exists)
                tl.store(d_gamma_ptr + row, sum_dx.to(d_gamma_ptr.dtype.element_ty), mask=exists)
            else:
                gamma = tl.load(gamma_ptr + c, mask=of_c, other=0.0)[None, :]
                d_beta += tl.sum(sum_d, axis=0)
                d_gamma += tl.sum(sum_dx, axis=0)
            scale = OFFSET + to_accumulator(gamma, gamma_ptr).to(sum_d.dtype)
            g = scale * sum_d
            gx = scale * sum_dx
        if INSTANCE:
            to = means_ptr + (n[:, None] * 2 * C + c[None, :])
            tl.store(to, g * each, mask=exists)
            tl.store(to + C, gx * each, mask=exists)
        else:
            # Not γ times 0 of samples that do not exist.
            mean_g += tl.sum(tl.where(exists, g, 0.0), axis=0)
            mean_gx += tl.sum(tl.where(exists, gx, 0.0), axis=0)
    if AFFINE == VECTOR:
        tl.store(d_beta_ptr + c, d_beta.to(d_beta_ptr.dtype.element_ty), mask=of_c)
        tl.store(d_gamma_ptr + c, d_gamma.to(d_gamma_ptr.dtype.element_ty), mask=of_c)
    if not INSTANCE:
        tl.store(means_ptr + c, mean_g * each, mask=of_c)
        tl.store(means_ptr + (C + c), mean_gx * each, mask=of_c)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def modulate_bwd_apply_kernel(
    dy_ptr, x_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, means_ptr, dx_ptr, C, pixels, W, parts, tiles,
    CENTRED: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, AFFINE: tl.constexpr, INSTANCE: tl.constexpr,
    U: tl.constexpr, ACTIVATED: tl.constexpr, SLOPE: tl.constexpr,
    LAST: tl.constexpr, V: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """dx = (dy' γ - mean(dy' γ) - x̂ mean(dy' γ x̂)) rstd, without the means if the statistics were given (not CENTRED).

    With maps dy is dβ, which is dy' already, so β is not read again.
    """
    META: tl.constexpr = record(META_FIELDS)(
        U=U, LAST=LAST, V=V, CHANNELS=CHANNELS, PIXELS=PIXELS, AFFINE=AFFINE, INSTANCE=INSTANCE, ACTIVATED=ACTIVATED,
        SLOPE=SLOPE, OFFSET=OFFSET, EPS=EPS,
    )  # fmt: skip
    PHASES: tl.constexpr = U * U if LAST else U
    place = place_of_program(record(SIZE_FIELDS)(C, pixels, W, parts, tiles), META)
    norm = norm_of(mean_ptr, var_ptr, place, META)
    rows = rows_of(gamma_ptr, beta_ptr, norm, place, META)
    means_of_sample = means_ptr
    if INSTANCE:
        means_of_sample += place.n * C
    mean_g = of_channels(means_of_sample, place, INSTANCE, META)
    mean_gx = of_channels(means_of_sample + C, place, INSTANCE, META)
    start = tl.multiple_of(place.n * C * pixels, V)
    end = tl.minimum((place.part + 1) * tiles, tl.cdiv(pixels, PIXELS))
    for tile in range(place.part * tiles, end):
        first = tile * PIXELS
        here = tile_at(place, first, META)
        x_hat = (load_tile(x_ptr + start, here) - norm.mean) * norm.rstd
        if AFFINE == MAPS:
            g = to_accumulator(tl.zeros([PIXELS, CHANNELS] if LAST else [CHANNELS, PIXELS], dtype=tl.float32), x_ptr)
            for phase in tl.static_range(PHASES):
                at = upsampled_tile_at(place, first, W, phase, META)
                gamma = OFFSET + load_tile(gamma_ptr + start * (U * U), at)
                g += fold(gamma * load_tile(dy_ptr + start * (U * U), at), META)
        else:
            g = rows.gamma * summed_gradient(dy_ptr + start * (U * U), rows, x_hat, place, first, W, META)
        if CENTRED:
            g -= mean_g + x_hat * mean_gx
        store_tile(dx_ptr + start, here, g * norm.rstd)
