"""The OpSpec of spatially modulated convolution."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pixnorm.functional import spatially_modulated_conv2d
from pixnorm.ops.convolution import convolution
from pixnorm.ops.modulated_conv import ops_of, spatially_modulated_conv2d_reference, tap_counts
from pixnorm.ops.resampled_conv import upsample_conv2d
from pixnorm.ops.style import epilogue_ops_of
from pixnorm.testing.harness import Case, OpSpec, Traffic, random


def _inputs(
    case: Case, dtype: torch.dtype, parameter_dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    channels = case.shape[1]
    outputs, (kh, kw) = case.sizes.get("out", channels), (case.sizes.get(name, 3) for name in ("kh", "kw"))
    styles = random(case.shape, generator)
    if case.values == "border":
        styles[:, :, 0] *= 30  # most of the squares are where taps differ
    tensors = {
        "x": random(case.shape, generator),
        "weight": random((outputs, channels, kh, kw), generator) * (channels * kh * kw) ** -0.5,
        "style_map": styles,
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def _traffic(case: Case, dtype: torch.dtype) -> Traffic:
    # In passes over x, of the op beside the convolution: read x and s, write their product; backward read its gradient,
    # x and s, and write two gradients.
    tensor_pass = dtype.itemsize * torch.Size(case.shape).numel()
    return Traffic(3 * tensor_pass, 5 * tensor_pass)


def _saved_bytes(case: Case, dtype: torch.dtype) -> int:
    """The input of the convolution, and its output."""
    return 2 * dtype.itemsize * torch.Size(case.shape).numel()


def _kernel_calls(impl: str, tensors: dict[str, Tensor], options: Mapping[str, Any]) -> Iterator[tuple[Any, tuple]]:
    forward, backward = ops_of(impl)
    x, weight, style_map = (tensors[name] for name in ("x", "weight", "style_map"))
    defaults = {"padding": "same", "padding_mode": "zeros", "upsample": 1}
    padding, mode, upsample = (options.get(name, default) for name, default in defaults.items())
    counts = tap_counts(x, weight, padding, mode, upsample)
    yield forward, (x, style_map, *counts)
    y, sums = forward(x, style_map, *counts)
    yield backward, (torch.ones_like(y), torch.ones_like(sums), x, style_map, *counts)
    if options.get("demodulate", True):
        up = upsample == 2
        y = upsample_conv2d(y, weight, padding=padding) if up else convolution(y, weight, padding, mode)
        arguments = y, y.new_ones(y.shape[:2]), None, None, None, None, None, 1.0
        yield from zip(epilogue_ops_of(impl), (arguments, (torch.ones_like(y), *arguments)), strict=True)


def _cases() -> tuple[Case, ...]:
    shapes = {
        (2, 3, 5, 7): "odd everywhere",
        (2, 17, 8, 8): "C = 16 + 1 in channels_last, W half a vector in NCHW",
        (3, 4, 2, 2): "every pixel is at a border",
        (2, 3, 1, 6): "one row",
        (2, 5, 6, 17): "W = 16 + 1",
        (2, 32, 4, 66): "rows longer than 64 pixels",
        (1, 3, 91, 100): "more than a run in NCHW; several parts in channels_last",
        (0, 3, 5, 7): "empty batch",
    }
    cases = [Case(shape, why) for shape, why in shapes.items()]
    odd = (2, 5, 7, 10)
    options = {
        "no padding: two rows at each side": {"padding": "valid"},
        "every tap sees every pixel": {"padding_mode": "circular"},
        "pixels at the border are seen twice": {"padding_mode": "replicate"},
        "those beside them, too": {"padding_mode": "reflect"},
        "more padding than taps": {"padding": (3, 2)},
        "eps reaches the kernel": {"eps": 0.25},
        "copies at the border are seen once or twice": {"upsample": 2},
        "not divided": {"demodulate": False},
    }
    cases += [Case(odd, why, chosen) for why, chosen in options.items()]
    kernels = {"1x1": (1, 1), "other sizes of kernels": (5, 3), "even": (2, 4)}
    cases += [Case(odd, why, sizes={"kh": kh, "kw": kw, "out": 6}) for why, (kh, kw) in kernels.items()]
    cases += [Case((3, 6, 7, 9), "large styles at the border", {}, "border")]
    return tuple(cases)


SPATIALLY_MODULATED = OpSpec(
    name="spatial_scale",
    title="spatially_modulated_conv2d",
    function=spatially_modulated_conv2d,
    reference=spatially_modulated_conv2d_reference,
    make_inputs=_inputs,
    activations=("x", "style_map"),
    differentiable=("x", "weight", "style_map"),
    cases=_cases(),
    traffic=_traffic,
    saved_bytes=_saved_bytes,
    composite=True,
    helpers=(("style_epilogue_fwd",), ("style_epilogue_bwd",)),
    kernel_calls=_kernel_calls,
    options={"padding_mode": ("zeros", "circular")},
    variants=({}, {"padding_mode": "circular"}),
)
