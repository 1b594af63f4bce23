"""The Triton kernels of StyleGAN's epilogues in the interpreter; see test_spn.py."""

import math
from collections.abc import Iterator

import pytest
import torch
from test_ops import assert_same_bits, name_of

from pixnorm.testing import DENSE_LAYOUTS, LAYOUTS, Case, OpSpec, check_against_eager, evaluate
from pixnorm.testing.style import BARE, GAIN, NO_BIAS, ODD, ONE_NOISE, STYLE_EPILOGUE, STYLE_NORM
from pixnorm.triton_kernels import statistics, tiles
from pixnorm.triton_kernels import style as kernels

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]

SPECS = (STYLE_EPILOGUE, STYLE_NORM)
both_layouts = pytest.mark.parametrize("layout", DENSE_LAYOUTS)
both_specs = pytest.mark.parametrize("spec", SPECS, ids=str)


def small_cases() -> Iterator[tuple[OpSpec, Case, str]]:
    """Neighbours alternate between layouts."""
    for spec in SPECS:
        small = [case for case in spec.cases if math.prod(case.shape) <= math.prod(ODD)]
        yield from ((spec, case, DENSE_LAYOUTS[i % 2]) for i, case in enumerate(small))


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that a plane has several, of several programs, whose sums are added up in several rounds."""
    for name, value in {"TILE": 8, "TILE_OF_DOUBLE": 8, "RUN": 16, "PROGRAMS": 18}.items():
        monkeypatch.setattr(tiles, name, value)
    for name, value in {"SUMS": 2, "COLUMNS_OF_SUMS": 2, "RESIDENT": 0, "RESIDENT_BACKWARD": 0}.items():
        monkeypatch.setattr(kernels, name, value)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that are launched."""
    names = []

    def record(kernel, *args, **kwargs):
        names.append(kernel.fn.__name__.removesuffix("_kernel"))
        launch(kernel, *args, **kwargs)

    launch = kernels.launch
    for module in (kernels, statistics):
        monkeypatch.setattr(module, "launch", record)
    return names


@pytest.mark.parametrize("spec, case, layout", list(small_cases()), ids=str)
def test_in_double(spec, case, layout):
    """With hardly any rounding to tolerate, every mistake shows."""
    check_against_eager(spec, "triton", case, torch.float64, layout=layout)


@both_specs
@both_layouts
@pytest.mark.parametrize(
    "dtype, parameter_dtype",
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=name_of,
)
def test_other_dtypes(spec, dtype, parameter_dtype, layout):
    check_against_eager(spec, "triton", Case((2, 5, 3, 8), ""), dtype, parameter_dtype, layout)


@both_specs
@pytest.mark.parametrize(
    "sizes, layout",
    [(sizes, DENSE_LAYOUTS[i % 2]) for i, sizes in enumerate(({}, {}, BARE, ONE_NOISE))],
    ids=str,
)
def test_several_programs(small_tiles, spec, sizes, layout):
    """3 x 14 pixels: tiles with a remainder, several per program; in channels_last of 2 of the 3 channels."""
    case = Case((2, 3, 3, 14), "", GAIN if spec is STYLE_EPILOGUE else {}, sizes=sizes)
    tiling = tiles.Tiling.of(spec.inputs(case, torch.float64, layout=layout)["x"], per_pixel=True)
    assert tiling.parts > kernels.SUMS and tiling.tiles > 1
    check_against_eager(spec, "triton", case, torch.float64, layout=layout)


@both_layouts
def test_offset_planes_of_several_programs(small_tiles, layout):
    """|mean| >> std: nothing cancels where partial statistics are merged."""
    case = Case((2, 3, 3, 14), "", values="offset", sizes=NO_BIAS)
    check_against_eager(STYLE_NORM, "triton", case, torch.float64, layout=layout)


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=name_of)
def test_planes_in_registers(monkeypatch, launched, dtype, layout):
    """Of 45 pixels, so with elements beyond the plane; several programs; |mean| >> std."""
    monkeypatch.setattr(tiles, "TILE", 128)
    monkeypatch.setattr(tiles, "RUN", 16)
    case = Case((2, 5, 5, 9), "", values="offset", sizes=NO_BIAS)
    check_against_eager(STYLE_NORM, "triton", case, dtype, layout=layout)
    assert set(launched) == {"style_norm_fwd_resident", "style_norm_bwd_resident", "style_finish"}


@both_layouts
@pytest.mark.parametrize("limit", ["RESIDENT", "RESIDENT_BACKWARD"])
def test_planes_that_do_not_fit_are_streamed(monkeypatch, launched, limit, layout):
    monkeypatch.setattr(kernels, limit, 32)
    check_against_eager(STYLE_NORM, "triton", Case((2, 3, 5, 8), ""), layout=layout)
    forward = {"style_norm_statistics", "finish_statistics", "style_norm_fwd"}, {"style_norm_fwd_resident"}
    backward = {"style_norm_bwd_reduce", "style_norm_bwd_apply"}, {"style_norm_bwd_resident"}
    fits = limit != "RESIDENT", limit != "RESIDENT_BACKWARD"
    assert set(launched) == forward[fits[0]] | backward[fits[1]] | {"style_finish"}


