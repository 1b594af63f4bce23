r"""The two gates of CBAM (arXiv 1807.06521, section 3), which scale features by numbers in (0, 1):

    y = a · x

Channel gate (eq. 2): one number for each sample and channel, from the maximum and the mean over the pixels,

    a = σ(MLP(mean(x)) + MLP(max(x))),    MLP(v) = W₂ relu(W₁ v + b₁) + b₂

Spatial gate (eq. 3): one number for each sample and pixel, from the maximum and the mean over the channels,

    a = σ(BN(f ⊛ [max(x); mean(x)]))

with a convolution f of 2 channels to 1 (7x7 in the paper) and a batch norm of that channel, which the authors' code has
and the paper leaves out.

Both are two passes over x in either direction: x is pooled, the gate is made of the few numbers that this gives, x is
multiplied. Backward sums dy x to the gradient of a, goes back through the small layers, and adds what they give to each
pixel (the mean) and to the first maximum. Ops are the passes and, on the CPU, the perceptron and the convolution,
elsewhere PyTorch's operations; the batch norm is that of modulate.py.
"""

from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pixnorm.ops._dispatch import choose, define_op
from pixnorm.ops.checks import (
    check_device,
    check_eps,
    check_image,
    check_parameter_dtype,
    check_running_statistics,
    check_several_values,
    check_shape,
)
from pixnorm.ops.common import (
    batch_norm,
    beyond_32_bits,
    call_reference,
    dense,
    dense_like,
    like_parameter,
    public,
    reference_grads,
    through_reference,
    triton_ops,
    wide,
    without_autocast,
)
from pixnorm.ops.modulate import gradients_of_used
from pixnorm.ops.modulate import ops_of as norm_ops_of
from pixnorm.ops.statistics import update_running
from pixnorm.ops.synchronised import (
    check_count,
    exchange,
    exchange_gradients,
    group_of,
    in_turn,
    move_running,
    statistics_of_all,
)

# The parameters of both gates, in the order of their arguments.
CHANNEL_PARAMETERS = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
SPATIAL_PARAMETERS = ("weight", "bn_weight", "bn_bias")


def _pooled(x: Tensor, spatial: bool) -> Tensor:
    """Maximum and mean over channels, (N, 2, H, W), or over pixels, (N, 2, C), in the dtype of sums.

    Unlike ``amax``, both maxima give the gradient to the first of equal ones only.
    """
    if spatial:
        maximum = x.max(1).values
    elif torch.are_deterministic_algorithms_enabled():
        maximum = x.flatten(2).max(2).values
    else:  # up to three times as fast
        maximum = F.adaptive_max_pool2d(x, 1)[..., 0, 0]
    mean = wide(x).mean(1 if spatial else (2, 3))
    return torch.stack([wide(maximum), mean], 1)


