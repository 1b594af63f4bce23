"""The records as a page and a picture; ``python -m benchmarks.gpu.report FILE.json`` makes both anew.

Of several files the records are put together, as of runs on one GPU that each did some parts.
"""

import argparse
from itertools import product
from pathlib import Path

from benchmarks.gpu.cases import (
    BATCHES,
    KERNEL_SHAPES,
    LAYER_SHAPES,
    MIXING_PRECISIONS,
    MIXING_SHAPES,
    PAIRS,
    SMALL_SHAPES,
)
from benchmarks.gpu.goals import targets
from benchmarks.gpu.records import MODES, TITLES, WORDS, Records, in_layouts, share_of_copy
from benchmarks.gpu.section import COMPILED, EAGER, FUSED, PEERS, PRECISIONS
from benchmarks.model import gpu_named, spn_times
from benchmarks.results import LAYOUTS
from benchmarks.tables import table
from benchmarks.test_spn import HEADS, case, label

SPREAD = ("median", "low", "high")
NOT_BOTH = "Not both of them ran here."


def markdown(records: Records, picture: str | None) -> str:
    """The page: what ran, the goals, the measurements."""
    copy = f" A copy moves {records.copy / 1e12:.2f} TB/s." if records.copy else ""
    sections = [
        f"# Benchmarks on {records.facts.get('machine', 'a GPU')}",
        table(("", ""), records.facts.items(), "left"),
        *_failed(records),
        "## The run",
        table(("part", "planned, s", "s", "", ""), [_part(records, part) for part in records.parts], "left"),
        "## Right?",
        _checks(records),
        "## Goals",
        goals_table(records),
        "## First timing: SPN, device time, µs",
        _first(records),
        "## Predictions, and what was measured",
        "By bytes, products and a copy's speed (`benchmarks/model.py`); measured is the best of native and Triton.",
        _predictions(records),
        "## How it was measured",
        "Medians, and in brackets the middle half of the rounds. Device times start from a cold L2; contenders took "
        "turns, torch.compile's after the others. Parameters are float32, but for GConv's mixing, all of one dtype. "
        f"Peers are eager PyTorch and `torch.compile` (at {label(LAYER_SHAPES[0])} alone; as it is, and with "
        f"cooperative reductions), each in NCHW and in channels_last; the fastest of a kind is shown.{copy}",
        *([f"![plots]({picture})"] if picture else []),
        "## SPN: device time, µs",
        _layers(records),
        "## SPN: which is faster? Device time of triton, that of native being 1",
        "In brackets where the middle halves of the rounds overlap.",
        _faster(records),
        "## SPN: generator step, ms",
        _steps(records, "step"),
        "## SPN, small shapes: wall time per call, µs",
        _small(records),
        _launches(records),
        "## GConv's mixing: device time, µs, and speed-up over eager",
        _mixing(records),
        "## GConv's mixing: which is faster? Device time of triton, that of native being 1",
        "Native is here a product of the library. In brackets where the middle halves of the rounds overlap. `auto` "
        "has one choice for both passes, by `preferred` in `pixnorm/ops/gconv.py`: correct it where it is the slower.",
        _mixing_choice(records),
        "## GConv: generator step, ms",
        _steps(records, "gconv_step"),
        "## Kernels: device time, µs, and share of a copy's bandwidth",
        "The copy moves as many bytes as the kernel. What is beyond it, or below 30 %, is in bold.",
        _kernels(records),
        "## SPN: memory, in tensors of the output's size",
        _memory(records),
    ]
    return "\n\n".join(sections) + "\n"


def goals_table(records: Records) -> str:
    tables = []
    for impl, found in targets(records).items():
        rows = []
        for target, remark in found:
            measured = ("", "**not measured**") if target.median is None else (f"{target.median:.2f}", target.verdict)
            rows.append((target.what, target.bound, *measured, remark))
        tables.append(table((impl, "goal", "measured", "", "beside it"), rows))
    return "\n\n".join(tables)


def _failed(records: Records) -> list[str]:
    lines = [f"- {failure}" for failure in records.failures()]
    suspects = [f"- {suspect}" for suspect in _suspects(records)]
    return [
        *(["## What failed", "\n".join(lines)] if lines else []),
        *(["## Not to be believed before it is understood", "\n".join(suspects)] if suspects else []),
    ]


