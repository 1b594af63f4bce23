"""The parameters of classes: values, gradients, and wrong arguments."""

import functools

import pytest
import torch
from test_ops import name_of

from pixnorm.ops.class_parameters import class_parameters, ops_of
from pixnorm.ops.common import FLOAT
from pixnorm.testing import CONDITIONAL_SPN, random

SPECS = (CONDITIONAL_SPN,)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("k, masks", [(1, 3), (3, 70), (5, 1)])
@pytest.mark.parametrize("dtype", FLOAT, ids=name_of)
def test_parameters_of_classes(kernel, dtype, k, masks):
    check_parameters_of_classes(kernel, dtype, k, masks)


def check_parameters_of_classes(kernel, dtype, k, masks):
    """As the reference in float64; several blocks of channels, absent classes and repeated ones."""
    classes, tensors = parameters_of_classes(5, 70 if masks == 70 else 3, masks, k, dtype)
    grads, results = None, []
    for impl, computed in ((kernel, dtype), ("reference", torch.float64)):
        leaves = [t.to(computed).detach().requires_grad_() for t in tensors]
        formed = class_parameters(classes, *leaves, impl=impl)
        grads = grads or [random(t.shape, torch.Generator().manual_seed(i)).to(dtype) for i, t in enumerate(formed)]
        found = torch.autograd.grad(formed, leaves, [grad.to(computed) for grad in grads])
        results.append((*formed, *found))
    eps = torch.finfo(dtype).eps
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, rtol=4 * eps, atol=20 * eps)


def parameters_of_classes(count, channels, masks, k, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(count, masks)] * 2 + [(channels, 1, k, k)] * 4 + [(count, 4, channels)] * 2
    tensors = [random(shape, generator).to(dtype) for shape in shapes]
    return torch.tensor([3, 0, 3, 4], device=tensors[0].device), tensors


def test_gradients_of_the_parameters_of_classes(impl):
    classes, tensors = parameters_of_classes(5, 2, 2, 1, torch.float64)
    leaves = [t.requires_grad_() for t in tensors]
    call = functools.partial(class_parameters, classes, impl=impl)
    assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.cpu
def test_ops_of_class_parameters_check_their_arguments():
    """The layer checks before; a direct call must not read beyond tables."""
    classes, tensors = parameters_of_classes(5, 2, 2, 1, torch.float64)
    forward, gradient = ops_of("native")
    with pytest.raises(RuntimeError, match=r"classes must be in \[0, 5\)"):
        forward(classes + 2, *tensors)
    names = ["a table", "a table", *["a kernel"] * 4, "kernel_scale", "kernel_shift"]
    for i in (1, 3, 4, 5, 6, 7):  # sizes are read from the others
        wrong = [torch.cat([t, t]) if i == j else t for j, t in enumerate(tensors)]
        with pytest.raises(RuntimeError, match=f"{names[i]} has the wrong shape"):
            forward(classes, *wrong)
        wrong = [t.float() if i == j else t for j, t in enumerate(tensors)]
        with pytest.raises(RuntimeError, match="has the wrong dtype"):
            forward(classes, *wrong)
    grads = forward(classes, *tensors)
    for i in range(6):
        wrong = [grad[:1] if i == j else grad for j, grad in enumerate(grads)]
        with pytest.raises(RuntimeError, match="a gradient has the wrong shape"):
            gradient(*wrong, classes, *tensors[:-1])
