"""Conditional SPN's Triton kernels in the interpreter: what groups and rows add to test_spn.py."""

import pytest
import torch
from test_ops import assert_same_bits, name_of

from pixnorm.ops.spn import ops_of
from pixnorm.testing import CONDITIONAL_SPN, DENSE_LAYOUTS, Case, check_against_eager, evaluate
from pixnorm.triton_kernels import common

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]

UP = {"upsample": 2, "activation": "relu"}


def conditional_spn(*args, **options):
    return CONDITIONAL_SPN.function(*args, **options, impl="triton")


# The interpreter takes time per program, here a sample, and per row and phase. So take two samples, one case for each
# thing that groups and rows change, and upsample where that is in question; test_spn.py has the rest.
SMALL = [
    Case((2, 3, 2, 4), "rows, and a group without samples"),
    Case((3, 3, 2, 4), "groups of two samples and of one", {}, sizes={"groups": 2}),
    Case((2, 3, 2, 4), "no rows, more groups than samples", UP, sizes={"groups": 7, "rows": 0}),
    Case((2, 3, 2, 4), "given statistics", UP | {"training": False}),
    Case((2, 3, 2, 4), "a stencil of radius two", {"activation": "relu"}, sizes={"kernel_size": 5}),
    Case((2, 3, 2, 4), "one mask for all channels", UP, sizes={"masks": 1}),
]


@pytest.mark.parametrize("case, layout", [(case, DENSE_LAYOUTS[i % 2]) for i, case in enumerate(SMALL)], ids=str)
def test_in_double(case, layout):
    check_against_eager(CONDITIONAL_SPN, "triton", case, torch.float64, layout=layout)


@pytest.mark.parametrize(
    "dtype, parameter_dtype, options, layout",
    [
        (torch.float16, torch.float32, {}, "channels_last"),
        (torch.bfloat16, torch.bfloat16, UP, "contiguous"),
    ],
    ids=name_of,
)
def test_other_dtypes(dtype, parameter_dtype, options, layout):
    check_against_eager(CONDITIONAL_SPN, "triton", Case((2, 5, 3, 8), "", options), dtype, parameter_dtype, layout)


@pytest.mark.parametrize(
    "shape, layout, parts, channels",
    [
        ((3, 5, 4, 4), "contiguous", 3, 8),  # several small planes in a program
        ((2, 2, 2, 66), "contiguous", 4, 1),  # a sample in two programs, of one channel
        ((2, 33, 2, 4), "channels_last", 2, 32),
    ],
    ids=str,
)
def test_programs_as_on_a_gpu(monkeypatch, shape, layout, parts, channels):
    """No program has lanes of two samples."""
    monkeypatch.setattr(common, "LANES_OF_INTERPRETER", 0)
    tensors = CONDITIONAL_SPN.inputs(Case(shape, ""), layout=layout)
    walk = common.walk_of(tensors["x"], 4, 1, by_sample=True)
    assert (walk.parts(shape[1]), walk.channels) == (parts, channels)
    check_against_eager(CONDITIONAL_SPN, "triton", Case(shape, ""), layout=layout)


@pytest.mark.parametrize("masks", [1, 3])
def test_not_a_number_stays_in_its_group_in_inference(masks):
    case = Case((3, 3, 1, 4), "", sizes={"masks": masks, "groups": 4})
    tensors = CONDITIONAL_SPN.inputs(case, torch.float64) | {"index": torch.tensor([3, 1, 3])}
    tensors["x"][1, 0, 0, 1] = torch.nan
    actual, expected = (
        evaluate(CONDITIONAL_SPN, CONDITIONAL_SPN.call(impl), tensors, {"training": False})
        for impl in ("triton", "reference")
    )
    spoilt = torch.tensor([False, True, False, False])
    for name in ("mask_weight", "mask_bias", "gamma_weight", "gamma_weight_inv", "beta_weight"):
        of_groups = [result.grads[name].flatten(1) for result in (actual, expected)]
        assert torch.equal(of_groups[0].isnan().any(1), spoilt), name
        torch.testing.assert_close(of_groups[0][~spoilt], of_groups[1][~spoilt])
        assert not of_groups[0][[0, 2]].any()
    for name in ("gamma_bias", "beta_bias"):
        torch.testing.assert_close(actual.grads[name][[0, 2]], expected.grads[name][[0, 2]])


