"""Bad input: an error before any work, with the same message for every impl, that of nn.BatchNorm2d if it has one."""

import re

import pytest
import torch
from torch import nn

from pixnorm.functional import spn
from pixnorm.testing import SPN, Case

SHAPE = (2, 3, 4, 5)
HERE = torch.get_default_device()
ALL_BUT_X = (*SPN.differentiable[1:], *SPN.buffers)


def spn_arguments(shape=SHAPE, dtype=torch.float32):
    return SPN.inputs(Case(shape, "bad input"), dtype)


def with_shape(name, shape):
    return lambda tensors: tensors | {name: torch.ones(shape)}


def with_dtype(dtype, *names):
    return lambda tensors: tensors | {name: tensors[name].to(dtype) for name in names}


def on_meta(name):
    return lambda tensors: tensors | {name: tensors[name].to("meta")}


def words(*parts):
    """Matches these, in this order, with anything between them."""
    return ".*".join(re.escape(str(part)) for part in parts)


def wrong_shape(name, shape, *expected):
    """The message has the tensor's name, then the allowed shape or shapes, then its own."""
    return with_shape(name, shape), ValueError, words(name, *expected, shape)


TAPS = (3, 1, 3, 3)

# What is wrong: the change, the error, its message.
BAD_INPUT = {
    "three dimensions": (with_shape("x", (2, 3, 4)), ValueError, words("expected 4D input (got 3D input)")),
    "five dimensions": (with_shape("x", (2, 3, 4, 5, 1)), ValueError, words("expected 4D input (got 5D input)")),
    "a number": (with_shape("x", ()), ValueError, words("expected 4D input (got 0D input)")),
    "channels of x": (
        with_shape("x", (2, 4, 4, 5)),
        ValueError,
        words("expected input of 3 channels, got 4", (2, 4, 4, 5)),
    ),
    "projection, rank": wrong_shape("mask_projection", (3, 3), (3, 3, 1, 1)),
    "projection, a number": wrong_shape("mask_projection", (), (3, 3, 1, 1)),
    "projection, inputs": wrong_shape("mask_projection", (3, 2, 1, 1), (3, 3, 1, 1), SHAPE),
    "projection, outputs": wrong_shape("mask_projection", (2, 3, 1, 1), (3, 3, 1, 1), (1, 3, 1, 1), SHAPE),
    "mask_weight": wrong_shape("mask_weight", (2,), (3,), SHAPE),
    "mask_bias": wrong_shape("mask_bias", (3, 1), (3,), SHAPE),
    "even kernel": (
        with_shape("gamma_weight", (3, 1, 4, 4)),
        ValueError,
        words("1, 3 or 5", "gamma_weight", (3, 1, 4, 4)),
    ),
    "large kernel": (
        with_shape("gamma_weight", (3, 1, 7, 7)),
        ValueError,
        words("1, 3 or 5", "gamma_weight", (3, 1, 7, 7)),
    ),
    "kernel, a number": (with_shape("gamma_weight", ()), ValueError, words("1, 3 or 5", "gamma_weight", ())),
    "oblong kernel": wrong_shape("gamma_weight", (3, 1, 1, 3), TAPS, SHAPE),
    "kernel of two channels": wrong_shape("gamma_weight", (3, 2, 3, 3), TAPS, SHAPE),
    "one standard convolution": wrong_shape("gamma_weight_inv", (3, 3, 3, 3), TAPS, SHAPE),
    "kernels of two sizes": wrong_shape("beta_weight_inv", (3, 1, 5, 5), TAPS, SHAPE),
    "running_mean": wrong_shape("running_mean", (4,), (3,), SHAPE),
    "running_var": wrong_shape("running_var", (4,), (3,), SHAPE),
    "mask_running_mean": wrong_shape("mask_running_mean", (1,), (3,), SHAPE),
    "mask_running_var": wrong_shape("mask_running_var", (1,), (3,), SHAPE),
    "integers": (with_dtype(torch.int64, "x"), TypeError, words("floating point", "int64", SHAPE)),
    "complex numbers": (with_dtype(torch.complex64, "x"), TypeError, words("floating point", "complex64")),
    "doubles with float parameters": (with_dtype(torch.float64, "x"), TypeError, words("float64", "float32")),
    "floats with double parameters": (with_dtype(torch.float64, *ALL_BUT_X), TypeError, words("float32", "float64")),
    "floats with half parameters": (with_dtype(torch.float16, *ALL_BUT_X), TypeError, words("float32", "float16")),
    "half with other half parameters": (
        lambda t: with_dtype(torch.float16, "x")(with_dtype(torch.bfloat16, *ALL_BUT_X)(t)),
        TypeError,
        words("float16", "bfloat16"),
    ),
    "a parameter of another dtype": (
        with_dtype(torch.float64, "beta_weight"),
        TypeError,
        words("beta_weight", "float64"),
    ),
    "a buffer of another dtype": (with_dtype(torch.float64, "running_var"), TypeError, words("running_var", "float64")),
    "a buffer of integers": (with_dtype(torch.int64, "running_mean"), TypeError, words("running_mean", "int64")),
    "x elsewhere": (on_meta("x"), RuntimeError, words("one device", "x on meta", f"on {HERE}")),
    "a parameter elsewhere": (
        on_meta("mask_bias"),
        RuntimeError,
        words("one device", f"x on {HERE}", "mask_bias on meta"),
    ),
    "a buffer elsewhere": (
        on_meta("running_var"),
        RuntimeError,
        words("one device", f"x on {HERE}", "running_var on meta"),
    ),
    "eps of nothing": (lambda t: t | {"eps": float("nan")}, ValueError, words("eps must be", "got nan")),
    "eps below zero": (lambda t: t | {"eps": -1e-3}, ValueError, words("eps must be", "got -0.001")),
    "buffers of two dtypes": (
        lambda t: with_dtype(torch.float32, "running_mean", "running_var")(
            with_dtype(torch.bfloat16, *SPN.differentiable, *SPN.buffers)(t)
        ),
        TypeError,
        words("running statistics of one dtype", "bfloat16", "float32"),
    ),
    "upsample": (lambda t: t | {"upsample": 3}, ValueError, words("upsample must be one of 1, 2, got 3")),
    "activation": (
        lambda t: t | {"activation": "gelu"},
        ValueError,
        words("activation must be one of None, 'relu', 'leaky_relu', got 'gelu'"),
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("which", BAD_INPUT)
def test_spn_refuses(impl, which, training):
    spoil, error, message = BAD_INPUT[which]
    arguments = spoil(spn_arguments())
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(error, match=message):
        spn(**arguments, training=training, impl=impl)
    unchanged = [torch.equal(arguments[name], value) for name, value in before.items() if not value.is_meta]
    assert all(unchanged)


def test_eps_of_zero(impl):
    """As in F.batch_norm of torch 2.12 and newer: not in training, where a variance may be 0."""
    arguments = spn_arguments()
    with pytest.raises(ValueError, match="eps must be positive in training, got 0"):
        spn(**arguments, eps=0, impl=impl)
    if impl != "reference" or torch.__version__ >= "2.12":
        assert spn(**arguments, eps=0, training=False, impl=impl).isfinite().all()


@pytest.mark.parametrize("name", SPN.buffers)
@pytest.mark.parametrize("value", [None, "absent"])
def test_spn_wants_running_statistics_in_inference(impl, name, value):
    arguments = spn_arguments()
    if value is None:
        arguments[name] = None
    else:
        del arguments[name]
    with pytest.raises(RuntimeError, match=f"{name} .*training=False"):
        spn(**arguments, training=False, impl=impl)


@pytest.mark.parametrize("absent", SPN.buffers)
def test_spn_wants_both_running_statistics_of_a_tensor_or_none(impl, absent):
    """As in F.batch_norm, with its message."""
    arguments = spn_arguments()
    before = {name: arguments[name].clone() for name in SPN.buffers}
    with pytest.raises(
        ValueError, match=words("running_mean and ", "running_var must either both be None or neither be None")
    ):
        spn(**(arguments | {absent: None}), impl=impl)
    assert all(torch.equal(arguments[name], value) for name, value in before.items())


@pytest.mark.parametrize("kept", [SPN.buffers[:2], SPN.buffers[2:]])
def test_spn_updates_the_running_statistics_that_are_given(impl, kept):
    """Those of x without those of the mask, or the other way round."""
    everything = spn_arguments()
    before = {name: value.clone() for name, value in everything.items()}
    some = {name: value.clone() for name, value in everything.items() if name in kept or name in SPN.differentiable}
    assert torch.equal(spn(**some, impl=impl), spn(**everything, impl=impl))
    for name in kept:
        assert torch.equal(some[name], everything[name]) and not torch.equal(some[name], before[name])


def message_of(function, *args):
    with pytest.raises(ValueError) as caught:
        function(*args)
    return str(caught.value)


def test_spn_speaks_like_batch_norm(impl):
    """The messages are those of nn.BatchNorm2d, for code that matches them."""
    norm, arguments = nn.BatchNorm2d(3), spn_arguments()
    del arguments["x"]

    def call(x):
        return spn(x, **arguments, impl=impl)

    for shape in [(2, 3, 4), (3,), (1, 3, 1, 1)]:
        x = torch.ones(shape)
        assert message_of(call, x) == message_of(norm, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_spn_wants_two_values_per_channel_in_training(impl, dtype):
    arguments = spn_arguments((1, 3, 1, 1), dtype)
    before = {name: arguments[name].clone() for name in SPN.buffers}
    with pytest.raises(ValueError, match=words("more than 1 value per channel when training, got input size")):
        spn(**arguments, impl=impl)
    assert all(torch.equal(arguments[name], value) for name, value in before.items())
    # Inference estimates nothing; and after upsampling there are four values.
    assert spn(**arguments, training=False, impl=impl).isfinite().all()
    assert spn(**arguments, upsample=2, impl=impl).isfinite().all()


def test_spn_refuses_an_unknown_impl():
    with pytest.raises(ValueError, match=r"'auto', 'native', 'triton', 'reference', got 'cudnn'"):
        spn(**spn_arguments(), impl="cudnn")


def test_an_error_names_the_caller_s_mistake_before_the_backend_s(impl):
    """Input that no backend accepts is reported as such, even if the named backend could not run either."""
    arguments = spn_arguments() | {name: torch.ones(3, 1, 7, 7) for name in SPN.differentiable[-4:]}
    with pytest.raises(ValueError, match="1, 3 or 5"):
        spn(**arguments, impl=impl)


# --- the ops themselves, which can be called without the checks above


@pytest.mark.parametrize("which", range(2))
def test_kernels_refuse_wrong_shapes(kernel, which):
    """With other messages than the public function, but before any access out of bounds."""
    op, arguments = list(SPN.kernel_calls("native", spn_arguments(), {"training": False}))[which]
    op(*arguments)
    accepted = []
    for position, (argument, schema) in enumerate(zip(arguments, op._schema.arguments, strict=True)):
        # The sizes of all other tensors follow from x.
        if isinstance(argument, torch.Tensor) and schema.name != "x":
            for spoilt in (argument[..., :-1], argument[:-1], argument.unsqueeze(0)):
                try:
                    op(*arguments[:position], spoilt, *arguments[position + 1 :])
                except RuntimeError:
                    continue
                accepted.append(f"{schema.name} of shape {tuple(spoilt.shape)}")
    assert not accepted


@pytest.mark.parametrize("which", range(2))
def test_kernels_refuse_wrong_dtypes(kernel, which):
    op, arguments = list(SPN.kernel_calls("native", spn_arguments(), {"training": False}))[which]
    for dtype in (torch.int32, torch.complex64):
        for position, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor):
                with pytest.raises(RuntimeError):
                    op(*arguments[:position], argument.to(dtype), *arguments[position + 1 :])
