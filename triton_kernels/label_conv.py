"""The convolution of a label map on any GPU that Triton reaches: ``pixnorm::label_conv_fwd_triton`` and
``pixnorm::label_conv_grad_triton``, with the schemas of ``label_conv_fwd`` and ``label_conv_grad``
(pixnorm/ops/label_conv.py).

Forward gathers. A pixel's outputs are the sum of k² rows of a table [tap][label][O], which is the weight with its
output channels innermost: a row moves as vectors of up to 16 bytes. Labels outside the image, ignored or out of range
have no row.

The gradient of the weight multiplies dy by a one-hot matrix for each tap, which exists on the chip alone. Tensor cores
take 0 and 1 as they are, and a float32 as three bfloat16 pieces that add up to it, so only sums are rounded. A row of
ones beside the labels gives the gradient of the bias. Parts of the pixels have sums of their own, which are added up in
a fixed order: there are no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixnorm.ops.common import dense, is_channels_last
from pixnorm.ops.label_conv import label_conv_fwd_fake, label_conv_grad_fake
from pixnorm.triton_kernels.common import (
    INTERPRETED,
    accumulator,
    activated,
    activation_gradient,
    launch,
    op_of_kernels,
    power_of_two_from,
    power_of_two_in,
    to_accumulator,
    wrap_triton,
)

# Bytes of a row of the table, or of dy, in a tile; pixels of a tile of y.
RUN, PIXELS, WARPS = 128, 64, 4
# Labels and channels of a tile of the gradient, at most; it has sums of one row of taps, 48 registers for three.
ROWS, COLUMNS, ROWS_OF_DOUBLE, COLUMNS_OF_DOUBLE = 32, 64, 16, 32
LEAST = 16  # of tl.dot
# Programs for the gradient: four per SM of an H200. The same number on every GPU, so that the order of sums does not
# depend on it.
PROGRAMS = 528
# One binary serves all of them.
NOT_SPECIALISED = ["classes", "ignore", "H", "W", "tiles", "each"]


@triton.jit
def labels_at(labels_ptr, n, pixel, h, w, H, W, classes, ignore):
    """The labels at (h, w), which ``pixel`` counts; -1 outside the image, and for those that add nothing."""
    inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
    label = tl.load(labels_ptr + (n * (H * W) + pixel), mask=inside, other=-1)
    return tl.where((label >= 0) & (label < classes) & (label != ignore), label, -1).to(tl.int32)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def label_conv_fwd_kernel(
    labels_ptr, table_ptr, bias_ptr, y_ptr, classes, out, H, W, pixels, ignore,
    K: tl.constexpr, BIAS: tl.constexpr, ACTIVATED: tl.constexpr, SLOPE: tl.constexpr,
    V: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """y = act(Σ_t table[t, label of p + t] + bias): a tile of pixels of one sample and channels."""
    blocks = tl.cdiv(out, CHANNELS)
    of_sample = tl.cdiv(pixels, PIXELS)
    tile = tl.program_id(0) // blocks
    c = (tl.program_id(0) - tile * blocks) * CHANNELS
    n = (tile // of_sample).to(tl.int64)
    pixel = (tile % of_sample) * PIXELS + tl.arange(0, PIXELS)
    h = pixel // W
    w = pixel - h * W
    o_channel = tl.arange(0, CHANNELS)
    # Rounded to vectors, which changes nothing but tells the compiler that masks are of whole vectors.
    in_row = o_channel < (out // V) * V - c
    total = to_accumulator(tl.zeros([PIXELS, CHANNELS], dtype=tl.float32), table_ptr)
    if BIAS:
        total += to_accumulator(tl.load(bias_ptr + c + o_channel, mask=in_row, other=0.0), bias_ptr)[None, :]
    for i in range(K):
        for j in tl.static_range(K):
            at = pixel + (i - K // 2) * W + (j - K // 2)
            label = labels_at(labels_ptr, n, at, h + (i - K // 2), w + (j - K // 2), H, W, classes, ignore)
            row = tl.multiple_of(((i * K + j) * classes + label) * out + c, V)
            exists = (label >= 0)[:, None] & in_row[None, :]
            value = tl.load(table_ptr + (row[:, None] + o_channel[None, :]), mask=exists, other=0.0)
            total += to_accumulator(value, table_ptr)
    if ACTIVATED:
        total = activated(total, SLOPE)
    start = (n * out + c + o_channel) * pixels
    exists = (c + o_channel < out)[:, None] & (pixel < pixels)[None, :]
    tl.store(y_ptr + (start[:, None] + pixel[None, :]), tl.trans(total).to(y_ptr.dtype.element_ty), mask=exists)


@triton.jit
def features_at(pointer, n, c, first, out, pixels, LAST: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr):
    """A (pixels, channels) tile of one sample, 0 where there is none."""
    pixel = first + tl.arange(0, PIXELS)
    channel = c + tl.arange(0, CHANNELS)
    if LAST:
        offset = (n * pixels + pixel)[:, None] * out + channel[None, :]
    else:
        offset = (n * out + channel)[None, :] * pixels + pixel[:, None]
    return tl.load(pointer + offset, mask=(pixel < pixels)[:, None] & (channel < out)[None, :], other=0.0)


@triton.jit
def add_product(total, chosen, value, WIDE: tl.constexpr):
    """total += chosen value, exact but for the sums; with WIDE in float32 (for the interpreter)."""
    PIECES: tl.constexpr = 3 if value.dtype == tl.float32 else 1
    for _ in tl.static_range(PIECES):
        piece = value
        if PIECES > 1:
            piece = value.to(tl.bfloat16)
            value -= piece.to(tl.float32)
        if WIDE:
            piece = piece.to(tl.float32)
        left = tl.where(chosen, tl.full([], 1.0, piece.dtype), tl.full([], 0.0, piece.dtype))
        total = tl.dot(left, piece, total, input_precision="ieee", out_dtype=total.dtype)
    return total


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def label_conv_grad_kernel(
    dy_ptr, y_ptr, labels_ptr, sums_ptr, classes, out, H, W, pixels, ignore, tiles, each,
    K: tl.constexpr, BIAS: tl.constexpr, ACTIVATED: tl.constexpr, SLOPE: tl.constexpr,
    LAST: tl.constexpr, WIDE: tl.constexpr, LABELS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Sums [part][tap][label][O] of dy over the pixels with that label at that tap.

    A program has a row of taps, a block of labels and one of channels. With BIAS every pixel has one label more.
    """
    blocks = tl.cdiv(out, CHANNELS)
    c = tl.program_id(0) % blocks * CHANNELS
    tap_row = tl.program_id(0) // blocks % K
    o_label = tl.program_id(0) // (blocks * K) * LABELS + tl.arange(0, LABELS)
    part = tl.program_id(1)
    of_sample = tl.cdiv(pixels, PIXELS)
    zero = tl.zeros([LABELS, CHANNELS], dtype=sums_ptr.dtype.element_ty)
    totals = ()
    for _ in tl.static_range(K):
        totals = totals + (zero,)
    for tile in range(part * each, tl.minimum(part * each + each, tiles)):
        n = (tile // of_sample).to(tl.int64)
        first = (tile % of_sample) * PIXELS
        d = features_at(dy_ptr, n, c, first, out, pixels, LAST, CHANNELS, PIXELS)
        if ACTIVATED:
            y = features_at(y_ptr, n, c, first, out, pixels, False, CHANNELS, PIXELS)
            d = activation_gradient(y, d, SLOPE)
        pixel = first + tl.arange(0, PIXELS)
        h = pixel // W
        w = pixel - h * W
        h += tap_row - K // 2
        added = ()
        for j in tl.static_range(K):
            dw = j - K // 2
            label = labels_at(labels_ptr, n, h * W + w + dw, h, w + dw, H, W, classes, ignore)
            chosen = label[None, :] == o_label[:, None]
            if BIAS:
                chosen = chosen | (o_label == classes)[:, None]
            added = added + (add_product(totals[j], chosen, d, WIDE),)
        totals = added
    channel = c + tl.arange(0, CHANNELS)
    rows = classes + BIAS
    exists = (o_label < rows)[:, None] & (channel < out)[None, :]
    for j in tl.static_range(K):
        row = ((part.to(tl.int64) * K + tap_row) * K + j) * rows + o_label
        tl.store(sums_ptr + (row[:, None] * out + channel[None, :]), totals[j], mask=exists)


def label_conv_fwd(
    labels: Tensor, weight: Tensor, bias: Tensor | None, ignore: int, negative_slope: float | None
) -> Tensor:
    """The forward op of label convolution, see pixnorm/ops/label_conv.py."""
    n, h, w = labels.shape
    out, classes, k, _ = weight.shape
    y = torch.empty((n, out, h, w), dtype=weight.dtype, device=weight.device)
    if y.numel() == 0:
        return y
    channels = min(power_of_two_from(out), RUN // weight.element_size())
    pixels = min(power_of_two_from(h * w), PIXELS)
    launch(
        wrap_triton(label_conv_fwd_kernel),
        (n * triton.cdiv(h * w, pixels) * triton.cdiv(out, channels),),
        labels_ptr=labels.contiguous(),
        table_ptr=weight.permute(2, 3, 1, 0).contiguous(),
        bias_ptr=weight if bias is None else bias.contiguous(),  # not read
        y_ptr=y,
        classes=classes,
        out=out,
        H=h,
        W=w,
        pixels=h * w,
        ignore=ignore,
        K=k,
        BIAS=bias is not None,
        ACTIVATED=negative_slope is not None,
        SLOPE=negative_slope or 0.0,
        V=power_of_two_in(out, 16 // weight.element_size()),
        CHANNELS=channels,
        PIXELS=pixels,
        num_warps=WARPS,
    )
    return y


def label_conv_grad(
    grad_y: Tensor,
    labels: Tensor,
    weight: Tensor,
    y: Tensor | None,
    has_bias: bool,
    ignore: int,
    negative_slope: float | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of the weight and the bias, see pixnorm/ops/label_conv.py."""
    n, h, w = labels.shape
    out, classes, k, _ = weight.shape
    if grad_y.numel() == 0:
        return weight.new_zeros(weight.shape), weight.new_zeros((out if has_bias else 0,))
    grad_y = dense(grad_y, grad_y)
    double = weight.dtype == torch.float64
    rows, channels = (ROWS_OF_DOUBLE, COLUMNS_OF_DOUBLE) if double else (ROWS, COLUMNS)
    table_rows = classes + 1 if has_bias else classes  # not a sum with a bool, which symbolic sizes do not take
    rows = min(rows, max(LEAST, power_of_two_from(table_rows)))
    channels = min(channels, max(LEAST, power_of_two_from(out)))
    pixels = min(RUN // weight.element_size(), max(LEAST, power_of_two_from(h * w)))
    blocks = triton.cdiv(out, channels) * triton.cdiv(table_rows, rows) * k
    tiles = n * triton.cdiv(h * w, pixels)
    each = triton.cdiv(tiles, max(1, PROGRAMS // blocks))
    parts = triton.cdiv(tiles, each)
    sums = torch.empty((parts, k * k, table_rows, out), dtype=accumulator(weight), device=weight.device)
    launch(
        wrap_triton(label_conv_grad_kernel),
        (blocks, parts),
        dy_ptr=grad_y,
        y_ptr=grad_y if y is None else y.contiguous(),  # not read
        labels_ptr=labels.contiguous(),
        sums_ptr=sums,
        classes=classes,
        out=out,
        H=h,
        W=w,
        pixels=h * w,
        ignore=ignore,
        tiles=tiles,
        each=each,
        K=k,
        BIAS=has_bias,
        ACTIVATED=negative_slope is not None,
        SLOPE=negative_slope or 0.0,
        LAST=is_channels_last(grad_y),
        WIDE=INTERPRETED and weight.dtype != torch.float64,  # the interpreter's bfloat16 products are wrong
        LABELS=rows,
        CHANNELS=channels,
        PIXELS=pixels,
        num_warps=WARPS,
    )
    total = sums.sum(0).to(weight.dtype)
    grad_weight = total[:, :classes].permute(2, 1, 0).reshape(weight.shape).contiguous()
    return grad_weight, total[0, classes].clone() if has_bias else weight.new_empty((0,))


label_conv_fwd_triton = op_of_kernels("pixnorm::label_conv_fwd_triton", mutates_args=())(label_conv_fwd)
label_conv_grad_triton = op_of_kernels("pixnorm::label_conv_grad_triton", mutates_args=())(label_conv_grad)
# Shapes, dtypes and strides are those of the native ops.
label_conv_fwd_triton.register_fake(label_conv_fwd_fake)
label_conv_grad_triton.register_fake(label_conv_grad_fake)
