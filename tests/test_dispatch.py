"""The choice of the backend: names, report, fallback and its warning, and running without compiled kernels."""

import contextlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pixnorm
from pixnorm.functional import spn
from pixnorm.ops import _dispatch
from pixnorm.testing import SPECS, SPN, Case, available_impls

ROOT = Path(__file__).parents[1]
DEVICE = torch.get_default_device().type
MODULE, REMEDY = _dispatch.EXTENSIONS[DEVICE]


def arguments(spec=SPN):
    return spec.inputs(Case((2, 3, 4, 5), ""))


def with_standard_convolutions(k=3):
    tensors = arguments()
    return tensors | {name: torch.rand(3, 3, k, k) for name in SPN.differentiable[-4:]}


@pytest.fixture
def nothing_fell_back(monkeypatch):
    monkeypatch.setattr(_dispatch, "fallbacks", type(_dispatch.fallbacks)())


class OpsCalled(TorchDispatchMode):
    """Records the names of pixnorm's ops that ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pixnorm":
            self.names.add(func.name().removeprefix("pixnorm::"))
        return func(*args, **(kwargs or {}))


# --- what can run here


def test_the_native_kernels_are_built():
    """Without them no other test covers a kernel, so their absence is a failure, not a skip."""
    report = pixnorm.backends()[f"native ({DEVICE})"]
    assert report.startswith("available"), report
    assert available_impls()[:2] == ["reference", "native"]


def test_the_report_says_what_can_run_and_why_the_rest_cannot():
    report = pixnorm.backends()
    assert report["reference"] == "available"
    assert {"native (cpu)", "native (cuda)", "triton"} <= report.keys()
    for text in report.values():
        assert text.startswith(("available", "unavailable: ", "ran on the reference: "))
        assert len(text) > len("unavailable: ") or text == "available"


@pytest.mark.cpu
@pytest.mark.skipif("native" in available_impls("cuda"), reason="CUDA kernels are built here")
def test_a_missing_backend_comes_with_its_remedy():
    reason = pixnorm.backends()["native (cuda)"]
    assert "pixnorm._cuda" in reason and "nvcc" in reason


# --- the choice


@pytest.mark.parametrize("impl, native", [("auto", True), ("native", True), ("reference", False)])
def test_the_impl_that_was_named_runs(spec, impl, native):
    tensors = arguments(spec)
    leaves = spec.leaves(tensors)
    with OpsCalled() as called:
        spec.function(**(tensors | leaves), impl=impl).sum().backward()
    expected = {f"{spec.name}_fwd", f"{spec.name}_bwd"} | ({"update_running"} if spec.buffers else set())
    expected |= {name for helpers in spec.helpers for name in helpers}
    assert called.names == (expected if native else set())
    assert all(leaf.grad is not None for leaf in leaves.values())


def test_auto_is_the_default(spec, nothing_fell_back):
    """An op without kernels for this device runs on the reference, with a warning."""
    native = spec.runs("native", DEVICE)
    warned = contextlib.nullcontext() if native else pytest.warns(UserWarning, match="there are no native kernels")
    with OpsCalled() as called, warned:
        spec.function(**arguments(spec))
    expected = {f"{spec.name}_fwd"} | ({"update_running"} if spec.buffers else set())
    expected |= set(spec.helpers[0])
    assert called.names == (expected if native else set())


FALLBACKS = {"standard convolutions": (with_standard_convolutions, "not for standard convolutions")}


@pytest.mark.cpu
@pytest.mark.parametrize("which", FALLBACKS)
def test_auto_falls_back_with_a_reason(nothing_fell_back, which):
    make, reason = FALLBACKS[which]
    tensors = make()
    expected = spn(**{name: t.clone() for name, t in tensors.items()}, impl="reference")
    assert not any(key.startswith("auto") for key in pixnorm.backends())
    with pytest.warns(UserWarning, match=reason) as caught:
        actual = spn(**tensors)
    assert torch.equal(actual, expected)
    assert [warning.filename for warning in caught] == [__file__], "the warning points at the caller"
    assert any(key.startswith("auto") and "spn" in key and reason in text for key, text in pixnorm.backends().items())


@pytest.mark.cpu
def test_auto_warns_once_per_reason(nothing_fell_back):
    """However often: a generator may have layers of several sizes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            for make, _ in FALLBACKS.values():
                spn(**make())
                spn(**make(5))
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == len(set(messages)) == len(FALLBACKS)
    assert all("spn" in message and "reference" in message for message in messages)
    report = " ".join(pixnorm.backends().values())
    assert all(reason in report for _, reason in FALLBACKS.values())


@pytest.mark.parametrize("which", FALLBACKS)
def test_a_named_impl_never_falls_back(which):
    make, reason = FALLBACKS[which]
    tensors = make()
    before = {name: t.clone() for name, t in tensors.items()}
    with pytest.raises(RuntimeError, match=f"spn: impl='native' cannot run here: .*{reason}"):
        spn(**tensors, impl="native")
    assert all(torch.equal(tensors[name], value) for name, value in before.items())


@pytest.mark.cpu
def test_a_fallback_compiles(nothing_fell_back):
    """No graph break, and no warning from inside the compiler."""
    torch.compiler.reset()
    tensors = with_standard_convolutions()
    expected = spn(**{name: t.clone() for name, t in tensors.items()}, impl="reference")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="pixnorm")
        actual = torch.compile(spn, fullgraph=True, backend="eager")(**tensors)
    torch.testing.assert_close(actual, expected)


