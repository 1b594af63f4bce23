"""One step of the papers' 32x32 generators, forward and backward.

``step``: of the SPN paper's, with batch norm, SPN on the reference, SPN fused. ``gemm`` is what SPN's GEMMs alone take
in it, which no kernel beside them can make up for. ``gconv_step``: of the GConv paper's, with plain convolutions, with
GConv on the reference, with GConv fused; ``gemm`` are the products of its mixing.
"""

from collections.abc import Iterable
from functools import cache

import pytest
import torch

from benchmarks.contenders import DEVICE, DTYPE, KERNELS, Contender, laps, projection
from pixnorm.networks import Generator
from pixnorm.testing import DENSE_LAYOUTS

BATCH = 16
STEPS = {  # comparison -> impl in the names of contenders -> in words; the first is what the others are measured by
    "step": {
        "bn": "batch norm",
        "reference": "SPN, eager",
        **{impl: f"SPN, {impl}" for impl in KERNELS},
        "gemm": "GEMMs of SPN alone",
    },
    "gconv_step": {
        "conv": "convolution",
        "reference": "GConv, eager",
        **{impl: f"GConv, {impl}" for impl in KERNELS},
        "gemm": "GEMMs of GConv's mixing alone",
    },
}
LATENT_DIM = {"step": 128, "gconv_step": 32}
# Where SPN's inputs have their pixels, norm1 of each block (before its upsampling) and norm2 of each block; and where
# the outputs of convolutions have theirs.
SIDES = {"step": (4, 8, 16, 8, 16, 32), "gconv_step": (8, 16, 32, 8, 16, 32)}


def generator(impl: str, layout: str = "contiguous", of: str = "step") -> Generator:
    """A generator with a plain layer (``"bn"``, ``"conv"``) or ours on an impl; these have the same weights."""
    torch.manual_seed(0)
    plain, on = impl in ("bn", "conv"), {} if impl in ("bn", "conv") else {"impl": impl}
    if of == "step":
        model = Generator(norm="bn" if plain else "spn", **on)
    else:
        options = {"norm": "bigbn", "latent_dim": LATENT_DIM[of], "bias": False}
        model = Generator(conv="conv" if plain else "gconv", **options, **on)
    contiguous = layout == "contiguous"
    return model.to(DEVICE, DTYPE, memory_format=torch.contiguous_format if contiguous else torch.channels_last)


def contenders(of: str) -> Iterable[str]:
    return [f"{step}-{layout}" for step in STEPS[of] for layout in DENSE_LAYOUTS]


@cache
def entrant(of: str, name: str) -> Contender:
    impl, layout = name.split("-")
    if impl == "gemm":
        gemms = [projection((BATCH, 256, side, side), layout, backward=True) for side in SIDES[of]]
        return Contender(lambda: [gemm() for gemm in gemms])
    model, z = generator(impl, layout, of), torch.randn(BATCH, LATENT_DIM[of], dtype=DTYPE, device=DEVICE)
    weights = list(model.parameters())
    grad = torch.randn(BATCH, 3, 32, 32, dtype=DTYPE, device=DEVICE)
    return Contender(lambda: torch.autograd.grad(model(z), weights, grad))


def time_step(time_lap, of: str, lap: int, contender: str) -> None:
    if lap > 1 and contender.startswith("reference"):
        pytest.skip("not a rival: two laps are enough")
    time_lap(entrant(of, contender))


@pytest.mark.parametrize("contender", contenders("step"))
@laps(5)
def test_step(time_lap, lap, contender):
    time_step(time_lap, "step", lap, contender)


@pytest.mark.parametrize("contender", contenders("gconv_step"))
@laps(5)
def test_gconv_step(time_lap, lap, contender):
    time_step(time_lap, "gconv_step", lap, contender)
