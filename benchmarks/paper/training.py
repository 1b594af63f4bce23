"""``python -m benchmarks.paper.training --results DIR`` trains small generators with each norm and each convolution,
fused and in plain PyTorch, on Fashion-MNIST (else on digits), and writes DIR/training.md, .json, .png and gallery.png.

Replacing eager layers should change nothing but time. Runs are those of ``pixnorm-train``, in a folder of their own,
one process for each core; what is finished there is not done again, and what was interrupted goes on.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pytest_benchmark.utils import get_commit_info
from tqdm import tqdm

from benchmarks.paper.training_report import Agreement, Curve, Demonstration, write
from benchmarks.records import provenance
from pixnorm.training import checkpoint
from pixnorm.training.cli import UsageError
from pixnorm.training.data import FASHION_MNIST, ImageDataset, load_dataset
from pixnorm.training.features import default_cache, feature_network
from pixnorm.training.processes import Processes
from pixnorm.training.recipes import RECIPES, Recipe
from pixnorm.training.sampling import load_sampler
from pixnorm.training.settings import Settings
from pixnorm.training.trainer import Trainer

# What is reduced for two cores; the loss, Adam's betas and the networks' shapes are the papers'.
BASE = replace(
    RECIPES["cifar-spn"],
    channels_g=32,
    channels_d=32,
    latent_dim=32,
    lr_g=1e-3,
    lr_d=1e-3,
    d_steps=1,
    batch_d=32,
    batch_g=32,
)
SCORE_SAMPLES, SCORES = 2000, 16
SAMPLES = 16  # in the picture, of a kind
ROUNDS = 15  # of the measurement of time


@dataclass(frozen=True)
class Kind:
    """What is compared: a norm or a convolution.

    Attributes:
        values: of the recipe.
        eager: those of the plain form that differ; None: there is no run of it.
    """

    values: dict[str, object]
    eager: dict[str, object] | None = None

    def recipe(self, eager: bool, steps: int) -> Recipe:
        values = self.values | (self.eager or {} if eager else {})
        return replace(BASE, **values, steps=steps, decay_steps=steps // 2)


KINDS = {
    "BN": Kind({"norm": "fused_bn"}, {"norm": "bn"}),
    "SPN": Kind({"norm": "spn"}, {}),
    "Conv": Kind({"norm": "bigbn", "conv": "conv"}),
    "GConv": Kind({"norm": "bigbn", "conv": "gconv"}, {}),
    "cBN": Kind({"norm": "cbn", "conditional": True}),
    "cSPN": Kind({"norm": "cspn", "conditional": True}, {}),
}


def forms(kind: str) -> tuple[str, ...]:
    """Of which there are runs."""
    return ("fused",) if KINDS[kind].eager is None else ("fused", "eager")


@dataclass(frozen=True)
class Run:
    """One training."""

    kind: str
    form: str
    seed: int
    steps: int
    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / f"{self.kind}-{self.form}-{self.seed}"

    @property
    def finished(self) -> bool:
        return checkpoint.path_of(self.out, self.steps).exists()

    def command(self, data: str) -> list[str]:
        """Of pixnorm-train."""
        recipe = KINDS[self.kind].recipe(self.form == "eager", self.steps)
        base = RECIPES["cifar-spn"]
        changed = {name: value for name, value in vars(recipe).items() if value != getattr(base, name)}
        settings = {
            "data": data,
            "out": self.out,
            "seed": self.seed,
            "impl": "auto" if self.form == "fused" else "reference",
            "channels_last": True,
            "resume": True,
            "tensorboard": False,
            "sample_every": 0,
            "log_every": 10,
            "keep": 1,
            "checkpoint_every": max(1, self.steps // SCORES),
            "score_every": max(1, self.steps // SCORES),
            "score_samples": SCORE_SAMPLES,
        }
        options = []
        for name, value in {**changed, **settings}.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                options.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                options += [f"--{flag}", str(value)]
        return [sys.executable, "-m", "pixnorm.train", "cifar-spn", *options]

    def train(self, data: str) -> None:
        """With one thread.

        Raises:
            RuntimeError: with the last line of what it printed.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        with (self.out / "output.txt").open("a") as output:
            done = subprocess.run(self.command(data), stdout=output, stderr=output, env=os.environ | threads)
        if done.returncode:
            last = (self.out / "output.txt").read_text().splitlines()[-1]
            raise RuntimeError(f"{self.out.name}: {last}")