def test_not_a_number_in_a_group_without_samples():
    tensors = CONDITIONAL_SPN.inputs(Case((2, 2, 1, 4), ""), torch.float64) | {"index": torch.tensor([2, 1])}
    clean = evaluate(CONDITIONAL_SPN, conditional_spn, tensors, {})
    for name in ("mask_weight", "mask_bias", "gamma_weight", "beta_weight_inv"):
        tensors[name][0] = torch.nan
    assert_same_bits(evaluate(CONDITIONAL_SPN, conditional_spn, tensors, {}), clean)


@pytest.mark.parametrize("missing", ["gamma_bias", "beta_bias"])
def test_each_row_by_itself(missing):
    tensors = CONDITIONAL_SPN.inputs(Case((2, 3, 1, 4), ""), torch.float64)
    del tensors[missing]
    results = (evaluate(CONDITIONAL_SPN, CONDITIONAL_SPN.call(impl), tensors, {}) for impl in ("triton", "reference"))
    for (name, a), (_, b) in zip(*(result.named() for result in results), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


def calls(tensors, **given):
    """What the ops return, of these tensors but for those given."""
    (_, of_forward), (_, of_backward) = CONDITIONAL_SPN.kernel_calls("triton", tensors | given, {})
    forward, backward = ops_of("triton")
    return *forward(*of_forward), *backward(*of_backward)


def test_indices_out_of_range_are_the_nearest():
    """As looking would wait for the GPU; on the CPU the function refuses them."""
    tensors = CONDITIONAL_SPN.inputs(Case((3, 2, 2, 2), "", sizes={"groups": 3, "masks": 1}))
    inside, outside = torch.tensor([0, 2, 1]), torch.tensor([-9, 2**40, 1])
    for a, b in zip(calls(tensors, index=inside), calls(tensors, index=outside), strict=True):
        assert torch.equal(a, b)


def test_rows_alone_are_those_of_one_group():
    """The schema allows rows without an index."""
    tensors = CONDITIONAL_SPN.inputs(Case((2, 2, 2, 2), "", sizes={"groups": 1}), torch.float64)
    names = [name for name in tensors if name.startswith(("mask_weight", "mask_bias", "gamma_w", "beta_w"))]
    without = calls(tensors, index=None, **{name: tensors[name][0] for name in names})
    for a, b in zip(without, calls(tensors), strict=True):
        assert torch.equal(a, b.view(a.shape))


@pytest.mark.parametrize("sizes", [{}, {"masks": 1, "rows": 0}], ids=str)
def test_opcheck(sizes):
    """Schemas and fakes match the kernels."""
    case = Case((2, 3, 1, 4), "", sizes=sizes)
    tensors = CONDITIONAL_SPN.inputs(case, torch.bfloat16, parameter_dtype=torch.float32, layout="channels_last")
    for op, args in CONDITIONAL_SPN.kernel_calls("triton", tensors, {}):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_two_runs_are_bit_identical():
    tensors = CONDITIONAL_SPN.inputs(Case((2, 3, 1, 4), "", sizes={"masks": 1}), layout="channels_last")
    assert_same_bits(*(evaluate(CONDITIONAL_SPN, conditional_spn, tensors, {}) for _ in range(2)))


def test_empty_batch():
    tensors = CONDITIONAL_SPN.inputs(Case((0, 3, 5, 7), ""))
    result = evaluate(CONDITIONAL_SPN, conditional_spn, tensors, UP)
    assert result.y.shape == (0, 3, 10, 14)
    assert all(not grad.any() for grad in result.grads.values())
    assert all(torch.equal(buffer, tensors[name]) for name, buffer in result.buffers.items())
