"""What is asked of a GPU first, in two minutes: what it is, whether the numbers are right, how fast they come."""

import json
import os
import subprocess
from collections.abc import Iterator
from itertools import product

import torch
import triton
from pytest_benchmark.utils import get_commit_info

import pixnorm
from benchmarks.gpu.bundle import BUNDLE
from benchmarks.gpu.section import EAGER, Call, Section
from benchmarks.gpu.timing import Spread
from benchmarks.results import provenance
from benchmarks.test_spn import HEADS, label
from benchmarks.test_spn import case as case_of
from pixnorm.testing import DENSE_LAYOUTS, DTYPES, SPECS, SPN, Case, OpSpec, check_against_eager

SHAPE = (64, 256, 32, 32)


def facts(section: Section) -> None:
    """The machine, the versions, what can run and why the rest cannot; and how fast the memory is."""
    device = section.device.type
    gpu = torch.cuda.get_device_name() if section.stopwatch.on_gpu else "a CPU: a trial of the benchmarks for GPUs"
    told = provenance(get_commit_info(), "make gpu")
    bundle = BUNDLE / "bundle.json"
    if len(get_commit_info()["id"]) < 40 and bundle.exists():  # a copy without git, and what was built for it
        told["commit"] = json.loads(bundle.read_text())["commit"]
    told["versions"] += f", CUDA {torch.version.cuda}, Triton {triton.__version__}"
    asked = ["nvidia-smi", "--query-gpu=driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"]
    try:
        smi = subprocess.run([*asked, "--format=csv,noheader"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        smi = f"nvidia-smi: {error}"
    found = {
        "machine": f"{gpu}, {os.cpu_count()} CPU cores",
        "driver, memory, clocks, power": smi.strip(),
        **{name: state for name, state in pixnorm.backends().items() if f"({device})" in name or name == "triton"},
        **told,
    }
    section.add("facts", facts=found)
    if bandwidth := section.attempt("copy", section.stopwatch.copy_bandwidth):
        section.add("copy", bandwidth=bandwidth)


def check(section: Section) -> None:
    """A forward and a backward of each op, impl, dtype and layout, by the rule of the tests."""
    torch.set_default_device(section.device)
    torch.backends.cudnn.allow_tf32 = False
    for impl, spec, (dtype, parameter_dtype), layout in checks(section):
        where = {"op": str(spec), "impl": impl, "layout": layout}
        where |= {"dtype": _short(dtype) + ("" if dtype == parameter_dtype else f", {_short(parameter_dtype)}")}

        if not section.has("check", **where):
            titled = " ".join(("check", *where.values()))
            right = section.attempt(titled, compare, section, spec, impl, dtype, parameter_dtype, layout)
            section.add("check", **where, right=bool(right))


def compare(section: Section, spec: OpSpec, impl: str, *of_tensors) -> bool:
    for case in cases(section, spec):
        check_against_eager(spec, impl, case, *of_tensors)
    return True


def checks(section: Section) -> Iterator[tuple]:
    """Native before Triton, which compiles for seconds; what is used most before the rest."""
    impls = dict.fromkeys(impl for spec in SPECS for impl in section.impls(spec))
    for impl, parameters, spec, layout in product(impls, DTYPES, SPECS, DENSE_LAYOUTS):
        if impl in section.impls(spec) and parameters in spec.dtypes:
            yield impl, spec, parameters, layout


def cases(section: Section, spec: OpSpec) -> Iterator[Case]:
    """Sizes without a common factor, and such as generators have."""
    for variant in spec.variants:
        yield Case((3, 17, 7, 10), "remainders everywhere", variant)
        if section.stopwatch.on_gpu:
            yield Case((8, 64, 32, 32), "none", variant)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def first(section: Section) -> None:
    """SPN at one shape, forward and backward: every impl beside eager mode, in both layouts."""
    for head, precision in product(HEADS, section.some_precisions):
        call = Call(section, SPN, case_of(head, section.sized(SHAPE)), precision)
        where = {"head": head, "shape": label(SHAPE), "precision": precision}
        for name in (*section.fused(SPN), *EAGER):
            if section.has("first", **where, contender=name):
                continue

            titled = f"first {' '.join(where.values())} {name}"
            for mode, spread in (section.attempt(titled, times, section, call, name) or {}).items():
                section.add("first", **where, mode=mode, contender=name, **spread._asdict())


def times(section: Section, call: Call, name: str) -> dict[str, Spread]:
    return section.stopwatch.device_times(call.ready(name).timed())
