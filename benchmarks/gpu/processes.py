"""How one part of a run is run: its process, its time, its output."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "gpu"
CONTEXT_LOST = 75  # exit status of a process that another one may follow (EX_TEMPFAIL)
RESTARTS = 3  # of a part whose process has lost the GPU, or died


def end_with_parent() -> None:
    """Whoever kills a run, even so that it cannot end its parts, ends those too."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def as_a_part() -> None:
    """In a new process: it ends with its parent, and can be told to stop, also where a shell started the run in the
    background, whose children ignore that."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


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
            preexec_fn=as_a_part,
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
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that waits for the driver cannot even be killed
            self.process.wait(20)
        code = self.process.poll() or 0
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
