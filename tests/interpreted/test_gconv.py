"""GConv's Triton kernels in the interpreter; see test_spn.py."""

import pytest
import torch
from test_ops import assert_same_bits, name_of

from pixnorm.functional import gconv2d, gconv_mix, glinear
from pixnorm.testing import DENSE_LAYOUTS, GCONV_MIX, LAYOUTS, Case, check_against_eager, evaluate
from pixnorm.triton_kernels import gconv

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]

# The interpreter takes a twentieth of a second per tile.
SMALL = [case for case in GCONV_MIX.cases if torch.Size(case.shape).numel() <= 5000]


@pytest.fixture
def small_tiles(monkeypatch):
    """Blocks so small that few pixels and channels make several tiles, chunks and partial sums."""
    blocks = gconv.Blocks(rows=32, columns=16, chunk=16, warps=4, stages=1)
    for name in ("TENSOR_CORES", "TENSOR_CORES_CROWDED", "PLAIN", "DOUBLE"):
        monkeypatch.setattr(gconv, name, blocks)
    monkeypatch.setattr(gconv, "PROGRAMS", 8)


@pytest.mark.parametrize("case, layout", [(case, DENSE_LAYOUTS[i % 2]) for i, case in enumerate(SMALL)], ids=str)
def test_in_double(case, layout):
    """With hardly any rounding to tolerate, every mistake shows."""
    check_against_eager(GCONV_MIX, "triton", case, torch.float64, layout=layout)


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 40, 5, 9), (7, 18, 3, 3), (40, 20, 1, 1)], ids=str)
def test_several_tiles(small_tiles, shape, layout):
    """45 pixels: two tiles per sample. 9 pixels: two samples per tile, padded to 16. 1 pixel: 32 samples per tile."""
    check_against_eager(GCONV_MIX, "triton", Case(shape, ""), torch.float64, layout=layout)


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 20, 5, 8), (5, 20, 2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)
def test_other_dtypes(dtype, shape, layout):
    check_against_eager(GCONV_MIX, "triton", Case(shape, ""), dtype, layout=layout)


def test_tf32(monkeypatch):
    """Operands of the product are rounded to TF32; u, which is added, is not: with zero weights y equals u."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    tensors = GCONV_MIX.inputs(Case((2, 20, 5, 8), "", sizes={"bias": 0}))
    actual, expected = (evaluate(GCONV_MIX, GCONV_MIX.call(impl), tensors, {}) for impl in ("triton", "reference"))
    for (name, a), (_, b) in zip(actual.named(), expected.named(), strict=True):
        assert (a - b).abs().max() <= 2e-3 * b.abs().max(), name
    assert not torch.equal(actual.y, expected.y)
    tensors["mix_weight"] = torch.zeros_like(tensors["mix_weight"])
    assert torch.equal(gconv_mix(**tensors, impl="triton"), tensors["u"])


@pytest.mark.parametrize("shape", [(2, 3, 2, 2), (3, 2, 1, 1)], ids=str)
def test_gradcheck(shape):
    tensors = GCONV_MIX.inputs(Case(shape, ""), torch.float64)
    leaves = [tensors[name].requires_grad_() for name in GCONV_MIX.differentiable]
    assert torch.autograd.gradcheck(lambda *t: gconv_mix(*t, impl="triton"), leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *t: gconv_mix(*t, impl="triton"), leaves, fast_mode=True)


def test_opcheck():
    """Schemas and fakes (shapes, dtypes, strides) match the kernels."""
    for layout in DENSE_LAYOUTS:
        tensors = GCONV_MIX.inputs(Case((2, 3, 2, 4), ""), torch.float16, layout=layout)
        for op, args in GCONV_MIX.kernel_calls("triton", tensors, {}):
            torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_layouts(layout):
    """Inputs and gradients may have any strides; results have the layout of u."""
    tensors = GCONV_MIX.inputs(Case((2, 3, 2, 4), ""), torch.float64, layout=layout)
    actual, expected = (evaluate(GCONV_MIX, GCONV_MIX.call(impl), tensors, {}) for impl in ("triton", "native"))
    for (name, a), (_, b) in zip(actual.named(), expected.named(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
        assert a.stride() == b.stride(), name


def test_two_runs_are_bit_identical():
    tensors = GCONV_MIX.inputs(Case((3, 20, 3, 9), ""), layout="channels_last")
    assert_same_bits(*(evaluate(GCONV_MIX, GCONV_MIX.call("triton"), tensors, {}) for _ in range(2)))


def test_empty_batch():
    tensors = GCONV_MIX.inputs(Case((0, 3, 5, 7), ""))
    result = evaluate(GCONV_MIX, GCONV_MIX.call("triton"), tensors, {})
    assert result.y.shape == (0, 3, 5, 7) and all(not grad.any() for grad in result.grads.values())


def test_not_a_number_stays_in_its_pixel():
    tensors = GCONV_MIX.inputs(Case((2, 20, 3, 5), ""))
    tensors["u"][1, 7, 2, 3] = torch.nan
    y = gconv_mix(**tensors, impl="triton")
    spoilt = torch.zeros_like(y, dtype=torch.bool)
    spoilt[1, :, 2, 3] = True
    assert torch.equal(y.isnan(), spoilt)


def test_both_layers():
    """gconv2d and glinear, with gradients."""
    torch.manual_seed(0)
    x, z, s, w = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 3, 4, 5), (2, 2), (4, 5), (4, 4)))
    for function, given, weight in (
        (gconv2d, x, torch.randn(4, 3, 3, 3, dtype=torch.float64)),
        (glinear, x[..., 0, 0].contiguous(), torch.randn(4, 3, dtype=torch.float64)),
    ):
        results = []
        for impl in ("triton", "reference"):
            leaves = [t.detach().clone().requires_grad_() for t in (given, z, weight, s, w)]
            y = function(*leaves, impl=impl)
            results.append((y, *torch.autograd.grad(y.sin().sum(), leaves)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
