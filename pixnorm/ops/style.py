r"""What stands between two convolutions of StyleGAN's generators, as one op each.

StyleGAN 2, between two modulated convolutions (arXiv 1912.04958; 2006.05394 eq. 9-11):

    y = s · gain · act(d · x + w · noise + b)

d (N, C) demodulates the convolution before, s (N, C) are the styles of the convolution after, w and b (C,) the strength
of the noise and the bias.

StyleGAN 1, the end of a layer (arXiv 1812.04948):

    y = (1 + scale) · v̂ + shift,    v = lrelu(x + w · noise + b),    v̂ = (v - μ) / √(σ² + eps)

with the mean and the biased variance of each sample and channel over H, W.
"""

import torch
from torch import Tensor

from pixnorm.ops._dispatch import choose, define_op
from pixnorm.ops.checks import (
    check_device,
    check_eps,
    check_image,
    check_option,
    check_parameter_dtype,
    check_several_values,
    check_shape,
)
from pixnorm.ops.common import (
    ACTIVATIONS,
    activate,
    activation_of,
    beyond_32_bits,
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
    without_autocast,
)

# The tensors of the two forward ops, in their order.
EPILOGUE_INPUTS = ("x", "demod", "noise", "noise_strength", "bias", "next_styles")
NORM_INPUTS = ("x", "scale", "shift", "noise", "noise_strength", "bias")


def _add_noise(x: Tensor, demod: Tensor | None, noise: Tensor | None, noise_strength: Tensor | None) -> Tensor:
    """d · x + w · noise, where w is (C,) or a scalar."""
    if demod is not None:
        x = x * demod[..., None, None]
    return x if noise is None else x + noise_strength.reshape(-1, 1, 1) * noise


def _add_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias.reshape(-1, 1, 1)


def style_epilogue_reference(
    x: Tensor,
    *,
    demod: Tensor | None = None,
    noise: Tensor | None = None,
    noise_strength: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = "leaky_relu",
    negative_slope: float = 0.2,
    gain: float = 1.0,
    next_styles: Tensor | None = None,
) -> Tensor:
    """StyleGAN 2's epilogue in plain PyTorch: the specification. Arguments as in :func:`style_epilogue`."""
    u = _add_bias(_add_noise(x, demod, noise, noise_strength), bias)
    scale = gain if next_styles is None else (gain * next_styles)[..., None, None]
    return (activate(u, activation, negative_slope) * scale).to(x.dtype)


def style_norm_reference(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    noise: Tensor | None = None,
    noise_strength: Tensor | None = None,
    bias: Tensor | None = None,
    negative_slope: float = 0.2,
    eps: float = 1e-8,
) -> Tensor:
    """StyleGAN 1's epilogue in plain PyTorch: the specification. Arguments as in :func:`style_norm`."""
    v = activate(_add_bias(_add_noise(x, None, noise, noise_strength), bias), "leaky_relu", negative_slope)
    v_hat = dense(instance_norm(v, eps), x)
    return ((1 + scale)[..., None, None] * v_hat + shift[..., None, None]).to(x.dtype)


# The schemas. noise_strength and bias are (C,). The gradients of absent arguments are empty. `mean` and `var` are those
# of v, biased, (N, C).
def style_epilogue_fwd_fake(x, *args):
    return dense_like(x)


def style_epilogue_bwd_fake(grad_y, x, demod, noise, noise_strength, bias, next_styles, *args):
    return dense_like(x), *(fake_gradient(of, x) for of in (demod, noise_strength, bias, next_styles))


def style_norm_fwd_fake(x, *args):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return dense_like(x), x.new_empty(x.shape[:2], dtype=dtype), x.new_empty(x.shape[:2], dtype=dtype)


def style_norm_bwd_fake(grad_y, x, scale, noise, noise_strength, bias, *args):
    return dense_like(x), *(fake_gradient(of, x) for of in (scale, scale, noise_strength, bias))


