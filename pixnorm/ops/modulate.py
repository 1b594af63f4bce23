r"""Modulated normalisation: batch or instance statistics, then a scale and a shift from rows or from maps.

    y = act((o + γ) · x̂ + β),    x̂ = (x - μ) / √(σ² + eps)

One op for six layers: batch norm, γ and β (C,); conditional and latent batch norm and AdaIN, rows (N, C) made from
classes, latent vectors or styles (arXiv 1809.11096; 2006.05394 eq. 6-8); SPADE, maps (N, C, H, W) made from a label
map (arXiv 1903.07291; 2006.05394 eq. 3-5). The offset o is 1 where a paper scales by 1 + γ.
"""

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
    HALF,
    activate,
    activation_of,
    batch_norm,
    beyond_32_bits,
    call_reference,
    dense,
    dense_like,
    fake_gradient,
    instance_norm,
    like_parameter,
    public,
    reference_grads,
    slope_of,
    through_reference,
    triton_ops,
    wide,
)
from pixnorm.ops.statistics import update_running
from pixnorm.ops.synchronised import gradients_of_given, group_of, move_running, statistics_of_all

STATISTICS = ("batch", "instance")


def modulated_norm_reference(
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    statistics: str = "batch",
    gamma_offset: float = 0.0,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    upsample: int = 1,
    activation: str | None = None,
    negative_slope: float = 0.2,
) -> Tensor:
    """Modulated norm in plain PyTorch: the specification. Arguments as in :func:`modulated_norm`."""
    if upsample == 2:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    if statistics == "instance":
        x_hat = dense(instance_norm(x, eps), x)
    else:
        x_hat = batch_norm(x, running_mean, running_var, None, None, training, momentum, eps)
    if gamma is not None:
        gamma, beta = (t if t.dim() == 4 else t[..., None, None] for t in (gamma, beta))
        x_hat = ((gamma_offset + gamma) * x_hat + beta).to(x.dtype)
    return activate(x_hat, activation, negative_slope)


# The schemas. `mean` and `var` are the statistics to use, (C,), or None for those of this batch (or instance); the
# forward op returns copies of those that it used, biased, (C,) or (N, C), at the resolution of x. Without gamma and
# beta their gradients are empty.
def modulate_fwd_fake(x, gamma, beta, mean, var, eps, instance, gamma_offset, upsample, negative_slope):
    sizes = x.shape[:2] if instance else x.shape[1:2]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return dense_like(x, upsample), x.new_empty(sizes, dtype=dtype), x.new_empty(sizes, dtype=dtype)


def modulate_bwd_fake(grad_y, x, gamma, beta, *args):
    return dense_like(x), fake_gradient(gamma, x), fake_gradient(beta, x)


modulate_fwd = define_op(
    "modulate_fwd(Tensor x, Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? var, float eps, bool instance, "
    "float gamma_offset, int upsample, float? negative_slope) -> (Tensor y, Tensor mean, Tensor var)",
    modulate_fwd_fake,
    native=("cpu", "cuda"),
    triton="modulate",
)
modulate_bwd = define_op(
    "modulate_bwd(Tensor grad_y, Tensor x, Tensor? gamma, Tensor? beta, Tensor mean, Tensor var, float eps, "
    "bool instance, float gamma_offset, int upsample, float? negative_slope, bool training) "
    "-> (Tensor grad_x, Tensor grad_gamma, Tensor grad_beta)",
    modulate_bwd_fake,
    native=("cpu", "cuda"),
    triton="modulate",
)


def ops_of(impl: str):
    """The forward and the backward op of an impl."""
    return triton_ops("modulate") if impl == "triton" else (modulate_fwd, modulate_bwd)


