"""The checks of every op, tried on one that has what no other has: several activations, labels, maps and constants.

Modulation conditioned on classes and regions. Its "kernels" are PyTorch's own operations.
"""

import dataclasses
import inspect

import pytest
import test_ops
import test_setups
import torch
from test_dispatch import test_auto_is_the_default, test_the_impl_that_was_named_runs  # noqa: F401
from test_memory import test_saved_for_backward  # noqa: F401
from test_setups import nothing_fell_back  # noqa: F401
from torch import Tensor

from pixnorm.ops._dispatch import choose, define_op
from pixnorm.ops.checks import check_image, check_option, check_shape
from pixnorm.ops.common import (
    ACTIVATIONS,
    HALF,
    activate,
    dense,
    dense_like,
    like_parameter,
    public,
    reference_grads,
    slope_of,
    through_reference,
)
from pixnorm.testing import Case, OpSpec, Traffic, assert_close_as_eager, evaluate, excess, in_double, random

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:pixnorm.*on the reference")]


def toy_reference(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    table: Tensor,
    shift: Tensor,
    labels: Tensor,
    regions: Tensor,
    noise: Tensor,
    *,
    activation: str | None = None,
    negative_slope: float = 0.2,
) -> Tensor:
    of_sample = table.to(x.dtype)[labels][:, :, None, None]
    of_pixel = shift.to(x.dtype)[regions][:, None]
    return activate((1 + gamma) * x + beta + of_sample + of_pixel + noise.to(x.dtype), activation, negative_slope)


def wide(*tensors):
    return [t.float() if t.dtype in HALF else t for t in tensors]


def before_activation(x, gamma, beta, table, shift, labels, regions, noise):
    x, gamma, beta, table, shift, noise = wide(x, gamma, beta, table, shift, noise)
    return toy_reference(x, gamma, beta, table, shift, labels, regions, noise)


def forward_kernel(*arguments):
    *inputs, slope = arguments
    y = before_activation(*inputs)
    return dense_like(inputs[0]).copy_(y if slope is None else torch.where(y > 0, y, slope * y))


def backward_kernel(grad_y, *arguments):
    *inputs, slope = arguments
    x, gamma, _, table, shift, labels, regions, _ = inputs
    (grad,) = wide(dense(grad_y, x))
    if slope is not None:
        grad = torch.where(before_activation(*inputs) > 0, grad, slope * grad)
    grad_table = grad.new_zeros(table.shape).index_add_(0, labels, grad.sum((2, 3)))
    grad_shift = grad.new_zeros(shift.shape).index_add_(0, regions.flatten(), grad.sum(1).flatten())
    grads = [dense_like(x).copy_(of_activation) for of_activation in ((1 + gamma) * grad, grad * x, grad)]
    return *grads, grad_table.to(table.dtype), grad_shift.to(shift.dtype)


INPUTS = "Tensor x, Tensor gamma, Tensor beta, Tensor table, Tensor shift, Tensor labels, Tensor regions, Tensor noise"
toy_fwd = define_op(
    f"toy_fwd({INPUTS}, float? negative_slope) -> Tensor", lambda x, *args: dense_like(x), everywhere=forward_kernel
)
toy_bwd = define_op(
    f"toy_bwd(Tensor grad_y, {INPUTS}, float? negative_slope) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda grad_y, x, gamma, beta, table, shift, *args: (
        *(dense_like(x) for _ in range(3)),
        table.new_empty(table.shape),
        shift.new_empty(shift.shape),
    ),
    everywhere=backward_kernel,
)


class ToyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, slope, *inputs):
        ctx.slope = slope
        ctx.save_for_backward(*inputs)
        return toy_fwd(*inputs, slope)

    @staticmethod
    def backward(ctx, grad_y):
        inputs = ctx.saved_tensors
        if through_reference():
            activation = None if ctx.slope is None else "leaky_relu"

            def reference(*leaves):
                options = {"activation": activation, "negative_slope": ctx.slope}
                return toy_reference(*leaves, *inputs[5:], **options)

            grads = reference_grads(reference, inputs[:5], grad_y, ctx.needs_input_grad[1:6])
        else:
            grads = toy_bwd(grad_y, *inputs, ctx.slope)
            grads = [*grads[:3], *map(like_parameter, grads[3:], inputs[3:5])]
        return None, *grads, None, None, None


