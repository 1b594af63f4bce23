"""``python -m benchmarks.gpu.report --records DIR --results DIR``: the records as <gpu>.md, .json and .png."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch
import triton
from pytest_benchmark.utils import get_commit_info

import pixnorm
from benchmarks.contenders import PEERS
from benchmarks.gpu.cases import BATCHES, EAGER, FUSED, KERNEL_SHAPES, LAYER_SHAPES, PRECISIONS, SMALL_SHAPES
from benchmarks.results import Target, file_stem, json_by_line, provenance
from benchmarks.tables import LAYOUTS, table
from benchmarks.test_spn import HEADS, label

TITLES = {"plain": "SPN", "up": "up → SPN → ReLU"}
WORDS = {"tf32": "fp32 with TF32", "fp32": "fp32 strict", "bf16": "bf16", "fp16": "fp16"}
MODES = ("forward", "backward")
LARGE = 32 << 20  # bytes of the largest tensor that a kernel touches, from which on its bandwidth has a goal
# Least share of a measured copy's bandwidth: float32, bfloat16.
SHARES = {
    "spn_statistics_kernel": (0.90, 0.90),
    "spn_fwd_modulate_kernel": (0.88, 0.85),
    "spn_bwd_reduce_kernel": (0.85, 0.75),
    "spn_bwd_apply_kernel": (0.88, 0.82),
}
# Its bandwidth outruns its instructions in bfloat16.
SHARES_H200 = SHARES | {
    "spn_fwd_modulate_kernel": (0.88, 0.70),
    "spn_bwd_reduce_kernel": (0.70, 0.45),
    "spn_bwd_apply_kernel": (0.85, 0.60),
}
SPREAD = ("median", "low", "high")


class Records:
    """What was found, and figures of it; a figure of what was not found is None.

    Attributes:
        facts: of the machine, the versions and the run, in words.
        parts: name, seconds, state and last line of each part of the run.
        entries: the records, see ``cases.py``.
    """

    def __init__(self, facts: dict[str, str], parts: list[dict], entries: list[dict]):
        self.facts, self.parts, self.entries = facts, parts, entries

    @classmethod
    def load(cls, path: Path) -> "Records":
        return cls(**json.loads(path.read_text()))

    def save(self, path: Path) -> None:
        path.write_text(json_by_line({"facts": self.facts, "parts": self.parts}, "entries", self.entries))

    def all(self, what: str, **where) -> list[dict]:
        return [
            entry
            for entry in self.entries
            if entry["what"] == what and all(entry.get(key) == value for key, value in where.items())
        ]

    def best(self, contenders: Iterable[str], what: str, **where) -> dict | None:
        """The fastest of several contenders, by the median."""
        found = [entry for entry in self.all(what, **where) if entry["contender"] in contenders]
        return min(found, key=lambda entry: entry["median"], default=None)

    def ratio(self, slower: Iterable[str], faster: Iterable[str], what: str, **where) -> float | None:
        """How often the time of the best of some fits that of the best of others."""
        a, b = (self.best(contenders, what, **where) for contenders in (slower, faster))
        return a["median"] / b["median"] if a and b else None

    def speed_up(self, impl: str, **where) -> float | None:
        """Of an impl over the best peer."""
        return self.ratio(PEERS, FUSED[impl], "layer", **where)

    @property
    def impls(self) -> list[str]:
        """The fused ones that ran; with none, the native one, which should have."""
        ran = {entry.get("contender") for entry in self.entries}
        return [impl for impl, contenders in FUSED.items() if ran.intersection(contenders)] or ["native"]

    @property
    def copy(self) -> float | None:
        return next((entry["bandwidth"] for entry in self.all("copy")), None)

    def shares(self, impl: str, kernel: str, precision: str, **where) -> list[tuple[dict, float]]:
        """Of each time of an impl's kernel on large tensors: the record, and its share of a copy's bandwidth."""
        found = []
        for entry in self.all("kernel", kernel=kernel, precision=precision, **where):
            if entry["contender"] not in FUSED[impl]:
                continue
            itemsize = PRECISIONS[precision][0].itemsize
            elements = torch.Size(map(int, entry["shape"].split("x"))).numel()
            quarter = 4 if entry["head"] == "up" and kernel == "spn_statistics_kernel" else 1
            if elements * itemsize // quarter >= LARGE and self.copy:
                found.append((entry, entry["bytes"] / entry["median"] / self.copy))
        return found


def targets(records: Records) -> dict[str, list[tuple[Target, str]]]:
    """By impl: each goal, its ``median`` None where nothing was measured, and a remark."""
    return {"native": _native_targets(records), "triton": _triton_targets(records)}


def _native_targets(records: Records) -> list[tuple[Target, str]]:
    found: list[tuple[Target, str]] = []
    native = FUSED["native"]

    def add(what: str, goal: float, at_least: bool, measured: float | None, remark: str = "") -> None:
        found.append((Target(what, goal, at_least, measured), remark))

    on_h200 = is_h200(records)
    for head, mode, precision in product(HEADS, MODES, WORDS):
        goal = 8 if head == "up" else 3 if on_h200 and (mode, precision) == ("backward", "bf16") else 4
        where = {"head": head, "mode": mode, "precision": precision}
        found.append(_by_shape(f"{_named_case(**where)}: speed-up", goal, partial(records.speed_up, "native", **where)))
    for kernel, goals in share_goals(records).items():
        for precision, goal in zip(("tf32", "bf16"), goals, strict=True):
            shares = [share for _, share in records.shares("native", kernel, precision, head="plain")]
            remark = f"median {median(shares):.2f}, best {max(shares):.2f}" if shares else ""
            what = f"{kernel}, {precision.replace('tf32', 'fp32')}: bandwidth over a copy's, worst"
            add(what, goal, True, min(shares, default=None), remark)
    for batch in BATCHES:
        for precision in ("tf32", "bf16"):
            ratios = {clock: step_ratio(records, "native", batch, precision, clock) for clock in ("device", "wall")}
            for clock, ratio in ratios.items():
                what = f"generator step, batch {batch}, {WORDS[precision]}: {clock} time over batch norm's"
                eager = step_ratio(records, "eager", batch, precision, clock)
                add(what, 1, False, ratio, f"eager SPN {eager:.2f}" if eager else "")
    for mode, goal in (("forward", 4), ("backward", 6)):
        counts = [e["count"] for e in records.all("launches", mode=mode) if e["contender"] in native]
        add(f"small shapes, {mode}: launches, most", goal, False, max(counts, default=None))
    for mode in ("forward", "forward + backward"):
        ratios = [
            records.ratio(EAGER, native, "small", head="plain", shape=label(shape), mode=mode, graph=False)
            for shape in SMALL_SHAPES
        ]
        ratios = [ratio for ratio in ratios if ratio]
        remark = "each shape: " + ", ".join(f"{ratio:.1f}" for ratio in ratios)
        add(f"small shapes, {mode}: wall time, speed-up over eager, worst", 4, True, min(ratios, default=None), remark)
    for head, goal in (("plain", 1), ("up", 0.25)):
        kept = [e["saved"] / e["output"] for e in records.all("memory", head=head) if e["contender"] in native]
        measured = round(max(kept), 2) if kept else None  # beside the tensor there are four vectors
        add(f"{TITLES[head]}: saved for backward, in tensors of the output's size", goal, False, measured)
    return found


def _triton_targets(records: Records) -> list[tuple[Target, str]]:
    found = []
    for head, mode in product(HEADS, MODES):
        where = {"head": head, "mode": mode, "precision": "tf32"}
        found.append(_by_shape(f"{_named_case(**where)}: speed-up", 3, partial(records.speed_up, "triton", **where)))
    for head, mode, precision in product(HEADS, MODES, ("tf32", "bf16")):
        where = {"head": head, "mode": mode, "precision": precision}
        speed = partial(records.ratio, FUSED["native"], FUSED["triton"], "layer", **where)
        found.append(_by_shape(f"{_named_case(**where)}: speed over native's", 0.8, speed))
    return found


def _named_case(head: str, mode: str, precision: str) -> str:
    return f"{TITLES[head]}, {mode}, {WORDS[precision]}"


def _by_shape(what: str, goal: float, figure: Callable[..., float | None]) -> tuple[Target, str]:
    """A goal for a figure of the main shape, and beside it the other shapes'."""
    (_, main), *others = ((shape, figure(shape=shape)) for shape in map(label, LAYER_SHAPES))
    remark = ", ".join(f"{value:.2f} at {shape}" for shape, value in others if value)
    return Target(what, goal, True, main), remark


