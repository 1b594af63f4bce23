"""The page of the training demonstration: tables, curves with bands, images."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

from benchmarks.plots import BLUE, GREY, ORANGE, STYLE, TEAL
from benchmarks.records import json_by_line
from benchmarks.report import table
from pixnorm.training.recipes import Recipe
from pixnorm.training.sampling import grid

COLOURS = {"BN": GREY, "SPN": BLUE, "Conv": TEAL, "GConv": ORANGE, "cBN": GREY, "cSPN": BLUE}
PANELS = (("without labels", ("BN", "SPN")), ("convolutions", ("Conv", "GConv")), ("with labels", ("cBN", "cSPN")))
Key = tuple[str, str]  # kind, form


@dataclass(frozen=True)
class Curve:
    """The scores of one run.

    Attributes:
        steps: at which they were taken.
        scores: the Fréchet distance and others, by name, at each.
    """

    kind: str
    form: str
    seed: int
    steps: list[int]
    scores: dict[str, list[float]]

    @classmethod
    def read(cls, kind: str, form: str, seed: int, folder: Path) -> "Curve":
        lines = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
        names = [name for name in lines[0] if name not in ("step", "seconds")]
        return cls(kind, form, seed, [line["step"] for line in lines], {n: [line[n] for line in lines] for n in names})

    @property
    def distances(self) -> list[float]:
        return next(values for name, values in self.scores.items() if name.startswith("FD"))


@dataclass(frozen=True)
class Agreement:
    """How far the fused form is from the plain one after some steps in float64, relative to the largest magnitude."""

    kind: str
    steps: int
    losses: float
    weights: float


@dataclass(frozen=True)
class Demonstration:
    """All of it."""

    facts: dict[str, str]
    data: str
    base: Recipe
    accuracy: float
    score_samples: int
    curves: list[Curve]
    seconds: dict[Key, list[float]]
    agreements: list[Agreement]
    images: dict[str, Tensor]

    def of(self, kind: str, form: str) -> list[Curve]:
        return [curve for curve in self.curves if (curve.kind, curve.form) == (kind, form)]

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(curve.kind for curve in self.curves))

    @property
    def pairs(self) -> list[str]:
        """The kinds of which there are both forms."""
        return [kind for kind in self.kinds if self.of(kind, "eager")]

    @property
    def keys(self) -> list[Key]:
        return [(kind, form) for kind in self.kinds for form in ("fused", "eager") if self.of(kind, form)]

    def step_time(self, key: Key) -> float:
        return median(self.seconds[key])

    def band(self, key: Key) -> tuple[list[int], list[float], list[float], list[float]]:
        """Steps, and the least, the mean and the greatest distance over seeds at each."""
        curves = self.of(*key)
        columns = list(zip(*(curve.distances for curve in curves), strict=True))
        return curves[0].steps, [min(c) for c in columns], [mean(c) for c in columns], [max(c) for c in columns]

    def time_to(self, key: Key, distance: float) -> float | None:
        """Seconds of training until the mean curve first is at a distance, by linear interpolation."""
        steps, _, means, _ = self.band(key)
        for i, value in enumerate(means):
            if value <= distance:
                if i == 0:
                    return steps[0] * self.step_time(key)
                part = (means[i - 1] - distance) / (means[i - 1] - value)
                return (steps[i - 1] + part * (steps[i] - steps[i - 1])) * self.step_time(key)
        return None

    def overlap(self, kind: str) -> tuple[int, int]:
        """At how many scores the bands of both forms overlap, and of how many."""
        _, low, _, high = self.band((kind, "fused"))
        _, other_low, _, other_high = self.band((kind, "eager"))
        bands = zip(low, high, other_low, other_high, strict=True)
        return sum(a <= d and c <= b for a, b, c, d in bands), len(low)


def write(demonstration: Demonstration, folder: Path) -> None:
    """training.md, training.json, training.png and gallery.png."""
    texts = {"training.md": markdown(demonstration), "training.json": raw_numbers(demonstration)}
    for name, text in texts.items():
        partial_file = folder / f".{name}"
        partial_file.write_text(text)
        os.replace(partial_file, folder / name)
    draw(demonstration, folder)


def markdown(found: Demonstration) -> str:
    base, seeds = found.base, len({curve.seed for curve in found.curves})
    name = next(name for name in found.curves[0].scores if name.startswith("FD"))
    steps, rounds = found.curves[0].steps[-1], len(found.seconds[found.keys[0]])
    parts = [
        "# Training: fused layers beside plain PyTorch, norms and convolutions beside each other",
        table(("", ""), found.facts.items(), "left"),
        f"SNGANs of 32 pixels (arXiv 2201.10725, Table 1) on {found.data}, with {base.channels_g} channels instead of "
        f"256 and 128 in generator and discriminator: hinge loss, Adam with betas {base.beta1:g} and {base.beta2:g}, "
        f"rates {base.lr_g:g}, {base.d_steps} step of the discriminator for each of the generator, batches of "
        f"{base.batch_g}, {steps} steps, the rates falling over the second half; {seeds} seeds. That is a hundredth of "
        "the papers' training: it shows that fused layers learn as plain ones do, and what a step costs, not which "
        "layer is best in the end.",
        f"{name}: Fréchet distance of the features of a classifier of these classes (accuracy {found.accuracy:.1%} on "
        f"images it has not seen), {found.score_samples} generated images against as many real ones. It is no FID, and "
        'only distances on this page can be compared. `eager` is the same network with `impl="reference"`, plain '
        "PyTorch, and PyTorch's own batch norm.",
        "![curves](training.png)",
        "![images](gallery.png)",
        "## Scores at the end, and time",
        _summary(found),
        f"Means over seeds, in brackets the least and the greatest. Time: median of {rounds} steps of each, in turn, "
        f"on {torch.get_num_threads()} threads; of the whole step, generator and discriminator.",
        "## The same training, fused and plain",
        _pairs(found),
        "float64: the largest difference of a loss and of a weight after 20 steps from one seed, over the largest "
        "magnitude. float32: at how many of the scores the ranges of both forms over seeds overlap. Time to a "
        "distance: to the larger of both final means, from the mean curve and the time of a step.",
        "## Distance over training, means over seeds",
        _over_training(found),
    ]
    return "\n\n".join(parts) + "\n"


def _spread(values: Sequence[float], form: str = ".2f") -> str:
    return f"{mean(values):{form}} ({min(values):{form}} – {max(values):{form}})"


def _summary(found: Demonstration) -> str:
    plain = found.step_time(("BN", "eager"))
    rows = []
    for kind, form in found.keys:
        curves = found.of(kind, form)
        last = {name: [curve.scores[name][-1] for curve in curves] for name in ("precision", "recall")}
        time = found.step_time((kind, form))
        rows.append(
            (
                kind,
                form,
                _spread([curve.distances[-1] for curve in curves]),
                f"{mean(last['precision']):.2f}",
                f"{mean(last['recall']):.2f}",
                f"{1e3 * time:.0f}",
                f"{time / plain:.2f}",
            )
        )
    return table(("", "form", "distance", "precision", "recall", "ms per step", "over eager BN"), rows)


def _pairs(found: Demonstration) -> str:
    rows = []
    agreements = {one.kind: one for one in found.agreements}
    for kind in found.pairs:
        both = [(kind, form) for form in ("fused", "eager")]
        target = max(found.band(key)[2][-1] for key in both)
        times = [found.time_to(key, target) for key in both]
        inside, of = found.overlap(kind)
        one = agreements[kind]
        rows.append(
            (
                kind,
                f"{one.losses:.1e}",
                f"{one.weights:.1e}",
                f"{inside} of {of}",
                f"{target:.2f}",
                *("–" if time is None else f"{time:.0f}" for time in times),
                "–" if None in times else f"{times[1] / times[0]:.2f}",
            )
        )
    heads = ("", "float64: losses", "weights", "float32: overlap", "distance", "fused, s", "eager, s", "faster")
    return table(heads, rows)


def _over_training(found: Demonstration) -> str:
    steps = found.curves[0].steps
    shown = sorted({*range(1, len(steps), 2), len(steps) - 1})
    rows = [(f"{kind}, {form}", *(f"{found.band((kind, form))[2][i]:.2f}" for i in shown)) for kind, form in found.keys]
    return table(("", *(str(steps[i]) for i in shown)), rows)


def raw_numbers(found: Demonstration) -> str:
    """JSON, one score of one run a line."""
    entries = [
        {"kind": c.kind, "form": c.form, "seed": c.seed, "step": step, **{n: v[i] for n, v in c.scores.items()}}
        for c in found.curves
        for i, step in enumerate(c.steps)
    ]
    head = {
        "facts": found.facts,
        "recipe": {name: value for name, value in vars(found.base).items()},
        "seconds": {f"{kind} {form}": times for (kind, form), times in found.seconds.items()},
        "agreement": [vars(one) for one in found.agreements],
        "accuracy": found.accuracy,
    }
    return json_by_line(head, "scores", entries)


def draw(found: Demonstration, folder: Path) -> None:
    """training.png: three panels of curves, and of fused against plain over time; gallery.png: images of each kind."""
    matplotlib.use("agg")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(13, 6.6), layout="constrained")
        panels = [partial(_curves, found, title, kinds) for title, kinds in PANELS]
        panels += [partial(_over_time, found, kind) for kind in found.pairs if kind != "BN"]
        for panel, axis in zip(panels, axes.flat, strict=True):
            panel(axis)
        figure.suptitle(f"Fréchet distance over training on {found.data}; bands: all seeds", x=0.01, ha="left")
        figure.savefig(folder / "training.png", dpi=110)
        plt.close(figure)
        figure, axes = plt.subplots(1, len(found.images), figsize=(13, 2.35), layout="constrained")
        for (kind, images), axis in zip(found.images.items(), axes, strict=True):
            axis.imshow(grid(images, 4).permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[], title=kind)
            axis.spines[:].set_visible(False)
        figure.savefig(folder / "gallery.png", dpi=110)
        plt.close(figure)


def _curves(found: Demonstration, title: str, kinds: Sequence[str], axis: Axes) -> None:
    for kind in kinds:
        steps, low, means, high = found.band((kind, "fused"))
        axis.plot(steps, means, color=COLOURS[kind], label=kind)
        axis.fill_between(steps, low, high, color=COLOURS[kind], alpha=0.2, linewidth=0)
    axis.set(title=title, xlabel="steps")
    axis.legend()


def _over_time(found: Demonstration, kind: str, axis: Axes) -> None:
    for form, colour in (("eager", GREY), ("fused", COLOURS[kind])):
        steps, low, means, high = found.band((kind, form))
        at = [step * found.step_time((kind, form)) for step in steps]
        axis.plot(at, means, color=colour, label=f"{kind}, {form}")
        axis.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.set(title=f"{kind}: fused and eager", xlabel="seconds of training")
    axis.legend()
