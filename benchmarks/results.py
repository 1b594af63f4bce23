"""What a run has measured, and the figures that follow from it."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import geometric_mean, linear_regression, median

from benchmarks.contenders import FUSED, PEERS
from benchmarks.test_generator import MODELS
from benchmarks.test_spn import HEADS, SHAPES, SWEEP, label
from pixnorm.testing import DENSE_LAYOUTS

Statistic = Callable[[Iterable[float]], float]


class Results:
    """One run.

    Attributes:
        facts: of the machine, the versions and the run, in words.
        agreement: (what, error of the reference, error of the fused form).
        cases: each with ``comparison``, ``contender``, ``seconds`` (every round) and perhaps ``saved_bytes``.
    """

    def __init__(self, facts: dict[str, str], agreement: list, cases: list[dict]):
        self.facts, self.agreement, self.cases = facts, agreement, cases
        self._cases = {(case["comparison"], case["contender"]): case for case in cases}

    def save(self, path: Path) -> None:
        """Write JSON, one case a line."""
        cases = ",\n".join("    " + json.dumps(case) for case in self.cases)
        text = json.dumps({"facts": self.facts, "agreement": self.agreement, "cases": []}, indent=2)
        path.write_text(text.replace('"cases": []', f'"cases": [\n{cases}\n  ]') + "\n")

    @classmethod
    def load(cls, path: Path) -> "Results":
        return cls(**json.loads(path.read_text()))

    def time(self, comparison: str, contender: str, statistic: Statistic = median) -> float:
        """Seconds."""
        return statistic(self._cases[comparison, contender]["seconds"])

    def best(self, comparison: str, contenders: Iterable[str], statistic: Statistic = median) -> str:
        """The fastest of those that took part."""
        present = [name for name in contenders if (comparison, name) in self._cases]
        return min(present, key=lambda name: self.time(comparison, name, statistic))

    def saved(self, comparison: str, contender: str) -> int:
        """Bytes that autograd keeps for backward beyond the inputs."""
        return self._cases[comparison, contender]["saved_bytes"]

    def speed_up(self, comparison: str, statistic: Statistic = median) -> float:
        """Of the best backend over the best peer."""
        peer, fused = (self.best(comparison, names, statistic) for names in (PEERS, FUSED))
        return self.time(comparison, peer, statistic) / self.time(comparison, fused, statistic)

    def speed_up_at_floor(self, comparison: str, statistic: Statistic = median) -> float:
        """The same, of a layer that took its GEMMs and one copy of the bytes that it must move, and no time else."""
        gemm = min(self.time(comparison, f"gemm-{layout}", statistic) for layout in DENSE_LAYOUTS)
        peer = self.time(comparison, self.best(comparison, PEERS, statistic), statistic)
        return peer / (gemm + self.time(comparison, "copy", statistic))

    def outside(self, comparison: str, statistic: Statistic = median) -> float:
        """Seconds of the best backend outside its GEMMs."""
        fused = self.best(comparison, FUSED, statistic)
        gemm = "gemm-" + fused.split("-")[1]
        return self.time(comparison, fused, statistic) - self.time(comparison, gemm, statistic)

    def over_copy(self, comparison: str, copy: str, statistic: Statistic = median) -> float:
        """That, in copies of the bytes that must move."""
        return self.outside(comparison, statistic) / self.time(comparison, copy, statistic)

    def step(self, model: str, statistic: Statistic = median) -> float:
        """Time of the generator step, relative to batch norm; each in its best layout. ``"gemm"``: SPN's products."""
        bn, other = (
            min(self.time("step", f"{name}-{layout}", statistic) for layout in DENSE_LAYOUTS) for name in ("bn", model)
        )
        return other / bn

    def growth(self, size: str, of: Callable[[str], float]) -> float:
        """The exponent with which a figure of the sweep grows in a size: 1 is linear."""
        logs = [(log(math.prod(shape)), log(of(f"sweep {size}-{label(shape)}"))) for shape in SWEEP[size]]
        return linear_regression(*zip(*logs)).slope