def _suspects(records: Records) -> list[str]:
    """Kernels that are faster than a copy of their bytes, or take more than three times as long."""
    found = []
    for entry in records.all("kernel"):
        share = share_of_copy(entry)
        if share and not 0.3 <= share <= 1:
            where = f"{TITLES[entry['head']]}, {entry['shape']}, {entry['precision']}, {_named(entry)}"
            found.append(f"`{entry['kernel']}`, {where}: {share:.0%} of a copy's bandwidth")
    return found


def _part(records: Records, part: dict) -> tuple[str, ...]:
    tests = records.tests(part["name"])
    counts = ", ".join(f"{tests[key]} {key}" for key in ("failed", "passed", "skipped") if tests[key]) if tests else ""
    return part["name"], str(part["planned"]), str(part["seconds"]), part["state"], counts or part["last"]


def _checks(records: Records) -> str:
    found = {True: 0, False: 0}
    for entry in records.all("check"):
        found[entry["right"]] += 1
    wrong = [
        f"- **wrong**: {entry['op']}, {entry['impl']}, {entry['dtype']}, {entry['layout']}"
        for entry in records.all("check", right=False)
    ]
    told = f"Forward and backward by the rule of the tests, op by impl by dtype by layout: {found[True]} right"
    return "\n".join([f"{told}, {found[False]} wrong.", *([""] if wrong else []), *wrong])


def _first(records: Records) -> str:
    rows = []
    for head, precision, contender in product(HEADS, ("tf32", "bf16"), in_layouts("eager", *FUSED)):
        where = {"head": head, "precision": precision, "contender": contender}
        times = [next(iter(records.all("first", mode=mode, **where)), None) for mode in MODES]
        if any(times):
            named = f"{TITLES[head]}, {WORDS[precision]}, {_named(times[0] or times[1])}"
            rows.append((named, *(_time(entry, 1e-6) for entry in times)))
    return table(("", *MODES), rows)


def _predictions(records: Records) -> str:
    gpu = gpu_named(records.gpu)
    if gpu is None:
        return f"There is no model of {records.gpu}."
    rows = []
    for head, shape, precision in product(HEADS, LAYER_SHAPES, ("tf32", "bf16")):
        of_x = case(head, shape)
        upsample, itemsize = of_x.options.get("upsample", 1), PRECISIONS[precision][0].itemsize
        for mode, predicted in zip(MODES, spn_times(gpu, of_x.shape, itemsize, upsample), strict=True):
            where = {"head": head, "shape": label(shape), "precision": precision, "mode": mode}
            measured = records.best((*FUSED["native"], *FUSED["triton"]), "layer", **where)
            error = f"{measured['median'] / predicted - 1:+.0%}" if measured else ""
            named = f"{TITLES[head]}, {mode}, {label(shape)}, {WORDS[precision]}"
            rows.append((named, f"{predicted * 1e6:.3g}", _time(measured, 1e-6), error, _named(measured)))
    return table(("of the output", "predicted, µs", "measured, µs", "error", ""), rows)


def _time(entry: dict | None, unit: float) -> str:
    if entry is None:
        return ""
    middle, low, high = (f"{entry[key] / unit:.3g}" for key in SPREAD)
    return f"{middle} ({low}–{high})"


def _named(entry: dict | None) -> str:
    if entry is None:
        return ""
    name, layout = entry["contender"].split("-")
    return f"{name} {LAYOUTS[layout]}"


def _layout(entry: dict | None) -> str:
    return LAYOUTS[entry["contender"].split("-")[1]] if entry else ""


def _ratio(value: float | None, digits: int = 1) -> str:
    return f"{value:.{digits}f}" if value else ""


