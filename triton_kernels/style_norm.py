"""The Triton kernels of StyleGAN 1's epilogue; see style.py.

v = lrelu(x + w noise + b) is computed anew in each pass. Planes that fit registers are read once ("resident"): a
program has a tile of whole planes, and statistics and sums are of the registers that hold it. Larger planes are
streamed over, in a pass for the statistics of v, or for the sums that backward subtracts, and one for the output.
"""

import triton
import triton.language as tl

from pixnorm.triton_kernels.common import activated, activation_gradient, record, to_accumulator
from pixnorm.triton_kernels.statistics import pooled, store_part, welford
from pixnorm.triton_kernels.style_epilogue import SIZE_FIELDS, noise_and_bias, noise_at, with_noise_and_bias
from pixnorm.triton_kernels.tiles import (
    NOT_SPECIALISED,
    load_tile,
    moments_of_planes,
    norm_of,
    of_channels,
    place_of_program,
    store_of_planes,
    store_tile,
    sum_of_planes,
    tile_at,
)

META_FIELDS = tl.constexpr("LAST V CHANNELS PIXELS NOISE BIAS INSTANCE EPS")


@triton.jit
def style_at(scale_ptr, shift_ptr, place, META: tl.constexpr):
    """1 + scale and shift of each plane of a tile."""
    scale = 1.0 + of_channels(scale_ptr, place, True, META)
    return record("scale shift")(scale, of_channels(shift_ptr, place, True, META))


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def style_norm_statistics_kernel(
    x_ptr, noise_ptr, strength_ptr, bias_ptr, partials_ptr, C, pixels, noise_stride, parts, tiles,
    NOISE: tl.constexpr, BIAS: tl.constexpr, SLOPE: tl.constexpr, EPS: tl.constexpr,
    LAST: tl.constexpr, V: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Partial statistics of v, [sample][part][count, mean, sum of squares][C], as in statistics.py."""
    META: tl.constexpr = record(META_FIELDS)(
        LAST=LAST, V=V, CHANNELS=CHANNELS, PIXELS=PIXELS, NOISE=NOISE, BIAS=BIAS, INSTANCE=True, EPS=EPS
    )  # fmt: skip
    AXIS: tl.constexpr = 0 if LAST else 1
    place = place_of_program(record(SIZE_FIELDS)(C, pixels, parts), META)
    rows = noise_and_bias(strength_ptr, bias_ptr, place, META)
    mean = to_accumulator(tl.zeros([PIXELS, CHANNELS] if LAST else [CHANNELS, PIXELS], dtype=tl.float32), x_ptr)
    squares = mean
    seen = to_accumulator(tl.zeros([1, 1], dtype=tl.float32), x_ptr)
    start = tl.multiple_of(place.n * C * pixels, V)
    begin = place.part * tiles
    end = tl.minimum(begin + tiles, tl.cdiv(pixels, PIXELS))
    for tile in range(begin, end):
        first = tile * PIXELS
        at = tile_at(place, first, META)
        noise = noise_at(noise_ptr, noise_stride, place, first, META)
        v = activated(with_noise_and_bias(load_tile(x_ptr + start, at), noise, rows, META), SLOPE)
        seen += 1.0
        mean, squares = welford(v, at.exists, seen, mean, squares)
    o_pixel = tl.expand_dims(tl.arange(0, PIXELS), 1 - AXIS)
    # In how many tiles each pixel was.
    times = (tl.minimum(end * PIXELS, pixels) - begin * PIXELS - o_pixel + (PIXELS - 1)) // PIXELS
    count = to_accumulator(tl.maximum(times, 0), x_ptr) + tl.zeros_like(mean)
    whole, of_all, of_squares = pooled(count, mean, squares, o_pixel == 0, AXIS)
    channel = tl.expand_dims(place.c + tl.arange(0, CHANNELS), AXIS)
    store_part(partials_ptr, place.n * parts + place.part, channel, C, whole, of_all, of_squares, channel < C)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def style_norm_fwd_kernel(
    x_ptr, scale_ptr, shift_ptr, noise_ptr, strength_ptr, bias_ptr, mean_ptr, var_ptr, y_ptr,
    C, pixels, noise_stride, parts, tiles,
    NOISE: tl.constexpr, BIAS: tl.constexpr, SLOPE: tl.constexpr, EPS: tl.constexpr,
    LAST: tl.constexpr, V: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """y = (1 + scale) v_hat + shift."""
    META: tl.constexpr = record(META_FIELDS)(
        LAST=LAST, V=V, CHANNELS=CHANNELS, PIXELS=PIXELS, NOISE=NOISE, BIAS=BIAS, INSTANCE=True, EPS=EPS
    )  # fmt: skip
    place = place_of_program(record(SIZE_FIELDS)(C, pixels, parts), META)
    rows = noise_and_bias(strength_ptr, bias_ptr, place, META)
    norm = norm_of(mean_ptr, var_ptr, place, META)
    style = style_at(scale_ptr, shift_ptr, place, META)
    start = tl.multiple_of(place.n * C * pixels, V)
    end = tl.minimum((place.part + 1) * tiles, tl.cdiv(pixels, PIXELS))
    for tile in range(place.part * tiles, end):
        first = tile * PIXELS
        at = tile_at(place, first, META)
        noise = noise_at(noise_ptr, noise_stride, place, first, META)
        v = activated(with_noise_and_bias(load_tile(x_ptr + start, at), noise, rows, META), SLOPE)
        store_tile(y_ptr + start, at, style.scale * ((v - norm.mean) * norm.rstd) + style.shift)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def style_norm_bwd_reduce_kernel(
    dy_ptr, x_ptr, noise_ptr, strength_ptr, bias_ptr, mean_ptr, var_ptr, sums_ptr,
    N, C, pixels, noise_stride, parts, tiles,
    NOISE: tl.constexpr, BIAS: tl.constexpr, SLOPE: tl.constexpr, EPS: tl.constexpr,
    LAST: tl.constexpr, V: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Sums [dy v_hat, dy][part][N, C]."""
    META: tl.constexpr = record(META_FIELDS)(
        LAST=LAST, V=V, CHANNELS=CHANNELS, PIXELS=PIXELS, NOISE=NOISE, BIAS=BIAS, INSTANCE=True, EPS=EPS
    )  # fmt: skip
    place = place_of_program(record(SIZE_FIELDS)(C, pixels, parts), META)
    rows = noise_and_bias(strength_ptr, bias_ptr, place, META)
    norm = norm_of(mean_ptr, var_ptr, place, META)
    d_scale = to_accumulator(tl.zeros([PIXELS, CHANNELS] if LAST else [CHANNELS, PIXELS], dtype=tl.float32), x_ptr)
    d_shift = d_scale
    start = tl.multiple_of(place.n * C * pixels, V)
    end = tl.minimum((place.part + 1) * tiles, tl.cdiv(pixels, PIXELS))
    for tile in range(place.part * tiles, end):
        first = tile * PIXELS
        at = tile_at(place, first, META)
        dy = load_tile(dy_ptr + start, at)
        noise = noise_at(noise_ptr, noise_stride, place, first, META)
        v = activated(with_noise_and_bias(load_tile(x_ptr + start, at), noise, rows, META), SLOPE)
        d_shift += dy
        d_scale += dy * ((v - norm.mean) * norm.rstd)
    to = sums_ptr + tl.cast(place.part, tl.int64) * N * C
    store_of_planes(to, place, sum_of_planes(d_scale, META), META)
    store_of_planes(to + tl.cast(parts, tl.int64) * N * C, place, sum_of_planes(d_shift, META), META)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def style_norm_bwd_apply_kernel(
    dy_ptr, x_ptr, scale_ptr, noise_ptr, strength_ptr, bias_ptr, mean_ptr, var_ptr, d_scale_ptr, d_shift_ptr,
    dx_ptr, sums_ptr, N, C, pixels, noise_stride, parts, tiles,
    NOISE: tl.constexpr, BIAS: tl.constexpr, SLOPE: tl.constexpr, EPS: tl.constexpr,
    LAST: tl.constexpr, V: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """dx = lrelu'(u) (dy - mean(dy) - v_hat mean(dy v_hat)) (1 + scale) rstd, and the sums [dw, db][part][N, C]."""
    META: tl.constexpr = record(META_FIELDS)(
        LAST=LAST, V=V, CHANNELS=CHANNELS, PIXELS=PIXELS, NOISE=NOISE, BIAS=BIAS, INSTANCE=True, EPS=EPS
    )  # fmt: skip
    place = place_of_program(record(SIZE_FIELDS)(C, pixels, parts), META)
    rows = noise_and_bias(strength_ptr, bias_ptr, place, META)
    norm = norm_of(mean_ptr, var_ptr, place, META)
    factor = (1.0 + of_channels(scale_ptr, place, True, META)) * norm.rstd
    each = 1.0 / to_accumulator(pixels, x_ptr)
    mean_d = of_channels(d_shift_ptr, place, True, META) * each
    mean_dv = of_channels(d_scale_ptr, place, True, META) * each
    d_strength = to_accumulator(tl.zeros([PIXELS, CHANNELS] if LAST else [CHANNELS, PIXELS], dtype=tl.float32), x_ptr)
    d_bias = d_strength
    start = tl.multiple_of(place.n * C * pixels, V)
    end = tl.minimum((place.part + 1) * tiles, tl.cdiv(pixels, PIXELS))
    for tile in range(place.part * tiles, end):
        first = tile * PIXELS
        at = tile_at(place, first, META)
        dy = load_tile(dy_ptr + start, at)
        noise = noise_at(noise_ptr, noise_stride, place, first, META)
        u = with_noise_and_bias(load_tile(x_ptr + start, at), noise, rows, META)
        v_hat = (activated(u, SLOPE) - norm.mean) * norm.rstd
        dx = activation_gradient(u, (dy - mean_d - v_hat * mean_dv) * factor, SLOPE)
        if NOISE:
            d_strength += dx * noise
        if BIAS:
            d_bias += tl.where(at.exists, dx, 0.0)
        store_tile(dx_ptr + start, at, dx)
    to = sums_ptr + tl.cast(place.part, tl.int64) * N * C
    if NOISE:
        store_of_planes(to, place, sum_of_planes(d_strength, META), META)
        to += tl.cast(parts, tl.int64) * N * C
    if BIAS:
        store_of_planes(to, place, sum_of_planes(d_bias, META), META)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def style_norm_fwd_resident_kernel(
    x_ptr, scale_ptr, shift_ptr, noise_ptr, strength_ptr, bias_ptr, mean_ptr, var_ptr, y_ptr,
    C, pixels, noise_stride, parts, tiles,
    NOISE: tl.constexpr, BIAS: tl.constexpr, SLOPE: tl.constexpr, EPS: tl.constexpr,
    LAST: tl.constexpr, V: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Statistics of planes of v, and y = (1 + scale) v_hat + shift."""
    META: tl.constexpr = record(META_FIELDS)(
        LAST=LAST, V=V, CHANNELS=CHANNELS, PIXELS=PIXELS, NOISE=NOISE, BIAS=BIAS, INSTANCE=True, EPS=EPS
    )  # fmt: skip
    place = place_of_program(record(SIZE_FIELDS)(C, pixels, parts), META)
    rows = noise_and_bias(strength_ptr, bias_ptr, place, META)
    start = tl.multiple_of(place.n * C * pixels, V)
    at = tile_at(place, 0, META)
    noise = noise_at(noise_ptr, noise_stride, place, 0, META)
    v = activated(with_noise_and_bias(load_tile(x_ptr + start, at), noise, rows, META), SLOPE)
    mean, var, d = moments_of_planes(tl.where(at.exists, v, 0.0), at.exists, pixels, META)
    store_of_planes(mean_ptr, place, mean, META)
    store_of_planes(var_ptr, place, var, META)
    style = style_at(scale_ptr, shift_ptr, place, META)
    store_tile(y_ptr + start, at, style.scale * (d * (1.0 / tl.sqrt(var + EPS))) + style.shift)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def style_norm_bwd_resident_kernel(
    dy_ptr, x_ptr, scale_ptr, noise_ptr, strength_ptr, bias_ptr, mean_ptr, var_ptr, dx_ptr, sums_ptr,
    N, C, pixels, noise_stride, parts, tiles,
    NOISE: tl.constexpr, BIAS: tl.constexpr, SLOPE: tl.constexpr, EPS: tl.constexpr,
    LAST: tl.constexpr, V: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """dx as in apply, and the sums [d scale, d shift, dw, db][N, C]."""
    META: tl.constexpr = record(META_FIELDS)(
        LAST=LAST, V=V, CHANNELS=CHANNELS, PIXELS=PIXELS, NOISE=NOISE, BIAS=BIAS, INSTANCE=True, EPS=EPS
    )  # fmt: skip
    place = place_of_program(record(SIZE_FIELDS)(C, pixels, parts), META)
    rows = noise_and_bias(strength_ptr, bias_ptr, place, META)
    norm = norm_of(mean_ptr, var_ptr, place, META)
    factor = (1.0 + of_channels(scale_ptr, place, True, META)) * norm.rstd
    start = tl.multiple_of(place.n * C * pixels, V)
    at = tile_at(place, 0, META)
    dy = load_tile(dy_ptr + start, at)
    noise = noise_at(noise_ptr, noise_stride, place, 0, META)
    u = with_noise_and_bias(load_tile(x_ptr + start, at), noise, rows, META)
    v_hat = (activated(u, SLOPE) - norm.mean) * norm.rstd
    d_shift = sum_of_planes(dy, META)
    d_scale = sum_of_planes(dy * v_hat, META)
    each = 1.0 / to_accumulator(pixels, x_ptr)
    dx = activation_gradient(u, (dy - d_shift * each - v_hat * (d_scale * each)) * factor, SLOPE)
    store_tile(dx_ptr + start, at, dx)
    step = tl.cast(N, tl.int64) * C
    store_of_planes(sums_ptr, place, d_scale, META)
    store_of_planes(sums_ptr + step, place, d_shift, META)
    to = sums_ptr + 2 * step
    if NOISE:
        store_of_planes(to, place, sum_of_planes(dx * noise, META), META)
        to += step
    if BIAS:
        store_of_planes(to, place, sum_of_planes(tl.where(at.exists, dx, 0.0), META), META)