def _perceptron(pooled: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    """The sum of what it makes of the maxima and of the means."""
    hidden = F.relu(F.linear(pooled, fc1_weight, fc1_bias))
    return F.linear(hidden, fc2_weight, fc2_bias).sum(1)


def channel_gate_reference(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor
) -> Tensor:
    """The channel gate in plain PyTorch: the specification. Arguments as in :func:`channel_gate`."""
    pooled = _pooled(x, False)
    layers = [t.to(pooled.dtype) for t in (fc1_weight, fc1_bias, fc2_weight, fc2_bias)]
    gate = torch.sigmoid(_perceptron(pooled, *layers))
    return (gate[..., None, None] * x).to(x.dtype)


def spatial_gate_reference(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float = 0.01,
    eps: float = 1e-5,
) -> Tensor:
    """The spatial gate in plain PyTorch: the specification. Arguments as in :func:`spatial_gate`."""
    pooled = _pooled(x, True)
    weight, bn_weight, bn_bias = (t.to(pooled.dtype) for t in (weight, bn_weight, bn_bias))
    running = [None if t is None else t.to(pooled.dtype) for t in (running_mean, running_var)]
    z = _convolution(pooled, weight)
    gate = torch.sigmoid(batch_norm(z, *running, bn_weight, bn_bias, training, momentum, eps))
    for buffer, moved in zip((running_mean, running_var), running, strict=True):
        if training and buffer is not moved:  # the dtype of the sums is another one
            buffer.copy_(moved)
    return (gate * x).to(x.dtype)


def _convolution(pooled: Tensor, weight: Tensor) -> Tensor:
    """Zero padding keeps the size."""
    return F.conv2d(pooled, weight, padding=(weight.shape[2] // 2, weight.shape[3] // 2))


# The schemas. `pooled` holds maxima, then means: (N, 2, H, W) where spatial, else (N, 2, C); `index` where the first
# maximum is, a channel or a pixel h W + w, int32. The gates are σ(logits). `logits`, their gradient and `index` are
# (N, 1, H, W) or (N, C). All but x, y and their gradients have the dtype of sums. grad_y has the layout of grad_x.
def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _of_gates(x: Tensor, spatial: bool, dtype: torch.dtype) -> Tensor:
    n, c, h, w = x.shape
    return x.new_empty((n, 1, h, w) if spatial else (n, c), dtype=dtype)


def gate_pool_fake(x, spatial):
    n, c, h, w = x.shape
    pooled = x.new_empty((n, 2, h, w) if spatial else (n, 2, c), dtype=_accumulator(x))
    return pooled, _of_gates(x, spatial, torch.int32)


def gate_fwd_fake(x, logits, spatial):
    return dense_like(x)


def gate_reduce_fake(grad_y, x, logits, spatial):
    return _of_gates(x, spatial, _accumulator(x))


def gate_bwd_fake(grad_y, logits, grad_pooled, index, spatial):
    return dense_like(grad_y)


def gate_perceptron_fwd_fake(pooled, *parameters):
    return pooled.new_empty((pooled.shape[0], pooled.shape[2]))


def gate_perceptron_grad_fake(grad_logits, pooled, fc1_weight, fc1_bias, fc2_weight):
    shapes = pooled.shape, fc1_weight.shape, fc1_bias.shape, fc2_weight.shape, (pooled.shape[2],)
    return tuple(pooled.new_empty(shape) for shape in shapes)


def gate_conv_fwd_fake(pooled, weight):
    n, _, h, w = pooled.shape
    return pooled.new_empty((n, 1, h, w))


def gate_conv_grad_fake(grad_z, pooled, weight):
    return pooled.new_empty(pooled.shape), pooled.new_empty(weight.shape)


def _define(schema, fake, **options):
    return define_op(schema, fake, native=("cpu",), **options)


class GateOps(NamedTuple):
    """The passes over features: maxima and means; y = σ(logits) x; the gradient of the logits, from Σ dy x; dx."""

    pool: torch._ops.OpOverload
    forward: torch._ops.OpOverload
    reduce: torch._ops.OpOverload
    backward: torch._ops.OpOverload


_NATIVE = GateOps(
    _define("gate_pool(Tensor x, bool spatial) -> (Tensor pooled, Tensor index)", gate_pool_fake, triton="gate"),
    _define("gate_fwd(Tensor x, Tensor logits, bool spatial) -> Tensor y", gate_fwd_fake, triton="gate"),
    _define(
        "gate_reduce(Tensor grad_y, Tensor x, Tensor logits, bool spatial) -> Tensor grad_logits",
        gate_reduce_fake,
        triton="gate",
    ),
    _define(
        "gate_bwd(Tensor grad_y, Tensor logits, Tensor grad_pooled, Tensor index, bool spatial) -> Tensor grad_x",
        gate_bwd_fake,
        triton="gate",
    ),
)

# The small layers on the CPU, in the dtype of sums: PyTorch's have other bits with other numbers of threads.
_PERCEPTRON = "Tensor pooled, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight"
gate_perceptron_fwd = _define(
    f"gate_perceptron_fwd({_PERCEPTRON}, Tensor fc2_bias) -> Tensor logits",
    gate_perceptron_fwd_fake,
    flops=lambda pooled, fc1, *args, **kwargs: 6 * pooled[0] * prod(fc1),
)
gate_perceptron_grad = _define(
    f"gate_perceptron_grad(Tensor grad_logits, {_PERCEPTRON}) -> (Tensor grad_pooled, Tensor grad_fc1_weight, "
    "Tensor grad_fc1_bias, Tensor grad_fc2_weight, Tensor grad_fc2_bias)",
    gate_perceptron_grad_fake,
    flops=lambda grad, pooled, fc1, *args, **kwargs: 16 * pooled[0] * prod(fc1),
)
gate_conv_fwd = _define(
    "gate_conv_fwd(Tensor pooled, Tensor weight) -> Tensor z",
    gate_conv_fwd_fake,
    flops=lambda pooled, weight, **kwargs: prod(pooled) * prod(weight),
)
gate_conv_grad = _define(
    "gate_conv_grad(Tensor grad_z, Tensor pooled, Tensor weight) -> (Tensor grad_pooled, Tensor grad_weight)",
    gate_conv_grad_fake,
    flops=lambda grad_z, pooled, weight, **kwargs: 2 * prod(pooled) * prod(weight),
)


def ops_of(impl: str) -> GateOps:
    """The ops of an impl."""
    if impl != "triton":
        return _NATIVE
    forward, backward = triton_ops("gate")
    (_, pool), (_, reduce) = triton_ops("gate", "pool"), triton_ops("gate", "reduce")
    return GateOps(pool, forward, reduce, backward)


# ---- channel gate ----


class ChannelGateFunction(torch.autograd.Function):
    """Saves its inputs and numbers of (N, C): pooled features, where maxima are, logits.

    A backward that is itself differentiated goes through the reference.
    """

    @staticmethod
    def forward(ctx, impl, x, *parameters):
        y, *saved = channel_gate_forward(impl, x, *parameters)
        ctx.impl = impl
        ctx.save_for_backward(x, *parameters, *saved)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        saved = ctx.saved_tensors  # once: each access unpacks them, which checkpoints and offloading hook into
        inputs, (pooled, index, logits) = saved[:5], saved[5:]
        if through_reference():
            return None, *reference_grads(channel_gate_reference, inputs, grad_y, ctx.needs_input_grad[1:])
        x, *parameters = inputs
        ops, grad_y = ops_of(ctx.impl), dense(grad_y, x)
        grad_logits = ops.reduce(grad_y, dense(x, x), logits, False)
        layers = _as_sums(pooled, *parameters)[:3]
        with without_autocast(x.device):
            backward = _perceptron_backward if ctx.impl == "triton" else gate_perceptron_grad
            grad_pooled, *grads = backward(grad_logits, pooled, *layers)
        grad_x = ops.backward(grad_y, logits, grad_pooled, index, False)
        return None, grad_x, *(_shaped(grad, of) for grad, of in zip(grads, parameters, strict=True))


def channel_gate_forward(impl: str, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, and what is saved for backward beside the arguments."""
    ops, x = ops_of(impl), dense(x, x)
    pooled, index = ops.pool(x, False)
    layers = _as_sums(pooled, *parameters)
    with without_autocast(x.device):
        logits = _perceptron(pooled, *layers) if impl == "triton" else gate_perceptron_fwd(pooled, *layers)
    return ops.forward(x, logits, False), pooled, index, logits


def _perceptron_backward(
    grad: Tensor, pooled: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of the pooled features and the parameters in PyTorch's operations. `grad` (N, C) is that of the sum
    of both outputs, and so that of each."""
    hidden = F.relu(F.linear(pooled, fc1_weight, fc1_bias))
    grad_hidden = torch.where(hidden <= 0, 0, (grad @ fc2_weight)[:, None])
    flat = grad_hidden.flatten(0, 1)
    return (
        grad_hidden @ fc1_weight,
        flat.mT @ pooled.flatten(0, 1),
        flat.sum(0),
        grad.mT @ hidden.sum(1),
        2 * grad.sum(0),
    )


# ---- spatial gate ----


class SpatialGateFunction(torch.autograd.Function):
    """Saves its inputs and numbers of (N, H, W): pooled features, where maxima are, what the convolution and the batch
    norm gave.

    Returns (y, mean, var), the statistics of the batch norm, and with a process group of how many values they are; only
    y is differentiable. With a group, statistics are exchanged here, and their gradients in backward. A backward that
    is itself differentiated goes through the reference.
    """

    @staticmethod
    def forward(ctx, impl, group, training, eps, given, x, *parameters):
        y, pooled, index, z, logits, *used = spatial_gate_forward(impl, group, training, eps, given, x, *parameters)
        ctx.options = impl, group, training, eps
        ctx.save_for_backward(x, *parameters, pooled, index, z, logits, *used)
        ctx.mark_non_differentiable(*used)
        ctx.set_materialize_grads(False)
        return y, *used

    @staticmethod
    def backward(ctx, grad_y, *_):
        if grad_y is None:
            return (None,) * 9
        impl, group, training, eps = ctx.options
        saved = ctx.saved_tensors  # once: each access unpacks them, which checkpoints and offloading hook into
        inputs, (pooled, index, z, logits), used, count = saved[:4], saved[4:8], saved[8:10], saved[10:]
        if through_reference():

            def reference(*inputs):
                if group is not None:
                    return _synchronised_reference(group, eps, *inputs)[0]
                given = (None, None) if training else used
                return spatial_gate_reference(*inputs, *given, training=training, eps=eps)

            return (None,) * 5 + tuple(reference_grads(reference, inputs, grad_y, ctx.needs_input_grad[5:]))
        x, *parameters = inputs
        ops, grad_y = ops_of(impl), dense(grad_y, x)
        own = training and group is None  # statistics are of this z
        with without_autocast(x.device):
            weight, *affine = _as_sums(pooled, *parameters)
            grad = ops.reduce(grad_y, dense(x, x), logits, True)
            grad, *of_affine = norm_ops_of(impl)[1](grad, z, *affine, *used, eps, False, 0.0, 1, None, own)
            if group is not None:
                of_used = gradients_of_used(affine[0], 0.0, *of_affine, used[1], eps)
                grad = grad + exchange_gradients((z,), used[:1], *count, of_used, group, norm_ops_of(impl)[0])[0]
            backward = _convolution_backward if impl == "triton" else gate_conv_grad
            grad_pooled, *grads = *backward(grad, pooled, weight), *of_affine
        grad_x = ops.backward(grad_y, logits, grad_pooled, index, True)
        return *(None,) * 5, grad_x, *(_shaped(grad, of) for grad, of in zip(grads, parameters, strict=True))


def spatial_gate_forward(
    impl: str,
    group: "torch.distributed.ProcessGroup | None",
    training: bool,
    eps: float,
    given: tuple[Tensor | None, Tensor | None],
    x: Tensor,
    *parameters: Tensor,
) -> tuple[Tensor, ...]:
    """y, and what is saved for backward beside the arguments."""
    ops, x = ops_of(impl), dense(x, x)
    pooled, index = ops.pool(x, True)
    weight, *affine = _as_sums(pooled, *parameters)
    with without_autocast(x.device):
        z = _convolution(pooled, weight) if impl == "triton" else gate_conv_fwd(pooled, weight)
    count = ()
    if group is not None:
        *count, mean, var = exchange((z,), group)
        check_count(*count, x)
        given = mean, var
    logits, mean, var = norm_ops_of(impl)[0](z, *affine, *given, eps, False, 0.0, 1, None)
    return ops.forward(x, logits, True), pooled, index, z, logits, mean, var, *count


def _synchronised_reference(
    group: "torch.distributed.ProcessGroup", eps: float, x: Tensor, weight: Tensor, *affine: Tensor
) -> tuple[Tensor, ...]:
    """y, and the statistics of the whole batch: mean, variance, count."""
    with without_autocast(x.device):
        pooled = _pooled(x, True)
        count, *used = statistics_of_all((_convolution(pooled, weight.to(pooled.dtype)),), 1, group, None)
        return spatial_gate_reference(x, weight, *affine, *used, training=False, eps=eps), *used, count


@torch._disable_dynamo
def _synchronised_gate(
    chosen: str, group: "torch.distributed.ProcessGroup", eps: float, x: Tensor, *parameters: Tensor
) -> tuple[Tensor, ...]:
    """The same by an impl."""
    if chosen == "reference":
        return _synchronised_reference(group, eps, x, *parameters)
    arguments = chosen, group, True, eps, (None, None), x, *parameters
    if _needs_gradient(x, *parameters):
        y, *used = SpatialGateFunction.apply(*arguments)
        in_turn(y, group)
        return y, *used
    y, *_, mean, var, count = spatial_gate_forward(*arguments)
    return y, mean, var, count


def _convolution_backward(grad: Tensor, pooled: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the pooled features and the weight in PyTorch's operations."""
    padding = weight.shape[2] // 2, weight.shape[3] // 2
    grad_pooled = torch.nn.grad.conv2d_input(pooled.shape, weight, grad, padding=padding)
    return grad_pooled, torch.nn.grad.conv2d_weight(pooled, weight.shape, grad, padding=padding)


# ---- both ----


def _as_sums(pooled: Tensor, *parameters: Tensor) -> list[Tensor]:
    """Contiguous, in the dtype of sums, so that strides do not change which of PyTorch's kernels runs."""
    return [t.to(pooled.dtype).contiguous() for t in parameters]


def _shaped(grad: Tensor, of: Tensor) -> Tensor:
    """A gradient for autograd."""
    return like_parameter(grad.to(of.dtype), of)


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


@public
def channel_gate(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, *, impl: str = "auto"
) -> Tensor:
    r"""CBAM's channel gate (arXiv 1807.06521, eq. 2): ``x * sigmoid(mlp(x.mean((2, 3))) + mlp(x.amax((2, 3))))`` with
    ``mlp(v) = fc2(relu(fc1(v)))``.

    Args:
        x: (N, C, H, W), floating point, contiguous or channels_last (other strides cost one copy).
        fc1_weight, fc1_bias: (R, C) and (R,), of the first linear layer, in CBAM with R = C / 16.
        fc2_weight, fc2_bias: (C, R) and (C,), of the second.
        impl: ``"auto"``, ``"native"`` (CPU), ``"triton"`` (GPUs) or ``"reference"`` (plain PyTorch).

    Returns:
        (N, C, H, W) in x's dtype and layout.

    Parameters have one dtype: x's, or float32 where x is float16 or bfloat16. Between the two passes over x all is
    float32 for those (float64 for float64), and autocast changes nothing. The gradient of a maximum goes to the first
    pixel that has it. Saved for backward are the arguments and 4 N C numbers. Gradients of gradients are right in eager
    mode (computed by the reference).

    Raises:
        ValueError: wrong rank or shape; x has no channels or no pixels.
        TypeError: x is not floating point, or a dtype does not fit.
        RuntimeError: tensors on several devices, or an ``impl`` that cannot run here.
    """
    _check_input(x)
    c = x.shape[1]
    if fc1_weight.dim() != 2 or fc1_weight.shape[0] == 0:
        raise ValueError(f"fc1_weight must have shape (R, {c}) with R > 0, got {tuple(fc1_weight.shape)}")
    r = fc1_weight.shape[0]
    parameters = fc1_weight, fc1_bias, fc2_weight, fc2_bias
    _check_parameters(x, CHANNEL_PARAMETERS, parameters, ((r, c), (r,), (c, r), (c,)))
    chosen = choose("gate", impl, x.device, {"triton": beyond_32_bits(x, 1)})
    if chosen == "reference":
        with without_autocast(x.device):
            return channel_gate_reference(x, *parameters)
    if _needs_gradient(x, *parameters):
        return ChannelGateFunction.apply(chosen, x, *parameters)
    return channel_gate_forward(chosen, x, *parameters)[0]


@public
def spatial_gate(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float = 0.01,
    eps: float = 1e-5,
    impl: str = "auto",
    process_group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    r"""CBAM's spatial gate (arXiv 1807.06521, eq. 3): ``x * sigmoid(bn(conv([x.amax(1), x.mean(1)])))``.

    Args:
        x: (N, C, H, W), floating point, contiguous or channels_last (other strides cost one copy).
        weight: (1, 2, K, L) with odd K and L, of the convolution, 7x7 in CBAM; zero padding keeps the size. The first
            channel is for the maximum.
        bn_weight, bn_bias: (1,), scale and shift of the batch norm.
        running_mean, running_var: (1,); used if not ``training``, else updated in place as in ``F.batch_norm``.
        training: normalise with the statistics of this batch.
        momentum: weight of this batch in the running statistics; 0.01 in CBAM's code.
        eps: added to the variance; positive in training.
        impl: ``"auto"``, ``"native"`` (CPU), ``"triton"`` (GPUs) or ``"reference"`` (plain PyTorch).
        process_group: the processes whose batches, together, are the batch whose statistics are used in training
            (:mod:`pixnorm.ops.synchronised`); None for that of this process alone.

    Returns:
        (N, C, H, W) in x's dtype and layout.

    Parameters have one dtype: x's, or float32 where x is float16 or bfloat16; running statistics that of the
    parameters, or float32 beside those in half precision. Between the two passes over x all is float32 for half types
    (float64 for float64), and autocast changes nothing. The gradient of a maximum goes to the first channel that has
    it. Saved for backward are the arguments and 5 N H W numbers. Gradients of gradients are right in eager mode
    (computed by the reference).

    Raises:
        ValueError: wrong rank or shape, eps not positive; x has no channels or no pixels, or in training one.
        TypeError: x is not floating point, or a dtype does not fit.
        RuntimeError: tensors on several devices, running statistics missing where they are needed, or an ``impl`` that
            cannot run here.
    """
    _check_input(x)
    check_eps(eps, training)
    if weight.dim() != 4 or not (weight.shape[2] % 2 and weight.shape[3] % 2):
        raise ValueError(f"weight must have shape (1, 2, K, L) with odd K and L, got {tuple(weight.shape)}")
    parameters = weight, bn_weight, bn_bias
    _check_parameters(x, SPATIAL_PARAMETERS, parameters, ((1, 2, *weight.shape[2:]), (1,), (1,)))
    buffers = running_mean, running_var
    of_buffers = zip(("running_mean", "running_var"), buffers, ((1,), (1,)), strict=True)
    check_running_statistics(of_buffers, x, weight.dtype, training)
    n, _, h, w = x.shape
    group = group_of(process_group, training)
    if training and group is None:
        check_several_values(x, n * h * w)
    chosen = choose("gate", impl, x.device, {"triton": beyond_32_bits(x, 1)})
    if group is not None:
        y, *used, count = _synchronised_gate(chosen, group, float(eps), x, *parameters)
        move_running(buffers, used, momentum, count)
        return y
    if chosen == "reference":
        options = {"training": training, "momentum": momentum, "eps": eps}
        return call_reference(spatial_gate_reference, (x, *parameters), buffers, **options)
    given = (None, None) if training else buffers
    if _needs_gradient(x, *parameters):
        y, *used = SpatialGateFunction.apply(chosen, None, training, float(eps), given, x, *parameters)
    else:
        y, *_, mean, var = spatial_gate_forward(chosen, None, training, float(eps), given, x, *parameters)
        used = mean, var
    if training and running_mean is not None and x.numel() > 0:
        update_running(buffers, used, momentum, n * h * w)
    return y


def _check_input(x: Tensor) -> None:
    check_image(x)
    if any(size == 0 for size in x.shape[1:]):
        raise ValueError(f"expected at least one channel and one pixel, got input of shape {tuple(x.shape)}")


def _check_parameters(x, names, parameters, shapes) -> None:
    for name, tensor, shape in zip(names, parameters, shapes, strict=True):
        check_shape(name, tensor, shape, x)
        check_device(name, tensor, x)
        check_parameter_dtype(tensor.dtype, x)
        if tensor.dtype != parameters[0].dtype:
            found = f"{parameters[0].dtype} for {names[0]} and {tensor.dtype} for {name}"
            raise TypeError(f"expected parameters of one dtype, got {found}")