class ModulateFunction(torch.autograd.Function):
    """Saves x, γ, β and the statistics; x̂ and the sign of y are recomputed in backward.

    ``inputs`` are x, γ, β and the statistics to use, or None for those of the batch or the instance. Given ones that
    need gradients come with γ and β. Returns (y, mean, var); only y is differentiable. A backward that is itself
    differentiated goes through the reference.
    """

    @staticmethod
    def forward(ctx, impl, training, eps, instance, gamma_offset, upsample, negative_slope, *inputs):
        forward, ctx.backward_op = ops_of(impl)
        y, *used = forward(*inputs, eps, instance, gamma_offset, upsample, negative_slope)
        ctx.options = training, eps, instance, gamma_offset, upsample, negative_slope
        # Copies of running statistics, which may change before backward.
        ctx.save_for_backward(*inputs[:3], *(inputs[3:] if any(ctx.needs_input_grad[10:]) else used))
        ctx.mark_non_differentiable(*used)
        ctx.set_materialize_grads(False)
        return y, *used

    @staticmethod
    def backward(ctx, grad_y, *_):
        if grad_y is None:
            return (None,) * 12
        training, eps, instance, gamma_offset, upsample, negative_slope = ctx.options
        saved = ctx.saved_tensors  # once: each access unpacks them, which checkpoints and offloading hook into
        inputs, used = saved[:3], saved[3:]
        given = any(ctx.needs_input_grad[10:])  # whether the statistics need gradients
        if through_reference():
            if not given:
                used = (None, None) if training or instance else [t.to(inputs[0].dtype) for t in used]
            activation = activation_of(negative_slope)

            def reference(*inputs):
                options = {"training": training, "eps": eps, "gamma_offset": gamma_offset, "upsample": upsample}
                options["statistics"] = STATISTICS[instance]
                if activation == "leaky_relu":
                    options["negative_slope"] = negative_slope
                return modulated_norm_reference(*inputs, **options, activation=activation)

            grads = reference_grads(reference, (*inputs, *used), grad_y, ctx.needs_input_grad[7:])
        else:
            options = eps, instance, gamma_offset, upsample, negative_slope, training
            grad_x, grad_gamma, grad_beta = ctx.backward_op(grad_y, *inputs, *used, *options)
            grads = grad_x, _shaped(grad_gamma, inputs[1]), _shaped(grad_beta, inputs[2])
            of_used = gradients_of_used(inputs[1], gamma_offset, grad_gamma, grad_beta, used[1], eps) if given else ()
            grads += tuple(of_used) or (None, None)
        return (None,) * 7 + tuple(grads)


