"""The blur on any GPU that Triton reaches: ``pixnorm::blur2d_fwd_triton`` and ``pixnorm::blur2d_bwd_triton``, with the
schemas of ``blur2d_fwd`` and ``blur2d_bwd`` (pixnorm/ops/blur.py, where the equations are).

A step is what x and y have in common: two rows and columns of the larger one and one of the other. A program makes a
tile of steps of some channels of one sample, [channel][step] in NCHW, [step][channel] in channels_last, from the pixels
around them, which come from the L1 and L2 caches but for the first time. Either way the last axis is contiguous in
memory and moves as vectors of up to 16 bytes, but for the neighbours on the left and right in NCHW.
"""

import triton
import triton.language as tl
from torch import Tensor

from pixnorm.ops.blur import blur2d_bwd_fake, blur2d_fwd_fake, empty_of
from pixnorm.ops.common import dense, is_channels_last
from pixnorm.triton_kernels.common import (
    WARP,
    launch,
    op_of_kernels,
    power_of_two_from,
    power_of_two_in,
    record,
    to_accumulator,
    wrap_triton,
)

# Elements per tile of the smaller one of x and y, without a change of resolution of both; bytes of a pixel of a tile.
TILE, TILE_OF_BOTH, RUN, WARPS = 512, 1024, 128, 4

META_FIELDS = tl.constexpr("UP DOWN LAST V CHANNELS STEPS FACTOR")


@triton.jit
def tile_at(place, h, w, H, W, V: tl.constexpr, META: tl.constexpr):
    """Offsets in a sample, and which exist, of pixels (h, w) of the tile's channels; V adjacent ones are one vector."""
    o_channel = tl.arange(0, META.CHANNELS)
    inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
    in_sample = o_channel < place.channels - place.c
    pixel = h * W + w
    if META.LAST:
        starts = tl.multiple_of(pixel * place.channels + place.c, META.V)
        return record("offset exists")(starts[:, None] + o_channel[None, :], inside[:, None] & in_sample[None, :])
    else:
        starts = tl.multiple_of((place.c + o_channel) * (H * W), V)
        pixel = tl.max_contiguous(tl.multiple_of(pixel, V), V)
        return record("offset exists")(starts[:, None] + pixel[None, :], in_sample[:, None] & inside[None, :])


@triton.jit
def load_pixels(x_ptr, place, h, w, V: tl.constexpr, META: tl.constexpr):
    tile = tile_at(place, h, w, place.H, place.W, V, META)
    return to_accumulator(tl.load(x_ptr + tile.offset, mask=tile.exists, other=0.0), x_ptr)


@triton.jit
def along_h(x_ptr, place, i, w, phase: tl.constexpr, V: tl.constexpr, META: tl.constexpr):
    """Columns w filtered along h, at step i; with upsampling at the first or second row of the step, the phase."""
    if META.DOWN:
        total = load_pixels(x_ptr, place, 2 * i, w, V, META) + load_pixels(x_ptr, place, 2 * i + 1, w, V, META)
        total = total * 3.0 + load_pixels(x_ptr, place, 2 * i - 1, w, V, META)
        total += load_pixels(x_ptr, place, 2 * i + 2, w, V, META)
    elif META.UP:
        total = load_pixels(x_ptr, place, i, w, V, META) * 3.0
        total += load_pixels(x_ptr, place, i + (2 * phase - 1), w, V, META)
    else:
        total = load_pixels(x_ptr, place, i, w, V, META) * 2.0
        total += load_pixels(x_ptr, place, i - 1, w, V, META) + load_pixels(x_ptr, place, i + 1, w, V, META)
    return total * META.FACTOR


@triton.jit
def store_pixels(y_ptr, place, h, w, value, V: tl.constexpr, META: tl.constexpr):
    tile = tile_at(place, h, w, place.out_H, place.out_W, V, META)
    tl.store(y_ptr + tile.offset, value.to(y_ptr.dtype.element_ty), mask=tile.exists)


