"""The OpSpecs of SPN, plain and conditional."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pixnorm.functional import conditional_spn, spn
from pixnorm.ops.common import slope_of
from pixnorm.ops.spn import conditional_spn_reference, ops_of, spn_reference
from pixnorm.testing.harness import Case, OpSpec, Traffic, random

_PARAMETERS = (
    "mask_projection",
    "mask_weight",
    "mask_bias",
    "gamma_weight",
    "gamma_weight_inv",
    "beta_weight",
    "beta_weight_inv",
)
_ROWS = ("gamma_bias", "beta_bias")
_BUFFERS = ("running_mean", "running_var", "mask_running_mean", "mask_running_var")


UP = {"upsample": 2, "activation": "relu"}


def _inputs(default_groups: int | None):
    def inputs(
        case: Case, dtype: torch.dtype, parameter_dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Tensor]:
        samples, channels = case.shape[:2]
        groups = case.sizes.get("groups", default_groups)
        x = random(case.shape, generator)
        per_channel = (1, channels, 1, 1)
        if case.values == "offset":
            # Unshifted sums of squares lose all digits; with a larger offset x itself would in half precision.
            x = x + (1000 if dtype in (torch.float64, torch.float32) else 20)
        else:
            x = x * (1 + random(per_channel, generator).abs()) + random(per_channel, generator)
        if case.values == "constant":
            x[:, 0] = 0.75  # zero variance, and a mean that is exact in any order of summation

        def draw(shape, scale=1.0):
            return (scale * random(shape, generator)).to(parameter_dtype)

        of_group = () if groups is None else (groups,)
        taps = (*of_group, channels, 1, *[case.sizes.get("kernel_size", 3)] * 2)
        masks = case.sizes.get("masks", channels)
        tensors = {
            "x": x.to(dtype),
            "mask_projection": draw((masks, channels, 1, 1), channels**-0.5),
            # Saturated: the mask is 0 or 1 nearly everywhere, and the argument of exp is large of either sign.
            "mask_weight": draw((*of_group, masks), 100.0 if case.values == "saturated" else 1.0),
            "mask_bias": draw((*of_group, masks)),
        }
        tensors |= {name: draw(taps, 0.5) for name in _PARAMETERS[3:]}
        if groups is not None:
            index = torch.randint(groups, (samples,), generator=generator, device="cpu")
            tensors["index"] = index.to(torch.get_default_device())
            if case.sizes.get("rows", 1):
                tensors |= {name: draw((samples, channels)) for name in _ROWS}
        for name in _BUFFERS:
            buffer = draw((masks if name.startswith("mask_") else channels,))
            tensors[name] = buffer.abs() + 0.5 if name.endswith("var") else buffer
        return tensors

    return inputs


def _traffic(case: Case, dtype: torch.dtype) -> Traffic:
    # In passes over x; y and its gradient are upsample^2 passes each.
    tensor_pass = dtype.itemsize * torch.Size(case.shape).numel()
    large = case.options.get("upsample", 1) ** 2
    # p = W x: read x, write p.  dgrad: read dp and dx, write dx; wgrad: read dp and x.
    forward_gemm, backward_gemm = 2, 3 + 2
    # Statistics: x once, p once. Modulate: read x and p, write y.
    forward = (2 + large) + (2 if case.options.get("training", True) else 0)
    # Reduce: read dy, x and p. Apply: read dy, x and p, write dx and dp.
    backward = (2 + large) + (4 + large)
    # Chunks stay in cache for the statistics; dp is consumed there.
    forward_cached, backward_cached = (2 if case.options.get("training", True) else 0), 1
    passes = (forward + forward_gemm, backward + backward_gemm, forward_gemm, backward_gemm)
    passes = (*passes, forward_cached, backward_cached)
    return Traffic(*(n * tensor_pass for n in passes))


def _saved_bytes(case: Case, dtype: torch.dtype) -> int:
    # p at the resolution of x, and four vectors of statistics.
    statistic = 8 if dtype == torch.float64 else 4
    return dtype.itemsize * torch.Size(case.shape).numel() + 4 * statistic * case.shape[1]


def _kernel_calls(impl: str, tensors: dict[str, Tensor], options: Mapping[str, Any]) -> Iterator[tuple[Any, tuple]]:
    forward, backward = ops_of(impl)
    training = options.get("training", True)
    inputs = (tensors["x"], *(tensors[name] for name in _PARAMETERS), *(tensors.get(n) for n in (*_ROWS, "index")))
    given = (None,) * 4 if training else tuple(tensors[name] for name in _BUFFERS)
    slope = slope_of(options.get("activation"), options.get("negative_slope", 0.2))
    settings = options.get("eps", 1e-5), options.get("upsample", 1), slope, True
    yield forward, (*inputs, *given, *settings)
    y, *saved = forward(*inputs, *given, *settings)
    yield backward, (torch.ones_like(y), *inputs, *saved, *settings, training)


def _cases() -> tuple[Case, ...]:
    shapes = {
        (2, 3, 5, 7): "odd everywhere: remainders on every side",
        (5, 2, 1, 1): "one-pixel planes: only the middle tap is inside (for N = 2 the gradient would be pure rounding)",
        (3, 2, 1, 5): "one row: top and bottom border at once",
        (3, 2, 5, 1): "one column: left and right border at once",
        (2, 3, 4, 2): "two columns: both are border, no interior",
        (2, 3, 3, 3): "one interior pixel",
        (1, 2, 2, 2): "one sample, planes smaller than the stencil",
        (5, 6, 4, 4): "tiny planes: all of them are one work item",
        (40, 3, 8, 8): "2560 pixels in small planes: two work items, the second one smaller",
        (3, 17, 8, 8): "C = 16 + 1 in channels_last, W a full vector in NCHW",
        (2, 32, 8, 8): "C and W multiples of every vector: no remainders",
        (2, 136, 2, 3): "C = 8 x 16 + 8: many blocks of channels, the last one half full",
        (2, 5, 6, 17): "W = 16 + 1 in NCHW",
        (2, 3, 3, 66): "W > 64: rows are long enough to be processed one by one",
        (3, 2, 30, 70): "2100 pixels: a plane is summed in two chunks, one image is a work item",
        (1, 3, 91, 100): "9100 pixels: a plane is split by rows into two work items, so that all threads have work",
        (1, 2, 3, 4200): "12600 pixels in three rows: work items of one row",
        (0, 3, 5, 7): "empty batch",
    }
    cases = []
    for shape, why in shapes.items():
        cases += [Case(shape, why), Case(shape, why, {"upsample": 2, "activation": "relu"})]

    # In training the scale of a one-channel projection cancels, and its gradient is pure rounding.
    cases.append(Case((2, 1, 6, 9), "one channel: the shortest dot products", {"training": False}))

    # The options, each on a shape with remainders and full vectors in both layouts.
    odd = (2, 17, 7, 10)
    options = {
        "inference: given statistics": {"training": False},
        "inference: no batch statistics in the gradient": {"training": False, "upsample": 2, "activation": "relu"},
        "activation without upsampling": {"activation": "relu"},
        "a slope": {"activation": "leaky_relu"},
        "another slope": {"activation": "leaky_relu", "negative_slope": -0.5, "upsample": 2, "training": False},
        "upsampling without activation": {"upsample": 2},
        "eps and momentum reach the kernel": {"eps": 0.25, "momentum": 0.75},
    }
    cases += [Case(odd, why, chosen) for why, chosen in options.items()]

    sizes = {
        "kernel_size": {1: "no neighbours", 5: "a stencil of radius two"},
        "masks": {1: "one mask for all channels"},
    }
    for name, described in sizes.items():
        for size, why in described.items():
            cases += [
                Case((3, 3, 5, 6), why, {}, sizes={name: size}),
                Case((3, 3, 5, 6), why, {"upsample": 2, "activation": "relu"}, sizes={name: size}),
                Case((2, 17, 6, 4), why, {"activation": "relu", "training": False}, sizes={name: size}),
            ]
    cases.append(Case((3, 3, 6, 8), "both", {"activation": "relu"}, sizes={"kernel_size": 5, "masks": 1}))
    cases.append(Case((2, 3, 1, 2), "an image inside the borders", UP, sizes={"kernel_size": 5}))
    cases.append(Case((1, 5, 70, 100), "rows of one image in several work items", {}, sizes={"kernel_size": 5}))
    cases.append(Case((1, 20, 70, 100), "the same, and several blocks of channels", {}, sizes={"masks": 1}))
    for size in ({"kernel_size": 1}, {"kernel_size": 5}, {"kernel_size": 5, "masks": 1}):
        cases.append(Case((2, 35, 18, 3), "blocks of 32 channels, strips of 16 rows, upsampling", UP, sizes=size))

    values = {"offset": "|mean| >> std", "saturated": "mask at 0 and 1", "constant": "a channel of zero variance"}
    for name, why in values.items():
        cases += [Case((4, 6, 7, 9), why, {"upsample": upsample}, name) for upsample in (1, 2)]
    return tuple(cases)


def _conditional_cases() -> tuple[Case, ...]:
    """What groups and rows change; the rest is SPN's."""
    many = {"groups": 11}
    cases = [
        Case((2, 3, 5, 7), "odd everywhere; a group without samples"),
        Case((7, 17, 4, 4), "tiny planes of several groups in one work item", UP),
        Case((40, 3, 8, 8), "two work items, each with many groups", {"activation": "leaky_relu"}, sizes=many),
        Case((3, 32, 8, 8), "no remainders"),
        Case((2, 136, 2, 3), "many blocks of channels, the last one half full", UP),
        Case((2, 3, 3, 66), "rows are long enough to be processed one by one", {"activation": "relu"}),
        Case((3, 2, 30, 70), "one image is a work item", UP),
        Case((2, 3, 91, 100), "an image is split by rows"),
        Case((3, 5, 6, 17), "one group", sizes={"groups": 1}),
        Case((3, 5, 6, 17), "no rows", UP, sizes={"rows": 0}),
        Case((3, 5, 6, 8), "more groups than samples", sizes={"groups": 7, "rows": 0}),
        Case((2, 17, 7, 10), "given statistics", {"training": False, "activation": "relu"}),
        Case((2, 17, 7, 10), "given statistics, upsampling", {"training": False, "upsample": 2}, sizes={"rows": 0}),
        Case((3, 3, 5, 6), "no neighbours", UP, sizes={"kernel_size": 1}),
        Case((3, 17, 6, 8), "a stencil of radius two", {"activation": "relu"}, sizes={"kernel_size": 5}),
        Case((3, 3, 5, 6), "a stencil of radius two, upsampling", {"upsample": 2}, sizes={"kernel_size": 5}),
        Case((3, 17, 5, 6), "one mask for all channels", UP, sizes={"masks": 1}),
        Case((4, 6, 7, 9), "|mean| >> std", {}, "offset"),
        Case((4, 6, 7, 9), "mask at 0 and 1", UP, "saturated"),
        Case((0, 3, 5, 7), "empty batch"),
    ]
    return tuple(cases)


def _spec(name: str, function, reference, groups: int | None, rows: tuple[str, ...], **options: Any) -> OpSpec:
    return OpSpec(
        name="spn",
        title=name,
        function=function,
        reference=reference,
        make_inputs=_inputs(groups),
        differentiable=("x", *_PARAMETERS, *rows),
        buffers=_BUFFERS,
        traffic=_traffic,
        saved_bytes=_saved_bytes,
        kernel_calls=_kernel_calls,
        options={"training": (True, False), "upsample": (1, 2), "activation": (None, "leaky_relu")},
        variants=({}, UP),
        inference={"training": False},
        product_weight="mask_projection",
        float32_parameters=True,
        **options,
    )


SPN = _spec("spn", spn, spn_reference, None, (), cases=_cases())
CONDITIONAL_SPN = _spec(
    "conditional_spn",
    conditional_spn,
    conditional_spn_reference,
    3,
    _ROWS,
    cases=_conditional_cases(),
    per_sample=(*_ROWS, "index"),
    integers=("index",),
)
