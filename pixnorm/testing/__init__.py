"""What tests and benchmarks know of each op; see :mod:`pixnorm.testing.harness`."""

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
from pixnorm.testing.spn import SPN

SPECS = (SPN, GCONV_MIX)

__all__ = [
    "DENSE_LAYOUTS",
    "DTYPES",
    "FACTOR",
    "GCONV_MIX",
    "LAYOUTS",
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
