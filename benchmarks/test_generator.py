"""One step of the SPN paper's 32x32 generator, forward and backward, with batch norm, SPN on the reference, SPN fused.

``gemm`` is what SPN's GEMMs alone take in it, which no kernel beside them can make up for.
"""

from functools import lru_cache

import pytest
import torch

from benchmarks.contenders import DEVICE, DTYPE, KERNELS, Contender, laps, projection
from pixnorm.networks import Generator
from pixnorm.testing import DENSE_LAYOUTS

BATCH = 16
STEPS = {  # impl in the names of contenders -> in words
    "bn": "batch norm",
    "reference": "SPN, eager",
    **{impl: f"SPN, {impl}" for impl in KERNELS},
    "gemm": "GEMMs of SPN alone",
}
CONTENDERS = tuple(f"{step}-{layout}" for step in STEPS for layout in DENSE_LAYOUTS)
# Where SPN's inputs have their pixels: norm1 of each block (before its upsampling), norm2 of each block.
SIDES = (4, 8, 16, 8, 16, 32)


def generator(impl: str, layout: str = "contiguous") -> Generator:
    """The generator with batch norm (``"bn"``) or with SPN on an impl; these have the same weights."""
    torch.manual_seed(0)
    model = Generator(norm="bn") if impl == "bn" else Generator(norm="spn", impl=impl)
    contiguous = layout == "contiguous"
    return model.to(DEVICE, DTYPE, memory_format=torch.contiguous_format if contiguous else torch.channels_last)


@lru_cache(maxsize=len(CONTENDERS))
def entrant(name: str) -> Contender:
    impl, layout = name.split("-")
    if impl == "gemm":
        gemms = [projection((BATCH, 256, side, side), layout, backward=True) for side in SIDES]
        return Contender(lambda: [gemm() for gemm in gemms])
    model, z = generator(impl, layout), torch.randn(BATCH, 128, dtype=DTYPE, device=DEVICE)
    weights = list(model.parameters())
    grad = torch.randn(BATCH, 3, 32, 32, dtype=DTYPE, device=DEVICE)
    return Contender(lambda: torch.autograd.grad(model(z), weights, grad))


@pytest.mark.parametrize("contender", CONTENDERS)
@laps(5)
def test_step(time_lap, lap, contender):
    if lap > 1 and contender.startswith("reference"):
        pytest.skip("not a rival: two laps are enough")
    time_lap(entrant(contender))
