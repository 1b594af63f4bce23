"""Helpers that ops share: layouts, PyTorch's flags, double backward through the reference."""

import contextlib
import functools
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

ACTIVATIONS = (None, "relu", "leaky_relu")
HALF = (torch.float16, torch.bfloat16)
FLOAT = (torch.float64, torch.float32, *HALF)


def constant_in_graphs(function: Callable) -> Callable:
    """``torch.compiler.assume_constant_result`` without importing the compiler, which takes two seconds."""
    function._dynamo_marked_constant = True
    return function


def public(function: Callable) -> Callable:
    """A function that arguments with ``__torch_function__`` can intercept, as they can PyTorch's own.

    So ``torch.fx`` records a call as one node and does not trace into it.
    """

    @functools.wraps(function)
    def call(*args, **kwargs):
        tensors = (*args, *kwargs.values())
        if has_torch_function(tensors):
            return handle_torch_function(call, tensors, *args, **kwargs)
        return function(*args, **kwargs)

    return call


def slope_of(activation: str | None, negative_slope: float) -> float | None:
    """The ops' encoding of an activation: None, or the slope for negative values (0 for ReLU)."""
    return {None: None, "relu": 0.0, "leaky_relu": float(negative_slope)}[activation]


def activation_of(negative_slope: float | None) -> str | None:
    """The inverse of ``slope_of``."""
    return None if negative_slope is None else "leaky_relu" if negative_slope else "relu"


def activate(y: Tensor, activation: str | None, negative_slope: float) -> Tensor:
    """The activation in plain PyTorch."""
    if activation == "leaky_relu":
        return F.leaky_relu(y, negative_slope)
    return F.relu(y) if activation == "relu" else y


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function once, after a module has been imported."""

    def __init__(self, name: str, function: Callable[[], None]):
        self.name, self.function = name, function

    def find_spec(self, fullname, path, target=None):
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module) -> None:
                execute(module)
                self.function()

            spec.loader.exec_module = exec_module
        return spec


def when_imported(name: str, function: Callable[[], None]) -> None:
    """Call a function once a module is imported: now, or when someone else imports it."""
    if name in sys.modules:
        function()
    else:
        sys.meta_path.insert(0, _AfterImport(name, function))


@constant_in_graphs
def onlooker() -> str | None:
    """A transform or tracer that is active and supports only PyTorch's own operations; None if there is none."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func is active"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if torch.jit.is_tracing():
        return "torch.jit.trace is active"
    # There is no ONNX export without this module having been imported.
    if "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export():
        return "torch.onnx.export is active"
    return None


@constant_in_graphs
def _transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_channels_last(x: Tensor) -> bool:
    """Tensors that are dense in both formats (C == 1) count as contiguous; so do all in a transform of torch.func, as
    vmap cannot say."""
    return not x.is_contiguous() and not _transformed() and x.is_contiguous(memory_format=torch.channels_last)


