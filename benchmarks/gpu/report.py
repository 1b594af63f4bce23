"""``python -m benchmarks.gpu.report --records DIR --results DIR``: the records as <gpu>.md, .json and .png."""

import argparse
import json
import os
import sys
from itertools import product
from pathlib import Path

import torch
import triton
from pytest_benchmark.utils import get_commit_info

import pixnorm
from benchmarks.contenders import PEERS
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
from benchmarks.gpu.records import MODES, TITLES, WORDS, Records, in_layouts
from benchmarks.gpu.section import COMPILED, EAGER, FUSED
from benchmarks.results import LAYOUTS, file_stem, provenance
from benchmarks.tables import table
from benchmarks.test_spn import HEADS, label

SPREAD = ("median", "low", "high")
NOT_BOTH = "Not both of them ran here."


def markdown(records: Records, picture: str | None) -> str:
    """The page: what ran, the goals, the measurements."""
    copy = f" A copy moves {records.copy / 1e12:.2f} TB/s." if records.copy else ""
    failures = [f"- {entry['where']}: {entry['error']}" for entry in records.all("failure")]
    sections = [
        f"# Benchmarks on {records.facts['machine']}",
        table(("", ""), records.facts.items(), "left"),
        "Medians, and in brackets the middle half of the rounds. Device times start from a cold L2; contenders took "
        f"turns. Parameters are float32, but for GConv's mixing, whose tensors have one dtype. Peers are eager PyTorch "
        f"and `torch.compile` (at {label(LAYER_SHAPES[0])} alone), each in NCHW and in channels_last; the fastest of a "
        f"kind is shown.{copy}",
        *([f"![plots]({picture})"] if picture else []),
        "## Goals",
        _goals(records),
        *(["## What failed", "\n".join(failures)] if failures else []),
        "## The run",
        table(("part", "s", "", ""), [_part(part) for part in records.parts], "left"),
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
        "has one choice for both passes, by `_preferred` in `pixnorm/ops/gconv.py`: correct it where it is the slower.",
        _mixing_choice(records),
        "## GConv: generator step, ms",
        _steps(records, "gconv_step"),
        "## Kernels: device time, µs, and share of a copy's bandwidth",
        _kernels(records),
        "## SPN: memory, in tensors of the output's size",
        _memory(records),
    ]
    return "\n\n".join(sections) + "\n"


def _goals(records: Records) -> str:
    tables = []
    for impl, found in targets(records).items():
        rows = []
        for target, remark in found:
            measured = ("", "**not measured**") if target.median is None else (f"{target.median:.2f}", target.verdict)
            rows.append((target.what, target.bound, *measured, remark))
        tables.append(table((impl, "goal", "measured", "", "beside it"), rows))
    return "\n\n".join(tables)


def _part(part: dict) -> tuple[str, ...]:
    return part["name"], str(part["seconds"]), part["state"], part["last"].strip() if part["name"] == "tests" else ""


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
    rows = []
    for shape, head, precision in product(map(label, KERNEL_SHAPES), TITLES, ("tf32", "bf16")):
        for contender in in_layouts(*FUSED):
            where = {"shape": shape, "head": head, "precision": precision, "contender": contender}
            for entry in records.all("kernel", **where):
                rate = entry["bytes"] / entry["median"] if entry["bytes"] else None
                name = entry["kernel"] if len(entry["kernel"]) <= 44 else entry["kernel"][:43] + "…"
                rows.append(
                    (
                        f"{TITLES[head]}, {shape}, {precision.replace('tf32', 'fp32')}, {_named(entry)}",
                        f"`{name}`",
                        f"{entry['times_per_call']:g}",
                        _time(entry, 1e-6),
                        f"{entry['bytes'] / 1e6:.0f}" if rate else "",
                        f"{rate / records.copy:.0%}" if rate and records.copy else "",
                        str(entry["registers_per_thread"] or ""),
                    )
                )
    headers = ("of the output", "kernel", "launches", "", "MB", "share", "registers")
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


def facts(run: dict) -> dict[str, str]:
    """The machine, the versions, the run."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU: a trial of the benchmarks for GPUs"
    told = provenance(get_commit_info(), "make gpu")
    told["versions"] += f", CUDA {torch.version.cuda}, Triton {triton.__version__}"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "machine": f"{gpu}, {os.cpu_count()} CPU cores",
        **{name: state for name, state in pixnorm.backends().items() if f"({device})" in name or name == "triton"},
        **told,
        "duration": f"{run.get('seconds', 0)} s before this report",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=Path, required=True, metavar="DIR", help="what the parts have left")
    parser.add_argument("--results", type=Path, required=True, metavar="DIR", help="folder to write to")
    arguments = parser.parse_args()

    run = json.loads((arguments.records / "parts.json").read_text())
    entries = [
        json.loads(line)
        for file in sorted(arguments.records.glob("*.jsonl"))
        for line in file.read_text().splitlines()
        if line.endswith("}")  # the last one of a part that was stopped may be cut
    ]
    records = Records(facts(run), run["parts"], entries)
    base = arguments.results / file_stem(records.facts["machine"].split(",")[0])
    arguments.results.mkdir(parents=True, exist_ok=True)
    records.save(base.with_suffix(".json"))
    picture = None
    try:
        from benchmarks.gpu.plots import draw

        draw(records, base.with_suffix(".png"))
        picture = base.name + ".png"
    except Exception as error:  # the tables do not depend on the picture
        print(f"no picture: {type(error).__name__}: {error}")
    base.with_suffix(".md").write_text(markdown(records, picture))
    tests = arguments.records / "tests.log"
    if tests.exists():
        lines = tests.read_text().splitlines()
        Path(f"{base}-tests.txt").write_text("\n".join(lines[-400:]) + "\n")
    print(_goals(records))
    for entry in records.all("failure"):
        print(f"failed: {entry['where']}: {entry['error']}")
    print(f"written: {base}.md, .json{', .png' if picture else ''}")
    sys.exit(picture is None)


if __name__ == "__main__":
    main()
