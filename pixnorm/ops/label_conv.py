r"""The convolution of a one-hot label map, as a gather:

    conv2d(one_hot(labels), W)[n, o, p] = Σ_t W[o, labels[n, p + t], t]

k² additions per output in place of k² L multiply-adds, and the one-hot tensor, L channels at full resolution, never
exists. The gradient of W is a segmented sum of the output's gradient by label.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pixnorm.ops._dispatch import choose, define_op
from pixnorm.ops.checks import check_device, check_floating, check_option, check_shape
from pixnorm.ops.common import (
    activate,
    like_parameter,
    onlooker,
    public,
    reference_grads,
    slope_of,
    through_reference,
    triton_ops,
)

ACTIVATIONS = (None, "relu")


def label_conv2d_reference(
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    """Label convolution in plain PyTorch: the specification. Arguments as in :func:`label_conv2d`."""
    kept = torch.where(labels == ignore_index, weight.shape[1], labels) if ignore_index is not None else labels
    # Not F.one_hot, which transforms and the compiler cannot trace.
    classes = torch.arange(weight.shape[1], device=labels.device)
    one_hot = (kept[:, None] == classes[:, None, None]).to(weight.dtype)
    y = F.conv2d(one_hot, weight, bias, padding=weight.shape[-1] // 2)
    return activate(y, activation, 0.0)


# `ignore` is a label that adds nothing, -1 for none.
def label_conv_fwd_fake(labels, weight, bias, ignore, negative_slope):
    n, h, w = labels.shape
    return weight.new_empty((n, weight.shape[0], h, w))


def label_conv_grad_fake(grad_y, labels, weight, y, has_bias, ignore, negative_slope):
    return weight.new_empty(weight.shape), weight.new_empty((weight.shape[0] if has_bias else 0,))


label_conv_fwd = define_op(
    "label_conv_fwd(Tensor labels, Tensor weight, Tensor? bias, int ignore, float? negative_slope) -> Tensor y",
    label_conv_fwd_fake,
    native=("cpu",),
    triton="label_conv",
)
# It has no gradient of its first argument, so it is not named as the backward ops of the OpSpecs are.
label_conv_grad = define_op(
    "label_conv_grad(Tensor grad_y, Tensor labels, Tensor weight, Tensor? y, bool has_bias, int ignore, "
    "float? negative_slope) -> (Tensor grad_weight, Tensor grad_bias)",
    label_conv_grad_fake,
    native=("cpu",),
    triton="label_conv",
)


def ops_of(impl: str):
    """The forward op and that of the weight's gradient of an impl."""
    return triton_ops("label_conv", "grad") if impl == "triton" else (label_conv_fwd, label_conv_grad)


class LabelConvFunction(torch.autograd.Function):
    """Saves labels, the weight and, with an activation, y."""

    @staticmethod
    def forward(ctx, impl, ignore, negative_slope, labels, weight, bias):
        forward, ctx.backward_op = ops_of(impl)
        y = forward(labels, weight, bias, ignore, negative_slope)
        ctx.options = ignore, negative_slope, bias is not None
        ctx.save_for_backward(labels, weight, bias, y if negative_slope is not None else None)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        ignore, negative_slope, has_bias = ctx.options
        labels, weight, bias, y = ctx.saved_tensors
        if through_reference():
            options = {"activation": None if negative_slope is None else "relu"}
            options["ignore_index"] = ignore if ignore >= 0 else None

            def reference(weight, bias):
                return label_conv2d_reference(labels, weight, bias, **options)

            grads = reference_grads(reference, (weight, bias), grad_y, ctx.needs_input_grad[4:])
        else:
            found = ctx.backward_op(grad_y, labels, weight, y, has_bias, ignore, negative_slope)
            grads = [like_parameter(found[0], weight), found[1] if has_bias else None]
        return None, None, None, None, *grads


@public
def label_conv2d(
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    ignore_index: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """``F.conv2d(one_hot(labels), weight, bias, padding=k // 2)`` without the one-hot tensor, with "same" zero padding.

    Args:
        labels: (N, H, W) of int64, in [0, L).
        weight: (O, L, k, k), k odd; floating point.
        bias: (O,), in the weight's dtype.
        activation: None or ``"relu"``.
        ignore_index: a label, in [0, L) or not, that adds nothing, as zeros in the one-hot tensor do (255 in many data
            sets).
        impl: ``"auto"``, ``"native"`` (CPU), ``"triton"`` (GPUs) or ``"reference"``.

    Returns:
        (N, O, H, W), contiguous, in the weight's dtype.

    Raises:
        ValueError: wrong rank, shape or option; labels out of range (on the CPU; on a GPU, where looking would wait for
            it, they add nothing).
        TypeError: labels are not int64, or dtypes do not fit.
    """
    if labels.dim() != 3:
        raise ValueError(f"expected 3D labels (N, H, W), got {labels.dim()}D")
    if labels.dtype != torch.int64:
        raise TypeError(f"expected labels of torch.int64, got {labels.dtype}")
    check_floating(weight, "weight")
    check_option("activation", activation, ACTIVATIONS)
    k = weight.shape[-1] if weight.dim() == 4 else 0
    if weight.dim() != 4 or weight.shape[2] != k or k % 2 == 0:
        raise ValueError(f"weight must have shape (O, L, k, k) with odd k, got {tuple(weight.shape)}")
    check_device("weight", weight, labels, "labels")
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],), weight, "a weight")
        check_device("bias", bias, labels, "labels")
        if bias.dtype != weight.dtype:
            raise TypeError(f"expected a bias of dtype {weight.dtype}, got {bias.dtype}")
    check_labels(labels, weight.shape[1], ignore_index)
    chosen = choose("label_conv", impl, labels.device, {})
    if chosen == "reference":
        return label_conv2d_reference(labels, weight, bias, activation=activation, ignore_index=ignore_index)
    ignore = -1 if ignore_index is None else ignore_index
    slope = slope_of(activation, 0.0)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (weight, bias)):
        return LabelConvFunction.apply(chosen, ignore, slope, labels, weight, bias)
    return ops_of(chosen)[0](labels, weight, bias, ignore, slope)


def check_labels(labels: Tensor, classes: int, ignore_index: int | None = None) -> None:
    """Labels are in [0, classes), or the ignored one; looked at on the CPU alone (on a GPU it would wait for it), and
    not for tracers and transforms.

    Raises:
        ValueError: they are not.
    """
    looks = labels.device.type == "cpu" and not torch.compiler.is_compiling() and onlooker() is None
    if not looks or not labels.numel():
        return
    if ignore_index is not None:
        labels = labels[labels != ignore_index]
        if not labels.numel():
            return
    low, high = labels.aminmax()
    if low < 0 or high >= classes:
        raise ValueError(f"labels must be in [0, {classes}), got labels from {low} to {high}")