def memory_format_of(x: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def dense(x: Tensor, like: Tensor) -> Tensor:
    """x, dense, in the layout of another tensor."""
    return x.contiguous(memory_format=memory_format_of(like))


def dense_like(x: Tensor, scale: int = 1, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor in x's layout: channels_last if x is channels_last and not contiguous, else contiguous."""
    n, c, h, w = x.shape
    shape = n, c, h * scale, w * scale
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=memory_format_of(x))


def instance_norm(x: Tensor, eps: float) -> Tensor:
    """``F.instance_norm``; for one sample batch norm, which then is the same.

    PyTorch's instance norm has a wrong gradient there, on the CPU, if that of its output is in channels_last (torch
    2.13).
    """
    if x.shape[0] == 1:
        return F.batch_norm(x, None, None, None, None, True, 0.0, eps)
    return F.instance_norm(x, eps=eps)


def batch_norm(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """``F.batch_norm``; also differentiable in given statistics, for which PyTorch's has no gradients."""
    if training or not (mean.requires_grad or var.requires_grad):
        return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    x_hat = (x - mean[:, None, None]) * (var + eps).rsqrt()[:, None, None]
    if weight is not None:
        x_hat = x_hat * weight[:, None, None] + bias[:, None, None]
    return x_hat.to(x.dtype)


def fake_gradient(of: Tensor | None, x: Tensor) -> Tensor:
    """An empty gradient of an argument beside x: maps keep their layout; without the argument it has no elements."""
    if of is None:
        return x.new_empty((0,))
    return dense_like(of) if of.dim() == 4 else torch.empty_like(of, memory_format=torch.contiguous_format)


@constant_in_graphs
def autocast_available(device_type: str) -> bool:
    """``torch.amp.is_autocast_available``, which the compiler of torch 2.11 cannot trace."""
    return torch.amp.is_autocast_available(device_type)


def under_autocast(device: torch.device) -> bool:
    """Whether autocast is on for a device."""
    return autocast_available(device.type) and torch.is_autocast_enabled(device.type)


@constant_in_graphs
def exporting() -> bool:
    """``torch.compiler.is_exporting``, which the compiler of torch 2.11 takes for true in any graph."""
    return torch.compiler.is_exporting()


def without_autocast(device: torch.device):
    """A context in which autocast is off: operations compute in the dtype of their inputs."""
    if autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


@constant_in_graphs
def _tf32_of_convolutions() -> bool:
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


@constant_in_graphs
def _one_tf32_flag() -> bool:
    """Whether convolutions and RNNs have the same flag; if not, reading the older one raises an error."""
    try:
        return torch.backends.cudnn.allow_tf32 is not None
    except RuntimeError:
        return False


def convolutions_allow_tf32() -> bool:
    """Whether convolutions may round their float32 operands to TF32 (on GPUs that can)."""
    if torch.compiler.is_compiling() and _one_tf32_flag():
        return torch.backends.cudnn.allow_tf32  # the compiler guards on this one
    return _tf32_of_convolutions()


@constant_in_graphs
def products_allow_tf32() -> bool:
    """The same for matrix products (``F.linear``), which have a flag of their own, off by default."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def drawing(generator: torch.Generator | None) -> dict[str, torch.Generator]:
    """The option of PyTorch's functions that draw; left out without a generator, as with one, even None, they do not
    take symbolic sizes (``torch.compile`` and ``torch.export`` for any batch)."""
    return {} if generator is None else {"generator": generator}


def wide(t: Tensor) -> Tensor:
    """In the dtype of sums; squares in half precision may overflow."""
    return t.float() if t.dtype in HALF else t


def triton_ops(name: str, backward: str = "bwd") -> tuple[torch._ops.OpOverload, torch._ops.OpOverload]:
    """The forward and the backward op in Triton; their schemas are those of the native ops."""
    of = torch.ops.pixnorm
    return getattr(of, f"{name}_fwd_triton").default, getattr(of, f"{name}_{backward}_triton").default


def through_reference() -> bool:
    """Whether a backward must use PyTorch's own operations: it is itself being differentiated or transformed."""
    return torch.is_grad_enabled() or onlooker() is not None


def like_parameter(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """A gradient with its parameter's strides, which DDP and fused optimisers expect.

    Kernels return it contiguous; for depthwise and 1x1 weights channels_last is the same memory order.
    """
    if grad is None or parameter is None or grad.stride() == parameter.stride():
        return grad
    if parameter.is_contiguous() and grad.is_contiguous():  # sizes of 1 have any stride
        return grad.as_strided(parameter.shape, parameter.stride())
    return torch.empty_like(parameter, dtype=grad.dtype).copy_(grad)


def beyond_32_bits(x: Tensor, upsample: int) -> str | None:
    """Why the Triton kernels of a norm cannot take x; None where they can."""
    if torch.compiler.is_compiling() or exporting():
        return None  # the comparison would specialise the graph on sizes
    n, c, h, w = x.shape
    if c * h * w * upsample**2 >= 2**31 or n * h * w >= 2**31:
        return f"the Triton kernels index the elements of a sample in 32 bits, got input of shape {tuple(x.shape)}"
    return None


def call_reference(
    reference: Callable[..., Tensor], inputs: Sequence[Tensor | None], buffers: Sequence[Tensor | None], **options
) -> Tensor:
    """The reference of a norm, whose running statistics follow the buffers; autocast changes nothing inside."""
    # F.batch_norm saves the running buffers for backward, and DDP rewrites them by broadcast before that.
    copies = [b if b is None else b.clone() for b in buffers]
    with without_autocast(inputs[0].device):
        y = reference(*inputs, *copies, **options)
    if options["training"]:
        for buffer, copy in zip(buffers, copies, strict=True):
            if buffer is not None:
                buffer.copy_(copy)
    return y


def reference_grads(
    reference: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad_y: Tensor, needs: Iterable[bool]
) -> list[Tensor | None]:
    """The gradients of ``reference(*inputs)``, themselves differentiable if gradients are enabled."""
    needs, differentiable = list(needs), torch.is_grad_enabled()
    with torch.enable_grad(), without_autocast(grad_y.device):
        # Views, so that a tensor passed twice does not get the sum of both gradients twice.
        inputs = [None if t is None else t.view_as(t) for t in inputs]
        y = reference(*inputs)
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    grads = iter(torch.autograd.grad(y, wanted, grad_y, create_graph=differentiable))
    return [next(grads) if need else None for need in needs]


@constant_in_graphs
def gpu_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


def rows_of_classes(y: Tensor, table: Tensor) -> Tensor:
    """Rows of a (K, C) table by classes, or by one-hot (also soft) vectors."""
    return F.embedding(y, table) if y.dim() == 1 else y.to(table.dtype) @ table