def is_h200(records: Records) -> bool:
    return "H200" in records.facts["machine"]


def share_goals(records: Records) -> dict[str, tuple[float, float]]:
    return SHARES_H200 if is_h200(records) else SHARES


def step_ratio(records: Records, norm: str, batch: int, precision: str, clock: str) -> float | None:
    of, bn = ([f"{name}-{layout}" for layout in LAYOUTS] for name in (norm, "bn"))
    return records.ratio(of, bn, "step", batch=batch, precision=precision, clock=clock)


def markdown(records: Records, picture: str | None) -> str:
    """The page: what ran, the goals, the measurements."""
    copy = f" A copy moves {records.copy / 1e12:.2f} TB/s." if records.copy else ""
    failures = [f"- {entry['where']}: {entry['error']}" for entry in records.all("failure")]
    sections = [
        f"# Benchmarks on {records.facts['machine']}",
        table(("", ""), records.facts.items(), "left"),
        "Medians, and in brackets the middle half of the rounds. Device times start from a cold L2; contenders took "
        f"turns. Parameters are float32. Peers are eager PyTorch and `torch.compile` (at {label(LAYER_SHAPES[0])} "
        f"alone), each in NCHW and in channels_last; the fastest of a kind is shown.{copy}",
        *([f"![plots]({picture})"] if picture else []),
        "## Goals",
        _goals(records),
        *(["## What failed", "\n".join(failures)] if failures else []),
        "## The run",
        table(("part", "s", "", ""), [_part(part) for part in records.parts], "left"),
        "## Layers: device time, µs",
        _layers(records),
        "## Which is faster: device time of triton, that of native being 1",
        "In brackets where the middle halves of the rounds overlap.",
        _faster(records),
        "## Generator step: ms",
        _steps(records),
        "## Small shapes: wall time per call, µs",
        _small(records),
        _launches(records),
        "## Kernels: device time, µs, and share of a copy's bandwidth",
        _kernels(records),
        "## Memory, in tensors of the output's size",
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
    rows = []
    for head, mode, shape, precision in product(HEADS, MODES, map(label, LAYER_SHAPES), WORDS):
        where = {"head": head, "shape": shape, "precision": precision, "mode": mode}
        peer = records.best(PEERS, "layer", **where)
        cells = [f"{TITLES[head]}, {mode}, {shape}, {WORDS[precision]}", _named(peer), _time(peer, 1e-6)]
        for impl in records.impls:
            ours = records.best(FUSED[impl], "layer", **where)
            cells += [_layout(ours), _time(ours, 1e-6), _ratio(records.speed_up(impl, **where))]
        rows.append(cells)
    headers = (cell for impl in records.impls for cell in (impl, "", "speed-up"))
    return table(("of the output", "best peer", "", *headers), rows)


def _faster(records: Records) -> str:
    rows = []
    for head, mode, shape, layout in product(HEADS, MODES, map(label, LAYER_SHAPES), LAYOUTS):
        cells = []
        for precision in WORDS:
            where = {"head": head, "shape": shape, "precision": precision, "mode": mode}
            native, triton = (records.best([f"{impl}-{layout}"], "layer", **where) for impl in ("native", "triton"))
            cells.append(_winner(native, triton) if native and triton else "")
        if any(cells):
            rows.append((f"{TITLES[head]}, {mode}, {shape}, {LAYOUTS[layout]}", *cells))
    return table(("of the output", *WORDS.values()), rows) if rows else "Not both of them ran here."


def _winner(native: dict, triton: dict) -> str:
    ratio = triton["median"] / native["median"]
    clear = triton["low"] > native["high"] or native["low"] > triton["high"]
    name = "triton" if ratio < 1 else "native"
    return f"{ratio:.2f} {name if clear else f'({name})'}"


def _steps(records: Records) -> str:
    rows = []
    for batch in BATCHES:
        for precision in ("tf32", "bf16"):
            for norm, name in (("bn", "batch norm"), *((norm, f"SPN, {norm}") for norm in ("eager", *records.impls))):
                cells = [f"batch {batch}, {WORDS[precision]}, {name}"]
                for clock in ("device", "wall"):
                    names = [f"{norm}-{layout}" for layout in LAYOUTS]
                    where = {"batch": batch, "precision": precision, "clock": clock}
                    ratio = step_ratio(records, norm, batch, precision, clock)
                    cells += [_time(records.best(names, "step", **where), 1e-3), _ratio(ratio, 2)]
                peaks = records.all("step memory", batch=batch, precision=precision)
                peaks = [e["peak"] for e in peaks if e["contender"].startswith(f"{norm}-") and e["peak"]]
                rows.append((*cells, f"{min(peaks) / 2**20:.0f}" if peaks else ""))
    return table(("", "device", "/ batch norm", "wall", "/ batch norm", "peak memory, MiB"), rows)


def _small(records: Records) -> str:
    rows = []
    for head, shape, mode, graph in product(
        HEADS, map(label, SMALL_SHAPES), ("forward", "forward + backward"), (False, True)
    ):
        where = {"head": head, "shape": shape, "mode": mode, "graph": graph}
        cells = [f"{TITLES[head]}, {mode}, {shape}{', CUDA graph' if graph else ''}"]
        cells.append(_time(records.best(EAGER, "small", **where), 1e-6))
        for impl in records.impls:
            ours = records.best(FUSED[impl], "small", **where)
            cells += [_time(ours, 1e-6), _ratio(records.ratio(EAGER, FUSED[impl], "small", **where))]
        rows.append(cells)
    return table(("", "eager", *(cell for impl in records.impls for cell in (impl, "speed-up"))), rows)


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
    for shape in map(label, KERNEL_SHAPES):
        for head in HEADS:
            for precision in ("tf32", "bf16"):
                for contender in (name for impl in records.impls for name in FUSED[impl]):
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
