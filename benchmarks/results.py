"""What a run has measured, and the figures that follow from it."""

import json
import platform
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import product
from math import log, prod
from pathlib import Path
from statistics import geometric_mean, linear_regression, median

import torch

import pixnorm
from benchmarks.contenders import DTYPE, FUSED, GEMMS, KERNELS, MODES, PEERS
from benchmarks.test_generator import STEPS
from benchmarks.test_spn import SHAPES, SWEEP, label
from pixnorm.testing import DENSE_LAYOUTS

Statistic = Callable[[Iterable[float]], float]
LAYOUTS = {"contiguous": "NCHW", "channels_last": "channels_last"}


def json_by_line(head: dict, name: str, entries: list[dict]) -> str:
    """JSON of an object whose last value is a list, one entry a line."""
    lines = ",\n".join("    " + json.dumps(entry) for entry in entries)
    return json.dumps(head | {name: []}, indent=2).replace(f'"{name}": []', f'"{name}": [\n{lines}\n  ]') + "\n"


def provenance(commit: dict, command: str) -> dict[str, str]:
    """The versions and the run; ``commit`` as pytest-benchmark tells it."""
    return {
        "versions": f"pixnorm {pixnorm.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "commit": commit["id"][:12] + ("+dirty" if commit["dirty"] else ""),
        "command": command,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def file_stem(machine: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")


class Results:
    """One run.

    Attributes:
        facts: of the machine, the versions and the run, in words.
        agreement: by impl, of what, and in which dtype: relative distances of the generators, see ``report.agreement``.
        cases: each with ``comparison``, ``contender``, ``seconds`` (every round) and perhaps ``saved_bytes``.
    """

    def __init__(self, facts: dict[str, str], agreement: dict, cases: list[dict]):
        self.facts, self.agreement, self.cases = facts, agreement, cases
        self._cases = {(case["comparison"], case["contender"]): case for case in cases}

    def save(self, path: Path) -> None:
        """Write JSON, one case a line."""
        path.write_text(json_by_line({"facts": self.facts, "agreement": self.agreement}, "cases", self.cases))

    @classmethod
    def load(cls, path: Path) -> "Results":
        return cls(**json.loads(path.read_text()))

    def time(self, comparison: str, contenders: str | Iterable[str], statistic: Statistic = median) -> float:
        """Seconds, of the fastest of several contenders."""
        names = [contenders] if isinstance(contenders, str) else self._present(comparison, contenders)
        return min(statistic(self._cases[comparison, name]["seconds"]) for name in names)

    def best(self, comparison: str, contenders: Iterable[str]) -> str:
        """The fastest, by the median."""
        return min(self._present(comparison, contenders), key=lambda name: self.time(comparison, name))

    def bytes(self, comparison: str, contender: str) -> int:
        """What autograd keeps for backward beyond the inputs."""
        return self._cases[comparison, contender]["saved_bytes"]

    def saved(self, head: str, contender: str) -> float:
        """The same for a layer, in tensors of the output's size."""
        shape = next(iter(SHAPES))
        return self.bytes(layers(head, "forward_backward")[0], contender) / (prod(shape) * DTYPE.itemsize)

    def has(self, comparison: str, contender: str) -> bool:
        return (comparison, contender) in self._cases

    def _present(self, comparison: str, contenders: Iterable[str]) -> list[str]:
        return [name for name in contenders if self.has(comparison, name)]

    def speed_up(self, comparison: str, statistic: Statistic = median) -> float:
        """Of the best backend over the best peer."""
        return self.time(comparison, PEERS, statistic) / self.time(comparison, FUSED, statistic)

    def speed_up_at_floor(self, comparison: str, statistic: Statistic = median) -> float:
        """The same for a layer that takes only its GEMMs and one copy of the bytes that it must move."""
        floor = self.time(comparison, GEMMS, statistic) + self.time(comparison, "copy", statistic)
        return self.time(comparison, PEERS, statistic) / floor

    def outside(self, comparison: str, statistic: Statistic = median) -> float:
        """Seconds of the best backend outside its GEMMs."""
        fused = self.best(comparison, FUSED)
        gemm = "gemm-" + fused.split("-")[1]
        return self.time(comparison, fused, statistic) - self.time(comparison, gemm, statistic)

    def over_copy(self, comparison: str, copy: str = "copy", statistic: Statistic = median) -> float:
        """The same, in copies of the bytes that must move."""
        return self.outside(comparison, statistic) / self.time(comparison, copy, statistic)

    def mixing(self, comparison: str, layout: str, statistic: Statistic = median) -> float:
        """How much faster GConv's mixing is than eager mode in the same layout; the best backend."""
        fused = [name for name in FUSED if name.endswith(layout)]
        return self.time(comparison, f"eager-{layout}", statistic) / self.time(comparison, fused, statistic)

    def mixing_at_floor(self, comparison: str, layout: str) -> float:
        """The same of a mixing that takes the time of its products alone."""
        return self.time(comparison, f"eager-{layout}") / self.time(comparison, f"gemm-{layout}")

    def step(self, of: str, models: Iterable[str], statistic: Statistic = median) -> float:
        """Time of a generator step, that with plain layers being 1; the best of the models, each in its best layout."""
        ours, plain = (
            self.time(of, [f"{model}-{layout}" for model in names for layout in DENSE_LAYOUTS], statistic)
            for names in (models, [next(iter(STEPS[of]))])
        )
        return ours / plain

    def growth(self, size: str, of: Callable[[str], float]) -> float:
        """The power of a size (N, C, HW) with which a figure grows along the sweep."""
        shapes = SWEEP[size]
        sizes = [log(prod(shape)) for shape in shapes]
        return linear_regression(sizes, [log(max(of(f"sweep {size}-{label(shape)}"), 1e-9)) for shape in shapes]).slope


NAMES = {
    ("plain", "forward"): "SPN, forward",
    ("plain", "forward_backward"): "SPN, forward + backward",
    ("up", "forward"): "up → SPN → ReLU, forward",
    ("up", "forward_backward"): "up → SPN → ReLU, forward + backward",
}
GOALS = dict(zip(NAMES, (4, 3, 8, 8), strict=True))  # speed-ups


def layers(head: str, mode: str) -> list[str]:
    """The comparisons of a layer, one for each shape."""
    return [f"layer {head}-{label(shape)}-{mode}" for shape in SHAPES]


def mixings(mode: str) -> list[str]:
    """The comparisons of GConv's mixing, one for each shape."""
    return [f"mixing {label(shape)}-{mode}" for shape in SHAPES]


@dataclass(frozen=True)
class Target:
    """A goal and what was measured: by the medians, by the minima, and what the floor would give; None: unknown."""

    what: str
    goal: float
    at_least: bool
    median: float | None
    minimum: float | None = None
    floor: float | None = None

    @property
    def shortfall(self) -> float:
        """How far the goal is missed, as a fraction of it; 0 or less if it is met."""
        return 1 - self.median / self.goal if self.at_least else self.median / self.goal - 1

    @property
    def bound(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.goal:g}"

    @property
    def verdict(self) -> str:
        return "met" if self.shortfall <= 0 else f"**missed by {self.shortfall:.0%}**"


def targets(results: Results) -> list[Target]:
    """All goals."""
    found = []

    def add(what: str, goal: float, at_least: bool, figure: Callable[[Statistic], float], floor: float | None = None):
        found.append(Target(what, goal, at_least, figure(median), figure(min), floor))

    def each(figure: Callable[..., float], head: str, mode: str, statistic: Statistic) -> list[float]:
        return [figure(comparison, statistic=statistic) for comparison in layers(head, mode)]

    add(
        "generator step, over batch norm",
        1.05,
        False,
        lambda statistic: results.step("step", KERNELS, statistic),
        1 + results.step("step", ["gemm"]),
    )
    for key, goal in GOALS.items():
        add(
            f"{NAMES[key]}: speed-up, geometric mean",
            goal,
            True,
            lambda statistic, key=key: geometric_mean(each(results.speed_up, *key, statistic)),
            geometric_mean(each(results.speed_up_at_floor, *key, median)),
        )
    for key in GOALS:
        add(
            f"{NAMES[key]}: outside the GEMMs, over a copy, worst shape",
            1.5,
            False,
            lambda statistic, key=key: max(each(results.over_copy, *key, statistic)),
        )
    for head, goal in (("plain", 1), ("up", 0.25)):
        saved = round(results.saved(head, FUSED[0]), 2)  # beside the tensor there are four vectors
        what = f"{NAMES[head, 'forward_backward']}: saved, in tensors of the output's size"
        add(what, goal, False, lambda statistic, saved=saved: saved)
    add(
        "generator step with GConv, over plain convolutions",
        1.05,
        False,
        lambda statistic: results.step("gconv_step", KERNELS, statistic),
        1 + results.step("gconv_step", ["gemm"]),
    )
    for mode, layout in product(MODES, DENSE_LAYOUTS):

        def over_eager(statistic: Statistic, mode: str = mode, layout: str = layout) -> float:
            return geometric_mean(results.mixing(comparison, layout, statistic) for comparison in mixings(mode))

        floor = geometric_mean(results.mixing_at_floor(comparison, layout) for comparison in mixings(mode))
        what = f"GConv's mixing, {mode.replace('_', ' + ')}, {LAYOUTS[layout]}: over eager, geometric mean"
        add(what, 2, True, over_eager, floor)
    return found
