"""SPN on any GPU that Triton reaches: the ops ``pixnorm::spn_fwd_triton`` and ``pixnorm::spn_bwd_triton``.

They have the schemas of ``spn_fwd`` and ``spn_bwd`` (pixnorm/ops/spn.py, where the equations are). torch.compile traces
through them to the kernels and to PyTorch's convolutions. Backward is in spn_backward.py.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixnorm.ops.common import dense, dense_like, is_channels_last
from pixnorm.ops.spn import spn_bwd_fake, spn_fwd_fake
from pixnorm.triton_kernels.common import (
    SIZES,
    Walk,
    accumulator,
    activated,
    launch,
    load_columns,
    op_of_kernels,
    power_of_two_from,
    record,
    store_columns,
    walk_of,
    wrap_triton,
)
from pixnorm.triton_kernels.projection import add_backward, grad_weight, project
from pixnorm.triton_kernels.spn_backward import spn_bwd_apply_kernel, spn_bwd_reduce_kernel
from pixnorm.triton_kernels.spn_finish import spn_bwd_finish_kernel, spn_bwd_finish_rows_kernel
from pixnorm.triton_kernels.spn_rows import (
    META_FIELDS,
    PARAMETER_FIELDS,
    SIZE_FIELDS,
    apply_stencil,
    functions_of,
    inside_sums,
    lane_of,
    mask_row,
    masks_from,
    parameters_of_sample,
    planes_of,
    rows_around,
)
from pixnorm.triton_kernels.statistics import finish_statistics, partial_statistics


class Blocks(NamedTuple):
    """Block sizes of a kernel, for a layout (channels_last or not) and upsampling.

    Attributes:
        columns: of x per lane, for elements of 8, 4 and 2 bytes.
        warps: per program.
        columns_of_five: columns per lane at most, for k = 5.
    """

    columns: dict[int, int]
    warps: int
    columns_of_five: int


MODULATE = {
    # NCHW: vectors of 16 bytes, of y, and without upsampling of x.
    (False, 1): Blocks({8: 2, 4: 4, 2: 8}, warps=4, columns_of_five=2),
    (False, 2): Blocks({8: 1, 4: 2, 2: 4}, warps=4, columns_of_five=2),
    # channels_last: each lane reads the neighbours that it needs itself, two to six for four columns of its own.
    (True, 1): Blocks({8: 2, 4: 4, 2: 4}, warps=4, columns_of_five=2),
    (True, 2): Blocks({8: 1, 4: 2, 2: 2}, warps=4, columns_of_five=2),
}
REDUCE = {
    # One warp reduces by shuffles alone. In float64 the registers for sums leave room for one column.
    (False, 1): Blocks({8: 1, 4: 4, 2: 8}, warps=1, columns_of_five=1),
    (False, 2): Blocks({8: 1, 4: 2, 2: 4}, warps=1, columns_of_five=1),
    # Four warps with 32 channels each: with one, writing partial sums would cost a third of a pass over x.
    (True, 1): Blocks({8: 1, 4: 4, 2: 4}, warps=4, columns_of_five=1),
    (True, 2): Blocks({8: 1, 4: 2, 2: 2}, warps=4, columns_of_five=1),
}
APPLY = {
    (False, 1): Blocks({8: 2, 4: 4, 2: 8}, warps=4, columns_of_five=1),
    (False, 2): Blocks({8: 1, 4: 2, 2: 4}, warps=4, columns_of_five=1),
    (True, 1): Blocks({8: 1, 4: 4, 2: 4}, warps=4, columns_of_five=1),
    (True, 2): Blocks({8: 1, 4: 2, 2: 2}, warps=4, columns_of_five=1),
}


@triton.jit(do_not_specialize=SIZES)
def spn_fwd_modulate_kernel(
    x_ptr, p_ptr, y_ptr, mean_ptr, var_ptr, mask_mean_ptr, mask_var_ptr, mask_weight_ptr, mask_bias_ptr,
    gamma_ptr, gamma_inv_ptr, beta_ptr, beta_inv_ptr, gamma_bias_ptr, beta_bias_ptr, index_ptr,
    N, C, H, W, G, rows, strips,
    EPS: tl.constexpr, K: tl.constexpr, U: tl.constexpr, ACTIVATED: tl.constexpr, SLOPE: tl.constexpr,
    LAST: tl.constexpr, ONE_MASK: tl.constexpr, GROUPED: tl.constexpr, GAMMA_BIAS: tl.constexpr,
    BETA_BIAS: tl.constexpr, V: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y = γ x̂ + β. Lanes walk down the rows of x, and keep the rows of the mask that a stencil needs in registers."""
    REACH: tl.constexpr = (K // 2 + U - 1) // U
    META: tl.constexpr = record(META_FIELDS)(
        K=K, U=U, V=V, REACH=REACH, AROUND=0, HALO=REACH, LANES=LANES, CHANNELS=CHANNELS, LAST=LAST,
        ONE_MASK=ONE_MASK, WIDE=not LAST, P_WIDE=ONE_MASK or not LAST, ACTIVATED=ACTIVATED, SLOPE=SLOPE, EPS=EPS,
        GROUPED=GROUPED, GAMMA_BIAS=GAMMA_BIAS, BETA_BIAS=BETA_BIAS,
    )  # fmt: skip
    size = record(SIZE_FIELDS)(N, C, H, W, G, rows, strips)
    parameters = record(PARAMETER_FIELDS)(
        mean_ptr, var_ptr, mask_mean_ptr, mask_var_ptr, mask_weight_ptr, mask_bias_ptr,
        gamma_ptr, gamma_inv_ptr, beta_ptr, beta_inv_ptr, gamma_bias_ptr, beta_bias_ptr, index_ptr,
    )  # fmt: skip
    lane = lane_of(size, META)
    parameters = parameters_of_sample(parameters, lane, size, META)
    x_plane, y_plane, p_plane = planes_of(lane, size, META)
    mask, norm, taps = functions_of(p_ptr, p_plane, parameters, lane, META)
    h = lane.h
    masks = masks_from(mask, h - REACH, lane, size, META)
    for _ in range(0, rows):
        masks = masks + (mask_row(mask, h + REACH, lane, size, META),)
        here = lane.live & (h < H)
        x = load_columns(x_ptr, x_plane, h * W + lane.w, here, V, LANES, not LAST)
        inside = rows_around(h, H, META)
        gamma_inside = inside_sums(taps.gamma_inverse, taps.gamma_bias, inside, META)
        beta_inside = inside_sums(taps.beta_inverse, taps.beta_bias, inside, META)
        for a in tl.static_range(U):
            y = ()
            for j in tl.static_range(V):
                for b in tl.static_range(U):
                    g = apply_stencil(taps.gamma, gamma_inside, masks, lane.columns, a, b, j, META)
                    value = apply_stencil(taps.beta, beta_inside, masks, lane.columns, a, b, j, META)
                    value += g * (x[j] * norm.rstd + norm.centre)
                    if ACTIVATED:
                        value = activated(value, SLOPE)
                    y = y + (value,)
            at = (h * U + a) * (W * U) + lane.w * U
            store_columns(y_ptr, y_plane, at, y, here, V * U, LANES, not LAST)
        h += 1
        masks = masks[1:]


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _contiguous_of_samples(
    gamma_bias: Tensor | None, beta_bias: Tensor | None, index: Tensor | None
) -> list[Tensor | None]:
    row = beta_bias if gamma_bias is None else gamma_bias
    if index is None and row is not None:  # one group
        index = torch.zeros(row.shape[:1], dtype=torch.int64, device=row.device)
    return contiguous(gamma_bias, beta_bias, index)


def _arguments(
    x: Tensor,
    p: Tensor,
    statistics: list[Tensor],
    learnt: list[Tensor],
    of_samples: list[Tensor | None],
    eps: float,
    upsample: int,
    negative_slope: float | None,
) -> dict[str, Any]:
    """What the kernels that walk over rows have in common.

    Args:
        statistics: mean, var, mask_mean, mask_var.
        learnt: mask_weight, mask_bias, gamma_weight, gamma_weight_inv, beta_weight, beta_weight_inv.
        of_samples: gamma_bias, beta_bias, index.
    """
    n, c, h, w = x.shape
    gamma_bias, beta_bias, index = of_samples
    names = PARAMETER_FIELDS.value.split()
    parameters = *statistics, *learnt, *(x if t is None else t for t in of_samples)  # x is not read there
    return {
        "x_ptr": x,
        "p_ptr": p,
        **{f"{name}_ptr": tensor for name, tensor in zip(names, parameters, strict=True)},
        "N": n,
        "C": c,
        "H": h,
        "W": w,
        "G": learnt[0].shape[0] if learnt[0].dim() == 2 else 1,
        "EPS": eps,
        "K": learnt[2].shape[-1],
        "U": upsample,
        "ACTIVATED": negative_slope is not None,
        "SLOPE": negative_slope or 0.0,
        "ONE_MASK": learnt[0].shape[-1] != c,
        "GROUPED": index is not None,
        "GAMMA_BIAS": gamma_bias is not None,
        "BETA_BIAS": beta_bias is not None,
    }


def _walk(blocks: dict[tuple[bool, int], Blocks], x: Tensor, upsample: int, k: int, grouped: bool) -> Walk:
    of = blocks[is_channels_last(x), upsample]
    columns = of.columns[x.element_size()]
    return walk_of(x, min(columns, of.columns_of_five) if k == 5 else columns, of.warps, grouped)


def spn_fwd(
    x: Tensor,
    mask_projection: Tensor,
    mask_weight: Tensor,
    mask_bias: Tensor,
    gamma_weight: Tensor,
    gamma_weight_inv: Tensor,
    beta_weight: Tensor,
    beta_weight_inv: Tensor,
    gamma_bias: Tensor | None,
    beta_bias: Tensor | None,
    index: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    mask_mean: Tensor | None,
    mask_var: Tensor | None,
    eps: float,
    upsample: int,
    negative_slope: float | None,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward op of SPN, see pixnorm/ops/spn.py."""
    upsample = int(upsample)  # traced with dynamic shapes, it is not one
    x = dense(x, x)
    c = x.shape[1]
    y = dense_like(x, upsample)
    weight = mask_projection.contiguous().to(x.dtype)
    given = (mean, var, mask_mean, mask_var)
    p, partials = project(x, weight, allow_tf32, mean is None)
    if mean is not None:
        used = [s.to(accumulator(x), copy=True).contiguous() for s in given]
    elif x.numel() == 0:
        used = [x.new_zeros((size,), dtype=accumulator(x)) for size in (c, c, p.shape[1], p.shape[1])]
    elif partials is not None:
        used = finish_statistics(partials)
    elif p.shape == x.shape:
        used = finish_statistics(partial_statistics([x, p]))
    else:
        used = finish_statistics(partial_statistics([x])) + finish_statistics(partial_statistics([p]))
    if x.numel() == 0:
        return y, p, *used
    learnt = contiguous(mask_weight, mask_bias, gamma_weight, gamma_weight_inv, beta_weight, beta_weight_inv)
    of_samples = _contiguous_of_samples(gamma_bias, beta_bias, index)
    arguments = _arguments(x, p, used, learnt, of_samples, eps, upsample, negative_slope)
    walk = _walk(MODULATE, x, upsample, arguments["K"], arguments["GROUPED"])
    launch(
        wrap_triton(spn_fwd_modulate_kernel),
        (walk.programs,),
        y_ptr=y,
        **arguments,
        **walk.options(is_channels_last(x)),
    )
    return y, p, *used


def spn_bwd(
    grad_y: Tensor,
    x: Tensor,
    mask_projection: Tensor,
    mask_weight: Tensor,
    mask_bias: Tensor,
    gamma_weight: Tensor,
    gamma_weight_inv: Tensor,
    beta_weight: Tensor,
    beta_weight_inv: Tensor,
    gamma_bias: Tensor | None,
    beta_bias: Tensor | None,
    index: Tensor | None,
    p: Tensor,
    mean: Tensor,
    var: Tensor,
    mask_mean: Tensor,
    mask_var: Tensor,
    eps: float,
    upsample: int,
    negative_slope: float | None,
    allow_tf32: bool,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The backward op of SPN, see pixnorm/ops/spn.py."""
    upsample = int(upsample)
    x = dense(x, x)
    n, c, h, w = x.shape
    channels_last = is_channels_last(x)
    dx = dense_like(x)
    weight = mask_projection.contiguous().to(x.dtype)
    learnt = contiguous(mask_weight, mask_bias, gamma_weight, gamma_weight_inv, beta_weight, beta_weight_inv)
    new_like = torch.zeros_like if x.numel() == 0 else torch.empty_like
    grads = [new_like(t) for t in learnt]
    of_samples = _contiguous_of_samples(gamma_bias, beta_bias, index)
    of_rows = [mask_projection.new_empty((0,)) if t is None else new_like(t) for t in of_samples[:2]]
    if x.numel() == 0:
        return dx, torch.zeros_like(mask_projection, memory_format=torch.contiguous_format), *grads, *of_rows
    grad_y, p = (dense(t, x) for t in (grad_y, p))
    used = contiguous(mean, var, mask_mean, mask_var)
    arguments = {"dy_ptr": grad_y, **_arguments(x, p, used, learnt, of_samples, eps, upsample, negative_slope)}
    one_mask, k, grouped = (arguments[name] for name in ("ONE_MASK", "K", "GROUPED"))

    walk = _walk(REDUCE, x, upsample, k, grouped)
    parts = walk.parts(c)
    sums = torch.empty((c, parts, 4 * k * k + 2), dtype=used[0].dtype, device=x.device)
    dm = dense_like(x, dtype=used[0].dtype) if one_mask else x
    # In float64, and for 5 x 5 taps, all sums take too many registers: each is computed by one of two programs.
    halves = k == 5 or x.dtype == torch.float64
    launch(
        wrap_triton(spn_bwd_reduce_kernel),
        (walk.programs, 2 if halves else 1),
        sums_ptr=sums,
        dm_ptr=dm,
        parts=parts,
        HALVES=halves,
        **arguments,
        **walk.options(channels_last),
    )
    means = torch.empty((c, 4), dtype=used[0].dtype, device=x.device)
    groups = arguments["G"]
    of_groups = torch.empty((c, groups, 4), dtype=used[0].dtype, device=x.device) if grouped else means
    finishing = {"sums_ptr": sums, "N": n, "C": c, "G": groups, "parts": parts, "count": n * h * w}
    finishing |= {"K": k, "TRAINING": training, "num_warps": 4}
    names = "gamma_ptr", "gamma_inv_ptr", "beta_ptr", "beta_inv_ptr", "mask_weight_ptr", "index_ptr"
    launch(
        wrap_triton(spn_bwd_finish_kernel),
        (c, groups),
        **{name: arguments[name] for name in names},
        d_mask_weight_ptr=grads[0],
        d_mask_bias_ptr=grads[1],
        d_gamma_ptr=grads[2],
        d_gamma_inv_ptr=grads[3],
        d_beta_ptr=grads[4],
        d_beta_inv_ptr=grads[5],
        means_ptr=of_groups,
        ONE_MASK=one_mask,
        GROUPED=grouped,
        PARTS=32,
        SUMS=power_of_two_from(4 * k * k + 2),
        **finishing,
    )
    if grouped:
        launch(
            wrap_triton(spn_bwd_finish_rows_kernel),
            (c,),
            of_groups_ptr=of_groups,
            d_gamma_bias_ptr=of_rows[0],
            d_beta_bias_ptr=of_rows[1],
            means_ptr=means,
            AT_ONCE=32,
            **{name: arguments[name] for name in ("gamma_bias_ptr", "GAMMA_BIAS", "BETA_BIAS")},
            **finishing,
        )
    if one_mask:
        dp, grads[0], grads[1] = _grad_of_one_mask(dm, p, *used[2:], *learnt[:2], of_samples[2], eps, training)
    else:
        dp = dense_like(x)
    walk = _walk(APPLY, x, upsample, k, grouped)
    launch(
        wrap_triton(spn_bwd_apply_kernel),
        (walk.programs,),
        means_ptr=means,
        projection_ptr=weight,
        dx_ptr=dx,
        dp_ptr=dp,
        **arguments,
        **walk.options(channels_last),
    )
    d_weight = grad_weight(dp, x, weight) if one_mask else add_backward(dx, dp, x, weight, allow_tf32)
    return dx, d_weight.to(mask_projection.dtype).contiguous(), *grads, *of_rows


def _grad_of_one_mask(
    dm: Tensor,
    p: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    index: Tensor | None,
    eps: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """From each channel's share of dm: the gradients of p, of its scale and of its shift. All are small tensors."""
    dm = dm.sum(1, keepdim=True)
    rstd = (var + eps).rsqrt()
    p_hat = (p.to(dm.dtype) - mean) * rstd
    scale, shift = weight.to(dm.dtype), bias.to(dm.dtype)
    if index is not None:
        groups = weight.numel()
        index = index.clamp(0, groups - 1)
        scale, shift = (t.view(groups)[index][:, None, None, None] for t in (scale, shift))
    m = torch.sigmoid(p_hat * scale + shift)
    dq = dm * m * (1 - m)
    pixels = dq * p_hat, dq  # whose sums are the gradients of the scale and the shift
    if index is None:
        grads = totals = [t.sum() for t in pixels]
        scale = scale * rstd
    else:
        of_samples = [t.sum((1, 2, 3)) for t in pixels]
        # Not by index_add_, whose order varies on GPUs; not times 0, which would keep NaN.
        belongs = index == torch.arange(groups, device=index.device)[:, None]
        grads = [torch.where(belongs, t, 0.0).sum(1) for t in of_samples]
        totals = [(scale.view(-1) * t).sum() for t in of_samples]
        dq, scale = scale * dq, rstd  # as in spn_bwd_apply_kernel
    dp = dq
    if training:
        count = dq.numel()
        dp = dq - totals[1] / count - p_hat * (totals[0] / count)
    return (dp * scale).to(p.dtype), *(t.reshape(weight.shape).to(weight.dtype) for t in grads)


spn_fwd_triton = op_of_kernels("pixnorm::spn_fwd_triton", mutates_args=())(spn_fwd)
spn_bwd_triton = op_of_kernels("pixnorm::spn_bwd_triton", mutates_args=())(spn_bwd)
# Shapes, dtypes and strides are those of the native ops.
spn_fwd_triton.register_fake(spn_fwd_fake)
spn_bwd_triton.register_fake(spn_bwd_fake)
