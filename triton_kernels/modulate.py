"""Modulated norm on any GPU that Triton reaches: ``pixnorm::modulate_fwd_triton`` and ``pixnorm::modulate_bwd_triton``.

They have the schemas of ``modulate_fwd`` and ``modulate_bwd`` (pixnorm/ops/modulate.py, where the equations are).

Kernels stream over x (modulate_stream.py). Planes that fit registers and are normalised by themselves, as in instance
norm, are read once (modulate_resident.py).
"""

from typing import Any

import torch
import triton
from torch import Tensor

from pixnorm.ops.common import dense, dense_like, is_channels_last
from pixnorm.ops.modulate import modulate_bwd_fake, modulate_fwd_fake
from pixnorm.triton_kernels.common import accumulator, launch, op_of_kernels, power_of_two_from, wrap_triton
from pixnorm.triton_kernels.modulate_resident import modulate_bwd_resident_kernel, modulate_fwd_resident_kernel
from pixnorm.triton_kernels.modulate_stream import (
    modulate_bwd_apply_kernel,
    modulate_bwd_finish_kernel,
    modulate_bwd_reduce_kernel,
    modulate_fwd_kernel,
)
from pixnorm.triton_kernels.statistics import finish_statistics, partial_statistics
from pixnorm.triton_kernels.tiles import WARPS, Tiling

# Elements of planes that stay in registers, at most: of x, in backward also of its gradient; fewer beside maps.
RESIDENT, RESIDENT_BACKWARD_OF_MAPS = 16384, 8192
# Partial statistics of its channels that a program merges itself, at most: three numbers each, in all fewer than a tile
# has. And how many of a channel at once.
MERGED, MERGED_AT_ONCE = 512, 32
# Parts, samples and channels that the kernel which adds partial sums up reads at once.
SUMS, CHANNELS_OF_SUMS = 32, 16


def _arguments(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    instance: bool,
    gamma_offset: float,
    upsample: int,
    negative_slope: float | None,
    tiling: Tiling,
) -> dict[str, Any]:
    """What the kernels that stream over x have in common."""
    _, c, h, w = x.shape
    return {
        "x_ptr": x,
        "gamma_ptr": x if gamma is None else gamma,  # not read
        "beta_ptr": x if beta is None else beta,
        "mean_ptr": mean,
        "var_ptr": var,
        "C": c,
        "pixels": h * w,
        "W": w,
        "parts": tiling.parts,
        "tiles": tiling.tiles,
        "EPS": eps,
        "OFFSET": gamma_offset,
        "AFFINE": 0 if gamma is None else gamma.dim(),
        "INSTANCE": instance,
        "U": upsample,
        "ACTIVATED": negative_slope is not None,
        "SLOPE": negative_slope or 0.0,
        "LAST": is_channels_last(x),
        "V": tiling.columns,
        "CHANNELS": tiling.channels,
        "PIXELS": tiling.pixels,
        "num_warps": tiling.warps,
    }


def _dense_affine(x: Tensor, *affine: Tensor | None) -> list[Tensor | None]:
    return [t if t is None else dense(t, x) if t.dim() == 4 else t.contiguous() for t in affine]


