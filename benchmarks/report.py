"""Records as a page; ``python -m benchmarks.report FILE.json`` makes page and picture anew.

Several files are put together, as of runs on one GPU that each did some parts.
"""

import argparse
from collections.abc import Iterable, Sequence
from math import log, prod
from pathlib import Path
from statistics import linear_regression

from tabulate import tabulate

from benchmarks.goals import MODES_OF, targets
from benchmarks.model import gpu_named
from benchmarks.networks import figures, saved
from benchmarks.ops import OPS
from benchmarks.records import Records, layouts_of, names_of, share_of_copy
from benchmarks.registry import IMPLS, LAYOUTS, LIBRARIES, MODES, PRECISIONS, Op, in_layouts, label, number

FLOORS = (
    'At the floor: a call that takes the time of its matrix products ("products": by the faster of `matmul` and 1x1 '
    "convolutions) and of one copy of the bytes that it must move besides; a generator step that takes that of the "
    'plain one and of the products. "Of peak": the operations of the products in the time of ours, and in that of the '
    'products alone, over those of large square products. "Rest" is the time of ours less that of the products. "Copy" '
    'writes to memory that was used before, "fresh copy" as much to new memory as the call allocates; there is none '
    "where all that a call touches stays in the processor's cache from call to call."
)


def markdown(records: Records, picture: str | None) -> str:
    """The page: what ran, the goals, the measurements."""
    sections = [
        f"# Benchmarks on {records.machine}",
        table(("", ""), records.facts.items(), "left"),
        *_bullets("What failed", records.failures()),
        *_bullets("Not to be believed before it is understood", _suspects(records)),
    ]
    parts = [_part(records, part) for part in records.parts]
    sections += _section("The run", table(("part", "planned, s", "s", "", ""), parts, "left"))
    sections += _section("Right?", _agreement(records) if records.on_cpu else _checks(records))
    sections += _section("Goals", goals_table(records), FLOORS if records.on_cpu else "")
    for op in OPS.values():
        sections += _section(f"First timing: {op.title}, device time, µs", _layers(records, op, "first"))
    sections += ["## How it was measured", _method(records), *([f"![plots]({picture})"] if picture else [])]
    for op in OPS.values():
        unit = "time, ms" if records.on_cpu else "device time, µs"
        sections += _section(f"{op.title}: {unit}", _layers(records, op, "layer"))
        sections += _section(f"{op.title}: on one thread, ms", _layers(records, op, "one thread"))
        sections += _section(f"{op.title}: with what surrounds it, ms", _wholes(records, op))
        sections += _section(f"{op.title}: device time of triton relative to native", _faster(records, op))
        sections += _section(f"{op.title}: generator step, ms", _steps(records, op))
        sections += _section(f"{op.title}: small shapes, wall time of a call, µs", _small(records, op))
        sections += _bullets(
            f"{op.title}: launches of a small call, running statistics included", _launches(records, op)
        )
        sections += _section(f"{op.title}: memory, in tensors of the output's size", _memory(records, op))
        sections += _section(f"{op.title}: growth, forward + backward", _growth(records, op))
    kept = '"Saved" is the memory that is kept for backward, in MiB, beside inputs, parameters and buffers.'
    sections += _section("Networks: training step, ms", _networks(records), kept)
    copied = "The copy moves as many bytes as the kernel. Shares above 100 % or below 30 % are in bold."
    sections += _section("Kernels: device time, µs, and share of a copy's bandwidth", _kernels(records), copied)
    return "\n\n".join(sections) + "\n"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], align: str = "right") -> str:
    """Markdown that reads well as text too; the first column is flush left, empty columns are left out."""
    rows = list(rows)
    kept = [i for i in range(len(headers)) if i == 0 or any(row[i] for row in rows)]
    if not rows:
        return ""
    return tabulate(
        [[row[i] for i in kept] for row in rows],
        [headers[i] for i in kept],
        "pipe",
        disable_numparse=True,
        colalign=["left", *[align] * (len(kept) - 1)],
    )


def _section(title: str, *texts: str) -> list[str]:
    """Nothing where the first text is empty."""
    return [f"## {title}", *filter(None, texts)] if texts and texts[0] else []


def _bullets(title: str, lines: list[str]) -> list[str]:
    return [f"## {title}", "\n".join(f"- {line}" for line in lines)] if lines else []


