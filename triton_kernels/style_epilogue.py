"""The Triton kernels of StyleGAN 2's epilogue; see style.py.

They stream over tiles (tiles.py). A tile's noise is loaded once for all of its channels.
"""

import triton
import triton.language as tl

from pixnorm.triton_kernels.common import activated, activation_gradient, record, to_accumulator
from pixnorm.triton_kernels.tiles import (
    NOT_SPECIALISED,
    load_tile,
    of_channels,
    of_pixels,
    place_of_program,
    store_of_planes,
    store_tile,
    sum_of_planes,
    tile_at,
)

META_FIELDS = tl.constexpr("LAST V CHANNELS PIXELS DEMOD NOISE BIAS STYLES GAIN")
SIZE_FIELDS = tl.constexpr("C pixels parts")


@triton.jit
def noise_and_bias(strength_ptr, bias_ptr, place, META: tl.constexpr):
    """The strength of the noise and the bias of each channel; not to be used where they are not given."""
    strength = of_channels(strength_ptr, place, False, META) if META.NOISE else 0.0
    bias = of_channels(bias_ptr, place, False, META) if META.BIAS else 0.0
    return record("strength bias")(strength, bias)


@triton.jit
def noise_at(noise_ptr, stride, place, first, META: tl.constexpr):
    """The noise of the pixels of a tile; ``stride`` is that of samples, 0 where they have the same noise."""
    if META.NOISE:
        # A plane of noise is a multiple of V in NCHW alone.
        start = tl.multiple_of(place.n * stride, 1 if META.LAST else META.V)
        return of_pixels(noise_ptr + start, place, first, META)
    else:
        return 0.0


@triton.jit
def with_noise_and_bias(x, noise, rows, META: tl.constexpr):
    """x + w noise + b."""
    if META.NOISE:
        x += rows.strength * noise
    if META.BIAS:
        x += rows.bias
    return x


@triton.jit
def scales_of(demod_ptr, styles_ptr, place, META: tl.constexpr):
    """What x and the activation are multiplied by, for each channel; not to be used where they are not given."""
    demod = of_channels(demod_ptr, place, True, META) if META.DEMOD else 1.0
    styles = of_channels(styles_ptr, place, True, META) * META.GAIN if META.STYLES else 1.0
    return record("demod styles")(demod, styles)


@triton.jit
def demodulated(x, scales, META: tl.constexpr):
    if META.DEMOD:
        x *= scales.demod
    return x


