"""The benchmarks for GPUs as far as no GPU is needed: what is found is kept, whatever happens to who finds it."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import processes
from benchmarks.gpu.__main__ import some_of, unused
from benchmarks.gpu.bundle import obstacles, pack, unpack
from benchmarks.gpu.parts import parts
from benchmarks.gpu.processes import CONTEXT_LOST, Companion, Part
from benchmarks.gpu.section import ContextLostError, Section
from benchmarks.records import Records
from benchmarks.report import markdown
from benchmarks.stopwatch import Launch, Stopwatch, calls_in
from pixnorm.testing import DENSE_LAYOUTS, SPN

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where parts leave their logs and records."""
    monkeypatch.setattr(processes, "FOLDER", tmp_path)
    return tmp_path


def python(code, name="part", **options):
    return Part(name, [sys.executable, "-u", "-c", code], 1, options.pop("limit", 60), "a test", **options)


def run(part, seconds=60):
    heard = []
    part.run(dict(os.environ), time.monotonic() + seconds, heard.append)
    return "".join(heard)


# --- what a kill leaves


def test_what_was_found_outlives_a_kill(tmp_path):
    """SIGKILL: no handler runs. What is on disk is whole, and none of the processes goes on."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--device=cpu", "--parts=facts,check,first"]
    command += [f"--results={tmp_path}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        records = wait_for(lambda: [r for r in map(Records.load, tmp_path.glob("*.json")) if has_checks(r)])[0]
        wait_for(lambda: any(re.search(SOME_RIGHT, page.read_text()) for page in tmp_path.glob("*.md")))
        children = [int(pid) for pid in wait_for(lambda: children_of(process.pid))]
    finally:
        process.kill()
        process.wait()
    assert "CPU cores" in records.facts["machine"] and all(check["right"] for check in records.all("check"))
    (file,), (page,) = tmp_path.glob("*.json"), tmp_path.glob("*.md")
    assert has_checks(Records.load(file))
    assert re.search(SOME_RIGHT, page.read_text())  # perhaps of three seconds before
    (log,) = tmp_path.glob("*-log.txt")
    assert "=== check: forward and backward" in log.read_text()
    assert wait_for(lambda: not any(alive(child) for child in children))


SOME_RIGHT = r"layout: [1-9]\d* right, 0 wrong"


def has_checks(records):
    return len(records.all("check")) > 1


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    pytest.fail("it did not come")


def children_of(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


# --- parts


def test_a_part_that_loses_the_gpu_is_started_again(folder):
    """Also one that a signal has ended; one that merely fails is not."""
    code = f"import os, sys; n = len(os.listdir('{folder}')); open(f'{folder}/start{{n}}', 'w')"
    (folder / "part.log").touch()
    lost = python(f"{code}; n -= 1; print('start', n); n == 0 and sys.exit({CONTEXT_LOST}); n == 1 and os.abort()")
    heard = run(lost)
    assert lost.state == "done" and [f"start {n}" in heard for n in range(4)] == [True, True, True, False]
    failing = python("print('once'); exit(1)", "failing")
    assert run(failing).count("once") == 1 and failing.state == "failed (exit status 1)"
    hopeless = python(f"print('once more'); exit({CONTEXT_LOST})", "hopeless")
    assert run(hopeless).count("once more\n") == 1 + processes.RESTARTS
    assert hopeless.state == f"failed (exit status {CONTEXT_LOST})"


@pytest.mark.parametrize("seconds, limit", [(60, 2), (2, 60)], ids=["its limit", "the end of all"])
def test_a_part_is_stopped_in_time(folder, seconds, limit):
    """By a signal that it can answer, as pytest does."""
    code = "import time\ntry:\n print('begun')\n time.sleep(60)\nexcept KeyboardInterrupt:\n print('what I have')"
    part, before = python(code, limit=limit), time.monotonic()
    assert "what I have" in run(part, seconds)
    assert part.state == "stopped: out of time" and time.monotonic() - before < 20
    assert (folder / "part.log").read_text() == "begun\nwhat I have\n"


def test_a_companion_makes_way(folder):
    """It stands still while times are taken, and ends with the run."""
    counter = folder / "count"
    code = f"import time\nn = 0\nwhile True:\n n += 1\n open('{counter}', 'w').write(str(n))\n time.sleep(0.01)"
    companion = Companion("companion", [sys.executable, "-c", code], 0, 60, "a test")
    companion.run(dict(os.environ), time.monotonic() + 60, print)

    def count():
        return int(counter.read_text() or 0) if counter.exists() else 0

    wait_for(count)
    companion.pause()
    time.sleep(0.2)
    before = count()
    time.sleep(0.5)
    assert count() == before
    companion.go_on()
    assert wait_for(lambda: count() > before + 5)
    companion.kill()
    companion.thread.join(20)
    assert companion.state == "ended with the run"


def test_the_parts_come_in_the_order_of_their_worth():
    _, sequence = parts("cuda", build=False)
    names = [part.name for part in sequence]
    worth = ["load", "facts", "check", "first", "tests-native", "kernels", "layers", "step"]
    assert names[: len(worth)] == worth
    assert names.index("tests-triton") > max(names.index(name) for name in ("small", "step"))
    assert names.index("peers") > names.index("tests-triton") and names[-1] == "tests-large"
    until_tests = sum(part.seconds for part in sequence[: names.index("tests-native") + 1])
    assert until_tests <= 4 * 60 and sum(part.seconds for part in sequence) <= 8 * 60
    assert all(part.quiet for part in sequence if part.name in ("kernels", "layers", "step", "small", "peers"))


def test_some_parts_come_with_what_they_need():
    companions, sequence = parts("cuda", build=False)

    def chosen(*names):
        beside, found = some_of(set(names), companions, sequence)
        return [part.name for part in beside], [part.name for part in found]

    assert chosen("sanitizer", "tests-large") == ([], ["load", "sanitizer", "tests-large"])
    assert chosen("peers", "facts") == ([], ["load", "facts", "compiling", "peers"])
    assert chosen("peers", "tests-triton") == (["precompile", "compiling"], ["load", "tests-triton", "peers"])


def test_a_second_run_does_not_replace_the_first(tmp_path):
    for expected in ("gpu", "gpu-2", "gpu-3"):
        found = unused(tmp_path / "gpu")
        assert found.name == expected
        found.with_suffix(".json").touch()


# --- sections


def test_a_section_goes_on_behind_what_took_the_context(tmp_path):
    file = tmp_path / "records.jsonl"
    section = Section("cpu", file)
    assert section.attempt("fine", lambda: 1) == 1
    section.add("layer", contender="a", median=1.0)
    assert section.attempt("wrong", lambda: 1 / 0) is None and section.failed

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    section.stopwatch.synchronize = lost  # as CUDA does from then on
    with pytest.raises(ContextLostError):
        section.attempt("takes the context", lambda: 1)
    file.write_text(file.read_text() + '{"what": "start", "where": "dies with the process"}\n{"what": "fail')

    after = Section("cpu", file)
    assert after.failed and after.has("layer", contender="a") and not after.has("layer", contender="b")
    for skipped in ("wrong", "takes the context", "dies with the process"):
        assert after.attempt(skipped, pytest.fail) is None
    assert after.attempt("next", lambda: 2) == 2


def test_tests_are_told_of_as_they_end(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import time\ndef test_right(): pass\ndef test_wrong(): assert 1 == 2\ndef test_slow(): time.sleep(60)\n"
    )
    file = tmp_path / "tests-native.jsonl"
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu.tests", "-p", "no:cacheprovider", str(tmp_path)]
    variables = os.environ | {"PIXNORM_GPU_RECORDS": str(file), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: file.exists() and "test failure" in file.read_text())
    finally:
        process.kill()
        process.wait()
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    records = Records({}, [], entries)
    assert records.failures() == ["test_some.py::test_wrong: assert 1 == 2"]
    counts = records.tests("tests-native")
    assert (counts["passed"], counts["failed"]) == (1, 1)
    page = markdown(records, None)
    assert page.index("test_some.py::test_wrong") < page.index("## Goals")  # failures first


def kernel(median, **more):
    where = {"op": "spn", "head": "plain", "shape": "64x256x32x32", "precision": "tf32"}
    where |= {"contender": "native-contiguous"}
    more = {"kernel": "spn_fwd_modulate_kernel", "copy": 1e-4, "bytes": 10**8, **more}
    spread = {
        "median": median,
        "low": median,
        "high": median,
        "shortest": median,
        "times_per_call": 1,
        "registers_per_thread": 90,
    }
    return {"what": "kernel", **where, **more, **spread}


@pytest.mark.parametrize("share, suspect", [(1.2, True), (0.9, False), (0.31, False), (0.2, True)])
def test_shares_that_cannot_be_are_flagged(share, suspect):
    records = Records({"machine": "NVIDIA H200, 16 CPU cores"}, [], [kernel(1e-4 / share)])
    page = markdown(records, None)
    assert ("Not to be believed" in page) == suspect
    assert (f"**{share:.0%}**" in page) == suspect and f"{share:.0%}" in page


def test_predictions_stand_beside_what_was_measured():
    layer = kernel(50e-6) | {"what": "layer", "mode": "forward"}
    page = markdown(Records({"machine": "NVIDIA H200, 16 CPU cores"}, [], [layer]), None)
    (row,) = [
        line for line in page.splitlines() if "| SPN, forward, 64x256x32x32, fp32 with TF32" in line and "-" in line
    ]
    assert "109" in row and "-54%" in row
    assert "-54%" not in markdown(Records({"machine": "Another, 16 CPU cores"}, [], [layer]), None)


def test_device_work_is_cut_into_calls():
    work = [Launch(name, 1.0, {}) for name in ("empty", "a", "b", "empty", "a", "b", "empty")]
    calls = calls_in(work, {"empty"})
    assert [[launch.name for launch in call] for call in calls] == [["a", "b"]] * 2
    assert calls_in([], {"empty"}) == []


# --- a build that travels


def test_every_case_meets_every_dtype_and_layout_in_turn():
    """What the tests of Triton's kernels try on a GPU: a case once, and each pair of dtypes with either head."""
    chosen = [
        (case.options.get("upsample", 1), dtypes, layout)
        for case in SPN.cases
        for dtypes in SPN.dtypes
        for layout in DENSE_LAYOUTS
        if SPN.in_rotation(case, *dtypes, layout)
    ]
    assert len(chosen) == len(SPN.cases)
    assert len(set(chosen)) == 2 * len(SPN.dtypes) * len(DENSE_LAYOUTS)


