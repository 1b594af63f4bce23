r"""SPN, self pixel-wise normalisation, eq. 1-4 of "Image Generation with Self Pixel-wise Normalization"
(arXiv 2201.10725):

    x̂ = (x - μ) / sqrt(σ² + ε)                      μ, σ² per channel over (N, H, W), biased      (eq. 1)
    m = sigmoid(BN_m(conv1x1(x))),   m* = 1 - m     BN_m with scale mask_weight and shift mask_bias
    γ = m ⊛ w_γ + m* ⊛ w_γ*                         depthwise k x k, zero "same" padding           (eq. 2)
    β = m ⊛ w_β + m* ⊛ w_β*                         of m and of m* separately                      (eq. 3)
    y = γ · x̂ + β                                                                                 (eq. 4)

The native kernels never form 1 - m: γ = m ⊛ (w_γ - w_γ*) + K, where K is the sum of the taps of w_γ* that fall inside
the image. The 1x1 convolution has no bias, as BN_m would cancel it.

Conditional SPN (section 3.2, Table 8): each sample has a class, and with it one of G sets of mask_weight, mask_bias and
kernels; rows of numbers for each sample, computed from the noise vector, are added to γ and β. Statistics are those of
the whole batch. One op has both: SPN is one group, without an index and without rows.
"""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from pixnorm.ops._dispatch import choose, define_op
from pixnorm.ops.checks import (
    check_device,
    check_eps,
    check_image,
    check_option,
    check_parameter_dtype,
    check_running_statistics,
    check_several_values,
    check_shape,
)
from pixnorm.ops.common import (
    ACTIVATIONS,
    activate,
    activation_of,
    batch_norm,
    beyond_32_bits,
    call_reference,
    convolutions_allow_tf32,
    dense_like,
    gpu_name,
    is_channels_last,
    like_parameter,
    public,
    reference_grads,
    slope_of,
    through_reference,
    triton_ops,
    wide,
    without_autocast,
)
from pixnorm.ops.modulate import ops_of as norm_ops_of
from pixnorm.ops.statistics import update_running
from pixnorm.ops.synchronised import gradients_of_given, group_of, move_running, statistics_of_all


