"""The OpSpecs of StyleGAN's epilogues."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pixnorm.functional import style_epilogue, style_norm
from pixnorm.ops.common import slope_of
from pixnorm.ops.style import (
    EPILOGUE_INPUTS,
    NORM_INPUTS,
    epilogue_ops_of,
    norm_ops_of,
    style_epilogue_reference,
    style_norm_reference,
)
from pixnorm.testing.harness import Case, OpSpec, Traffic, random
from pixnorm.testing.modulate import SHAPES

# case.sizes: 0 for a tensor that is absent, and for noise 1 for one sample.
FROM_THE_KINK = 0.2  # at least, of what the activation gets: there rounding would decide the derivative


def _inputs(of_samples: tuple[str, ...]) -> Callable[..., dict[str, Tensor]]:
    def inputs(
        case: Case, dtype: torch.dtype, parameter_dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Tensor]:
        n, c, h, w = case.shape
        u = random(case.shape, generator) * (1 + random((1, c, 1, 1), generator).abs())
        u = u + random((1, c, 1, 1), generator)
        if case.values == "offset":
            # Of either sign. Unshifted sums of squares lose all digits; with a larger offset x would in half precision.
            signs = 1 - 2 * (torch.arange(c, device=u.device) % 2)
            u = u + signs[:, None, None] * (1000 if dtype in (torch.float64, torch.float32) else 20)
        u = u + FROM_THE_KINK * u.sign()
        if case.values == "constant":
            u[:, 0] = 0.75  # zero variance
        shapes = dict.fromkeys(of_samples, (n, c)) | dict.fromkeys(("noise_strength", "bias"), (c,))
        tensors = {name: random(shape, generator).to(parameter_dtype) for name, shape in shapes.items()}
        tensors["noise"] = random((min(n, case.sizes.get("noise", n)) or 1, 1, h, w), generator).to(dtype)
        if "demod" in tensors:
            tensors["demod"] = tensors["demod"].abs() + 0.5
        absent = {name for name in tensors if case.sizes.get(name) == 0}
        absent |= {"noise_strength"} if "noise" in absent else set()
        tensors = {name: tensor for name, tensor in tensors.items() if name not in absent}
        x = u
        if "noise" in tensors:
            x = x - tensors["noise_strength"].double()[:, None, None] * tensors["noise"].double()
        if "bias" in tensors:
            x = x - tensors["bias"].double()[:, None, None]
        if "demod" in tensors:
            x = x / tensors["demod"].double()[..., None, None]
        return {"x": x.to(dtype)} | tensors

    return inputs


def _traffic(forward: int, backward: int) -> Callable[[Case, torch.dtype], Traffic]:
    """In passes over x; the noise is one channel."""

    def traffic(case: Case, dtype: torch.dtype) -> Traffic:
        tensor_pass = dtype.itemsize * torch.Size(case.shape).numel()
        return Traffic(forward * tensor_pass, backward * tensor_pass)

    return traffic


def _epilogue_calls(impl: str, tensors: dict[str, Tensor], options: Mapping[str, Any]) -> Iterator[tuple[Any, tuple]]:
    forward, backward = epilogue_ops_of(impl)
    slope = slope_of(options.get("activation", "leaky_relu"), options.get("negative_slope", 0.2))
    arguments = *(tensors.get(name) for name in EPILOGUE_INPUTS), slope, options.get("gain", 1.0)
    yield forward, arguments
    yield backward, (torch.ones_like(forward(*arguments)), *arguments)


def _norm_calls(impl: str, tensors: dict[str, Tensor], options: Mapping[str, Any]) -> Iterator[tuple[Any, tuple]]:
    forward, backward = norm_ops_of(impl)
    settings = options.get("negative_slope", 0.2), options.get("eps", 1e-8)
    x, scale, shift, *layer = (tensors.get(name) for name in NORM_INPUTS)
    yield forward, (x, scale, shift, *layer, *settings)
    y, *statistics = forward(x, scale, shift, *layer, *settings)
    yield backward, (torch.ones_like(y), x, scale, *layer, *statistics, *settings)


def _norm_saves(case: Case, dtype: torch.dtype) -> int:
    return 2 * (8 if dtype == torch.float64 else 4) * case.shape[0] * case.shape[1]


GAIN = {"gain": 2**0.5}
NO_NOISE, ONE_NOISE, NO_BIAS = {"noise": 0}, {"noise": 1}, {"bias": 0}
BARE = NO_NOISE | NO_BIAS
ODD = (2, 17, 7, 10)


def _cases(options: tuple[dict, ...], sizes: tuple[dict, ...], more: tuple[Case, ...]) -> tuple[Case, ...]:
    """Each shape once, with each of the options and sizes in turn."""
    shapes = [
        Case(shape, why, options[i % len(options)], sizes=sizes[i // 2 % len(sizes)])
        for i, (shape, why) in enumerate(SHAPES.items())
    ]
    return (*shapes, *more)


STYLE_EPILOGUE = OpSpec(
    name="style_epilogue",
    function=style_epilogue,
    reference=style_epilogue_reference,
    make_inputs=_inputs(("demod", "next_styles")),
    differentiable=("x", "demod", "noise_strength", "bias", "next_styles"),
    activations=("x", "noise"),
    per_sample=("demod", "next_styles"),
    cases=_cases(
        ({}, GAIN),
        ({}, NO_NOISE, ONE_NOISE),
        (
            Case(ODD, "no activation", {"activation": None}),
            Case(ODD, "another slope", GAIN | {"negative_slope": -0.5}),
            Case(ODD, "ReLU", GAIN | {"activation": "relu"}),
            Case(ODD, "the last layer", GAIN, sizes={"next_styles": 0}),
            Case(ODD, "without demodulation", GAIN, sizes={"demod": 0, "noise": 0}),
            Case(ODD, "activation and gain only", GAIN, sizes=BARE | {"demod": 0, "next_styles": 0}),
        ),
    ),
    traffic=_traffic(2, 3),
    kernel_calls=_epilogue_calls,
    options={"activation": (None, "relu", "leaky_relu"), "gain": (1.0, 1.5)},
    variants=({}, GAIN | {"activation": "relu"}),
    float32_parameters=True,
)
STYLE_NORM = OpSpec(
    name="style_norm",
    function=style_norm,
    reference=style_norm_reference,
    make_inputs=_inputs(("scale", "shift")),
    differentiable=("x", "scale", "shift", "noise_strength", "bias"),
    activations=("x", "noise"),
    per_sample=("scale", "shift"),
    cases=_cases(
        # With the eps, among others, planes of two pixels: a small one would leave rounding errors of the gradient.
        ({}, {"negative_slope": 0.4, "eps": 10.0}),
        ({}, NO_NOISE, ONE_NOISE),
        (
            Case(ODD, "no activation: nothing is left of a bias", {"negative_slope": 1.0}, sizes=NO_BIAS),
            Case(ODD, "ReLU", {"negative_slope": 0.0}),
            Case(ODD, "AdaIN of the activation", sizes=BARE),
            Case((4, 6, 7, 9), "|mean| >> std", values="offset", sizes=NO_BIAS),
            Case((4, 6, 7, 9), "a channel of zero variance", values="constant", sizes=BARE),
        ),
    ),
    traffic=_traffic(3, 5),
    saved_bytes=_norm_saves,
    kernel_calls=_norm_calls,
    options={"negative_slope": (0.2, 1.0), "eps": (1e-8, 0.25)},
    statistics="instance",
    variants=({}, {"negative_slope": 0.5}),
    float32_parameters=True,
)
