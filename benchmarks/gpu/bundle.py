"""A build that travels: what a machine with a GPU, and little time, only has to load.

``python -m benchmarks.gpu.bundle make`` (`make gpu-bundle`), anywhere, on the stack of the GPU machines: the extensions
for one architecture, and Triton's kernels out of its cache. ``... load`` (the first part of `make gpu BUILD=0`) puts
them in their places, after a look at the versions.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from compat import OLDEST, fingerprint

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "build" / "gpu-bundle"
TRITON_CACHE = ROOT / "build" / "gpu" / "triton"
COMPILED = ("setup.py", "csrc/**/*")  # what the extensions are made of
MODULES = ("_C", "_cuda")
ARCH = "9.0"  # of the H100 and the H200

VERSIONS = """
import hashlib, json, platform, torch, triton
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__}
found |= {"python": platform.python_version(), "machine": platform.machine(), "arch": None}
if torch.cuda.is_available():
    found["arch"] = ".".join(map(str, torch.cuda.get_device_capability()))
try:
    from triton.runtime.cache import triton_key
    found["triton_key"] = hashlib.sha256(triton_key().encode()).hexdigest()[:16]
except ImportError:
    found["triton_key"] = None
print(json.dumps(found))
"""


def make(arch: str, kernels: bool) -> None:
    """Build on the oldest stack, and pack."""
    OLDEST.install()
    OLDEST.copy_sources()
    OLDEST.run("setup.py", "build_ext", "--inplace", PIXNORM_BUILD="1", TORCH_CUDA_ARCH_LIST=arch)
    shutil.rmtree(BUNDLE, ignore_errors=True)
    BUNDLE.mkdir(parents=True)
    for module in MODULES:
        shutil.copy2(OLDEST.sources / "pixnorm" / f"{module}.abi3.so", BUNDLE)
    if kernels:
        cache = OLDEST.sources / "build" / "triton"
        options = ["--cache", cache, "--arch", arch.replace(".", ""), "--processes", str(os.cpu_count())]
        OLDEST.run("-m", "benchmarks.gpu.precompile", *options, check=False)
        pack(cache, BUNDLE / "triton.tar.xz")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    versions = json.loads(OLDEST.ask(VERSIONS)) | {"arch": arch, "commit": commit.stdout.strip()}
    versions["sources"] = fingerprint(OLDEST.sources, COMPILED)
    (BUNDLE / "bundle.json").write_text(json.dumps(versions, indent=2) + "\n")
    size = sum(file.stat().st_size for file in BUNDLE.iterdir()) / 2**20
    print(f"{BUNDLE.relative_to(ROOT)}: {', '.join(sorted(file.name for file in BUNDLE.iterdir()))}, {size:.1f} MiB")


def pack(cache: Path, archive: Path) -> None:
    """Machine code and what Triton knows of it; not what it was made from."""
    with tarfile.open(archive, "w:xz") as packed:
        for file in sorted(cache.rglob("*")):
            if file.suffix in (".cubin", ".json"):
                packed.add(file, file.relative_to(cache))


def unpack(archive: Path, cache: Path) -> int:
    """The opposite, anywhere: Triton's lists of files have absolute paths. Returns how many kernels there are."""
    kernels = 0
    with tarfile.open(archive) as packed:
        for member in packed:
            path = cache / member.name
            text = packed.extractfile(member).read()
            if path.name.startswith("__grp__"):
                listed = json.loads(text)["child_paths"]
                here = {name: str(path.parent / name) for name in listed if name.endswith((".cubin", ".json"))}
                text = json.dumps({"child_paths": here}).encode()
            kernels += path.suffix == ".cubin"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text)
    return kernels


def obstacles(bundle: dict, here: dict, sources: str) -> list[str]:
    """Why what was built cannot be used here."""
    found = []
    if bundle["sources"] != sources:
        found.append("setup.py or csrc have changed since it was made")
    for what in ("machine", "arch"):
        if here[what] not in (None, bundle[what]):
            found.append(f"it is for {what} {bundle[what]}, this is {here[what]}")
    built, found_here = ((of["cuda"] or "none").partition(".")[0] for of in (bundle, here))
    if found_here != built:
        found.append(f"it is for CUDA {built}, torch here has {found_here}")
    if _release(here["torch"]) < _release(bundle["torch"]):
        found.append(f"it is for torch {bundle['torch']} and newer, this is {here['torch']}")
    return found


def _release(version: str) -> list[int]:
    return [int(part) for part in version.split("+")[0].split(".")[:2]]


def load() -> None:
    """Put the bundle in its places, and see that it runs; with none, see that what is there runs."""
    here = json.loads(subprocess.run([sys.executable, "-c", VERSIONS], capture_output=True, check=True).stdout)
    print(f"here: {', '.join(f'{key} {value}' for key, value in here.items())}")
    if (BUNDLE / "bundle.json").exists():
        bundle = json.loads((BUNDLE / "bundle.json").read_text())
        if found := obstacles(bundle, here, fingerprint(ROOT, COMPILED)):
            sys.exit(f"the bundle cannot be used: {'; '.join(found)}; `make gpu-bundle` makes it anew")
        for module in MODULES:
            new = shutil.copy2(BUNDLE / f"{module}.abi3.so", ROOT / "pixnorm" / f".{module}.new")
            os.replace(new, ROOT / "pixnorm" / f"{module}.abi3.so")  # whoever has the old one open keeps that
        archive = BUNDLE / "triton.tar.xz"
        if archive.exists() and here["triton_key"] == bundle["triton_key"]:
            print(f"{unpack(archive, TRITON_CACHE)} Triton kernels unpacked")
        elif archive.exists():
            print(
                f"Triton here ({here['triton']}) is another build than {bundle['triton']} there: it will compile anew"
            )
    device = "cuda" if here["arch"] else "cpu"
    code = f"import pixnorm; state = pixnorm.backends()['native ({device})']; print(state); exit(state[:2] != 'av')"
    if subprocess.run([sys.executable, "-c", code]).returncode:
        sys.exit("the kernels do not load: run without BUILD=0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "load"))
    parser.add_argument("--arch", default=ARCH, help=f"compute capability ({ARCH})")
    parser.add_argument("--no-triton", action="store_true", help="without Triton's kernels, which take long")
    arguments = parser.parse_args()
    if arguments.what == "make":
        make(arguments.arch, not arguments.no_triton)
    else:
        load()


if __name__ == "__main__":
    main()
