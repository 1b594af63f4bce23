"""Defines ops from their schemas, and chooses the backend of a call. Nothing else in pixnorm chooses.

The PyTorch dispatcher picks the device; this file picks between ``reference``, ``native``, ``triton`` and ``auto``.
Compiled kernels register themselves with the schemas defined here when their extension is imported, so the package
imports, traces and runs (on the reference) without them. Triton is imported on first use.
"""

import importlib
import importlib.util
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from pixnorm.ops.common import constant_in_graphs, onlooker, when_imported

IMPLS = ("auto", "native", "triton", "reference")

_library = torch.library.Library("pixnorm", "DEF")

# device type -> (extension module that registers the kernels, how to get it)
EXTENSIONS = {
    "cpu": ("pixnorm._C", "reinstall pixnorm where a C++17 compiler is on the path (`make build` in a clone)"),
    "cuda": ("pixnorm._cuda", "reinstall pixnorm where nvcc and a CUDA build of torch are (`make build` in a clone)"),
}
# What define_op was told of each op, in the order of definition.
fakes: dict[str, Callable] = {}
native_devices: dict[str, tuple[str, ...]] = {}  # op -> the device types that csrc has kernels for
triton_modules: dict[str, str] = {}  # op -> the module of its kernels
_composite: set[str] = set()  # ops with an ``everywhere``
_flops: dict[str, Callable[..., int]] = {}  # op -> its multiplications and additions
missing: dict[str, str] = {}  # device type -> why its extension is not loaded
fallbacks: dict[str, list[str]] = {}  # op -> why auto ran the reference


def define_op(
    schema: str,
    fake: Callable,
    native: Sequence[str] = (),
    everywhere: Callable | None = None,
    flops: Callable[..., int] | None = None,
    triton: str | None = None,
) -> torch._ops.OpOverload:
    """Define ``pixnorm::<schema>``; return the op.

    Args:
        schema: in PyTorch's schema language, without the namespace.
        fake: gives shapes, dtypes and strides of the outputs.
        native: the device types that ``csrc`` has kernels for: ``"cpu"``, ``"cuda"``.
        everywhere: the implementation, in PyTorch's own operations, for all other devices.
        flops: counts multiplications and additions for ``torch.utils.flop_counter``; called with the op's arguments,
            shapes in place of tensors.
        triton: the module of ``triton_kernels`` that has its Triton kernels, if there are any.
    """
    name = schema[: schema.index("(")]
    fakes[name], native_devices[name] = fake, tuple(native)
    if triton is not None:
        triton_modules[name] = triton
    if everywhere is not None:
        _composite.add(name)
    if flops is not None:
        _flops[name] = flops
    _library.define(schema)
    torch.library.register_fake(f"pixnorm::{name}", fake, lib=_library)
    if everywhere is not None:
        _library.impl(name, everywhere, "CompositeExplicitAutograd")
    return getattr(torch.ops.pixnorm, name).default


def _register_flops() -> None:
    """Register the formulas with PyTorch's counter, for the native and the Triton ops."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    if importlib.util.find_spec("triton") is not None:
        triton_obstacle("meta")  # imports the kernels
    for name, flops in _flops.items():
        for op in (name, f"{name}_triton"):
            if hasattr(torch.ops.pixnorm, op) and getattr(torch.ops.pixnorm, op) not in flop_registry:
                register_flop_formula(getattr(torch.ops.pixnorm, op))(flops)


def load_extensions() -> None:
    """Import the compiled kernels that exist; record why for those that do not. Triton's are not imported here."""
    _find_kernels_of_a_clone()
    for device, (module, remedy) in EXTENSIONS.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            missing[device] = f"{module} is not there ({error}); {remedy}"
    when_imported("torch.utils.flop_counter", _register_flops)


gpu_obstacles: dict[int | None, str | None] = {}  # device index -> why its GPU cannot run the kernels


@constant_in_graphs
def _gpu_obstacle(index: int | None) -> str | None:
    if index not in gpu_obstacles:
        major, minor = torch.cuda.get_device_capability(index)
        found = f"the CUDA kernels are for compute capability 8.0 and newer, this is {major}.{minor}"
        gpu_obstacles[index] = None if major >= 8 else found
    return gpu_obstacles[index]


def has_kernels(op: str, impl: str, device_type: str) -> bool:
    """Whether an op was written for a named impl and a device type, built or not."""
    if impl == "triton":
        return f"{op}_fwd" in triton_modules
    return device_type in native_devices[f"{op}_fwd"] or f"{op}_fwd" in _composite


def native_obstacle(op: str, device: torch.device, refusal: str | None) -> str | None:
    """Why the native kernels of an op cannot run on a device, or ``refusal``; None where they can."""
    if device.type == "meta":
        return refusal  # the op's fake runs
    if not has_kernels(op, "native", device.type):
        return f"there are no native kernels for device type '{device.type}'"
    if device.type not in native_devices[f"{op}_fwd"]:
        return refusal  # PyTorch's own operations
    if device.type in missing:
        return missing[device.type]
    return refusal or (_gpu_obstacle(device.index) if device.type == "cuda" else None)


_OLDEST_TRITON = (3, 6)
triton_obstacles: dict[tuple[str, int | None], str | None] = {}  # device -> why it cannot run the Triton kernels


