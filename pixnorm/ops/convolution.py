"""Convolutions with the geometries that the networks' layers need, of PyTorch's own operations."""

import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.utils import _pair

from pixnorm.ops.common import dense

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
Padding = int | tuple[int, int] | str


def paddings(weight: Tensor, padding: Padding) -> tuple[int, int, int, int]:
    """(left, right, top, bottom), as ``F.pad`` takes them."""
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":  # of an even number, the smaller half comes first
        (top, bottom), (left, right) = (((k - 1) // 2, k // 2) for k in weight.shape[2:])
        return left, right, top, bottom
    if isinstance(padding, str) or len(_pair(padding)) != 2:
        raise ValueError(f"padding must be one or two numbers, 'same' or 'valid', got {padding!r}")
    vertical, horizontal = _pair(padding)
    return horizontal, horizontal, vertical, vertical


def convolution(x: Tensor, weight: Tensor, padding: Padding, padding_mode: str) -> Tensor:
    """As that of ``nn.Conv2d``."""
    if padding_mode == "zeros":
        return F.conv2d(x, weight, padding=padding)
    padded = F.pad(x, paddings(weight, padding), mode=padding_mode)
    return F.conv2d(dense(padded, x), weight)  # circular padding forgets the layout
