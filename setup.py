"""Builds the compiled kernels; the metadata is in pyproject.toml.

Without a compiler, or without torch in the build environment, pixnorm still installs, and runs on its reference.
PIXNORM_BUILD=1 makes that an error; PIXNORM_BUILD=0 skips the build. The CUDA kernels need nvcc and a CUDA build of
torch, and are built for all GPUs from Ampere on, or for those in TORCH_CUDA_ARCH_LIST.
"""

import os
import re
import shutil
import subprocess
import sys
from glob import glob

from setuptools import setup

COMPILE_FLAGS = ["-O3", "-g0", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
NVCC_FLAGS = ["-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden"]
ARCHITECTURES = ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
STABLE_ABI = ("TORCH_TARGET_VERSION", "0x020a000000000000")  # the LibTorch Stable ABI, as of torch 2.10
OLDEST_PYTHON = "cp310"  # BuildExtension compiles for the limited API as of this one


def go_without(reason: str) -> None:
    if os.environ.get("PIXNORM_BUILD") == "1":
        sys.exit(f"pixnorm: the kernels were not built: {reason}")
    print(f"pixnorm: the kernels were not built, the reference will be used: {reason}", file=sys.stderr)


def output(*command: str) -> str:
    """The output of a command; empty if it is missing or fails."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout


def find_cuda_toolkit() -> tuple[str | None, list[str]]:
    """The folder of a CUDA toolkit (None if there is none), and all that were tried. CUDA_HOME is the only one if set.

    An nvcc on the path may be a script or a link outside the toolkit, so nvcc itself is asked for its folder.
    """
    folders = [os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")]
    if not folders[0]:
        told = re.findall(r"^#\$ _HERE_=(.*)", output("nvcc", "--dryrun", "-c", "-x", "cu", os.devnull), re.MULTILINE)
        on_path = shutil.which("nvcc") or ""
        binaries = [*told, os.path.dirname(os.path.realpath(on_path)), os.path.dirname(on_path)]
        folders = [os.path.dirname(folder) for folder in binaries if folder]
        folders += ["/usr/local/cuda", *sorted(glob("/usr/local/cuda-*"), reverse=True), "/opt/cuda"]
    tried = list(dict.fromkeys(folders))
    libraries = ("lib64/libcudart.so", "lib/libcudart.so", "lib/*/libcudart.so", "targets/*/lib/libcudart.so")
    for folder in tried:
        header = os.path.join(folder, "include", "cuda_runtime_api.h")
        if os.path.exists(header) and any(glob(os.path.join(folder, library)) for library in libraries):
            return folder, tried
    return None, tried


def cuda_extensions(toolkit: str | None, tried: list[str]) -> list:
    """The extension of the CUDA kernels; or none, with the reason on stderr."""
    import torch
    from torch.utils.cpp_extension import CUDAExtension

    nvcc = os.path.join(toolkit or "", "bin", "nvcc")
    version = re.search(r"release (\d+)\.", output(nvcc, "--version"))
    obstacle = None
    if torch.version.cuda is None:
        obstacle = "this torch is built without CUDA"
    elif toolkit is None:
        obstacle = (
            "no CUDA toolkit, a folder with include/cuda_runtime_api.h and libcudart.so, was found in "
            f"{', '.join(tried)}; CUDA_HOME can name one"
        )
    elif version is None:
        obstacle = f"there is no nvcc in {toolkit}"
    elif version[1] != torch.version.cuda.partition(".")[0]:
        obstacle = f"the toolkit in {toolkit} is CUDA {version[1]}, torch is built for CUDA {torch.version.cuda}"
    if obstacle:
        print(f"pixnorm: no CUDA kernels: {obstacle}", file=sys.stderr)
        return []

    known = re.findall(r"compute_(\d+)(\d)\b", output(nvcc, "--list-gpu-arch"))
    supported = [a for a in ARCHITECTURES if tuple(a.split(".")) in known]
    architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", " ".join(supported) + "+PTX")
    return [
        CUDAExtension(
            "pixnorm._cuda",
            ["csrc/cuda/bindings.cpp", *sorted(glob("csrc/cuda/*.cu"))],
            depends=sorted(glob("csrc/**/*.*h", recursive=True)),
            include_dirs=[os.path.abspath("csrc")],
            define_macros=[
                STABLE_ABI,
                ("USE_CUDA", None),
                ("PIXNORM_CUDA_ARCHITECTURES", f'"{architectures}"'),
            ],
            extra_compile_args={"cxx": COMPILE_FLAGS, "nvcc": [*NVCC_FLAGS, "--threads=0"]},
            py_limited_api=True,
        )
    ]


def extensions() -> dict:
    if os.environ.get("PIXNORM_BUILD") == "0":
        go_without("PIXNORM_BUILD=0")
        return {}
    toolkit, tried = find_cuda_toolkit()
    if toolkit:
        os.environ["CUDA_HOME"] = toolkit  # before cpp_extension guesses, when it is imported
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        go_without(f"the build needs torch ({error})")
        return {}

    class BuildOrGoWithout(BuildExtension):
        def run(self) -> None:
            inplace = self.inplace
            try:
                super().run()
            except Exception as error:  # of the checks before compiling, such as whether nvcc supports the compiler
                *self.extensions, failed = self.extensions
                go_without(f"compiling {failed.name} failed ({error})")
                self.inplace = inplace  # changed by setuptools during the run
                self.run()

        def build_extension(self, extension) -> None:
            try:
                super().build_extension(extension)
            except Exception as error:
                go_without(f"compiling {extension.name} failed ({error})")
                # Otherwise setuptools looks for the missing file.
                self.extensions = [other for other in self.extensions if other is not extension]

    kernels = CppExtension(
        "pixnorm._C",
        ["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
        depends=sorted(glob("csrc/**/*.h", recursive=True)),
        include_dirs=[os.path.abspath("csrc")],
        define_macros=[STABLE_ABI],
        extra_compile_args=COMPILE_FLAGS,
        py_limited_api=True,
    )
    return {
        "ext_modules": [kernels, *cuda_extensions(toolkit, tried)],
        "cmdclass": {"build_ext": BuildOrGoWithout},
        "options": {"bdist_wheel": {"py_limited_api": OLDEST_PYTHON}},
    }


if __name__ == "__main__":
    setup(license="BSD-3-Clause", **extensions())
