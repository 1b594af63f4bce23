"""Builds the compiled kernels; the metadata is in pyproject.toml.

Without a compiler, or without torch in the build environment, pixnorm installs all the same and runs on its reference.
PIXNORM_BUILD=1 makes that an error; PIXNORM_BUILD=0 does not try to build. The CUDA kernels are built where nvcc and a
CUDA build of torch are, for all GPUs from Ampere on, or for those that TORCH_CUDA_ARCH_LIST names.
"""

import os
import re
import subprocess
import sys
from glob import glob

from setuptools import setup

COMPILE_FLAGS = ["-O3", "-g0", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
NVCC_FLAGS = ["-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden"]
ARCHITECTURES = ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
STABLE_ABI = ("TORCH_TARGET_VERSION", "0x020a000000000000")  # the LibTorch Stable ABI, as of torch 2.10


def go_without(reason: str) -> None:
    if os.environ.get("PIXNORM_BUILD") == "1":
        sys.exit(f"pixnorm: the kernels were not built: {reason}")
    print(f"pixnorm: the kernels were not built, the reference will be used: {reason}", file=sys.stderr)


def nvcc(cuda_home: str | None, *arguments: str) -> str:
    try:
        command = [os.path.join(cuda_home or "", "bin", "nvcc"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def cuda_extensions() -> list:
    """The extension of the CUDA kernels, or none, and a line that says why."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CUDAExtension

    version = re.search(r"release (\d+)\.", nvcc(CUDA_HOME, "--version"))
    obstacle = None
    if torch.version.cuda is None:
        obstacle = "this torch has no CUDA"
    elif version is None:
        obstacle = "there is no nvcc"
    elif version[1] != torch.version.cuda.partition(".")[0]:
        obstacle = f"nvcc is of CUDA {version[1]}, torch of CUDA {torch.version.cuda}"
    if obstacle:
        print(f"pixnorm: no CUDA kernels: {obstacle}", file=sys.stderr)
        return []

    known = re.findall(r"compute_(\d+)(\d)\b", nvcc(CUDA_HOME, "--list-gpu-arch"))
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
        )
    ]


def extensions() -> dict:
    if os.environ.get("PIXNORM_BUILD") == "0":
        go_without("PIXNORM_BUILD=0")
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        go_without(f"the build needs torch ({error})")
        return {}

    class BuildOrGoWithout(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                go_without(f"compiling them failed ({error})")
                self.extensions = []  # else setuptools looks for the files that were not made

        def build_extension(self, extension) -> None:
            try:
                super().build_extension(extension)
            except Exception as error:
                go_without(f"compiling {extension.name} failed ({error})")
                self.extensions = [other for other in self.extensions if other is not extension]

    kernels = CppExtension(
        "pixnorm._C",
        ["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
        depends=sorted(glob("csrc/**/*.h", recursive=True)),
        include_dirs=[os.path.abspath("csrc")],
        define_macros=[STABLE_ABI],
        extra_compile_args=COMPILE_FLAGS,
    )
    return {"ext_modules": [kernels, *cuda_extensions()], "cmdclass": {"build_ext": BuildOrGoWithout}}


if __name__ == "__main__":
    setup(license="BSD-3-Clause", **extensions())