def modulate_fwd(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    instance: bool,
    gamma_offset: float,
    upsample: int,
    negative_slope: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward op of modulated norm, see pixnorm/ops/modulate.py."""
    upsample = int(upsample)  # traced with dynamic shapes, it is not one
    x = dense(x, x)
    n, c = x.shape[:2]
    shape = (n, c) if instance else (c,)
    y = dense_like(x, upsample)
    planes = Tiling.of_planes(x, RESIDENT) if instance and upsample == 1 else None
    tiling = planes or Tiling.of(x, upsample)
    partials = None
    if mean is not None:
        used = [s.to(accumulator(x), copy=True).contiguous() for s in (mean, var)]
    elif x.numel() == 0:
        used = [x.new_zeros(shape, dtype=accumulator(x)) for _ in range(2)]
    else:
        partials = None if planes else partial_statistics([x], instance)
        if partials is not None and (instance or partials.shape[2] * tiling.channels > MERGED):
            used, partials = [t.view(shape) for t in finish_statistics(partials)], None
        else:
            used = [torch.empty(shape, dtype=accumulator(x), device=x.device) for _ in range(2)]
    if x.numel() == 0:
        return y, *used
    gamma, beta = _dense_affine(x, gamma, beta)
    arguments = _arguments(x, gamma, beta, *used, eps, instance, gamma_offset, upsample, negative_slope, tiling)
    if planes:
        launch(wrap_triton(modulate_fwd_resident_kernel), (tiling.programs,), y_ptr=y, **arguments)
    else:
        launch(
            wrap_triton(modulate_fwd_kernel),
            (tiling.programs,),
            y_ptr=y,
            partials_ptr=x if partials is None else partials,  # not read
            partials=0 if partials is None else partials.shape[2],
            PARTS=0 if partials is None else min(MERGED_AT_ONCE, MERGED // tiling.channels),
            **arguments,
        )
    return y, *used


def modulate_bwd(
    grad_y: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    instance: bool,
    gamma_offset: float,
    upsample: int,
    negative_slope: float | None,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward op of modulated norm, see pixnorm/ops/modulate.py."""
    upsample = int(upsample)
    x = dense(x, x)
    n, c, h, w = x.shape
    dx = dense_like(x)
    wanted = gamma, beta
    gamma, beta = _dense_affine(x, gamma, beta)
    maps = gamma is not None and gamma.dim() == 4
    if gamma is None:
        grads = [torch.empty((0,), dtype=x.dtype, device=x.device) for _ in range(2)]
    elif maps:
        grads = [dense_like(x, upsample) for _ in range(2)]
    else:
        grads = [torch.empty(gamma.shape, dtype=gamma.dtype, device=x.device) for _ in range(2)]
    if x.numel() == 0:
        return dx, *(_as_fake(torch.zeros_like(grad), of) for grad, of in zip(grads, wanted, strict=True))
    grad_y = dense(grad_y, x)
    mean, var = mean.contiguous(), var.contiguous()
    planes = (
        Tiling.of_planes(x, RESIDENT_BACKWARD_OF_MAPS if maps else RESIDENT) if instance and upsample == 1 else None
    )
    tiling = planes or Tiling.of(x, upsample)
    arguments = _arguments(x, gamma, beta, mean, var, eps, instance, gamma_offset, upsample, negative_slope, tiling)
    if planes:
        vectors = gamma is not None and gamma.dim() == 1
        of_planes = [torch.empty((n, c), dtype=mean.dtype, device=x.device) for _ in range(2)] if vectors else grads
        launch(
            wrap_triton(modulate_bwd_resident_kernel),
            (tiling.programs,),
            dy_ptr=grad_y,
            d_gamma_ptr=of_planes[0],
            d_beta_ptr=of_planes[1],
            dx_ptr=dx,
            **arguments,
        )
        if vectors:
            grads = [grad.sum(0).to(of.dtype) for grad, of in zip(of_planes, grads, strict=True)]
        return dx, *(_as_fake(grad, of) for grad, of in zip(grads, wanted, strict=True))
    sums = torch.empty((n, tiling.parts, 2, c), dtype=mean.dtype, device=x.device)
    launch(
        wrap_triton(modulate_bwd_reduce_kernel),
        (tiling.programs,),
        dy_ptr=grad_y,
        d_gamma_ptr=grads[0] if maps else mean,  # not written
        d_beta_ptr=grads[1] if maps else mean,
        sums_ptr=sums,
        **arguments,
    )
    means = torch.empty((n if instance else 1, 2, c), dtype=mean.dtype, device=x.device)
    parts = min(SUMS, power_of_two_from(tiling.parts))
    channels = min(CHANNELS_OF_SUMS, power_of_two_from(c))
    rows = gamma is not None and not maps
    launch(
        wrap_triton(modulate_bwd_finish_kernel),
        (triton.cdiv(c, channels),),
        sums_ptr=sums,
        gamma_ptr=arguments["gamma_ptr"],
        d_gamma_ptr=grads[0] if rows else mean,
        d_beta_ptr=grads[1] if rows else mean,
        means_ptr=means,
        N=n,
        C=c,
        parts=tiling.parts,
        count=h * w if instance else n * h * w,
        OFFSET=gamma_offset,
        AFFINE=arguments["AFFINE"],
        INSTANCE=instance,
        SAMPLES=SUMS // parts,
        PARTS=parts,
        CHANNELS=channels,
        num_warps=WARPS,
    )
    launch(
        wrap_triton(modulate_bwd_apply_kernel),
        (tiling.programs,),
        dy_ptr=grads[1] if maps else grad_y,
        means_ptr=means,
        dx_ptr=dx,
        CENTRED=training or instance,
        **(arguments | {"ACTIVATED": arguments["ACTIVATED"] and not maps}),
    )
    return dx, *(_as_fake(grad, of) for grad, of in zip(grads, wanted, strict=True))


def _as_fake(grad: Tensor, of: Tensor | None) -> Tensor:
    """The gradient of a map in the layout of the map; the kernels write it in that of x."""
    return grad if of is None or of.dim() != 4 else dense(grad, of)


modulate_fwd_triton = op_of_kernels("pixnorm::modulate_fwd_triton", mutates_args=())(modulate_fwd)
modulate_bwd_triton = op_of_kernels("pixnorm::modulate_bwd_triton", mutates_args=())(modulate_bwd)
# Shapes, dtypes and strides are those of the native ops.
modulate_fwd_triton.register_fake(modulate_fwd_fake)
modulate_bwd_triton.register_fake(modulate_bwd_fake)
