r"""The binomial filter before and after StyleGAN's changes of resolution (arXiv 1812.04948, section 2; 1904.11486):

    y = (x↑ ⊛ k)↓,    k = [1, 2, 1] ⊗ [1, 2, 1] / 16

of each channel, with zero padding of 1. ↑ by 2 repeats each pixel (nearest upsampling), and with the filter is bilinear
upsampling but for the zeros beyond the border; ↓ by 2 is the mean of 2x2 pixels. Both are separable into few taps,

    ↑: y[2i] = (x[i-1] + 3 x[i]) / 4,  y[2i+1] = (3 x[i] + x[i+1]) / 4
    ↓: y[i] = (x[2i-1] + 3 x[2i] + 3 x[2i+1] + x[2i+2]) / 8

and the filter is its own adjoint, and that of ↑ is 4 ↓. So derivatives of all orders are these kernels.
"""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from pixnorm.ops._dispatch import choose, define_op
from pixnorm.ops.checks import check_image, check_option
from pixnorm.ops.common import (
    beyond_32_bits,
    memory_format_of,
    onlooker,
    public,
    triton_ops,
    without_autocast,
)


def blur2d_reference(x: Tensor, *, up: int = 1, down: int = 1) -> Tensor:
    """The blur in plain PyTorch: the specification. Arguments as in :func:`blur2d`."""
    if up == 2:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    taps = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype, device=x.device)
    weight = (taps[:, None] * taps / 16).expand(x.shape[1], 1, 3, 3)
    y = F.conv2d(x, weight, padding=1, groups=x.shape[1])
    return F.avg_pool2d(y, 2) if down == 2 else y


def empty_of(x: Tensor, h: int, w: int) -> Tensor:
    """An empty tensor in x's dtype and layout, of another resolution."""
    return torch.empty((*x.shape[:2], h, w), dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))


def blur2d_fwd_fake(x, up, down):
    h, w = x.shape[2:]
    return empty_of(x, h * up // down, w * up // down)


# `h` and `w` are those of x: with down = 2 the last row or column of an odd size is dropped.
def blur2d_bwd_fake(grad_y, up, down, h, w):
    return empty_of(grad_y, h, w)


# Counted as the convolution that they replace.
blur2d_fwd = define_op(
    "blur2d_fwd(Tensor x, int up, int down) -> Tensor y",
    blur2d_fwd_fake,
    native=("cpu",),
    flops=lambda x, up, down, **kwargs: 2 * 9 * prod(x) * up**2,
    triton="blur",
)
blur2d_bwd = define_op(
    "blur2d_bwd(Tensor grad_y, int up, int down, SymInt h, SymInt w) -> Tensor grad_x",
    blur2d_bwd_fake,
    native=("cpu",),
    flops=lambda grad_y, up, down, h, w, **kwargs: 2 * 9 * prod(grad_y[:2]) * h * w * up**2,
    triton="blur",
)


def ops_of(impl: str):
    """The forward and the backward op of an impl."""
    return triton_ops("blur2d") if impl == "triton" else (blur2d_fwd, blur2d_bwd)


class Blur2dFunction(torch.autograd.Function):
    """The blur; or given the size (h, w) of x its adjoint. Each is the other's backward. Saves nothing."""

    @staticmethod
    def forward(ctx, impl, up, down, size, x):
        ctx.options = impl, up, down
        ctx.adjoint = x.shape[2:] if size is None else None
        return _call(impl, up, down, size, x)

    @staticmethod
    def backward(ctx, grad):
        impl, up, down = ctx.options
        if onlooker() is not None:
            grad = _in_pytorch(up, down, ctx.adjoint, grad)
        else:
            call = Blur2dFunction.apply if torch.is_grad_enabled() else _call
            grad = call(impl, up, down, ctx.adjoint, grad)
        return None, None, None, None, grad


def _call(impl, up, down, size, x):
    """The op that Blur2dFunction is."""
    forward, backward = ops_of(impl)
    return forward(x, up, down) if size is None else backward(x, up, down, *size)


def _in_pytorch(up, down, size, x):
    """The same in PyTorch's own operations; autocast changes nothing inside."""
    with without_autocast(x.device):
        if size is None:
            return blur2d_reference(x, up=up, down=down)
        if down == 2:
            h, w = size
            x = F.pad(F.interpolate(x / 4, scale_factor=2, mode="nearest"), (0, w % 2, 0, h % 2))
        return up**2 * blur2d_reference(x, down=up)


@public
def blur2d(x: Tensor, *, up: int = 1, down: int = 1, impl: str = "auto") -> Tensor:
    """Blur each channel with the binomial filter, after upsampling or before downsampling by 2, in one pass.

    Args:
        x: (N, C, H, W), floating point, contiguous or channels_last (other strides cost one copy).
        up: 1, or 2 for nearest upsampling before the filter: together bilinear upsampling, but with zeros beyond the
            border.
        down: 1, or 2 for average pooling of 2x2 after the filter; it drops the last row or column of an odd size.
        impl: ``"auto"``, ``"native"`` (CPU), ``"triton"`` (GPUs) or ``"reference"`` (plain PyTorch).

    Returns:
        (N, C, H * up // down, W * up // down) in x's dtype and layout.

    Sums are float32 for float16 and bfloat16; autocast changes nothing here. Nothing is saved for backward, and
    derivatives of all orders are kernels.

    Raises:
        ValueError: wrong rank or value of an option; ``up`` and ``down`` are both 2; with ``down`` = 2, H or W is 1.
        TypeError: x is not floating point.
        RuntimeError: an ``impl`` that cannot run here.
    """
    check_image(x)
    check_option("up", up, (1, 2))
    check_option("down", down, (1, 2))
    if up == 2 and down == 2:
        raise ValueError("up and down must not both be 2")
    if down == 2 and (x.shape[2] < 2 or x.shape[3] < 2):
        raise ValueError(f"down=2 needs at least 2x2 pixels, got input of shape {tuple(x.shape)}")
    chosen = choose("blur2d", impl, x.device, {"triton": beyond_32_bits(x, up)})
    if chosen == "reference":
        return _in_pytorch(up, down, None, x)
    if torch.is_grad_enabled() and x.requires_grad:
        return Blur2dFunction.apply(chosen, up, down, None, x)
    return _call(chosen, up, down, None, x)
