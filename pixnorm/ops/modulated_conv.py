r"""Modulated convolutions (StyleGAN 2, arXiv 1912.04958; arXiv 2006.05394 eq. 9-14): the input is scaled by a style,
convolved, and divided by the standard deviation that the result is expected to have:

    y = w ∗ (s · h) / σ_E

s is a number per sample and channel, or, for spatially modulated convolution, a map. For independent h of mean 0 and
variance 1 the variance at an output pixel is w² ∗ s², and σ_E² its mean over the pixels of a sample, plus eps.

No second convolution finds it. For numbers, σ_E²[n, o] = Σ_i s²[n, i] Σ_t w²[o, i, t]. For maps the mean of w² ∗ s²
over the pixels is

    σ_E²[n, o] = Σ_{i,t} w²[o, i, t] S[n, i, t] / (H' W'),     S[n, i, t]: the sum of s² over the pixels that tap t sees

one small product; S comes from the pass that forms s · h. A tap sees every pixel once but for those near the border,
which depend on the padding: how often is a product of a count per row and one per column (:func:`tap_counts`).
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from pixnorm.ops._dispatch import IMPLS, choose, define_op
from pixnorm.ops.checks import check_device, check_eps, check_floating, check_image, check_option, check_shape
from pixnorm.ops.common import (
    beyond_32_bits,
    dense_like,
    exporting,
    is_channels_last,
    onlooker,
    public,
    through_reference,
    triton_ops,
    wide,
    without_autocast,
)
from pixnorm.ops.convolution import PADDING_MODES, Padding, convolution, paddings
from pixnorm.ops.modulate import rows_for
from pixnorm.ops.resampled_conv import upsample_conv2d
from pixnorm.ops.style import style_epilogue

# ---- references


def modulated_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    *,
    demodulate: bool = True,
    upsample: int = 1,
    padding: Padding = "same",
    eps: float = 1e-8,
) -> Tensor:
    """Modulated convolution in plain PyTorch: the specification. Arguments as in :func:`modulated_conv2d`."""
    x = x * styles[..., None, None].to(x.dtype)
    if upsample == 2:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    y = F.conv2d(x, weight, padding=padding)
    return y * demodulation(weight, styles, eps)[..., None, None].to(y.dtype) if demodulate else y


def spatially_modulated_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    style_map: Tensor,
    *,
    demodulate: bool = True,
    upsample: int = 1,
    padding: Padding = "same",
    padding_mode: str = "zeros",
    eps: float = 1e-8,
) -> Tensor:
    """Spatially modulated convolution in plain PyTorch, with a second convolution for the variance: the specification.
    Arguments as in :func:`spatially_modulated_conv2d`."""

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest") if upsample == 2 else x
        return convolution(x, weight, padding, padding_mode)

    y = convolve(x * style_map, weight)
    if not demodulate:
        return y
    with without_autocast(x.device):
        variances = convolve(wide(style_map).square(), wide(weight).square())
        factors = (variances.mean((2, 3), keepdim=True) + eps).rsqrt()
    return y * factors.to(y.dtype)


# ---- what taps see


def _counts(
    size: int, taps: int, before: int, after: int, mode: str, device: torch.device, upsample: int = 1
) -> Tensor:
    """(taps, size): how often each tap sees each row (or column) of an image; of copies their mean."""
    if upsample > 1:
        of_copies = _counts(size * upsample, taps, before, after, mode, device)
        return of_copies.unflatten(1, (size, upsample)).mean(2)
    rows = torch.arange(size, device=device)
    outputs = torch.arange(size + before + after - taps + 1, device=device)
    seen = outputs + torch.arange(taps, device=device)[:, None] - before  # (taps, outputs)
    if mode == "circular":
        seen = seen % size
    elif mode == "replicate":
        seen = seen.clamp(0, size - 1)
    elif mode == "reflect":
        seen = size - 1 - (size - 1 - seen.abs()).abs()
    return (seen[..., None] == rows).sum(1, dtype=torch.float32)


_cached_counts = lru_cache(maxsize=256)(_counts)


def _plain_tensors(device: torch.device) -> bool:
    """Whether a tensor that is made now can be used by any later call."""
    if torch.compiler.is_compiling() or exporting() or onlooker() or torch.is_inference_mode_enabled():
        return False
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return not capturing and torch._C._len_torch_dispatch_stack() == 0


def tap_counts(x: Tensor, weight: Tensor, padding: Padding, mode: str, upsample: int = 1) -> tuple[Tensor, Tensor]:
    """How often each row (column) of x is seen by each row (column) of taps: (kh, H) and (kw, W), of float32.

    Of an upsampled x: a mean over the copies of a row, so that it is 1 but near borders, as without.
    """
    left, right, top, bottom = paddings(weight, padding)
    (h, w), (kh, kw) = x.shape[2:], weight.shape[2:]
    counts = _cached_counts if _plain_tensors(x.device) else _counts
    rows = counts(h, kh, top, bottom, mode, x.device, upsample)
    return rows, counts(w, kw, left, right, mode, x.device, upsample)


# ---- the scaled map and its windowed sums: an op


def spatial_scale_reference(x: Tensor, style_map: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """In plain PyTorch: the specification. Arguments as in :func:`spatial_scale`."""
    with without_autocast(x.device):
        squares = wide(style_map).square()
        sums = torch.einsum("nihw,ah,bw->niab", squares, rows.to(squares.dtype), columns.to(squares.dtype))
    return x * style_map, sums


def spatial_scale_grads(grad_y, grad_sums, x, style_map, rows, columns) -> tuple[Tensor, Tensor]:
    """Its gradients in plain PyTorch."""
    with without_autocast(x.device):
        weights = torch.einsum("niab,ah,bw->nihw", grad_sums, rows.to(grad_sums.dtype), columns.to(grad_sums.dtype))
    squares = (2 * wide(style_map) * weights).to(x.dtype)
    return grad_y * style_map, grad_y * x + squares


def spatial_scale_fwd_fake(x, style_map, rows, columns):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return dense_like(x), x.new_empty((*x.shape[:2], rows.shape[0], columns.shape[0]), dtype=dtype)


def spatial_scale_bwd_fake(grad_y, grad_sums, x, style_map, rows, columns):
    return dense_like(x), dense_like(style_map)


spatial_scale_fwd = define_op(
    "spatial_scale_fwd(Tensor x, Tensor style_map, Tensor rows, Tensor columns) -> (Tensor y, Tensor sums)",
    spatial_scale_fwd_fake,
    native=("cpu",),
    triton="modulated_conv",
)
spatial_scale_bwd = define_op(
    "spatial_scale_bwd(Tensor grad_y, Tensor grad_sums, Tensor x, Tensor style_map, Tensor rows, Tensor columns) "
    "-> (Tensor grad_x, Tensor grad_style_map)",
    spatial_scale_bwd_fake,
    native=("cpu",),
    triton="modulated_conv",
)


def ops_of(impl: str):
    """The forward and the backward op of an impl."""
    return triton_ops("spatial_scale") if impl == "triton" else (spatial_scale_fwd, spatial_scale_bwd)


class SpatialScaleFunction(torch.autograd.Function):
    """Saves its arguments."""

    @staticmethod
    def forward(ctx, impl, rows, columns, x, style_map):
        forward, ctx.backward_op = ops_of(impl)
        ctx.save_for_backward(x, style_map, rows, columns)
        return forward(x, style_map, rows, columns)

    @staticmethod
    def backward(ctx, grad_y, grad_sums):
        backward = spatial_scale_grads if through_reference() else ctx.backward_op
        return None, None, None, *backward(grad_y, grad_sums, *ctx.saved_tensors)


def _too_many_taps(rows: Tensor, columns: Tensor) -> str | None:
    kh, kw = rows.shape[0], columns.shape[0]
    return f"the Triton kernels keep a sum for each tap, at most 49, got kernels of {kh}x{kw}" if kh * kw > 49 else None


def spatial_scale(
    x: Tensor, style_map: Tensor, rows: Tensor, columns: Tensor, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The scaled input of a spatially modulated convolution, and the sums of squares that its taps see, in one pass.

    Args:
        x, style_map: (N, C, H, W), of one dtype.
        rows, columns: (kh, H) and (kw, W) of float32: how often each tap sees each row and column; 1 but near borders.
        impl: as in :func:`spatially_modulated_conv2d`.

    Returns:
        x · style_map; and (N, C, kh, kw), Σ rows[a, h] columns[b, w] style_map², float32, for float64 float64.
    """
    refusals = {"triton": beyond_32_bits(x, 1) or _too_many_taps(rows, columns)}
    chosen = choose("spatial_scale", impl, x.device, refusals, stacklevel=5)
    if chosen == "reference":
        return spatial_scale_reference(x, style_map, rows, columns)
    if torch.is_grad_enabled() and (x.requires_grad or style_map.requires_grad):
        return SpatialScaleFunction.apply(chosen, rows, columns, x, style_map)
    return ops_of(chosen)[0](x, style_map, rows, columns)


