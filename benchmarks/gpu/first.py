"""The first two minutes on a GPU: what it is, whether results are right, one timing."""

import json
import os
import subprocess
from collections.abc import Iterator
from itertools import product

import torch
import triton
from pytest_benchmark.utils import get_commit_info

import pixnorm
from benchmarks.contenders import Call
from benchmarks.gpu.bundle import BUNDLE
from benchmarks.gpu.section import Section
from benchmarks.ops import OPS
from benchmarks.records import provenance
from benchmarks.registry import MAIN_PRECISIONS, in_layouts, label
from benchmarks.stopwatch import Spread
from pixnorm.testing import DENSE_LAYOUTS, DTYPES, SPECS, Case, OpSpec, check_against_eager


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
    """The first op at its main shape, forward and backward: every impl beside eager mode, in both layouts."""
    op = next(iter(OPS.values()))
    shape = op.shapes.gpu[0]
    for head, precision in product(op.heads, section.precisions(MAIN_PRECISIONS)):
        call = section.call(op, head, shape, precision)
        where = {"op": str(op), "head": head, "shape": label(shape), "precision": precision}
        for name in (*section.fused(op.spec), *in_layouts("eager")):
            if section.has("first", **where, contender=name):
                continue
            title = f"first {' '.join(where.values())} {name}"
            for mode, spread in (section.attempt(title, times, section, call, name) or {}).items():
                section.add("first", **where, mode=mode, contender=name, **spread._asdict())


def times(section: Section, call: Call, name: str) -> dict[str, Spread]:
    return section.stopwatch.device_times(call.ready(name).timed())
