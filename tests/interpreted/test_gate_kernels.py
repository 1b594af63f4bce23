"""The Triton kernels of CBAM's gates in the interpreter; see test_spn.py."""

import math

import pytest
import torch
from test_gate import FUNCTIONS, arguments
from test_ops import assert_same_bits, name_of

from pixnorm.testing import DENSE_LAYOUTS, LAYOUTS, Case, check_against_eager, evaluate
from pixnorm.testing.gate import CHANNEL_GATE, SPATIAL_GATE
from pixnorm.triton_kernels import gate as kernels

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]

SPECS = (CHANNEL_GATE, SPATIAL_GATE)
specs = pytest.mark.parametrize("spec", SPECS, ids=str)
layouts = pytest.mark.parametrize("layout", DENSE_LAYOUTS)
# The interpreter takes long for a program, so small cases only, which alternate between layouts.
SMALL = [
    (spec, case, DENSE_LAYOUTS[i % 2])
    for spec in SPECS
    for i, case in enumerate(case for case in spec.cases if math.prod(case.shape) <= 2000)
]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that an image has several, of several programs, whose results are added up."""
    for name, value in {"TILE": 16, "TILE_OF_DOUBLE": 16, "RUN": 16, "PROGRAMS": 24, "RESULTS": 8}.items():
        monkeypatch.setattr(kernels, name, value)


@pytest.mark.parametrize("spec, case, layout", SMALL, ids=str)
def test_in_double(spec, case, layout):
    """With hardly any rounding to tolerate, every mistake shows."""
    check_against_eager(spec, "triton", case, torch.float64, layout=layout)


@specs
@layouts
@pytest.mark.parametrize(
    "shape, values", [((2, 5, 4, 3), "plain"), ((1, 8, 3, 8), "ties"), ((1, 3, 6, 7), "ties")], ids=str
)
def test_several_programs(small_tiles, spec, layout, shape, values):
    """With vectors and without; of equal maxima in several parts the first counts."""
    case = Case(shape, "", values=values)
    tensors = spec.inputs(case, layout=layout)
    grid = kernels.Grid.of(tensors["x"].double(), spec is SPATIAL_GATE)
    assert grid.programs > shape[0]
    check_against_eager(spec, "triton", case, torch.float64, layout=layout)


def test_results_of_several_programs_are_added_up(small_tiles):
    """The grids of the test above have parts, and steps."""
    x = torch.empty(1, 3, 6, 7, dtype=torch.float64)
    grids = [kernels.Grid.of(LAYOUTS[layout](x), spatial) for spatial in (False, True) for layout in DENSE_LAYOUTS]
    assert any(grid.parts > 1 for grid in grids)
    assert {grid.of_columns for grid in grids} == {False, True}
    assert kernels.Grid.of(torch.empty(8, 3, 6, 7, dtype=torch.float64), False).steps > 1


@specs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)
def test_other_dtypes(spec, dtype):
    for layout in DENSE_LAYOUTS:
        check_against_eager(spec, "triton", Case((2, 8, 3, 16), "ties", values="ties"), dtype, layout=layout)


@layouts
@pytest.mark.parametrize("which", FUNCTIONS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_pass(small_tiles, which, layout, value):
    t = {name: v.float() for name, v in arguments(which, c=4, h=3, w=5).items()}
    x = t["x"].clone()
    x[1, 2, 1, 3] = value
    results = []
    for impl in ("triton", "reference"):
        leaf = LAYOUTS[layout](x).requires_grad_()
        buffers = {name: t[name].clone() for name in ("running_mean", "running_var") if name in t}
        y = FUNCTIONS[which](**(t | buffers | {"x": leaf}), impl=impl)
        results.append([y, *torch.autograd.grad(y.sum(), leaf)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@layouts
@pytest.mark.parametrize("spatial", [False, True])
def test_maxima_and_their_places(small_tiles, layout, spatial):
    x = torch.randn(2, 9, 3, 5).round() - 9
    x[0, 4, 1, 2] = x[0, 6, 1, 2] = x[0, 4, 2, 3] = torch.nan
    x[1, :, 0, 1] = x[1, 3] = -torch.inf
    pooled, index = torch.ops.pixnorm.gate_pool_triton(LAYOUTS[layout](x), spatial)
    values, places = x.flatten(2).max(1 if spatial else 2)
    assert torch.equal(pooled[:, 0].reshape_as(values).nan_to_num(), values.nan_to_num())
    assert torch.equal(index.reshape_as(places).long(), places)


@specs
def test_gradcheck(spec):
    tensors = spec.inputs(Case((2, 2, 3, 2), ""), torch.float64)
    leaves, rest = spec.leaves(tensors), spec.constants(tensors)

    def function(*values):
        return spec.function(**dict(zip(leaves, values, strict=True)), **rest, impl="triton").sin()

    assert torch.autograd.gradcheck(function, list(leaves.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, list(leaves.values()), fast_mode=True)


@specs
def test_opcheck(spec):
    """Schemas and fakes (shapes, dtypes, strides) match the kernels."""
    for layout in DENSE_LAYOUTS:
        tensors = spec.inputs(Case((1, 3, 3, 4), ""), torch.float32, layout=layout)
        for op, args in spec.kernel_calls("triton", tensors, {}):
            torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def memory_order(layout):
    """That of the copy, or of a tensor that is dense as it is."""
    return "channels_last" if layout == "misaligned_channels_last" else "contiguous"


@specs
@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - set(DENSE_LAYOUTS)))
def test_layouts(spec, layout):
    """Inputs may have any strides."""
    tensors = spec.inputs(Case((2, 3, 2, 4), ""), torch.float64, layout=layout)
    dense = tensors | {"x": LAYOUTS[memory_order(layout)](tensors["x"])}
    assert_same_bits(*(evaluate(spec, spec.call("triton"), of, {}) for of in (tensors, dense)))
