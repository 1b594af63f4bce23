"""Properties of SPN and not of every op: the dtype of x decides; the spread of NaN."""

import pytest
import torch
from test_ops import HALF, assert_same_bits, name_of

from pixnorm.testing import DENSE_LAYOUTS, DTYPES, SPN, Case, evaluate

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.emulated]


@pytest.mark.parametrize("dtype, parameter_dtype", DTYPES, ids=name_of)
def test_autocast_changes_nothing_inside(impl, dtype, parameter_dtype):
    """The dtype of x decides, as for batch norm: not even the GEMMs inside follow autocast.

    Nor in a backward under autocast, which PyTorch advises against; so the reference is checked in forward only.
    """
    case = Case((2, 4, 5, 6), "")
    tensors = SPN.inputs(case, dtype, parameter_dtype=parameter_dtype)
    plain = evaluate(SPN, SPN.call(impl), tensors, {})
    with torch.autocast(tensors["x"].device.type, dtype=torch.bfloat16):
        if impl == "reference":
            assert torch.equal(SPN.function(**tensors, impl=impl), plain.y)
        else:
            assert_same_bits(evaluate(SPN, SPN.call(impl), tensors, {}), plain)


def test_autocast_changes_nothing_in_double_backward(kernel):
    tensors = SPN.inputs(Case((2, 4, 5, 6), ""))
    leaves = [tensors[name].requires_grad_() for name in SPN.differentiable]

    def penalty():
        y = SPN.function(*leaves, impl=kernel)
        (grad_x,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(grad_x.square().sum(), leaves)

    plain = penalty()
    with torch.autocast(leaves[0].device.type, dtype=torch.bfloat16):
        under_autocast = penalty()
    for a, b in zip(under_autocast, plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=name_of)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_a_number_in_not_a_number_out(impl, value, dtype, layout):
    """In training one NaN or infinite pixel makes its channel NaN (and, through the mask, all others)."""
    for options in [{}, {"upsample": 2, "activation": "relu"}]:
        tensors = SPN.inputs(Case((2, 17, 5, 9), "", options), dtype, layout=layout)
        tensors["x"][1, 2, 3, 4] = value
        result = evaluate(SPN, SPN.call(impl), tensors, options)
        assert result.y[:, 2].isnan().all()
        assert result.grads["x"][:, 2].isnan().all()


@pytest.mark.parametrize("masks", [3, 1])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_not_a_number_stays_where_it_is_in_inference(impl, kernel_size, masks):
    """With given statistics only pixels within the stencil of the NaN become NaN; ReLU does not hide it."""
    tensors = SPN.inputs(Case((2, 3, 7, 20), "", sizes={"kernel_size": kernel_size, "masks": masks}))
    tensors["x"][1, 1, 3, 9] = torch.nan
    y = SPN.function(**tensors, training=False, activation="relu", impl=impl)
    spoilt = torch.zeros_like(y, dtype=torch.bool)
    reach = kernel_size // 2
    spoilt[1, :, 3 - reach : 4 + reach, 9 - reach : 10 + reach] = True  # it reaches the mask of every channel
    assert torch.equal(y.isnan(), spoilt)
