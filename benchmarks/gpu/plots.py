"""The results on a GPU as one picture."""

from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.contenders import PEERS
from benchmarks.gpu.cases import BATCHES, EAGER, FUSED, LAYER_SHAPES, SMALL_SHAPES
from benchmarks.gpu.report import MODES, SHARES, TITLES, WORDS, Records, share_goals, step_ratio
from benchmarks.plots import BLUE, GREY, ORANGE, PALE, STYLE, TEAL, bars
from benchmarks.test_spn import HEADS, label

COLOURS = ("#2f6fb0", "#9ec5e8", "#d9662b", "#f3b98a")


def draw(records: Records, path: Path) -> None:
    """Write the picture: the layer above, kernels and memory in the middle, the generator and small shapes below."""
    matplotlib.use("agg")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplot_mosaic(
            [["speed_up"] * 7 + ["time"] * 5, ["shares"] * 8 + ["memory"] * 4, ["step"] * 5 + ["small"] * 7],
            figsize=(13, 11),
            layout="constrained",
        )
        figure.suptitle(f"pixnorm on {records.facts['machine']} · {records.facts['commit']}", x=0.01, ha="left")
        for name, panel in (
            ("speed_up", _speed_up),
            ("time", _time),
            ("shares", _shares),
            ("memory", _memory),
            ("step", _step),
            ("small", _small),
        ):
            panel(axes[name], records)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _or_zero(value: float | None) -> float:
    return value or 0.0


def _speed_up(axis: Axes, records: Records) -> None:
    shape = label(LAYER_SHAPES[0])
    series = {
        f"{TITLES[head]}, {mode}": [
            _or_zero(records.speed_up(head=head, shape=shape, precision=precision, mode=mode)) for precision in WORDS
        ]
        for head in HEADS
        for mode in MODES
    }
    bars(axis, list(WORDS.values()), series, list(COLOURS), "%.1f")
    for goal in (4, 8):
        axis.axhline(goal, color="black", linewidth=0.6, linestyle=":")
    axis.set_title(f"Speed-up over the best of eager and torch.compile, {shape} (goals 4 and 8)")
    axis.legend(ncols=2, loc="upper left")
    axis.margins(y=0.25)


def _time(axis: Axes, records: Records) -> None:
    shape = label(LAYER_SHAPES[0])
    groups, series = [], {"eager": [], "torch.compile": [], "pixnorm": []}
    compiled = [name for name in PEERS if name not in EAGER]
    for precision in ("tf32", "bf16"):
        for mode in MODES:
            groups.append(f"{WORDS[precision]}\n{mode}")
            for values, names in zip(series.values(), (EAGER, compiled, FUSED), strict=True):
                where = {"head": "plain", "shape": shape, "precision": precision, "mode": mode}
                best = records.best(names, "layer", **where)
                values.append(1e6 * best["median"] if best else 0.0)
    bars(axis, groups, series, [GREY, PALE, BLUE])
    axis.set_title(f"SPN, {shape}: device time, µs")
    axis.legend(loc="upper left")
    axis.margins(y=0.2)


def _shares(axis: Axes, records: Records) -> None:
    colours = {"tf32": BLUE, "bf16": ORANGE}
    markers = {"native-contiguous": "o", "native-channels_last": "s"}
    for x, kernel in enumerate(SHARES):
        for (side, precision), goal in zip(((-0.2, "tf32"), (0.2, "bf16")), share_goals(records)[kernel], strict=True):
            axis.hlines(100 * goal, x + side - 0.16, x + side + 0.16, color="black", linewidth=0.8)
            for nudge, head in ((-0.08, "plain"), (0.08, "up")):
                for entry, share in records.shares(kernel, precision, head=head):
                    axis.plot(
                        x + side + nudge,
                        100 * share,
                        markers[entry["contender"]],
                        color=colours[precision],
                        markersize=6,
                        fillstyle="full" if head == "plain" else "none",
                    )
    for precision, colour in colours.items():
        axis.plot([], [], "o", color=colour, label=precision.replace("tf32", "fp32"))
    for name, marker in markers.items():
        axis.plot([], [], marker, color="black", label=name.replace("native-", "").replace("contiguous", "NCHW"))
    axis.plot([], [], "o", color="black", fillstyle="none", label=TITLES["up"])
    axis.plot([], [], color="black", linewidth=0.8, label="goal, SPN")
    axis.axhline(100, color="black", linewidth=0.6, linestyle=":")
    axis.set_xticks(range(len(SHARES)), [kernel.removesuffix("_kernel") for kernel in SHARES])
    axis.set_xlim(-0.5, len(SHARES) - 0.5)
    axis.set_ylim(bottom=0)
    axis.set_title("Kernels on tensors of 32 MB and more: bandwidth, % of a copy's")
    axis.legend(ncols=6, loc="lower left")


def _memory(axis: Axes, records: Records) -> None:
    series = {}
    for key, what in (("peak", "at the peak"), ("saved", "saved for backward")):
        for name, names in (("eager", EAGER), ("pixnorm", FUSED)):
            values = []
            for head in HEADS:
                entries = [e for e in records.all("memory", head=head) if e["contender"] in names and e[key]]
                values.append(min((e[key] / e["output"] for e in entries), default=0.0))
            series[f"{name}, {what}"] = values
    bars(axis, list(TITLES.values()), series, [GREY, BLUE, PALE, TEAL], "%.2f")
    axis.set_title("Memory, in outputs")
    axis.legend(loc="upper left", fontsize=7)
    axis.margins(y=0.5)


def _step(axis: Axes, records: Records) -> None:
    groups, series = [], {"SPN, eager": [], "SPN, native": []}
    for batch in BATCHES:
        for precision in ("tf32", "bf16"):
            for clock in ("device", "wall"):
                groups.append(f"{precision.replace('tf32', 'fp32')}\n{batch}\n{clock}")
                for values, norm in zip(series.values(), ("eager", "native"), strict=True):
                    values.append(_or_zero(step_ratio(records, norm, batch, precision, clock)))
    bars(axis, groups, series, [GREY, BLUE], "%.2f")
    axis.axhline(1, color="black", linewidth=0.6, linestyle=":")
    axis.set_title("Generator step, batch norm = 1 (goal 1)")
    axis.legend(loc="upper left", ncols=2)
    axis.margins(y=0.2)


def _small(axis: Axes, records: Records) -> None:
    groups = []
    series = {"eager": [], "eager, CUDA graph": [], "pixnorm": [], "pixnorm, CUDA graph": []}
    for shape in map(label, SMALL_SHAPES):
        for mode in ("forward", "forward + backward"):
            groups.append(f"{shape}\n{mode}")
            choices = [(names, graph) for names in (EAGER, FUSED) for graph in (False, True)]
            for values, (names, graph) in zip(series.values(), choices, strict=True):
                best = records.best(names, "small", head="plain", shape=shape, mode=mode, graph=graph)
                values.append(1e6 * best["median"] if best else 0.0)
    bars(axis, groups, series, [GREY, PALE, BLUE, TEAL])
    axis.tick_params(axis="x", labelsize=7)
    axis.set_yscale("log")
    axis.set_title("Small shapes: wall time per call, µs")
    axis.legend(ncols=4, loc="upper left")
    axis.margins(y=0.2)
