"""Seeds, memory that is never accidentally right, and the parameters that tests ask for by name.

``spec``, ``case``     every op of pixnorm.testing, with each row of its grid
``impl``, ``kernel``   every impl that can run here; every one but the reference
"""

import pytest
import torch
from hypothesis import Phase, settings

from pixnorm.testing import SPECS, available_impls

# With no kernel built, the tests ask for the native one all the same: they fail, and say how to get it.
KERNELS = available_impls()[1:] or ["native"]

# The same examples on every run; no deadline, as the first call of anything is slow; and examples are small as they are
# drawn, while a search for smaller ones takes minutes.
settings.register_profile(
    "pixnorm", derandomize=True, deadline=None, max_examples=40, phases=(Phase.explicit, Phase.generate)
)
settings.load_profile("pixnorm")


def pytest_generate_tests(metafunc):
    wanted = set(metafunc.fixturenames)
    for mark in metafunc.definition.iter_markers("parametrize"):  # a test may choose for itself
        names = mark.args[0]
        wanted -= set(names.replace(" ", "").split(",") if isinstance(names, str) else names)
    if "case" in wanted:
        cases = [(spec, case) for spec in SPECS for case in spec.cases]
        metafunc.parametrize(("spec", "case"), cases, ids=[f"{spec}-{case}" for spec, case in cases])
    elif "spec" in wanted:
        metafunc.parametrize("spec", SPECS, ids=str)
    if "impl" in wanted:
        metafunc.parametrize("impl", ["reference", *KERNELS])
    if "kernel" in wanted:
        metafunc.parametrize("kernel", KERNELS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def uninitialised_memory_is_nan():
    """Fill whatever torch.empty returns, in C++ too, with NaN: an output that no kernel wrote does not pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """``torch.set_num_threads``, put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads):
    """Thousands of tiny calls gain nothing from threads, and on a busy machine spend their time waiting for them."""
    threads(1)
