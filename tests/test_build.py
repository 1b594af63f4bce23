"""The compiled extension: what it reports, what it links to, how it is built, and life without it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pixnorm
from pixnorm import _C

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]
CAPABILITIES = ["baseline", "avx2", "avx512"]  # from least to most


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    """Run Python code in a process of its own, in the root folder, with our variables only as given."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PIXNORM_")}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=inherited | env, capture_output=True, text=True)


def test_extension_reports_itself():
    info = _C.build_info()
    assert set(info) == {"compiler", "torch", "cpu"}
    assert info["cpu"] == _C.cpu_capability()
    assert info["cpu"] in CAPABILITIES
    report = pixnorm.backends()["native (cpu)"]
    assert report.startswith("available")
    assert all(value in report for value in info.values())


PRINT_CAPABILITY = "import torch, pixnorm._C; print(pixnorm._C.cpu_capability())"


@pytest.fixture(scope="module")
def best_capability() -> str:
    return run(PRINT_CAPABILITY).stdout.strip()


@pytest.mark.parametrize("limit", CAPABILITIES)
def test_capability_can_be_lowered_and_not_raised(best_capability, limit):
    found = run(PRINT_CAPABILITY, PIXNORM_CPU_CAPABILITY=limit).stdout.strip()
    assert found == min(best_capability, limit, key=CAPABILITIES.index)


def test_unknown_capability_is_an_error():
    result = run("import pixnorm; pixnorm.backends()", PIXNORM_CPU_CAPABILITY="sse9")
    assert result.returncode != 0
    assert "PIXNORM_CPU_CAPABILITY must be 'baseline', 'avx2' or 'avx512', got 'sse9'" in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads the symbols of an ELF file")
def test_extension_needs_nothing_but_the_stable_abi():
    command = ["nm", "-DC", "--undefined-only", _C.__file__]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Py" in symbols  # nm has read it
    assert re.findall(r".*\b(?:at|c10|torch)::.*", symbols) == []


BUILD = """
import runpy, sys
sys.argv = ["setup.py", "build_ext", "-b", {out!r}, "-t", {out!r}]
runpy.run_path("setup.py", run_name="__main__")
"""
HIDE_TORCH = "import sys; sys.modules['torch'] = None"
NO_COMPILER = {"CC": "no-such-compiler", "CXX": "no-such-compiler"}


@pytest.mark.parametrize(
    "prelude, env, reason",
    [
        ("", {"PIXNORM_BUILD": "0"}, "PIXNORM_BUILD=0"),
        ("", NO_COMPILER, "compiling pixnorm._C failed"),
        (HIDE_TORCH, {}, "the build needs torch"),
    ],
    ids=["not wanted", "no compiler", "no torch"],
)
def test_install_goes_on_without_the_extension(tmp_path, prelude, env, reason):
    result = run(prelude + BUILD.format(out=str(tmp_path)), **env)
    assert result.returncode == 0, result.stderr
    assert f"pixnorm: the kernels were not built, the reference will be used: {reason}" in result.stderr
    assert not list(tmp_path.rglob("_C.*"))


@pytest.mark.parametrize("prelude, env", [("", NO_COMPILER), (HIDE_TORCH, {})], ids=["no compiler", "no torch"])
def test_build_can_be_made_mandatory(tmp_path, prelude, env):
    result = run(prelude + BUILD.format(out=str(tmp_path)), PIXNORM_BUILD="1", **env)
    assert result.returncode == 1
    assert "pixnorm: the kernels were not built: " in result.stderr


def test_all_modules_are_installed(tmp_path):
    """Those in Triton too, and by their own name: at the top another distribution has it."""
    out = tmp_path / "lib"
    code = f"""
import runpy, sys
sys.argv = ["setup.py", "-q", "egg_info", "-e", {str(tmp_path)!r}, "build_py", "--build-lib", {str(out)!r}]
runpy.run_path("setup.py", run_name="__main__")
"""
    result = run(code, PIXNORM_BUILD="0")
    assert result.returncode == 0, result.stderr
    expected = {path.relative_to(ROOT) for path in ROOT.glob("pixnorm/**/*.py")}
    expected |= {Path("pixnorm") / path.relative_to(ROOT) for path in ROOT.glob("triton_kernels/*.py")}
    assert {path.relative_to(out) for path in out.rglob("*.py")} == expected
    installed = (
        "import sys; sys.path.insert(0, '.'); import pixnorm.triton_kernels; print(pixnorm.triton_kernels.__file__)"
    )
    found = subprocess.run([sys.executable, "-c", installed], cwd=out, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()) == out / "pixnorm" / "triton_kernels" / "__init__.py"


def test_package_works_without_the_extension():
    result = run(
        """
import sys
import warnings

sys.modules["pixnorm._C"] = None  # an import of it now fails

import torch
import pixnorm

report = pixnorm.backends()
assert report["reference"] == "available"
assert report["native (cpu)"].startswith("unavailable: pixnorm._C is not there")
assert "compiler" in report["native (cpu)"]

torch.manual_seed(0)
x, layer = torch.randn(2, 4, 5, 6), pixnorm.SPN2d(4)
layer.impl = "reference"
expected = layer(x)
layer.impl = "auto"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert torch.equal(layer(x), expected)
    layer(x)
assert len(caught) == 1 and "pixnorm._C is not there" in str(caught[0].message)
assert "pixnorm._C is not there" in pixnorm.backends()["auto: spn"]

layer.impl = "native"
try:
    layer(x)
except RuntimeError as error:
    assert "compiler" in str(error)
else:
    raise AssertionError("impl='native' ran without the extension")
"""
    )
    assert result.returncode == 0, result.stderr
