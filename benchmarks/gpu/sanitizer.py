"""``python -m benchmarks.gpu.sanitizer --records FILE``: compute-sanitizer over small calls of each op.

Memory errors (memcheck), then races in shared memory (racecheck), of our kernels in CUDA C++ and then of Triton's; each
dtype and layout, on sizes that leave remainders everywhere.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import torch
from torch.utils.cpp_extension import CUDA_HOME

from benchmarks.gpu.section import Section
from pixnorm.testing import DENSE_LAYOUTS, SPECS, Case, available_impls, evaluate

TOOLS = ("memcheck", "racecheck")
FOUND = 9  # exit status of a tool that has found something


def calls(device: str, impl: str) -> None:
    """What is looked at."""
    torch.set_default_device(device)
    specs = [spec for spec in SPECS if spec.cuda_kernels or impl != "native" or device == "cpu"]
    for spec in specs:
        for (dtype, parameter_dtype), layout, variant in product(spec.dtypes, DENSE_LAYOUTS, spec.variants):
            case = Case((2, 17, 7, 10), "remainders everywhere", variant)
            tensors = spec.inputs(case, dtype, parameter_dtype=parameter_dtype, layout=layout)
            evaluate(spec, spec.call(impl), tensors, case.options)
            if device == "cuda":
                torch.cuda.synchronize()
            print("went through", spec, impl, dtype, layout, flush=True)


def find() -> str | None:
    """The tool: on the path, in the CUDA toolkit, or beside Nsight Compute."""
    folders = [os.environ.get("PATH", ""), f"{CUDA_HOME}/bin", f"{CUDA_HOME}/compute-sanitizer"]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def look(section: Section, tool: str, sanitizer: str | None, impl: str) -> None:
    """One run of a tool; with no sanitizer, of what it would look at."""
    device = section.device.type
    command = [sys.executable, "-u", "-m", "benchmarks.gpu.sanitizer", "--calls", impl, "--device", device]
    if sanitizer:
        options = ["--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
        options += ["--report-api-errors", "no"]  # of libraries, which try things and go on
        command = [sanitizer, *options, *command]
    # Each tensor is an allocation of its own: what is beyond its end is nobody's.
    variables = dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout[-6000:], flush=True)
    summary = re.findall(r"=+ (?:ERROR SUMMARY|RACECHECK SUMMARY): (.*)", done.stdout)
    went_through = done.stdout.count("went through")
    section.add("sanitizer", tool=tool, impl=impl, calls=went_through, summary=summary, status=done.returncode)
    if done.returncode == FOUND:
        section.failed = True
        told = re.findall(r"=+ ((?:Invalid|Error|Warning|Race|Program hit).*)", done.stdout)
        section.add("failure", where=f"{tool}, {impl}", error=" ".join(told[:1] + summary)[:300])
    elif done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: {done.stdout.strip().splitlines()[-1:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a trial, without the tool")
    parser.add_argument("--records", type=Path, metavar="FILE")
    parser.add_argument("--calls", metavar="IMPL", help="make the calls that are looked at, and end")
    arguments = parser.parse_args()
    if arguments.calls:
        calls(arguments.device, arguments.calls)
        return
    section = Section(arguments.device, arguments.records)
    sanitizer = find()
    if sanitizer is None and arguments.device == "cuda":
        sys.exit("compute-sanitizer is not on the path, nor in the CUDA toolkit")
    for impl, tool in product(available_impls(arguments.device)[1:], TOOLS if sanitizer else TOOLS[:1]):
        section.attempt(f"{tool}, {impl}", look, section, tool, sanitizer, impl)
    sys.exit(section.failed)


if __name__ == "__main__":
    main()
