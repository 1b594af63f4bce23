"""SPN alone, with upsampling and ReLU in the same pass, and as it grows.

A case is ``test_layer[head-shape-mode-lap-contender]``; ``-k "up and 64x256x8x8 and native"`` selects some.
"""

from functools import lru_cache

import pytest

from benchmarks.contenders import COPIES, FUSED, GEMMS, MODES, PEERS, Race, laps
from pixnorm.testing import SPN, Case

HEADS = {"plain": {}, "up": {"upsample": 2, "activation": "relu"}}
SHAPES = {  # of the output
    (64, 256, 8, 8): "early block of a 32x32 generator, large batch: small planes",
    (16, 256, 32, 32): "its last block, at the batch of the generator step",
    (64, 256, 32, 32): "the same, large batch: far larger than any cache",
    (8, 64, 128, 128): "last block of a 128x128 generator: large planes, a small GEMM",
}
COMPILED = {  # where torch.compile takes part
    ("plain", "forward"): PEERS,
    ("plain", "forward_backward"): ["compile-channels_last"],
    ("up", "forward"): ["compile-channels_last"],
    ("up", "forward_backward"): [],
}
SWEEP = {  # one size grows, the others stay
    "N": [(n, 64, 32, 32) for n in (4, 8, 16, 32, 64)],
    "C": [(16, c, 32, 32) for c in (16, 32, 64, 128, 256)],
    "HW": [(16, 64, side, side) for side in (8, 16, 32, 64)],
}


@lru_cache(maxsize=1)
def case(head: str, shape: tuple[int, ...]) -> Case:
    n, c, h, w = shape
    scale = HEADS[head].get("upsample", 1)
    return Case((n, c, h // scale, w // scale), SHAPES.get(shape, "part of the sweep"), HEADS[head])


@lru_cache(maxsize=1)  # all contenders of one race stand together
def race(head: str, shape: tuple[int, ...], mode: str) -> Race:
    return Race(SPN, case(head, shape), mode)


def label(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


@pytest.mark.parametrize("contender", PEERS + FUSED + GEMMS + COPIES)
@laps(3)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=label)
@pytest.mark.parametrize("head", HEADS)
def test_layer(time_lap, head, shape, mode, lap, contender):
    if contender.startswith("compile") and contender not in COMPILED[head, mode]:
        pytest.skip("minutes of compiling for a contender that is far from the fastest")
    field = race(head, shape, mode)
    rivals = [field.contenders[peer] for peer in PEERS if peer in field.contenders] if contender in PEERS else []
    time_lap(field[contender], rivals)


@pytest.mark.parametrize("contender", ("eager-channels_last", *FUSED, *GEMMS))
@laps(3)
@pytest.mark.parametrize(
    ("size", "shape"),
    [pytest.param(size, shape, id=f"{size}-{label(shape)}") for size in SWEEP for shape in SWEEP[size]],
)
def test_sweep(time_lap, size, shape, lap, contender):
    time_lap(race("plain", shape, "forward_backward")[contender])
