"""The record of the last `make compat`, and the stacks."""

import json
import re
from pathlib import Path

import pytest

import compat
from compat import OLDEST, STACKS, fingerprint, stacks, staleness

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]


def result(tmp_path, monkeypatch, **changes):
    of_stacks = {"oldest": {"failed": changes.pop("failed", 0)}}
    file = tmp_path / "result.json"
    file.write_text(json.dumps({"fingerprint": fingerprint(), "commit": "abc", "stacks": of_stacks} | changes))
    monkeypatch.setattr(stacks, "RESULT", file)


def test_a_run_of_these_sources_says_nothing(tmp_path, monkeypatch):
    result(tmp_path, monkeypatch)
    assert staleness() is None


@pytest.mark.parametrize(
    "changes, reason", [({"fingerprint": "0"}, "last ran at abc"), ({"failed": 3}, "had failures: oldest (3)")]
)
def test_another_one_is_told_of(tmp_path, monkeypatch, changes, reason):
    result(tmp_path, monkeypatch, **changes)
    assert reason in staleness()
    monkeypatch.setattr(stacks, "RESULT", tmp_path / "none")
    assert staleness() == "make compat has never run"


@pytest.mark.parametrize(
    "name", ["csrc/cpu/spn.cpp", "csrc/cuda/vec.cuh", "pixnorm/ops/spn.py", "triton_kernels/spn.py"]
)
def test_the_fingerprint_is_of_what_versions_disagree_with(tmp_path, name):
    for file in (name, "README.md"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("a")
    before = fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("b")
    assert fingerprint(tmp_path) == before
    (tmp_path / name).write_text("b")
    assert fingerprint(tmp_path) != before


def test_the_oldest_torch_is_the_one_that_is_claimed():
    claimed = re.search(r'dependencies = \["torch>=([\d.]+)"\]', (ROOT / "pyproject.toml").read_text())[1]
    assert f"torch=={claimed}.0" in OLDEST.packages
    assert f"PyTorch {claimed} or newer" in (ROOT / "README.md").read_text()


def test_a_stack_has_one_version_of_each_package():
    for stack in STACKS:
        wanted = [re.match(r"[\w-]+", line)[0] for line in stack.requirements() if ";" not in line]
        assert len(wanted) == len(set(wanted)) and {"torch", "pytest", "ninja"} <= set(wanted)
    assert compat.OLDEST is STACKS[0]
