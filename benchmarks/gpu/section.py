"""What all sections of the measurements need: where findings go, and the contenders of a call."""

import json
import traceback
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from benchmarks.contenders import implementation
from benchmarks.gpu.timing import Stopwatch, Timed
from pixnorm.testing import DENSE_LAYOUTS, LAYOUTS, Case, OpSpec, available_impls

PRECISIONS = {  # dtype of activations, whether convolutions may round to TF32
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
    "bf16": (torch.bfloat16, True),
    "fp16": (torch.float16, True),
}
T = TypeVar("T")
FUSED = {impl: tuple(f"{impl}-{layout}" for layout in DENSE_LAYOUTS) for impl in ("native", "triton")}
EAGER = tuple(f"eager-{layout}" for layout in DENSE_LAYOUTS)
# torch.compile as it is, and with reductions of several blocks that wait for each other.
COMPILED = tuple(f"{how}-{layout}" for how in ("compile", "cooperative") for layout in DENSE_LAYOUTS)
PEERS = EAGER + COMPILED


def read_records(path: Path) -> list[dict]:
    """Those in a file; the last one of a process that was stopped may be cut."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


class ContextLostError(RuntimeError):
    """Nothing more can be done with the GPU in this process."""


class Section:
    """Where a section writes what it finds, and with what it measures.

    A process that loses the GPU's context, or dies, is followed by another one over the same file: that goes on behind
    what took the context.

    Args:
        device: to measure on. On the CPU all sizes shrink: that is a trial of this code.
        records: the file to write, one JSON object a line.
    """

    def __init__(self, device: str, records: Path):
        self.device, self.records = torch.device(device), records
        self.before = read_records(records)
        started = [entry["where"] for entry in self.before if entry["what"] == "start"]
        self.lost = {entry["where"] for entry in self.before if entry["what"] == "failure"} | {*started[-1:]}
        self.stopwatch = Stopwatch(self.device)
        self.failed = bool(self.before)
        self.available = available_impls(self.device.type)
        # A record costs some microseconds; what is written survives this process.
        self.file = records.open("a", buffering=1)

    def impls(self, spec: OpSpec) -> list[str]:
        """The fused ones that can run here. With none, ask for native all the same: it says how to get it."""
        # On a GPU, native without kernels in CUDA C++ is made of the library's products.
        made_of_products = ["native"] if self.stopwatch.on_gpu and not spec.cuda_kernels else []
        return [impl for impl in FUSED if impl in (*self.available, *made_of_products)] or ["native"]

    def fused(self, spec: OpSpec) -> list[str]:
        """Their contenders."""
        return [name for impl in self.impls(spec) for name in FUSED[impl]]

    def has(self, what: str, **where) -> bool:
        """Whether a process before this one has found that."""
        wanted = {"what": what, **where}
        return any(wanted.items() <= entry.items() for entry in self.before)

    def add(self, what: str, **record) -> None:
        record = {"what": what, **record}
        self.file.write(json.dumps(record) + "\n")
        if what != "start":
            print(" ".join(str(value) for key, value in record.items() if key != "kernels"), flush=True)

    def attempt(self, where: str, function: Callable[..., T], *arguments) -> T | None:
        """What the function returns of its arguments; None where it fails, which is told of and stops nothing else.

        Raises:
            ContextLostError: nothing more can be found in this process.
        """
        if where in self.lost:
            return None
        self.add("start", where=where)
        try:
            found = function(*arguments)
            self.stopwatch.synchronize()  # what fails on the GPU is told of by a later call
            return found
        except Exception as error:
            self.failed = True
            traceback.print_exc()
            self.add("failure", where=where, error=f"{type(error).__name__}: {error}".strip().splitlines()[0][:300])
        try:
            self.stopwatch.synchronize()
        except Exception as error:
            raise ContextLostError(where) from error
        return None

    @property
    def precisions(self) -> tuple[str, ...]:
        return tuple(PRECISIONS) if self.stopwatch.on_gpu else ("tf32",)

    @property
    def some_precisions(self) -> tuple[str, ...]:
        return self.among(("tf32", "bf16"))

    def among(self, precisions: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(precision for precision in precisions if precision in self.precisions)

    def sized(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape if self.stopwatch.on_gpu else (2, 8, min(shape[2], 8), min(shape[3], 8))


class Passes(NamedTuple):
    """Of one contender: its forward, which keeps what backward needs; the backward of a result; the tensors given."""

    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], object]
    tensors: dict[str, Tensor]

    def both(self) -> object:
        return self.backward(self.forward())

    def timed(self) -> dict[str, Timed]:
        """Each pass alone."""
        return {"forward": Timed(lambda _: self.forward()), "backward": Timed(self.backward, self.forward)}


@lru_cache(maxsize=1)  # drawing takes longer than measuring; the precisions of one case follow each other
def draw(spec: OpSpec, case: Case, device: torch.device) -> dict[str, Tensor]:
    return spec.inputs(case, device=device)


class Call:
    """One call of an op in one precision, run by several contenders.

    Args:
        case: of a size that suits the section's device.
        precision: a key of ``PRECISIONS``; sets the flag that allows TF32.
    """

    def __init__(self, section: Section, spec: OpSpec, case: Case, precision: str):
        self.dtype, torch.backends.cudnn.allow_tf32 = PRECISIONS[precision]
        self.spec, self.case = spec, case
        self.tensors = draw(spec, case, section.device)

    def inputs(self, layout: str) -> dict[str, Tensor]:
        """The tensors, those that get a gradient as leaves. Parameters are float32 where the op takes them so."""
        first, parameter_dtype = self.spec.first, torch.float32 if self.spec.float32_parameters else self.dtype
        tensors = {name: tensor.to(parameter_dtype) for name, tensor in self.tensors.items() if name != first}
        tensors[first] = LAYOUTS[layout](self.tensors[first].to(self.dtype))
        return {
            name: tensor.detach().requires_grad_() if name in self.spec.differentiable else tensor
            for name, tensor in tensors.items()
        }

    def passes(self, name: str) -> Passes:
        impl, layout = name.split("-")
        tensors = self.inputs(layout)
        leaves = [tensors[leaf] for leaf in self.spec.differentiable if leaf in tensors]
        if impl == "cooperative":
            options = {"triton.cooperative_reductions": True}  # as TORCHINDUCTOR_COOPERATIVE_REDUCTIONS=1 does
            function = torch.compile(self.spec.reference, dynamic=False, options=options)
        else:
            function = implementation(self.spec, impl)

        def forward() -> Tensor:
            return function(**tensors, **self.case.options)

        grad = torch.randn_like(forward())
        return Passes(forward, lambda y: torch.autograd.grad(y, leaves, grad), tensors)

    def ready(self, name: str) -> Passes:
        """Those of a contender, after both have run once."""
        passes = self.passes(name)
        passes.both()
        return passes
