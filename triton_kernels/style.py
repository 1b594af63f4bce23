"""StyleGAN's epilogues on any GPU that Triton reaches: ``pixnorm::style_epilogue_fwd_triton``, ``..._bwd_triton``,
``pixnorm::style_norm_fwd_triton`` and ``..._bwd_triton``.

They have the schemas of the native ops (pixnorm/ops/style.py, where the equations are). Kernels stream over x
(style_epilogue.py, style_norm.py); style_norm reads planes that fit registers once.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from pixnorm.ops.common import dense, dense_like, is_channels_last
from pixnorm.ops.style import (
    style_epilogue_bwd_fake,
    style_epilogue_fwd_fake,
    style_norm_bwd_fake,
    style_norm_fwd_fake,
)
from pixnorm.triton_kernels.common import accumulator, launch, op_of_kernels, wrap_triton
from pixnorm.triton_kernels.statistics import finish_statistics
from pixnorm.triton_kernels.style_epilogue import (
    style_epilogue_bwd_kernel,
    style_epilogue_fwd_kernel,
    style_finish_kernel,
)
from pixnorm.triton_kernels.style_norm import (
    style_norm_bwd_apply_kernel,
    style_norm_bwd_reduce_kernel,
    style_norm_bwd_resident_kernel,
    style_norm_fwd_kernel,
    style_norm_fwd_resident_kernel,
    style_norm_statistics_kernel,
)
from pixnorm.triton_kernels.tiles import WARPS, Tiling

# Elements of planes that stay in registers, at most; in backward also those of the gradient.
RESIDENT, RESIDENT_BACKWARD = 16384, 8192
# Partial sums that the kernel which adds them up reads at once, and the elements of each.
SUMS, COLUMNS_OF_SUMS = 32, 32


def _arguments(
    x: Tensor, noise: Tensor | None, noise_strength: Tensor | None, bias: Tensor | None, slope: float, tiling: Tiling
) -> dict[str, Any]:
    """What all kernels but the last have in common."""
    _, c, h, w = x.shape
    return {
        "x_ptr": x,
        "noise_ptr": x if noise is None else noise.contiguous(),  # not read
        "strength_ptr": _rows(noise_strength, x),
        "bias_ptr": _rows(bias, x),
        "C": c,
        "pixels": h * w,
        "noise_stride": 0 if noise is None or noise.shape[0] == 1 else h * w,
        "parts": tiling.parts,
        "tiles": tiling.tiles,
        "NOISE": noise is not None,
        "BIAS": bias is not None,
        "SLOPE": slope,
        "LAST": is_channels_last(x),
        "V": tiling.columns,
        "CHANNELS": tiling.channels,
        "PIXELS": tiling.pixels,
        "num_warps": tiling.warps,
    }


def _rows(rows: Tensor | None, x: Tensor) -> Tensor:
    """Dense rows; x, which is not read, where there are none."""
    return x if rows is None else rows.contiguous()


def _sums(x: Tensor, tiling: Tiling, of: int) -> Tensor:
    """So many sums for each part and plane."""
    return torch.empty((of, tiling.parts, *x.shape[:2]), dtype=accumulator(x), device=x.device)


def _gradients(x: Tensor, *rows: Tensor | None) -> list[Tensor]:
    """Empty gradients of rows, of no elements where there are none."""
    # By torch.empty, as torch.compile merges equal calls of new_empty into one.
    none = {"size": (0,), "dtype": x.dtype}
    options = [none if r is None else {"size": r.shape, "dtype": r.dtype} for r in rows]
    return [torch.empty(**of, device=x.device) for of in options]


def _finish(sums: Tensor, of_samples: list[Tensor], of_channels: list[Tensor]) -> None:
    """Adds the parts up to two gradients (N, C), and those of strength and bias (C,); to those that have elements."""
    _, parts, n, c = sums.shape
    (first, second), (strength, bias) = of_samples, of_channels
    columns = n * c if first.numel() or second.numel() else c
    launch(
        wrap_triton(style_finish_kernel),
        (triton.cdiv(columns, COLUMNS_OF_SUMS),),
        sums_ptr=sums,
        first_ptr=first,
        second_ptr=second,
        strength_ptr=strength,
        bias_ptr=bias,
        N=n,
        C=c,
        parts=parts,
        FIRST=first.numel() > 0,
        SECOND=second.numel() > 0,
        NOISE=strength.numel() > 0,
        BIAS=bias.numel() > 0,
        ROWS=SUMS,
        COLUMNS=COLUMNS_OF_SUMS,
        num_warps=WARPS,
    )


def _epilogue_arguments(
    x: Tensor,
    demod: Tensor | None,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    next_styles: Tensor | None,
    negative_slope: float | None,
    gain: float,
    tiling: Tiling,
) -> dict[str, Any]:
    return _arguments(x, noise, noise_strength, bias, negative_slope or 0.0, tiling) | {
        "demod_ptr": _rows(demod, x),
        "styles_ptr": _rows(next_styles, x),
        "DEMOD": demod is not None,
        "STYLES": next_styles is not None,
        "GAIN": gain,
        "ACTIVATED": negative_slope is not None,
    }


def style_epilogue_fwd(
    x: Tensor,
    demod: Tensor | None,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    next_styles: Tensor | None,
    negative_slope: float | None,
    gain: float,
) -> Tensor:
    """The forward op of StyleGAN 2's epilogue, see pixnorm/ops/style.py."""
    x = dense(x, x)
    y = dense_like(x)
    if x.numel() == 0:
        return y
    tiling = Tiling.of(x, per_pixel=True)
    arguments = _epilogue_arguments(x, demod, noise, noise_strength, bias, next_styles, negative_slope, gain, tiling)
    launch(wrap_triton(style_epilogue_fwd_kernel), (tiling.programs,), y_ptr=y, **arguments)
    return y


