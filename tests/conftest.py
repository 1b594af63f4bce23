"""The device, seeds, NaN-filled allocations, and the parameters that tests request by name.

``--device cuda`` runs the tests on CUDA tensors, by making cuda PyTorch's default device. There a skip is a failure.
``@pytest.mark.cpu`` and ``@pytest.mark.cuda`` are for tests that concern one device only.

``spec``, ``case``     every op of pixnorm.testing (or of SPECS in the test's module), with each of its cases
``spec``, ``variant``  with each of its variants; ``spec``, ``options``, with each combination of its options
``impl``, ``kernel``   every impl that can run here; every one but the reference

``@pytest.mark.beside(arguments, environment=function)`` runs pytest with these in a second process, one after the other
in parallel with this one, and two at a time once this one has nothing else to do; the fixture ``beside`` is the
outcome. Such tests come last.

With ``@pytest.mark.emulated`` kernels include those in CUDA C++, on CPU tensors (see cuda_emulation), as impl "native".
Those in Triton are included on a GPU; on the CPU they have their own tests, in interpreted/.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from compat import staleness
from pixnorm.testing import SPECS, available_impls

try:
    from hypothesis import HealthCheck, Phase, settings
except ImportError:
    pass  # test_properties.py fails for it, and everything else runs
else:
    # The same examples on every run; no deadline, as first calls are slow; no shrinking, which takes minutes, as the
    # examples are small already.
    settings.register_profile(
        "pixnorm",
        derandomize=True,
        deadline=None,
        max_examples=40,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=[HealthCheck.function_scoped_fixture],  # `impl` is the same for all examples
    )
    settings.load_profile("pixnorm")

DEVICES = {
    "cpu": "concerns the CPU: its threads, memory, vector code",
    "cuda": "concerns GPUs: their streams, memory, graphs",
}

EMULATED = "native-cuda-emulated"
BESIDE = pytest.StashKey["Beside"]()
IN_A_PROCESS_BESIDE = "PIXNORM_TESTS_BESIDE"

# Triton decides on import whether kernels are interpreted: test_triton.py starts a process for these.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]


def pytest_addoption(parser):
    parser.addoption("--device", choices=DEVICES, default="cpu", help="where the tensors of the tests are (cpu)")


def pytest_configure(config):
    for device, meaning in DEVICES.items():
        config.addinivalue_line("markers", f"{device}: the test {meaning}; deselected elsewhere")
    config.addinivalue_line("markers", "emulated(runs=True): whether the test also runs the emulated CUDA kernels")
    config.addinivalue_line("markers", "gpu_memory(gigabytes): needed by the test; deselected on a smaller GPU")
    config.addinivalue_line("markers", "products: about matrix products of cuBLAS or oneDNN; for ops that have some")
    config.addinivalue_line("markers", "beside(arguments, environment): for a run of pytest in a second process")
    # Float32 is compared with true float32; TF32 has its own test.
    torch.backends.cudnn.allow_tf32 = False
    if config.getoption("--device") == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: PyTorch sees no GPU here")
        # Before cuBLAS starts: required for deterministic algorithms.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.set_default_device("cuda")


def pytest_collection_modifyitems(config, items):
    """Deselect tests for another or a larger device, and cases that the impl does not support."""
    device = config.getoption("--device")

    def fits(item):
        asked = item.callspec.params if hasattr(item, "callspec") else {}
        impl, spec = asked.get("kernel", asked.get("impl")), asked.get("spec")
        tested = [spec] if spec else getattr(item.module, "SPECS", ())
        if impl and tested and not any(s.cuda_kernels if impl == EMULATED else s.runs(impl, device) for s in tested):
            return False
        if item.get_closest_marker("products") and spec and not spec.product_weight:
            return False
        if spec and not spec.float32_parameters and asked.get("parameter_dtype") != asked.get("dtype"):
            return False
        if {"case", "dtype", "parameter_dtype", "layout"} <= asked.keys():
            combination = [asked[name] for name in ("case", "dtype", "parameter_dtype", "layout")]
            if device == "cpu":
                return spec.tried_on_cpu(*combination, emulated=impl == EMULATED)
            if impl == "triton":
                # Each kernel takes seconds to compile, and there are hundreds.
                return spec.in_rotation(*combination)
        needed = max((mark.args[0] for mark in item.iter_markers("gpu_memory")), default=0)
        return needed == 0 or needed * 1e9 <= torch.cuda.get_device_properties("cuda").total_memory

    kept, left_out = [], []
    for item in items:
        elsewhere = any(item.get_closest_marker(other) for other in DEVICES.keys() - {device})
        elsewhere |= item.get_closest_marker("beside") is not None and IN_A_PROCESS_BESIDE in os.environ
        (left_out if elsewhere or not fits(item) else kept).append(item)
    config.hook.pytest_deselected(items=left_out)
    first = ("test_ops.py", "test_cuda.py") if device == "cuda" else ()  # a GPU may be available for minutes only

    def place(item):
        return item.get_closest_marker("beside") is not None, item.path.name not in first

    items[:] = sorted(kept, key=place)


class Beside:
    """Runs of pytest, in parallel with the tests of this process: two processes at any time, this one included."""

    def __init__(self):
        self.executor = ThreadPoolExecutor(2)
        self.turn = threading.Semaphore(1)
        self.outcomes: dict[str, Future] = {}
        self.running: set[subprocess.Popen] = set()
        self.waiting = self.ended = False

    def start(self, test: str, mark: pytest.Mark) -> None:
        self.outcomes[test] = self.executor.submit(self._run, mark.args, mark.kwargs["environment"])

    def _run(
        self, arguments: tuple[str, ...], environment: Callable[[], dict[str, str]]
    ) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "pytest", *arguments, "-q", "-p", "no:cacheprovider", "--show-capture=no"]
        variables = os.environ | environment() | {IN_A_PROCESS_BESIDE: "1"}
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with self.turn, subprocess.Popen(command, cwd=Path(__file__).parents[1], env=variables, **output) as process:
            self.running.add(process)
            if self.ended:
                process.kill()
            printed, _ = process.communicate()
        self.running.remove(process)
        return subprocess.CompletedProcess(command, process.returncode, printed)

    def outcome(self, test: str) -> subprocess.CompletedProcess:
        """That of the run of this test, for which this process waits: another may run in its place."""
        if not self.waiting:
            self.waiting = True
            self.turn.release()
        return self.outcomes[test].result(timeout=1800)

    def end(self) -> None:
        self.ended = True
        self.executor.shutdown(wait=False, cancel_futures=True)
        for process in [*self.running]:
            process.kill()


@pytest.fixture
def beside(request):
    """The outcome of the run that the mark describes."""
    return request.config.stash[BESIDE].outcome(request.node.nodeid)


def pytest_collection_finish(session):
    """Start the longest first: they take minutes, in parallel with this process."""
    run = [item for item in session.items if not any(mark.args[0] for mark in item.iter_markers("skipif"))]
    marks = {item.nodeid: item.get_closest_marker("beside") for item in run}
    wanted = {test: mark for test, mark in marks.items() if mark}
    if wanted and not session.config.option.collectonly:
        session.config.stash[BESIDE] = Beside()
        for test in sorted(wanted, key=lambda test: "interpreter" not in test):
            session.config.stash[BESIDE].start(test, wanted[test])


def pytest_unconfigure(config):
    if BESIDE in config.stash:
        config.stash[BESIDE].end()


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid):
    """After a CUDA error every later test of a process fails, so end it; pytest-xdist starts a new one."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"after {nodeid}: {error}", file=sys.stderr, flush=True)
            os._exit(1)


