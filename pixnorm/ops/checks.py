"""Argument checks of all ops, once for all backends; the messages are PyTorch's where it has some.

Sizes may be symbols (``torch.compile`` with dynamic shapes), so they are compared one by one and never hashed.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pixnorm.ops.common import FLOAT, HALF, onlooker


def check_option(name: str, value: object, allowed: Sequence[object]) -> None:
    """An option has one of the allowed values."""
    if not any(value == one for one in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_eps(eps: float, training: bool) -> None:
    """As ``F.batch_norm``: in training the variance may be 0."""
    if not (eps > 0 if training else eps >= 0):  # false for NaN, too
        raise ValueError(f"eps must be {'positive in training' if training else 'non-negative'}, got {eps}")


def check_floating(x: Tensor, what: str = "input") -> None:
    if x.dtype not in FLOAT:
        raise TypeError(f"expected floating point {what}, got {x.dtype} of shape {tuple(x.shape)}")


def check_image(x: Tensor) -> None:
    """(N, C, H, W), floating point."""
    if x.dim() != 4:
        raise ValueError(f"expected 4D input (got {x.dim()}D input)")
    check_floating(x)


def has_shape(tensor: Tensor, shape: Sequence[int]) -> bool:
    return tensor.dim() == len(shape) and all(a == b for a, b in zip(tensor.shape, shape, strict=True))


def check_shape(name: str, tensor: Tensor, shape: Sequence[int], x: Tensor, what: str = "input") -> None:
    """A tensor has the shape that follows from x; ``what`` is x's name in the message."""
    if not has_shape(tensor, shape):
        wanted, found = tuple(shape), tuple(tensor.shape)
        raise ValueError(f"{name} must have shape {wanted} for {what} of shape {tuple(x.shape)}, got {found}")


def check_device(name: str, tensor: Tensor, x: Tensor, what: str = "x") -> None:
    """A tensor is on x's device."""
    if tensor.device != x.device:
        raise RuntimeError(
            f"expected all tensors on one device, got {what} on {x.device} and {name} on {tensor.device}"
        )


def check_parameter_dtype(dtype: torch.dtype, x: Tensor) -> None:
    """Parameters have x's dtype, or float32 with input in half precision."""
    if dtype != x.dtype and not (dtype == torch.float32 and x.dtype in HALF):
        raise TypeError(f"expected parameters of dtype {x.dtype} for input of that dtype, got {dtype}")


def check_running_statistics(
    buffers: Iterable[tuple[str, Tensor | None, Sequence[int]]], x: Tensor, parameter_dtype: torch.dtype, training: bool
) -> None:
    """Each mean comes with its variance, both are given in inference, and shape, device and dtype fit.

    They have one dtype: the parameters', or float32 with parameters in half precision (FSDP, Apex O2).

    Args:
        buffers: (name, buffer or None, shape), means and variances alternating.
    """
    buffers = list(buffers)
    for name, buffer, shape in buffers:
        if buffer is None:
            if not training:
                raise RuntimeError(f"Expected {name} to be defined when training=False")
            continue
        check_shape(name, buffer, shape, x)
        check_device(name, buffer, x)
        if buffer.dtype != parameter_dtype and not (buffer.dtype == torch.float32 and parameter_dtype in HALF):
            raise TypeError(
                "expected running statistics of the parameters' dtype, or float32 with parameters in half precision, "
                f"got {parameter_dtype} and, for {name}, {buffer.dtype}"
            )
    for (mean, of_mean, _), (var, of_var, _) in zip(buffers[::2], buffers[1::2], strict=True):
        if (of_mean is None) != (of_var is None):
            raise ValueError(f"{mean} and {var} must either both be None or neither be None")
    dtypes = {buffer.dtype for _, buffer, _ in buffers if buffer is not None}
    if len(dtypes) > 1:
        raise TypeError(f"expected running statistics of one dtype, got {', '.join(sorted(map(str, dtypes)))}")


def check_classes(y: Tensor, batch: int, num_classes: int) -> None:
    """y holds a class for each sample: (N,) of int64, or one-hot (N, K)."""
    one_hot = y.dim() == 2 and y.is_floating_point() and y.shape[1] == num_classes
    if not (one_hot or (y.dim() == 1 and y.dtype == torch.int64)) or y.shape[0] != batch:
        wanted = f"({batch},) of torch.int64, or one-hot ({batch}, {num_classes})"
        raise ValueError(f"y must be {wanted}, got {tuple(y.shape)} of {y.dtype}")
    # On a GPU, asking would wait for it; there indexing itself fails on the device. vmap cannot ask.
    looks = y.device.type == "cpu" and not torch.compiler.is_compiling() and onlooker() is None
    if not one_hot and looks and y.numel():
        low, high = y.aminmax()
        if low < 0 or high >= num_classes:
            raise ValueError(f"y must be in [0, {num_classes}), got classes from {low} to {high}")


def check_several_values(x: Tensor, per_channel: int) -> None:
    """Training needs more than one value per channel."""
    if per_channel == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
