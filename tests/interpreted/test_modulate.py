"""Modulated norm's Triton kernels in the interpreter; see test_spn.py."""

import math
from collections.abc import Iterator

import pytest
import torch
from test_ops import assert_same_bits, layout_of, name_of

from pixnorm.functional import modulated_norm
from pixnorm.testing import DENSE_LAYOUTS, LAYOUTS, MODULATE, MODULATE_MAPS, Case, OpSpec, check_against_eager, evaluate
from pixnorm.testing.modulate import INSTANCE, MAPS, NONE, ROWS, UP, VECTOR
from pixnorm.triton_kernels import modulate as kernels
from pixnorm.triton_kernels import statistics, tiles

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]

SPECS = (MODULATE, MODULATE_MAPS)
both_layouts = pytest.mark.parametrize("layout", DENSE_LAYOUTS)
both_specs = pytest.mark.parametrize("spec", SPECS, ids=str)
LEAKY = INSTANCE | {"activation": "leaky_relu", "gamma_offset": 1.0}


def small_cases() -> Iterator[tuple[OpSpec, Case, str]]:
    """The interpreter takes a second for a call, so small cases only, which alternate between layouts."""
    for spec in SPECS:
        small = [case for case in spec.cases if math.prod(case.shape) <= 600 or case.shape == (2, 136, 2, 3)]
        yield from ((spec, case, DENSE_LAYOUTS[i % 2]) for i, case in enumerate(small))


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that a plane has several, of several programs, whose sums are added up in several rounds."""
    for name, value in {"TILE": 8, "TILE_OF_DOUBLE": 8, "RUN": 16, "PROGRAMS": 18}.items():
        monkeypatch.setattr(tiles, name, value)
    for name, value in {"SUMS": 2, "RESIDENT": 0, "RESIDENT_BACKWARD_OF_MAPS": 0}.items():
        monkeypatch.setattr(kernels, name, value)


@pytest.mark.parametrize("spec, case, layout", list(small_cases()), ids=str)
def test_in_double(spec, case, layout):
    """With hardly any rounding to tolerate, every mistake shows."""
    check_against_eager(spec, "triton", case, torch.float64, layout=layout)


@both_layouts
@pytest.mark.parametrize("options", [UP, LEAKY], ids=str)
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
def test_other_dtypes(dtype, parameter_dtype, options, layout):
    for affine in (VECTOR, ROWS, MAPS) if parameter_dtype == dtype else (VECTOR, ROWS):
        case = Case((2, 5, 3, 8), "", options, sizes={"affine": affine})
        check_against_eager(SPECS[affine == MAPS], "triton", case, dtype, parameter_dtype, layout)


@pytest.mark.parametrize(
    "affine, options, layout",
    [
        (affine, options, DENSE_LAYOUTS[(i + j) % 2])
        for i, options in enumerate(({}, UP, LEAKY))
        for j, affine in enumerate((NONE, VECTOR, ROWS, MAPS))
    ],
    ids=str,
)
def test_several_programs(small_tiles, affine, options, layout):
    """3 x 14 pixels: tiles with a remainder, several per program; in channels_last of 2 of the 3 channels."""
    case = Case((2, 3, 3, 14), "", options, sizes={"affine": affine})
    tensors = MODULATE.inputs(case, torch.float64, layout=layout)
    tiling = kernels.Tiling.of(tensors["x"], options.get("upsample", 1))
    assert tiling.parts > kernels.SUMS and tiling.tiles > 1
    check_against_eager(SPECS[affine == MAPS], "triton", case, torch.float64, layout=layout)


@pytest.mark.parametrize(
    "shape, upsample, expected",
    [
        ((64, 256, 32, 32), 1, (4, 2, 1024, 1, 1)),
        ((64, 256, 4, 4), 1, (4, 128, 16, 1, 1)),
        ((64, 256, 32, 32), 2, (2, 1, 1024, 1, 1)),
        ((1, 3, 91, 100), 1, (4, 1, 2048, 1, 5)),
        ((1, 3, 5, 7), 1, (1, 4, 64, 1, 1)),
        ((64, 64, 256, 256), 1, (4, 1, 2048, 32, 1)),
    ],
    ids=str,
)
def test_tiles_of_planes(shape, upsample, expected):
    """Vector, channels and pixels of a tile, tiles of a program, programs of a plane."""
    assert kernels.Tiling.of(torch.empty(shape, device="meta"), upsample)[:5] == expected


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that are launched."""
    names = []

    def record(kernel, *args, **kwargs):
        names.append(kernel.fn.__name__)
        launch(kernel, *args, **kwargs)

    launch = kernels.launch
    for module in (kernels, statistics):
        monkeypatch.setattr(module, "launch", record)
    return names


