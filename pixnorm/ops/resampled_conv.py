r"""Convolutions beside a change of resolution, as the generators and discriminators of GANs have them:

    upsample_conv2d(x) = conv(up(x)) + b,   up: nearest, by 2
    conv_avg_pool2d(x) = pool(conv(x) + b),   pool: the mean of 2x2

The copies of a pixel are sums of 2x2 neighbours in an image of that pixel between zeros, and those sums commute with
the convolution: up first, then sums, or sums first, then every second pixel. So both are one convolution with stride 2
(PyTorch's; the first is transposed) in place of one at high resolution, and sums of neighbours:

- of the pixels: k² multiply-adds for four outputs (or inputs) in place of 4 k²;
- of the taps of its kernels, which become one larger: (k + 1)² multiply-adds, but no pass over pixels.

On a CPU products are dear, so the sums are of pixels; on a GPU passes are, and in half precision sums of pixels would
be rounded, so they are of taps. Milliseconds on one core with AVX-512 in float32, forward and backward, batches of 4,
3x3 kernels, NCHW:

    channels, size of the smaller   plain   sums of taps    sums of pixels
    up, 512, 8x8                    72      85              31
    up, 128, 32x32                  101     49              34
    pool, 128, 32x32                79      39              31
    pool, 512, 8x8                  76      72              28

With few channels on a CPU the passes cost more than the products that they save: there ``auto`` convolves plainly.
Speed-ups on two cores, forward and backward, float32, batches of 32, smaller images of 4x4, 8x8 and 16x16:

    channels    up, NCHW            up, channels_last   pool, NCHW          pool, channels_last
    16          0.73  0.84  1.06    0.67  0.50  0.68    0.84  1.16  1.52    0.85  0.64  0.80
    32          0.85  1.12  1.29    0.73  0.78  0.76    1.07  1.63  1.76    1.03  1.27  0.99
    64          1.18  1.46  1.70    1.03  1.29  1.11    1.43  1.80  2.05    1.38  1.68  1.50
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pixnorm.ops._dispatch import IMPLS
from pixnorm.ops.checks import check_image, check_option
from pixnorm.ops.common import HALF, is_channels_last, onlooker, public, under_autocast, wide
from pixnorm.ops.convolution import Padding, paddings


def upsample_conv2d_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding: Padding = 0) -> Tensor:
    """Plain PyTorch: the specification. Arguments as in :func:`upsample_conv2d`."""
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=padding)


def conv_avg_pool2d_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding: Padding = 0) -> Tensor:
    """Plain PyTorch: the specification. Arguments as in :func:`conv_avg_pool2d`."""
    return F.avg_pool2d(F.conv2d(x, weight, bias, padding=padding), 2)


def sums_of_neighbours(x: Tensor) -> Tensor:
    """The sums of 2x2 that are beside each other: (A, B, H, W) to (A, B, H - 1, W - 1)."""
    x = x[:, :, 1:] + x[:, :, :-1]
    return x[..., 1:] + x[..., :-1]


def _sums_of_taps(weight: Tensor) -> Tensor:
    """Kernels that are one larger, rounded once."""
    return sums_of_neighbours(F.pad(wide(weight), (1, 1, 1, 1))).to(weight.dtype)


def sums_pixels(x: Tensor) -> bool:
    """Whether the sums are of pixels, not of taps."""
    return x.device.type == "cpu" and x.dtype not in HALF and not under_autocast(x.device)


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether the sums cost less than they save: elsewhere than on a CPU, or from 24 channels on (48 in channels_last),
    as a harmonic mean of input and output: products are of both, passes of each."""
    made, taken = weight.shape[:2]
    channels = 48 if is_channels_last(x) else 24
    return x.device.type != "cpu" or 2 * made * taken >= channels * (made + taken)


