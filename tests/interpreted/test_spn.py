"""SPN's Triton kernels in Triton's interpreter, on the CPU: the checks of test_ops.py, for small shapes.

``TRITON_INTERPRET=1 python -m pytest tests/interpreted``; test_triton.py runs this in a process of its own.
"""

import math

import pytest
import torch
import triton
import triton.language as tl
from test_ops import assert_same_bits, layout_of, name_of

from pixnorm.testing import DENSE_LAYOUTS, DTYPES, LAYOUTS, SPN, Case, check_against_eager, evaluate
from pixnorm.triton_kernels import common, projection

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]

HEADS = [{}, {"upsample": 2, "activation": "relu"}]
# The interpreter takes time per row, seconds for a few rows. So take the small cases, shrink others, and alternate
# between layouts; and between the two heads, but for the first shape and other kernels.
SMALL = [
    case
    for i, case in enumerate(SPN.cases)
    if math.prod(case.shape) <= 450 and (i < 2 or case.sizes or case.options not in HEADS or i % 2 == i // 2 % 2)
]
SMALL += [
    Case((3, 6, 3, 4), case.why, case.options, case.values)
    for case in SPN.cases
    if case.shape == (2, 17, 7, 10) or (case.values != "plain" and case.options.get("upsample") != 2)
]


def spn(*args, **options):
    return SPN.function(*args, **options, impl="triton")


def test_kernels_are_interpreted():
    assert triton.knobs.runtime.interpret and common.INTERPRETED


@pytest.mark.parametrize("case, layout", [(case, DENSE_LAYOUTS[i % 2]) for i, case in enumerate(SMALL)], ids=str)
def test_in_double(case, layout):
    """With hardly any rounding to tolerate, every mistake shows."""
    check_against_eager(SPN, "triton", case, torch.float64, layout=layout)


@pytest.mark.parametrize(
    "dtype, parameter_dtype, options, layout",
    [
        (*dtypes, options, DENSE_LAYOUTS[(i + j) % 2])
        for i, dtypes in enumerate(DTYPES[:4])
        for j, options in enumerate(HEADS)
    ],
    ids=name_of,
)
def test_other_dtypes(dtype, parameter_dtype, options, layout):
    check_against_eager(SPN, "triton", Case((2, 5, 3, 8), "", options), dtype, parameter_dtype, layout)


@pytest.mark.parametrize("shape, layout", [((9, 2, 4, 8), "contiguous"), ((3, 33, 4, 4), "channels_last")], ids=str)
@pytest.mark.parametrize("options", HEADS, ids=str)
def test_programs_as_on_a_gpu(monkeypatch, shape, options, layout):
    """As many lanes per program as on a GPU, in NCHW of one channel, and two strips: several programs share a sum."""
    monkeypatch.setattr(common, "LANES_OF_INTERPRETER", 0)
    monkeypatch.setattr(common, "LEAST_ROWS", 2)
    tensors = SPN.inputs(Case(shape, ""), layout=layout)
    assert common.walk_of(tensors["x"], 4, 1).parts(shape[1]) > 1
    check_against_eager(SPN, "triton", Case(shape, "", options), layout=layout)


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("channels", [3, 40])
def test_projection_with_statistics(monkeypatch, channels, layout):
    """spn_projection_kernel: p with the statistics of x and p, and dx += Wᵀ dp; in float16, and with TF32."""
    calls = []
    launch = projection.launch
    monkeypatch.setattr(
        projection, "launch", lambda *args, **options: calls.append(options) or launch(*args, **options)
    )
    monkeypatch.setattr(projection, "PIXELS", 64)
    case = Case((3, channels, 3, 8), "72 pixels: a tile and a part of one")
    check_against_eager(SPN, "triton", case, torch.float16, torch.float32, layout)
    assert [call["STATISTICS"] for call in calls[:2]] == [True, False]

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    calls.clear()
    tensors = SPN.inputs(case, layout=layout)
    actual, expected = (evaluate(SPN, SPN.call(impl), tensors, {}) for impl in ("triton", "reference"))
    assert len(calls) == 2
    for (name, a), (_, b) in zip(actual.named(), expected.named(), strict=True):
        assert (a - b).abs().max() <= 3e-3 * b.abs().max(), name
    assert not torch.equal(actual.y, expected.y)


@triton.jit
def round_kernel(x_ptr):
    at = x_ptr + tl.arange(0, 8)
    tl.store(at, projection.rounded_to_tf32(tl.load(at)))


def test_rounding_to_tf32():
    """To nearest, 10 bits of mantissa, as cuDNN does; tensor cores would truncate."""

    x = torch.tensor([1.0, 1 + 2**-11, 1 + 2**-11 + 2**-20, -(1 + 2**-12), torch.inf, -torch.inf, torch.nan, torch.nan])
    x.view(torch.int32)[-1] = 0x7FFFFFFF  # a GPU's NaN
    expected = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-10, -1.0, torch.inf, -torch.inf, torch.nan, torch.nan])
    round_kernel[(1,)](x)
    torch.testing.assert_close(x, expected, rtol=0, atol=0, equal_nan=True)