@public
def toy(
    x, gamma, beta, table, shift, labels, regions, noise, *, activation=None, negative_slope=0.2, impl: str = "auto"
):
    check_image(x)
    check_option("activation", activation, ACTIVATIONS)
    n, _, h, w = x.shape
    shapes = {"gamma": (gamma, x.shape), "labels": (labels, (n,)), "regions": (regions, (n, h, w))}
    for name, (tensor, shape) in shapes.items():
        check_shape(name, tensor, shape, x)
    inputs = x, gamma, beta, table, shift, labels, regions, noise
    if choose("toy", impl, x.device, {}) == "reference":
        return toy_reference(*inputs, activation=activation, negative_slope=negative_slope)
    slope = slope_of(activation, negative_slope)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return ToyFunction.apply(slope, *inputs)
    return toy_fwd(*inputs, slope)


CLASSES, REGIONS = 7, 11  # no size of x in any check: the compiler would take equal sizes for one


def inputs_of(case, dtype, parameter_dtype, generator):
    n, c, h, w = case.shape

    def below(limit, *shape):
        numbers = torch.randint(limit, shape, generator=generator, device="cpu")
        return numbers.to(torch.get_default_device())

    tensors = {name: random(case.shape, generator).to(dtype) for name in ("x", "gamma", "beta")}
    for name, shape in {"table": (CLASSES, c), "shift": (REGIONS,)}.items():
        tensors[name] = random(shape, generator).to(parameter_dtype)
    tensors |= {"labels": below(CLASSES, n), "regions": below(REGIONS, n, h, w)}
    return tensors | {"noise": random((n, 1, h, w), generator).to(dtype)}


def calls_of(impl, tensors, options):
    slope = slope_of(options.get("activation"), options.get("negative_slope", 0.2))
    arguments = [tensors[name] for name in inspect.signature(toy_reference).parameters if name in tensors]
    yield toy_fwd, (*arguments, slope)
    yield toy_bwd, (torch.ones_like(tensors["x"]), *arguments, slope)


def traffic_of(case, dtype):
    one = dtype.itemsize * torch.Size(case.shape).numel()
    return Traffic(4 * one, 6 * one)


TOY = OpSpec(
    name="toy",
    function=toy,
    reference=toy_reference,
    make_inputs=inputs_of,
    activations=("x", "gamma", "beta"),
    per_sample=("labels", "regions", "noise"),
    integers=("labels", "regions"),
    differentiable=("x", "gamma", "beta", "table", "shift"),
    cases=(
        Case((2, 3, 5, 7), "odd everywhere"),
        Case((3, 4, 6, 6), "activation", {"activation": "relu"}),
        Case((1, 1, 1, 3), "one channel", {"activation": "leaky_relu", "negative_slope": 0.5}),
        Case((0, 3, 4, 4), "empty batch"),
    ),
    traffic=traffic_of,
    kernel_calls=calls_of,
    options={"activation": (None, "leaky_relu")},
    variants=({}, {"activation": "relu"}),
    float32_parameters=True,
)
SPECS = (TOY,)  # conftest.py goes through these in this file

# All checks of all ops, by their names there.
globals().update(
    (name, check)
    for module in (test_ops, test_setups)
    for name, check in vars(module).items()
    if name.startswith("test_") and "spec" in inspect.signature(check).parameters
)


# --- the harness itself


