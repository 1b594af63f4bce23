"""Records as one picture: rows of panels, without those that have nothing to show."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import cycle, product
from math import nan, prod
from pathlib import Path
from textwrap import fill

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.goals import MODES_OF
from benchmarks.networks import figures, saved
from benchmarks.ops import OPS
from benchmarks.records import Records, layouts_of, names_of
from benchmarks.registry import (
    IMPLS,
    LAYOUTS,
    LIBRARIES,
    MAIN_PRECISIONS,
    MODES,
    PRECISIONS,
    Op,
    in_layouts,
    label,
    number,
)

GREY, PALE, TEAL, BLUE, ORANGE = "#9aa5b1", "#c8d6e5", "#2a9d8f", "#2f6fb0", "#e07a2f"
TONES = {"native": (BLUE, "#9ec5e8", "#1d4672", "#c9dff2"), "triton": (ORANGE, "#f6cda9", "#8f4716", "#fbe7d5")}
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


def draw(records: Records, path: Path) -> None:
    """Write the picture."""
    matplotlib.use("agg")
    rows = [row for op in OPS.values() for row in _rows(records, op) if row]
    rows += [[(1, partial(_networks, records, **group))] for group in records.groups("network", "precision")]
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(13, 1 + 3.6 * len(rows)), layout="constrained")
        for part, row in zip(figure.subfigures(len(rows), squeeze=False).flat, rows, strict=True):
            weights, panels = zip(*row, strict=True)
            axes = part.subplots(1, len(row), width_ratios=weights, squeeze=False).flat
            for panel, axis in zip(panels, axes, strict=True):
                panel(axis)
        commit = records.facts.get("commit", "")
        figure.suptitle(f"pixnorm on {records.machine} · {commit}", x=0.01, ha="left")
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _rows(records: Records, op: Op) -> list[list[tuple[int, Callable[[Axes], None]]]]:
    """Of one op, panels with their relative widths."""

    def kept(*panels: tuple[str, int, Callable]) -> list:
        return [
            (weight, partial(panel, records, op)) for what, weight, panel in panels if records.all(what, op=str(op))
        ]

    heads = [("layer", 5, partial(_speed_up, head=head)) for head in op.heads]
    middle = [("layer", 5, _time), ("memory", 3, _memory), ("sweep", 4, _growth)]
    step, shares, small = ("step", 3 if records.on_cpu else 5, _step), ("kernel", 7, _shares), ("small", 12, _small)
    if records.on_cpu:
        pairs = [heads[i : i + 2] for i in range(0, len(heads), 2)]  # more are not legible
        return [*(kept(*pair) for pair in pairs[:-1]), kept(*pairs[-1], step), kept(*middle)]
    if len(heads) == 1:
        return [kept(*heads, step), kept(*middle, shares), kept(small)]
    return [kept(*heads), kept(*middle), kept(step, shares), kept(small)]


def bars(axis: Axes, groups: list[str], series: dict[str, list[float]], colours: Iterable[str], form=number) -> None:
    """Groups of bars, one colour for each series, each bar with its value; None has no bar."""
    width = 0.84 / max(1, len(series))
    for i, ((name, values), colour) in enumerate(zip(series.items(), cycle(colours), strict=False)):
        at = [group + (i - (len(series) - 1) / 2) * width for group in range(len(groups))]
        heights = [nan if value is None else value for value in values]
        axis.bar_label(axis.bar(at, heights, 0.92 * width, color=colour, label=name), fmt=form, fontsize=7, padding=1)
    axis.set_xticks(range(len(groups)), [_wrapped(group) for group in groups])
    axis.set_xlim(-0.5, len(groups) - 0.5)
    axis.tick_params(axis="x", length=0)
    axis.legend(ncols=2 if len(series) < 6 else 4, loc="upper left")
    axis.margins(y=0.35)


def _wrapped(title: str) -> str:
    return "\n".join(fill(line, 15) for line in title.split("\n"))


def _goal(axis: Axes, *goals: float) -> None:
    for goal in set(goals):
        axis.axhline(goal, color="black", linewidth=0.6, linestyle=":")


def _main_groups(records: Records, op: Op, head: str) -> list[dict]:
    """On the CPU the shapes, on a GPU the precisions of the main shape."""
    found = records.groups("layer", "shape", "precision", op=str(op), head=head)
    return [group for group in found if records.on_cpu or group["shape"] == label(op.shapes.gpu[0])]


def _title(records: Records, group: dict) -> str:
    return group["shape"] if records.on_cpu else PRECISIONS[group["precision"]].title


def _speed_up(records: Records, op: Op, axis: Axes, head: str) -> None:
    impls, over = records.impls("layer", op=str(op)), op.goals.speed_ups[0]
    groups, series, goals = _main_groups(records, op, head), {}, set()
    for impl, mode, layouts in product(impls, MODES_OF[records.on_cpu], layouts_of(op)):
        where = {"op": str(op), "head": head, "mode": mode}
        names = names_of(over.over, layouts), names_of([impl], layouts)
        values = [records.ratio(*names, "layer", **where, **group) for group in groups]
        series[", ".join([impl, MODES[mode], *[LAYOUTS[layouts[0]]] * op.same_layout])] = values
        goals |= {over.goal(head, mode, group["precision"], records.gpu) for group in groups} - {None}
    tones = [tone for impl in impls for tone in TONES[impl][: 2 * len(layouts_of(op))]]
    bars(axis, [_title(records, group) for group in groups], series, tones, "%.1f")
    _goal(axis, *goals)
    main = "" if records.on_cpu else f", {label(op.shapes.gpu[0])}"
    over_what = "eager, same layout" if op.same_layout else "peers"
    axis.set_title(f"{op.heads[head].title}{main}: speed-up over {over_what}")


def _step(records: Records, op: Op, axis: Axes) -> None:
    impls = ["eager", *records.impls("step", op=str(op))]
    groups = records.groups("step", "batch", "precision", "clock", op=str(op))
    series = {
        f"{op.step.title}, {impl}": [records.step_ratio(op, [impl], **group) for group in groups] for impl in impls
    }
    titles = [f"{of['precision'].replace('tf32', 'fp32')}\nbatch {of['batch']}\n{of['clock']} time" for of in groups]
    bars(axis, titles, series, [GREY, *(TONES[impl][0] for impl in impls[1:])], "%.2f")
    goal = op.step.goal["cpu" if records.on_cpu else "cuda"]
    _goal(axis, goal)
    axis.set_title(f"Step over {op.step.plain_title} (goal {goal:g})")


def _time(records: Records, op: Op, axis: Axes) -> None:
    head, unit = next(iter(op.heads)), 1e-3 if records.on_cpu else 1e-6
    impls = records.impls("layer", op=str(op))
    kinds = {"eager": ["eager"], "torch.compile": ["compile", "cooperative"]} | {impl: [impl] for impl in impls}
    modes = ["forward_backward"] if records.on_cpu else MODES_OF[False]
    groups = [
        group | {"mode": mode}
        for group, mode in product(_main_groups(records, op, head), modes)
        if records.on_cpu or group["precision"] in MAIN_PRECISIONS
    ]

    def times(names: Sequence[str]) -> list[float | None]:
        found = [records.time(names, "layer", op=str(op), head=head, **group) for group in groups]
        return [value and value / unit for value in found]

    series = {kind: times(in_layouts(*of)) for kind, of in kinds.items()}
    series |= {"products alone": times(in_layouts(*LIBRARIES)), "copy of the other bytes": times(["copy-used"])}
    tones = dict(zip(series, [GREY, PALE, *(TONES[impl][0] for impl in impls), TEAL, "#a8d8d1"], strict=True))
    series = {name: values for name, values in series.items() if any(values)}
    colours = [tones[name] for name in series]
    titles = [_title(records, group) + ("" if records.on_cpu else f"\n{MODES[group['mode']]}") for group in groups]
    bars(axis, titles, series, colours)
    axis.set_yscale("log")
    what = "forward + backward, ms" if records.on_cpu else f"{label(op.shapes.gpu[0])}: device time, µs"
    axis.set_title(f"{op.heads[head].title}, {what}")


def _memory(records: Records, op: Op, axis: Axes) -> None:
    impls, series = records.impls("memory", op=str(op)), {}
    for impl, key in product(("eager", *impls), ("peak", "saved")):
        values = []
        for head in op.heads:
            found = records.all("memory", op=str(op), head=head)
            found = [entry for entry in found if entry["contender"] in in_layouts(impl) and entry.get(key) is not None]
            values.append(min((entry[key] / entry["output"] for entry in found), default=None))
        if any(value is not None for value in values):
            series[f"{impl}, {key}"] = values
    tones = {"eager": (GREY, PALE)} | TONES
    colours = [tones[name.split(",")[0]][name.endswith("saved")] for name in series]
    bars(axis, [head.title for head in op.heads.values()], series, colours, "%.2f")
    axis.set_title("Memory for backward, in outputs")


def _growth(records: Records, op: Op, axis: Axes) -> None:
    ours = in_layouts(*records.impls("sweep", op=str(op)))
    figures = {
        "eager": (partial(records.time, ["eager-channels_last"], "sweep", "shortest"), GREY),
        "ours": (partial(records.time, ours, "sweep", "shortest"), BLUE),
        "ours outside the products": (partial(records.outside, ours, "sweep", "shortest"), ORANGE),
    }
    for (size, shapes), marker in zip(op.shapes.sweep.items(), "osD", strict=True):
        elements = [prod(shape) for shape in shapes]
        for figure, colour in figures.values():
            found = [figure(op=str(op), size=size, shape=label(shape)) for shape in shapes]
            times = [1e9 * value / count if value else nan for value, count in zip(found, elements, strict=True)]
            axis.plot(elements, times, marker=marker, markersize=4, linewidth=1, color=colour)
        axis.plot([], [], color="black", marker=marker, markersize=4, linestyle="", label=f"{size} grows")
    for name, (_, colour) in figures.items():
        axis.plot([], [], color=colour, label=name)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("elements of the input")
    axis.set_title("Growth: ns per element, forward + backward")
    axis.legend(ncols=2, loc="upper right", fontsize=7)
    axis.margins(y=0.3)


def _shares(records: Records, op: Op, axis: Axes) -> None:
    markers, goals = dict(zip(LAYOUTS, "os", strict=True)), op.goals.share(records.gpu)
    kernels = goals or dict.fromkeys(entry["kernel"] for entry in records.all("kernel", op=str(op)) if entry["bytes"])
    ticks = {}
    for (x, kernel), (side, i) in product(enumerate(kernels), ((-0.23, 0), (0.23, 1))):
        name = kernel.removesuffix("_kernel").removeprefix(f"{op}_")
        ticks |= {x + side: ("fp32", "bf16")[i], x: f"\n{name}"}
        if goals:
            axis.hlines(100 * goals[kernel][i], x + side - 0.2, x + side + 0.2, color="black", linewidth=0.8)
        heads = {head: "full" if j == 0 else "none" for j, head in enumerate(op.heads)}
        for k, (impl, head) in enumerate(product(IMPLS, heads)):
            for entry, share in records.shares(impl, kernel, MAIN_PRECISIONS[i], op=str(op), head=head):
                at, marker = x + side - 0.15 + 0.1 * k, markers[entry["contender"].split("-")[1]]
                style = {"color": TONES[impl][0], "markersize": 5, "fillstyle": heads[head]}
                axis.plot(at, 100 * share, marker, **style)
    for impl in records.impls("kernel", op=str(op)):
        axis.plot([], [], "o", color=TONES[impl][0], label=impl)
    for layout, marker in markers.items():
        axis.plot([], [], marker, color="black", label=LAYOUTS[layout])
    for head in list(op.heads.values())[1:]:
        axis.plot([], [], "o", color="black", fillstyle="none", label=head.title)
    axis.plot([], [], color="black", linewidth=0.8, label="goal, native")
    _goal(axis, 100)
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.tick_params(axis="x", length=0)
    axis.set_xlim(-0.5, len(kernels) - 0.5)
    axis.set_ylim(bottom=0)
    axis.set_title("Kernels that move 64 MB and more: bandwidth, % of a copy's")
    axis.legend(ncols=3, loc="lower left")


def _networks(records: Records, axis: Axes, precision: str) -> None:
    """Of each network, the speed-up over eager mode and what remains of the memory for backward."""
    clock = "wall" if records.on_cpu else "device"
    groups = records.groups("network", "batch", "network", clock=clock, precision=precision)
    series: dict[str, list[float | None]] = {"over eager": [], "over torch.compile": [], "memory kept, over eager": []}
    for group in groups:
        name, where = group["network"], {"precision": precision, "batch": group["batch"]}
        kept = [saved(records, name, impl, **where) for impl in ("auto", "eager")]
        found = (*figures(records, name, clock=clock, **where), kept[0] / kept[1] if all(kept) else None)
        for values, value in zip(series.values(), found, strict=True):
            values.append(value)
    bars(axis, [fill(group["network"], 13) for group in groups], series, [BLUE, PALE, TEAL], "%.2f")
    _goal(axis, 1)
    axis.set_title(f"Networks, training step in {PRECISIONS[precision].title}: speed-up, {clock} time")


def _small(records: Records, op: Op, axis: Axes) -> None:
    impls = records.impls("small", op=str(op))
    where = {"op": str(op), "head": next(iter(op.heads))}
    groups = records.groups("small", "shape", "mode", **where)
    series = {}
    for impl, graph in product(("eager", *impls), (False, True)):
        times = [records.time(in_layouts(impl), "small", **where, graph=graph, **group) for group in groups]
        series[impl + ", CUDA graph" * graph] = [value and 1e6 * value for value in times]
    colours = [GREY, PALE, *(tone for impl in impls for tone in TONES[impl][:2])]
    bars(axis, [f"{group['shape']}\n{MODES[group['mode']]}" for group in groups], series, colours)
    axis.set_yscale("log")
    axis.set_title(f"{op.title}, small shapes: wall time per call, µs")