HERE = {"machine": "x86_64", "arch": "9.0", "cuda": "13.0", "torch": "2.14.1+cu130"}
BUNDLE = {"machine": "x86_64", "arch": "9.0", "cuda": "13.0", "torch": "2.11.0+cu130", "sources": "abc"}


@pytest.mark.parametrize(
    "here, sources, reason",
    [
        ({}, "abc", None),
        ({"arch": None}, "abc", None),
        ({"arch": "8.6"}, "abc", "it is for arch 9.0, this is 8.6"),
        ({"cuda": "12.8"}, "abc", "it is for CUDA 13, torch here has 12"),
        ({"torch": "2.10.0"}, "abc", "it is for torch 2.11.0"),
        ({"machine": "aarch64"}, "abc", "it is for machine x86_64"),
        ({}, "abd", "have changed"),
    ],
)
def test_a_bundle_is_looked_at_before_it_is_used(here, sources, reason):
    found = obstacles(BUNDLE, HERE | here, sources)
    assert found == [] if reason is None else len(found) == 1 and reason in found[0]


PRECOMPILE = """
import torch
from benchmarks.gpu.precompile import compile_call, compiling
from pixnorm.testing import GCONV_MIX, Case
with compiling(90):
    compile_call(GCONV_MIX, Case((2, 3, 4, 5), ""), torch.float32, torch.float32, "contiguous", False)
"""


