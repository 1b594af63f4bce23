"""The results as one picture."""

from itertools import product
from math import prod
from pathlib import Path
from statistics import geometric_mean

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.contenders import FUSED, GEMMS, MODES, PEERS
from benchmarks.results import GOALS, LAYOUTS, NAMES, Results, layers, mixings
from benchmarks.test_generator import STEPS
from benchmarks.test_spn import SHAPES, SWEEP, label

GREY, BLUE, TEAL, ORANGE, PALE = "#9aa5b1", "#2f6fb0", "#2a9d8f", "#e07a2f", "#c8d6e5"
COLOURS = dict(zip(NAMES, ("#9ec5e8", "#2f6fb0", "#f3b98a", "#d9662b"), strict=True))
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def draw(results: Results, path: Path) -> None:
    """Write the picture: SPN's speed-ups and step; its time, memory and growth; GConv's speed-ups and step."""
    matplotlib.use("agg")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplot_mosaic(
            [
                ["speed_up"] * 8 + ["step"] * 4,
                ["time"] * 5 + ["memory"] * 3 + ["growth"] * 4,
                ["mixing"] * 8 + ["gconv_step"] * 4,
            ],
            figsize=(13, 12),
            layout="constrained",
        )
        figure.suptitle(f"pixnorm on {results.facts['machine']} · {results.facts['commit']}", x=0.01, ha="left")
        _speed_up(axes["speed_up"], results)
        _step(axes["step"], results, "step", "Generator step, batch norm = 1")
        _time(axes["time"], results)
        _memory(axes["memory"], results)
        _growth(axes["growth"], results)
        _mixing(axes["mixing"], results)
        _step(axes["gconv_step"], results, "gconv_step", "Generator step, plain convolution = 1")
        figure.savefig(path, dpi=110)
        plt.close(figure)


def short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def bars(axis: Axes, groups: list[str], series: dict[str, list[float]], colours: list[str], form=short) -> None:
    """Groups of bars, one colour for each series, each bar with its value."""
    width = 0.84 / len(series)
    for i, ((name, values), colour) in enumerate(zip(series.items(), colours, strict=True)):
        at = [group + (i - (len(series) - 1) / 2) * width for group in range(len(groups))]
        axis.bar_label(axis.bar(at, values, 0.92 * width, color=colour, label=name), fmt=form, fontsize=7, padding=1)
    axis.set_xticks(range(len(groups)), groups)
    axis.set_xlim(-0.5, len(groups) - 0.5)
    axis.tick_params(axis="x", length=0)


def _speed_up(axis: Axes, results: Results) -> None:
    series = {}
    for (head, mode), name in NAMES.items():
        values = [results.speed_up(comparison) for comparison in layers(head, mode)]
        series[f"{name} (goal {GOALS[head, mode]})"] = [*values, geometric_mean(values)]
    bars(axis, [*map(label, SHAPES), "geometric mean"], series, list(COLOURS.values()), "%.1f")
    for goal in sorted(set(GOALS.values())):
        axis.axhline(goal, color="black", linewidth=0.6, linestyle=":")
    axis.set_title("Speed-up over the best of eager and torch.compile, NCHW and channels_last")
    axis.legend(ncols=2, loc="upper left")
    axis.margins(y=0.25)


def _mixing(axis: Axes, results: Results) -> None:
    series = {}
    for mode, (layout, name) in product(MODES, LAYOUTS.items()):
        values = [results.mixing(comparison, layout) for comparison in mixings(mode)]
        series[f"{mode.replace('_', ' + ')}, {name}"] = [*values, geometric_mean(values)]
    bars(axis, [*map(label, SHAPES), "geometric mean"], series, list(COLOURS.values()), "%.1f")
    axis.axhline(2, color="black", linewidth=0.6, linestyle=":")
    axis.set_title("GConv's mixing: speed-up over eager in the same layout (goal 2)")
    axis.legend(ncols=2, loc="upper left")
    axis.margins(y=0.25)


def _step(axis: Axes, results: Results, of: str, title: str) -> None:
    steps = {title: results.step(of, [impl]) for impl, title in STEPS[of].items() if impl != "gemm"}
    bars = axis.bar(list(steps), list(steps.values()), 0.6, color=[GREY, ORANGE, *[BLUE] * (len(steps) - 2)])
    axis.bar_label(bars, fmt="%.2f", label_type="center", color="white", fontsize=12, fontweight="bold")
    axis.axhline(1.05, color="black", linewidth=0.6, linestyle=":")
    axis.tick_params(axis="x", length=0)
    axis.set_title(f"{title} (goal 1.05)")
    axis.margins(y=0.08)


def _time(axis: Axes, results: Results) -> None:
    series = {
        "best peer": lambda comparison: results.time(comparison, PEERS),
        "pixnorm": lambda comparison: results.time(comparison, FUSED),
        "its GEMMs alone": lambda comparison: results.time(comparison, GEMMS),
        "copy of the other bytes": lambda comparison: results.time(comparison, "copy"),
    }
    comparisons = layers("plain", "forward_backward")
    times = {name: [1000 * figure(comparison) for comparison in comparisons] for name, figure in series.items()}
    bars(axis, [label(shape) for shape in SHAPES], times, [GREY, BLUE, TEAL, PALE])
    axis.set_yscale("log")
    axis.set_title("SPN forward + backward, ms")
    axis.legend(ncols=2, loc="upper left")
    axis.margins(y=0.3)


def _memory(axis: Axes, results: Results) -> None:
    heads = {"SPN": "plain", "up → SPN → ReLU": "up"}
    saved = {
        name: [results.saved(head, contender) for head in heads.values()]
        for name, contender in (("eager", PEERS[0]), ("pixnorm", FUSED[0]))
    }
    bars(axis, list(heads), saved, [GREY, BLUE], "%.2f")
    axis.set_title("Saved for backward, in outputs")
    axis.legend(loc="upper left")
    axis.margins(y=0.25)


def _growth(axis: Axes, results: Results) -> None:
    figures = {
        "eager": (lambda comparison: results.time(comparison, "eager-channels_last", min), GREY),
        "pixnorm": (lambda comparison: results.time(comparison, FUSED, min), BLUE),
        "pixnorm outside the GEMMs": (lambda comparison: results.outside(comparison, min), ORANGE),
    }
    for (size, shapes), marker in zip(SWEEP.items(), "osD", strict=True):
        elements = [prod(shape) for shape in shapes]
        for figure, colour in figures.values():
            times = [1e9 * figure(f"sweep {size}-{label(shape)}") / prod(shape) for shape in shapes]
            axis.plot(elements, times, marker=marker, markersize=4, linewidth=1, color=colour)
    for name, (_, colour) in figures.items():
        axis.plot([], [], color=colour, label=name)
    for size, marker in zip(SWEEP, "osD", strict=True):
        axis.plot([], [], color="black", marker=marker, markersize=4, linestyle="", label=f"{size} grows")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("elements of x")
    axis.set_title("Growth: ns per element, forward + backward")
    axis.legend(ncols=2, loc="upper right", fontsize=7)
    axis.margins(y=0.3)