@both_layouts
@pytest.mark.parametrize("most", [0, 512])
def test_partial_statistics_are_merged(monkeypatch, launched, most, layout):
    """By each program, several at a time, or by a kernel of their own."""
    for module, values in {
        statistics: {"TILE_OF_DOUBLE": 32, "RUN": 32, "LEAST_TILES": 1},
        tiles: {"TILE_OF_DOUBLE": 32, "RUN": 32},
        kernels: {"MERGED": most, "MERGED_AT_ONCE": 2},
    }.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    case = Case((3, 5, 6, 8), "", {"activation": "relu"}, "offset")
    partials = statistics.partial_statistics([MODULATE.inputs(case, torch.float64, layout=layout)["x"]])
    assert partials.shape[2] > 2 * kernels.MERGED_AT_ONCE
    launched.clear()
    check_against_eager(MODULATE, "triton", case, torch.float64, layout=layout)
    assert ("finish_statistics_kernel" in launched) == (most == 0)


@both_layouts
@pytest.mark.parametrize("affine", [NONE, VECTOR, ROWS, MAPS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=name_of)
def test_planes_in_registers(monkeypatch, launched, dtype, affine, layout):
    """Of 45 pixels, so with elements beyond the plane; several programs; |mean| >> std. One launch each way."""
    monkeypatch.setattr(tiles, "TILE", 128)
    monkeypatch.setattr(tiles, "RUN", 16)
    case = Case((2, 5, 5, 9), "", LEAKY, "offset", {"affine": affine})
    check_against_eager(SPECS[affine == MAPS], "triton", case, dtype, layout=layout)
    assert set(launched) == {"modulate_fwd_resident_kernel", "modulate_bwd_resident_kernel"}


@both_layouts
@pytest.mark.parametrize("limit", ["RESIDENT", "RESIDENT_BACKWARD_OF_MAPS"])
def test_planes_that_do_not_fit_are_streamed(monkeypatch, launched, limit, layout):
    monkeypatch.setattr(kernels, limit, 32)
    check_against_eager(MODULATE_MAPS, "triton", Case((2, 3, 5, 8), "", LEAKY), layout=layout)
    backward = {f"modulate_bwd_{name}_kernel" for name in ("reduce", "finish", "apply")}
    streamed = {"statistics_kernel", "finish_statistics_kernel", "modulate_fwd_kernel"}
    assert set(launched) == (
        {"modulate_bwd_resident_kernel", *streamed}
        if limit == "RESIDENT"
        else {"modulate_fwd_resident_kernel", *backward}
    )


@pytest.mark.parametrize(
    "shape, layout, dtype, expected",
    [
        ((64, 256, 32, 32), "contiguous", torch.float32, (4, 2, 1024, 4)),
        ((64, 256, 128, 128), "contiguous", torch.bfloat16, (8, 1, 16384, 16)),
        ((64, 256, 128, 129), "contiguous", torch.float32, None),
        ((64, 256, 91, 90), "contiguous", torch.float64, (2, 1, 8192, 16)),
        ((64, 256, 91, 91), "contiguous", torch.float64, None),
        ((64, 256, 4, 4), "channels_last", torch.float32, (4, 128, 16, 4)),
        ((64, 256, 16, 16), "channels_last", torch.float32, (4, 32, 256, 16)),
        ((64, 256, 32, 32), "channels_last", torch.bfloat16, (8, 16, 1024, 16)),
        ((64, 256, 32, 64), "channels_last", torch.float32, (4, 8, 2048, 16)),
        ((64, 256, 64, 64), "channels_last", torch.float32, None),
        ((64, 3, 64, 64), "channels_last", torch.float32, (1, 4, 4096, 16)),
    ],
    ids=str,
)
def test_which_planes_stay_in_registers(shape, layout, dtype, expected):
    """Vector, channels, pixels and warps of a program."""
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    x = torch.empty(shape, dtype=dtype, device="meta", memory_format=formats[layout])
    tiling = kernels.Tiling.of_planes(x, kernels.RESIDENT)
    assert (tiling and (*tiling[:3], tiling.warps)) == expected


@both_specs
@pytest.mark.parametrize("options", [UP, LEAKY], ids=str)
def test_gradcheck(spec, options):
    """Against numerical derivatives in random directions (fast_mode)."""
    tensors = spec.inputs(Case((2, 2, 2, 2), "", options), torch.float64)
    leaves = [tensors[name].requires_grad_() for name in spec.differentiable]

    def function(*leaves):
        return modulated_norm(*leaves, **options, impl="triton")

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@both_specs
@pytest.mark.parametrize("options", [UP, LEAKY, {"training": False}], ids=str)
def test_opcheck(spec, options):
    """Schemas and fakes (shapes, dtypes, strides) match the kernels."""
    for layout in DENSE_LAYOUTS:
        tensors = spec.inputs(Case((2, 3, 2, 4), "", options), torch.float32, layout=layout)
        for op, args in spec.kernel_calls("triton", tensors, options):
            torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@both_specs
@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - set(DENSE_LAYOUTS)))
def test_layouts(spec, layout):
    """Inputs and gradients may have any strides; results have the layout of x."""
    tensors = spec.inputs(Case((2, 3, 2, 4), "", UP), torch.float64, layout=layout)
    actual, expected = (evaluate(spec, spec.call(impl), tensors, UP) for impl in ("triton", "reference"))
    for (name, a), (_, b) in zip(actual.named(), expected.named(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_maps_in_another_layout_than_x():
    """Their gradients have the maps' layout."""
    tensors = MODULATE_MAPS.inputs(Case((2, 3, 2, 4), ""), torch.float64)
    mixed = tensors | {"gamma": LAYOUTS["channels_last"](tensors["gamma"])}
    actual, expected = (evaluate(MODULATE_MAPS, MODULATE_MAPS.call("triton"), of, {}) for of in (mixed, tensors))
    assert_same_bits(actual, expected)
    assert layout_of(actual.grads["gamma"]) == layout_of(mixed["gamma"])
    assert layout_of(actual.grads["beta"]) == layout_of(tensors["beta"])


@both_specs
@both_layouts
def test_two_runs_are_bit_identical(small_tiles, spec, layout):
    tensors = spec.inputs(Case((2, 3, 2, 8), "", UP), layout=layout)
    assert_same_bits(*(evaluate(spec, spec.call("triton"), tensors, UP) for _ in range(2)))


@both_specs
@pytest.mark.parametrize("options", [UP, LEAKY], ids=str)
def test_empty_batch(spec, options):
    tensors = spec.inputs(Case((0, 3, 5, 7), "", options))
    result = evaluate(spec, spec.call("triton"), tensors, options)
    assert result.y.shape[0] == 0
    assert all(not grad.any() for grad in result.grads.values())
    assert all(torch.equal(buffer, tensors[name]) for name, buffer in result.buffers.items())


@both_specs
@pytest.mark.parametrize("options", [{"training": False, "activation": "relu"}, INSTANCE], ids=str)
def test_not_a_number_stays_in_its_group(small_tiles, spec, options):
    """Its pixel, or its plane where that is normalised by itself; in y and in the gradient of x."""
    tensors = spec.inputs(Case((2, 3, 5, 8), "", options), torch.float64)
    tensors["x"][1, 1, 2, 4] = torch.nan
    actual, expected = (evaluate(spec, spec.call(impl), tensors, options) for impl in ("triton", "reference"))
    assert actual.y.isnan().sum() == (40 if options == INSTANCE else 1)
    for (name, a), (_, b) in zip(actual.named(), expected.named(), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


@both_specs
def test_autocast_changes_nothing(spec):
    tensors = spec.inputs(Case((2, 3, 2, 4), "", UP))
    plain = evaluate(spec, spec.call("triton"), tensors, UP)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(evaluate(spec, spec.call("triton"), tensors, UP), plain)
