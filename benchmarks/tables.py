"""The results as Markdown."""

from collections.abc import Iterable
from math import prod
from statistics import geometric_mean, median

from tabulate import tabulate

from benchmarks.contenders import DENSE_LAYOUTS, DTYPE, FUSED, KERNELS, PEERS
from benchmarks.results import NAMES, Results, layers, targets
from benchmarks.test_generator import BATCH
from benchmarks.test_spn import SHAPES, SWEEP, label

LAYOUT = {"contiguous": "NCHW", "channels_last": "channels_last"}


def table(headers: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    headers = list(headers)
    return tabulate(rows, headers, "github", disable_numparse=True, colalign=("left", *["right"] * (len(headers) - 1)))


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:.0f}"


def named(contender: str) -> str:
    impl, layout = contender.split("-")
    return f"{impl} {LAYOUT[layout]}"


def target_table(results: Results) -> str:
    rows = []
    for target in targets(results):
        verdict = "met" if target.shortfall <= 0 else f"missed by {target.shortfall:.0%}"
        rows.append(
            [
                target.what,
                f"{'≥' if target.at_least else '≤'} {target.goal:g}",
                f"{target.median:.2f} ({target.minimum:.2f})",
                verdict,
                f"{target.floor:.2f}" if target.floor else "",
            ]
        )
    return table(["", "goal", "measured", "", "at the floor"], rows)


def layer_table(results: Results, head: str) -> str:
    rows = []
    for mode in ("forward", "forward_backward"):
        comparisons = dict(zip(SHAPES, layers(head, mode), strict=True))
        for shape, comparison in comparisons.items():
            peer, fused = results.best(comparison, PEERS), results.best(comparison, FUSED)
            rows.append(
                [
                    f"{label(shape)} {mode.replace('_', ' + ')}",
                    f"{milliseconds(results.time(comparison, peer))} {named(peer)}",
                    f"{milliseconds(results.time(comparison, fused))} {named(fused)}",
                    f"{results.speed_up(comparison):.2f} ({results.speed_up(comparison, min):.2f})",
                    milliseconds(results.time(comparison, f"gemm-{fused.split('-')[1]}")),
                    milliseconds(results.outside(comparison)),
                    milliseconds(results.time(comparison, "copy")),
                    milliseconds(results.time(comparison, "copy_fresh")),
                ]
            )
    return table(
        ["output shape", "best peer, ms", "fused, ms", "speed-up", "GEMMs, ms", "the rest", "copy", "copy, fresh"], rows
    )


def step_table(results: Results) -> str:
    rows = []
    for model, what in {"bn": "batch norm", "reference": "SPN, reference"}.items() | {
        (impl, f"SPN, {impl}") for impl in KERNELS
    }:
        rows.append(...)
    return table(["generator"], rows)