def spn_reference(
    x: Tensor,
    mask_projection: Tensor,
    mask_weight: Tensor,
    mask_bias: Tensor,
    gamma_weight: Tensor,
    gamma_weight_inv: Tensor,
    beta_weight: Tensor,
    beta_weight_inv: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    mask_running_mean: Tensor | None = None,
    mask_running_var: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    upsample: int = 1,
    activation: str | None = None,
    negative_slope: float = 0.2,
) -> Tensor:
    """SPN in plain PyTorch: the specification. Any device, any order of gradient. Arguments as in :func:`spn`."""
    if upsample == 2:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    channels, k = gamma_weight.shape[0], gamma_weight.shape[-1]
    groups = channels if gamma_weight.shape[1] == 1 else 1  # depthwise; or, in the last row of Table 7, not

    p = F.conv2d(x, mask_projection.to(x.dtype))
    if mask_running_mean is not None:  # may be float32 beside half-precision parameters
        mask_weight, mask_bias = (t.to(mask_running_mean.dtype) for t in (mask_weight, mask_bias))
    q = batch_norm(p, mask_running_mean, mask_running_var, mask_weight, mask_bias, training, momentum, eps)
    m = torch.sigmoid(q)
    m, m_inv = m.expand(-1, channels, -1, -1), (1 - m).expand(-1, channels, -1, -1)

    def convolved(mask: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(mask, weight.to(mask.dtype), padding=k // 2, groups=groups)

    x_hat = batch_norm(x, running_mean, running_var, None, None, training, momentum, eps)
    gamma = convolved(m, gamma_weight) + convolved(m_inv, gamma_weight_inv)
    beta = convolved(m, beta_weight) + convolved(m_inv, beta_weight_inv)
    return activate(gamma * x_hat + beta, activation, negative_slope)


def conditional_spn_reference(
    x: Tensor,
    index: Tensor,
    mask_projection: Tensor,
    mask_weight: Tensor,
    mask_bias: Tensor,
    gamma_weight: Tensor,
    gamma_weight_inv: Tensor,
    beta_weight: Tensor,
    beta_weight_inv: Tensor,
    gamma_bias: Tensor | None = None,
    beta_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    mask_running_mean: Tensor | None = None,
    mask_running_var: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    upsample: int = 1,
    activation: str | None = None,
    negative_slope: float = 0.2,
) -> Tensor:
    """Conditional SPN in plain PyTorch: the specification. Arguments as in :func:`conditional_spn`."""
    if upsample == 2:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    n, channels, h, w = x.shape
    k = gamma_weight.shape[-1]

    def to_pixels(rows: Tensor) -> Tensor:
        return rows.to(x.dtype)[:, :, None, None]

    def depthwise(mask: Tensor, weight: Tensor) -> Tensor:
        """Each sample's masks with the kernels of its group."""
        kernels = weight[index].to(mask.dtype)
        if n == 0:  # PyTorch has no convolution of no groups
            return mask * kernels.sum((-3, -2, -1))[:, :, None, None]
        samples = mask.reshape(1, n * channels, h, w)
        return F.conv2d(samples, kernels.flatten(0, 1), padding=k // 2, groups=n * channels).view(n, channels, h, w)

    p = F.conv2d(x, mask_projection.to(x.dtype))
    p_hat = batch_norm(p, mask_running_mean, mask_running_var, None, None, training, momentum, eps)
    m = torch.sigmoid(p_hat * to_pixels(mask_weight[index]) + to_pixels(mask_bias[index]))
    m, m_inv = m.expand(-1, channels, -1, -1), (1 - m).expand(-1, channels, -1, -1)

    x_hat = batch_norm(x, running_mean, running_var, None, None, training, momentum, eps)
    gamma = depthwise(m, gamma_weight) + depthwise(m_inv, gamma_weight_inv)
    beta = depthwise(m, beta_weight) + depthwise(m_inv, beta_weight_inv)
    if gamma_bias is not None:
        gamma = gamma + to_pixels(gamma_bias)
    if beta_bias is not None:
        beta = beta + to_pixels(beta_bias)
    return activate(x_hat * gamma + beta, activation, negative_slope)  # in this order it has the strides of x


# The schemas. `mean`, `var`, `mask_mean` and `mask_var` are the statistics to use, or all None for those of this batch.
# The forward op returns copies of those that it used (biased), of x and of p = conv1x1(x) at the resolution of x.
# `allow_tf32` is PyTorch's flag for convolutions on GPUs, which C++ cannot read; the CPU has no TF32.
# With an `index`, (N,) in [0, G), mask_weight and mask_bias are (G, Cm) and the kernels (G, C, 1, k, k); without, there
# is no G. `gamma_bias` and `beta_bias` are (N, C), in x's dtype or float32; where they are None their gradients
# are (0,).
_PARAMETERS = (
    "Tensor mask_projection, Tensor mask_weight, Tensor mask_bias, "
    "Tensor gamma_weight, Tensor gamma_weight_inv, Tensor beta_weight, Tensor beta_weight_inv, "
    "Tensor? gamma_bias, Tensor? beta_bias, Tensor? index"
)


def _statistics_like(x: Tensor, channels: int) -> Tensor:
    return x.new_empty((channels,), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def spn_fwd_fake(x, mask_projection, *args):
    upsample = args[-3]
    n, c, h, w = x.shape
    masks = mask_projection.shape[0]
    p = dense_like(x) if masks == c else x.new_empty((n, masks, h, w))
    return dense_like(x, upsample), p, *(_statistics_like(x, size) for size in (c, c, masks, masks))


def spn_bwd_fake(grad_y, x, *args):
    learnt, rows = args[:7], args[7:9]
    of_rows = [learnt[0].new_empty((0,)) if row is None else row.new_empty(row.shape) for row in rows]
    return dense_like(x), *(w.new_empty(w.shape) for w in learnt), *of_rows


def _spn_fwd_flops(x, mask_projection, mask_weight, mask_bias, gamma_weight, *args, out_shape=None, **kwargs) -> int:
    """The projection and the four depthwise convolutions at the resolution of y, as counted in the paper's Table 6."""
    n, _, h, w = out_shape[0]
    return 2 * n * h * w * (prod(mask_projection) + 4 * prod(gamma_weight[-4:]))


def _spn_bwd_flops(grad_y, x, mask_projection, mask_weight, mask_bias, gamma_weight, *args, **kwargs) -> int:
    n, _, h, w = grad_y
    return 2 * 2 * n * h * w * (prod(mask_projection) + 4 * prod(gamma_weight[-4:]))


spn_fwd = define_op(
    f"spn_fwd(Tensor x, {_PARAMETERS}, Tensor? mean, Tensor? var, Tensor? mask_mean, Tensor? mask_var, "
    "float eps, int upsample, float? negative_slope, bool allow_tf32) "
    "-> (Tensor y, Tensor p, Tensor mean, Tensor var, Tensor mask_mean, Tensor mask_var)",
    spn_fwd_fake,
    native=("cpu", "cuda"),
    flops=_spn_fwd_flops,
    triton="spn",
)
spn_bwd = define_op(
    f"spn_bwd(Tensor grad_y, Tensor x, {_PARAMETERS}, Tensor p, Tensor mean, Tensor var, Tensor mask_mean, "
    "Tensor mask_var, float eps, int upsample, float? negative_slope, bool allow_tf32, bool training) "
    "-> (Tensor grad_x, Tensor grad_mask_projection, Tensor grad_mask_weight, Tensor grad_mask_bias, "
    "Tensor grad_gamma_weight, Tensor grad_gamma_weight_inv, Tensor grad_beta_weight, Tensor grad_beta_weight_inv, "
    "Tensor grad_gamma_bias, Tensor grad_beta_bias)",
    spn_bwd_fake,
    native=("cpu", "cuda"),
    flops=_spn_bwd_flops,
    triton="spn",
)


def ops_of(impl: str):
    """The forward and the backward op of an impl."""
    return triton_ops("spn") if impl == "triton" else (spn_fwd, spn_bwd)


class SPNFunction(torch.autograd.Function):
    """Saves x, p and four statistics vectors; γ, β, m and x̂ are recomputed in backward.

    ``inputs`` are x, the parameters, gamma_bias and beta_bias, and the statistics to use, or None for those of the
    batch. Returns (y, mean, var, mask_mean, mask_var); only y is differentiable. A backward that is itself
    differentiated goes through the reference.
    """

    @staticmethod
    def forward(ctx, impl, training, eps, upsample, negative_slope, allow_tf32, index, *inputs):
        forward, ctx.backward_op = ops_of(impl)
        y, p, *used = forward(*inputs[:10], index, *inputs[10:], eps, upsample, negative_slope, allow_tf32)
        ctx.options = training, eps, upsample, negative_slope
        ctx.allow_tf32 = allow_tf32
        # Copies of running statistics, which may change before backward.
        ctx.save_for_backward(*inputs[:10], index, p, *(inputs[10:] if any(ctx.needs_input_grad[17:]) else used))
        ctx.mark_non_differentiable(*used)
        ctx.set_materialize_grads(False)
        return y, *used

    @staticmethod
    def backward(ctx, grad_y, *_):
        if grad_y is None:
            return (None,) * 21
        training, eps, upsample, negative_slope = ctx.options
        saved = ctx.saved_tensors  # once: under checkpoints or offloading each access unpacks them
        inputs, (index, p, *used) = saved[:10], saved[10:]
        given = any(ctx.needs_input_grad[17:])  # whether the statistics need gradients
        if through_reference():
            if not given:
                used = (None,) * 4 if training else [t.to(inputs[2].dtype) for t in used]
            activation = activation_of(negative_slope)

            def reference(*inputs):
                options = {"training": training, "eps": eps, "upsample": upsample, "activation": activation}
                if activation == "leaky_relu":
                    options["negative_slope"] = negative_slope
                if index is None:
                    return spn_reference(*inputs[:8], *inputs[10:], **options)
                return conditional_spn_reference(inputs[0], index, *inputs[1:], **options)

            grads = reference_grads(reference, (*inputs, *used), grad_y, ctx.needs_input_grad[7:])
        else:
            options = eps, upsample, negative_slope, ctx.allow_tf32, training
            grads = ctx.backward_op(grad_y, *inputs, index, p, *used, *options)
            of_used = _gradients_of_used(inputs, grads, used, eps) if given else (None,) * 4
            rows = [None if row is None else grad for row, grad in zip(inputs[8:], grads[8:], strict=True)]
            grads = [grads[0], *map(like_parameter, grads[1:8], inputs[1:8]), *rows, *of_used]
        return (None,) * 7 + tuple(grads)


def _gradients_of_used(inputs, grads, used, eps: float) -> tuple[Tensor, ...]:
    """The gradients of given statistics, which follow from those of the parameters: Σ dx̂ = Σ γ dy is a product of the
    kernels of γ and the gradients of those of β, and likewise for Σ dx̂ x̂ and the mask.

    Args:
        inputs: x, the parameters, gamma_bias (with beta_bias), beta_bias.
        grads: theirs.
        used: mean, var, mask_mean, mask_var.
    """
    _, _, mask_weight, _, gamma_weight, gamma_weight_inv, _, _, gamma_bias, _ = inputs
    _, _, of_mask_weight, of_mask_bias, *of_kernels, of_gamma_bias, of_beta_bias = grads
    _, var, _, mask_var = used

    def per_channel(of_weight: Tensor, of_weight_inv: Tensor, of_bias: Tensor) -> Tensor:
        product = gamma_weight * of_weight + gamma_weight_inv * of_weight_inv
        total = product.sum((0, -3, -2, -1)[-product.dim() + 1 :])  # groups, if there are any, and taps
        return total if gamma_bias is None else total + (gamma_bias * of_bias).sum(0)

    def of_mask(grad: Tensor) -> Tensor:
        product = mask_weight * grad
        return product.sum(0) if product.dim() == 2 else product

    of_gamma, of_beta = (*of_kernels[:2], of_gamma_bias), (*of_kernels[2:], of_beta_bias)
    return (
        *gradients_of_given(per_channel(*of_beta), per_channel(*of_gamma), var, eps),
        *gradients_of_given(of_mask(of_mask_bias), of_mask(of_mask_weight), mask_var, eps),
    )


@public
def spn(
    x: Tensor,
    mask_projection: Tensor,
    mask_weight: Tensor,
    mask_bias: Tensor,
    gamma_weight: Tensor,
    gamma_weight_inv: Tensor,
    beta_weight: Tensor,
    beta_weight_inv: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    mask_running_mean: Tensor | None = None,
    mask_running_var: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    upsample: int = 1,
    activation: str | None = None,
    negative_slope: float = 0.2,
    impl: str = "auto",
    process_group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    r"""Self pixel-wise normalisation (arXiv 2201.10725, eq. 1-4): batch norm whose scale and shift are computed, pixel
    by pixel, from a mask of the features themselves.

    Args:
        x: (N, C, H, W), floating point, contiguous or channels_last (other strides cost one copy).
        mask_projection: (Cm, C, 1, 1), the 1x1 convolution before the mask's batch norm; Cm = C, or 1 for one mask
            shared by all channels.
        mask_weight, mask_bias: (Cm,), scale and shift of the mask's batch norm.
        gamma_weight, gamma_weight_inv: (C, 1, k, k), k = 1, 3 or 5, depthwise kernels from the mask and the inverted
            mask to the scale γ; or (C, C, k, k), standard convolutions (the paper's Table 7), on the reference only.
        beta_weight, beta_weight_inv: of the same shape, for the shift β.
        running_mean, running_var: (C,), of x; used (and differentiated) if not ``training``, else updated in place as
            in ``F.batch_norm``.
        mask_running_mean, mask_running_var: (Cm,), the same of ``conv1x1(x)``.
        training: normalise with the statistics of this batch.
        momentum: weight of this batch in the running statistics.
        eps: added to both variances; positive in training.
        upsample: 2 computes ``spn(interpolate(x, scale_factor=2, mode="nearest"))``; the mask, the statistics and the
            tensors saved for backward stay at the resolution of x.
        activation: None, ``"relu"`` or ``"leaky_relu"``, applied to the result.
        negative_slope: of ``"leaky_relu"``.
        impl: ``"auto"``, ``"native"`` (C++ or CUDA C++), ``"triton"`` (GPUs) or ``"reference"`` (plain PyTorch).
        process_group: the processes whose batches, together, are the batch whose statistics are used in training
            (:mod:`pixnorm.ops.synchronised`); None for that of this process alone. ``conv1x1(x)`` is then computed
            twice.

    Returns:
        (N, C, H * upsample, W * upsample) in x's dtype and layout.

    Parameters have x's dtype, or float32 where x is float16 or bfloat16; running statistics that of the parameters, or
    float32 with parameters in half precision. The statistics of a batch are float32 for those (float64 for float64).
    As with batch norm, autocast has no effect: x's dtype decides. Double backward works in eager mode (through the
    reference); ``torch.compile`` cannot differentiate twice.

    Raises:
        ValueError: wrong rank, shape, or value of an option; one value per channel in training.
        TypeError: x is not floating point, or a dtype does not fit.
        RuntimeError: tensors on several devices, running statistics missing in inference, or an ``impl`` that cannot
            run here.
    """
    learnt = (mask_projection, mask_weight, mask_bias, gamma_weight, gamma_weight_inv, beta_weight, beta_weight_inv)
    buffers = (running_mean, running_var, mask_running_mean, mask_running_var)
    options = {
        "training": training,
        "momentum": momentum,
        "eps": eps,
        "upsample": upsample,
        "activation": activation,
        "negative_slope": negative_slope,
    }
    return _normalise(spn_reference, x, learnt, None, (), buffers, options, impl, process_group)


@public
def conditional_spn(
    x: Tensor,
    index: Tensor,
    mask_projection: Tensor,
    mask_weight: Tensor,
    mask_bias: Tensor,
    gamma_weight: Tensor,
    gamma_weight_inv: Tensor,
    beta_weight: Tensor,
    beta_weight_inv: Tensor,
    gamma_bias: Tensor | None = None,
    beta_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    mask_running_mean: Tensor | None = None,
    mask_running_var: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    upsample: int = 1,
    activation: str | None = None,
    negative_slope: float = 0.2,
    impl: str = "auto",
    process_group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    r"""Conditional self pixel-wise normalisation (arXiv 2201.10725, section 3.2): :func:`spn` in which the class of a
    sample chooses the mask's scale and shift and the four kernels, and rows of numbers of each sample, from its noise
    vector, are added to γ and β (Table 8). Statistics are those of the whole batch.

    Args:
        x: (N, C, H, W), as in :func:`spn`.
        index: (N,) of int64, each sample's group in [0, G). On the CPU others are an error; on a GPU, where looking
            would wait for it, they count as the nearest group.
        mask_projection: (Cm, C, 1, 1); Cm = C or 1.
        mask_weight, mask_bias: (G, Cm).
        gamma_weight, gamma_weight_inv, beta_weight, beta_weight_inv: (G, C, 1, k, k), k = 1, 3 or 5. Groups that no
            sample has get zero gradients.
        gamma_bias, beta_bias: (N, C), added to γ and β at all pixels; in x's dtype, or float32 with half precision.
        running_mean, running_var, mask_running_mean, mask_running_var, training, momentum, eps, upsample, activation,
            negative_slope, impl, process_group: as in :func:`spn`.

    Returns, dtypes, errors: as in :func:`spn`.
    """
    learnt = (mask_projection, mask_weight, mask_bias, gamma_weight, gamma_weight_inv, beta_weight, beta_weight_inv)
    buffers = (running_mean, running_var, mask_running_mean, mask_running_var)
    options = {
        "training": training,
        "momentum": momentum,
        "eps": eps,
        "upsample": upsample,
        "activation": activation,
        "negative_slope": negative_slope,
    }
    rows = gamma_bias, beta_bias
    return _normalise(conditional_spn_reference, x, learnt, index, rows, buffers, options, impl, process_group)


def _normalise(reference, x, learnt, index, rows, buffers, options, impl, process_group=None) -> Tensor:
    """What both functions do: check, choose an impl, call it, update the running statistics.

    Args:
        index, rows: None and () without groups.
    """
    training, eps, upsample = options["training"], options["eps"], options["upsample"]
    group = group_of(process_group, training)
    _check(x, learnt, index, rows, buffers, options, alone=group is None)
    refusals = _refusals(x, learnt, index, upsample)
    tuned = learnt[0].shape[0] == x.shape[1] and learnt[3].shape[-1] == 3
    chosen = choose("spn", impl, x.device, refusals, preferred(x, upsample, tuned), stacklevel=5)
    if group is not None:
        with without_autocast(x.device):
            p = F.conv2d(x, learnt[0].to(x.dtype))
        norm = None if chosen == "reference" else norm_ops_of(chosen)[0]
        count, *used = statistics_of_all((x, p), upsample, group, norm)
        if chosen != "reference":  # the gradients of the statistics are made of theirs
            learnt = [wide(t) for t in learnt]
            rows = [None if row is None else wide(row) for row in rows]
        y = _normalise(reference, x, learnt, index, rows, used, {**options, "training": False}, chosen)
        move_running(buffers, used, options["momentum"], count)
        return y
    if chosen == "reference":
        constants = () if index is None else (index,)
        inputs = x, *learnt, *rows
        return call_reference(
            lambda x, *others, **kw: reference(x, *constants, *others, **kw), inputs, buffers, **options
        )

    slope, allow_tf32 = slope_of(options["activation"], options["negative_slope"]), convolutions_allow_tf32()
    gamma_bias, beta_bias = rows or (None, None)
    given = (None,) * 4 if training else buffers
    if gamma_bias is not None and beta_bias is None and any(t is not None and t.requires_grad for t in given):
        beta_bias = torch.zeros_like(gamma_bias)  # the gradients of the statistics are made of its gradient
    inputs = x, *learnt, gamma_bias, beta_bias, *given
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs if t is not None):
        y, *used = SPNFunction.apply(chosen, training, eps, upsample, slope, allow_tf32, index, *inputs)
    else:
        y, _, *used = ops_of(chosen)[0](*inputs[:10], index, *inputs[10:], eps, upsample, slope, allow_tf32)
    if training and x.numel() > 0:
        kept = [pair for pair in zip(buffers, used, strict=True) if pair[0] is not None]
        if kept:
            # The separate layers would count the upsampled pixels.
            running, batch = zip(*kept, strict=True)
            update_running(running, batch, options["momentum"], y.numel() // y.shape[1])
    return y


# Where impl="auto" prefers Triton to the CUDA kernels: (GPU name, dtype of x, channels_last, upsample) for which
# `make gpu` has measured it to be faster (see benchmarks/results). Nothing has been measured yet.
TRITON_IS_FASTER: frozenset[tuple[str, torch.dtype, bool, int]] = frozenset()


def preferred(x: Tensor, upsample: int, tuned: bool = True) -> str:
    """What ``auto`` takes where both can run.

    Args:
        tuned: kernel size 3 and one mask per channel. The CUDA kernels for the rest move more memory than Triton's.
    """
    if x.device.type != "cuda":
        return "native"
    if not tuned:
        return "triton"
    if not TRITON_IS_FASTER:
        return "native"
    kind = gpu_name(x.device.index), x.dtype, is_channels_last(x), upsample
    return "triton" if kind in TRITON_IS_FASTER else "native"


def _refusals(x: Tensor, learnt, index: Tensor | None, upsample: int) -> dict[str, str | None]:
    """Why kernels cannot take these arguments."""
    gamma_weight = learnt[3]
    if gamma_weight.shape[-3] != 1:
        reason = "the kernels are for depthwise weights, not for standard convolutions"
        return {"native": reason, "triton": reason}
    return {"native": None, "triton": beyond_32_bits(x, upsample)}


_NAMES = (
    "mask_projection",
    "mask_weight",
    "mask_bias",
    "gamma_weight",
    "gamma_weight_inv",
    "beta_weight",
    "beta_weight_inv",
    "running_mean",
    "running_var",
    "mask_running_mean",
    "mask_running_var",
)


def _check(x, learnt, index, rows, buffers, options, alone=True) -> None:
    mask_projection, mask_weight, gamma_weight = learnt[0], learnt[1], learnt[3]
    training, upsample = options["training"], options["upsample"]
    check_image(x)
    check_option("upsample", upsample, (1, 2))
    check_option("activation", options["activation"], ACTIVATIONS)
    check_eps(options["eps"], training)

    channels = x.shape[1]
    mask_channels, projected = mask_projection.shape[:2] if mask_projection.dim() == 4 else (0, channels)
    if projected != channels and gamma_weight.dim() > 3 and gamma_weight.shape[-4] == projected:
        raise ValueError(f"expected input of {projected} channels, got {channels}: input of shape {tuple(x.shape)}")
    if mask_channels != 1 and mask_channels != channels:
        raise ValueError(
            f"mask_projection must have shape ({channels}, {channels}, 1, 1) or (1, {channels}, 1, 1) for input of "
            f"shape {tuple(x.shape)}, got {tuple(mask_projection.shape)}"
        )
    k = gamma_weight.shape[-1] if gamma_weight.dim() else 0
    if not any(k == size for size in (1, 3, 5)):
        raise ValueError(f"the kernel size must be 1, 3 or 5, got gamma_weight of shape {tuple(gamma_weight.shape)}")
    depth = 1
    if index is None and gamma_weight.dim() == 4 and gamma_weight.shape[1] == channels:
        depth = channels  # standard convolutions
    groups = () if index is None else tuple(mask_weight.shape[:1])
    of_mask, of_x, kernel = (mask_channels,), (channels,), (channels, depth, k, k)
    shapes = [(mask_channels, channels, 1, 1), (*groups, *of_mask), (*groups, *of_mask), *[(*groups, *kernel)] * 4]
    for name, tensor, shape in zip(_NAMES, learnt, shapes, strict=False):
        check_shape(name, tensor, shape, x)
        check_device(name, tensor, x)
        if tensor.dtype != mask_weight.dtype:
            raise TypeError(
                f"expected parameters of one dtype, got {mask_weight.dtype} and, for {name}, {tensor.dtype}"
            )
    check_parameter_dtype(mask_weight.dtype, x)
    if index is not None:
        _check_index(index, groups[0], x)
    for name, row in zip(("gamma_bias", "beta_bias"), rows, strict=False):
        if row is None:
            continue
        check_shape(name, row, x.shape[:2], x)
        check_device(name, row, x)
        check_parameter_dtype(row.dtype, x)
    of_buffers = zip(_NAMES[len(learnt) :], buffers, (of_x, of_x, of_mask, of_mask), strict=True)
    check_running_statistics(of_buffers, x, mask_weight.dtype, training)
    n, _, h, w = x.shape
    if training and alone:
        check_several_values(x, n * h * w * upsample**2)


def _check_index(index: Tensor, groups: int, x: Tensor) -> None:
    if index.dtype != torch.int64:
        raise TypeError(f"expected index of torch.int64, got {index.dtype}")
    check_shape("index", index, x.shape[:1], x)
    check_device("index", index, x)
    # On a GPU, asking would wait for it.
    if index.device.type == "cpu" and index.numel() and not torch.compiler.is_compiling():
        low, high = index.aminmax()
        if low < 0 or high >= groups:
            raise ValueError(f"index must be in [0, {groups}), got groups from {low} to {high}")
