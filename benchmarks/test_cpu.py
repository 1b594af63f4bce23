"""The measurements on the CPU: each op by itself, as it grows, on one thread, in what users call, and in a generator's
training step; and a training step of each of the papers' networks.

A case is ``test_layer[op-head-shape-mode-lap-contender]``; ``-k "up and 64x256x8x8 and native"`` selects some.
"""

from functools import lru_cache
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from benchmarks.contenders import COPIES, Call, training_step
from benchmarks.networks import MEASURED, NETWORKS, contenders, network_step
from benchmarks.ops import OPS
from benchmarks.registry import LIBRARIES, Op, Shape, in_layouts, label
from pixnorm.testing import available_impls, saved_bytes

DEVICE, PRECISION, BATCH = "cpu", "fp32", 16
# Without kernels, ask for the native ones all the same: that fails, and says how to get them.
FUSED = in_layouts(*(available_impls(DEVICE)[1:] or ["native"]))
EAGER, PEERS, PRODUCTS = in_layouts("eager"), in_layouts("eager", "compile"), in_layouts(*LIBRARIES)
MODES = ("forward", "forward_backward")
LARGE = 1 << 22  # elements above which the memory saved for backward is not measured: it is proportional


def cases(*lists, laps):
    """Parameters, the slowest to vary first; contenders take turns within a lap."""
    return [
        pytest.param(*found, lap, contender, id="-".join([*map(_name, found), f"lap{lap}", contender]))
        for *found, contenders in lists
        for lap, contender in product(range(laps), contenders)
    ]


def _name(part) -> str:
    return label(part) if isinstance(part, tuple) else str(part)


@lru_cache(maxsize=1)
def call(op: Op, head: str, shape: Shape) -> Call:
    return Call(op, head, shape, PRECISION, DEVICE)


@lru_cache(maxsize=16)  # the contenders of one comparison
def contender(op: Op, head: str, shape: Shape, mode: str, name: str):
    of, backward = call(op, head, shape), mode == "forward_backward"
    if name in (*PRODUCTS, *COPIES):
        return of.floor(name, backward), {}
    passes = of.passes(name)
    if not backward:
        return passes.inference, {}
    if of.tensors[of.spec.first].numel() > LARGE:
        return passes.both, {}
    kept = saved_bytes(passes.forward, passes.tensors.values())
    return passes.both, {"saved": kept, "output": passes.inference().nbytes}


def layers():
    for op in OPS.values():
        of_heads = [(head, shape) for head, of in op.heads.items() for shape in of.cpu or op.shapes.cpu]
        for (head, shape), mode in product(of_heads, MODES):
            floors = (*(PRODUCTS if op.products else ()), *(COPIES if op.goals.over_copy else ()))
            yield op, head, shape, mode, (*EAGER, *op.compiled(head, mode, shape), *FUSED, *floors)


def sweeps():
    for op in OPS.values():
        for size, shapes in op.shapes.sweep.items():
            for shape in shapes:
                yield op, size, shape, ("eager-channels_last", *FUSED, *PRODUCTS)


@pytest.mark.parametrize(("op", "head", "shape", "mode", "lap", "name"), cases(*layers(), laps=3))
def test_layer(time_lap, op, head, shape, mode, lap, name):
    where = {"what": "layer", "op": str(op), "head": head, "shape": label(shape), "precision": PRECISION, "mode": mode}
    rivals = PEERS if name in PEERS and not op.same_layout else ()
    time_lap(where, name, lambda: contender(op, head, shape, mode, name), rivals)


@pytest.mark.parametrize(("op", "size", "shape", "lap", "name"), cases(*sweeps(), laps=3))
def test_sweep(time_lap, op, size, shape, lap, name):
    where = {"what": "sweep", "op": str(op), "size": size, "shape": label(shape)}
    time_lap(where, name, lambda: contender(op, next(iter(op.heads)), shape, "forward_backward", name))


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def on_one_thread():
    """At the first two shapes: a small and a usual one."""
    for op in OPS.values():
        for shape in list(op.shapes.cpu)[:2]:
            yield op, next(iter(op.heads)), shape, "forward_backward", (*EAGER, *FUSED)