def test_gradcheck():
    """Against numerical derivatives in random directions (fast_mode)."""
    options = {"upsample": 2}
    tensors = SPN.inputs(Case((2, 2, 2, 2), ""), torch.float64)
    leaves = [tensors[name].requires_grad_() for name in SPN.differentiable]
    buffers = {name: tensors[name] for name in SPN.buffers}

    def function(*leaves):
        return spn(*leaves, **{name: buffer.clone() for name, buffer in buffers.items()}, **options)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_gradients_can_be_differentiated():
    """Through the reference; the first gradients are the kernel's."""
    tensors = SPN.inputs(Case((2, 2, 3, 2), ""), torch.float64)
    leaves = [tensors[name].requires_grad_() for name in SPN.differentiable]
    y = spn(*leaves)
    grad_y = torch.randn_like(y)
    plain, differentiable = (
        torch.autograd.grad(y, leaves, grad_y, retain_graph=True, create_graph=create) for create in (False, True)
    )
    for a, b in zip(plain, differentiable, strict=True):
        torch.testing.assert_close(a, b)
    torch.autograd.grad(sum(grad.square().sum() for grad in differentiable), leaves)


@pytest.mark.parametrize("sizes", [{}, {"masks": 1}], ids=str)
def test_opcheck(sizes):
    """Schemas and fakes (shapes, dtypes, strides) match the kernels."""
    case = Case((2, 3, 2, 4), "", sizes=sizes)
    tensors = SPN.inputs(case, torch.bfloat16, parameter_dtype=torch.float32, layout="channels_last")
    for op, args in SPN.kernel_calls("triton", tensors, {"upsample": 2}):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - set(DENSE_LAYOUTS)))
def test_layouts(layout):
    """Inputs and gradients may have any strides; results have the layout of x."""
    tensors = SPN.inputs(Case((2, 3, 2, 4), ""), torch.float64, layout=layout)
    for actual, expected in zip(
        *(evaluate(SPN, SPN.call(impl), tensors, {}).named() for impl in ("triton", "reference")), strict=True
    ):
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-9, atol=1e-9)
    leaf = tensors["x"].requires_grad_()
    y = spn(**tensors)
    channels_last = not leaf.is_contiguous() and leaf.is_contiguous(memory_format=torch.channels_last)
    expected = LAYOUTS["channels_last" if channels_last else "contiguous"](y)
    assert y.stride() == expected.stride()
    grad_y = LAYOUTS["sliced"](torch.randn(y.shape, dtype=y.dtype))
    grads = [torch.autograd.grad(y, leaf, grad, retain_graph=True)[0] for grad in (grad_y, grad_y.contiguous())]
    assert torch.equal(*grads) and grads[0].stride() == expected.stride()