def goals_table(records: Records) -> str:
    headers = "goal", "measured", "", "at the floor", "beside it"
    found = targets(records).items()
    return "\n\n".join(table((of, *headers), [target.cells for target in goals]) for of, goals in found)


def _method(records: Records) -> str:
    if records.on_cpu:
        return (
            "In float32. Medians over all rounds, with the middle half of the rounds or, for ratios, the ratio of the "
            "shortest rounds in brackets; contenders took turns. Peers are eager PyTorch and `torch.compile`; where "
            "the latter takes minutes to compile and is far from the fastest, it sits out."
        )
    copy = next((f" A copy moves {entry['bandwidth'] / 1e12:.2f} TB/s." for entry in records.all("copy")), "")
    return (
        "Medians, and in brackets the middle half of the rounds or the ratio of the shortest. Device times start from "
        "a cold L2; contenders took turns, torch.compile's after the others. Parameters are float32 where the op "
        "takes them so. Peers are eager PyTorch and `torch.compile` (at the main shape; as it is, and with "
        f"cooperative reductions).{copy} Predictions are by bytes, products and a copy's speed "
        "(`benchmarks/model.py`); their error is that of the faster of ours."
    )


def _suspects(records: Records) -> list[str]:
    """Kernels that are faster than a copy of their bytes, or take more than three times as long."""
    return [
        f"`{entry['kernel']}`, {_of(entry)}, {_named(entry)}: {share:.0%} of a copy's bandwidth"
        for entry in records.all("kernel")
        if (share := share_of_copy(entry)) and not 0.3 <= share <= 1
    ]


def _part(records: Records, part: dict) -> tuple[str, ...]:
    tests = records.tests(part["name"])
    counts = ", ".join(f"{tests[key]} {key}" for key in ("failed", "passed", "skipped") if tests[key]) if tests else ""
    return part["name"], str(part["planned"]), str(part["seconds"]), part["state"], counts or part["last"]


def _checks(records: Records) -> str:
    found, wrong = records.all("check"), records.all("check", right=False)
    lines = [f"- **wrong**: {entry['op']}, {entry['impl']}, {entry['dtype']}, {entry['layout']}" for entry in wrong]
    told = "Forward and backward by the rule of the tests, op by impl by dtype by layout"
    head = f"{told}: {len(found) - len(wrong)} right, {len(wrong)} wrong."
    return "\n".join([head, *[""] * bool(lines), *lines])


def _agreement(records: Records) -> str:
    lines = [
        f"- generator with {entry['of']}, {entry['tensor']}: {entry['float64']:.0e} from the reference in float64; "
        f"in float32 {entry['float32']:.0e}, where the reference itself is off by {entry['reference']:.0e}"
        for entry in records.all("agreement")
    ]
    return "\n".join(lines)


# ---- cells ----


def _of(where: dict) -> str:
    """What a row is of, in words."""
    op = OPS[where["op"]]
    words = [op.heads[where["head"]].title, MODES.get(where.get("mode", "")), where.get("shape")]
    precision = PRECISIONS[where["precision"]].title if where.get("precision", "fp32") != "fp32" else None
    return ", ".join(word for word in (*words, precision) if word)


def _time(entry: dict | None, unit: float, layout: bool = False) -> str:
    if entry is None:
        return ""
    middle, low, high = (number(entry[key] / unit) for key in ("median", "low", "high"))
    return f"{middle} ({low}–{high})" + (f" {_layout(entry)}" if layout else "")


def _layout(entry: dict) -> str:
    return LAYOUTS[entry["contender"].split("-")[1]]


def _named(entry: dict) -> str:
    return f"{entry['contender'].split('-')[0]} {_layout(entry)}"


def _ratio(values: float | list | None, digits: int = 1) -> str:
    """One value, or the median's with the shortest's in brackets."""
    first, *others = values if isinstance(values, list) else [values]
    return f"{first:.{digits}f}" + "".join(f" ({other:.{digits}f})" for other in others if other) if first else ""


# ---- tables ----