# ---- modulated convolution


def demodulation(weight: Tensor, styles: Tensor, eps: float) -> Tensor:
    """1 / σ_E, (N, O), for styles (N, I); float32 for half precision."""
    with without_autocast(weight.device):
        variances = F.linear(wide(styles).square(), wide(weight).square().sum((2, 3)).to(wide(styles).dtype))
        return (variances + eps).rsqrt()


def kernels_are_cheaper(x: Tensor, weight: Tensor) -> bool:
    """Whether to scale the kernels of a sample rather than its activations: where they are fewer than the numbers that
    are then not scaled.

    Time with scaled activations over that with scaled kernels, N = 1, 3x3, forward + backward (two cores, AVX-512):

        512x8x8   512x32x32   256x32x32   128x64x64   64x128x128   32x256x256
          0.6        0.9         1.0         1.0          1.1          1.3

    Several samples need a grouped convolution for it, 0.9 to 1.7 times the time of one with scaled activations.
    """
    if x.shape[0] != 1:
        return False
    pixels = x.shape[2] * x.shape[3]
    return weight.numel() <= (weight.shape[0] + weight.shape[1]) * pixels


def makes_colours(x: Tensor, weight: Tensor, padding: Padding) -> bool:
    """Whether kernels are 1x1 and few, so that those of all samples are one small product with their activations, which
    are then not scaled: 2.5 times faster for 128 channels of 64x64 on two cores. In channels_last the gradients of such
    products are slow, and one pass that scales is not.
    """
    few = tuple(weight.shape[2:]) == (1, 1) and weight.shape[0] <= 16 and not any(paddings(weight, padding))
    return few and not is_channels_last(x)