def _layers(records: Records) -> str:
    rows, impls = [], records.impls("layer")
    for head, mode, shape, precision in product(HEADS, MODES, map(label, LAYER_SHAPES), WORDS):
        where = {"head": head, "shape": shape, "precision": precision, "mode": mode}
        peer = records.best(PEERS, "layer", **where)
        cells = [f"{TITLES[head]}, {mode}, {shape}, {WORDS[precision]}", _named(peer), _time(peer, 1e-6)]
        for impl in impls:
            ours = records.best(FUSED[impl], "layer", **where)
            cells += [_layout(ours), _time(ours, 1e-6), _ratio(records.speed_up(impl, **where))]
        rows.append(cells)
    headers = (cell for impl in impls for cell in (impl, "", "speed-up"))
    return table(("of the output", "best peer", "", *headers), rows)


def _faster(records: Records) -> str:
    rows = []
    for head, mode, shape, layout in product(HEADS, MODES, map(label, LAYER_SHAPES), LAYOUTS):
        cells = []
        for precision in WORDS:
            where = {"head": head, "shape": shape, "precision": precision, "mode": mode}
            native, triton = (records.best([f"{impl}-{layout}"], "layer", **where) for impl in FUSED)
            cells.append(_ratio_of_times(native, triton) if native and triton else "")
        if any(cells):
            rows.append((f"{TITLES[head]}, {mode}, {shape}, {LAYOUTS[layout]}", *cells))
    return table(("of the output", *WORDS.values()), rows) if rows else NOT_BOTH


def _ratio_of_times(native: dict, triton: dict) -> str:
    ratio = triton["median"] / native["median"]
    return f"{ratio:.2f} {_winner(native, triton) or ('(triton)' if ratio < 1 else '(native)')}"


def _winner(native: dict, triton: dict) -> str | None:
    """None where it is not clear."""
    if triton["high"] < native["low"]:
        return "triton"
    return "native" if native["high"] < triton["low"] else None


def _mixing(records: Records) -> str:
    kinds = {"eager": EAGER, "torch.compile": COMPILED} | {impl: FUSED[impl] for impl in records.impls("mixing")}
    rows = []
    for mode, shape, precision in product(MODES, map(label, MIXING_SHAPES), MIXING_PRECISIONS):
        where = {"mode": mode, "shape": shape, "precision": precision}
        cells = [f"{mode}, {shape}, {WORDS[precision]}"]
        for name, contenders in kinds.items():
            best = records.best(contenders, "mixing", **where)
            cells += [_layout(best), _time(best, 1e-6)]
            if name in FUSED:
                cells.append(_ratio(records.ratio(EAGER, contenders, "mixing", **where)))
        rows.append(cells)
    headers = (cell for name in kinds for cell in (name, "", *(["speed-up"] if name in FUSED else [])))
    return table(("", *headers), rows)


def _mixing_choice(records: Records) -> str:
    rows = []
    for shape, precision, layout in product(map(label, MIXING_SHAPES), MIXING_PRECISIONS, LAYOUTS):
        where = {"shape": shape, "precision": precision}
        times = {
            mode: [records.best([f"{impl}-{layout}"], "mixing", mode=mode, **where) for impl in FUSED] for mode in MODES
        }
        if not all(all(entries) for entries in times.values()):
            continue
        # Its middle half is a little too wide so, which calls fewer of them clear.
        both = [
            {key: forward[key] + backward[key] for key in SPREAD}
            for forward, backward in zip(*times.values(), strict=True)
        ]
        auto = next((entry["impl"] for entry in records.all("auto", **where)), "")
        remark = ", **slower**" if auto and _winner(*both) not in (auto, None) else ""
        cells = [_ratio_of_times(*entries) for entries in (*times.values(), both)]
        rows.append((f"{shape}, {WORDS[precision]}, {LAYOUTS[layout]}", *cells, auto + remark))
    return table(("", *MODES, "both", "`auto` takes"), rows) if rows else NOT_BOTH


def _steps(records: Records, of: str) -> str:
    pair, rows = PAIRS[of], []
    ours = {impl: f"{pair.ours}, {impl}" for impl in ("eager", *records.impls("step", of=of))}
    for batch, precision in product(BATCHES, ("tf32", "bf16")):
        where = {"batch": batch, "precision": precision}
        for impl, name in ({pair.plain: pair.plainly} | ours).items():
            cells, names = [f"batch {batch}, {WORDS[precision]}, {name}"], in_layouts(impl)
            for clock in ("device", "wall"):
                ratio = records.step_ratio(of, [impl], **where, clock=clock)
                cells += [_time(records.best(names, "step", of=of, **where, clock=clock), 1e-3), _ratio(ratio, 2)]
            peaks = [
                e["peak"] for e in records.all("step memory", of=of, **where) if e["contender"] in names and e["peak"]
            ]
            rows.append((*cells, f"{min(peaks) / 2**20:.0f}" if peaks else ""))
    over = f"/ {pair.plainly}"
    return table(("", "device", over, "wall", over, "peak memory, MiB"), rows)