def style_epilogue_bwd(
    grad_y: Tensor,
    x: Tensor,
    demod: Tensor | None,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    next_styles: Tensor | None,
    negative_slope: float | None,
    gain: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The backward op of StyleGAN 2's epilogue, see pixnorm/ops/style.py."""
    x = dense(x, x)
    dx = dense_like(x)
    wanted = demod, next_styles, noise_strength, bias
    grads = d_demod, d_styles, d_strength, d_bias = _gradients(x, *wanted)
    if x.numel() == 0:
        d_demod, d_styles, d_strength, d_bias = map(torch.zeros_like, grads)
        return dx, d_demod, d_strength, d_bias, d_styles
    tiling = Tiling.of(x, per_pixel=True)
    arguments = _epilogue_arguments(x, demod, noise, noise_strength, bias, next_styles, negative_slope, gain, tiling)
    sums = _sums(x, tiling, sum(of is not None for of in wanted))
    launch(
        wrap_triton(style_epilogue_bwd_kernel),
        (tiling.programs,),
        dy_ptr=dense(grad_y, x),
        dx_ptr=dx,
        sums_ptr=sums,
        N=x.shape[0],
        **arguments,
    )
    if sums.shape[0]:
        _finish(sums, [d_demod, d_styles], [d_strength, d_bias])
    return dx, d_demod, d_strength, d_bias, d_styles


def style_norm_fwd(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    negative_slope: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward op of StyleGAN 1's epilogue, see pixnorm/ops/style.py."""
    x = dense(x, x)
    n, c = x.shape[:2]
    y = dense_like(x)
    if x.numel() == 0:
        mean, var = (torch.zeros((n, c), dtype=accumulator(x), device=x.device) for _ in range(2))
        return y, mean, var
    planes = Tiling.of_planes(x, RESIDENT)
    tiling = planes or Tiling.of(x, per_pixel=True)
    arguments = _arguments(x, noise, noise_strength, bias, negative_slope, tiling) | {"EPS": eps}
    if planes:
        mean, var = (torch.empty((n, c), dtype=accumulator(x), device=x.device) for _ in range(2))
    else:
        partials = torch.empty((1, n, tiling.parts, 3, c), dtype=accumulator(x), device=x.device)
        launch(wrap_triton(style_norm_statistics_kernel), (tiling.programs,), partials_ptr=partials, **arguments)
        mean, var = (t.view(n, c) for t in finish_statistics(partials))
    arguments |= {"scale_ptr": scale.contiguous(), "shift_ptr": shift.contiguous(), "y_ptr": y}
    arguments |= {"mean_ptr": mean, "var_ptr": var}
    if planes:
        launch(wrap_triton(style_norm_fwd_resident_kernel), (tiling.programs,), **arguments)
    else:
        launch(wrap_triton(style_norm_fwd_kernel), (tiling.programs,), **arguments)
    return y, mean, var


def style_norm_bwd(
    grad_y: Tensor,
    x: Tensor,
    scale: Tensor,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    negative_slope: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The backward op of StyleGAN 1's epilogue, see pixnorm/ops/style.py."""
    x = dense(x, x)
    dx = dense_like(x)
    d_scale, d_shift, d_strength, d_bias = grads = _gradients(x, scale, scale, noise_strength, bias)
    if x.numel() == 0:
        return dx, *map(torch.zeros_like, grads)
    planes = Tiling.of_planes(x, RESIDENT_BACKWARD)
    tiling = planes or Tiling.of(x, per_pixel=True)
    arguments = _arguments(x, noise, noise_strength, bias, negative_slope, tiling) | {
        "dy_ptr": dense(grad_y, x),
        "mean_ptr": mean.contiguous(),
        "var_ptr": var.contiguous(),
        "N": x.shape[0],
        "EPS": eps,
    }
    scale = scale.contiguous()
    of_channels = [d_strength, d_bias]
    wanted = (noise is not None) + (bias is not None)
    if planes:
        sums = _sums(x, tiling, 2 + wanted)
        launch(
            wrap_triton(style_norm_bwd_resident_kernel),
            (tiling.programs,),
            scale_ptr=scale,
            dx_ptr=dx,
            sums_ptr=sums,
            **arguments,
        )
        _finish(sums, [d_scale, d_shift], of_channels)
        return dx, d_scale, d_shift, d_strength, d_bias
    sums = _sums(x, tiling, 2)
    launch(wrap_triton(style_norm_bwd_reduce_kernel), (tiling.programs,), sums_ptr=sums, **arguments)
    of_samples = _gradients(x, mean, mean)  # in the dtype of sums
    _finish(sums, of_samples, _gradients(x, None, None))
    sums = _sums(x, tiling, wanted)
    launch(
        wrap_triton(style_norm_bwd_apply_kernel),
        (tiling.programs,),
        scale_ptr=scale,
        d_scale_ptr=of_samples[0],
        d_shift_ptr=of_samples[1],
        dx_ptr=dx,
        sums_ptr=sums,
        **arguments,
    )
    if wanted:
        _finish(sums, _gradients(x, None, None), of_channels)
    d_scale, d_shift = (grad.to(scale.dtype) for grad in of_samples)
    return dx, d_scale, d_shift, d_strength, d_bias


style_epilogue_fwd_triton = op_of_kernels("pixnorm::style_epilogue_fwd_triton", mutates_args=())(style_epilogue_fwd)
style_epilogue_bwd_triton = op_of_kernels("pixnorm::style_epilogue_bwd_triton", mutates_args=())(style_epilogue_bwd)
style_norm_fwd_triton = op_of_kernels("pixnorm::style_norm_fwd_triton", mutates_args=())(style_norm_fwd)
style_norm_bwd_triton = op_of_kernels("pixnorm::style_norm_bwd_triton", mutates_args=())(style_norm_bwd)
# Shapes, dtypes and strides are those of the native ops.
style_epilogue_fwd_triton.register_fake(style_epilogue_fwd_fake)
style_epilogue_bwd_triton.register_fake(style_epilogue_bwd_fake)
style_norm_fwd_triton.register_fake(style_norm_fwd_fake)
style_norm_bwd_triton.register_fake(style_norm_bwd_fake)