@pytest.mark.parametrize(("op", "head", "shape", "mode", "lap", "name"), cases(*on_one_thread(), laps=3))
def test_one_thread(one_thread, time_lap, op, head, shape, mode, lap, name):
    where = {"what": "one thread", "op": str(op), "head": head, "shape": label(shape), "precision": PRECISION}
    time_lap(where | {"mode": mode}, name, lambda: contender(op, head, shape, mode, name))


@lru_cache(maxsize=16)
def whole(op: Op, name: str, shape: Shape, mode: str, contender: str):
    function, leaves = op.wholes[name].build(*contender.split("-")[:1], shape, contender.split("-")[1])
    if mode == "forward":
        return torch.no_grad()(function), {}
    grad = torch.randn_like(function())
    return lambda: torch.autograd.grad(function(), leaves, grad), {}


def wholes():
    for op in OPS.values():
        for name, of in op.wholes.items():
            for shape, mode in product(of.shapes, of.goal):
                yield op, name, shape, mode, (*EAGER, *FUSED)


@pytest.mark.parametrize(("op", "whole_name", "shape", "mode", "lap", "name"), cases(*wholes(), laps=3))
def test_whole(time_lap, op, whole_name, shape, mode, lap, name):
    where = {"what": "whole", "op": str(op), "whole": whole_name, "shape": label(shape), "mode": mode}
    time_lap(where, name, lambda: whole(op, whole_name, shape, mode, name))


PEAK_SIDE = 1024  # of square matrices, that any library multiplies as fast as the machine can


@lru_cache(maxsize=2)
def peak(library: str):
    a, b = torch.ones(2, PEAK_SIDE, PEAK_SIDE)
    image, kernel = a.reshape(1, PEAK_SIDE, 32, 32).contiguous(memory_format=torch.channels_last), b[..., None, None]
    return {"matmul": lambda: a @ b, "convolution": lambda: F.conv2d(image, kernel)}[library], {}


@pytest.mark.parametrize(("lap", "library"), cases((LIBRARIES,), laps=3))
def test_peak(time_lap, lap, library):
    where = {"what": "peak", "operations": 2 * PEAK_SIDE**3, "precision": PRECISION}
    time_lap(where, library, lambda: peak(library))


@lru_cache(maxsize=16)
def stepping(op: Op, name: str):
    return training_step(op, name, BATCH, PRECISION, DEVICE), {}


STEPS = [(op, in_layouts(op.step.plain, "eager") + FUSED + (PRODUCTS if op.products else ())) for op in OPS.values()]


@pytest.mark.parametrize(("op", "lap", "name"), cases(*STEPS, laps=5))
def test_step(time_lap, op, lap, name):
    if lap > 1 and name in EAGER:
        pytest.skip("not a rival: two laps are enough")
    where = {"what": "step", "op": str(op), "batch": BATCH, "precision": PRECISION, "clock": "wall"}
    time_lap(where, name, lambda: stepping(op, name))


@lru_cache(maxsize=6)  # the contenders of one network
def network_stepping(network: str, name: str):
    run, kept = network_step(network, name, NETWORKS[network].batch, PRECISION, DEVICE)
    return run, {} if name in in_layouts("compile") else {"kept": kept()}


@pytest.mark.parametrize(("network", "lap", "name"), cases(*((of, contenders(of)) for of in MEASURED), laps=3))
def test_network(time_lap, network, lap, name):
    where = {"what": "network", "network": network, "batch": NETWORKS[network].batch, "precision": PRECISION}
    time_lap(where | {"clock": "wall"}, name, lambda: network_stepping(network, name), in_layouts("eager", "compile"))
