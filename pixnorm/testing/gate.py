"""The OpSpecs of CBAM's gates."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pixnorm.functional import channel_gate, spatial_gate
from pixnorm.ops.gate import (
    CHANNEL_PARAMETERS,
    SPATIAL_PARAMETERS,
    channel_gate_reference,
    gate_conv_fwd,
    gate_conv_grad,
    gate_perceptron_fwd,
    gate_perceptron_grad,
    ops_of,
    spatial_gate_reference,
)
from pixnorm.testing.harness import Case, OpSpec, Traffic, random


def _features(case: Case, generator: torch.Generator) -> Tensor:
    x = random(case.shape, generator)
    if case.values == "offset":
        x = x + 20
    if case.values == "ties":  # several pixels, and several channels, have each maximum
        x = x.round().clamp(-1, 1)
    return x


def _channel_inputs(
    case: Case, dtype: torch.dtype, parameter_dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    c, hidden = case.shape[1], case.sizes.get("hidden", 4)
    shapes = dict(zip(CHANNEL_PARAMETERS, ((hidden, c), (hidden,), (c, hidden), (c,)), strict=True))
    # As wide as nn.Linear's: the gates are not saturated.
    parameters = {name: random(shape, generator) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    x = _features(case, generator).to(dtype)
    return {"x": x} | {name: tensor.to(parameter_dtype) for name, tensor in parameters.items()}


def _spatial_inputs(
    case: Case, dtype: torch.dtype, parameter_dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    kh, kw = case.sizes.get("kh", 3), case.sizes.get("kw", 3)
    tensors = {
        "weight": random((1, 2, kh, kw), generator),
        "bn_weight": 1 + random((1,), generator) / 4,
        "bn_bias": random((1,), generator),
        "running_mean": random((1,), generator) / 4,
        "running_var": 1 + random((1,), generator).abs(),
    }
    x = _features(case, generator).to(dtype)
    return {"x": x} | {name: tensor.to(parameter_dtype) for name, tensor in tensors.items()}


def _traffic(case: Case, dtype: torch.dtype) -> Traffic:
    # Forward reads x, then reads it again and writes y; backward reads dy and x, then reads dy and writes dx.
    tensor_pass = dtype.itemsize * torch.Size(case.shape).numel()
    return Traffic(3 * tensor_pass, 4 * tensor_pass)


def _saved_bytes(spatial: bool) -> Callable[[Case, torch.dtype], int]:
    def saved(case: Case, dtype: torch.dtype) -> int:
        n, c, h, w = case.shape
        number = 8 if dtype == torch.float64 else 4
        if spatial:  # two pooled features, what convolution and batch norm gave, int32; two statistics
            return n * h * w * (4 * number + 4) + 2 * number
        return n * c * (3 * number + 4)

    return saved


def _kernel_calls(
    spatial: bool,
) -> Callable[[str, dict[str, Tensor], Mapping[str, Any]], Iterator[tuple[Any, tuple]]]:
    def calls(impl: str, tensors: dict[str, Tensor], options: Mapping[str, Any]) -> Iterator[tuple[Any, tuple]]:
        ops, x = ops_of(impl), tensors["x"]
        yield ops.pool, (x, spatial)
        pooled, index = ops.pool(x, spatial)
        logits = pooled[:, :1].contiguous() if spatial else pooled[:, 0].contiguous()
        yield ops.forward, (x, logits, spatial)
        grad_y = torch.ones_like(ops.forward(x, logits, spatial))
        yield ops.reduce, (grad_y, x, logits, spatial)
        yield ops.backward, (grad_y, logits, pooled, index, spatial)
        if impl == "native":
            names = SPATIAL_PARAMETERS[:1] if spatial else CHANNEL_PARAMETERS
            layers = [tensors[name].to(pooled.dtype) for name in names]
            small = (gate_conv_fwd, gate_conv_grad) if spatial else (gate_perceptron_fwd, gate_perceptron_grad)
            yield small[0], (pooled, *layers)
            yield small[1], (logits, pooled, *layers[:3])

    return calls


_SHAPES = {
    (2, 5, 7, 9): "odd everywhere: remainders of every vector",
    (3, 33, 6, 11): "more than two vectors, of channels and of pixels, and remainders",
    (2, 3, 1, 1): "one pixel",
    (2, 1, 4, 5): "one channel",
    (5, 16, 4, 4): "small planes",
    (40, 3, 8, 8): "many samples",
    (2, 136, 2, 3): "many channels",
    (1, 3, 91, 100): "9100 pixels: a plane is split",
    (1, 700, 4, 9): "many channels of few pixels are split",
    (0, 3, 5, 7): "empty batch",
}


def _cases(*more: Case) -> tuple[Case, ...]:
    return (
        *(Case(shape, why) for shape, why in _SHAPES.items()),
        Case((4, 6, 7, 9), "the first of equal maxima", values="ties"),
        Case((2, 40, 9, 20), "the same, in several vectors", values="ties"),
        Case((4, 6, 7, 9), "|mean| >> std", values="offset"),
        *more,
    )


CHANNEL_GATE = OpSpec(
    name="gate",
    title="channel_gate",
    function=channel_gate,
    reference=channel_gate_reference,
    make_inputs=_channel_inputs,
    differentiable=("x", *CHANNEL_PARAMETERS),
    cases=_cases(Case((2, 5, 7, 9), "one hidden unit", sizes={"hidden": 1})),
    traffic=_traffic,
    saved_bytes=_saved_bytes(False),
    kernel_calls=_kernel_calls(False),
    composite=True,
    helpers=(("gate_pool", "gate_perceptron_fwd"), ("gate_reduce", "gate_perceptron_grad")),
    float32_parameters=True,
)
SPATIAL_GATE = OpSpec(
    name="gate",
    title="spatial_gate",
    function=spatial_gate,
    reference=spatial_gate_reference,
    make_inputs=_spatial_inputs,
    differentiable=("x", *SPATIAL_PARAMETERS),
    buffers=("running_mean", "running_var"),
    cases=_cases(
        Case((2, 5, 9, 12), "7x7", sizes={"kh": 7, "kw": 7}),
        Case((2, 5, 7, 9), "no square", sizes={"kh": 1, "kw": 5}),
        Case((2, 5, 3, 2), "more taps than pixels", {"eps": 0.5}, sizes={"kh": 7, "kw": 5}),
        Case((2, 5, 7, 9), "given statistics", {"training": False}),
        Case((2, 5, 7, 9), "eps and momentum", {"eps": 0.25, "momentum": 0.75}),
    ),
    traffic=_traffic,
    saved_bytes=_saved_bytes(True),
    kernel_calls=_kernel_calls(True),
    composite=True,
    helpers=(("gate_pool", "gate_conv_fwd", "modulate_fwd"), ("gate_reduce", "gate_conv_grad", "modulate_bwd")),
    options={"training": (True, False)},
    inference={"training": False},
    float32_parameters=True,
)