def _layers(records: Records, op: Op, what: str) -> str:
    unit, rows = 1e-3 if records.on_cpu else 1e-6, []
    kinds = {"eager": ["eager"], "torch.compile": ["compile", "cooperative"]}
    kinds |= {impl: [impl] for impl in records.impls(what, op=str(op))}
    ours = [impl for impl in kinds if impl in IMPLS]
    for group in records.groups(what, "head", "mode", "shape", "precision", op=str(op)):
        where = {"op": str(op), **group}
        for layouts in layouts_of(op):
            over, all_ours = (names_of(of, layouts) for of in (op.goals.speed_ups[0].over, ours))
            cells = [_of(where) + f", {LAYOUTS[layouts[0]]}" * op.same_layout]
            for kind, impls in kinds.items():
                names = names_of(impls, layouts)
                cells.append(_time(records.best(names, what, **where), unit, layout=not op.same_layout))
                if kind in IMPLS:
                    statistics = ("median", "shortest")
                    cells.append(_ratio([records.ratio(over, names, what, s, **where) for s in statistics]))
            best, rest = records.best(all_ours, what, **where), records.outside(all_ours, what, **where)
            products = best and records.best(names_of(LIBRARIES, [best["contender"].split("-")[1]]), what, **where)
            x = op.case(group["head"], tuple(map(int, group["shape"].split("x")))).shape
            of_peak = [records.share_of_peak(op, x, group["mode"], of and of["median"]) for of in (best, products)]
            cells += [_time(products, unit), " / ".join(f"{share:.0%}" for share in of_peak if share)]
            cells.append(_ratio(records.at_floor(over, all_ours, **where)))
            cells.append(number(rest / unit) if rest else "")
            for copy in ("copy-used", "copy-fresh"):
                copied = records.time([copy], what, **where)
                cells.append(f"{rest / copied:.2f}" if copied and rest else "")
            predicted = _predicted(records, op, where)
            cells.append(number(predicted / unit) if predicted else "")
            cells.append(f"{best['median'] / predicted - 1:+.0%}" if predicted and best else "")
            rows.append(cells)
    headers = ["of the output", *(cell for kind in kinds for cell in (kind, *["speed-up"] * (kind in IMPLS)))]
    headers += ["products", "of peak", "at the floor", "rest", "/ copy", "/ fresh copy", "predicted", "error"]
    return table(headers, rows)


def _wholes(records: Records, op: Op) -> str:
    rows, impls = [], records.impls("whole", op=str(op))
    for group in records.groups("whole", "whole", "mode", "shape", op=str(op)):
        where, eager = {"op": str(op), **group}, in_layouts("eager")
        of = op.wholes[group["whole"]]
        over = "" if of.over == "eager" else f" (here eager is {of.over})"
        cells = [f"{of.title}, {MODES[group['mode']]}, {group['shape']}{over}"]
        cells.append(_time(records.best(eager, "whole", **where), 1e-3, layout=True))
        for impl in impls:
            names = in_layouts(impl)
            ratios = [records.ratio(eager, names, "whole", s, **where) for s in ("median", "shortest")]
            cells += [_time(records.best(names, "whole", **where), 1e-3, layout=True), _ratio(ratios)]
        rows.append(cells)
    return table(("", "eager", *(cell for impl in impls for cell in (impl, "speed-up"))), rows)


def _predicted(records: Records, op: Op, where: dict) -> float | None:
    """Seconds; None where there is no model."""
    gpu, head = gpu_named(records.gpu), where["head"]
    if gpu is None or where["precision"] == "fp32":
        return None
    x = op.case(head, tuple(map(int, where["shape"].split("x")))).shape
    times = op.predicted(gpu, x, PRECISIONS[where["precision"]].dtype.itemsize, op.upsample(head))
    return dict(zip(MODES_OF[False], times, strict=True)).get(where["mode"])


def _faster(records: Records, op: Op) -> str:
    """Where both ran; in brackets where the middle halves of the rounds overlap."""
    rows = []
    for group in records.groups("layer", "head", "shape", "precision", op=str(op)):
        for layout in LAYOUTS:
            times = [
                [records.best([f"{impl}-{layout}"], "layer", op=str(op), mode=mode, **group) for impl in IMPLS]
                for mode in MODES_OF[False]
            ]
            if not all(all(entries) for entries in times):
                continue
            # The middle half of the sum is a little too wide so; fewer cases count as clear.
            both = [{key: a[key] + b[key] for key in ("median", "low", "high")} for a, b in zip(*times, strict=True)]
            auto = next((entry["impl"] for entry in records.all("auto", op=str(op), layout=layout, **group)), "")
            remark = ", **slower**" if auto and _winner(*both) not in (auto, None) else ""
            ratios = [_ratio_of_times(*entries) for entries in (*times, both)]
            rows.append((f"{_of({'op': str(op), **group})}, {LAYOUTS[layout]}", *ratios, auto + remark))
    return table(("of the output", *MODES_OF[False], "both", "`auto` takes"), rows)


