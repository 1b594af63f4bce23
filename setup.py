"""Builds the compiled kernels; the metadata is in pyproject.toml.

Without a compiler, or without torch in the build environment, pixnorm installs all the same and runs on its reference.
PIXNORM_BUILD=1 makes that an error; PIXNORM_BUILD=0 does not try to build.
"""

import os
import sys
from glob import glob

from setuptools import setup

COMPILE_FLAGS = ["-O3", "-g0", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]


def go_without(reason: str) -> None:
    if os.environ.get("PIXNORM_BUILD") == "1":
        sys.exit(f"pixnorm: the kernels were not built: {reason}")
    print(f"pixnorm: the kernels were not built, the reference will be used: {reason}", file=sys.stderr)


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

    kernels = CppExtension(
        "pixnorm._C",
        ["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
        depends=sorted(glob("csrc/**/*.h", recursive=True)),
        include_dirs=[os.path.abspath("csrc")],
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],  # the LibTorch Stable ABI, as of torch 2.10
        extra_compile_args=COMPILE_FLAGS,
    )
    return {"ext_modules": [kernels], "cmdclass": {"build_ext": BuildOrGoWithout}}


setup(license="BSD-3-Clause", **extensions())
