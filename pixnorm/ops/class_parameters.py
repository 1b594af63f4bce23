r"""The parameters of conditional SPN for the classes in a batch: the mask's scale and shift, and depthwise kernels as a
conditional convolution has them (cConv, arXiv 1906.00709, with one input channel):

    w_y[c] = scale[y, c] · w[c] + shift[y, c]          the shift is added to all taps

for the four kernels at once. They are small, so in PyTorch's operations, whose number is what they cost, they and their
gradients take a tenth of the layer's time at 64 x 256 x 8 x 8. Hence one op.
"""

import torch
from torch import Tensor

from pixnorm.ops._dispatch import choose, define_op
from pixnorm.ops.common import like_parameter, reference_grads, through_reference, triton_ops

_NAMES = ("mask_weight", "mask_bias", "gamma_weight", "gamma_weight_inv", "beta_weight", "beta_weight_inv")
_LEARNT = ", ".join(f"Tensor {name}" for name in (*_NAMES, "kernel_scale"))


def class_parameters_reference(classes: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """In plain PyTorch: the specification. Arguments as in :func:`class_parameters`."""
    mask_weight, mask_bias, *kernels, scale, shift = tensors
    scales, shifts = (table[classes][..., None, None, None].unbind(1) for table in (scale, shift))
    kernels = [torch.addcmul(*of) for of in zip(shifts, scales, kernels, strict=True)]
    return mask_weight[classes], mask_bias[classes], *kernels


def class_parameters_fwd_fake(classes, mask_weight, mask_bias, *tensors):
    groups, masks = classes.shape[0], mask_weight.shape[1]
    rows = [table.new_empty((groups, masks)) for table in (mask_weight, mask_bias)]
    return *rows, *[kernel.new_empty((groups, *kernel.shape)) for kernel in tensors[:4]]


def class_parameters_grad_fake(*args):
    learnt = args[7:]
    return tuple([t.new_empty(t.shape) for t in (*learnt, learnt[-1])])


class_parameters_fwd = define_op(
    f"class_parameters_fwd(Tensor classes, {_LEARNT}, Tensor kernel_shift) "
    f"-> ({', '.join(f'Tensor {name}' for name in _NAMES)})",
    class_parameters_fwd_fake,
    native=("cpu",),
    triton="class_parameters",
)
# It has no gradient of its first argument, so it is not named as the backward ops of the OpSpecs are.
class_parameters_grad = define_op(
    f"class_parameters_grad({', '.join(f'Tensor grad_{name}' for name in _NAMES)}, Tensor classes, "
    f"{_LEARNT}) "
    f"-> ({', '.join(f'Tensor {name}' for name in (*_NAMES, 'kernel_scale', 'kernel_shift'))})",
    class_parameters_grad_fake,
    native=("cpu",),
    triton="class_parameters",
)


def ops_of(impl: str):
    """The forward and the backward op of an impl."""
    return triton_ops("class_parameters", "grad") if impl == "triton" else (class_parameters_fwd, class_parameters_grad)


class ClassParametersFunction(torch.autograd.Function):
    """Saves its arguments."""

    @staticmethod
    def forward(ctx, impl, classes, *tensors):
        forward, ctx.backward_op = ops_of(impl)
        ctx.save_for_backward(classes, *tensors)
        return forward(classes, *tensors)

    @staticmethod
    def backward(ctx, *grads):
        classes, *tensors = ctx.saved_tensors
        if through_reference():

            def flat(tensors):
                return torch.cat([t.flatten() for t in tensors])

            def reference(*tensors):
                return flat(class_parameters_reference(classes, *tensors))

            grads = reference_grads(reference, tensors, flat(grads), ctx.needs_input_grad[2:])
        else:
            grads = map(like_parameter, ctx.backward_op(*grads, classes, *tensors[:-1]), tensors)
        return None, None, *grads


def class_parameters(classes: Tensor, *tensors: Tensor, impl: str = "auto") -> tuple[Tensor, ...]:
    """The parameters of some classes, for :func:`pixnorm.functional.conditional_spn`. The layer has checked all shapes.

    Args:
        classes: (G,) of int64 in [0, K), also repeated.
        tensors: of one dtype: the mask's scale and shift (K, Cm); the four kernels (C, 1, k, k); their scale and shift
            (K, 4, C), in the order of the kernels.
        impl: as in ``conditional_spn``.

    Returns:
        the mask's scale and shift (G, Cm), and four kernels (G, C, 1, k, k).
    """
    chosen = choose("class_parameters", impl, classes.device, {})
    if chosen == "reference":
        return class_parameters_reference(classes, *tensors)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return ClassParametersFunction.apply(chosen, classes, *tensors)
    return ops_of(chosen)[0](classes, *tensors)