@pytest.fixture(autouse=True)
def room_on_the_gpu(request):
    """Free cached memory before and after tests that need nearly all of the GPU."""
    large = request.node.get_closest_marker("gpu_memory")
    if large:
        torch.cuda.empty_cache()
    yield
    if large:
        torch.cuda.empty_cache()


@pytest.fixture
def sizes_equal_by_chance():
    """With dynamic sizes torch.compile takes those that are equal at first to be so always. Some are so by chance: a
    batch, and a size of a weight that never changes (a parameter in a module, whose sizes are constants)."""
    from torch.fx.experimental import _config

    with _config.patch(use_duck_shape=False):
        yield


def pytest_terminal_summary(terminalreporter):
    """Say if `make compat` is due: other versions of PyTorch break in ways that do not show here."""
    if reason := staleness():
        terminalreporter.write_line(f"compatibility: {reason}", yellow=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """On a GPU a skip is a failure: that run must cover everything."""
    report = yield
    if item.config.getoption("--device") == "cuda" and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"skipped, on a GPU: {report.longrepr}"
    return report


def pytest_generate_tests(metafunc):
    # Without a built kernel the tests still request the native one: they fail, and say how to get it.
    kernels = available_impls()[1:] or ["native"]
    if metafunc.config.getoption("--device") == "cpu":
        kernels = [kernel for kernel in kernels if kernel != "triton"]
    if _runs_emulated(metafunc):
        kernels.append(EMULATED)
    specs = getattr(metafunc.module, "SPECS", SPECS)  # a test module may bring its own
    wanted = set(metafunc.fixturenames)
    for mark in metafunc.definition.iter_markers("parametrize"):  # explicit parameters take precedence
        names = mark.args[0]
        wanted -= set(names.replace(" ", "").split(",") if isinstance(names, str) else names)
    if "case" in wanted:
        cases = [(spec, case) for spec in specs for case in spec.cases]
        metafunc.parametrize(("spec", "case"), cases, ids=[f"{spec}-{case}" for spec, case in cases])
    elif wanted & {"variant", "options"}:
        name = "variant" if "variant" in wanted else "options"
        chosen = [(s, of) for s in specs for of in (s.variants if name == "variant" else s.combinations())]
        ids = ["-".join([str(s), *(f"{key}={value}" for key, value in of.items())]) for s, of in chosen]
        metafunc.parametrize(("spec", name), chosen, ids=ids)
    elif "spec" in wanted:
        metafunc.parametrize("spec", specs, ids=str)
    if "impl" in wanted:
        metafunc.parametrize("impl", ["reference", *kernels], indirect=True)
    if "kernel" in wanted:
        metafunc.parametrize("kernel", kernels, indirect=True)


def _runs_emulated(metafunc):
    mark = metafunc.definition.get_closest_marker("emulated")
    here = metafunc.config.getoption("--device") == "cpu" and not metafunc.definition.get_closest_marker("cpu")
    return here and mark is not None and mark.kwargs.get("runs", True)


def _reach(impl):
    if impl != EMULATED:
        yield impl
        return
    from cuda_emulation import emulated

    with emulated():
        yield "native"


@pytest.fixture
def impl(request):
    yield from _reach(request.param)


@pytest.fixture
def kernel(request):
    yield from _reach(request.param)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def uninitialised_memory_is_nan():
    """Fill the result of torch.empty, in C++ too, with NaN: an output that no kernel wrote does not pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """``torch.set_num_threads``, restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads):
    """Thousands of tiny calls gain nothing from threads, and on a busy machine wait for them."""
    threads(1)
