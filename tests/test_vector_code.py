"""The vector code of the CPU kernels, for widths that this machine does not have."""

import os
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

pytestmark = pytest.mark.cpu

HERE = Path(__file__).parent


def test_long_and_short_vectors_give_the_same_bits(tmp_path):
    program = tmp_path / "vector_widths"
    includes = [f"-I{path}" for path in (HERE.parent / "csrc", *include_paths())]
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-w", *includes, "-o", program]
    subprocess.run([*command, HERE / "vector_widths.cpp"], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