def runs_of(seeds: int, steps: int, folder: Path) -> Iterator[Run]:
    for form in ("fused", "eager"):
        for seed in range(seeds):
            yield from (Run(kind, form, seed, steps, folder) for kind in KINDS if form in forms(kind))


def train_all(runs: Sequence[Run], data: str) -> None:
    """As many at a time as there are cores."""
    left = [run for run in runs if not run.finished]
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(runs), initial=len(runs) - len(left)) as bar:
        futures = [pool.submit(run.train, data) for run in left]
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def trainer_of(kind: str, form: str, data: ImageDataset, **settings: object) -> Trainer:
    """That nothing is written by."""
    recipe = KINDS[kind].recipe(form == "eager", steps=10_000)
    impl = "auto" if form == "fused" else "reference"
    options = Settings(Path(os.devnull) / "none", impl=impl, channels_last=True, **settings)
    return Trainer(recipe, data, options, Processes(0, 1, torch.device("cpu")))


def agreement(kind: str, data: ImageDataset, steps: int = 20) -> Agreement:
    """How far both forms are from each other after some steps from the same seed in float64: the largest difference of
    a loss, and of a weight, over the largest magnitude of either."""
    losses, weights = [], []
    for form in ("fused", "eager"):
        trainer = trainer_of(kind, form, data, dtype="float64")
        losses.append(torch.stack([trainer.train_step()["loss_g"] for _ in range(steps)]))
        weights.append(torch.cat([p.detach().flatten() for p in trainer.generator.parameters()]))
    return Agreement(kind, steps, *(float((a - b).abs().max() / b.abs().max()) for a, b in (losses, weights)))


def time_per_step(data: ImageDataset) -> dict[tuple[str, str], list[float]]:
    """Seconds of steps of each kind and form, in turn, so that what else the machine does hits all alike."""
    trainers = {(kind, form): trainer_of(kind, form, data) for kind in KINDS for form in forms(kind)}
    found: dict[tuple[str, str], list[float]] = {key: [] for key in trainers}
    for turn in tqdm(range(ROUNDS + 2), desc="time per step"):
        for key, trainer in trainers.items():
            start = time.perf_counter()
            trainer.train_step()
            if turn >= 2:  # the first ones allocate
                found[key].append(time.perf_counter() - start)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.training", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), metavar="DIR")
    parser.add_argument("--folder", type=Path, default=Path("build/train-demo"), help="of the runs (%(default)s)")
    parser.add_argument("--data", help="fashion-mnist or digits, see pixnorm-train (the former, if it is there)")
    parser.add_argument("--steps", type=int, default=800, help="of each run (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (%(default)s)")
    found = parser.parse_args(arguments)
    name = found.data or ("fashion-mnist" if FASHION_MNIST.exists() else "digits")
    try:
        data = load_dataset(name, resolution=BASE.resolution)
    except UsageError as error:
        parser.error(str(error))
    found.results.mkdir(parents=True, exist_ok=True)
    command = ["python", "-m", "benchmarks.paper.training", *(sys.argv[1:] if arguments is None else arguments)]

    print(f"runs in {found.folder}; the classifier of the scores first")
    classifier = feature_network("classifier", data, cache=default_cache())
    runs = list(runs_of(found.seeds, found.steps, found.folder))
    train_all(runs, name)
    seconds = time_per_step(data)
    demonstration = Demonstration(
        provenance(get_commit_info(), shlex.join(command)),
        data.name,
        BASE,
        classifier.accuracy,
        SCORE_SAMPLES,
        [Curve.read(run.kind, run.form, run.seed, run.out) for run in runs],
        seconds,
        [agreement(kind, data) for kind in KINDS if "eager" in forms(kind)],
        {
            kind: load_sampler(Run(kind, "fused", 0, found.steps, found.folder).out).draw(
                SAMPLES,
                0,
                0,
                (torch.arange(SAMPLES) % data.num_classes,) if KINDS[kind].values.get("conditional") else (),
            )
            for kind in KINDS
        },
    )
    write(demonstration, found.results)
    print(f"written: {found.results / 'training'}.md, .json, .png and gallery.png")


if __name__ == "__main__":
    main()
