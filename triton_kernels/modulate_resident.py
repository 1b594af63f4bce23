"""Modulated norm's Triton kernels for planes that are normalised by themselves and fit registers; see modulate.py.

A program has a tile of whole planes, as in modulate_stream.py, and reads everything once: statistics or sums are of the
registers that hold it. The rows and columns of the tile that are beyond the planes are zero in all sums.
"""

import triton
import triton.language as tl

from pixnorm.triton_kernels.common import activated, activation_gradient, record, to_accumulator
from pixnorm.triton_kernels.modulate_stream import MAPS, META_FIELDS, ROWS, SIZE_FIELDS, VECTOR, rows_of
from pixnorm.triton_kernels.tiles import (
    NOT_SPECIALISED,
    load_tile,
    moments_of_planes,
    norm_of,
    place_of_program,
    store_of_planes,
    store_tile,
    sum_of_planes,
    tile_at,
)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def modulate_fwd_resident_kernel(
    x_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, y_ptr, C, pixels, W, parts, tiles,
    EPS: tl.constexpr, OFFSET: tl.constexpr, AFFINE: tl.constexpr, INSTANCE: tl.constexpr, U: tl.constexpr,
    ACTIVATED: tl.constexpr, SLOPE: tl.constexpr,
    LAST: tl.constexpr, V: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Statistics of planes, and y = act((o + γ) x̂ + β)."""
    META: tl.constexpr = record(META_FIELDS)(
        U=U, LAST=LAST, V=V, CHANNELS=CHANNELS, PIXELS=PIXELS, AFFINE=AFFINE, INSTANCE=INSTANCE, ACTIVATED=ACTIVATED,
        SLOPE=SLOPE, OFFSET=OFFSET, EPS=EPS,
    )  # fmt: skip
    place = place_of_program(record(SIZE_FIELDS)(C, pixels, W, parts, tiles), META)
    start = tl.multiple_of(place.n * C * pixels, V)
    at = tile_at(place, 0, META)
    x = load_tile(x_ptr + start, at)
    mean, var, d = moments_of_planes(x, at.exists, pixels, META)
    store_of_planes(mean_ptr, place, mean, META)
    store_of_planes(var_ptr, place, var, META)
    norm = record("mean rstd")(mean, 1.0 / tl.sqrt(var + EPS))
    x_hat = d * norm.rstd
    if AFFINE == MAPS:
        y = (OFFSET + load_tile(gamma_ptr + start, at)) * x_hat + load_tile(beta_ptr + start, at)
    else:
        rows = rows_of(gamma_ptr, beta_ptr, norm, place, META)
        y = rows.gamma * x_hat + rows.beta
    if ACTIVATED:
        y = activated(y, SLOPE)
    store_tile(y_ptr + start, at, y)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def modulate_bwd_resident_kernel(
    dy_ptr, x_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, d_gamma_ptr, d_beta_ptr, dx_ptr, C, pixels, W, parts, tiles,
    EPS: tl.constexpr, OFFSET: tl.constexpr, AFFINE: tl.constexpr, INSTANCE: tl.constexpr, U: tl.constexpr,
    ACTIVATED: tl.constexpr, SLOPE: tl.constexpr,
    LAST: tl.constexpr, V: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """dx = (γ dy' - mean(γ dy') - x̂ mean(γ dy' x̂)) rstd, and the gradients of maps, or of each plane's row."""
    META: tl.constexpr = record(META_FIELDS)(
        U=U, LAST=LAST, V=V, CHANNELS=CHANNELS, PIXELS=PIXELS, AFFINE=AFFINE, INSTANCE=INSTANCE, ACTIVATED=ACTIVATED,
        SLOPE=SLOPE, OFFSET=OFFSET, EPS=EPS,
    )  # fmt: skip
    place = place_of_program(record(SIZE_FIELDS)(C, pixels, W, parts, tiles), META)
    norm = norm_of(mean_ptr, var_ptr, place, META)
    start = tl.multiple_of(place.n * C * pixels, V)
    at = tile_at(place, 0, META)
    dy = load_tile(dy_ptr + start, at)
    x_hat = (load_tile(x_ptr + start, at) - norm.mean) * norm.rstd
    each = 1.0 / to_accumulator(pixels, x_ptr)
    if AFFINE == MAPS:
        gamma = OFFSET + load_tile(gamma_ptr + start, at)
        if ACTIVATED:
            dy = activation_gradient(gamma * x_hat + load_tile(beta_ptr + start, at), dy, SLOPE)
        store_tile(d_beta_ptr + start, at, dy)
        store_tile(d_gamma_ptr + start, at, dy * x_hat)
        # Zero outside the planes, also where γ was not read.
        g = gamma * dy
        mean_g = sum_of_planes(g, META) * each
        mean_gx = sum_of_planes(g * x_hat, META) * each
    else:
        rows = rows_of(gamma_ptr, beta_ptr, norm, place, META)
        if ACTIVATED:
            dy = activation_gradient(rows.gamma * x_hat + rows.beta, dy, SLOPE)
        d_beta = sum_of_planes(dy, META)
        d_gamma = sum_of_planes(dy * x_hat, META)
        if (AFFINE == ROWS) | (AFFINE == VECTOR):
            store_of_planes(d_gamma_ptr, place, d_gamma, META)
            store_of_planes(d_beta_ptr, place, d_beta, META)
        g = rows.gamma * dy
        mean_g = rows.gamma * d_beta * each
        mean_gx = rows.gamma * d_gamma * each
    store_tile(dx_ptr + start, at, (g - mean_g - x_hat * mean_gx) * norm.rstd)
