"""``python -m benchmarks --results DIR`` checks and measures on the CPU; it writes DIR/<machine>.md, .json and .png."""

import argparse
import json
import platform
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from tqdm import tqdm

import pixnorm
from benchmarks.contenders import cache_bytes, generator
from benchmarks.ops import OPS
from benchmarks.records import Records, file_stem, provenance
from benchmarks.registry import Op
from benchmarks.report import draw_picture, markdown
from benchmarks.stopwatch import Spread
from benchmarks.test_cpu import DEVICE, FUSED
from pixnorm._C import cpu_capability

HERE = Path(__file__).parent


def agreement(op: Op, impl: str) -> Iterator[dict]:
    """Records of how far a generator on the reference and one on an impl are apart, with equal weights.

    They are of the images and of the gradient of the worst weight: Euclidean distances relative to the reference in
    float64, of the impl in float64 and in float32, and of the reference in float32.

    Raises:
        SystemExit: they are not the same function.
    """
    torch.manual_seed(0)
    z, grad = torch.randn(4, op.step.latent_dim), torch.randn(4, 3, 32, 32)

    def run(impl: str, dtype: torch.dtype) -> list[Tensor]:
        model = generator(op.step, impl).to(dtype)
        images = model(z.to(dtype))
        gradients = torch.autograd.grad(images, list(model.parameters()), grad.to(dtype))
        return [t.detach().double() for t in (images, *gradients)]

    exact = run("eager", torch.float64)
    # The gradient of a bias before a normalisation is 0 but for rounding, which has no relative error.
    threshold = 1e-9 * max(t.norm() for t in exact)

    def distances(impl: str, dtype: torch.dtype) -> tuple[float, float]:
        pairs = [(t, e) for t, e in zip(run(impl, dtype), exact, strict=True) if e.norm() > threshold]
        of_images, *of_gradients = (((t - e).norm() / e.norm()).item() for t, e in pairs)
        return of_images, max(of_gradients)

    runs = {"float64": (impl, torch.float64), "float32": (impl, torch.float32), "reference": ("eager", torch.float32)}
    found = {key: distances(*of) for key, of in runs.items()}
    for i, tensor in enumerate(("images", "gradient of the worst weight")):
        distance = {key: values[i] for key, values in found.items()}
        print(f"{op}, {impl}, {tensor}: " + ", ".join(f"{value:.1e} ({key})" for key, value in distance.items()))
        # In float32 a ReLU goes either way where its input is within rounding of 0: a gradient may be 1e-3 off by luck.
        allowed = max(10 * distance["reference"], 1e-2 if i else 0)
        if not (distance["float64"] < 1e-9 and distance["float32"] < allowed):
            sys.exit(f"{op} on {impl} and the reference differ: no point in timing them.")
        yield {"what": "agreement", "of": f"{op.step.title}, {impl}", "tensor": tensor, **distance}


class Progress:
    """A bar with elapsed and remaining time; failures are printed above it."""

    def pytest_collection_finish(self, session):
        form = "{percentage:3.0f}% |{bar}| {elapsed}, {remaining} to go: {desc}"
        total = sum(self.weight(item.nodeid) for item in session.items)
        self.bar = tqdm(total=total, bar_format=form, dynamic_ncols=True, mininterval=0.5, smoothing=0)

    @staticmethod
    def weight(nodeid: str) -> int:
        """Roughly how long a case takes: most are short, but the first lap of torch.compile compiles."""
        return 30 if "lap0-compile" in nodeid else 10 if "test_step" in nodeid else 1

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


def entries(raw: dict) -> list[dict]:
    """One record for each contender of each comparison, with the times of all its rounds; and of the memory saved."""
    laps: dict[str, list[dict]] = {}
    for case in raw["benchmarks"]:
        of = {key: value for key, value in case["extra_info"].items() if key not in ("saved", "output", "kept")}
        laps.setdefault(json.dumps(of), []).append(case)
    found = []
    for of, cases in laps.items():
        seconds = [float(f"{second:.4g}") for case in cases for second in case["stats"]["data"]]
        record = json.loads(of) | Spread.of(seconds)._asdict() | {"seconds": seconds}
        memory = {key: cases[0]["extra_info"][key] for key in ("saved", "output") if key in cases[0]["extra_info"]}
        found.append(record | (memory if record["what"] == "sweep" else {}))
        keys = ("op", "head", "shape", "precision", "contender")
        if "kept" in cases[0]["extra_info"]:
            of_network = {key: record[key] for key in ("network", "batch", "precision", "contender")}
            found.append({"what": "network memory", **of_network, "saved": cases[0]["extra_info"]["kept"]})
        if memory and record["what"] == "layer":
            found.append({"what": "memory", **{key: record[key] for key in keys}, **memory})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, required=True, metavar="DIR", help="folder to write to")
    folder = parser.parse_args().results

    print("Do the generators on the reference and fused agree?")
    impls = dict.fromkeys(name.split("-")[0] for name in FUSED)
    agreed = [record for op in OPS.values() for impl in impls for record in agreement(op, impl)]
    raw = measure()
    cpu = raw["machine_info"]["cpu"]
    model = re.sub(r"\(R\)| Processor|CPU|@.*", "", cpu.get("brand_raw", platform.machine())).strip()
    facts = {
        "machine": f"{model}, {cpu['count']} cores, {torch.get_num_threads()} threads",
        "kernels": pixnorm.backends()[f"native ({DEVICE})"],
        "last-level cache": f"{cache_bytes() / 2**20:.0f} MiB",
        **provenance(raw["commit_info"], shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])),
    }
    records = Records(facts, [], [*agreed, *entries(raw)], on_cpu=True)

    vectors = cpu_capability().replace("amx", "avx512 amx")
    base = folder / file_stem(f"{DEVICE} {model} {vectors} {cpu['count']} cores")
    folder.mkdir(parents=True, exist_ok=True)
    base.with_suffix(".json").write_text(records.text())
    text = markdown(records, draw_picture(records, base))
    base.with_suffix(".md").write_text(text)
    print(text, f"\nwritten: {base}.md, .json, .png")


if __name__ == "__main__":
    main()