@pytest.mark.parametrize(
    "shape, layout, dtype, expected",
    [
        ((64, 256, 64, 64), "contiguous", torch.float32, (4, 4, 512)),
        ((64, 256, 64, 64), "contiguous", torch.bfloat16, (8, 2, 1024)),
        ((64, 256, 64, 64), "contiguous", torch.float64, (2, 4, 256)),
        ((64, 256, 4, 4), "contiguous", torch.float32, (4, 128, 16)),
        ((64, 3, 91, 91), "contiguous", torch.float32, (1, 4, 512)),
        ((64, 1, 64, 64), "contiguous", torch.float32, (4, 1, 512)),
        ((64, 256, 64, 64), "channels_last", torch.float32, (4, 32, 64)),
    ],
    ids=str,
)
def test_channels_share_the_noise_of_a_tile(shape, layout, dtype, expected):
    """Vector, channels and pixels of a tile; in NCHW a row is a vector of each of 128 threads."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    assert tiles.Tiling.of(LAYOUTS[layout](x), per_pixel=True)[:3] == expected


@both_specs
@both_layouts
def test_launches(launched, spec, layout):
    """One forward; one backward, and one that adds partial sums up where there are any."""
    tensors = spec.inputs(Case((2, 3, 4, 4), ""), layout=layout)
    evaluate(spec, spec.call("triton"), tensors, {})
    part = "_resident" if spec is STYLE_NORM else ""
    assert launched == [f"{spec.name}_fwd{part}", f"{spec.name}_bwd{part}", "style_finish"]
    if spec is STYLE_EPILOGUE:
        launched.clear()
        evaluate(spec, spec.call("triton"), {"x": tensors["x"]}, {})
        assert launched == ["style_epilogue_fwd", "style_epilogue_bwd"]


@both_specs
def test_gradcheck(spec):
    """Against numerical derivatives in random directions (fast_mode)."""
    tensors = spec.inputs(Case((2, 2, 2, 3), ""), torch.float64)
    leaves = spec.leaves(tensors)

    def function(*values):
        return spec.function(**(tensors | dict(zip(leaves, values, strict=True))), impl="triton")

    assert torch.autograd.gradcheck(function, [*leaves.values()], fast_mode=True)
    assert torch.autograd.gradgradcheck(function, [*leaves.values()], fast_mode=True)


@both_specs
@pytest.mark.parametrize("sizes", [{}, BARE], ids=str)
def test_opcheck(monkeypatch, spec, sizes):
    """Schemas and fakes (shapes, dtypes, strides) match the kernels, those of planes in registers and the others."""
    for layout, most in zip(DENSE_LAYOUTS, (kernels.RESIDENT, 0), strict=True):
        monkeypatch.setattr(kernels, "RESIDENT", most)
        monkeypatch.setattr(kernels, "RESIDENT_BACKWARD", most)
        tensors = spec.inputs(Case((2, 3, 2, 4), "", sizes=sizes), torch.bfloat16, layout=layout)
        for op, args in spec.kernel_calls("triton", tensors, {}):
            torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@both_specs
@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - set(DENSE_LAYOUTS)))
def test_layouts(spec, layout):
    """Inputs and gradients may have any strides; results have the layout of x."""
    tensors = spec.inputs(Case((2, 3, 2, 4), ""), torch.float64, layout=layout)
    actual, expected = (evaluate(spec, spec.call(impl), tensors, {}) for impl in ("triton", "reference"))
    for (name, a), (_, b) in zip(actual.named(), expected.named(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@both_specs
@both_layouts
@pytest.mark.parametrize("other", ["channels_last", "contiguous", "transposed", "expanded"])
def test_gradients_of_y_in_another_layout(spec, layout, other):
    tensors = spec.inputs(Case((2, 3, 2, 4), ""), torch.float64, layout=layout)
    leaves = spec.leaves(tensors)
    y = spec.function(**(tensors | leaves), impl="triton")
    grad_y = LAYOUTS[other](torch.randn(y.shape, dtype=torch.float64))
    grads = [torch.autograd.grad(y, [*leaves.values()], g, retain_graph=True) for g in (grad_y, grad_y.clone())]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert grads[0][0].stride() == tensors["x"].stride()


@both_specs
@both_layouts
def test_two_runs_are_bit_identical(small_tiles, spec, layout):
    tensors = spec.inputs(Case((2, 3, 2, 8), ""), layout=layout)
    assert_same_bits(*(evaluate(spec, spec.call("triton"), tensors, {}) for _ in range(2)))


@both_specs
def test_empty_batch(spec):
    result = evaluate(spec, spec.call("triton"), spec.inputs(Case((0, 3, 5, 7), "")), {})
    assert result.y.shape == (0, 3, 5, 7)
    assert all(not grad.any() for grad in result.grads.values())


@pytest.mark.parametrize("spec, options, count", [(STYLE_EPILOGUE, {"activation": "relu"}, 1), (STYLE_NORM, {}, 40)])
def test_not_a_number_stays_in_its_group(small_tiles, spec, options, count):
    """Its pixel, or its plane where that is normalised; in y and in the gradient of x."""
    tensors = spec.inputs(Case((2, 3, 5, 8), ""), torch.float64)
    tensors["x"][1, 1, 2, 4] = torch.nan
    actual, expected = (evaluate(spec, spec.call(impl), tensors, options) for impl in ("triton", "reference"))
    assert actual.y.isnan().sum() == count
    for (name, a), (_, b) in zip(actual.named(), expected.named(), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")
