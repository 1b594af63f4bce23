"""The pass of spatially modulated convolution on any GPU that Triton reaches: ``pixnorm::spatial_scale_fwd_triton`` and
``pixnorm::spatial_scale_bwd_triton``.

They have the schemas of the native ops (pixnorm/ops/modulated_conv.py, where the equations are). One kernel each
streams over tiles (tiles.py); the sums of parts, a few numbers for each plane, are added up by PyTorch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixnorm.ops.common import dense, dense_like, is_channels_last
from pixnorm.ops.modulated_conv import spatial_scale_bwd_fake, spatial_scale_fwd_fake
from pixnorm.triton_kernels.common import accumulator, launch, op_of_kernels, power_of_two_from, record, wrap_triton
from pixnorm.triton_kernels.tiles import (
    NOT_SPECIALISED,
    Tiling,
    load_tile,
    place_of_program,
    store_tile,
    sum_of_planes,
    tile_at,
)

# A thread keeps a sum for each tap and each of its elements, at most about so many.
MOST_SUMS = 128

META_FIELDS = tl.constexpr("LAST V CHANNELS PIXELS KH KW")
SIZE_FIELDS = tl.constexpr("C pixels parts")


@triton.jit
def counts_at(pointer, index, exists, size, TAPS: tl.constexpr, META: tl.constexpr):
    """How often each tap sees the rows (columns) of the pixels of a tile; a tuple of TAPS."""
    counts = ()
    for tap in tl.static_range(TAPS):
        count = tl.load(pointer + tap * size + index, mask=exists, other=0.0)
        counts = counts + (count[:, None] if META.LAST else count[None, :],)
    return counts


@triton.jit
def seen_at(rows_ptr, columns_ptr, first, place, H, W, META: tl.constexpr):
    """The counts of the rows and of the columns."""
    pixel = first + tl.arange(0, META.PIXELS)
    exists = pixel < place.pixels
    rows = counts_at(rows_ptr, pixel // W, exists, H, META.KH, META)
    columns = counts_at(columns_ptr, pixel % W, exists, W, META.KW, META)
    return rows, columns


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def spatial_scale_fwd_kernel(
    x_ptr, s_ptr, rows_ptr, columns_ptr, y_ptr, sums_ptr, N, C, H, W, parts, tiles,
    KH: tl.constexpr, KW: tl.constexpr,
    LAST: tl.constexpr, V: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """y = x s, and the sums [part][N, C, KH, KW] of s² over the pixels of a part, weighted by the counts."""
    META: tl.constexpr = record(META_FIELDS)(LAST=LAST, V=V, CHANNELS=CHANNELS, PIXELS=PIXELS, KH=KH, KW=KW)
    pixels = H * W
    place = place_of_program(record(SIZE_FIELDS)(C, pixels, parts), META)
    start = tl.multiple_of(place.n * C * pixels, V)
    zero = tl.zeros([PIXELS, CHANNELS] if LAST else [CHANNELS, PIXELS], dtype=sums_ptr.dtype.element_ty)
    sums = ()
    for _ in tl.static_range(KH * KW):
        sums = sums + (zero,)
    end = tl.minimum((place.part + 1) * tiles, tl.cdiv(pixels, PIXELS))
    for tile in range(place.part * tiles, end):
        first = tile * PIXELS
        at = tile_at(place, first, META)
        s = load_tile(s_ptr + start, at)
        store_tile(y_ptr + start, at, load_tile(x_ptr + start, at) * s)
        rows, columns = seen_at(rows_ptr, columns_ptr, first, place, H, W, META)
        square = s * s
        added = ()
        for tap in tl.static_range(KH * KW):
            added = added + (sums[tap] + square * (rows[tap // KW] * columns[tap % KW]),)
        sums = added
    o_channel = tl.arange(0, CHANNELS)
    plane = (place.part.to(tl.int64) * N + place.n) * C + place.c + o_channel
    for tap in tl.static_range(KH * KW):
        of_tap = tl.reshape(sum_of_planes(sums[tap], META), [CHANNELS])
        tl.store(sums_ptr + plane * (KH * KW) + tap, of_tap, mask=o_channel < C - place.c)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def spatial_scale_bwd_kernel(
    dy_ptr, d_sums_ptr, x_ptr, s_ptr, rows_ptr, columns_ptr, dx_ptr, ds_ptr, C, H, W, parts, tiles,
    KH: tl.constexpr, KW: tl.constexpr,
    LAST: tl.constexpr, V: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """dx = dy s, and ds = dy x + 2 s times the gradients of the sums that a pixel is in."""
    META: tl.constexpr = record(META_FIELDS)(LAST=LAST, V=V, CHANNELS=CHANNELS, PIXELS=PIXELS, KH=KH, KW=KW)
    pixels = H * W
    place = place_of_program(record(SIZE_FIELDS)(C, pixels, parts), META)
    start = tl.multiple_of(place.n * C * pixels, V)
    o_channel = tl.arange(0, CHANNELS)
    plane = place.n * C + place.c + o_channel
    of_taps = ()
    for tap in tl.static_range(KH * KW):
        value = 2.0 * tl.load(d_sums_ptr + plane * (KH * KW) + tap, mask=o_channel < C - place.c, other=0.0)
        of_taps = of_taps + (value[None, :] if LAST else value[:, None],)
    end = tl.minimum((place.part + 1) * tiles, tl.cdiv(pixels, PIXELS))
    for tile in range(place.part * tiles, end):
        first = tile * PIXELS
        at = tile_at(place, first, META)
        x = load_tile(x_ptr + start, at)
        s = load_tile(s_ptr + start, at)
        dy = load_tile(dy_ptr + start, at)
        rows, columns = seen_at(rows_ptr, columns_ptr, first, place, H, W, META)
        weight = tl.zeros_like(s)
        for tap in tl.static_range(KH * KW):
            weight += of_taps[tap] * (rows[tap // KW] * columns[tap % KW])
        store_tile(dx_ptr + start, at, dy * s)
        store_tile(ds_ptr + start, at, dy * x + s * weight)


def _arguments(x: Tensor, style_map: Tensor, rows: Tensor, columns: Tensor, tiling: Tiling) -> dict[str, Any]:
    """What both kernels have in common."""
    _, c, h, w = x.shape
    return {
        "x_ptr": x,
        "s_ptr": dense(style_map, x),
        "rows_ptr": rows.contiguous(),
        "columns_ptr": columns.contiguous(),
        "C": c,
        "H": h,
        "W": w,
        "parts": tiling.parts,
        "tiles": tiling.tiles,
        "KH": rows.shape[0],
        "KW": columns.shape[0],
        "LAST": is_channels_last(x),
        "V": tiling.columns,
        "CHANNELS": tiling.channels,
        "PIXELS": tiling.pixels,
        "num_warps": tiling.warps,
    }


def spatial_scale_fwd(x: Tensor, style_map: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The forward op, see pixnorm/ops/modulated_conv.py."""
    x = dense(x, x)
    y = dense_like(x)
    n, c = x.shape[:2]
    taps = rows.shape[0], columns.shape[0]
    if x.numel() == 0:
        return y, torch.zeros((n, c, *taps), dtype=accumulator(x), device=x.device)
    # Of the 16 elements that a thread otherwise has, and 4 bytes of each sum.
    tiling = Tiling.of(x, per_pixel=True, share=power_of_two_from(16 * taps[0] * taps[1]) // MOST_SUMS)
    sums = torch.empty((tiling.parts, n, c, *taps), dtype=accumulator(x), device=x.device)
    arguments = _arguments(x, style_map, rows, columns, tiling)
    launch(wrap_triton(spatial_scale_fwd_kernel), (tiling.programs,), y_ptr=y, sums_ptr=sums, N=n, **arguments)
    return y, sums[0] if tiling.parts == 1 else sums.sum(0)


def spatial_scale_bwd(
    grad_y: Tensor, grad_sums: Tensor, x: Tensor, style_map: Tensor, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor]:
    """The backward op, see pixnorm/ops/modulated_conv.py."""
    x = dense(x, x)
    dx, ds = dense_like(x), dense_like(x)
    if x.numel() > 0:
        tiling = Tiling.of(x, per_pixel=True)
        launch(
            wrap_triton(spatial_scale_bwd_kernel),
            (tiling.programs,),
            dy_ptr=dense(grad_y, x),
            d_sums_ptr=grad_sums.contiguous(),
            dx_ptr=dx,
            ds_ptr=ds,
            **_arguments(x, style_map, rows, columns, tiling),
        )
    return dx, dense(ds, style_map)


spatial_scale_fwd_triton = op_of_kernels("pixnorm::spatial_scale_fwd_triton", mutates_args=())(spatial_scale_fwd)
spatial_scale_bwd_triton = op_of_kernels("pixnorm::spatial_scale_bwd_triton", mutates_args=())(spatial_scale_bwd)
# Shapes, dtypes and strides are those of the native ops.
spatial_scale_fwd_triton.register_fake(spatial_scale_fwd_fake)
spatial_scale_bwd_triton.register_fake(spatial_scale_bwd_fake)