def _small(records: Records) -> str:
    rows, impls = [], records.impls("small")
    for head, shape, mode, graph in product(
        HEADS, map(label, SMALL_SHAPES), ("forward", "forward + backward"), (False, True)
    ):
        where = {"head": head, "shape": shape, "mode": mode, "graph": graph}
        cells = [f"{TITLES[head]}, {mode}, {shape}{', CUDA graph' if graph else ''}"]
        cells.append(_time(records.best(EAGER, "small", **where), 1e-6))
        for impl in impls:
            ours = records.best(FUSED[impl], "small", **where)
            cells += [_time(ours, 1e-6), _ratio(records.ratio(EAGER, FUSED[impl], "small", **where))]
        rows.append(cells)
    return table(("", "eager", *(cell for impl in impls for cell in (impl, "speed-up"))), rows)


def _launches(records: Records) -> str:
    lines = []
    for entry in records.all("launches"):
        names = ", ".join(f"`{name[:60]}`" for name in entry["kernels"])
        lines.append(f"- {TITLES[entry['head']]}, {_named(entry)}, {entry['mode']}: {entry['count']}: {names}")
    return "\n".join(["Launches, the running statistics included:", "", *lines]) if lines else _no_profile()


def _no_profile() -> str:
    return "The profiler saw no kernels on this machine."


def _kernels(records: Records) -> str:
    rows, gpu = [], gpu_named(records.gpu)
    for shape, head, precision in product(map(label, KERNEL_SHAPES), TITLES, ("tf32", "bf16")):
        for contender in in_layouts(*FUSED):
            where = {"shape": shape, "head": head, "precision": precision, "contender": contender}
            for entry in records.all("kernel", **where):
                name = entry["kernel"] if len(entry["kernel"]) <= 44 else entry["kernel"][:43] + "…"
                share, moved = share_of_copy(entry), entry["bytes"]
                rows.append(
                    (
                        f"{TITLES[head]}, {shape}, {precision.replace('tf32', 'fp32')}, {_named(entry)}",
                        f"`{name}`",
                        f"{entry['times_per_call']:g}",
                        _time(entry, 1e-6),
                        f"{moved / gpu.copy * 1e6:.3g}" if moved and gpu else "",
                        f"{moved / 1e6:.0f}" if moved else "",
                        (f"{share:.0%}" if 0.3 <= share <= 1 else f"**{share:.0%}**") if share else "",
                        str(entry["registers_per_thread"] or ""),
                    )
                )
    headers = ("of the output", "kernel", "launches", "", "predicted by bytes", "MB", "share", "registers")
    return table(headers, rows) if rows else _no_profile()


def _memory(records: Records) -> str:
    rows = [
        (
            f"{TITLES[entry['head']]}, {entry['shape']}, {WORDS[entry['precision']]}, {_named(entry)}",
            f"{entry['peak'] / entry['output']:.2f}" if entry["peak"] else "",
            f"{entry['saved'] / entry['output']:.2f}",
        )
        for entry in records.all("memory")
    ]
    return table(("", "peak of forward + backward, beyond the inputs", "saved for backward"), rows)


def draw_picture(records: Records, base: Path) -> str | None:
    """Draw it beside the page; its name, or None where it cannot be drawn: the tables do not depend on it."""
    try:
        from benchmarks.gpu.plots import draw

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
    merged = Records(runs[0].facts, [p for run in runs for p in run.parts], [e for run in runs for e in run.entries])
    if len(runs) > 1:
        paths[0].write_text(merged.text())
    paths[0].with_suffix(".md").write_text(markdown(merged, draw_picture(merged, paths[0].with_suffix(""))))


if __name__ == "__main__":
    main()
