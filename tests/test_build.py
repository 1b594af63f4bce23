"""The compiled extension: its report, its symbols, its build, and running without it."""

import glob
import os
import re
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import pixnorm
from pixnorm import _C

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]
CAPABILITIES = ["baseline", "avx2", "avx512", "avx512_bf16", "amx"]  # from least to most


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    """Run Python code in a new process, in the root folder; of PIXNORM_* variables only those given are set."""
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
    allowed = {min(best_capability, limit, key=CAPABILITIES.index)}
    if limit == "avx512_bf16" and best_capability == "avx512":  # slower on an Intel CPU, and used there only if named
        allowed.add(limit)
    assert found in allowed


def test_unknown_capability_is_an_error():
    result = run("import pixnorm; pixnorm.backends()", PIXNORM_CPU_CAPABILITY="sse9")
    assert result.returncode != 0
    names = "'baseline', 'avx2', 'avx512', 'avx512_bf16' or 'amx'"
    assert f"PIXNORM_CPU_CAPABILITY must be {names}, got 'sse9'" in result.stderr


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
    """Those in Triton too, as pixnorm.triton_kernels: another distribution owns the top-level name."""
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


def test_a_source_distribution_has_every_source(tmp_path):
    """CUDA sources too, even if torch has no CUDA here: it may have where the distribution is built."""
    code = f"""
import runpy, sys
sys.argv = ["setup.py", "-q", "egg_info", "-e", {str(tmp_path)!r}, "sdist", "-d", {str(tmp_path)!r}]
runpy.run_path("setup.py", run_name="__main__")
"""
    result = run(code, PIXNORM_BUILD="0")
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {Path(*Path(member.name).parts[1:]).as_posix() for member in packed if member.isfile()}
        packed.extractall(tmp_path / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    wanted = ["csrc", "pixnorm", "triton_kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE"]
    tracked = subprocess.run(
        ["git", "ls-files", *wanted], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert set(tracked) <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
    # A wheel built from it has the whole package.
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "lib")]
    subprocess.run(command, cwd=unpacked, env=os.environ | {"PIXNORM_BUILD": "0"}, capture_output=True, check=True)
    built = {file.relative_to(tmp_path / "lib").as_posix() for file in (tmp_path / "lib").rglob("*.py")}
    assert {name for name in tracked if name.startswith("pixnorm/") and name.endswith(".py")} <= built


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


# --- finding CUDA


@pytest.fixture
def setup_py(monkeypatch):
    """The functions of setup.py, with no toolkit in the usual places."""
    functions = runpy.run_path(str(ROOT / "setup.py"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setitem(functions["find_cuda_toolkit"].__globals__, "glob", lambda pattern: tuple(_glob(pattern)))
    monkeypatch.setattr(os.path, "exists", lambda path, exists=os.path.exists: not _usual(path) and exists(path))
    return functions


def _usual(path):
    return str(path).startswith(("/usr/local/cuda", "/opt/cuda"))


def _glob(pattern):
    return (path for path in glob.glob(pattern) if not _usual(path))


def toolkit(folder, libraries="lib64"):
    for name in ("include/cuda_runtime_api.h", f"{libraries}/libcudart.so", "bin/nvcc"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def executable(path, text="exit 1"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_the_cuda_toolkit_behind_a_script(setup_py, monkeypatch, tmp_path):
    """nvcc is a script that calls the real one; its own folder has neither header nor library."""
    real = toolkit(tmp_path / "cuda")
    executable(real / "bin" / "nvcc", f"echo '#$ _HERE_={real}/bin' >&2")
    executable(tmp_path / "wrapped" / "bin" / "nvcc", f'exec {real}/bin/nvcc "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path}/wrapped/bin{os.pathsep}{os.environ['PATH']}")
    assert setup_py["find_cuda_toolkit"]()[0] == str(real)


def test_the_cuda_toolkit_behind_a_link(setup_py, monkeypatch, tmp_path):
    real = toolkit(tmp_path / "cuda", "targets/x86_64-linux/lib")
    executable(real / "bin" / "nvcc")
    (tmp_path / "linked" / "bin").mkdir(parents=True)
    (tmp_path / "linked" / "bin" / "nvcc").symlink_to(real / "bin" / "nvcc")
    monkeypatch.setenv("PATH", f"{tmp_path}/linked/bin")
    assert setup_py["find_cuda_toolkit"]()[0] == str(real)


@pytest.mark.parametrize("lacking", ["include/cuda_runtime_api.h", "lib64/libcudart.so"])
def test_a_folder_that_lacks_something_is_no_toolkit(setup_py, monkeypatch, tmp_path, lacking):
    """The folders that were tried are reported."""
    (toolkit(tmp_path / "half") / lacking).unlink()
    executable(tmp_path / "half" / "bin" / "nvcc")
    monkeypatch.setenv("PATH", f"{tmp_path}/half/bin")
    found, tried = setup_py["find_cuda_toolkit"]()
    assert found is None and str(tmp_path / "half") in tried and "/usr/local/cuda" in tried


def test_cuda_home_is_not_doubted(setup_py, monkeypatch, tmp_path):
    """It takes precedence over the path, and if it is no toolkit there is no fallback."""
    executable(toolkit(tmp_path / "on_path") / "bin" / "nvcc")
    monkeypatch.setenv("PATH", f"{tmp_path}/on_path/bin")
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "named")))
    assert setup_py["find_cuda_toolkit"]() == (str(tmp_path / "named"), [str(tmp_path / "named")])
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    assert setup_py["find_cuda_toolkit"]() == (None, [str(tmp_path / "nothing")])


def test_one_build_serves_every_python():
    assert Path(_C.__file__).name.endswith(".abi3.so" if sys.platform != "win32" else ".pyd")