@triton.jit
def with_styles(value, scales, META: tl.constexpr):
    """s gain value."""
    if META.STYLES:
        return value * scales.styles
    else:
        return value * META.GAIN


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def style_epilogue_fwd_kernel(
    x_ptr, demod_ptr, noise_ptr, strength_ptr, bias_ptr, styles_ptr, y_ptr, C, pixels, noise_stride, parts, tiles,
    DEMOD: tl.constexpr, NOISE: tl.constexpr, BIAS: tl.constexpr, STYLES: tl.constexpr, GAIN: tl.constexpr,
    ACTIVATED: tl.constexpr, SLOPE: tl.constexpr,
    LAST: tl.constexpr, V: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """y = s gain act(d x + w noise + b)."""
    META: tl.constexpr = record(META_FIELDS)(
        LAST=LAST, V=V, CHANNELS=CHANNELS, PIXELS=PIXELS, DEMOD=DEMOD, NOISE=NOISE, BIAS=BIAS, STYLES=STYLES, GAIN=GAIN
    )  # fmt: skip
    place = place_of_program(record(SIZE_FIELDS)(C, pixels, parts), META)
    rows = noise_and_bias(strength_ptr, bias_ptr, place, META)
    scales = scales_of(demod_ptr, styles_ptr, place, META)
    start = tl.multiple_of(place.n * C * pixels, V)
    end = tl.minimum((place.part + 1) * tiles, tl.cdiv(pixels, PIXELS))
    for tile in range(place.part * tiles, end):
        first = tile * PIXELS
        at = tile_at(place, first, META)
        noise = noise_at(noise_ptr, noise_stride, place, first, META)
        u = with_noise_and_bias(demodulated(load_tile(x_ptr + start, at), scales, META), noise, rows, META)
        if ACTIVATED:
            u = activated(u, SLOPE)
        store_tile(y_ptr + start, at, with_styles(u, scales, META))


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def style_epilogue_bwd_kernel(
    dy_ptr, x_ptr, demod_ptr, noise_ptr, strength_ptr, bias_ptr, styles_ptr, dx_ptr, sums_ptr,
    N, C, pixels, noise_stride, parts, tiles,
    DEMOD: tl.constexpr, NOISE: tl.constexpr, BIAS: tl.constexpr, STYLES: tl.constexpr, GAIN: tl.constexpr,
    ACTIVATED: tl.constexpr, SLOPE: tl.constexpr,
    LAST: tl.constexpr, V: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """dx, and the sums [dd, ds, dw, db][part][N, C] over the pixels of a part, of those that are given."""
    META: tl.constexpr = record(META_FIELDS)(
        LAST=LAST, V=V, CHANNELS=CHANNELS, PIXELS=PIXELS, DEMOD=DEMOD, NOISE=NOISE, BIAS=BIAS, STYLES=STYLES, GAIN=GAIN
    )  # fmt: skip
    place = place_of_program(record(SIZE_FIELDS)(C, pixels, parts), META)
    rows = noise_and_bias(strength_ptr, bias_ptr, place, META)
    scales = scales_of(demod_ptr, styles_ptr, place, META)
    zero = to_accumulator(tl.zeros([PIXELS, CHANNELS] if LAST else [CHANNELS, PIXELS], dtype=tl.float32), x_ptr)
    d_demod = zero
    d_styles = zero
    d_strength = zero
    d_bias = zero
    start = tl.multiple_of(place.n * C * pixels, V)
    end = tl.minimum((place.part + 1) * tiles, tl.cdiv(pixels, PIXELS))
    for tile in range(place.part * tiles, end):
        first = tile * PIXELS
        at = tile_at(place, first, META)
        x = load_tile(x_ptr + start, at)
        dy = load_tile(dy_ptr + start, at)
        noise = noise_at(noise_ptr, noise_stride, place, first, META)
        u = with_noise_and_bias(demodulated(x, scales, META), noise, rows, META)
        g = with_styles(dy, scales, META)
        if ACTIVATED:
            g = activation_gradient(u, g, SLOPE)
        if STYLES:
            d_styles += dy * (activated(u, SLOPE) if ACTIVATED else u)
        if DEMOD:
            d_demod += g * x
        if NOISE:
            d_strength += g * noise
        if BIAS:
            d_bias += g
        store_tile(dx_ptr + start, at, demodulated(g, scales, META))
    step = tl.cast(parts, tl.int64) * N * C
    to = sums_ptr + place.part.to(tl.int64) * N * C
    if DEMOD:
        store_of_planes(to, place, sum_of_planes(d_demod, META), META)
        to += step
    if STYLES:
        store_of_planes(to, place, sum_of_planes(d_styles, META) * GAIN, META)
        to += step
    if NOISE:
        store_of_planes(to, place, sum_of_planes(d_strength, META), META)
        to += step
    if BIAS:
        store_of_planes(to, place, sum_of_planes(d_bias, META), META)


@triton.jit
def total(sums_ptr, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum over all rows of a (rows, columns) matrix, for the columns that this program has."""
    first_column = tl.program_id(0) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    found = tl.zeros([COLUMNS], dtype=sums_ptr.dtype.element_ty)
    end = tl.where(first_column < columns, rows, 0)
    for first in range(0, end, ROWS):
        row = first + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        exists = (row < rows)[:, None] & (column < columns)[None, :]
        found += tl.sum(tl.load(sums_ptr + at, mask=exists, other=0.0), axis=0)
    return found


@triton.jit
def store_columns_of_program(pointer, value, columns, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(pointer + column, value.to(pointer.dtype.element_ty), mask=column < columns)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def style_finish_kernel(
    sums_ptr, first_ptr, second_ptr, strength_ptr, bias_ptr, N, C, parts,
    FIRST: tl.constexpr, SECOND: tl.constexpr, NOISE: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds the parts up, from sums [first, second, dw, db][part][N, C] of those that are wanted.

    The first two are of samples, (N, C); the others are of all samples, (C,).
    """
    NC = N * C
    step = tl.cast(parts, tl.int64) * NC
    if FIRST:
        store_columns_of_program(first_ptr, total(sums_ptr, parts, NC, ROWS, COLUMNS), NC, COLUMNS)
        sums_ptr += step
    if SECOND:
        store_columns_of_program(second_ptr, total(sums_ptr, parts, NC, ROWS, COLUMNS), NC, COLUMNS)
        sums_ptr += step
    if NOISE:
        store_columns_of_program(strength_ptr, total(sums_ptr, parts * N, C, ROWS, COLUMNS), C, COLUMNS)
        sums_ptr += step
    if BIAS:
        store_columns_of_program(bias_ptr, total(sums_ptr, parts * N, C, ROWS, COLUMNS), C, COLUMNS)
