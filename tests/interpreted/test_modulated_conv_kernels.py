"""The Triton kernels of spatially modulated convolution in the interpreter; see test_spn.py."""

import math

import pytest
import torch
from test_ops import name_of

from pixnorm.functional import spatially_modulated_conv2d
from pixnorm.ops.modulated_conv import spatial_scale, spatial_scale_reference, tap_counts
from pixnorm.testing import DENSE_LAYOUTS, LAYOUTS, Case, check_against_eager
from pixnorm.testing.modulated_conv import SPATIALLY_MODULATED
from pixnorm.triton_kernels import tiles
from pixnorm.triton_kernels.tiles import Tiling

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]

SMALL = [
    (case, DENSE_LAYOUTS[i % 2])
    for i, case in enumerate(c for c in SPATIALLY_MODULATED.cases if math.prod(c.shape) <= 1200)
]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that a plane has several, of several programs."""
    for name, value in {"TILE": 32, "TILE_OF_DOUBLE": 32, "RUN": 16, "PROGRAMS": 18}.items():
        monkeypatch.setattr(tiles, name, value)


@pytest.mark.parametrize("case, layout", SMALL, ids=str)
def test_in_double(case, layout):
    """With hardly any rounding to tolerate, every mistake shows."""
    check_against_eager(SPATIALLY_MODULATED, "triton", case, torch.float64, layout=layout)


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"padding": "valid"}], ids=str)
def test_several_programs(small_tiles, options, layout):
    case = Case((2, 3, 9, 14), "", options)
    x = SPATIALLY_MODULATED.inputs(case, torch.float64, layout=layout)["x"]
    tiling = Tiling.of(x, per_pixel=True, share=2)
    assert tiling.parts > 1 and tiling.tiles > 1
    check_against_eager(SPATIALLY_MODULATED, "triton", case, torch.float64, layout=layout)


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)
def test_other_dtypes(dtype, layout):
    check_against_eager(SPATIALLY_MODULATED, "triton", Case((2, 5, 3, 8), ""), dtype, layout=layout)


def test_many_taps():
    """A tile for 25 sums of each element."""
    x, style_map = torch.randn(2, 1, 3, 20, 30).double()[:, 0, None].expand(-1, 2, -1, -1, -1).unbind(0)
    counts = tap_counts(x, torch.empty(1, 3, 5, 5), "same", "zeros")
    for actual, exact in zip(
        spatial_scale(x, style_map, *counts, "triton"),
        spatial_scale_reference(x, style_map, *counts),
        strict=True,
    ):
        torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["sliced", "transposed"])
def test_other_strides_are_the_same_call(layout):
    x, weight, style_map = SPATIALLY_MODULATED.inputs(Case((2, 3, 4, 6), ""), torch.float32).values()
    strided = spatially_modulated_conv2d(LAYOUTS[layout](x), weight, LAYOUTS[layout](style_map), impl="triton")
    assert torch.equal(strided, spatially_modulated_conv2d(x, weight, style_map, impl="triton"))
