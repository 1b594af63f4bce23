"""The OpSpecs of modulated norm: scale and shift from rows, and from maps."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pixnorm.functional import modulated_norm
from pixnorm.ops.common import slope_of
from pixnorm.ops.modulate import modulated_norm_reference, ops_of
from pixnorm.testing.harness import Case, OpSpec, Traffic, random

NONE, VECTOR, ROWS, MAPS = 0, 1, 2, 4  # case.sizes["affine"]: the dimensions of gamma and beta
BUFFERS = ("running_mean", "running_var")


def _inputs(default: int):
    def inputs(
        case: Case, dtype: torch.dtype, parameter_dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Tensor]:
        n, c, h, w = case.shape
        scale = case.options.get("upsample", 1)
        x = random(case.shape, generator)
        if case.values == "offset":
            # Unshifted sums of squares lose all digits; with a larger offset x itself would in half precision.
            x = x + (1000 if dtype in (torch.float64, torch.float32) else 20)
        else:
            x = x * (1 + random((1, c, 1, 1), generator).abs()) + random((1, c, 1, 1), generator)
        if case.values == "constant":
            x[:, 0] = 0.75  # zero variance, and a mean that is exact in any order of summation
        tensors = {"x": x.to(dtype)}
        affine = case.sizes.get("affine", default)
        shapes = {VECTOR: (c,), ROWS: (n, c), MAPS: (n, c, h * scale, w * scale)}
        if affine != NONE:
            of_affine = dtype if affine == MAPS else parameter_dtype
            tensors |= {name: random(shapes[affine], generator).to(of_affine) for name in ("gamma", "beta")}
        if case.options.get("statistics") != "instance":
            tensors["running_mean"] = random((c,), generator).to(parameter_dtype)
            tensors["running_var"] = (random((c,), generator).abs() + 0.5).to(parameter_dtype)
        return tensors

    return inputs


def _traffic(default: int):
    def traffic(case: Case, dtype: torch.dtype) -> Traffic:
        # In passes over x. Forward: read x for the statistics, then again, and write y. Backward: read x and dy for the
        # sums, then both again, and write dx. Maps: read both forward; read gamma and beta twice, and write their
        # gradients, backward.
        tensor_pass = dtype.itemsize * torch.Size(case.shape).numel()
        large = case.options.get("upsample", 1) ** 2
        maps = case.sizes.get("affine", default) == MAPS
        forward, backward = 2 + large, 3 + 2 * large
        if maps:
            # gamma twice (the sums need it), beta only for an activation's sign; d gamma and d beta once.
            forward, backward = forward + 2 * large, backward + 4 * large
        return Traffic(forward * tensor_pass, backward * tensor_pass)

    return traffic


def _saved_bytes(case: Case, dtype: torch.dtype) -> int:
    statistic = 8 if dtype == torch.float64 else 4
    rows = case.shape[0] if case.options.get("statistics") == "instance" else 1
    return 2 * statistic * rows * case.shape[1]


def _kernel_calls(impl: str, tensors: dict[str, Tensor], options: Mapping[str, Any]) -> Iterator[tuple[Any, tuple]]:
    forward, backward = ops_of(impl)
    training, instance = options.get("training", True), options.get("statistics") == "instance"
    inputs = tuple(tensors.get(name) for name in ("x", "gamma", "beta"))
    given = (None, None) if training or instance else tuple(tensors[name] for name in BUFFERS)
    slope = slope_of(options.get("activation"), options.get("negative_slope", 0.2))
    settings = options.get("eps", 1e-5), instance, options.get("gamma_offset", 0.0), options.get("upsample", 1), slope
    yield forward, (*inputs, *given, *settings)
    y, *saved = forward(*inputs, *given, *settings)
    yield backward, (torch.ones_like(y), *inputs, *saved, *settings, training)


SHAPES = {
    (2, 3, 5, 7): "odd everywhere: remainders on every side",
    (5, 2, 1, 2): "planes of two pixels",
    (2, 3, 4, 2): "planes smaller than a vector",
    (5, 6, 4, 4): "tiny planes: several in one work item",
    (40, 3, 8, 8): "2560 pixels in small planes",
    (3, 17, 8, 8): "C = 16 + 1 in channels_last, W a full vector in NCHW",
    (2, 32, 8, 8): "no remainders",
    (2, 136, 2, 3): "C = 8 x 16 + 8: many blocks of channels",
    (2, 5, 6, 17): "W = 16 + 1 in NCHW",
    (2, 3, 3, 66): "rows longer than 64 pixels",
    (1, 3, 91, 100): "9100 pixels: a plane is split, and does not fit registers",
    (2, 136, 9, 4): "many small planes of short rows: several in one piece, with remainders",
    (0, 3, 5, 7): "empty batch",
}
UP = {"upsample": 2, "activation": "relu"}
INSTANCE = {"statistics": "instance"}


def _cases(kinds: tuple[int, ...]) -> tuple[Case, ...]:
    cases = []
    for i, (shape, why) in enumerate(SHAPES.items()):  # in turn: the grid is run for every impl, dtype and layout
        leaky = INSTANCE | {"activation": "leaky_relu"}
        cases += [Case(shape, why, chosen) for chosen in ((UP, INSTANCE) if i % 2 else ({}, leaky))]
    odd = (2, 17, 7, 10)
    options = {
        "inference: given statistics": {"training": False},
        "inference, upsampling": UP | {"training": False},
        "a slope, an offset": {"activation": "leaky_relu", "negative_slope": -0.5, "gamma_offset": 1.0},
        "upsampling without activation": {"upsample": 2, "gamma_offset": 1.0},
        "instances, upsampling": INSTANCE | UP | {"gamma_offset": 1.0},
        "eps and momentum reach the kernel": {"eps": 0.25, "momentum": 0.75},
    }
    cases += [Case(odd, why, chosen) for why, chosen in options.items()]
    for kind in kinds[1:]:
        for chosen in ({}, UP, INSTANCE, {"training": False, "activation": "leaky_relu"}):
            cases.append(Case(odd, "other rows", chosen, sizes={"affine": kind}))
    values = {"offset": "|mean| >> std", "constant": "a channel of zero variance"}
    for name, why in values.items():
        cases += [Case((4, 6, 7, 9), why, chosen, name) for chosen in ({}, INSTANCE, UP)]
    return tuple(cases)


def _spec(title: str, kinds: tuple[int, ...], **options: Any) -> OpSpec:
    return OpSpec(
        name="modulate",
        title=title,
        function=modulated_norm,
        reference=modulated_norm_reference,
        make_inputs=_inputs(kinds[0]),
        differentiable=("x", "gamma", "beta"),
        buffers=BUFFERS,
        cases=_cases(kinds),
        traffic=_traffic(kinds[0]),
        saved_bytes=_saved_bytes,
        kernel_calls=_kernel_calls,
        inference={"training": False},
        **options,
    )


MODULATE = _spec(
    "modulate",
    (ROWS, VECTOR, NONE),
    per_sample=("gamma", "beta"),
    options={"statistics": ("batch", "instance"), "training": (True, False), "upsample": (1, 2)},
    variants=({}, UP, INSTANCE),
    float32_parameters=True,
)
MODULATE_MAPS = _spec(
    "modulate-maps",
    (MAPS,),
    activations=("x", "gamma", "beta"),
    options={"statistics": ("batch", "instance"), "activation": (None, "leaky_relu"), "upsample": (1, 2)},
    variants=({}, INSTANCE | {"activation": "leaky_relu"}),
)
