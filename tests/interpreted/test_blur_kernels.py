"""The blur's Triton kernel in the interpreter; see test_spn.py."""

import math

import pytest
import torch
from test_ops import assert_same_bits, name_of

from pixnorm.functional import blur2d
from pixnorm.testing import BLUR, DENSE_LAYOUTS, LAYOUTS, Case, check_against_eager, evaluate
from pixnorm.testing.blur import DOWN, UP
from pixnorm.triton_kernels import blur as kernels

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]

all_options = pytest.mark.parametrize("options", [{}, UP, DOWN], ids=str)
# The interpreter takes a tenth of a second for a program, so small cases only, which alternate between layouts.
SMALL = [(case, DENSE_LAYOUTS[i % 2]) for i, case in enumerate(c for c in BLUR.cases if math.prod(c.shape) <= 400)]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that an image has several, in channels_last of some of the channels."""
    for name, value in {"TILE": 16, "TILE_OF_BOTH": 32, "RUN": 16}.items():
        monkeypatch.setattr(kernels, name, value)


@pytest.mark.parametrize("case, layout", SMALL, ids=str)
def test_in_double(case, layout):
    """With hardly any rounding to tolerate, every mistake shows."""
    check_against_eager(BLUR, "triton", case, torch.float64, layout=layout)


@pytest.mark.parametrize(
    "shape, options, layout",
    [
        ((1, 3, 6, 8), {}, "channels_last"),
        ((1, 3, 6, 8), UP, "contiguous"),
        ((1, 3, 6, 8), DOWN, "channels_last"),
        ((2, 2, 7, 9), {}, "contiguous"),
        ((1, 3, 3, 5), UP, "channels_last"),
        ((1, 3, 6, 8), DOWN, "contiguous"),
        ((1, 2, 7, 9), DOWN, "contiguous"),
        ((1, 3, 5, 7), DOWN, "channels_last"),
    ],
    ids=str,
)
def test_several_programs(small_tiles, shape, options, layout):
    """With vectors and without; odd sizes, whose last pixels ↓ drops."""
    check_against_eager(BLUR, "triton", Case(shape, "", options), torch.float64, layout=layout)


@pytest.mark.parametrize(
    "dtype, options, layout",
    [
        (dtype, options, DENSE_LAYOUTS[(i + j) % 2])
        for i, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16))
        for j, options in enumerate(({}, UP, DOWN))
    ],
    ids=name_of,
)
def test_other_dtypes(dtype, options, layout):
    check_against_eager(BLUR, "triton", Case((2, 8, 4, 16), "", options), dtype, layout=layout)


@pytest.mark.parametrize("options, layout", [({}, "contiguous"), (UP, "channels_last"), (DOWN, "contiguous")], ids=str)
def test_not_a_number_stays_near(options, layout):
    x = LAYOUTS[layout](torch.zeros(1, 3, 5, 8, dtype=torch.float64))
    x[:, 1, 3, 4], x[:, 1, 0, 7], x[:, 1, 4, 0] = torch.nan, torch.inf, -torch.inf
    actual, expected = (blur2d(x, **options, impl=impl).isfinite() for impl in ("triton", "reference"))
    assert torch.equal(actual, expected) and not actual.all()


@all_options
def test_gradcheck(options):
    x = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)

    def function(x):
        return blur2d(x, **options, impl="triton").sin()

    assert torch.autograd.gradcheck(function, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, x, fast_mode=True)


@all_options
def test_opcheck(options):
    """Schemas and fakes (shapes, dtypes, strides) match the kernel."""
    for layout in DENSE_LAYOUTS:
        tensors = BLUR.inputs(Case((1, 3, 3, 4), "", options), torch.float32, layout=layout)
        for op, args in BLUR.kernel_calls("triton", tensors, options):
            torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - set(DENSE_LAYOUTS)))
def test_layouts(layout):
    """Inputs may have any strides."""
    tensors = BLUR.inputs(Case((2, 3, 2, 4), "", DOWN), torch.float64, layout=layout)
    dense = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert_same_bits(*(evaluate(BLUR, BLUR.call("triton"), of, DOWN) for of in (tensors, dense)))