def modulated(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    *,
    demodulate: bool = True,
    upsample: int = 1,
    padding: Padding = "same",
    eps: float = 1e-8,
    scaled: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The convolution, and the factors (N, O) by which its output is still to be multiplied, or None.

    The factors are left to the pass that follows (``demod`` of :func:`pixnorm.functional.style_epilogue`).

    Args:
        x, weight, styles, demodulate, upsample, padding, eps, impl: as in :func:`modulated_conv2d`.
        scaled: x is already multiplied by the styles, as ``style_epilogue`` does with its ``next_styles``.
    """
    factors = demodulation(weight, styles, eps) if demodulate else None
    if impl not in ("auto", "reference"):
        choose("style_epilogue", impl, x.device, {})  # raises, whichever form is taken
    if makes_colours(x, weight, padding) and upsample == 1 and not scaled and impl != "reference":
        kernels = (wide(weight).flatten(1) * wide(styles)[:, None]).to(weight.dtype)  # (N, O, I)
        return (kernels @ x.flatten(2)).unflatten(2, x.shape[2:]), factors
    traced = onlooker() is not None  # a graph for other batches, too
    if not (scaled or traced or impl == "reference") and demodulate and kernels_are_cheaper(x, weight):
        scales = wide(styles)[0, :, None, None]
        if factors is not None:
            scales, factors = scales * factors[0, :, None, None, None], None
        weight = (wide(weight) * scales).to(weight.dtype)
    elif not scaled:
        x = style_epilogue(x, demod=rows_for(styles, x), activation=None, impl=impl)
    y = (
        upsample_conv2d(x, weight, padding=padding, impl=impl)
        if upsample == 2
        else F.conv2d(x, weight, padding=padding)
    )
    return y, factors


@public
def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    *,
    demodulate: bool = True,
    upsample: int = 1,
    padding: Padding = "same",
    eps: float = 1e-8,
    impl: str = "auto",
) -> Tensor:
    r"""Modulated convolution of StyleGAN 2 (arXiv 1912.04958; 2006.05394 eq. 9-11): ``w * (s h) / sigma``, where
    ``sigma[n, o] = sqrt(sum((s[n, i] * w[o, i, a, b]) ** 2) + eps)`` over i, a and b.

    Equal to convolving each sample with kernels ``w * s / sigma`` of its own, which are formed for one sample only.

    Args:
        x: (N, I, H, W), floating point, contiguous or channels_last.
        weight: (O, I, kh, kw).
        styles: (N, I), floating point.
        demodulate: divide by sigma.
        upsample: 2 convolves ``interpolate(x, scale_factor=2, mode="nearest")``.
        padding: ``"same"``, ``"valid"`` or numbers, as in ``F.conv2d``, with zeros.
        eps: added to sigma².
        impl: of the passes beside the convolution, which is PyTorch's: ``"auto"``, ``"native"`` (C++), ``"triton"``
            (GPUs) or ``"reference"`` (plain PyTorch).

    Returns:
        (N, O, H', W') as ``F.conv2d``, whose dtypes and autocast it follows.

    Raises:
        ValueError: a shape or the value of an option does not fit.
        TypeError: x is not floating point.
        RuntimeError: tensors on several devices, or an ``impl`` that cannot run here.
    """
    _check(x, weight, padding, eps, impl)
    check_option("upsample", upsample, (1, 2))
    check_shape("styles", styles, x.shape[:2], x)
    check_device("styles", styles, x)
    check_floating(styles, "styles")
    options = {"demodulate": demodulate, "upsample": upsample, "padding": padding, "eps": eps}
    if impl == "reference":
        return modulated_conv2d_reference(x, weight, styles, **options)
    return _demodulated(*modulated(x, weight, styles, **options, impl=impl), impl)


@public
def spatially_modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    style_map: Tensor,
    *,
    demodulate: bool = True,
    upsample: int = 1,
    padding: Padding = "same",
    padding_mode: str = "zeros",
    eps: float = 1e-8,
    impl: str = "auto",
) -> Tensor:
    r"""Spatially modulated convolution (arXiv 2006.05394 eq. 12-14): ``w * (s · h) / sigma`` with a style for each
    pixel, where ``sigma²[n, o]`` is the mean over the output's pixels of ``w² * s²``, plus eps.

    The padding of ``w² * s²`` is that of the convolution, so that the output has unit variance with zeros, too (and
    about that where padding repeats pixels, which are not independent then). Taps that see zeros lower sigma: only for
    1x1 kernels, or with other paddings, is a constant map the same as :func:`modulated_conv2d`.

    Args:
        x: (N, I, H, W), floating point, contiguous or channels_last.
        weight: (O, I, kh, kw).
        style_map: (N, I, H, W), in x's dtype.
        demodulate, eps, impl: as in :func:`modulated_conv2d`.
        upsample: 2 convolves the scaled input upsampled by 2 (nearest); so the map has the resolution of x.
        padding: ``"same"``, ``"valid"`` or numbers, as in ``F.conv2d``.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``, as in ``nn.Conv2d``.

    Returns:
        (N, O, H', W') as ``F.conv2d``, whose dtypes and autocast it follows.

    Raises:
        ValueError: a shape or the value of an option does not fit.
        TypeError: x is not floating point, or the map has another dtype.
        RuntimeError: tensors on several devices, or an ``impl`` that cannot run here.
    """
    _check(x, weight, padding, eps, impl)
    check_option("upsample", upsample, (1, 2))
    check_option("padding_mode", padding_mode, PADDING_MODES)
    check_shape("style_map", style_map, x.shape, x)
    check_device("style_map", style_map, x)
    if style_map.dtype != x.dtype:
        raise TypeError(f"expected a style_map of dtype {x.dtype} for input of that dtype, got {style_map.dtype}")
    options = {"demodulate": demodulate, "upsample": upsample, "padding": padding, "eps": eps}
    options["padding_mode"] = padding_mode
    return _demodulated(*spatially_modulated(x, weight, style_map, **options, impl=impl), impl)


def spatially_modulated(
    x: Tensor,
    weight: Tensor,
    style_map: Tensor,
    *,
    demodulate: bool = True,
    upsample: int = 1,
    padding: Padding = "same",
    padding_mode: str = "zeros",
    eps: float = 1e-8,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The convolution, and the factors (N, O) by which its output is still to be multiplied, or None."""
    if impl == "reference":
        options = {"demodulate": demodulate, "upsample": upsample, "padding": padding, "eps": eps}
        y = spatially_modulated_conv2d_reference(x, weight, style_map, **options, padding_mode=padding_mode)
        return y, None

    def convolve(x: Tensor) -> Tensor:
        if upsample == 2 and padding_mode == "zeros":
            return upsample_conv2d(x, weight, padding=padding)
        x = F.interpolate(x, scale_factor=2, mode="nearest") if upsample == 2 else x
        return convolution(x, weight, padding, padding_mode)

    if not demodulate:
        return convolve(x * style_map), None
    counts = tap_counts(x, weight, padding, padding_mode, upsample)
    scaled, sums = spatial_scale(x, style_map, *counts, impl)
    y = convolve(scaled)
    with without_autocast(x.device):
        squares = wide(weight).square().to(sums.dtype)
        if is_channels_last(weight):  # a view, so that the gradient has the weight's strides
            squares, sums = (t.permute(0, 2, 3, 1) for t in (squares, sums))
        pixels = y.shape[2] * y.shape[3] / upsample**2  # the sums are means over the copies of a pixel
        factors = (F.linear(sums.flatten(1), squares.flatten(1)) / pixels + eps).rsqrt()
    return y, factors


def _demodulated(y: Tensor, factors: Tensor | None, impl: str) -> Tensor:
    return y if factors is None else style_epilogue(y, demod=rows_for(factors, y), activation=None, impl=impl)


def _check(x: Tensor, weight: Tensor, padding: Padding, eps: float, impl: str) -> None:
    check_image(x)
    check_option("impl", impl, IMPLS)
    if weight.dim() != 4 or weight.shape[1] != x.shape[1]:
        wanted = f"(out_channels, {x.shape[1]}, kh, kw)"
        raise ValueError(
            f"weight must have shape {wanted} for input of shape {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    check_device("weight", weight, x)
    check_eps(eps, False)
    if isinstance(padding, str):
        check_option("padding", padding, ("same", "valid"))
    left, right, top, bottom = paddings(weight, padding)
    if x.shape[2] + top + bottom < weight.shape[2] or x.shape[3] + left + right < weight.shape[3]:
        sizes = f"{tuple(weight.shape[2:])} are larger than the input {tuple(x.shape[2:])} with padding {padding!r}"
        raise ValueError(f"kernels of size {sizes}")
