"""Convolutions with the geometries that the networks' layers need, of PyTorch's own operations."""

import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.utils import _pair

from pixnorm.ops.common import dense, onlooker

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
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


def convolution(x: Tensor, weight: Tensor, padding: Padding, padding_mode: str) -> Tensor:
    """As that of ``nn.Conv2d``."""
    if padding_mode == "zeros":
        return F.conv2d(x, weight, padding=padding)
    padded = F.pad(x, paddings(weight, padding), mode=padding_mode)
    return F.conv2d(dense(padded, x), weight)  # circular padding forgets the layout


def upsampled_convolution(x: Tensor, weight: Tensor, padding: Padding) -> Tensor:
    """``F.conv2d`` of x upsampled by 2 (nearest).

    Neighbouring taps see copies of one pixel. So it is a transposed convolution of x, with stride 2, whose kernels are
    the sums of neighbouring taps and one larger: (k + 1)² / 4 multiply-adds per output in place of k², and no upsampled
    tensor. On two cores 3x3 kernels take 0.5 to 0.6 of the time from 64 channels of 64x64 to 256 of 16x16, forward and
    backward, and 0.9 for 256 of 8x8.
    """
    (kh, kw), (left, right, top, bottom) = weight.shape[2:], paddings(weight, padding)
    # The legacy ONNX exporter knows no transposed convolution with computed kernels.
    if left != right or top != bottom or top >= kh or left >= kw or onlooker() is not None:
        return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=padding)
    flipped = weight.flip(2, 3)
    rows = F.pad(flipped, (0, 0, 0, 1)) + F.pad(flipped, (0, 0, 1, 0))
    kernels = F.pad(rows, (0, 1)) + F.pad(rows, (1, 0))
    return F.conv_transpose2d(x, kernels.transpose(0, 1), stride=2, padding=(kh - 1 - top, kw - 1 - left))


def downsampled_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.avg_pool2d(F.conv2d(x, weight, bias, padding="same"), 2)`` for odd kernels.

    The mean of 2x2 outputs is a convolution with stride 2, whose kernels are means of neighbouring taps and one larger:
    (k + 1)² multiply-adds per output in place of 4 k², and no tensor of the larger size.
    """
    kh, kw = weight.shape[2:]
    rows = F.pad(weight, (0, 0, 0, 1)) + F.pad(weight, (0, 0, 1, 0))
    kernels = (F.pad(rows, (0, 1)) + F.pad(rows, (1, 0))) / 4
    return F.conv2d(x, kernels, bias, stride=2, padding=(kh // 2, kw // 2))
