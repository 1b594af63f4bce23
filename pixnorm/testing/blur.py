"""The OpSpec of the blur."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pixnorm.functional import blur2d
from pixnorm.ops.blur import blur2d_reference, ops_of
from pixnorm.testing.harness import Case, OpSpec, Traffic, random


def _inputs(
    case: Case, dtype: torch.dtype, parameter_dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    return {"x": random(case.shape, generator).to(dtype)}


def _traffic(case: Case, dtype: torch.dtype) -> Traffic:
    # Forward reads x and writes y; backward is the same the other way round.
    n, c, h, w = case.shape
    scale = case.options.get("up", 1), case.options.get("down", 1)
    of_y = (h * scale[0] // scale[1]) * (w * scale[0] // scale[1])
    both = dtype.itemsize * n * c * (h * w + of_y)
    return Traffic(both, both)


def _kernel_calls(impl: str, tensors: dict[str, Tensor], options: Mapping[str, Any]) -> Iterator[tuple[Any, tuple]]:
    forward, backward = ops_of(impl)
    x, settings = tensors["x"], (options.get("up", 1), options.get("down", 1))
    yield forward, (x, *settings)
    yield backward, (torch.ones_like(forward(x, *settings)), *settings, *x.shape[2:])


UP, DOWN = {"up": 2}, {"down": 2}


def _cases() -> tuple[Case, ...]:
    shapes = {
        (2, 19, 20, 37): (DOWN, "odd everywhere: remainders of vectors, rows and columns that ↓ drops"),
        (2, 19, 19, 33): (UP, "remainders of every vector"),
        (2, 3, 6, 17): ({}, "W = 16 + 1, without remainders of rows"),
        (3, 7, 4, 4): (UP, "tiny planes: 16 at a time, of several samples; the last fewer"),
        (5, 7, 8, 8): (DOWN, "the same"),
        (3, 11, 5, 3): ({}, "the same, odd"),
        (2, 3, 1, 1): (UP, "one pixel"),
        (2, 3, 1, 5): ({}, "one row"),
        (2, 3, 5, 1): (UP, "one column"),
        (1, 2, 3, 2): (DOWN, "one output, a row that ↓ drops"),
        (1, 2, 300, 4): (DOWN, "a narrow plane, too large to be one of 16 at a time"),
        (1, 3, 70, 260): (UP, "a plane in several parts"),
        (1, 2100, 3, 6): ({}, "in channels_last, more channels than a strip has elements"),
        (1, 700, 4, 9): (DOWN, "in channels_last, strips of a few pixels"),
        (0, 3, 5, 7): (UP, "empty batch"),
    }
    return tuple(Case(shape, why, options) for shape, (options, why) in shapes.items())


BLUR = OpSpec(
    name="blur2d",
    function=blur2d,
    reference=blur2d_reference,
    make_inputs=_inputs,
    differentiable=("x",),
    cases=_cases(),
    traffic=_traffic,
    kernel_calls=_kernel_calls,
    variants=({}, UP, DOWN),
)
