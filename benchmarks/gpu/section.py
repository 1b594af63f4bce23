"""What all sections of the measurements need: where records go, and what can be measured here."""

import json
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.contenders import Call
from benchmarks.registry import IMPLS, MAIN_PRECISIONS, Op, Shape, in_layouts
from benchmarks.stopwatch import Stopwatch
from pixnorm.testing import OpSpec, available_impls

T = TypeVar("T")


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
        # On a GPU, native without kernels in CUDA C++ consists of PyTorch's products.
        of_products = ["native"] if self.stopwatch.on_gpu and not spec.cuda_kernels else []
        here = [impl for impl in IMPLS if impl in (*self.available, *of_products)]
        return [impl for impl in here if spec.runs(impl, self.device.type)] or ["native"]

    def fused(self, spec: OpSpec) -> list[str]:
        """Their contenders."""
        return list(in_layouts(*self.impls(spec)))

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

    def precisions(self, wanted: Sequence[str]) -> list[str]:
        """Those that are measured here."""
        return [precision for precision in wanted if self.stopwatch.on_gpu or precision == MAIN_PRECISIONS[0]]

    def call(self, op: Op, head: str, shape: Shape, precision: str) -> Call:
        """``shape`` is that of the output; on the CPU it shrinks."""
        sized = shape if self.stopwatch.on_gpu else (2, 8, *(min(size, 8) for size in shape[2:]))
        return Call(op, head, sized, precision, self.device)
