"""What a run has measured, and figures that follow from it."""

import json
import platform
import re
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

import pixnorm
from benchmarks.ops import OPS
from benchmarks.registry import IMPLS, LIBRARIES, Op, in_layouts
from pixnorm.testing import DENSE_LAYOUTS

LARGE = 64 << 20  # bytes that a kernel moves, from which on its bandwidth has a goal


class Records:
    """One run; a figure of what was not measured is None.

    Attributes:
        facts: of the machine, the versions and the run, in words.
        parts: of a run on a GPU, see ``benchmarks.gpu.parts.told``.
        entries: one dict for each finding: ``what`` it is, what it is of (``op``, ``head``, ``shape``, ``precision``,
            ``mode``, ``contender`` ...), and for times in seconds the fields of ``stopwatch.Spread``.
        on_cpu: whether the CPU was measured; otherwise it was a GPU (or the CPU in its place, in a trial).
    """

    def __init__(self, facts: dict[str, str], parts: list[dict], entries: list[dict], on_cpu: bool = False):
        self.facts, self.parts, self.entries, self.on_cpu = facts, parts, entries, on_cpu

    @classmethod
    def load(cls, path: Path) -> "Records":
        return cls(**json.loads(path.read_text()))

    def text(self) -> str:
        """As ``load`` reads it."""
        head = {"on_cpu": self.on_cpu, "facts": self.facts, "parts": self.parts}
        return json_by_line(head, "entries", self.entries)

    @property
    def machine(self) -> str:
        return self.facts.get("machine", "a GPU")

    @property
    def gpu(self) -> str:
        """Its name, as PyTorch gives it; "cpu" where there is none."""
        return "cpu" if self.on_cpu else self.machine.rpartition(", ")[0] or "a GPU"

    def all(self, what: str, **where) -> list[dict]:
        wanted = {"what": what, **where}
        return [entry for entry in self.entries if wanted.items() <= entry.items()]

    def groups(self, what: str, *keys: str, **where) -> list[dict]:
        """The different values of some keys, each key's in the order in which they first appear."""
        found = [{key: entry[key] for key in keys} for entry in self.all(what, **where)]
        order = {key: list(dict.fromkeys(group[key] for group in found)) for key in keys}
        unique = {tuple(group.values()): group for group in found}.values()
        return sorted(unique, key=lambda group: [order[key].index(group[key]) for key in keys])

    def best(self, names: Iterable[str], what: str, statistic: str = "median", **where) -> dict | None:
        """The fastest of several contenders."""
        names = set(names)
        found = [entry for entry in self.all(what, **where) if entry["contender"] in names]
        return min(found, key=lambda entry: entry[statistic], default=None)

    def time(self, names: Iterable[str], what: str, statistic: str = "median", **where) -> float | None:
        best = self.best(names, what, statistic, **where)
        return best and best[statistic]

    def ratio(self, slower: Iterable[str], faster: Iterable[str], *what: str, **where) -> float | None:
        """The time of the best of some contenders over that of the best of others."""
        a, b = (self.time(names, *what, **where) for names in (slower, faster))
        return a / b if a and b else None

    def step_ratio(self, op: Op, impls: Iterable[str], *statistic: str, **where) -> float | None:
        """Time of a generator's step with the best of some impls, relative to that with the plain layer."""
        return self.ratio(in_layouts(*impls), in_layouts(op.step.plain), "step", *statistic, op=str(op), **where)

    def products(self, names: Iterable[str], what: str, *statistic: str, **where) -> float | None:
        """Seconds of the matrix products alone by the fastest library, in the layouts of these contenders; 0 for an op
        that has none."""
        if not OPS[where["op"]].products:
            return 0.0
        layouts = {name.split("-")[1] for name in names}
        return self.time(names_of(LIBRARIES, layouts), what, *statistic, **where)

    def share_of_peak(self, op: Op, shape: Sequence[int], mode: str, seconds: float | None) -> float | None:
        """Operations of the op's matrix products in that time, over those in the same time of what a library is
        fastest at."""
        peaks = [entry["operations"] / entry["shortest"] for entry in self.all("peak")]
        if not (peaks and seconds and op.products):
            return None
        return op.products.operations(shape, mode == "forward_backward") / seconds / max(peaks)

    def at_floor(self, over: Iterable[str], names: Sequence[str], **where) -> float | None:
        """The speed-up of a call that takes only its matrix products and one copy of the other bytes it must move."""
        products, copied = self.products(names, "layer", **where), self.time(["copy-used"], "layer", **where)
        floor = (products or 0) + (copied or 0)
        peer = self.time(over, "layer", **where)
        return peer / floor if peer and products is not None and floor else None

    def outside(self, names: Iterable[str], what: str, statistic: str = "median", **where) -> float | None:
        """Seconds of the best of ours outside its matrix products."""
        best = self.best(names, what, **where)
        products = best and self.products([best["contender"]], what, statistic, **where)
        return best[statistic] - products if products is not None else None

    def impls(self, what: str, **where) -> list[str]:
        """Ours that ran; with none, the native one, which should have."""
        ran = {entry["contender"].split("-")[0] for entry in self.all(what, **where)}
        return [impl for impl in IMPLS if impl in ran] or ["native"]

    def failures(self) -> list[str]:
        """What went wrong, tests first: where, and why."""
        tests = [f"{entry['test']}: {entry['error']}" for entry in self.all("test failure")]
        return tests + [f"{entry['where']}: {entry['error']}" for entry in self.all("failure")]

    def tests(self, part: str) -> dict | None:
        """How many of a part's tests have passed and failed."""
        return next(iter(self.all("tests", part=part)[-1:]), None)

    def shares(self, impl: str, kernel: str, precision: str, **where) -> list[tuple[dict, float]]:
        """For each time of an impl's kernel on large tensors: the record, and its share of a copy's bandwidth."""
        found = self.all("kernel", kernel=kernel, precision=precision, **where)
        found = [entry for entry in found if entry["contender"] in in_layouts(impl) and (entry["bytes"] or 0) >= LARGE]
        return [(entry, share) for entry in found if (share := share_of_copy(entry))]


def share_of_copy(entry: dict) -> float | None:
    """A kernel's bandwidth relative to that of a copy that moves as many bytes."""
    return entry["copy"] / entry["median"] if entry.get("copy") else None


def layouts_of(op: Op) -> list[tuple[str, ...]]:
    """The layouts that are compared with each other."""
    return [(layout,) for layout in DENSE_LAYOUTS] if op.same_layout else [DENSE_LAYOUTS]


def names_of(impls: Iterable[str], layouts: Iterable[str]) -> list[str]:
    return [f"{impl}-{layout}" for layout in layouts for impl in impls]


def json_by_line(head: dict, name: str, entries: list[dict]) -> str:
    """JSON of an object whose last value is a list, one entry a line."""
    lines = ",\n".join("    " + json.dumps(entry) for entry in entries)
    return json.dumps(head | {name: []}, indent=2).replace(f'"{name}": []', f'"{name}": [\n{lines}\n  ]') + "\n"


def provenance(commit: dict, command: str) -> dict[str, str]:
    """The versions and the run; ``commit`` as pytest-benchmark gives it."""
    return {
        "versions": f"pixnorm {pixnorm.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "commit": commit["id"][:12] + ("+dirty" if commit["dirty"] else ""),
        "command": command,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def file_stem(machine: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
