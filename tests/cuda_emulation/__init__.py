"""pixnorm's CUDA sources, compiled by the C++ compiler, as ops ``pixnorm_emulated::<op>`` on CPU tensors."""

import contextlib
import ctypes
import functools
import os
import sys

import torch

import pixnorm.testing  # noqa: F401  imports every module with ops

from .build import build

# "sanitized" and "ucontext" need separate processes: see build.environment.
VARIANT = os.environ.get("PIXNORM_CUDA_EMULATION", "plain")


@functools.cache
def load(library: str) -> ctypes.CDLL:
    """Build and load one of ``build.LIBRARIES``, which registers its ops."""
    return ctypes.CDLL(str(build(library, VARIANT)))


def set_seed(seed: int, library: str = "pixnorm") -> None:
    """Choose the execution order of threads and blocks from now on."""
    load(library).cuda_emulation_set_seed(ctypes.c_uint64(seed))


def _places():
    """All references of pixnorm to its compiled ops: (module, name, op)."""
    for module in [m for name, m in sys.modules.items() if name.startswith("pixnorm.")]:
        for name, value in vars(module).items():
            if isinstance(value, torch._ops.OpOverload) and value.namespace == "pixnorm":
                yield module, name, value


@functools.cache
def _emulated_ops():
    """A map from pixnorm's ops to the emulated ones, with the same schema and fake."""
    library = torch.library.Library("pixnorm_emulated", "DEF")
    ops = {}
    for op in {op for _, _, op in _places()}:
        schema = str(op._schema).removeprefix("pixnorm::")
        library.define(schema)
        name = schema[: schema.index("(")]
        torch.library.register_fake(f"pixnorm_emulated::{name}", op, lib=library)
        ops[op] = getattr(torch.ops.pixnorm_emulated, name).default
    load("pixnorm")
    return library, ops  # the ops exist as long as the library


@contextlib.contextmanager
def emulated(seed: int = 0):
    """Inside the context, ``impl="native"`` runs the emulated kernels."""
    _, ops = _emulated_ops()
    set_seed(seed)
    places = list(_places())
    for module, name, op in places:
        setattr(module, name, ops[op])
    try:
        yield
    finally:
        for module, name, op in places:
            setattr(module, name, op)
