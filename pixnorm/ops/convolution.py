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


def sums_of_neighbours(x: Tensor) -> Tensor:
    """The sums of all 2x2 pixels that are beside each other: (N, C, H - 1, W - 1)."""
    x = x[:, :, 1:] + x[:, :, :-1]
    return x[..., 1:] + x[..., :-1]


def passes_are_dear(x: Tensor) -> bool:
    """Whether a pass over outputs costs more than the multiply-adds that it saves: on GPUs."""
    return x.device.type != "cpu"


def upsampled_convolution(x: Tensor, weight: Tensor, padding: Padding, impl: str = "auto") -> Tensor:
    """``F.conv2d`` of x upsampled by 2 (nearest). With ``impl="reference"`` just that, otherwise in fewer operations.

    The copies of a pixel are what sums of neighbours make of pixels between zeros, and sums commute with a convolution.
    So it is a transposed convolution of x with stride 2, followed by sums: k² / 4 multiply-adds per output in place of
    k², and no upsampled tensor. On GPUs the kernels are summed in the place of the outputs, and are one larger:
    (k + 1)² / 4.

    Milliseconds on one core with AVX-512, float32, N = 4, 3x3, forward and backward, in NCHW (channels_last):

        channels, size  upsampled   larger kernels  sums
        512, 4x4                    68              17
        512, 8x8        72          85 (125)        31 (47)
        128, 32x32      101         49 (37)         34 (36)
    """
    (kh, kw), (left, right, top, bottom) = weight.shape[2:], paddings(weight, padding)
    symmetric = left == right and top == bottom and top < kh and left < kw
    # The legacy ONNX exporter knows no transposed convolution with computed kernels.
    if impl == "reference" or not symmetric or onlooker() is not None:
        return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=padding)
    flipped = weight.flip(2, 3)
    if not passes_are_dear(x) and top < kh - 1 and left < kw - 1:
        cropped = kh - 2 - top, kw - 2 - left
        return sums_of_neighbours(F.conv_transpose2d(x, flipped.transpose(0, 1), stride=2, padding=cropped))
    kernels = sums_of_neighbours(F.pad(flipped, (1, 1, 1, 1)))
    return F.conv_transpose2d(x, kernels.transpose(0, 1), stride=2, padding=(kh - 1 - top, kw - 1 - left))


def downsampled_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, impl: str = "auto") -> Tensor:
    """``F.avg_pool2d(F.conv2d(x, weight, bias, padding="same"), 2)`` for odd kernels. With ``impl="reference"`` just
    that, otherwise in fewer operations.

    The mean of 2x2 outputs is a convolution with stride 2 of means of 2x2 inputs: k² multiply-adds per output in place
    of 4 k², and no tensor of its larger size. On GPUs the means are of the kernels' taps, which become one larger: see
    :func:`upsampled_convolution`. In the units of its table, from 128 channels of 64x64: 79, with larger kernels 39,
    with sums 31; from 512 of 16x16: 76, 72, 28.
    """
    if impl == "reference":
        return F.avg_pool2d(F.conv2d(x, weight, bias, padding="same"), 2)
    kh, kw = weight.shape[2:]
    weight = weight / 4
    if passes_are_dear(x):
        return F.conv2d(x, sums_of_neighbours(F.pad(weight, (1, 1, 1, 1))), bias, stride=2, padding=(kh // 2, kw // 2))
    padded = F.pad(x, (kw // 2, kw // 2, kh // 2, kh // 2))
    return F.conv2d(sums_of_neighbours(padded), weight, bias, stride=2)