def _ratio_of_times(native: dict, triton: dict) -> str:
    ratio = triton["median"] / native["median"]
    return f"{ratio:.2f} {_winner(native, triton) or ('(triton)' if ratio < 1 else '(native)')}"


def _winner(native: dict, triton: dict) -> str | None:
    """None where it is not clear."""
    if triton["high"] < native["low"]:
        return "triton"
    return "native" if native["high"] < triton["low"] else None


def _steps(records: Records, op: Op) -> str:
    rows, clocks = [], [group["clock"] for group in records.groups("step", "clock", op=str(op))]
    titles = {op.step.plain: op.step.plain_title, "eager": f"{op.step.title}, eager"}
    titles |= {impl: f"{op.step.title}, {impl}" for impl in records.impls("step", op=str(op))}
    titles |= {library: f"matrix products of {op.step.title} alone, by {who}" for library, who in LIBRARIES.items()}
    for group in records.groups("step", "batch", "precision", op=str(op)):
        for impl, title in titles.items():
            cells = [f"batch {group['batch']}, {PRECISIONS[group['precision']].title}, {title}"]
            for clock in clocks:
                where = {"op": str(op), "clock": clock, **group}
                cells += [_time(records.best([name], "step", **where), 1e-3) for name in in_layouts(impl)]
                ratios = [records.step_ratio(op, [impl], s, clock=clock, **group) for s in ("median", "shortest")]
                cells.append(_ratio(ratios, 2))
            peaks = [
                entry["peak"]
                for entry in records.all("step memory", op=str(op), **group)
                if entry["contender"] in in_layouts(impl) and entry["peak"]
            ]
            cells.append(f"{min(peaks) / 2**20:.0f}" if peaks else "")
            if any(cells[1:]):
                rows.append(cells)
    of_clocks = [
        f"{clock}, {layout}" for clock in clocks for layout in (*LAYOUTS.values(), f"best / {op.step.plain_title}")
    ]
    return table(("", *of_clocks, "peak memory, MiB"), rows)


def _networks(records: Records) -> str:
    rows = []
    for group in records.groups("network", "network", "batch", "precision", "clock"):
        cells = [f"{group['network']}, batch {group['batch']}, {PRECISIONS[group['precision']].title}"]
        cells[0] += "" if records.on_cpu else f", {group['clock']} time"
        for impl in ("eager", "compile", "auto"):
            cells.append(_time(records.best(in_layouts(impl), "network", **group), 1e-3, layout=True))
        where = {key: value for key, value in group.items() if key != "network"}
        by_statistic = [figures(records, group["network"], s, **where) for s in ("median", "shortest")]
        cells += [_ratio(list(ratios), 2) for ratios in zip(*by_statistic, strict=True)]
        of_memory = {key: value for key, value in where.items() if key != "clock"}
        kept = [saved(records, group["network"], impl, **of_memory) for impl in ("eager", "auto")]
        rows.append((*cells, *(number(value) if value else "" for value in kept)))
    headers = ("", "eager", "torch.compile", "ours", "over eager", "over torch.compile", "eager saved", "ours saved")
    return table(headers, rows)


def _small(records: Records, op: Op) -> str:
    rows, impls = [], records.impls("small", op=str(op))
    for group in records.groups("small", "head", "shape", "mode", "graph", op=str(op)):
        where = {"op": str(op), **group}
        cells = [_of(where) + ", CUDA graph" * group["graph"]]
        cells.append(_time(records.best(in_layouts("eager"), "small", **where), 1e-6))
        for impl in impls:
            names = in_layouts(impl)
            ratio = records.ratio(in_layouts("eager"), names, "small", **where)
            cells += [_time(records.best(names, "small", **where), 1e-6, layout=True), _ratio(ratio)]
        rows.append(cells)
    return table(("", "eager", *(cell for impl in impls for cell in (impl, "speed-up"))), rows)


