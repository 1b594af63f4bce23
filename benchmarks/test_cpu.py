"""The measurements on the CPU: each op by itself, as it grows, and in a generator's training step.

A case is ``test_layer[op-head-shape-mode-lap-contender]``; ``-k "up and 64x256x8x8 and native"`` selects some.
"""

from functools import lru_cache
from itertools import product

import pytest

from benchmarks.contenders import COPIES, Call, training_step
from benchmarks.ops import OPS
from benchmarks.registry import Op, Shape, in_layouts, label
from pixnorm.testing import available_impls, saved_bytes

DEVICE, PRECISION, BATCH = "cpu", "fp32", 16
# Without kernels, ask for the native ones all the same: that fails, and says how to get them.
FUSED = in_layouts(*(available_impls(DEVICE)[1:] or ["native"]))
EAGER, PEERS, PRODUCTS = in_layouts("eager"), in_layouts("eager", "compile"), in_layouts("products")
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
        for head, shape, mode in product(op.heads, op.shapes.cpu, MODES):
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
