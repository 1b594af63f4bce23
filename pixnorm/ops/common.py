"""What the ops share: layouts, PyTorch's flags, the way back to the reference for gradients of gradients."""

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
    """What ``torch.compiler.assume_constant_result`` does; that one imports the compiler, for two seconds."""
    function._dynamo_marked_constant = True
    return function


def public(function: Callable) -> Callable:
    """A function that others may take over, as they may PyTorch's own: arguments with ``__torch_function__``.

    So ``torch.fx`` records a call of it whole, and does not look inside.
    """

    @functools.wraps(function)
    def call(*args, **kwargs):
        tensors = (*args, *kwargs.values())
        if has_torch_function(tensors):
            return handle_torch_function(call, tensors, *args, **kwargs)
        return function(*args, **kwargs)

    return call


def slope_of(activation: str | None, negative_slope: float) -> float | None:
    """As ops are told of an activation: None, or the slope for negative values; ReLU's is 0."""
    return {None: None, "relu": 0.0, "leaky_relu": float(negative_slope)}[activation]


def activate(y: Tensor, activation: str | None, negative_slope: float) -> Tensor:
    """The same in plain PyTorch."""
    if activation == "leaky_relu":
        return F.leaky_relu(y, negative_slope)
    return F.relu(y) if activation == "relu" else y


class _Following(importlib.abc.MetaPathFinder):
    """Calls a function behind the import of a module, once."""

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
    """Call a function when a module is there: now, or as soon as somebody imports it, which is not to be us."""
    if name in sys.modules:
        function()
    else:
        sys.meta_path.insert(0, _Following(name, function))


@constant_in_graphs
def onlooker() -> str | None:
    """Who looks at each operation of a call and knows PyTorch's own alone; None if nobody does."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func is active"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if torch.jit.is_tracing():
        return "torch.jit.trace is active"
    # Exporting to ONNX without its module having been imported cannot be.
    if "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export():
        return "torch.onnx.export is active"
    return None


def is_channels_last(x: Tensor) -> bool:
    """What is both, as of one channel, counts as contiguous."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def memory_format_of(x: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def dense(x: Tensor, like: Tensor) -> Tensor:
    """x in the layout of another tensor."""
    return x.contiguous(memory_format=memory_format_of(like))


def dense_like(x: Tensor, scale: int = 1, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor in x's layout: channels_last if x is that and not contiguous, else contiguous."""
    n, c, h, w = x.shape
    shape = n, c, h * scale, w * scale
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=memory_format_of(x))


@constant_in_graphs
def autocast_available(device_type: str) -> bool:
    """What torch's own function says; the compiler of torch 2.11 cannot trace that one."""
    return torch.amp.is_autocast_available(device_type)


@constant_in_graphs
def exporting() -> bool:
    """Whether ``torch.export`` traces. The compiler of torch 2.11 takes torch's own function for true in any graph."""
    return torch.compiler.is_exporting()


def without_autocast(device: torch.device):
    """For what computes in the dtype of its inputs whatever surrounds it."""
    if autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


@constant_in_graphs
def _tf32_of_convolutions() -> bool:
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


@constant_in_graphs
def _one_tf32_flag() -> bool:
    """Whether convolutions and recurrent networks share a flag; otherwise PyTorch refuses to tell the older one."""
    try:
        return torch.backends.cudnn.allow_tf32 is not None
    except RuntimeError:
        return False


def convolutions_allow_tf32() -> bool:
    """Whether convolutions may round their float32 operands to TF32 (on GPUs that can)."""
    if torch.compiler.is_compiling() and _one_tf32_flag():
        return torch.backends.cudnn.allow_tf32  # on this one the compiler puts a guard
    return _tf32_of_convolutions()


@constant_in_graphs
def products_allow_tf32() -> bool:
    """The same of matrix products, as of ``F.linear``; a flag of their own, off by default."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def triton_ops(name: str) -> tuple[torch._ops.OpOverload, torch._ops.OpOverload]:
    """The forward and the backward op of Triton's kernels; their schemas are those of the native ones."""
    of = torch.ops.pixnorm
    return getattr(of, f"{name}_fwd_triton").default, getattr(of, f"{name}_bwd_triton").default


def through_reference() -> bool:
    """Whether a backward has to be made of PyTorch's own operations: it is differentiated itself, or transformed."""
    return torch.is_grad_enabled() or onlooker() is not None


def like_parameter(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """A gradient with its parameter's strides, which DDP and fused optimisers ask for.

    Kernels leave it contiguous; depthwise weights and those of 1x1 convolutions are in channels_last the same memory.
    """
    if grad is None or parameter is None or grad.stride() == parameter.stride():
        return grad
    if parameter.is_contiguous() and grad.is_contiguous():  # sizes of 1 have any stride
        return grad.as_strided(parameter.shape, parameter.stride())
    return torch.empty_like(parameter, dtype=grad.dtype).copy_(grad)


def reference_grads(
    reference: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad_y: Tensor, needs: Iterable[bool]
) -> list[Tensor | None]:
    """The gradients of ``reference(*inputs)``, differentiable themselves where that is asked."""
    needs, differentiable = list(needs), torch.is_grad_enabled()
    with torch.enable_grad(), without_autocast(grad_y.device):
        # A view each: the same tensor given twice must not receive the sum of both gradients twice.
        inputs = [None if t is None else t.view_as(t) for t in inputs]
        y = reference(*inputs)
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    grads = iter(torch.autograd.grad(y, wanted, grad_y, create_graph=differentiable))
    return [next(grads) if need else None for need in needs]


@constant_in_graphs
def gpu_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)