# --- other devices


@pytest.mark.parametrize("impl", ["auto", "native", "reference"])
def test_meta_tensors_have_the_shape_of_the_result(spec, variant, impl):
    tensors = spec.inputs(Case((2, 3, 4, 5), "", variant))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = spec.function(**{name: t.to("meta") for name, t in tensors.items()}, **variant, impl=impl)
    assert y.device.type == "meta" and y.shape == spec.reference(**tensors, **variant).shape


@pytest.mark.parametrize("which", FALLBACKS)
def test_meta_tensors_are_refused_like_real_ones(which):
    make, reason = FALLBACKS[which]
    with pytest.raises(RuntimeError, match=reason):
        spn(**{name: t.to("meta") for name, t in make().items()}, impl="native")


@pytest.mark.parametrize("capability, refused", [((7, 5), True), ((8, 0), False), ((12, 0), False)])
def test_gpus_before_ampere_are_refused(monkeypatch, capability, refused):
    """On a simulated GPU; the refusal has a reason, also inside the compiler."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(_dispatch, "gpu_obstacles", {})
    monkeypatch.setattr(_dispatch, "missing", {})
    obstacle = _dispatch.native_obstacle("spn", torch.device("cuda", 0), None)
    assert (obstacle is not None and "8.0 and newer, this is 7.5" in obstacle) if refused else obstacle is None
    assert _dispatch.native_obstacle("spn", torch.device("cuda", 0), "another reason") == "another reason"

    def fallen_back(x):
        return x + bool(_dispatch.native_obstacle("spn", torch.device("cuda", 1), None))

    torch.compiler.reset()
    assert torch.compile(fallen_back, fullgraph=True, backend="eager")(torch.zeros(())) == refused


# --- without compiled kernels


def run_without_kernels(code):
    """Run code in a process where importing the kernels of this device fails, as if they were not built."""
    prelude = f"import sys; sys.modules[{MODULE!r}] = None\nimport torch, pixnorm\nfrom pixnorm.testing import *\n"
    prelude += f"torch.set_default_device({DEVICE!r})\n"
    prelude += "from pixnorm.testing import SPN\nt = SPN.inputs(Case((2, 3, 4, 5), ''))\n"
    return subprocess.run([sys.executable, "-c", prelude + code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.cpu
def test_without_kernels_auto_runs_the_reference_and_says_so_once():
    result = run_without_kernels(
        "leaf = t['x'].requires_grad_()\n"
        "pixnorm.functional.spn(**t).sum().backward()\n"
        "pixnorm.functional.spn(**t)\n"
        "assert leaf.grad is not None\n"
        f"print(pixnorm.backends()['native ({DEVICE})'])\n"
        "print(available_impls())\n"
    )
    assert result.returncode == 0, result.stderr
    report, impls = result.stdout.splitlines()
    assert report.startswith(f"unavailable: {MODULE}") and REMEDY in report
    assert impls == "['reference']"
    assert result.stderr.count("runs on the reference") == 1 and REMEDY in result.stderr


def test_without_kernels_native_says_how_to_get_it():
    result = run_without_kernels("pixnorm.functional.spn(**t, impl='native')")
    assert result.returncode != 0
    assert f"RuntimeError: spn: impl='native' cannot run here: {MODULE}" in result.stderr
    assert REMEDY in result.stderr


def test_without_kernels_the_op_can_be_traced():
    """Schema and fake are in Python: the op can be traced where it cannot run."""
    result = run_without_kernels(
        "from torch._subclasses import FakeTensorMode\n"
        "with FakeTensorMode(allow_non_fake_inputs=True) as mode:\n"
        "    fakes = {name: mode.from_tensor(tensor) for name, tensor in t.items()}\n"
        "    op, args = next(iter(SPN.kernel_calls('native', fakes, {'upsample': 2})))\n"
        "    print(tuple(op(*args)[0].shape))\n"
    )
    assert result.stdout.strip() == "(2, 3, 8, 10)", result.stderr


def test_every_spec_has_its_ops():
    for spec in SPECS:
        for suffix in ("fwd", "bwd"):
            assert hasattr(torch.ops.pixnorm, f"{spec.name}_{suffix}")


# --- where an op is


@pytest.mark.cpu
def test_an_op_has_its_files(spec):
    """The stem of the file that defines it, in each folder that it claims; and no kernel file that it does not."""
    stem = spec.reference.__module__.rpartition(".")[2]
    claimed = {f"pixnorm/ops/{stem}.py": True, f"pixnorm/testing/{stem}.py": True, f"tests/test_{stem}.py": True}
    for suffix in ("fwd", "bwd"):
        op = f"{spec.name}_{suffix}"
        claimed[f"csrc/cpu/{stem}.cpp"] = "cpu" in _dispatch.native_devices[op]
        claimed[f"csrc/cuda/{stem}.cu"] = "cuda" in _dispatch.native_devices[op]
        claimed[f"triton_kernels/{stem}.py"] = _dispatch.triton_modules.get(op) == stem
        assert claimed == {file: (ROOT / file).exists() for file in claimed}


@pytest.mark.cpu
def test_every_op_with_a_backward_has_a_spec():
    """A forward and a backward op are always tested like all others."""
    ours = [name for name, fake in _dispatch.fakes.items() if fake.__module__.startswith("pixnorm.")]
    defined = {name.removesuffix("_bwd") for name in ours if name.endswith("_bwd")}
    assert defined == {spec.name for spec in SPECS}