@constant_in_graphs
def triton_obstacle(device_type: str, index: int | None = None) -> str | None:
    """Why Triton kernels cannot run on a device; None if they can, and then they are imported and registered."""
    if (device_type, index) not in triton_obstacles:
        triton_obstacles[device_type, index] = find_triton_obstacle(device_type, index)
    return triton_obstacles[device_type, index]


def find_triton_obstacle(device_type: str, index: int | None) -> str | None:
    try:
        import triton
    except Exception as error:  # a shared library that it loads may be missing or incompatible
        return f"Triton is not there ({error}); `pip install triton`, or a PyTorch for GPUs, which brings it"
    if tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) < _OLDEST_TRITON:
        wanted = ".".join(map(str, _OLDEST_TRITON))
        return f"Triton {triton.__version__} is too old; `pip install 'triton>={wanted}'`, or a newer PyTorch"
    if device_type == "cpu" and not triton.knobs.runtime.interpret:
        return (
            "Triton's kernels need a GPU; with TRITON_INTERPRET=1 in the environment, from the start of Python on, "
            "they run on the CPU, for tests"
        )
    if device_type not in ("cpu", "cuda", "xpu", "meta"):
        return f"Triton has no kernels for device type '{device_type}'"
    if device_type in ("cuda", "xpu"):
        try:
            triton.runtime.driver.active.get_current_target()
        except Exception as error:  # on first use on a machine it compiles a part of itself in C
            return f"Triton does not start here ({error}); it needs the GPU's driver and a C compiler"
    if device_type == "cuda" and torch.version.hip is None and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(index)
        if major < 8:
            return f"Triton is for GPUs of compute capability 8.0 and newer, this is {major}.{minor}"
    for module in dict.fromkeys(triton_modules.values()):
        importlib.import_module(f"pixnorm.triton_kernels.{module}")
    return None


def _find_kernels_of_a_clone() -> None:
    """In a clone that is not installed, pixnorm.triton_kernels is a folder next to pixnorm."""
    name = "pixnorm.triton_kernels"
    folder = Path(__file__).parents[2] / "triton_kernels"
    if importlib.util.find_spec(name) is None and folder.is_dir():
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


def choose(
    op: str,
    impl: str,
    device: torch.device,
    refusals: Mapping[str, str | None],
    preferred: str = "native",
    stacklevel: int = 4,
) -> str:
    """The backend to run: ``"native"``, ``"triton"`` or ``"reference"``.

    A named impl that cannot run raises RuntimeError. ``auto`` takes the preferred one of the kernels that can run; on
    the CPU only native is considered. If none can, it falls back to the reference, warns once per op and reason, and
    ``backends()`` repeats the reason.

    Args:
        op: the op id.
        impl: what the caller asked for.
        device: of the tensors.
        refusals: for ``"native"`` and ``"triton"``, why those kernels cannot take these arguments (None or absent: they
            can).
        preferred: ``"native"`` or ``"triton"``, where both can run.
        stacklevel: of the warning, so that it names the caller's line; 4 from a public function.
    """
    if impl not in IMPLS:  # importing checks.py here would be circular
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    if impl == "reference":
        return impl
    if impl != "auto":
        candidates = [impl]
    elif device.type in ("cuda", "xpu"):
        candidates = ["triton", "native"] if preferred == "triton" else ["native", "triton"]
    else:
        candidates = ["native"]
    obstacles = []
    watched = onlooker()
    for candidate in candidates:
        refusal = refusals.get(candidate)
        if watched is not None:
            obstacle = f"{watched}, and supports PyTorch's own operations only; impl='reference' consists of those"
        elif candidate == "native":
            obstacle = native_obstacle(op, device, refusal)
        elif not has_kernels(op, candidate, device.type):
            obstacle = "there are no kernels in Triton"
        else:
            obstacle = triton_obstacle(device.type, device.index) or refusal
        if obstacle is None:
            return candidate
        obstacles.append(obstacle)
    obstacle = "; ".join(dict.fromkeys(obstacles))
    if impl != "auto":
        raise RuntimeError(f"{op}: impl={impl!r} cannot run here: {obstacle}")
    if not torch.compiler.is_compiling() and obstacle not in fallbacks.setdefault(op, []):
        fallbacks[op].append(obstacle)
        warnings.warn(f"pixnorm.{op} runs on the reference: {obstacle}", stacklevel=stacklevel)
    return "reference"


def _triton_version() -> str:
    return importlib.import_module("triton").__version__


def backends() -> dict[str, str]:
    """The available backends, and why the others are not: ``{"reference": ..., "native (cpu)": ..., "triton": ...}``.

    After ``auto`` has fallen back to the reference for an op, an entry ``"auto: <op>"`` repeats the reason.
    """
    report = {"reference": "available"}
    for device, (module, _) in EXTENSIONS.items():
        if device in missing:
            report[f"native ({device})"] = f"unavailable: {missing[device]}"
        else:
            info = importlib.import_module(module).build_info()
            details = ", ".join(f"{key} {value}" for key, value in info.items())
            report[f"native ({device})"] = f"available ({details})"
    obstacle = triton_obstacle("cuda" if torch.cuda.is_available() else "xpu" if torch.xpu.is_available() else "cpu")
    report["triton"] = f"unavailable: {obstacle}" if obstacle else f"available (triton {_triton_version()})"
    for op, reasons in fallbacks.items():
        report[f"auto: {op}"] = f"ran on the reference: {'; '.join(reasons)}"
    return report
