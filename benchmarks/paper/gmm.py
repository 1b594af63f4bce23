"""``python -m benchmarks.paper.gmm --results DIR`` trains eight Gaussians, and leaves DIR/gmm.md, .json and .png."""

import argparse
import multiprocessing
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from pytest_benchmark.utils import get_commit_info
from tqdm import tqdm

from benchmarks.paper.gaussians import (
    BATCH,
    BETAS,
    CENTRES,
    CHECKPOINTS,
    GOOD_OF_REAL,
    HIDDEN,
    LAYERS,
    MODES,
    RADIUS,
    RATE_D,
    RATE_G,
    SAMPLES,
    STD,
    Run,
    checkpoints,
    perceptron,
    train,
)
from benchmarks.plots import BLUE, GREY, ORANGE, STYLE
from benchmarks.records import json_by_line, provenance
from benchmarks.report import table

SHOWN = (0, 1, 3, 5, 7, 9)  # of the checkpoints, in the tables and in the picture
COLOURS = dict(zip(LAYERS, (ORANGE, BLUE), strict=True))

# ---- all runs, in processes of one thread each: their steps are too small for more ----


def _start_worker(passed) -> None:
    """Before its first run; ``passed`` counts the iterations of all workers."""
    global _passed
    _passed = passed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    torch.set_num_threads(1)


def _tick(iterations: int) -> None:
    with _passed.get_lock():
        _passed.value += iterations


def _samples(kind: str, seed: int, iterations: int):
    return train(kind, seed, iterations, _tick).numpy()  # a tensor would come as a file that the worker must keep open


def train_all(seeds: int, iterations: int) -> list[Run]:
    """The runs of all kinds and seeds, kind by kind."""
    named = list(product(LAYERS, range(seeds)))
    context = multiprocessing.get_context("spawn")
    passed = context.Value("q")
    workers = min(torch.get_num_threads(), len(named))
    bar = tqdm(total=len(named) * iterations, desc=f"{len(named)} GANs", unit=" iterations", dynamic_ncols=True)
    with bar, context.Pool(workers, _start_worker, (passed,)) as pool:
        processes = multiprocessing.active_children()
        result = pool.starmap_async(_samples, [(*run, iterations) for run in named], chunksize=1)
        while not result.ready():
            result.wait(0.5)
            bar.update(passed.value - bar.n)
            if not all(process.is_alive() for process in processes):  # the pool would wait for it for ever
                raise RuntimeError("a process that trained a GAN has died")
        bar.update(passed.value - bar.n)
        return [Run(*run, torch.from_numpy(samples)) for run, samples in zip(named, result.get(), strict=True)]


# ---- what came of it ----


def markdown(runs: Sequence[Run], iterations: int, facts: dict[str, str]) -> str:
    """The page: what ran, the picture, the figures."""
    at = [f"{checkpoints(iterations)[i]:,}" for i in SHOWN]
    parts = [
        "# Eight Gaussians, with plain and with generative layers",
        table(("", ""), facts.items(), "left"),
        "Fig. 4 of the GConv paper (arXiv 2111.15171): a fully connected GAN learns eight Gaussians. Trained twice "
        "there, the generator of plain layers suffers from mode collapse, and the one of generative layers finds all "
        "modes. The paper states no widths, rates or losses for it, so these are customary ones: "
        f"ring of radius {RADIUS:g}, standard deviation {STD:g}; generator and discriminator with two hidden layers of "
        f"{HIDDEN} and ReLU; non-saturating cross-entropy; Adam with betas {BETAS[0]:g} and {BETAS[1]:g}, rates "
        f"{RATE_G:g} (generator) and {RATE_D:g} (discriminator); batch {BATCH}. The generator's hidden layers are of "
        "the kind named, and its output layer is plain.",
        "![samples over training](gmm.png)",
        "## Summary",
        _summary(runs),
        "A sample is good if it lies within 3 standard deviations of a mode, and a mode is covered if one of "
        f"{SAMPLES:,} samples is that near. Samples of the real data cover {MODES}, and {GOOD_OF_REAL:.3f} of them are "
        f"good. Means over the seeds, in brackets the least and the greatest; later half: over the last "
        f"{CHECKPOINTS // 2} of {CHECKPOINTS} checkpoints too.",
        f"## Modes covered, of {MODES}, after so many iterations",
        _over_training(runs, at, lambda run: run.modes, "{:.0f}", "{:.1f}"),
        "## Share of good samples",
        _over_training(runs, at, lambda run: run.good, "{:.3f}", "{:.3f}"),
    ]
    return "\n\n".join(parts) + "\n"


def _of(runs: Sequence[Run], kind: str) -> list[Run]:
    return [run for run in runs if run.kind == kind]


def parameters(kind: str) -> int:
    """Of the generator."""
    return sum(p.numel() for p in perceptron(2, LAYERS[kind]).parameters())


