r"""Convolutions beside a change of resolution, as the generators and discriminators of GANs have them:

    upsample_conv2d(x) = conv(up(x)) + b,   up: nearest, by 2
    conv_avg_pool2d(x) = pool(conv(x) + b),   pool: the mean of 2x2

Neighbouring taps see copies of one pixel, or add up. So both are one convolution with stride 2 whose k x k kernels are
the sums (means) of neighbouring taps, and one larger: (k + 1)² multiply-adds for four outputs (inputs) in place of
4 k², 2.25 times fewer for k = 3, and no tensor of high resolution between the two. The kernels are ours, the
convolution is PyTorch's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.utils import _pair

from pixnorm.ops._dispatch import IMPLS
from pixnorm.ops.checks import check_image, check_option
from pixnorm.ops.common import onlooker, public, wide

Padding = int | tuple[int, int] | str


def paddings(weight: Tensor, padding: Padding) -> tuple[int, int, int, int]:
    """(left, right, top, bottom), as ``F.pad`` takes them."""
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":  # of an even number, the smaller half comes first
        (top, bottom), (left, right) = (((k - 1) // 2, k // 2) for k in weight.shape[2:])
        return left, right, top, bottom
    vertical, horizontal = _pair(padding)
    return horizontal, horizontal, vertical, vertical


def upsample_conv2d_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding: Padding = 0) -> Tensor:
    """Plain PyTorch: the specification. Arguments as in :func:`upsample_conv2d`."""
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=padding)


def conv_avg_pool2d_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding: Padding = 0) -> Tensor:
    """Plain PyTorch: the specification. Arguments as in :func:`conv_avg_pool2d`."""
    return F.avg_pool2d(F.conv2d(x, weight, bias, padding=padding), 2)


def _sums_of_neighbours(weight: Tensor) -> Tensor:
    """(O, I, kh, kw) to (O, I, kh + 1, kw + 1): of each two rows, and of each two columns."""
    rows = F.pad(weight, (0, 0, 0, 1)) + F.pad(weight, (0, 0, 1, 0))
    return F.pad(rows, (0, 1)) + F.pad(rows, (1, 0))


@public
def upsample_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding: Padding = 0, impl: str = "auto"
) -> Tensor:
    """``F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=padding)``, as one transposed
    convolution with 2.25 times fewer operations for kernels of 3x3.

    On two cores it takes 0.4 to 0.6 of the time, from 64 channels of 64x64 to 128 of 32x32, forward and backward, and
    about 0.9 for 256 channels of 8x8.

    Args:
        x: (N, I, H, W).
        weight: (O, I, kh, kw).
        bias: (O,) or None.
        padding: as in ``F.conv2d``, of the upsampled x.
        impl: ``"reference"`` upsamples and convolves; all others are the transposed convolution.

    Returns:
        (N, O, H', W') in the dtype of ``F.conv2d``, differentiable to any order.

    Raises:
        ValueError: wrong rank or shape, an unknown ``impl``.
    """
    _check(x, weight, impl)
    (kh, kw), (left, right, top, bottom) = weight.shape[2:], paddings(weight, padding)
    plain = impl == "reference" or left != right or top != bottom or top >= kh or left >= kw
    # The legacy ONNX exporter knows no transposed convolution with computed kernels.
    plain |= onlooker() is not None
    # PyTorch's transposed convolution in float16 adds up rounded products on the CPU.
    plain |= x.dtype == torch.float16 and x.device.type == "cpu"
    if plain:
        return upsample_conv2d_reference(x, weight, bias, padding=padding)
    kernels = _sums_of_neighbours(wide(weight).flip(2, 3)).to(weight.dtype).transpose(0, 1)
    return F.conv_transpose2d(x, kernels, bias, stride=2, padding=(kh - 1 - top, kw - 1 - left))


@public
def conv_avg_pool2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding: Padding = 0, impl: str = "auto"
) -> Tensor:
    """``F.avg_pool2d(F.conv2d(x, weight, bias, padding=padding), 2)``, as one convolution of stride 2 with 2.25 times
    fewer operations for kernels of 3x3.

    On two cores it takes 0.4 to 0.6 of the time, from 64 channels of 64x64 to 128 of 32x32, forward and backward, and
    0.7 to 0.9 for 256 channels of 16x16.

    Args:
        x: (N, I, H, W).
        weight: (O, I, kh, kw).
        bias: (O,) or None.
        padding: as in ``F.conv2d``.
        impl: ``"reference"`` convolves and pools; all others are the convolution of stride 2.

    Returns:
        (N, O, H' // 2, W' // 2), where H' x W' is the convolution's size, in the dtype of ``F.conv2d``; differentiable
        to any order.

    Raises:
        ValueError: wrong rank or shape, an unknown ``impl``.
    """
    _check(x, weight, impl)
    left, right, top, bottom = paddings(weight, padding)
    if impl == "reference" or left != right or top != bottom:
        return conv_avg_pool2d_reference(x, weight, bias, padding=padding)
    kernels = (_sums_of_neighbours(wide(weight)) / 4).to(weight.dtype)
    return F.conv2d(x, kernels, bias, stride=2, padding=(top, left))


def _check(x: Tensor, weight: Tensor, impl: str) -> None:
    check_option("impl", impl, IMPLS)
    check_image(x)
    if weight.dim() != 4 or weight.shape[1] != x.shape[1]:
        wanted = f"(O, {x.shape[1]}, kh, kw) for x of shape {tuple(x.shape)}"
        raise ValueError(f"weight must have shape {wanted}, got {tuple(weight.shape)}")
