"""The OpSpec of GConv's mixing."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pixnorm.functional import gconv_mix
from pixnorm.ops.gconv import gconv_mix_reference, ops_of
from pixnorm.testing.harness import Case, OpSpec, Traffic, random


def _inputs(
    case: Case, dtype: torch.dtype, parameter_dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    samples, n = case.shape[:2]
    s = torch.sigmoid(random((samples, n), generator) * (100 if case.values == "saturated" else 1))
    tensors = {
        "u": random(case.shape, generator) + (1000 if case.values == "offset" else 0),
        "s": s,
        "mix_weight": random((n, n), generator) * n**-0.5,
    }
    if case.sizes.get("bias", 1):
        tensors["bias"] = random((n,), generator)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def _traffic(case: Case, dtype: torch.dtype) -> Traffic:
    # In passes over u, all of them GEMMs. Forward: read u, write y. Backward: read dy and u, write du; then, for the
    # gradient of the weight, read dy and u.
    tensor_pass = dtype.itemsize * torch.Size(case.shape).numel()
    forward, backward = 2 * tensor_pass, 5 * tensor_pass
    return Traffic(forward, backward, forward, backward)


def _kernel_calls(impl: str, tensors: dict[str, Tensor], options: Mapping[str, Any]) -> Iterator[tuple[Any, tuple]]:
    forward, backward = ops_of(impl)
    u, s, weight, bias = (tensors.get(name) for name in ("u", "s", "mix_weight", "bias"))
    yield forward, (u, s, weight, bias, True)
    yield backward, (torch.ones_like(u), u, s, weight, bias is not None, True)


def _cases() -> tuple[Case, ...]:
    shapes = {
        (2, 3, 5, 7): "more pixels than channels: per-sample weights",
        (3, 17, 2, 3): "fewer: one product for all samples",
        (5, 8, 1, 1): "one pixel: a fully connected layer",
        (1, 1, 3, 4): "one channel",
        (9, 20, 4, 4): "tiny planes: a tile spans several samples, the last one fewer",
        (2, 33, 6, 6): "n = 32 + 1: remainders of every vector and of a tile",
        (2, 40, 3, 67): "201 pixels: a full and a partial tile",
        (1, 130, 9, 9): "n > 128: two tiles of channels, the last one nearly empty",
        (1, 130, 24, 24): "one sample: operands packed once, in products of bfloat16 for sums of several steps",
        (600, 64, 2, 4): "more than a chunk of images in float32, by one product",
        (5, 16, 128, 64): "the same with per-sample weights",
        (0, 3, 5, 7): "empty batch",
    }
    cases = [Case(shape, why) for shape, why in shapes.items()]
    cases += [Case(shape, "no bias", sizes={"bias": 0}) for shape in ((2, 9, 5, 6), (2, 30, 3, 4))]
    for name, why in {"offset": "large u: the addend is small", "saturated": "scales of 0 and 1"}.items():
        cases += [Case(shape, why, {}, name) for shape in ((3, 6, 7, 9), (3, 24, 3, 5))]
    return tuple(cases)


GCONV_MIX = OpSpec(
    name="gconv_mix",
    function=gconv_mix,
    reference=gconv_mix_reference,
    make_inputs=_inputs,
    activations=("u",),
    per_sample=("s",),
    differentiable=("u", "s", "mix_weight", "bias"),
    cases=_cases(),
    traffic=_traffic,
    kernel_calls=_kernel_calls,
    product_weight="mix_weight",
)
