"""Compiles CUDA sources with the C++ compiler; ``python -m tests.cuda_emulation`` does just that."""

import fcntl
import importlib.util
import os
import re
import subprocess
import sys
from glob import glob
from pathlib import Path

import torch
from torch.utils.cpp_extension import CUDA_HOME, include_paths

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "cuda_emulation"


def _cuda_headers() -> Path:
    """Headers of CUDA's types and half precision. Triton contains them, so no toolkit is needed."""
    triton = importlib.util.find_spec("triton")
    root = Path(triton.origin).parent / "backends" / "nvidia" if triton else Path(CUDA_HOME or "/")
    folder = root / "include"
    if not (folder / "cuda_fp16.h").exists():
        raise RuntimeError("the emulation needs CUDA's headers: install triton, or the CUDA toolkit")
    return folder


EMULATOR = [HERE / "emulator.cpp", HERE / "approximations.cpp"]
LIBRARIES = {
    "pixnorm": [*map(Path, sorted(glob(f"{ROOT}/csrc/cuda/*.cu"))), HERE / "libraries.cpp", *EMULATOR],
    "kernels": [HERE / "kernels.cu", HERE / "libraries.cpp", *EMULATOR],
}
VARIANTS = {
    "plain": ["-O2"],
    # Unoptimised, as optimising sanitizer code takes minutes; the address sanitizer covers the checks left out.
    "sanitized": [
        *("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        "-fno-sanitize=null,object-size,pointer-overflow,vptr",
    ],
    "ucontext": ["-O2", "-DCUDA_EMULATION_UCONTEXT"],
}
FLAGS = [
    *("-std=c++17", "-fPIC", "-fno-strict-aliasing", "-fno-gnu-unique"),
    *("-Wall", "-Wno-unknown-pragmas", "-Wno-class-memaccess"),
    *("-DPIXNORM_CUDA_EMULATION", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
    *(f"-I{HERE}/include", f"-I{ROOT}/csrc"),
    *(f"-isystem{path}" for path in (*include_paths(), _cuda_headers())),
]


def environment(variant: str) -> dict[str, str]:
    """The environment of a process that loads the libraries of a variant."""
    result = os.environ | {"PIXNORM_CUDA_EMULATION": variant}
    if variant == "sanitized":
        libraries = [_output(f"-print-file-name=lib{name}.so") for name in ("asan", "ubsan")]
        result |= {
            "LD_PRELOAD": " ".join(libraries),  # must come first
            "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",  # Python leaks; each library contains an emulator
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
    return result


def _output(flag: str) -> str:
    return subprocess.run([compiler(), flag], capture_output=True, text=True, check=True).stdout.strip()


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def _compile_command(source: Path, variant: str, out: Path) -> list[str]:
    command = [compiler(), *FLAGS, *VARIANTS[variant], "-MD", "-c", "-o", str(out)]
    if source.suffix == ".cu":
        command += ["-include", "registration.h", "-x", "c++"]
    return [*command, str(source)]


def _is_stale(out: Path, command: list[str]) -> bool:
    """Whether to compile the object: its command or one of its dependencies has changed."""
    record = out.with_suffix(".command")
    if not out.exists() or not record.exists() or record.read_text() != " ".join(command):
        return True
    dependencies = re.sub(r"\\\n", " ", out.with_suffix(".d").read_text()).partition(": ")[2].split()
    return any(not Path(d).exists() or Path(d).stat().st_mtime > out.stat().st_mtime for d in dependencies)


def build(library: str, variant: str = "plain") -> Path:
    """Compile what has changed; return the shared library's path. Raises RuntimeError with the compiler's errors."""
    folder = BUILD / variant
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects, running = [], []
        for source in LIBRARIES[library]:
            out = folder / f"{source.stem}.o"
            command = _compile_command(source, variant, out)
            objects.append(out)
            if _is_stale(out, command):
                out.unlink(missing_ok=True)
                running.append((command, out, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
        failures = []
        for command, out, process in running:
            errors = process.communicate()[1]
            sys.stderr.write("" if process.returncode else errors)
            if process.returncode:
                failures.append(f"{' '.join(command)}\n{errors}")
            else:
                out.with_suffix(".command").write_text(" ".join(command))
        if failures:
            raise RuntimeError("\n".join(failures))
        result = folder / f"lib{library}.so"
        if not result.exists() or any(out.stat().st_mtime > result.stat().st_mtime for out in objects):
            # Symbolic: emulated functions bind here even if the real library is loaded too.
            link = [compiler(), "-shared", *VARIANTS[variant], "-Wl,-Bsymbolic", "-o", str(result), *map(str, objects)]
            link += [f"-L{Path(torch.__file__).parent}/lib", "-ltorch_cpu", "-ltorch", "-lc10", "-ldl"]
            subprocess.run(link, check=True)
    return result
