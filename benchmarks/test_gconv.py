"""GConv's mixing alone: what follows its convolution.

A case is ``test_mixing[shape-mode-lap-contender]``.
"""

from functools import lru_cache

import pytest

from benchmarks.contenders import FUSED, GEMMS, MODES, PEERS, Race, laps
from benchmarks.test_spn import SHAPES, label
from pixnorm.testing import GCONV_MIX, Case

COMPILED = (16, 256, 32, 32)  # the shape where torch.compile takes part


@lru_cache(maxsize=1)  # all contenders of one race stand together
def race(shape: tuple[int, ...], mode: str) -> Race:
    return Race(GCONV_MIX, Case(shape, SHAPES[shape], sizes={"bias": 0}), mode)


@pytest.mark.parametrize("contender", (*PEERS, *FUSED, *GEMMS))
@laps(3)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_mixing(time_lap, shape, mode, lap, contender):
    if contender.startswith("compile") and shape != COMPILED:
        pytest.skip("eager mode is bound by the same product: one shape shows it")
    time_lap(race(shape, mode)[contender])