def test_constants_are_passed_through():
    """Neither copied nor cast, and without a gradient, whatever else an evaluation does with tensors."""
    tensors = TOY.inputs(TOY.cases[0], torch.bfloat16) | {"buffer": torch.zeros(())}
    spec = dataclasses.replace(TOY, buffers=("buffer",))
    given = {}

    def function(buffer, **arguments):
        given.update(arguments, buffer=buffer)
        return toy_reference(**arguments)

    evaluate(spec, function, tensors, {})
    assert given.keys() == tensors.keys()
    assert all(given[name] is tensors[name] for name in ("labels", "regions", "noise"))
    assert {name for name, tensor in given.items() if tensor.requires_grad} == set(TOY.differentiable)
    assert given["buffer"] is not tensors["buffer"]
    assert {name for name, tensor in in_double(tensors).items() if tensor.dtype != torch.float64} == set(TOY.integers)


@pytest.mark.parametrize("layout", ["channels_last", "padded_pixels"])
def test_activations_share_a_layout(layout):
    tensors = TOY.inputs(Case((2, 3, 4, 5), ""), layout=layout)
    assert len({tensors[name].stride() for name in TOY.activations}) == 1
    assert not any(tensors[name].is_contiguous() for name in TOY.activations)
    assert all(tensors[name].is_contiguous() for name in tensors if name not in TOY.activations)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"integers": ("labels",)}, "regions"),
        ({"integers": ("labels", "regions", "noise")}, "noise"),
        ({"buffers": ("labels",)}, "labels cannot be both"),
        ({"differentiable": ("gamma", "x")}, "x must be differentiable, and come first"),
    ],
    ids=str,
)
def test_a_spec_that_contradicts_itself_is_an_error(change, message):
    with pytest.raises(AssertionError, match=message):
        dataclasses.replace(TOY, **change).inputs(TOY.cases[0])


def test_a_wrong_kernel_is_found():
    """Of labels, too: the class of the first sample for all."""

    def wrong(*args, labels, impl, **kwargs):
        return toy(*args, labels=labels[:1].expand_as(labels), impl=impl, **kwargs)

    with pytest.raises(AssertionError, match="error is"):
        test_ops.check_against_eager(dataclasses.replace(TOY, function=wrong), "native", Case((3, 4, 6, 6), ""))


def draws(errors, size):
    """Results with an error of so many ulps of 1 for each seed, beside an exact eager one."""

    def draw(seed):
        exact = torch.ones(size, dtype=torch.float64)
        actual = exact.float() + errors(seed) * torch.finfo(torch.float32).eps
        yield "result", actual, [exact.float()], exact

    return draw


def test_a_single_number_may_be_small_by_chance_but_not_in_most_draws():
    """The same error of one of several numbers fails at once."""

    def once(seed):
        return 400 if seed == 0 else 1

    assert_close_as_eager(draws(once, 1), torch.float32)
    with pytest.raises(AssertionError, match="result: the error is 100 times"):
        assert_close_as_eager(draws(once, 2), torch.float32)
    with pytest.raises(AssertionError, match="median of 9 draws"):
        assert_close_as_eager(draws(lambda seed: 400, 1), torch.float32)


@pytest.mark.parametrize("error, times", [(torch.nan, "inf"), (torch.inf, "inf"), (8000, "2e\\+03")])
def test_a_single_number_is_never_far_off(error, times):
    """Not even in a few draws of several, as with memory that some calls leave uninitialised."""
    with pytest.raises(AssertionError, match=f"result: the error is {times} times"):
        assert_close_as_eager(draws(lambda seed: error if seed == 5 else 5, 1), torch.float32)


def test_an_overflow_counts_where_plain_pytorch_has_none():
    exact, inf = torch.ones(3, dtype=torch.float64), torch.tensor([1, float("inf"), 1])
    assert excess(inf, [inf], exact, torch.float16) == 1
    assert excess(exact.float(), [inf], exact, torch.float16) == 0
    assert excess(inf, [exact.float()], exact, torch.float16) == float("inf")
    assert excess(torch.full((3,), float("nan")), [inf], exact, torch.float16) == float("inf")
