"""Descriptions of the ops for tests and benchmarks; see :mod:`pixnorm.testing.harness`."""

import pkgutil
from importlib import import_module

from pixnorm.testing.blur import BLUR
from pixnorm.testing.gconv import GCONV_MIX
from pixnorm.testing.harness import (
    DENSE_LAYOUTS,
    DTYPES,
    FACTOR,
    LAYOUTS,
    TOLERANCES,
    Case,
    OpSpec,
    Result,
    Traffic,
    assert_close_as_eager,
    available_impls,
    check_against_eager,
    evaluate,
    excess,
    in_double,
    random,
    saved_bytes,
    without_kink,
)
from pixnorm.testing.modulate import MODULATE, MODULATE_MAPS
from pixnorm.testing.spn import CONDITIONAL_SPN, SPN


def _found() -> tuple[OpSpec, ...]:
    """The specs of all modules in this package; those with CUDA kernels first."""
    modules = [import_module(f"{__name__}.{entry.name}") for entry in pkgutil.iter_modules(__path__)]
    specs = {id(value): value for module in modules for value in vars(module).values() if isinstance(value, OpSpec)}
    return tuple(sorted(specs.values(), key=lambda spec: (not spec.cuda_kernels, spec.name)))


SPECS = _found()

__all__ = [
    "BLUR",
    "CONDITIONAL_SPN",
    "DENSE_LAYOUTS",
    "DTYPES",
    "FACTOR",
    "GCONV_MIX",
    "LAYOUTS",
    "MODULATE",
    "MODULATE_MAPS",
    "SPECS",
    "SPN",
    "TOLERANCES",
    "Case",
    "OpSpec",
    "Result",
    "Traffic",
    "assert_close_as_eager",
    "available_impls",
    "check_against_eager",
    "evaluate",
    "excess",
    "in_double",
    "random",
    "saved_bytes",
    "without_kink",
]
