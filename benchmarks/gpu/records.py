"""What was found, and figures of it."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.gpu.cases import PAIRS
from benchmarks.gpu.section import FUSED, PEERS, PRECISIONS
from benchmarks.results import json_by_line
from pixnorm.testing import DENSE_LAYOUTS

MODES = ("forward", "backward")
TITLES = {"plain": "SPN", "up": "up → SPN → ReLU", "mixing": "GConv's mixing"}
WORDS = {"tf32": "fp32 with TF32", "fp32": "fp32 strict", "bf16": "bf16", "fp16": "fp16"}
LARGE = 32 << 20  # bytes of the largest tensor that a kernel touches, from which on its bandwidth has a goal


class Records:
    """What was found, and figures of it; a figure of what was not found is None.

    Attributes:
        facts: of the machine, the versions and the run, in words.
        parts: of the run, see ``parts.told``.
        entries: the records, see ``cases.py``.
    """

    def __init__(self, facts: dict[str, str], parts: list[dict], entries: list[dict]):
        self.facts, self.parts, self.entries = facts, parts, entries

    @classmethod
    def load(cls, path: Path) -> "Records":
        return cls(**json.loads(path.read_text()))

    def text(self) -> str:
        """As ``load`` reads it."""
        return json_by_line({"facts": self.facts, "parts": self.parts}, "entries", self.entries)

    @property
    def gpu(self) -> str:
        return self.facts.get("machine", "a GPU").rpartition(", ")[0] or "a GPU"

    def failures(self) -> list[str]:
        """What went wrong, tests first: where, and why."""
        tests = [f"{entry['test']}: {entry['error']}" for entry in self.all("test failure")]
        others = [f"{entry['where']}: {entry['error']}" for entry in self.all("failure")]
        return tests + others

    def tests(self, part: str) -> dict | None:
        """How many of a part's tests have passed and failed."""
        return next(iter(self.all("tests", part=part)[-1:]), None)

    def all(self, what: str, **where) -> list[dict]:
        return [
            entry
            for entry in self.entries
            if entry["what"] == what and all(entry.get(key) == value for key, value in where.items())
        ]

    def best(self, contenders: Iterable[str], what: str, **where) -> dict | None:
        """The fastest of several contenders, by the median."""
        found = [entry for entry in self.all(what, **where) if entry["contender"] in contenders]
        return min(found, key=lambda entry: entry["median"], default=None)

    def ratio(self, slower: Iterable[str], faster: Iterable[str], what: str, **where) -> float | None:
        """How often the time of the best of some fits that of the best of others."""
        a, b = (self.best(contenders, what, **where) for contenders in (slower, faster))
        return a["median"] / b["median"] if a and b else None

    def speed_up(self, impl: str, **where) -> float | None:
        """Of an impl over the best peer."""
        return self.ratio(PEERS, FUSED[impl], "layer", **where)

    def step_ratio(self, of: str, impls: Iterable[str], batch: int, precision: str, clock: str) -> float | None:
        """Time of a generator's step with the best of some impls, that with the plain layer being 1."""
        where = {"of": of, "batch": batch, "precision": precision, "clock": clock}
        return self.ratio(in_layouts(*impls), in_layouts(PAIRS[of].plain), "step", **where)

    def impls(self, what: str, **where) -> list[str]:
        """The fused ones that ran; with none, the native one, which should have."""
        ran = {entry["contender"] for entry in self.all(what, **where)}
        return [impl for impl, contenders in FUSED.items() if ran.intersection(contenders)] or ["native"]

    @property
    def copy(self) -> float | None:
        """Bytes per second of a large one."""
        return next((entry["bandwidth"] for entry in self.all("copy")), None)

    def shares(self, impl: str, kernel: str, precision: str, **where) -> list[tuple[dict, float]]:
        """Of each time of an impl's kernel on large tensors: the record, and its share of a copy's bandwidth."""
        found = []
        for entry in self.all("kernel", kernel=kernel, precision=precision, **where):
            if entry["contender"] not in FUSED[impl]:
                continue
            itemsize = PRECISIONS[precision][0].itemsize
            elements = torch.Size(map(int, entry["shape"].split("x"))).numel()
            quarter = 4 if entry["head"] == "up" and kernel.endswith("statistics_kernel") else 1
            share = share_of_copy(entry)
            if elements * itemsize // quarter >= LARGE and share:
                found.append((entry, share))
        return found


def share_of_copy(entry: dict) -> float | None:
    """Of a kernel's bandwidth, in that of a copy that moves as many bytes."""
    return entry["copy"] / entry["median"] if entry.get("copy") else None


def in_layouts(*impls: str) -> list[str]:
    return [f"{impl}-{layout}" for impl in impls for layout in DENSE_LAYOUTS]
