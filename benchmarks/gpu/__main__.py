"""``python -m benchmarks.gpu --results DIR``: build for the GPU of this machine, test on it, measure, report.

The parts come in the order of their worth, and each takes what time it needs, up to its limit, as long as there is any.
What they find is in the results within seconds: ``<gpu>.json``, ``.md`` and ``-log.txt``. A part that fails, or loses
the GPU, does not stop the next ones. ``--plan`` prints the parts and their seconds; ``--device cpu`` tries every part
in small, for work on this without a GPU. All that a part prints is in build/gpu as well.
"""

import argparse
import signal
import sys
from pathlib import Path
from time import monotonic

import torch
from tabulate import tabulate

from benchmarks.gpu.live import Live
from benchmarks.gpu.parts import environment, fresh_folder, parts
from benchmarks.gpu.processes import FOLDER, Companion, Part
from benchmarks.records import file_stem
from benchmarks.report import draw_picture, goals_table

REPORT = 8  # seconds kept for the picture at the end
ROOT = Path(__file__).parents[2]
LEAST = 5  # seconds below which no part begins


def plan(sequence: list[Part], minutes: float) -> str:
    """The parts with their seconds, and where these minutes end."""
    rows, total = [], 0
    for part in sequence:
        total += part.seconds
        fits = "" if total + REPORT <= 60 * minutes else "in what is left, if anything"
        rows.append((part.name, part.seconds, total, fits, part.what))
    rows.append(("report", REPORT, total + REPORT, "", "the picture"))
    return tabulate(rows, ("part", "s", "sum", f"within {minutes:g} minutes", ""), tablefmt="simple")


def run(companions: list[Companion], sequence: list[Part], live: Live, device: str, end: float) -> None:
    variables = environment(device)
    # Nothing is compiled before the versions and the GPU are known.
    begin_after = next((part for part in sequence if part.name == "facts"), sequence[0])
    for part in sequence:
        if monotonic() > end - LEAST:
            part.state = "no time left"
            continue
        for companion in companions:
            companion.pause() if part.quiet else companion.go_on()
        live.hear(f"\n=== {part.name}: {part.what}\n")
        part.run(variables, end, live.hear)
        live.hear(f"=== {part.name}: {part.state}, {part.took:.0f} s of {part.seconds} planned\n")
        if part is begin_after:
            for companion in companions:
                companion.run(variables, end, live.hear)


def some_of(wanted: set[str], companions: list[Companion], sequence: list[Part]) -> tuple[list[Companion], list[Part]]:
    """The wanted parts and what they cannot do without: kernels, and what is otherwise prepared beside the tests."""
    builder, *others = sequence
    needed = builder.name == "load" or not list((ROOT / "pixnorm").glob("_cuda.*"))
    chosen = [builder] * (builder.name in wanted or needed) + [part for part in others if part.name in wanted]
    if any(part.name.startswith("tests") and part.name != "tests-large" for part in chosen):
        return companions, chosen
    names = [part.name for part in chosen]
    if "peers" in names:
        compiling = next(part for part in companions if part.name == "compiling")
        chosen.insert(names.index("peers"), Part("compiling", compiling.command, 60, 150, compiling.what))
    return [], chosen


def unused(base: Path) -> Path:
    """That stem, or one with a number: what an earlier run has found is not to be lost."""
    number, found = 1, base
    while found.with_suffix(".json").exists():
        number += 1
        found = base.with_name(f"{base.name}-{number}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a trial in small")
    parser.add_argument("--minutes", type=float, default=8, help="for all together (8)")
    parser.add_argument("--parts", metavar="A,B", help="these alone, in the order of the plan")
    parser.add_argument("--no-build", action="store_true", help="take what `make gpu-bundle` has built")
    parser.add_argument("--plan", action="store_true", help="print the parts and their seconds, and end")
    arguments = parser.parse_args()
    companions, sequence = parts(arguments.device, not arguments.no_build)
    if arguments.parts:
        wanted = set(arguments.parts.split(","))
        if unknown := wanted - {part.name for part in sequence}:
            parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(p.name for p in sequence)}")
        companions, sequence = some_of(wanted, companions, sequence)
    print(plan(sequence, arguments.minutes), flush=True)
    if arguments.plan:
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"make gpu needs a GPU, and PyTorch {torch.__version__} sees none here.")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # by way of what ends the parts
    fresh_folder()
    started = monotonic()
    machine = torch.cuda.get_device_name() if arguments.device == "cuda" else "a CPU: a trial"
    base = unused(arguments.results.absolute() / file_stem(machine))
    everything = [*sequence, *companions]
    with Live(base, everything) as live:
        try:
            run(companions, sequence, live, arguments.device, started + 60 * arguments.minutes - REPORT)
        finally:  # also when interrupted
            for part in everything:
                part.kill()
    records = live.refresh(draw_picture(live.records(), base))
    print(f"\n{goals_table(records)}\n")
    for failure in records.failures():
        print(f"failed: {failure}")
    print(
        tabulate([(part.name, f"{part.took:.0f}", part.state) for part in (*sequence, *companions)], ("part", "s", ""))
    )
    print(f"all {monotonic() - started:.0f} s; written: {base}.md, .json, .png, -log.txt; logs in {FOLDER}")
    failed = [part.name for part in everything if part.state.startswith("failed")]
    if failed or records.failures():
        sys.exit(f"make gpu: not everything went well: {', '.join(failed) or 'see the failures above'}")


if __name__ == "__main__":
    main()
