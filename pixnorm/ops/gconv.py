r"""GConv, eq. 5-8 of "Generative Convolution Layer for Image Generation" (arXiv 2111.15171): convolution with
per-sample kernels that depend on a latent vector and on the input.

    S = sigmoid([mean(x), z] W_s)                   mean over the pixels of x, [,] concatenation   (eq. 5)
    K̂ = K diag(S) W_L                               kernels scaled, then mixed                     (eq. 6)
    Y = X * K + X * K̂ = U + (U · S) W_L,   U = X * K                                             (eq. 8)

Here W_sᵀ is `scale_weight` and W_Lᵀ `mix_weight`, as in PyTorch's linear layers. The convolution is PyTorch's. The step
after it, (U, S) -> Y, is the op `gconv_mix`, which needs no tensor of the size of U but U:

    Y = (I + W diag(S)) U                                      W = mix_weight, one product per sample
    dU = (I + W diag(S))ᵀ dY,   G = dY Uᵀ,   dW = Σ G diag(S),   dS_i = Σ_j W_ji G_ji

or, with too few pixels to amortise an n×n weight per sample, with H = Wᵀ dY,

    Y = U + W (S · U),   dU = dY + S · H,   dS = Σ U · H,   dW = dY (S · U)ᵀ
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.utils import _pair

from pixnorm.ops._dispatch import choose, define_op
from pixnorm.ops.checks import check_device, check_floating, check_option, check_shape
from pixnorm.ops.common import (
    FLOAT,
    HALF,
    convolutions_allow_tf32,
    dense,
    dense_like,
    exporting,
    is_channels_last,
    like_parameter,
    products_allow_tf32,
    public,
    reference_grads,
    through_reference,
    triton_ops,
    under_autocast,
    without_autocast,
)
from pixnorm.ops.convolution import PADDING_MODES
from pixnorm.ops.resampled_conv import upsample_conv2d


def gconv_mix_reference(u: Tensor, s: Tensor, mix_weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The mixing in plain PyTorch: the specification. Arguments as in :func:`gconv_mix`, u with pixels."""
    return u + F.conv2d(u * s[:, :, None, None], mix_weight[:, :, None, None], bias)


def gconv2d_reference(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    scale_weight: Tensor,
    mix_weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    padding_mode: str = "zeros",
    upsample: int = 1,
) -> Tensor:
    """GConv in plain PyTorch: the specification. Any device, any order of gradient. Arguments as in :func:`gconv2d`."""
    if upsample == 2:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    s = torch.sigmoid(F.linear(torch.cat([x.mean((2, 3)), z], dim=1), scale_weight))
    u = _convolved(x, weight, stride, padding, dilation, padding_mode)
    return gconv_mix_reference(u, s, mix_weight, bias)


def check_upsample(upsample: int, stride, dilation, padding_mode: str) -> None:
    """Upsampling goes with a plain convolution."""
    check_option("upsample", upsample, (1, 2))
    if upsample == 2 and (_pair(stride) != (1, 1) or _pair(dilation) != (1, 1) or padding_mode != "zeros"):
        given = f"stride={stride}, dilation={dilation}, padding_mode={padding_mode!r}"
        raise ValueError(f"upsample=2 is for stride 1, dilation 1 and padding_mode='zeros', got {given}")