def _launches(records: Records, op: Op) -> list[str]:
    return [
        f"{_of(entry)}, {_named(entry)}: {entry['count']}: {', '.join(f'`{name[:60]}`' for name in entry['kernels'])}"
        for entry in records.all("launches", op=str(op))
    ]


def _memory(records: Records, op: Op) -> str:
    """The most over all shapes."""
    rows = []
    for group in records.groups("memory", "op", "head", "precision", "contender", op=str(op)):
        found = records.all("memory", **group)
        peaks = [entry["peak"] / entry["output"] for entry in found if entry.get("peak")]
        saved = max(entry["saved"] / entry["output"] for entry in found)
        peak = f"{max(peaks):.2f}" if peaks else ""
        rows.append((f"{_of(group)}, {_named(group)}", peak, f"{saved:.2f}"))
    return table(("", "peak of forward + backward, beyond the inputs", "saved for backward"), rows)


def _growth(records: Records, op: Op) -> str:
    """Powers of a size with which times (of the shortest rounds) and memory grow along the sweep."""
    ours, eager = in_layouts(*records.impls("sweep", op=str(op))), ["eager-channels_last"]
    columns = {
        "ours": lambda where: records.time(ours, "sweep", "shortest", **where),
        "ours outside the products": lambda where: records.outside(ours, "sweep", "shortest", **where),
        "eager": lambda where: records.time(eager, "sweep", "shortest", **where),
        "saved by ours": lambda where: records.best(ours, "sweep", **where)["saved"],
        "saved by eager": lambda where: records.best(eager, "sweep", **where)["saved"],
    }
    rows = []
    for size, shapes in op.shapes.sweep.items() if records.all("sweep", op=str(op)) else ():
        sizes = [log(prod(shape)) for shape in shapes]
        wheres = [{"op": str(op), "size": size, "shape": label(shape)} for shape in shapes]
        figures = [[log(max(figure(where), 1e-9)) for where in wheres] for figure in columns.values()]
        slopes = [f"{linear_regression(sizes, values).slope:.2f}" for values in figures]
        rows.append((f"{size}: {label(shapes[0])} to {label(shapes[-1])}", *slopes))
    return table(("power of", *columns), rows)


def _kernels(records: Records) -> str:
    rows, gpu = [], gpu_named(records.gpu)
    for group in records.groups("kernel", "op", "shape", "head", "precision", "contender"):
        for entry in records.all("kernel", **group):
            name = entry["kernel"] if len(entry["kernel"]) <= 44 else entry["kernel"][:43] + "…"
            share, moved = share_of_copy(entry), entry["bytes"]
            rows.append(
                (
                    f"{_of(entry)}, {_named(entry)}",
                    f"`{name}`",
                    f"{entry['times_per_call']:g}",
                    _time(entry, 1e-6),
                    f"{moved / gpu.copy * 1e6:.3g}" if moved and gpu else "",
                    f"{moved / 1e6:.0f}" if moved else "",
                    (f"{share:.0%}" if 0.3 <= share <= 1 else f"**{share:.0%}**") if share else "",
                    str(entry["registers_per_thread"] or ""),
                )
            )
    headers = ("of the output", "kernel", "launches", "µs", "predicted by bytes", "MB", "share", "registers")
    return table(headers, rows)


def draw_picture(records: Records, base: Path) -> str | None:
    """Draw it beside the page; its name, or None where it cannot be drawn: the tables do not depend on it."""
    try:
        from benchmarks.plots import draw

        draw(records, base.with_suffix(".png"))
    except Exception as error:
        print(f"no picture: {type(error).__name__}: {error}")
        return None
    return f"{base.name}.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", type=Path, nargs="+", metavar="FILE.json", help="the first one is written to")
    paths = parser.parse_args().records
    runs = [Records.load(path) for path in paths]
    parts, entries = [part for run in runs for part in run.parts], [entry for run in runs for entry in run.entries]
    merged = Records(runs[0].facts, parts, entries, runs[0].on_cpu)
    if len(runs) > 1:
        paths[0].write_text(merged.text())
    paths[0].with_suffix(".md").write_text(markdown(merged, draw_picture(merged, paths[0].with_suffix(""))))


if __name__ == "__main__":
    main()