def test_two_runs_are_bit_identical():
    tensors = SPN.inputs(Case((3, 5, 2, 4), ""), layout="channels_last")
    assert_same_bits(*(evaluate(SPN, spn, tensors, HEADS[1]) for _ in range(2)))


def test_empty_batch():
    tensors = SPN.inputs(Case((0, 3, 5, 7), ""))
    result = evaluate(SPN, spn, tensors, HEADS[1])
    assert result.y.shape == (0, 3, 10, 14)
    assert all(not grad.any() for grad in result.grads.values())
    assert all(torch.equal(buffer, tensors[name]) for name, buffer in result.buffers.items())


def test_not_a_number_stays_where_it_is_in_inference():
    tensors = SPN.inputs(Case((2, 3, 5, 8), ""))
    tensors["x"][1, 1, 2, 4] = torch.nan
    y = spn(**tensors, training=False, activation="relu")
    spoilt = torch.zeros_like(y, dtype=torch.bool)
    spoilt[1, :, 1:4, 3:6] = True
    assert torch.equal(y.isnan(), spoilt)


def test_not_a_number_in_the_gradient_stays_where_it_is_in_inference():
    tensors = SPN.inputs(Case((2, 3, 3, 8), ""), torch.float64)
    grad_y = torch.ones(2, 3, 3, 8, dtype=torch.float64)
    grad_y[1, 2, 0, 6] = torch.nan
    actual, expected = (
        evaluate(SPN, SPN.call(impl), tensors, {"training": False}, grad_y) for impl in ("triton", "reference")
    )
    torch.testing.assert_close(actual.grads["x"], expected.grads["x"], equal_nan=True)


@pytest.mark.parametrize(
    "convert",
    [
        lambda x, weight: (x, weight.contiguous(memory_format=torch.channels_last)),
        lambda x, weight: (x[:1].permute(0, 2, 3, 1).contiguous()[0].permute(2, 0, 1).unsqueeze(0), weight),
    ],
    ids=["weight of a channels_last model", "one image, its channels last"],
)
def test_strides_that_say_both_layouts(convert):
    """PyTorch's convolution chooses p's layout by these strides (and gets the image's gradient wrong)."""
    tensors = SPN.inputs(Case((2, 3, 4, 8), ""), torch.float64)
    tensors["x"], tensors["mask_projection"] = convert(tensors["x"], tensors["mask_projection"])
    actual = evaluate(SPN, spn, tensors, {})
    expected = evaluate(SPN, SPN.reference, tensors | {"x": tensors["x"].contiguous()}, {})
    for (name, a), (_, b) in zip(actual.named(), expected.named(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


def test_not_a_number_spoils_its_channel_in_training():
    tensors = SPN.inputs(Case((2, 3, 3, 4), ""))
    tensors["x"][1, 2, 0, 1] = torch.inf
    result = evaluate(SPN, spn, tensors, HEADS[1])
    assert result.y[:, 2].isnan().all() and result.grads["x"][:, 2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_autocast_changes_nothing(dtype):
    tensors = SPN.inputs(Case((2, 3, 2, 4), ""), dtype, parameter_dtype=torch.float32)
    plain = evaluate(SPN, spn, tensors, {})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(evaluate(SPN, spn, tensors, {}), plain)


def test_export():
    class Wrapped(torch.nn.Module):
        def forward(self, x):
            return spn(x, **parameters, training=False, upsample=2)

    tensors = SPN.inputs(Case((2, 3, 2, 4), ""))
    x, parameters = tensors.pop("x"), tensors
    exported = torch.export.export(Wrapped(), (x,))
    assert "pixnorm.spn_fwd_triton" in exported.graph_module.code
    y = exported.module()(x)
    torch.testing.assert_close(y, Wrapped()(x))
    assert layout_of(y) == layout_of(x.new_empty((2, 3, 4, 8)))
