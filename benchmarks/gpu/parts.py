"""The parts of a run, in the order of their worth, and how one is run."""

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from time import monotonic

from benchmarks.gpu.bundle import TRITON_CACHE
from benchmarks.gpu.section import CONTEXT_LOST

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "gpu"
RESTARTS = 3  # of a part whose process has lost the GPU, or died


@dataclass
class Part:
    """One command.

    Attributes:
        name: of its log and its records.
        command: what runs, in the root folder.
        seconds: that it is planned to take, on 16 cores with a large GPU.
        limit: seconds after which it is stopped.
        what: it is there for.
        quiet: nothing else may run beside it, since it takes times.
        variables: of its environment.
        state: what became of it.
        took: seconds.
        last: the last line that it printed.
    """

    name: str
    command: list[str]
    seconds: int
    limit: int
    what: str
    quiet: bool = False
    variables: dict[str, str] = field(default_factory=dict)
    state: str = "not run"
    took: float = 0.0
    last: str = ""
    process: subprocess.Popen | None = None

    @property
    def log(self) -> Path:
        return FOLDER / f"{self.name}.log"

    @property
    def records(self) -> Path:
        return FOLDER / f"{self.name}.jsonl"

    def run(self, environment: dict[str, str], until: float, hear: Callable[[str], None]) -> None:
        """From start to end, which comes by ``until`` or after the limit; each line that it prints is heard."""
        began = monotonic()
        until = min(until, began + self.limit)
        for _ in range(1 + RESTARTS):
            self.start(environment)
            code = self.follow(until, hear)
            if self.state != "running" or (code != CONTEXT_LOST and code >= 0) or monotonic() > until - 5:
                break
            hear(f"(it has lost the GPU or died, exit status {code}: once more, behind what took it)\n")
        self.took = monotonic() - began
        if self.state == "running":
            self.state = "done" if code == 0 else f"failed (exit status {code})"

    def start(self, environment: dict[str, str]) -> None:
        self.state = "running"
        self.process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env=environment | self.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )

    def follow(self, until: float, hear: Callable[[str], None]) -> int:
        """Copy the output to the log, and let it be heard, until the process ends or is ended."""
        reader = threading.Thread(target=self._copy_output, args=(hear,), daemon=True)
        reader.start()
        # Told to stop, pytest reports what it has; 10 s later it has no choice.
        for patience, insistence in ((max(until - monotonic(), 1), signal.SIGINT), (10, signal.SIGKILL)):
            try:
                self.process.wait(patience)
                break
            except subprocess.TimeoutExpired:
                self.state = "stopped: out of time"
                self.signal(insistence)
        code = self.process.wait()
        self.signal(signal.SIGKILL)  # processes that it left behind would keep its output open
        reader.join(5)
        return code

    def signal(self, number: int) -> None:
        """To the process and all that it has started, if they are still there."""
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def _copy_output(self, hear: Callable[[str], None]) -> None:
        with self.log.open("a") as log:
            for line in self.process.stdout:
                log.write(line)
                log.flush()
                hear(line)
                self.last = line.strip() or self.last


def _end_with_parent() -> None:
    """Whoever kills the run, even so that it cannot end its parts, ends those too."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Companion(Part):
    """A part that prepares others, beside them, and makes way where time is taken."""

    def run(self, environment: dict[str, str], until: float, hear: Callable[[str], None]) -> None:
        self.start(environment)
        self.thread = threading.Thread(target=self._until_its_end, args=(until,), daemon=True)
        self.thread.start()

    def _until_its_end(self, until: float) -> None:
        began = monotonic()
        code = self.follow(until, lambda line: None)
        self.took = monotonic() - began
        if self.state == "running":
            self.state = "done" if code == 0 else f"failed (exit status {code})"

    def kill(self) -> None:
        if self.state == "running":
            self.state = "ended with the run"
        super().kill()

    def pause(self) -> None:
        self.signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.signal(signal.SIGCONT)


def parts(device: str, build: bool) -> tuple[list[Companion], list[Part]]:
    """The parts that run beside the others, and those that follow each other."""
    python = [sys.executable, "-u"]
    trial = device == "cpu"

    def section(name: str, seconds: int, what: str, quiet: bool = True, limit: int = 0, kind: type = Part) -> Part:
        module = ["benchmarks.gpu.sanitizer"] if name == "sanitizer" else ["benchmarks.gpu.cases", name]
        command = [*python, "-m", *module, "--device", device]
        part = kind(name, command, seconds, limit or 2 * seconds, what, quiet)
        command += ["--records", str(part.records)]
        return part

    def tests(name: str, seconds: int, what: str, *chosen: str, workers: int = 0) -> Part:
        # A process for the CPU part of each: compiling Triton's kernels, PyTorch's calls.
        alone = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        command = [*python, "-m", "pytest", "tests", f"--device={device}", "-p", "benchmarks.gpu.tests", "-v", *chosen]
        command += ["--tb=short", "--durations=10", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
        if workers and find_spec("xdist"):
            command += ["-n", str(workers)]
        part = Part(name, command, seconds, 2 * seconds, what, variables=alone)
        part.variables["PIXNORM_GPU_RECORDS"] = str(part.records)
        return part

    def of_trial(names: str, few: str) -> str:
        return few if trial else names

    cores = os.cpu_count() or 4
    workers = max(2, cores - 4)
    builder = (
        Part("build", [*python, "setup.py", "build_ext", "--inplace"], 70, 150, "the kernels for this GPU")
        if build
        else Part("load", [*python, "-m", "benchmarks.gpu.bundle", "load"], 5, 30, "what `make gpu-bundle` has built")
    )
    large = tests("tests-large", 20, "tensors of more than 2^31 elements", "-m", "gpu_memory")
    large.variables["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    sequence = [
        builder,
        section("facts", 8, "the machine, the versions, what can run, a copy", limit=30),
        section("check", 30, "forward and backward of each op, impl, dtype and layout against the reference", False),
        section("first", 12, "one timing: native, Triton, eager", limit=30),
        tests(
            "tests-native",
            75,
            "the tests of all but Triton, test_ops and test_cuda first",
            "-k",
            of_trial("not triton", "test_errors"),
            "-m",
            "not gpu_memory",
            workers=workers,
        ),
        section("kernels", 30, "each kernel, from a profile; memory"),
        section("layers", 35, "SPN beside eager mode"),
        section("step", 35, "a generator's step"),
        section("mixing", 15, "GConv's mixing beside eager mode"),
        section("small", 20, "launch-bound layers, CUDA graphs"),
        tests(
            "tests-triton",
            75,
            "the tests of the Triton kernels",
            "-k",
            of_trial("triton", "test_the_table_of_what_is_faster"),
            "-m",
            "not gpu_memory",
            workers=workers,
        ),
        section("peers", 30, "eager mode under torch.compile, which was compiled beside the tests"),
        Part(
            "sanitizer",
            [
                *python,
                "-m",
                "benchmarks.gpu.sanitizer",
                "--device",
                device,
                "--records",
                str(FOLDER / "sanitizer.jsonl"),
            ],
            40,
            80,
            "memcheck and racecheck of a small forward and backward of each op, dtype and layout",
        ),
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
