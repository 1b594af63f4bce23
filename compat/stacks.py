"""A stack of versions: a virtual environment, a copy of the sources, a build."""

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "compat"
RESULT = Path(__file__).with_name("result.json")

# The sources that may not work with a version of PyTorch, Python or Triton.
SOURCES = ("setup.py", "csrc/**/*", "pixnorm/**/*.py", "triton_kernels/*.py")


@dataclass(frozen=True)
class Stack:
    """Versions that are installed together.

    Attributes:
        name: of its folder.
        python: major and minor version.
        packages: requirements that replace those of requirements.txt.
    """

    name: str
    python: str
    packages: tuple[str, ...]

    @property
    def venv(self) -> Path:
        return FOLDER / self.name / "venv"

    @property
    def interpreter(self) -> Path:
        return self.venv / "bin" / "python"

    @property
    def sources(self) -> Path:
        return FOLDER / self.name / "sources"

    def requirements(self) -> list[str]:
        """Those of requirements.txt, with this stack's own versions."""
        own = {_project(line) for line in self.packages}
        lines = (ROOT / "requirements.txt").read_text().splitlines()
        return [line for line in lines if line and line[0] != "#" and _project(line) not in own] + [*self.packages]

    def install(self, pythons: Iterable[str] = ()) -> None:
        """Make the virtual environment, unless it is up to date. pip's cache holds what stacks share."""
        wanted, stamp = "\n".join(self.requirements()) + "\n", self.venv / "requirements.txt"
        if stamp.exists() and stamp.read_text() == wanted:
            return
        shutil.rmtree(self.venv, ignore_errors=True)
        subprocess.run([find_python(self.python, pythons), "-m", "venv", self.venv], check=True)
        listed = self.venv / "wanted.txt"
        listed.write_text(wanted)
        self.run("-m", "pip", "install", "--quiet", "--requirement", listed)
        listed.rename(stamp)

    def copy_sources(self) -> None:
        """Copy the files that git tracks or would track; unchanged files keep their times."""
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        names = {name for name in listed.split("\0") if name and (ROOT / name).is_file()}
        kept = self.sources / ".copied"
        for name in set(kept.read_text().splitlines() if kept.exists() else ()) - names:
            (self.sources / name).unlink(missing_ok=True)
        for name in names:
            target = self.sources / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
        kept.write_text("\n".join(sorted(names)))

    def build(self) -> None:
        """Build the extensions in the copy of the sources; CUDA for one architecture, enough to see it link."""
        self.run("setup.py", "build_ext", "--inplace", PIXNORM_BUILD="1")

    def environment(self, **variables: str) -> dict[str, str]:
        found = {name: value for name, value in os.environ.items() if not name.startswith(("PIXNORM_", "PYTHON"))}
        found["PATH"] = os.pathsep.join([str(self.venv / "bin"), found.get("PATH", "")])  # the build looks for ninja
        found.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
        return found | variables

    def run(self, *arguments: str | Path, check: bool = True, **variables: str) -> subprocess.CompletedProcess:
        """Run this stack's Python in the copy of the sources; of PIXNORM_* variables, only those given are set."""
        self.sources.mkdir(parents=True, exist_ok=True)
        command = [str(self.interpreter), *map(str, arguments)]
        return subprocess.run(command, cwd=self.sources, env=self.environment(**variables), check=check)

    def ask(self, code: str) -> str:
        """The output of Python code there."""
        command = [str(self.interpreter), "-c", code]
        options = {"cwd": self.sources, "env": self.environment(), "text": True, "check": True}
        return subprocess.run(command, stdout=subprocess.PIPE, **options).stdout


# The versions of the GPU machines, with the oldest supported torch (`dependencies` in pyproject.toml).
OLDEST = Stack(
    "oldest",
    "3.12",
    (
        "torch==2.11.0",
        "torchvision==0.26.0",
        "triton==3.6.0",
        "numpy==2.5.2",
        "setuptools==81.0.0",
    ),
)
STACKS = (OLDEST, Stack("newest", "3.13", ("torch==2.14.1", "torchvision==0.29.1", "triton==3.8.0")))


def _project(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower()


def find_python(version: str, pythons: Iterable[str] = ()) -> str:
    """An interpreter of that version: one of those given, on the path, or from pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [*pythons, f"python{version}", "python3", *sorted(pyenv.glob(f"versions/{version}*/bin/python"))]
    code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    for candidate in candidates:
        try:
            asked = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        except OSError:
            continue
        if asked.returncode == 0 and asked.stdout.strip() == version:
            return str(candidate)
    tried = ", ".join(map(str, candidates))
    raise SystemExit(f"no Python {version} with venv among {tried}: make compat PYTHONS=... names one")


def fingerprint(root: Path = ROOT, patterns: Iterable[str] = SOURCES) -> str:
    """A hash of the sources."""
    found = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in root.glob(pattern) if path.is_file()):
        if path.suffix not in (".so", ".pyc"):
            found.update(f"{path.relative_to(root).as_posix()}\0".encode())
            found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:16]


def staleness() -> str | None:
    """Why the last `make compat` does not vouch for these sources; None if it ran on them and everything passed."""
    if not RESULT.exists():
        return "make compat has never run"
    result = json.loads(RESULT.read_text())
    if result["fingerprint"] != fingerprint():
        return f"make compat last ran at {result['commit']}, and setup.py, csrc, pixnorm or triton_kernels have changed"
    failed = [f"{name} ({of['failed']})" for name, of in result["stacks"].items() if of["failed"]]
    return f"the last make compat had failures: {', '.join(failed)}" if failed else None
