"""The results on a GPU as one picture."""

from functools import partial
from itertools import product
from math import nan
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.gpu.cases import BATCHES, LAYER_SHAPES, MIXING_PRECISIONS, MIXING_SHAPES, PAIRS, SMALL_SHAPES
from benchmarks.gpu.goals import SHARES, share_goals
from benchmarks.gpu.records import MODES, TITLES, WORDS, Records
from benchmarks.gpu.section import COMPILED, EAGER, FUSED
from benchmarks.plots import BLUE, GREY, ORANGE, PALE, STYLE, bars
from benchmarks.results import LAYOUTS
from benchmarks.test_spn import HEADS, label

TONES = {"native": (BLUE, "#9ec5e8"), "triton": (ORANGE, "#f6cda9")}  # of an impl: full, and pale


def draw(records: Records, path: Path) -> None:
    """Write the picture: SPN's layer, its kernels, memory, generator and small shapes, and below GConv."""
    matplotlib.use("agg")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplot_mosaic(
            [
                ["speed_up plain"] * 6 + ["speed_up up"] * 6,
                ["time"] * 5 + ["shares"] * 7,
                ["memory"] * 5 + ["step"] * 7,
                ["small"] * 12,
                ["mixing"] * 5 + ["gconv_step"] * 7,
            ],
            figsize=(13, 17),
            layout="constrained",
        )
        title = f"pixnorm on {records.facts.get('machine', 'a GPU')} · {records.facts.get('commit', '')}"
        figure.suptitle(title, x=0.01, ha="left")
        for name, panel in (
            ("speed_up plain", partial(_speed_up, head="plain")),
            ("speed_up up", partial(_speed_up, head="up")),
            ("time", _time),
            ("shares", _shares),
            ("memory", _memory),
            ("step", partial(_step, of="step")),
            ("small", _small),
            ("mixing", _mixing),
            ("gconv_step", partial(_step, of="gconv_step")),
        ):
            panel(axes[name], records)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _or_nan(value: float | None) -> float:
    """What was not measured has no bar, and no label."""
    return nan if value is None else value


def _speed_up(axis: Axes, records: Records, head: str) -> None:
    shape = label(LAYER_SHAPES[0])
    series, impls = {}, records.impls("layer")
    for impl, mode in product(impls, MODES):
        where = {"head": head, "shape": shape, "mode": mode}
        series[f"{impl}, {mode}"] = [_or_nan(records.speed_up(impl, precision=p, **where)) for p in WORDS]
    goal = 8 if head == "up" else 4
    _speed_up_bars(axis, list(WORDS.values()), series, impls, goal)
    axis.set_title(f"{TITLES[head]}, {shape}: speed-up over peers (native's goal {goal})")


def _mixing(axis: Axes, records: Records) -> None:
    shape = label(MIXING_SHAPES[0])
    series, impls = {}, records.impls("mixing")
    for impl, mode in product(impls, MODES):
        ratio = partial(records.ratio, EAGER, FUSED[impl], "mixing", shape=shape, mode=mode)
        series[f"{impl}, {mode}"] = [_or_nan(ratio(precision=precision)) for precision in MIXING_PRECISIONS]
    _speed_up_bars(axis, [WORDS[precision] for precision in MIXING_PRECISIONS], series, impls, goal=2)
    axis.set_title(f"{TITLES['mixing']}, {shape}: speed-up over eager (goal 2)")


def _speed_up_bars(
    axis: Axes, groups: list[str], series: dict[str, list[float]], impls: list[str], goal: float
) -> None:
    bars(axis, groups, series, _tones(impls), "%.1f")
    axis.axhline(goal, color="black", linewidth=0.6, linestyle=":")
    axis.legend(ncols=2, loc="upper left")
    axis.margins(y=0.35)


def _tones(impls: list[str]) -> list[str]:
    """Two colours of each impl."""
    return [tone for impl in impls for tone in TONES[impl]]


def _time(axis: Axes, records: Records) -> None:
    shape = label(LAYER_SHAPES[0])
    impls = records.impls("layer")
    contenders = {"eager": EAGER, "torch.compile": COMPILED} | {impl: FUSED[impl] for impl in impls}
    groups, series = [], {name: [] for name in contenders}
    for precision, mode in product(("tf32", "bf16"), MODES):
        groups.append(f"{WORDS[precision]}\n{mode}")
        for name, names in contenders.items():
            where = {"head": "plain", "shape": shape, "precision": precision, "mode": mode}
            best = records.best(names, "layer", **where)
            series[name].append(1e6 * best["median"] if best else nan)
    bars(axis, groups, series, [GREY, PALE, *_tones(impls)[::2]])
    axis.set_title(f"SPN, {shape}: device time, µs")
    axis.legend(ncols=2, loc="upper left")
    axis.margins(y=0.25)