def gradients_of_used(
    gamma: Tensor, gamma_offset: float, grad_gamma: Tensor, grad_beta: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The gradients of given mean and variance: as dx̂ = (o + γ) dy, they follow from those of γ and β."""

    def per_channel(grad: Tensor) -> Tensor:
        product = (gamma_offset + wide(gamma)) * grad
        return product if product.dim() == 1 else product.sum((0, 2, 3)[: product.dim() - 1])

    return gradients_of_given(per_channel(grad_beta), per_channel(grad_gamma), var, eps)


def _shaped(grad: Tensor, of: Tensor | None) -> Tensor | None:
    """The op's gradient of gamma or beta for autograd: rows get their strides, maps are activations."""
    if of is None:
        return None
    return grad if of.dim() == 4 else like_parameter(grad, of)


@public
def modulated_norm(
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    statistics: str = "batch",
    gamma_offset: float = 0.0,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    upsample: int = 1,
    activation: str | None = None,
    negative_slope: float = 0.2,
    impl: str = "auto",
    process_group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    r"""Normalise, scale, shift and activate in one op: ``act((gamma_offset + gamma) * x_hat + beta)``.

    Args:
        x: (N, C, H, W), floating point, contiguous or channels_last (other strides cost one copy).
        gamma, beta: scale and shift: both None; both (C,), as batch norm's; both (N, C), a row for each sample; or both
            (N, C, H * upsample, W * upsample), a map for each sample, in x's dtype (and best in its layout).
        running_mean, running_var: (C,); used (and differentiated) if not ``training``, else updated in place as in
            ``F.batch_norm``. Only with batch statistics.
        statistics: ``"batch"``: over N, H, W; ``"instance"``: over H, W of each sample, in training or not.
        gamma_offset: added to gamma: 1 where a layer scales by 1 + gamma.
        training: normalise with the statistics of this batch.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance; positive in training.
        upsample: 2 computes the norm of ``interpolate(x, scale_factor=2, mode="nearest")``; the statistics and what is
            saved for backward stay at the resolution of x.
        activation: None, ``"relu"`` or ``"leaky_relu"``, applied to the result.
        negative_slope: of the latter.
        impl: ``"auto"``, ``"native"`` (C++ or CUDA C++), ``"triton"`` (GPUs) or ``"reference"`` (plain PyTorch).
        process_group: the processes whose batches, together, are the batch whose statistics are used in training
            (:mod:`pixnorm.ops.synchronised`); None for that of this process alone.

    Returns:
        (N, C, H * upsample, W * upsample) in x's dtype and layout.

    Rows have x's dtype, or float32 where x is float16 or bfloat16; running statistics that of the rows, or float32
    beside rows in half precision. The statistics of a batch are float32 for those (float64 for float64). As with batch
    norm, autocast changes nothing here: x's dtype decides. Saved for backward are x, gamma, beta and the statistics.
    Gradients of gradients are right in eager mode (computed by the reference).

    Raises:
        ValueError: wrong rank, shape, or value of an option; one of gamma and beta alone; one value to normalise.
        TypeError: x is not floating point, or a dtype does not fit.
        RuntimeError: tensors on several devices, running statistics missing where they are needed, or an ``impl`` that
            cannot run here.
    """
    buffers = (running_mean, running_var)
    instance = statistics == "instance"
    group = group_of(process_group, training and not instance)
    _check(x, gamma, beta, buffers, statistics, training, eps, upsample, activation, alone=group is None)
    chosen = choose("modulate", impl, x.device, {"triton": beyond_32_bits(x, upsample)})
    if group is not None:
        count, *used = statistics_of_all((x,), upsample, group, None if chosen == "reference" else ops_of(chosen)[0])
        if gamma is not None and gamma.dim() < 4:  # the gradients of the statistics are made of theirs
            gamma, beta = wide(gamma), wide(beta)
        y = modulated_norm(
            x,
            gamma,
            beta,
            *used,
            gamma_offset=gamma_offset,
            training=False,
            eps=eps,
            upsample=upsample,
            activation=activation,
            negative_slope=negative_slope,
            impl=chosen,
        )
        move_running(buffers, used, momentum, count)
        return y
    if chosen == "reference":
        return call_reference(
            modulated_norm_reference,
            (x, gamma, beta),
            buffers,
            statistics=statistics,
            gamma_offset=gamma_offset,
            training=training,
            momentum=momentum,
            eps=eps,
            upsample=upsample,
            activation=activation,
            negative_slope=negative_slope,
        )

    slope = slope_of(activation, negative_slope)
    given = (None, None) if training or instance else buffers
    if gamma is None and any(t is not None and t.requires_grad for t in given):  # the same
        gamma, beta = torch.ones_like(given[0]) - gamma_offset, torch.zeros_like(given[0])
    inputs = (x, gamma, beta, *given)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        y, *used = ModulateFunction.apply(
            chosen, training, eps, instance, float(gamma_offset), upsample, slope, *inputs
        )
    else:
        y, *used = ops_of(chosen)[0](*inputs, eps, instance, float(gamma_offset), upsample, slope)
    if training and not instance and running_mean is not None and x.numel() > 0:
        # Plain layers would see the upsampled pixels.
        update_running(buffers, used, momentum, y.numel() // y.shape[1])
    return y


def _check(x, gamma, beta, buffers, statistics, training, eps, upsample, activation, alone=True) -> None:
    check_image(x)
    check_option("statistics", statistics, STATISTICS)
    check_option("upsample", upsample, (1, 2))
    check_option("activation", activation, ACTIVATIONS)
    instance = statistics == "instance"
    check_eps(eps, training or instance)
    n, c, h, w = x.shape
    if (gamma is None) != (beta is None):
        raise ValueError("gamma and beta must either both be None or neither be None")
    parameter_dtype = x.dtype
    if gamma is not None:
        shapes = {1: (c,), 2: (n, c), 4: (n, c, h * upsample, w * upsample)}
        if gamma.dim() not in shapes:
            raise ValueError(f"gamma must have shape {', '.join(map(str, shapes.values()))}, got {tuple(gamma.shape)}")
        for name, tensor in (("gamma", gamma), ("beta", beta)):
            check_shape(name, tensor, shapes[gamma.dim()], x)
            check_device(name, tensor, x)
        if gamma.dtype != beta.dtype:
            raise TypeError(f"expected gamma and beta of one dtype, got {gamma.dtype} and {beta.dtype}")
        if gamma.dim() == 4 and gamma.dtype != x.dtype:
            raise TypeError(f"expected maps of dtype {x.dtype} for input of that dtype, got {gamma.dtype}")
        check_parameter_dtype(gamma.dtype, x)
        parameter_dtype = gamma.dtype
    if instance and any(buffer is not None for buffer in buffers):
        raise ValueError("running statistics are of batches; with statistics='instance' there are none")
    if not instance:
        of_buffers = zip(("running_mean", "running_var"), buffers, ((c,), (c,)), strict=True)
        if parameter_dtype == x.dtype and gamma is None:
            parameter_dtype = next((b.dtype for b in buffers if b is not None), x.dtype)
            check_parameter_dtype(parameter_dtype, x)
        check_running_statistics(of_buffers, x, parameter_dtype, training)
    if (training and alone) or instance:
        check_several_values(x, (h * w if instance else n * h * w) * upsample**2)


def rows_for(t: Tensor, x: Tensor) -> Tensor:
    """Computed rows or maps in a dtype that the op takes beside x; under autocast they may have another one."""
    return t if t.dtype == x.dtype or (t.dim() != 4 and t.dtype == torch.float32 and x.dtype in HALF) else t.to(x.dtype)


@public
def adain(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    eps: float = 1e-5,
    upsample: int = 1,
    activation: str | None = None,
    negative_slope: float = 0.2,
    impl: str = "auto",
) -> Tensor:
    """Adaptive instance normalisation (arXiv 2006.05394 eq. 6): ``scale * (x - mean) / std + shift``, mean and standard
    deviation over H, W of each sample.

    Args:
        x: (N, C, H, W).
        scale, shift: (N, C).
        eps, upsample, activation, negative_slope, impl: as in :func:`modulated_norm`.

    Returns:
        (N, C, H * upsample, W * upsample).
    """
    options = {"upsample": upsample, "activation": activation, "negative_slope": negative_slope, "impl": impl}
    return modulated_norm(x, scale, shift, statistics="instance", eps=eps, **options)


@public
def adain_transfer(content: Tensor, style: Tensor, *, eps: float = 1e-5, impl: str = "auto") -> Tensor:
    """AdaIN as style transfer has it (arXiv 1703.06868 eq. 8): the content's features with the mean and the standard
    deviation of the style's, per sample and channel. There are no parameters.

    Args:
        content: (N, C, H, W).
        style: (N, C, h, w), of any size.
        eps: added to both variances.
        impl: as in :func:`modulated_norm`.

    Returns:
        (N, C, H, W).

    Raises:
        ValueError: batch or channels differ.
    """
    check_image(content)
    check_image(style)
    if content.shape[0] != style.shape[0] or content.shape[1] != style.shape[1]:
        shapes = f"{tuple(content.shape)} and {tuple(style.shape)}"
        raise ValueError(f"content and style must have the same batch and channels, got {shapes}")
    wide = style.float() if style.dtype in HALF else style
    var, mean = torch.var_mean(wide, (2, 3), correction=0)
    scale, shift = (rows_for(t, content) for t in ((var + eps).sqrt(), mean))
    return adain(content, scale, shift, eps=eps, impl=impl)
