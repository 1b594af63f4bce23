"""Defines ops from their schemas, and chooses the backend of a call. Nothing else in pixnorm chooses.

The PyTorch dispatcher picks the device; this file picks between ``reference``, ``native`` and ``auto``. Compiled
kernels register themselves with the schemas defined here when their extension is imported, so the package imports,
traces and runs (on the reference) without any of them.
"""

import importlib
import warnings

import torch

IMPLS = ("auto", "native", "reference")

_library = torch.library.Library("pixnorm", "DEF")

# device type -> (extension module that registers the kernels, how to get it)
_EXTENSIONS = {
    "cpu": ("pixnorm._C", "reinstall pixnorm where a C++17 compiler is on the path (`make build` in a clone)"),
    "cuda": ("pixnorm._cuda", "reinstall pixnorm where nvcc and a CUDA build of torch are (`make build` in a clone)"),
}
_missing: dict[str, str] = {}  # device type -> why its extension is not loaded
_fallbacks: dict[str, list[str]] = {}  # op -> why auto ran the reference


def define_op(schema: str, fake, everywhere=None) -> torch._ops.OpOverload:
    """Define ``pixnorm::<schema>`` and its fake (shapes, dtypes and strides of the outputs); return the op.

    ``everywhere`` is what runs on devices that no compiled kernel is registered for.
    """
    name = schema[: schema.index("(")]
    _library.define(schema)
    torch.library.register_fake(f"pixnorm::{name}", fake, lib=_library)
    if everywhere is not None:
        _library.impl(name, everywhere, "CompositeExplicitAutograd")
    return getattr(torch.ops.pixnorm, name).default


def load_extensions() -> None:
    """Import the compiled kernels that are there; remember why for those that are not."""
    for device, (module, remedy) in _EXTENSIONS.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            _missing[device] = f"{module} is not there ({error}); {remedy}"


_gpu_obstacles: dict[int | None, str | None] = {}  # device index -> why its GPU cannot run the kernels


@torch.compiler.assume_constant_result
def _gpu_obstacle(index: int | None) -> str | None:
    if index not in _gpu_obstacles:
        major, minor = torch.cuda.get_device_capability(index)
        found = f"the CUDA kernels are for compute capability 8.0 and newer, this is {major}.{minor}"
        _gpu_obstacles[index] = None if major >= 8 else found
    return _gpu_obstacles[index]


def _native_obstacle(device: torch.device, refusal: str | None) -> str | None:
    if device.type == "meta":
        return refusal  # the op's fake runs
    if device.type in _missing:
        return _missing[device.type]
    if device.type not in _EXTENSIONS:
        return f"there are no native kernels for device type '{device.type}'"
    return refusal or (_gpu_obstacle(device.index) if device.type == "cuda" else None)


def choose(op: str, impl: str, device: torch.device, refusal: str | None = None) -> str:
    """The backend to run: ``"native"`` or ``"reference"``.

    ``refusal`` says why the native kernel cannot take these arguments (None: it can). A named impl that cannot run
    raises RuntimeError; ``auto`` falls back to the reference, warns once per op and reason, and tells ``backends()``.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    if impl == "reference":
        return impl
    obstacle = _native_obstacle(device, refusal)
    if obstacle is None:
        return "native"
    if impl == "native":
        raise RuntimeError(f"{op}: impl='native' cannot run here: {obstacle}")
    if not torch.compiler.is_compiling() and obstacle not in _fallbacks.setdefault(op, []):
        _fallbacks[op].append(obstacle)
        warnings.warn(f"pixnorm.{op} runs on the reference: {obstacle}", stacklevel=3)
    return "reference"


def backends() -> dict[str, str]:
    """What can run here and, for the rest, why not: ``{"reference": ..., "native (cpu)": ..., ...}``.

    After ``auto`` has fallen back to the reference for an op, an entry ``"auto: <op>"`` repeats the reason.
    """
    report = {"reference": "available"}
    for device, (module, _) in _EXTENSIONS.items():
        if device in _missing:
            report[f"native ({device})"] = f"unavailable: {_missing[device]}"
        else:
            info = importlib.import_module(module).build_info()
            details = ", ".join(f"{key} {value}" for key, value in info.items())
            report[f"native ({device})"] = f"available ({details})"
    for op, reasons in _fallbacks.items():
        report[f"auto: {op}"] = f"ran on the reference: {'; '.join(reasons)}"
    return report