def test_kernels_travel_in_tritons_cache(tmp_path):
    """Compiled without a GPU, packed, unpacked elsewhere: there Triton finds them and compiles nothing."""
    pytest.importorskip("triton", reason="Triton is for Linux")
    there, here = tmp_path / "there", tmp_path / "here"

    def compile_in(cache):
        variables = os.environ | {"TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
        subprocess.run([sys.executable, "-c", PRECOMPILE], cwd=ROOT, env=variables, check=True)
        return {file.relative_to(cache) for file in cache.rglob("*.cubin")}

    compiled = compile_in(there)
    pack(there, tmp_path / "triton.tar.xz")
    there.rename(tmp_path / "gone")
    assert unpack(tmp_path / "triton.tar.xz", here) == len(compiled) >= 3
    before = {file: file.stat().st_mtime_ns for file in here.rglob("*.cubin")}
    assert compile_in(here) == compiled
    assert {file: file.stat().st_mtime_ns for file in here.rglob("*.cubin")} == before


def test_the_l2_is_emptied_by_reading():
    """What is written there would have to be written back in the time of what is measured."""
    stopwatch = Stopwatch(torch.device("cpu"))
    before = stopwatch.other_data.clone()
    stopwatch._empty_l2()
    assert torch.equal(stopwatch.other_data, before) and stopwatch.other_data._version == 0