_NOISE_AND_BIAS = "Tensor? noise, Tensor? noise_strength, Tensor? bias"
style_epilogue_fwd = define_op(
    f"style_epilogue_fwd(Tensor x, Tensor? demod, {_NOISE_AND_BIAS}, Tensor? next_styles, float? negative_slope, "
    "float gain) -> Tensor y",
    style_epilogue_fwd_fake,
    native=("cpu",),
    triton="style",
)
style_epilogue_bwd = define_op(
    f"style_epilogue_bwd(Tensor grad_y, Tensor x, Tensor? demod, {_NOISE_AND_BIAS}, Tensor? next_styles, "
    "float? negative_slope, float gain) -> (Tensor grad_x, Tensor grad_demod, Tensor grad_noise_strength, "
    "Tensor grad_bias, Tensor grad_next_styles)",
    style_epilogue_bwd_fake,
    native=("cpu",),
    triton="style",
)
style_norm_fwd = define_op(
    f"style_norm_fwd(Tensor x, Tensor scale, Tensor shift, {_NOISE_AND_BIAS}, float negative_slope, float eps) "
    "-> (Tensor y, Tensor mean, Tensor var)",
    style_norm_fwd_fake,
    native=("cpu",),
    triton="style",
)
style_norm_bwd = define_op(
    f"style_norm_bwd(Tensor grad_y, Tensor x, Tensor scale, {_NOISE_AND_BIAS}, Tensor mean, Tensor var, "
    "float negative_slope, float eps) -> (Tensor grad_x, Tensor grad_scale, Tensor grad_shift, "
    "Tensor grad_noise_strength, Tensor grad_bias)",
    style_norm_bwd_fake,
    native=("cpu",),
    triton="style",
)


def epilogue_ops_of(impl: str):
    """The forward and the backward op of StyleGAN 2's epilogue of an impl."""
    return triton_ops("style_epilogue") if impl == "triton" else (style_epilogue_fwd, style_epilogue_bwd)


def norm_ops_of(impl: str):
    """The same of StyleGAN 1's."""
    return triton_ops("style_norm") if impl == "triton" else (style_norm_fwd, style_norm_bwd)


class StyleEpilogueFunction(torch.autograd.Function):
    """Saves its inputs; all else is recomputed in backward. The noise has no gradient here.

    A backward that is itself differentiated goes through the reference.
    """

    @staticmethod
    def forward(ctx, impl, negative_slope, gain, *inputs):
        forward, ctx.backward_op = epilogue_ops_of(impl)
        ctx.options = negative_slope, gain
        ctx.save_for_backward(*inputs)
        return forward(*inputs, negative_slope, gain)

    @staticmethod
    def backward(ctx, grad_y):
        negative_slope, gain = ctx.options
        inputs = ctx.saved_tensors  # once: each access unpacks them, which checkpoints and offloading hook into
        if through_reference():
            options = {"activation": activation_of(negative_slope), "negative_slope": negative_slope, "gain": gain}

            def reference(*inputs):
                return style_epilogue_reference(**dict(zip(EPILOGUE_INPUTS, inputs, strict=True)), **options)

            grads = reference_grads(reference, inputs, grad_y, ctx.needs_input_grad[3:])
        else:
            _, demod, _, *rows = inputs
            grad_x, grad_demod, *of_rows = ctx.backward_op(grad_y, *inputs, negative_slope, gain)
            grads = grad_x, _shaped(grad_demod, demod), None, *map(_shaped, of_rows, rows)
        return None, None, None, *grads


class StyleNormFunction(torch.autograd.Function):
    """Saves its inputs and the statistics; all else is recomputed in backward. The noise has no gradient here.

    Returns (y, mean, var); only y is differentiable. A backward that is itself differentiated goes through the
    reference.
    """

    @staticmethod
    def forward(ctx, impl, negative_slope, eps, *inputs):
        forward, ctx.backward_op = norm_ops_of(impl)
        y, *used = forward(*inputs, negative_slope, eps)
        ctx.options = negative_slope, eps
        ctx.save_for_backward(*inputs, *used)
        ctx.mark_non_differentiable(*used)
        ctx.set_materialize_grads(False)
        return y, *used

    @staticmethod
    def backward(ctx, grad_y, *_):
        if grad_y is None:
            return (None,) * 9
        negative_slope, eps = ctx.options
        *inputs, mean, var = ctx.saved_tensors
        if through_reference():

            def reference(*inputs):
                arguments = dict(zip(NORM_INPUTS, inputs, strict=True))
                return style_norm_reference(**arguments, negative_slope=negative_slope, eps=eps)

            grads = reference_grads(reference, inputs, grad_y, ctx.needs_input_grad[3:])
        else:
            x, scale, shift, *rows = inputs
            grad_x, *found = ctx.backward_op(grad_y, x, scale, *rows, mean, var, negative_slope, eps)
            grad_scale, grad_shift, *of_rows = map(_shaped, found, (scale, shift, *rows[1:]))
            grads = grad_x, grad_scale, grad_shift, None, *of_rows
        return None, None, None, *grads