def _convolved(x: Tensor, weight: Tensor, stride, padding, dilation, padding_mode: str) -> Tensor:
    """The forward of ``nn.Conv2d``, without a bias."""
    if padding_mode == "zeros":
        return F.conv2d(x, weight, None, stride, padding, dilation)
    borders = []  # before and after, last dimension first
    paddings = (padding, padding) if isinstance(padding, str) else _pair(padding)
    for k, d, p in zip(weight.shape[:1:-1], _pair(dilation)[::-1], paddings[::-1], strict=True):
        total = d * (k - 1)
        borders += [total // 2, total - total // 2] if p == "same" else [0, 0] if p == "valid" else [p, p]
    return F.conv2d(F.pad(x, borders, padding_mode), weight, None, stride, 0, dilation)


def glinear_reference(
    x: Tensor, z: Tensor, weight: Tensor, scale_weight: Tensor, mix_weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The same for a fully connected layer. Arguments as in :func:`glinear`."""
    s = torch.sigmoid(F.linear(torch.cat([x, z], dim=1), scale_weight))
    u = F.linear(x, weight)
    return u + F.linear(u * s, mix_weight, bias)


# ---- the op, and its implementation on devices without a kernel: PyTorch's matrix products ----


def _pixels_amortise_weights(u: Tensor) -> bool:
    """Whether a sample has enough pixels to amortise its n x n weights W diag(S): at most half the elements of u."""
    n, h, w = u.shape[1:]
    return h * w >= 2 * n


_flag = threading.RLock()  # autograd has a thread for each GPU


@contextlib.contextmanager
def _products(u: Tensor, allow_tf32: bool) -> Iterator[None]:
    """Matrix products in TF32 or not, by the flag of convolutions, which they stand for."""
    if u.dtype != torch.float32 or not u.is_cuda or products_allow_tf32() == allow_tf32:
        yield
        return
    with _flag:
        flags = torch.backends.cuda.matmul
        before = flags.fp32_precision
        flags.fp32_precision = "tf32" if allow_tf32 else "ieee"
        try:
            yield
        finally:
            flags.fp32_precision = before


def _product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """a b for each sample; in float32 for half types, as sums over pixels may overflow float16."""
    if a.dtype not in HALF:
        return torch.bmm(a, b)
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.bmm(a.float(), b.float())


def _matrices(t: Tensor) -> Tensor:
    """(N, C, H, W), dense in either layout, as a view of (N, C, H * W)."""
    n, c, h, w = t.shape
    if is_channels_last(t):
        return t.permute(0, 2, 3, 1).view(n, h * w, c).transpose(1, 2)
    return t.view(n, c, h * w)


def products_fwd(u: Tensor, s: Tensor, mix_weight: Tensor, bias: Tensor | None, allow_tf32: bool) -> Tensor:
    y = dense_like(u)
    u = dense(u, y)
    with without_autocast(u.device), _products(u, allow_tf32):
        if _pixels_amortise_weights(u):
            # The identity is not part of the weights: in half precision they would lose digits.
            torch.baddbmm(_matrices(u), mix_weight * s[:, None, :], _matrices(u), out=_matrices(y))
        else:
            torch.add(u, _mixed(u * s[:, :, None, None], mix_weight), out=y)
        return y if bias is None else y.add_(bias[:, None, None])


def _mixed(t: Tensor, weight: Tensor) -> Tensor:
    """W t, one product for all samples."""
    return F.linear(t.permute(0, 2, 3, 1), weight).permute(0, 3, 1, 2)


def products_bwd(
    grad_y: Tensor, u: Tensor, s: Tensor, mix_weight: Tensor, has_bias: bool, allow_tf32: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_u = dense_like(u)
    u, grad_y = dense(u, grad_u), dense(grad_y, grad_u)
    with without_autocast(u.device), _products(u, allow_tf32):
        if _pixels_amortise_weights(u):
            dy = _matrices(grad_y)
            weights = mix_weight * s[:, None, :]
            torch.baddbmm(dy, weights.transpose(1, 2), dy, out=_matrices(grad_u))
            grad_weights = _product_in_float32(dy, _matrices(u).transpose(1, 2))
            grad_s = (grad_weights * mix_weight).sum(1)
            grad_mix_weight = (grad_weights * s[:, None, :]).sum(0)
        else:
            h = _mixed(grad_y, mix_weight.t())
            torch.addcmul(grad_y, h, s[:, :, None, None], out=grad_u)
            grad_s = (u * h).sum((2, 3))
            scaled = u * s[:, :, None, None]
            grad_mix_weight = torch.tensordot(grad_y, scaled, dims=([0, 2, 3], [0, 2, 3]))
        grad_bias = grad_y.sum((0, 2, 3)) if has_bias else s.new_empty((0,))
    return grad_u, grad_s.to(s.dtype), grad_mix_weight.to(s.dtype).contiguous(), grad_bias


def gconv_mix_fwd_fake(u, *args):
    return dense_like(u)


def gconv_mix_bwd_fake(grad_y, u, s, mix_weight, has_bias, allow_tf32):
    n = u.shape[1]
    return dense_like(u), s.new_empty(s.shape), mix_weight.new_empty((n, n)), s.new_empty((n if has_bias else 0,))


# `allow_tf32` is PyTorch's flag for convolutions on GPUs, or for matrix products; the CPU has no TF32.
gconv_mix_fwd = define_op(
    "gconv_mix_fwd(Tensor u, Tensor s, Tensor mix_weight, Tensor? bias, bool allow_tf32) -> Tensor",
    gconv_mix_fwd_fake,
    native=("cpu",),
    everywhere=products_fwd,
    flops=lambda u, s, mix_weight, *args, **kwargs: 2 * prod(u) * mix_weight[0],
    triton="gconv",
)
gconv_mix_bwd = define_op(
    "gconv_mix_bwd(Tensor grad_y, Tensor u, Tensor s, Tensor mix_weight, bool has_bias, bool allow_tf32) "
    "-> (Tensor grad_u, Tensor grad_s, Tensor grad_mix_weight, Tensor grad_bias)",
    gconv_mix_bwd_fake,
    native=("cpu",),
    everywhere=products_bwd,
    flops=lambda grad_y, u, s, mix_weight, *args, **kwargs: 2 * 2 * prod(u) * mix_weight[0],
    triton="gconv",
)


def ops_of(impl: str):
    """The forward and the backward op of an impl."""
    return triton_ops("gconv_mix") if impl == "triton" else (gconv_mix_fwd, gconv_mix_bwd)


class GConvMixFunction(torch.autograd.Function):
    """Saves only its inputs. A backward that is itself differentiated goes through the reference."""

    @staticmethod
    def forward(ctx, impl, allow_tf32, u, s, mix_weight, bias):
        forward, ctx.backward_op = ops_of(impl)
        ctx.allow_tf32 = allow_tf32
        ctx.save_for_backward(u, s, mix_weight, bias)
        return forward(u, s, mix_weight, bias, allow_tf32)

    @staticmethod
    def backward(ctx, grad_y):
        u, s, mix_weight, bias = inputs = ctx.saved_tensors
        if through_reference():
            grads = reference_grads(gconv_mix_reference, inputs, grad_y, ctx.needs_input_grad[2:])
        else:
            grads = ctx.backward_op(grad_y, u, s, mix_weight, bias is not None, ctx.allow_tf32)
            grads = (grads[0], *map(like_parameter, grads[1:], (s, mix_weight, bias)))
            if bias is None:
                grads = (*grads[:3], None)
        return None, None, *grads


# ---- which impl, on a GPU ----


def preferred(u: Tensor, allow_tf32: bool) -> str:
    """``"triton"``, the fused kernel, or ``"native"``, which on a GPU is PyTorch's batched product.

    Fused, u is read once and y written: 2 passes over memory, T each. PyTorch reads u twice and y once, writes y twice
    (a product is added onto a copy of u), and writes and reads the per-sample weights: 5 T and more.
    """
    if u.device.type not in ("cuda", "xpu") or exporting():
        return "native"
    n, h, w = u.shape[1:]
    table = (
        (n > h * w / 4, "triton", "few pixels: n x n weights per sample cost as much as passes over u"),
        (u.dtype == torch.float64, "native", "compute-bound, and cuBLAS has the higher throughput"),
        (u.dtype == torch.float32 and not allow_tf32, "native", "compute-bound without tensor cores"),
        # 2 n operations per element: they take as long as moving 2 T at n = 370 on an H200 (RTX 3090: 170), and a fused
        # kernel at two thirds of cuBLAS's speed is as slow as 5 T at twice that.
        (n > 512, "native", "compute-bound even on tensor cores"),
        (True, "triton", "memory-bound"),
    )
    return next(impl for holds, impl, _ in table if holds)


def _triton_refusal(u: Tensor) -> str | None:
    if torch.compiler.is_compiling() or exporting():
        return None  # the comparison would specialise the graph on sizes
    n, c, h, w = u.shape
    if c * h * w >= 2**31 or n * h * w >= 2**31:
        return f"the Triton kernels index the elements of a sample in 32 bits, got u of shape {tuple(u.shape)}"
    return None


# ---- the public functions ----


@public
def gconv_mix(u: Tensor, s: Tensor, mix_weight: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    r"""The step that makes a convolution generative (arXiv 2111.15171, eq. 8): its output channels are scaled per
    sample, mixed, and added to the output, in one pass.

    ``y[:, j] = u[:, j] + Σᵢ mix_weight[j, i] · s[:, i] · u[:, i] + bias[j]``

    Args:
        u: (N, n, H, W), or (N, n), floating point; contiguous or channels_last (other strides cost one copy).
        s: (N, n), the scale of each channel of each sample.
        mix_weight: (n, n), from the second dimension to the first.
        bias: (n,) or None.
        impl: ``"auto"``, ``"native"`` (C++ on the CPU, elsewhere PyTorch's batched product), ``"triton"`` (GPUs) or
            ``"reference"`` (plain PyTorch).

    Returns:
        A tensor with u's shape, dtype and layout.

    All tensors have one dtype; autocast casts them as it casts those of ``F.conv2d``. On GPUs float32 is rounded to
    TF32 if ``torch.backends.cudnn.allow_tf32`` allows it for convolutions. Double backward works in eager mode (through
    the reference).

    Raises:
        ValueError: wrong rank or shape.
        TypeError: u is not floating point, or the dtypes differ.
        RuntimeError: tensors on several devices, or an ``impl`` that cannot run here.
    """
    if u.dim() not in (2, 4) or 0 in u.shape[2:]:
        raise ValueError(f"expected u of shape (N, n, H, W), or (N, n), with pixels, got {tuple(u.shape)}")
    u, s, mix_weight, bias = _cast_by_autocast(u, s, mix_weight, bias)
    samples, n = u.shape[:2]
    _check({"s": (s, (samples, n)), "mix_weight": (mix_weight, (n, n)), "bias": (bias, (n,))}, "u", u)
    if u.dim() == 4:
        return _gconv_mix(u, s, mix_weight, bias, convolutions_allow_tf32(), impl)
    return _gconv_mix(u[:, :, None, None], s, mix_weight, bias, products_allow_tf32(), impl).flatten(1)


def _gconv_mix(u: Tensor, s: Tensor, mix_weight: Tensor, bias: Tensor | None, allow_tf32: bool, impl: str) -> Tensor:
    refusals = {"native": None, "triton": _triton_refusal(u)}
    chosen = choose("gconv_mix", impl, u.device, refusals, preferred(u, allow_tf32))
    if chosen == "reference":
        return gconv_mix_reference(u, s, mix_weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (u, s, mix_weight, bias)):
        return GConvMixFunction.apply(chosen, allow_tf32, u, s, mix_weight, bias)
    return ops_of(chosen)[0](u, s, mix_weight, bias, allow_tf32)


def _cast_by_autocast(*tensors: Tensor | None) -> Sequence[Tensor | None]:
    """The tensors, cast as autocast casts the arguments of ``F.conv2d``."""
    device = tensors[0].device
    if not under_autocast(device):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    eligible = (torch.float32, *HALF)
    return [t if t is None or t.dtype not in eligible else t.to(dtype) for t in tensors]


def _check(
    tensors: Mapping[str, tuple[Tensor | None, tuple[int, ...]]], what: str, x: Tensor, any_dtype: bool = False
) -> None:
    """Check tensors, by name, against the shapes that follow from x; ``what`` is x's name in the messages."""
    check_floating(x)
    for name, (tensor, shape) in tensors.items():
        if tensor is None:
            continue
        check_shape(name, tensor, shape, x, what)
        check_device(name, tensor, x, what)
        if tensor.dtype != x.dtype and not (any_dtype and tensor.dtype in FLOAT):
            raise TypeError(f"expected tensors of one dtype, got {what} of {x.dtype} and {name} of {tensor.dtype}")


@public
def gconv2d(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    scale_weight: Tensor,
    mix_weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    padding_mode: str = "zeros",
    upsample: int = 1,
    impl: str = "auto",
) -> Tensor:
    r"""Generative convolution (arXiv 2111.15171, eq. 5-8): for each sample, the kernels are scaled by a function of a
    latent vector and of the mean of the input, mixed, and added to the original kernels.

    The same as ``F.conv2d`` with per-sample kernels ``weight[j] + Σᵢ mix_weight[j, i] · s[i] · weight[i]``, where
    ``s = sigmoid(F.linear(cat([x.mean((2, 3)), z], 1), scale_weight))``.

    Args:
        x: (N, m, H, W), or (m, H, W) for one sample, floating point.
        z: (N, dz), the latent vectors; (dz,) is accepted for one sample.
        weight: (n, m, kh, kw), the kernels.
        scale_weight: (n, m + dz), from the mean of x and from z to the scale of each kernel.
        mix_weight: (n, n).
        bias: (n,) or None, added at the end.
        stride, padding, dilation: as in ``F.conv2d``.
        padding_mode: as in ``nn.Conv2d``.
        upsample: 2 convolves the input upsampled by 2 (nearest), as :func:`upsample_conv2d` does; for stride and
            dilation 1 and zero padding.
        impl: of the mixing, as in :func:`gconv_mix`. The convolution is always PyTorch's.

    Returns:
        (N, n, H', W') as ``F.conv2d`` does, dtype and layout included.

    All tensors have one dtype; autocast casts them as it casts those of ``F.conv2d``. Double backward works in eager
    mode.

    Raises:
        ValueError: wrong rank or shape.
        TypeError: x is not floating point, or the dtypes differ.
        RuntimeError: tensors on several devices, an ``impl`` that cannot run here, or an error of ``F.conv2d``.
    """
    check_option("padding_mode", padding_mode, PADDING_MODES)
    check_upsample(upsample, stride, dilation, padding_mode)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "padding_mode": padding_mode}
    options["upsample"] = upsample
    if x.dim() not in (3, 4):
        raise ValueError(f"expected 3D (unbatched) or 4D (batched) input, got {x.dim()}D input")
    if x.dim() == 3:
        z = z[None] if z.dim() == 1 else z
        return gconv2d(x[None], z, weight, scale_weight, mix_weight, bias, **options, impl=impl)[0]
    if weight.dim() != 4 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight must have shape (n, {x.shape[1]}, kh, kw) for x of shape {tuple(x.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    _check_layer(x, z, weight, scale_weight, mix_weight, bias)
    if impl == "reference":
        return gconv2d_reference(x, z, weight, scale_weight, mix_weight, bias, **options)
    # The gradient of a sum is an expanded view, one number per channel; that of a mean is a tensor as large as x.
    pixels = x.shape[2] * x.shape[3]
    mean = x.mean((2, 3)) if x.dtype in HALF else x.sum((2, 3)) / pixels
    s = torch.sigmoid(F.linear(torch.cat([mean, z], dim=1), scale_weight))
    if upsample == 2:
        u = upsample_conv2d(x, weight, padding=padding)
    else:
        u = _convolved(x, weight, stride, padding, dilation, padding_mode)
    return gconv_mix(u, s, mix_weight, bias, impl=impl)


@public
def glinear(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    scale_weight: Tensor,
    mix_weight: Tensor,
    bias: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    r"""The generative form of ``F.linear``: :func:`gconv2d` on a single pixel (arXiv 2111.15171, eq. 5-8).

    Args:
        x: (N, m), floating point.
        z: (N, dz), the latent vectors; in the first layer of a generator, x itself.
        weight: (n, m).
        scale_weight: (n, m + dz), from x and z to the scale of each row of ``weight``.
        mix_weight: (n, n).
        bias: (n,) or None, added at the end.
        impl: as in :func:`gconv_mix`.

    Returns:
        (N, n) in x's dtype.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`gconv2d`.
    """
    if x.dim() != 2:
        raise ValueError(f"expected 2D input (got {x.dim()}D input)")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight must have shape (n, {x.shape[1]}) for x of shape {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    _check_layer(x, z, weight, scale_weight, mix_weight, bias)
    if impl == "reference":
        return glinear_reference(x, z, weight, scale_weight, mix_weight, bias)
    s = torch.sigmoid(F.linear(torch.cat([x, z], dim=1), scale_weight))
    return gconv_mix(F.linear(x, weight), s, mix_weight, bias, impl=impl)


def _check_layer(x, z, weight, scale_weight, mix_weight, bias) -> None:
    """Check the arguments of both layers, except the shape of the weight."""
    n, m = weight.shape[:2]
    if z.dim() != 2 or z.shape[0] != x.shape[0]:
        raise ValueError(f"z must have shape ({x.shape[0]}, dz) for x of shape {tuple(x.shape)}, got {tuple(z.shape)}")
    length = z.shape[1]
    if scale_weight.dim() == 2 and scale_weight.shape[0] == n and scale_weight.shape[1] != m + length:
        raise ValueError(
            f"z must have shape ({x.shape[0]}, {scale_weight.shape[1] - m}) for x of shape {tuple(x.shape)} and "
            f"scale_weight of shape {tuple(scale_weight.shape)}, got {tuple(z.shape)}"
        )
    wanted = {"z": (z, tuple(z.shape)), "weight": (weight, tuple(weight.shape))}
    wanted |= {"scale_weight": (scale_weight, (n, m + length)), "mix_weight": (mix_weight, (n, n))}
    _check(wanted | {"bias": (bias, (n,))}, "x", x, any_dtype=under_autocast(x.device))
