"""``python -m benchmarks.gpu --results DIR``: build for the GPU of this machine, test on it, measure, report.

A part that fails or takes too long does not stop the next ones; what became of each is told at the end. All that the
parts print is in build/gpu. ``--device cpu`` tries every part in small, for work on this without a GPU.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import torch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "gpu"


@dataclass
class Part:
    """One command.

    Attributes:
        name: of its log and its records.
        command: what runs, in the root folder.
        until: seconds after the start of everything by which it must have ended.
        state: what became of it.
        seconds: that it took.
        last: the last line that it printed.
    """

    name: str
    command: list[str]
    until: float
    state: str = "not run"
    seconds: float = 0.0
    last: str = ""
    process: subprocess.Popen | None = None

    @property
    def log(self) -> Path:
        return FOLDER / f"{self.name}.log"

    def start(self, environment: dict[str, str]) -> None:
        self.began = monotonic()
        self.process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def follow(self, deadline: float, echo: bool) -> None:
        """Copy the output to the log (and here) until the part ends or is ended."""
        reader = threading.Thread(target=self._copy_output, args=(echo,), daemon=True)
        reader.start()
        # Told to stop, pytest reports what it has; 10 s later it has no choice.
        for patience, insistence in ((max(deadline - monotonic(), 1), signal.SIGINT), (10, signal.SIGKILL)):
            try:
                self.process.wait(patience)
                break
            except subprocess.TimeoutExpired:
                self.state = "stopped: out of time"
                self._signal(insistence)
        code = self.process.wait()
        self.kill()  # processes that it left behind would keep its output open
        reader.join(5)
        self.seconds = monotonic() - self.began
        if self.state == "not run":
            self.state = "done" if code == 0 else f"failed (exit status {code})"

    def kill(self) -> None:
        if self.process:
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _copy_output(self, echo: bool) -> None:
        with self.log.open("w") as log:
            for line in self.process.stdout:
                log.write(line)
                log.flush()
                if echo:
                    print(line, end="", flush=True)
                self.last = line.strip() or self.last


def parts(device: str, results: Path) -> tuple[list[Part], list[Part]]:
    """The parts that run beside the others until the benchmarks begin, and those that follow each other."""
    python = [sys.executable, "-u"]

    def section(name: str, until: float) -> Part:
        records = ["--records", str(FOLDER / f"{name}.jsonl")]
        return Part(name, [*python, "-m", "benchmarks.gpu.cases", name, "--device", device, *records], until)

    tests = [*python, "-m", "pytest", "tests", f"--device={device}", "--continue-on-collection-errors"]
    tests += ["-q", "--tb=short", "--durations=10", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        # One process can seldom keep the GPU busy, and compiling Triton's kernels takes the CPU.
        tests += ["-n", str(max(4, (os.cpu_count() or 4) - 4))]
    if device == "cpu":
        tests += ["-k", "test_errors"]
    report = [*python, "-m", "benchmarks.gpu.report", "--records", str(FOLDER), "--results", str(results)]
    return [section("compiling", 264), section("compiling_gconv", 264)], [
        Part("build", [*python, "setup.py", "build_ext", "--inplace"], 150),
        Part("tests", tests, 264),
        section("kernels", 304),
        section("layers", 380),
        section("mixing", 408),
        section("step", 444),
        section("small", 465),
        Part("report", report, 478),
    ]


def environment(device: str) -> dict[str, str]:
    """The variables of this process, and those that the build needs."""
    found = dict(os.environ, PIXNORM_BUILD="1")
    # ninja stands beside Python, also where nobody has put that folder on the path.
    found["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), found.get("PATH", "")])
    found.setdefault("MAX_JOBS", str(os.cpu_count()))
    if device == "cuda":
        found.setdefault("TORCH_CUDA_ARCH_LIST", ".".join(map(str, torch.cuda.get_device_capability())))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a trial in small")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"make gpu needs a GPU, and PyTorch {torch.__version__} sees none here.")

    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    started, variables = monotonic(), environment(arguments.device)
    beside, sequence = parts(arguments.device, arguments.results.absolute())

    companions = []
    for part in beside:
        part.start(variables)
        companions.append(threading.Thread(target=part.follow, args=(started + part.until, False), daemon=True))
        companions[-1].start()
    try:
        for part in sequence:
            if part.name == "kernels":  # from here on time is taken: nothing else may run
                for companion in companions:
                    companion.join()
            print(f"\n=== {part.name}: {' '.join(part.command)}", flush=True)
            part.start(variables)
            part.follow(started + part.until, echo=True)
            print(f"=== {part.name}: {part.state}, {part.seconds:.0f} s", flush=True)
            save(beside, sequence, monotonic() - started)
    finally:  # also when interrupted
        for part in (*beside, *sequence):
            part.kill()

    print(f"\n{'part':15} {'s':>4}  ")
    for part in (*sequence, *beside):
        print(f"{part.name:15} {part.seconds:4.0f}  {part.state}")
    print(f"{'all':15} {monotonic() - started:4.0f}  logs in {FOLDER}")
    failed = [part.name for part in (*sequence, *beside) if part.state != "done"]
    if failed:
        sys.exit(f"make gpu: not everything went well: {', '.join(failed)}")


def save(beside: list[Part], sequence: list[Part], seconds: float) -> None:
    """What the report tells of the parts."""
    told = [
        {"name": part.name, "seconds": round(part.seconds), "state": part.state, "last": re.sub("=+", "", part.last)}
        for part in (*sequence, *beside)
        if part.state != "not run"
    ]
    (FOLDER / "parts.json").write_text(json.dumps({"seconds": round(seconds), "parts": told}, indent=2) + "\n")


if __name__ == "__main__":
    main()
