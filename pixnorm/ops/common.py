"""What the ops share: layouts, PyTorch's flags, the way back to the reference for gradients of gradients."""

import contextlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
FLOAT = (torch.float64, torch.float32, *HALF)


def constant_in_graphs(function: Callable) -> Callable:
    """What ``torch.compiler.assume_constant_result`` does; that one imports the compiler, for two seconds."""
    function._dynamo_marked_constant = True
    return function


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


def reference_grads(
    reference: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad_y: Tensor, needs: Iterable[bool]
) -> list[Tensor | None]:
    """The gradients of ``reference(*inputs)`` as differentiable functions of ``grad_y`` and ``inputs``."""
    # A view each: the same tensor given twice must not receive the sum of both gradients twice.
    inputs = [None if t is None else t.view_as(t) for t in inputs]
    needs = list(needs)
    with without_autocast(grad_y.device):
        y = reference(*inputs)
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    grads = iter(torch.autograd.grad(y, wanted, grad_y, create_graph=True))
    return [next(grads) if need else None for need in needs]


@constant_in_graphs
def gpu_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)
