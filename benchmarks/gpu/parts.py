"""The parts of a run, in the order of their worth."""

import os
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.bundle import TRITON_CACHE
from benchmarks.gpu.processes import FOLDER, Companion, Part


def parts(device: str, build: bool) -> tuple[list[Companion], list[Part]]:
    """The parts that run beside the others, and those that follow each other; the most valuable first."""
    python, trial = [sys.executable, "-u"], device == "cpu"
    cores = os.cpu_count() or 4

    def section(name: str, seconds: int, what: str, quiet: bool = True, limit: int = 0, kind: type = Part) -> Part:
        module = ["benchmarks.gpu.sanitizer"] if name == "sanitizer" else ["benchmarks.gpu.cases", name]
        part = kind(name, [*python, "-m", *module, "--device", device], seconds, limit or 2 * seconds, what, quiet)
        part.command += ["--records", str(part.records)]
        return part

    def tests(name: str, seconds: int, what: str, few: str, *chosen: str, workers: int = max(2, cores - 4)) -> Part:
        """``few`` are the tests of a trial."""
        command = [*python, "-m", "pytest", "tests", f"--device={device}", "-p", "benchmarks.gpu.tests", "-v"]
        command += ["--tb=short", "--durations=10", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
        command += [*chosen, *(["-k", few] if trial else [])]
        command += ["-n", str(workers)] if workers and find_spec("xdist") else []
        # One thread each for compiling Triton's kernels and for PyTorch's calls.
        alone = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        part = Part(name, command, seconds, 2 * seconds, what, variables=alone)
        part.variables["PIXNORM_GPU_RECORDS"] = str(part.records)
        return part

    build_it = Part("build", [*python, "setup.py", "build_ext", "--inplace"], 70, 150, "the kernels for this GPU")
    load_it = Part("load", [*python, "-m", "benchmarks.gpu.bundle", "load"], 8, 60, "what `make gpu-bundle` has built")
    large = tests("tests-large", 20, "tensors of more than 2^31 elements", "", "-m", "gpu_memory", workers=0)
    large.variables["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    usual = "-m", "not gpu_memory"
    sequence = [
        build_it if build else load_it,
        section("facts", 8, "the machine, the versions, what can run, a copy", limit=30),
        section("check", 30, "forward and backward of each op, impl, dtype and layout against the reference", False),
        section("first", 12, "one timing: native, Triton, eager", limit=30),
        tests("tests-native", 75, "the tests of all but Triton", "test_errors", *usual, "-k", "not triton"),
        section("kernels", 30, "each kernel, from a profile; memory"),
        section("layers", 50, "each op beside eager mode"),
        section("step", 35, "a generator's training step"),
        section("networks", 40, "a training step of each of the papers' networks"),
        section("small", 20, "launch-bound layers, CUDA graphs"),
        tests("tests-triton", 75, "the tests of the Triton kernels", "what_is_faster", *usual, "-k", "triton"),
        section("peers", 30, "eager mode under torch.compile, which was compiled beside the tests"),
        section("sanitizer", 40, "memcheck and racecheck of a small forward and backward of each op", False),
        *([] if trial else [large]),
    ]
    precompile = [*python, "-m", "benchmarks.gpu.precompile", "--cache", str(TRITON_CACHE)]
    precompile += ["--processes", str(max(1, cores - 4))] + (["--first", "2", "--arch", "90"] if trial else [])
    companions = [
        Companion("precompile", precompile, 0, 600, "Triton's kernels, for all parts"),
        section("compiling", 0, "eager mode for torch.compile", False, limit=600, kind=Companion),
    ]
    return companions, sequence


def environment(device: str) -> dict[str, str]:
    """The variables of this process, and those that the parts need."""
    found = dict(os.environ, PIXNORM_BUILD="1", TRITON_CACHE_DIR=str(TRITON_CACHE))
    # Inductor would have some processes take another ptxas, with which nothing in Triton's cache was made.
    triton = find_spec("triton")
    ptxas = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "ptxas" if triton else None
    if ptxas and ptxas.exists():
        found.setdefault("TRITON_PTXAS_PATH", str(ptxas))
    # What Inductor finds fastest while other processes keep the GPU busy is not to be believed later.
    found["TORCHINDUCTOR_AUTOTUNE_LOCAL_CACHE"] = "0"
    # ninja stands beside Python, also where nobody has put that folder on the path.
    found["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), found.get("PATH", "")])
    found.setdefault("MAX_JOBS", str(os.cpu_count()))
    if device == "cuda":
        import torch

        found.setdefault("TORCH_CUDA_ARCH_LIST", ".".join(map(str, torch.cuda.get_device_capability())))
    return found


def fresh_folder() -> None:
    """What an earlier run has left is of other sources, but for what Triton has compiled: that it knows by its text."""
    for path in FOLDER.iterdir() if FOLDER.exists() else ():
        if path != TRITON_CACHE:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    FOLDER.mkdir(parents=True, exist_ok=True)


def told(parts: list[Part]) -> list[dict]:
    """What the report says of the parts."""
    return [
        {
            "name": part.name,
            "what": part.what,
            "planned": part.seconds,
            "seconds": round(part.took),
            "state": part.state,
            "last": re.sub("=+", "", part.last).strip() if "test" in part.name else "",
        }
        for part in parts
    ]
