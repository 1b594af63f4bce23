"""``python -m compat``: install, build and test with the oldest and the newest supported versions.

Each stack has a folder in build/compat. This downloads two or three GB, and runs the tests twice.
"""

import argparse
import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from itertools import permutations
from pathlib import Path
from time import monotonic

from compat.stacks import FOLDER, RESULT, ROOT, STACKS, Stack, fingerprint

VERSIONS = """
import importlib.metadata, json, platform
packages = ("torch", "triton", "numpy", "setuptools")
print(json.dumps({"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}))
"""

# A forward and a backward by the native kernels, against the reference.
TRY = """
import torch, pixnorm
layer, x = pixnorm.SPN2d(8, upsample=2, activation="relu"), torch.randn(2, 8, 5, 6)
found = {}
for layer.impl in ("native", "reference"):
    layer.zero_grad()
    layer(x).square().sum().backward()
    found[layer.impl] = layer.mask_projection.grad
torch.testing.assert_close(*found.values(), rtol=1e-3, atol=1e-3)
assert not torch.version.cuda or pixnorm.backends()["native (cuda)"].startswith("available"), pixnorm.backends()
"""


def test(stack: Stack, arguments: list[str]) -> dict:
    """Run the tests: versions, counts, names of failures, reasons of skips."""
    report, started = FOLDER / stack.name / "tests.xml", monotonic()
    report.unlink(missing_ok=True)
    stack.run("-m", "pytest", "tests", "-q", "--tb=short", f"--junit-xml={report}", *arguments, check=False)
    found = json.loads(stack.ask(VERSIONS))
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    wrong = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skips = Counter(skip.get("message") for case in cases for skip in case.iter("skipped"))
    return found | {
        "passed": len(cases) - len(wrong) - skips.total(),
        "failed": len(wrong) if cases else "no report",
        "skipped": dict(skips),
        "failures": [f"{case.get('classname')}::{case.get('name')}" for case in wrong],
        "seconds": round(monotonic() - started),
    }


def exchange(builder: Stack, user: Stack) -> str:
    """Whether the build of one stack runs on the other: ``"works"``, or ``"fails"``."""
    folder = FOLDER / "exchanged"
    shutil.rmtree(folder, ignore_errors=True)
    for package in ("pixnorm", "triton_kernels"):
        shutil.copytree(builder.sources / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    asked = subprocess.run([str(user.interpreter), "-c", TRY], cwd=folder, env=user.environment())
    return "works" if asked.returncode == 0 else "fails"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], metavar="PATH", help="an interpreter to try first")
    parser.add_argument("--only", choices=[stack.name for stack in STACKS], help="test one stack, write no result")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest; with any, write no result")
    arguments = parser.parse_args()

    stacks = [stack for stack in STACKS if arguments.only in (None, stack.name)]
    for stack in stacks:  # first, so that the sources may change afterwards
        stack.copy_sources()
    for stack in stacks:
        print(f"=== {stack.name}: Python {stack.python}, {', '.join(stack.packages)}", flush=True)
        stack.install(arguments.python)
        stack.build()
    of_sources = fingerprint(stacks[0].sources)
    found = {}
    for stack in stacks:
        print(f"=== {stack.name}: tests", flush=True)
        found[stack.name] = test(stack, arguments.pytest)
    exchanged = {
        f"built on {builder.name}, used on {user.name}": exchange(builder, user)
        for builder, user in permutations(stacks, 2)
    }

    failed = [name for name, of in found.items() if of["failed"]]
    failed += [name for name, outcome in exchanged.items() if outcome != "works"]
    for name, of in found.items():
        versions = ", ".join(f"{package} {of[package]}" for package in ("python", "torch", "triton", "numpy"))
        print(
            f"{name}: {versions}: {of['passed']} passed, {of['failed']} failed, {sum(of['skipped'].values())} skipped"
        )
    for name, outcome in exchanged.items():
        print(f"{name}: {outcome}")
    if not arguments.only and not arguments.pytest:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
        result = {"fingerprint": of_sources, "commit": commit.stdout.strip(), "stacks": found, "exchanged": exchanged}
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written: {RESULT.relative_to(Path.cwd()) if RESULT.is_relative_to(Path.cwd()) else RESULT}")
    if failed:
        sys.exit(f"make compat: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