@public
def upsample_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding: Padding = 0, impl: str = "auto"
) -> Tensor:
    """``F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=padding)``, as a transposed
    convolution at low resolution, with 4 times fewer multiply-adds on a CPU, and 2.25 times (for kernels of 3x3) else.

    Args:
        x: (N, I, H, W).
        weight: (O, I, kh, kw).
        bias: (O,) or None.
        padding: as in ``F.conv2d``, of the upsampled x.
        impl: ``"reference"`` upsamples and convolves, as does ``"auto"`` on a CPU with few channels; all others are the
            transposed convolution.

    Returns:
        (N, O, H', W') in the dtype of ``F.conv2d``, differentiable to any order.

    Raises:
        ValueError: wrong rank or shape, an unknown ``impl``.
    """
    _check(x, weight, impl)
    (kh, kw), (left, right, top, bottom) = weight.shape[2:], paddings(weight, padding)
    # The legacy ONNX exporter knows no transposed convolution with computed kernels; in float16 on the CPU PyTorch's
    # adds up rounded products.
    refused = onlooker() is not None or (x.dtype == torch.float16 and x.device.type == "cpu")
    # A transposed convolution takes a negative padding, and makes nothing of an image that is smaller than the kernels;
    # the convolution raises an error.
    fits = 0 <= top < kh and 0 <= left < kw and 2 * (x.shape[2] + top) >= kh and 2 * (x.shape[3] + left) >= kw
    plain = impl == "reference" or (impl == "auto" and not pays(x, weight))
    if plain or refused or left != right or top != bottom or not fits:
        return upsample_conv2d_reference(x, weight, bias, padding=padding)
    flipped = weight.flip(2, 3)
    if sums_pixels(x) and top < kh - 1 and left < kw - 1:
        cropped = kh - 2 - top, kw - 2 - left
        bias = None if bias is None else bias / 4
        return sums_of_neighbours(F.conv_transpose2d(x, flipped.transpose(0, 1), bias, stride=2, padding=cropped))
    kernels = _sums_of_taps(flipped).transpose(0, 1)
    return F.conv_transpose2d(x, kernels, bias, stride=2, padding=(kh - 1 - top, kw - 1 - left))


@public
def conv_avg_pool2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding: Padding = 0, impl: str = "auto"
) -> Tensor:
    """``F.avg_pool2d(F.conv2d(x, weight, bias, padding=padding), 2)``, as a convolution of stride 2, with 4 times fewer
    multiply-adds on a CPU, and 2.25 times (for kernels of 3x3) else.

    Args:
        x: (N, I, H, W).
        weight: (O, I, kh, kw).
        bias: (O,) or None.
        padding: as in ``F.conv2d``.
        impl: ``"reference"`` convolves and pools, as does ``"auto"`` on a CPU with few channels; all others are the
            convolution of stride 2.

    Returns:
        (N, O, H' // 2, W' // 2), where H' x W' is the convolution's size, in the dtype of ``F.conv2d``; differentiable
        to any order.

    Raises:
        ValueError: wrong rank or shape, an unknown ``impl``.
    """
    _check(x, weight, impl)
    left, right, top, bottom = paddings(weight, padding)
    plain = impl == "reference" or (impl == "auto" and not pays(x, weight))
    if plain or left != right or top != bottom or min(top, left) < 0:  # F.pad would crop
        return conv_avg_pool2d_reference(x, weight, bias, padding=padding)
    if sums_pixels(x):
        return F.conv2d(sums_of_neighbours(F.pad(x, (left, right, top, bottom))), weight / 4, bias, stride=2)
    return F.conv2d(x, _sums_of_taps(weight) / 4, bias, stride=2, padding=(top, left))


def _check(x: Tensor, weight: Tensor, impl: str) -> None:
    check_option("impl", impl, IMPLS)
    check_image(x)
    if weight.dim() != 4 or weight.shape[1] != x.shape[1]:
        wanted = f"(O, {x.shape[1]}, kh, kw) for x of shape {tuple(x.shape)}"
        raise ValueError(f"weight must have shape {wanted}, got {tuple(weight.shape)}")
