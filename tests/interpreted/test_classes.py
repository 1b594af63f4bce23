"""The parameters of classes in Triton, in the interpreter; see test_spn.py."""

import pytest
import torch
from test_class_parameters import check_parameters_of_classes, parameters_of_classes
from test_ops import name_of

from pixnorm.ops.class_parameters import ops_of
from pixnorm.ops.common import FLOAT

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]


@pytest.mark.parametrize("k, masks", [(3, 70), (1, 3), (5, 1)])
@pytest.mark.parametrize("dtype", FLOAT, ids=name_of)
def test_as_the_reference(dtype, k, masks):
    check_parameters_of_classes("triton", dtype, k, masks)


def test_opcheck():
    """Schemas and fakes match the kernels."""
    classes, tensors = parameters_of_classes(5, 3, 1, 3, torch.bfloat16)
    forward, gradient = ops_of("triton")
    checks = "test_schema", "test_faketensor"
    torch.library.opcheck(forward, (classes, *tensors), test_utils=checks)
    torch.library.opcheck(gradient, (*forward(classes, *tensors), classes, *tensors[:-1]), test_utils=checks)


def test_classes_out_of_range_are_the_nearest():
    tensors = parameters_of_classes(5, 2, 2, 1, torch.float64)[1]
    forward, gradient = ops_of("triton")
    near, far = torch.tensor([0, 4, 4, 2]), torch.tensor([-3, 5, 2**40, 2])
    grads = forward(near, *tensors)
    for of in (near, far):
        for a, b in zip(forward(of, *tensors), grads, strict=True):
            assert torch.equal(a, b)
    for a, b in zip(gradient(*grads, near, *tensors[:-1]), gradient(*grads, far, *tensors[:-1]), strict=True):
        assert torch.equal(a, b)


def test_no_classes():
    classes, tensors = parameters_of_classes(5, 3, 3, 3, torch.float64)
    forward, gradient = ops_of("triton")
    formed = forward(classes[:0], *tensors)
    assert all(t.shape[0] == 0 for t in formed)
    assert not any(t.any() for t in gradient(*formed, classes[:0], *tensors[:-1]))
