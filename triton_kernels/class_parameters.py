"""The parameters of the classes of a batch on any GPU that Triton reaches: ``pixnorm::class_parameters_fwd_triton`` and
``pixnorm::class_parameters_grad_triton``, with the schemas of ``class_parameters_fwd`` and ``class_parameters_grad``
(pixnorm/ops/class_parameters.py).

Tensors are small, so what counts is the number of launches, one forward and two backward. A class out of range is
clamped, as looking at it would wait for the GPU.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixnorm.ops.class_parameters import class_parameters_fwd_fake, class_parameters_grad_fake
from pixnorm.triton_kernels.common import launch, op_of_kernels, power_of_two_from, to_accumulator, wrap_triton

CHANNELS, WARPS = 16, 4  # channels per program; with the 16 lanes of 9 taps, two elements per thread
NOT_SPECIALISED = ["groups", "classes", "C", "masks"]


@triton.jit
def class_of(classes_ptr, group, classes):
    return tl.minimum(tl.maximum(tl.load(classes_ptr + group), 0), classes - 1)


@triton.jit
def taps_of(c, C, TAPS: tl.constexpr, LANES: tl.constexpr):
    """Where the taps of channels are in a kernel (C, TAPS), and which exist."""
    tap = tl.arange(0, LANES)
    return c[:, None] * TAPS + tap[None, :], (c < C)[:, None] & (tap < TAPS)[None, :]


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def class_parameters_fwd_kernel(
    classes_ptr, mask_weight_ptr, mask_bias_ptr, gamma_ptr, gamma_inv_ptr, beta_ptr, beta_inv_ptr, scale_ptr, shift_ptr,
    to_mask_weight_ptr, to_mask_bias_ptr, to_gamma_ptr, to_gamma_inv_ptr, to_beta_ptr, to_beta_inv_ptr,
    groups, classes, C, masks,
    TAPS: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Some channels of one group."""
    group = tl.program_id(0).to(tl.int64)
    of_class = class_of(classes_ptr, group, classes)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_mask = c < masks
    tables = (mask_weight_ptr, mask_bias_ptr)
    to_tables = (to_mask_weight_ptr, to_mask_bias_ptr)
    for i in tl.static_range(2):
        values = tl.load(tables[i] + of_class * masks + c, mask=is_mask)
        tl.store(to_tables[i] + group * masks + c, values, mask=is_mask)
    at, exists = taps_of(c, C, TAPS, LANES)
    kernels = (gamma_ptr, gamma_inv_ptr, beta_ptr, beta_inv_ptr)
    to_kernels = (to_gamma_ptr, to_gamma_inv_ptr, to_beta_ptr, to_beta_inv_ptr)
    for i in tl.static_range(4):
        row = (of_class * 4 + i) * C + c
        scale = to_accumulator(tl.load(scale_ptr + row, mask=c < C, other=0.0), scale_ptr)
        shift = to_accumulator(tl.load(shift_ptr + row, mask=c < C, other=0.0), scale_ptr)
        weight = to_accumulator(tl.load(kernels[i] + at, mask=exists, other=0.0), scale_ptr)
        kernel = scale[:, None] * weight + shift[:, None]
        tl.store(to_kernels[i] + group * (C * TAPS) + at, kernel.to(scale_ptr.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def class_parameters_tables_kernel(
    classes_ptr, d_mask_weight_ptr, d_mask_bias_ptr, d_gamma_ptr, d_gamma_inv_ptr, d_beta_ptr, d_beta_inv_ptr,
    gamma_ptr, gamma_inv_ptr, beta_ptr, beta_inv_ptr,
    to_mask_weight_ptr, to_mask_bias_ptr, to_scale_ptr, to_shift_ptr, groups, classes, C, masks,
    TAPS: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradients of the tables, for some channels of one class: sums over its groups."""
    of_class = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    at, exists = taps_of(c, C, TAPS, LANES)
    grads = (d_gamma_ptr, d_gamma_inv_ptr, d_beta_ptr, d_beta_inv_ptr)
    kernels = (gamma_ptr, gamma_inv_ptr, beta_ptr, beta_inv_ptr)
    zero = to_accumulator(tl.zeros([CHANNELS], dtype=tl.float32), to_scale_ptr)
    for i in tl.static_range(4):
        weight = to_accumulator(tl.load(kernels[i] + at, mask=exists, other=0.0), to_scale_ptr)
        of_scale = zero
        of_shift = zero
        for group in range(0, groups):
            if class_of(classes_ptr, group, classes) == of_class:
                grad = tl.load(grads[i] + tl.cast(group, tl.int64) * (C * TAPS) + at, mask=exists, other=0.0)
                d = to_accumulator(grad, to_scale_ptr)
                of_scale += tl.sum(d * weight, axis=1)
                of_shift += tl.sum(d, axis=1)
        row = (of_class * 4 + i) * C + c
        tl.store(to_scale_ptr + row, of_scale.to(to_scale_ptr.dtype.element_ty), mask=c < C)
        tl.store(to_shift_ptr + row, of_shift.to(to_scale_ptr.dtype.element_ty), mask=c < C)
    grads_of_masks = (d_mask_weight_ptr, d_mask_bias_ptr)
    to_masks = (to_mask_weight_ptr, to_mask_bias_ptr)
    for i in tl.static_range(2):
        total = zero
        for group in range(0, groups):
            if class_of(classes_ptr, group, classes) == of_class:
                row = tl.cast(group, tl.int64) * masks + c
                total += to_accumulator(tl.load(grads_of_masks[i] + row, mask=c < masks, other=0.0), to_scale_ptr)
        tl.store(to_masks[i] + of_class * masks + c, total.to(to_scale_ptr.dtype.element_ty), mask=c < masks)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def class_parameters_kernels_kernel(
    classes_ptr, d_gamma_ptr, d_gamma_inv_ptr, d_beta_ptr, d_beta_inv_ptr, scale_ptr,
    to_gamma_ptr, to_gamma_inv_ptr, to_beta_ptr, to_beta_inv_ptr, groups, classes, C,
    TAPS: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradients of the kernels, for some channels: sums over all groups."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    at, exists = taps_of(c, C, TAPS, LANES)
    grads = (d_gamma_ptr, d_gamma_inv_ptr, d_beta_ptr, d_beta_inv_ptr)
    to_kernels = (to_gamma_ptr, to_gamma_inv_ptr, to_beta_ptr, to_beta_inv_ptr)
    for i in tl.static_range(4):
        total = to_accumulator(tl.zeros([CHANNELS, LANES], dtype=tl.float32), scale_ptr)
        for group in range(0, groups):
            row = (class_of(classes_ptr, group, classes) * 4 + i) * C + c
            scale = to_accumulator(tl.load(scale_ptr + row, mask=c < C, other=0.0), scale_ptr)
            grad = tl.load(grads[i] + tl.cast(group, tl.int64) * (C * TAPS) + at, mask=exists, other=0.0)
            total += scale[:, None] * to_accumulator(grad, scale_ptr)
        tl.store(to_kernels[i] + at, total.to(scale_ptr.dtype.element_ty), mask=exists)


def _options(classes: Tensor, mask_weight: Tensor, kernel: Tensor) -> dict[str, int]:
    taps = kernel.shape[-1] ** 2
    options = {"groups": classes.shape[0], "classes": mask_weight.shape[0], "C": kernel.shape[0], "TAPS": taps}
    return options | {"LANES": power_of_two_from(taps), "CHANNELS": CHANNELS, "num_warps": WARPS}


def class_parameters_fwd(
    classes: Tensor,
    mask_weight: Tensor,
    mask_bias: Tensor,
    gamma_weight: Tensor,
    gamma_weight_inv: Tensor,
    beta_weight: Tensor,
    beta_weight_inv: Tensor,
    kernel_scale: Tensor,
    kernel_shift: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward op, see pixnorm/ops/class_parameters.py."""
    tables = mask_weight, mask_bias
    kernels = gamma_weight, gamma_weight_inv, beta_weight, beta_weight_inv
    groups, masks = classes.shape[0], mask_weight.shape[1]
    to_tables = [torch.empty((groups, masks), dtype=t.dtype, device=t.device) for t in tables]
    to_kernels = [torch.empty((groups, *t.shape), dtype=t.dtype, device=t.device) for t in kernels]
    if groups:
        launch(
            wrap_triton(class_parameters_fwd_kernel),
            (groups, triton.cdiv(gamma_weight.shape[0], CHANNELS)),
            classes_ptr=classes.contiguous(),
            **named("{}_ptr", tables, kernels),
            scale_ptr=kernel_scale.contiguous(),
            shift_ptr=kernel_shift.contiguous(),
            **named("to_{}_ptr", to_tables, to_kernels),
            masks=masks,
            **_options(classes, mask_weight, gamma_weight),
        )
    return *to_tables, *to_kernels


def class_parameters_grad(
    grad_mask_weight: Tensor,
    grad_mask_bias: Tensor,
    grad_gamma_weight: Tensor,
    grad_gamma_weight_inv: Tensor,
    grad_beta_weight: Tensor,
    grad_beta_weight_inv: Tensor,
    classes: Tensor,
    mask_weight: Tensor,
    mask_bias: Tensor,
    gamma_weight: Tensor,
    gamma_weight_inv: Tensor,
    beta_weight: Tensor,
    beta_weight_inv: Tensor,
    kernel_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients, see pixnorm/ops/class_parameters.py."""
    kernels = gamma_weight, gamma_weight_inv, beta_weight, beta_weight_inv
    grads = grad_gamma_weight, grad_gamma_weight_inv, grad_beta_weight, grad_beta_weight_inv
    to_tables = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (mask_weight, mask_bias)]
    to_kernels = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in kernels]
    to_scale, to_shift = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (kernel_scale, kernel_scale))
    options = _options(classes, mask_weight, gamma_weight)
    blocks = triton.cdiv(gamma_weight.shape[0], CHANNELS)
    classes = classes.contiguous()
    launch(
        wrap_triton(class_parameters_tables_kernel),
        (mask_weight.shape[0], blocks),
        classes_ptr=classes,
        **named("d_{}_ptr", (grad_mask_weight, grad_mask_bias), grads),
        **named("{}_ptr", (), kernels),
        **named("to_{}_ptr", to_tables, ()),
        to_scale_ptr=to_scale,
        to_shift_ptr=to_shift,
        masks=mask_weight.shape[1],
        **options,
    )
    launch(
        wrap_triton(class_parameters_kernels_kernel),
        (blocks,),
        classes_ptr=classes,
        **named("d_{}_ptr", (), grads),
        scale_ptr=kernel_scale.contiguous(),
        **named("to_{}_ptr", (), to_kernels),
        **options,
    )
    return *to_tables, *to_kernels, to_scale, to_shift


def named(form: str, tables: Sequence[Tensor], kernels: Sequence[Tensor]) -> dict[str, Tensor]:
    """The kernels' arguments for the mask's tables (or none) and for the depthwise kernels (or none)."""
    found = dict(zip(("mask_weight", "mask_bias"), tables, strict=False))
    found |= zip(("gamma", "gamma_inv", "beta", "beta_inv"), kernels, strict=False)
    return {form.format(name): tensor.contiguous() for name, tensor in found.items()}


class_parameters_fwd_triton = op_of_kernels("pixnorm::class_parameters_fwd_triton", mutates_args=())(
    class_parameters_fwd
)
class_parameters_grad_triton = op_of_kernels("pixnorm::class_parameters_grad_triton", mutates_args=())(
    class_parameters_grad
)
# Shapes, dtypes and strides are those of the native ops.
class_parameters_fwd_triton.register_fake(class_parameters_fwd_fake)
class_parameters_grad_triton.register_fake(class_parameters_grad_fake)