@triton.jit(do_not_specialize=["C", "H", "W", "out_H", "out_W", "across", "down"])
def blur2d_kernel(
    x_ptr, y_ptr, C, H, W, out_H, out_W, across, down,
    UP: tl.constexpr, DOWN: tl.constexpr, LAST: tl.constexpr, V: tl.constexpr, PAIRS: tl.constexpr,
    CHANNELS: tl.constexpr, STEPS: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """y from x, where ``down`` times ``across`` steps are an image.

    A vector is V pixels of the smaller one and PAIRS of the larger one, or in channels_last V channels. Sizes are
    rounded to vectors, which changes nothing but tells the compiler that masks are of whole vectors.
    """
    META: tl.constexpr = record(META_FIELDS)(
        UP=UP, DOWN=DOWN, LAST=LAST, V=V, CHANNELS=CHANNELS, STEPS=STEPS, FACTOR=FACTOR
    )  # fmt: skip
    blocks = tl.cdiv(C, CHANNELS)
    tiles = tl.cdiv(down * across, STEPS)
    program = tl.program_id(0)
    if LAST:
        C = C // V * V
        block = program % blocks
        tile = (program // blocks) % tiles
    else:
        across = across // V * V
        W = W // (PAIRS if DOWN else V) * (PAIRS if DOWN else V)
        out_W = out_W // (PAIRS if UP else V) * (PAIRS if UP else V)
        tile = program % tiles
        block = (program // tiles) % blocks
    n = (program // (blocks * tiles)).to(tl.int64)
    place = record("c channels H W out_H out_W")(block * CHANNELS, C, H, W, out_H, out_W)
    x_ptr += n * C * (H * W)
    y_ptr += n * C * (out_H * out_W)
    step = tile * STEPS + tl.arange(0, STEPS)
    i = step // across
    j = step - i * across
    if DOWN:
        if LAST:
            first = along_h(x_ptr, place, i, 2 * j, 0, 1, META)
            second = along_h(x_ptr, place, i, 2 * j + 1, 0, 1, META)
        else:
            column = tile * (2 * STEPS) + tl.arange(0, 2 * STEPS)
            of_column = column // (2 * across)
            pairs = along_h(x_ptr, place, of_column, column - of_column * (2 * across), 0, PAIRS, META)
            first, second = tl.split(tl.reshape(pairs, [CHANNELS, STEPS, 2]))
        sides = along_h(x_ptr, place, i, 2 * j - 1, 0, 1, META) + along_h(x_ptr, place, i, 2 * j + 2, 0, 1, META)
        store_pixels(y_ptr, place, i, j, (first + second) * 3.0 + sides, V, META)
    elif UP:
        for phase in tl.static_range(2):
            middle = along_h(x_ptr, place, i, j, phase, V, META) * 3.0
            first = middle + along_h(x_ptr, place, i, j - 1, phase, 1, META)
            second = middle + along_h(x_ptr, place, i, j + 1, phase, 1, META)
            if LAST:
                store_pixels(y_ptr, place, 2 * i + phase, 2 * j, first, 1, META)
                store_pixels(y_ptr, place, 2 * i + phase, 2 * j + 1, second, 1, META)
            else:
                column = tile * (2 * STEPS) + tl.arange(0, 2 * STEPS)
                of_column = column // (2 * across)
                both = tl.reshape(tl.join(first, second), [CHANNELS, 2 * STEPS])
                row = 2 * of_column + phase
                store_pixels(y_ptr, place, row, column - of_column * (2 * across), both, PAIRS, META)
    else:
        sides = along_h(x_ptr, place, i, j - 1, 0, 1, META) + along_h(x_ptr, place, i, j + 1, 0, 1, META)
        store_pixels(y_ptr, place, i, j, along_h(x_ptr, place, i, j, 0, V, META) * 2.0 + sides, V, META)


def _blur(x: Tensor, up: int, down: int, h: int, w: int, factor: float) -> Tensor:
    """The blur, times a factor that makes up for integer weights, of resolution (h, w): up may be to an odd one."""
    x = dense(x, x)
    y = empty_of(x, h, w)
    if x.numel() == 0:
        return y.zero_()  # not empty itself where x has lost its only row
    n, c = x.shape[:2]
    channels_last = is_channels_last(x)
    rows, across = (triton.cdiv(size, up) for size in (h, w))
    vector, steps = 16 // x.element_size(), power_of_two_from(rows * across)
    tile = (TILE_OF_BOTH if up == down else TILE) * 4 // max(4, x.element_size())
    if channels_last:
        columns = pairs = power_of_two_in(c, vector)
        channels = min(power_of_two_from(c), max(RUN // x.element_size(), tile // steps))
        steps = max(1, min(steps, tile // channels))
    else:
        pairs = power_of_two_in(w if up == 2 else x.shape[3], vector)
        columns = pairs if up == down else max(1, pairs // 2)
        steps = min(steps, tile)
        channels = min(power_of_two_from(c), tile // steps)
    launch(
        wrap_triton(blur2d_kernel),
        (n * triton.cdiv(c, channels) * triton.cdiv(rows * across, steps),),
        x_ptr=x,
        y_ptr=y,
        C=c,
        H=x.shape[2],
        W=x.shape[3],
        out_H=h,
        out_W=w,
        across=across,
        down=rows,
        UP=up == 2,
        DOWN=down == 2,
        LAST=channels_last,
        V=columns,
        PAIRS=pairs,
        CHANNELS=channels,
        STEPS=steps,
        FACTOR=factor,
        num_warps=max(1, min(WARPS, channels * steps // (columns * WARP))),
    )
    return y


def blur2d_fwd(x: Tensor, up: int, down: int) -> Tensor:
    """The forward op of the blur, see pixnorm/ops/blur.py."""
    up, down = int(up), int(down)  # traced with dynamic shapes, they are not
    h, w = x.shape[2:]
    return _blur(x, up, down, h * up // down, w * up // down, 1 / (64 if down == 2 else 16))


def blur2d_bwd(grad_y: Tensor, up: int, down: int, h: int, w: int) -> Tensor:
    """The backward op of the blur, see pixnorm/ops/blur.py: the adjoint is the blur with up and down exchanged."""
    up, down = int(up), int(down)
    return _blur(grad_y, down, up, h, w, 1 / (64 if down == 2 else 16))


blur2d_fwd_triton = op_of_kernels("pixnorm::blur2d_fwd_triton", mutates_args=())(blur2d_fwd)
blur2d_bwd_triton = op_of_kernels("pixnorm::blur2d_bwd_triton", mutates_args=())(blur2d_bwd)
# Shapes, dtypes and strides are those of the native ops.
blur2d_fwd_triton.register_fake(blur2d_fwd_fake)
blur2d_bwd_triton.register_fake(blur2d_bwd_fake)
