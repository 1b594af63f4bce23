"""``python -m benchmarks.report --results DIR`` checks, measures, and leaves DIR/<machine>.md, .json and .png."""

import argparse
import json
import platform
import shlex
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor
from tqdm import tqdm

import pixnorm
from benchmarks.contenders import DEVICE, KERNELS
from benchmarks.plots import draw
from benchmarks.results import Results, file_stem, provenance
from benchmarks.tables import markdown
from benchmarks.test_generator import LATENT_DIM, STEPS, generator

HERE = Path(__file__).parent


def agreement(of: str, impl: str) -> dict[str, dict[str, float]]:
    """How far the generators of a step on the reference and on an impl are apart, with equal weights.

    Returns:
        For the images and for the gradient of the worst weight, relative Euclidean distances to the reference in
        float64: of impl in float64 and in float32, and of the reference in float32.

    Raises:
        SystemExit: they are not the same function.
    """
    torch.manual_seed(0)
    z, grad = torch.randn(4, LATENT_DIM[of], device=DEVICE), torch.randn(4, 3, 32, 32, device=DEVICE)

    def run(impl: str, dtype: torch.dtype) -> list[Tensor]:
        model = generator(impl, of=of).to(dtype)
        images = model(z.to(dtype))
        gradients = torch.autograd.grad(images, list(model.parameters()), grad.to(dtype))
        return [t.detach().double() for t in (images, *gradients)]

    exact = run("reference", torch.float64)
    # The gradient of a bias before a normalisation is 0: nothing but rounding, which has no relative error.
    threshold = 1e-9 * max(t.norm() for t in exact)

    def distances(impl: str, dtype: torch.dtype) -> tuple[float, float]:
        of_images, *of_gradients = (
            ((t - e).norm() / e.norm()).item()
            for t, e in zip(run(impl, dtype), exact, strict=True)
            if e.norm() > threshold
        )
        return of_images, max(of_gradients)

    columns = {
        "float64": distances(impl, torch.float64),
        "float32": distances(impl, torch.float32),
        "float32, reference": distances("reference", torch.float32),
    }
    found = {
        what: {column: values[i] for column, values in columns.items()}
        for i, what in enumerate(("images", "gradient of the worst weight"))
    }
    for what, distance in found.items():
        print(f"{what}: " + ", ".join(f"{value:.1e} ({column})" for column, value in distance.items()))
        # In float32 a ReLU goes either way where its input is within rounding of 0, so gradients are 1e-3 off by luck.
        if not (distance["float64"] < 1e-9 and distance["float32"] < 10 * distance["float32, reference"]):
            sys.exit(f"{STEPS[of][impl]} and the reference differ: no point in timing them.")
    return found


class Progress:
    """A bar with elapsed and remaining time; what fails is printed above it."""

    def pytest_collection_finish(self, session):
        form = "{percentage:3.0f}% |{bar}| {elapsed}, {remaining} to go: {desc}"
        total = sum(self.weight(item.nodeid) for item in session.items)
        self.bar = tqdm(total=total, bar_format=form, dynamic_ncols=True, mininterval=0.5, smoothing=0)

    @staticmethod
    def weight(nodeid: str) -> int:
        """Roughly how long a case takes: most are short, but the first lap of torch.compile compiles."""
        return 30 if "lap0-compile" in nodeid else 10 if "_step" in nodeid else 1

    def pytest_runtest_logstart(self, nodeid):
        self.bar.set_description_str(nodeid.rpartition("::test_")[2], refresh=False)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.bar.write(f"{report.nodeid}\n{report.longreprtext}")
        if report.when == "teardown":
            self.bar.update(self.weight(report.nodeid))

    def pytest_sessionfinish(self):
        self.bar.close()


def measure() -> dict:
    """Run all cases; the JSON of pytest-benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        arguments = [str(HERE), "-p", "no:terminal", "-p", "no:cacheprovider", f"--benchmark-json={raw}"]
        if pytest.main(arguments, plugins=[Progress()]) != pytest.ExitCode.OK:
            sys.exit("Not every case ran.")
        return json.loads(raw.read_text())


def merge_laps(raw: dict) -> list[dict]:
    """One entry for each contender of each comparison, with the times of all its rounds."""
    cases = {}
    for case in raw["benchmarks"]:
        contender = case["params"]["contender"]
        entry = {"comparison": case["group"], "contender": contender, "seconds": [], **case["extra_info"]}
        entry = cases.setdefault((case["group"], contender), entry)
        entry["seconds"] += [float(f"{seconds:.4g}") for seconds in case["stats"]["data"]]
    return list(cases.values())


def facts(raw: dict) -> dict[str, str]:
    """The machine, the versions, the run."""
    cpu = raw["machine_info"]["cpu"]
    model = cpu.get("brand_raw", platform.machine())
    return {
        "machine": f"{model}, {cpu['count']} cores, {torch.get_num_threads()} threads",
        "kernels": pixnorm.backends()[f"native ({DEVICE})"],
        **provenance(raw["commit_info"], shlex.join(["python", "-m", "benchmarks.report", *sys.argv[1:]])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, required=True, metavar="DIR", help="folder to write to")
    folder = parser.parse_args().results

    print("Do the generators on the reference and fused agree?")
    agreed = {STEPS[of][impl]: agreement(of, impl) for of in STEPS for impl in KERNELS}
    raw = measure()
    results = Results(facts(raw), agreed, merge_laps(raw))

    cpu = raw["machine_info"]["cpu"]
    machine = f"{DEVICE} {cpu.get('brand_raw', platform.machine())} {cpu['count']} cores"
    base = folder / file_stem(machine)
    folder.mkdir(parents=True, exist_ok=True)
    results.save(base.with_suffix(".json"))
    draw(results, base.with_suffix(".png"))
    text = markdown(results, base.name + ".png")
    base.with_suffix(".md").write_text(text)
    print(text, f"\nwritten: {base}.md, .json, .png")


if __name__ == "__main__":
    main()