def _shares(axis: Axes, records: Records) -> None:
    markers = dict(zip(LAYOUTS, "os", strict=True))
    for x, kernel in enumerate(SHARES):
        for (side, precision), goal in zip(
            ((-0.23, "tf32"), (0.23, "bf16")), share_goals(records)[kernel], strict=True
        ):
            axis.hlines(100 * goal, x + side - 0.2, x + side + 0.2, color="black", linewidth=0.8)
            for nudge, (impl, head) in zip((-0.15, -0.05, 0.05, 0.15), product(FUSED, HEADS), strict=True):
                for entry, share in records.shares(impl, kernel, precision, head=head):
                    axis.plot(
                        x + side + nudge,
                        100 * share,
                        markers[entry["contender"].split("-")[1]],
                        color=TONES[impl][0],
                        markersize=5,
                        fillstyle="full" if head == "plain" else "none",
                    )
    for impl in records.impls("kernel"):
        axis.plot([], [], "o", color=TONES[impl][0], label=impl)
    for layout, marker in markers.items():
        axis.plot([], [], marker, color="black", label=LAYOUTS[layout])
    axis.plot([], [], "o", color="black", fillstyle="none", label=TITLES["up"])
    axis.plot([], [], color="black", linewidth=0.8, label="goal, native SPN")
    axis.axhline(100, color="black", linewidth=0.6, linestyle=":")
    ticks, names = {}, [kernel.removeprefix("spn_").removesuffix("_kernel") for kernel in SHARES]
    for x, name in enumerate(names):
        ticks |= {x - 0.23: "fp32", x: f"\n{name}", x + 0.23: "bf16"}
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.tick_params(axis="x", length=0)
    axis.set_xlim(-0.5, len(SHARES) - 0.5)
    axis.set_ylim(bottom=0)
    axis.set_title("Kernels on tensors of 32 MB and more: bandwidth, % of a copy's")
    axis.legend(ncols=3, loc="lower left")


def _memory(axis: Axes, records: Records) -> None:
    impls = records.impls("memory")
    contenders = {"eager": EAGER} | {impl: FUSED[impl] for impl in impls}
    series = {}
    for (name, names), key in product(contenders.items(), ("peak", "saved")):
        values = []
        for head in HEADS:
            entries = [e for e in records.all("memory", head=head) if e["contender"] in names and e[key]]
            values.append(min((e[key] / e["output"] for e in entries), default=nan))
        series[f"{name}, {key}"] = values
    bars(axis, [TITLES[head] for head in HEADS], series, [GREY, PALE, *_tones(impls)], "%.2f")
    axis.set_title("SPN: memory in outputs, at the peak and saved for backward")
    axis.legend(ncols=len(contenders), loc="upper left", fontsize=7)
    axis.margins(y=0.3)


def _step(axis: Axes, records: Records, of: str) -> None:
    pair, impls = PAIRS[of], records.impls("step", of=of)
    groups, series = [], {f"{pair.ours}, {impl}": [] for impl in ("eager", *impls)}
    for batch, precision, clock in product(BATCHES, ("tf32", "bf16"), ("device", "wall")):
        groups.append(f"{precision.replace('tf32', 'fp32')}\n{batch}\n{clock}")
        for impl, ratios in zip(("eager", *impls), series.values(), strict=True):
            ratios.append(_or_nan(records.step_ratio(of, [impl], batch, precision, clock)))
    bars(axis, groups, series, [GREY, *_tones(impls)[::2]], "%.2f")
    axis.axhline(pair.goal, color="black", linewidth=0.6, linestyle=":")
    axis.set_title(f"Generator step, {pair.plainly} = 1 (goal {pair.goal:g})")
    axis.legend(loc="upper left", ncols=3)
    axis.margins(y=0.2)


def _small(axis: Axes, records: Records) -> None:
    impls = records.impls("small")
    contenders = {"eager": EAGER} | {impl: FUSED[impl] for impl in impls}
    choices = {
        name + (", CUDA graph" if graph else ""): (names, graph)
        for name, names in contenders.items()
        for graph in (False, True)
    }
    groups, series = [], {name: [] for name in choices}
    for shape, mode in product(map(label, SMALL_SHAPES), ("forward", "forward + backward")):
        groups.append(f"{shape}\n{mode}")
        for name, (names, graph) in choices.items():
            best = records.best(names, "small", head="plain", shape=shape, mode=mode, graph=graph)
            series[name].append(1e6 * best["median"] if best else nan)
    bars(axis, groups, series, [GREY, PALE, *_tones(impls)])
    axis.set_yscale("log")
    axis.set_title("SPN, small shapes: wall time per call, µs")
    axis.legend(ncols=6, loc="upper left")
    axis.margins(y=0.2)