def _shaped(grad: Tensor, of: Tensor | None) -> Tensor | None:
    """The op's gradient of rows for autograd."""
    return None if of is None else like_parameter(grad, of)


@public
def style_epilogue(
    x: Tensor,
    *,
    demod: Tensor | None = None,
    noise: Tensor | None = None,
    noise_strength: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = "leaky_relu",
    negative_slope: float = 0.2,
    gain: float = 1.0,
    next_styles: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""All between two modulated convolutions of StyleGAN 2 (arXiv 1912.04958; 2006.05394 eq. 9-11) in one pass:
    ``next_styles * gain * act(demod * x + noise_strength * noise + bias)``.

    Args:
        x: (N, C, H, W), floating point, contiguous or channels_last (other strides cost one copy): what a convolution
            gave whose weights were neither modulated nor demodulated.
        demod: (N, C), the demodulation of that convolution.
        noise: (N, 1, H, W), or (1, 1, H, W) for all samples, in x's dtype.
        noise_strength: (C,) or a scalar tensor, of shape () or (1,). Comes with noise.
        bias: (C,) or a scalar tensor.
        activation: None, ``"relu"`` or ``"leaky_relu"``.
        negative_slope: of the latter.
        gain: of the activation, √2 in StyleGAN 2.
        next_styles: (N, C), the styles of the convolution that follows, which modulate its input in place of its
            weights.
        impl: ``"auto"``, ``"native"`` (C++), ``"triton"`` (GPUs) or ``"reference"`` (plain PyTorch).

    Returns:
        (N, C, H, W) in x's dtype and layout.

    The rows (demod, noise_strength, bias, next_styles) have one dtype: x's, or float32 where x is float16 or bfloat16.
    As with norms, autocast changes nothing here. Saved for backward are the arguments. Noise that requires a gradient,
    as in StyleGAN's projector, is added by PyTorch's own operations: several passes, and one tensor of x's size more is
    saved. Gradients of gradients (StyleGAN 2's path length regularisation) are right in eager mode, computed by the
    reference.

    Raises:
        ValueError: wrong rank, shape, or activation; one of noise and noise_strength alone.
        TypeError: x is not floating point, or a dtype does not fit.
        RuntimeError: tensors on several devices, or an ``impl`` that cannot run here.
    """
    check_image(x)
    check_option("activation", activation, ACTIVATIONS)
    if isinstance(gain, Tensor):
        raise TypeError("gain must be a number: it has no gradient; next_styles are multiplied in the same way")
    noise_strength, bias = _check_noise_and_bias(x, noise, noise_strength, bias)
    rows = {"demod": demod, "next_styles": next_styles}
    _check_rows(x, rows, noise_strength, bias)
    chosen = choose("style_epilogue", impl, x.device, {"triton": beyond_32_bits(x, 1)})
    if chosen == "reference":
        with without_autocast(x.device):
            return style_epilogue_reference(
                x,
                demod=demod,
                noise=noise,
                noise_strength=noise_strength,
                bias=bias,
                activation=activation,
                negative_slope=negative_slope,
                gain=gain,
                next_styles=next_styles,
            )
    if _needs_gradient(noise):
        x, demod, noise, noise_strength = _noisy(x, demod, noise, noise_strength), None, None, None
    inputs = x, demod, noise, noise_strength, bias, next_styles
    slope = slope_of(activation, negative_slope)
    if _needs_gradient(*inputs):
        return StyleEpilogueFunction.apply(chosen, slope, float(gain), *inputs)
    return epilogue_ops_of(chosen)[0](*inputs, slope, float(gain))


@public
def style_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    noise: Tensor | None = None,
    noise_strength: Tensor | None = None,
    bias: Tensor | None = None,
    negative_slope: float = 0.2,
    eps: float = 1e-8,
    impl: str = "auto",
) -> Tensor:
    r"""The end of a layer of StyleGAN 1 (arXiv 1812.04948) in one op: noise, bias, leaky ReLU, and AdaIN:
    ``(1 + scale) * instance_norm(leaky_relu(x + noise_strength * noise + bias)) + shift``.

    Args:
        x: (N, C, H, W), floating point, contiguous or channels_last (other strides cost one copy).
        scale, shift: (N, C), from the styles.
        noise: (N, 1, H, W), or (1, 1, H, W) for all samples, in x's dtype.
        noise_strength: (C,) or a scalar tensor, of shape () or (1,). Comes with noise.
        bias: (C,) or a scalar tensor.
        negative_slope: of the leaky ReLU; 0 makes it a ReLU, 1 the identity.
        eps: added to the biased variance; positive.
        impl: ``"auto"``, ``"native"`` (C++), ``"triton"`` (GPUs) or ``"reference"`` (plain PyTorch).

    Returns:
        (N, C, H, W) in x's dtype and layout.

    The rows (scale, shift, noise_strength, bias) have one dtype: x's, or float32 where x is float16 or bfloat16. The
    statistics are float32 for those (float64 for float64). As with other norms, autocast changes nothing here. Saved
    for backward are the arguments and the statistics. Noise that requires a gradient is added by PyTorch's own
    operations: several passes, and one tensor of x's size more is saved. Gradients of gradients are right in eager mode
    (computed by the reference).

    Raises:
        ValueError: wrong rank or shape, eps not positive; one of noise and noise_strength alone; one value to
            normalise.
        TypeError: x is not floating point, or a dtype does not fit.
        RuntimeError: tensors on several devices, or an ``impl`` that cannot run here.
    """
    check_image(x)
    check_eps(eps, True)
    noise_strength, bias = _check_noise_and_bias(x, noise, noise_strength, bias)
    _check_rows(x, {"scale": scale, "shift": shift}, noise_strength, bias)
    check_several_values(x, x.shape[2] * x.shape[3])
    chosen = choose("style_norm", impl, x.device, {"triton": beyond_32_bits(x, 1)})
    if chosen == "reference":
        options = {"negative_slope": negative_slope, "eps": eps}
        with without_autocast(x.device):
            return style_norm_reference(
                x, scale, shift, noise=noise, noise_strength=noise_strength, bias=bias, **options
            )
    if _needs_gradient(noise):
        x, noise, noise_strength = _noisy(x, None, noise, noise_strength), None, None
    inputs = x, scale, shift, noise, noise_strength, bias
    options = float(negative_slope), float(eps)
    if _needs_gradient(*inputs):
        return StyleNormFunction.apply(chosen, *options, *inputs)[0]
    return norm_ops_of(chosen)[0](*inputs, *options)[0]


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _noisy(x: Tensor, demod: Tensor | None, noise: Tensor, noise_strength: Tensor) -> Tensor:
    """d · x + w · noise for the kernels, which have no gradient of the noise."""
    with without_autocast(x.device):
        return _add_noise(x, demod, noise, noise_strength).to(x.dtype)


def _check_noise_and_bias(x, noise, noise_strength, bias) -> tuple[Tensor | None, Tensor | None]:
    """Checks the noise; gives its strength and the bias a value for each channel."""
    if (noise is None) != (noise_strength is None):
        raise ValueError("noise and noise_strength must either both be None or neither be None")
    n, c, h, w = x.shape
    if noise is not None:
        batch = 1 if noise.dim() == 4 and noise.shape[0] == 1 else n
        check_shape("noise", noise, (batch, 1, h, w), x)
        check_device("noise", noise, x)
        if noise.dtype != x.dtype:
            raise TypeError(f"expected noise of dtype {x.dtype} for input of that dtype, got {noise.dtype}")
    scalars = ((), (1,))
    return tuple(t.expand(c) if t is not None and tuple(t.shape) in scalars else t for t in (noise_strength, bias))


def _check_rows(x, of_samples, noise_strength, bias) -> None:
    n, c = x.shape[:2]
    rows = {name: (tensor, (n, c)) for name, tensor in of_samples.items()}
    rows |= {"noise_strength": (noise_strength, (c,)), "bias": (bias, (c,))}
    dtypes = {}
    for name, (tensor, shape) in rows.items():
        if tensor is not None:
            check_shape(name, tensor, shape, x)
            check_device(name, tensor, x)
            check_parameter_dtype(tensor.dtype, x)
            dtypes.setdefault(tensor.dtype, name)
    if len(dtypes) > 1:
        found = " and ".join(f"{dtype} for {name}" for dtype, name in dtypes.items())
        raise TypeError(f"expected parameters of one dtype, got {found}")