def _summary(runs: Sequence[Run]) -> str:
    def spread(values: list[float], form: str) -> str:
        return f"{mean(values):{form}} ({min(values):{form}} – {max(values):{form}})"

    later = slice(CHECKPOINTS // 2, None)
    figures = {
        "parameters": lambda of: f"{parameters(of[0].kind):,}",
        "runs that end with all modes": lambda of: f"{sum(run.modes[-1] == MODES for run in of)} of {len(of)}",
        "modes at the end": lambda of: spread([run.modes[-1] for run in of], ".1f"),
        "modes, later half": lambda of: spread([mean(run.modes[later]) for run in of], ".1f"),
        "good samples at the end": lambda of: spread([run.good[-1] for run in of], ".3f"),
        "good samples, later half": lambda of: spread([mean(run.good[later]) for run in of], ".3f"),
    }
    return table(("", *LAYERS), [(name, *(of(_of(runs, kind)) for kind in LAYERS)) for name, of in figures.items()])


def _over_training(runs: Sequence[Run], at: list[str], figure: Callable[[Run], list], each: str, average: str) -> str:
    rows = []
    for kind in LAYERS:
        values = [[figure(run)[i] for i in SHOWN] for run in _of(runs, kind)]
        rows += [(f"{kind}, seed {seed}", *map(each.format, row)) for seed, row in enumerate(values)]
        rows.append((f"{kind}, mean", *(average.format(mean(column)) for column in zip(*values, strict=True))))
    return table(("", *at), rows)


def raw_numbers(runs: Sequence[Run], iterations: int, facts: dict[str, str]) -> str:
    """JSON, one checkpoint of one run a line."""
    entries = [
        {"kind": run.kind, "seed": run.seed, "iteration": at, "modes": modes, "good": good, "in_modes": counts}
        for run in runs
        for at, modes, good, counts in zip(checkpoints(iterations), run.modes, run.good, run.in_modes, strict=True)
    ]
    return json_by_line({"facts": facts, "samples": SAMPLES}, "checkpoints", entries)


def draw(runs: Sequence[Run], iterations: int, path: Path) -> None:
    """Samples over training: a row for each of the first two runs of a kind, a column for each checkpoint."""
    matplotlib.use("agg")
    rows = [run for kind in LAYERS for run in _of(runs, kind)[:2]]
    with plt.rc_context(STYLE):
        size = 1.7 * len(SHOWN) + 0.9, 1.7 * len(rows) + 0.8
        figure, axes = plt.subplots(len(rows), len(SHOWN), figsize=size, layout="constrained", squeeze=False)
        figure.suptitle(
            "Samples over training; circles mark the modes, and are wider than 3 standard deviations", x=0.01, ha="left"
        )
        for run, row in zip(rows, axes, strict=True):
            for i, axis in zip(SHOWN, row, strict=True):
                _scatter(axis, run, i)
            row[0].set_ylabel(f"{run.kind}, seed {run.seed}", fontweight="bold", color=COLOURS[run.kind])
        for i, axis in zip(SHOWN, axes[0], strict=True):
            axis.set_title(f"{checkpoints(iterations)[i]:,}" + (" iterations" if i == SHOWN[0] else ""), loc="center")
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _scatter(axis: Axes, run: Run, checkpoint: int) -> None:
    axis.scatter(*CENTRES.T, s=55, facecolors="none", edgecolors=GREY, linewidths=0.8)
    axis.scatter(*run.samples[checkpoint].T, s=1.5, color=COLOURS[run.kind], alpha=0.35, linewidths=0)
    reach = 1.5 * RADIUS
    axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
    axis.spines[:].set(visible=True, color=GREY, linewidth=0.6)
    axis.set_xlabel(
        f"{run.modes[checkpoint]} of {MODES} modes, {run.good[checkpoint]:.0%} good", fontsize=7.5, labelpad=2
    )


# ---- the command ----


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    def at_least(least: int, text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number, {least} or more, got {text!r}")
        return int(text)

    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.gmm", description=__doc__)
    parser.add_argument(
        "--iterations",
        type=partial(at_least, CHECKPOINTS),
        default=25_000,
        metavar="N",
        help="of each training (%(default)s)",
    )
    parser.add_argument(
        "--seeds", type=partial(at_least, 1), default=4, metavar="N", help="how many runs of each kind (%(default)s)"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("benchmarks/results"),
        metavar="DIR",
        help="folder to write to (%(default)s)",
    )
    found = parser.parse_args(arguments)
    try:
        found.results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --results: {error}")
    if not os.access(found.results, os.W_OK):
        parser.error(f"argument --results: cannot write to {found.results}")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    found = _arguments(arguments)
    command = ["python", "-m", "benchmarks.paper.gmm", *(sys.argv[1:] if arguments is None else arguments)]
    start = time.monotonic()
    runs = train_all(found.seeds, found.iterations)
    facts = provenance(get_commit_info(), shlex.join(command))
    facts["duration"] = (
        f"{(time.monotonic() - start) / 60:.1f} minutes for {len(runs)} runs of {found.iterations:,} iterations"
    )

    text = markdown(runs, found.iterations, facts)
    (found.results / "gmm.json").write_text(raw_numbers(runs, found.iterations, facts))
    (found.results / "gmm.md").write_text(text)
    draw(runs, found.iterations, found.results / "gmm.png")
    print(text, f"\nwritten: {found.results / 'gmm'}.md, .json, .png")


if __name__ == "__main__":
    main()
