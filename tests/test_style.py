"""Identities of StyleGAN's epilogues, the gradient of the noise, scalar parameters, and bad input."""

import pytest
import torch
import torch.nn.functional as F

from pixnorm.functional import modulated_norm, style_epilogue, style_norm
from pixnorm.ops.common import HALF
from pixnorm.ops.style import style_epilogue_reference, style_norm_reference
from pixnorm.testing import DENSE_LAYOUTS, LAYOUTS, Case
from pixnorm.testing.style import STYLE_EPILOGUE, STYLE_NORM

SPECS = (STYLE_EPILOGUE, STYLE_NORM)
CLOSE = {"rtol": 1e-9, "atol": 1e-10}
FUNCTIONS = {"epilogue": (style_epilogue, style_epilogue_reference), "norm": (style_norm, style_norm_reference)}
pytestmark = [pytest.mark.usefixtures("one_thread")]

functions = pytest.mark.parametrize("which", FUNCTIONS)


def numbers(*shape):
    return 2 * torch.randn(shape, dtype=torch.float64) + 1


def arguments(which, *, n=2, c=3, h=4, w=5, samples=None):
    """Of all tensors; noise of as many samples as asked for."""
    rows = ("demod", "next_styles") if which == "epilogue" else ("scale", "shift")
    tensors = {"x": numbers(n, c, h, w)} | {name: numbers(n, c) for name in rows}
    return tensors | {"noise": numbers(samples or n, 1, h, w), "noise_strength": numbers(c), "bias": numbers(c)}


def test_the_epilogue_is_stylegan2s(impl):
    """Its operations: modulated convolution's demodulation, noise injection, fused leaky ReLU, the next modulation."""
    t = arguments("epilogue")
    x = t["x"] * t["demod"][..., None, None]
    x = x + t["noise_strength"][:, None, None] * t["noise"]
    x = F.leaky_relu(x + t["bias"][:, None, None], 0.2) * 2**0.5
    expected = x * t["next_styles"][..., None, None]
    torch.testing.assert_close(style_epilogue(**t, gain=2**0.5, impl=impl), expected, **CLOSE)


def test_without_arguments_the_epilogue_is_the_activation(impl):
    x = numbers(2, 3, 4, 5)
    torch.testing.assert_close(style_epilogue(x, impl=impl), F.leaky_relu(x, 0.2))
    torch.testing.assert_close(style_epilogue(x, activation=None, gain=0.5, impl=impl), 0.5 * x)


def test_absent_rows_are_ones_and_zeros(impl):
    x, ones, zeros = numbers(2, 3, 4, 5), torch.ones(2, 3).double(), torch.zeros(3).double()
    noise = {"noise": numbers(2, 1, 4, 5), "noise_strength": zeros}
    full = style_epilogue(x, demod=ones, next_styles=ones, bias=zeros, **noise, impl=impl)
    assert torch.equal(style_epilogue(x, impl=impl), full)
    rows = numbers(2, 3), numbers(2, 3)
    assert torch.equal(style_norm(x, *rows, impl=impl), style_norm(x, *rows, bias=zeros, **noise, impl=impl))


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_the_norm_is_adain_of_the_activation(impl, layout):
    t = STYLE_NORM.inputs(Case((3, 5, 6, 7), ""), torch.float64, layout=layout)
    v = F.leaky_relu(t["x"] + t["noise_strength"][:, None, None] * t["noise"] + t["bias"][:, None, None], 0.2)
    options = {"statistics": "instance", "gamma_offset": 1.0, "eps": 1e-8}
    torch.testing.assert_close(
        style_norm(**t, impl=impl), modulated_norm(v, t["scale"], t["shift"], **options), **CLOSE
    )


def test_the_norm_gives_the_styles_statistics(impl):
    t = arguments("norm")
    y = style_norm(**t, eps=1e-30, impl=impl)
    torch.testing.assert_close(y.mean((2, 3)), t["shift"], **CLOSE)
    torch.testing.assert_close(y.std((2, 3), correction=0), (1 + t["scale"]).abs(), **CLOSE)


@functions
@pytest.mark.parametrize("samples", [1, 3])
def test_noise_has_a_gradient(impl, which, samples):
    """StyleGAN's projector optimises it."""
    function, reference = FUNCTIONS[which]
    t = arguments(which, n=3, samples=samples)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in t.items()}
    grad_y = numbers(3, 3, 4, 5)
    found = torch.autograd.grad(function(**leaves, impl=impl), list(leaves.values()), grad_y)
    expected = torch.autograd.grad(reference(**leaves), list(leaves.values()), grad_y)
    torch.testing.assert_close(found, expected, **CLOSE)
    only = leaves["noise"]
    (of_noise,) = torch.autograd.grad(function(**(t | {"noise": only}), impl=impl), only, grad_y)
    torch.testing.assert_close(of_noise, found[list(leaves).index("noise")], **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(function(**leaves, impl=impl), function(**t, impl=impl))


@functions
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_scalars_are_for_all_channels(impl, which, shape):
    function, _ = FUNCTIONS[which]
    t = arguments(which)
    scalars = {name: numbers(*shape).requires_grad_() for name in ("noise_strength", "bias")}
    vectors = {name: tensor.detach().expand(3).clone().requires_grad_() for name, tensor in scalars.items()}
    y, expected = (function(**(t | given), impl=impl) for given in (scalars, vectors))
    assert torch.equal(y, expected)
    grad_y = numbers(2, 3, 4, 5)
    found = torch.autograd.grad(y, list(scalars.values()), grad_y)
    of_channels = torch.autograd.grad(expected, list(vectors.values()), grad_y)
    for grad, of_channel in zip(found, of_channels, strict=True):
        torch.testing.assert_close(grad, of_channel.sum().reshape(shape), **CLOSE)


def test_path_length_regularisation(impl):
    """StyleGAN 2's second derivative: of the norm of the styles' gradient."""
    t = arguments("epilogue", n=2, c=2, h=3, w=2)
    leaves = [t.pop(name).requires_grad_() for name in ("demod", "next_styles")]

    def path_lengths(demod, next_styles):
        y = style_epilogue(**t, demod=demod, next_styles=next_styles, impl=impl)
        grads = torch.autograd.grad((y * weights).sum(), (demod, next_styles), create_graph=True)
        return sum(grad.square().sum(1) for grad in grads)

    weights = numbers(2, 2, 3, 2)
    assert torch.autograd.gradcheck(path_lengths, leaves)


@functions
def test_second_derivatives(impl, which):
    function, _ = FUNCTIONS[which]
    t = arguments(which, n=2, c=2, h=3, w=2)
    noise = t.pop("noise")
    leaves = {name: tensor.requires_grad_() for name, tensor in t.items()}

    def call(*values):
        return function(**dict(zip(leaves, values, strict=True)), noise=noise, impl=impl)

    assert torch.autograd.gradgradcheck(call, list(leaves.values()))


@functions
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.ones(3, 4, 5)}, ValueError, "expected 4D input"),
        ({"x": torch.ones(2, 3, 4, 5, dtype=torch.int64)}, TypeError, "expected floating point input"),
        ({"noise": None}, ValueError, "noise and noise_strength must either both be None or neither be None"),
        ({"noise_strength": None}, ValueError, "noise and noise_strength must either both be None or neither be None"),
        ({"noise": torch.ones(2, 3, 4, 5)}, ValueError, r"noise must have shape \(2, 1, 4, 5\) .* got \(2, 3, 4, 5\)"),
        ({"noise": torch.ones(4, 5)}, ValueError, r"noise must have shape \(2, 1, 4, 5\) .* got \(4, 5\)"),
        ({"noise": torch.ones(2, 1, 4, 5)}, TypeError, "expected noise of dtype torch.float64 .* got torch.float32"),
        ({"noise_strength": torch.ones(2, 3)}, ValueError, r"noise_strength must have shape \(3,\) .* got \(2, 3\)"),
        ({"bias": torch.ones(2)}, ValueError, r"bias must have shape \(3,\)"),
        ({"bias": torch.ones(3)}, TypeError, "expected parameters of dtype torch.float64"),
    ],
)
def test_bad_input(impl, which, change, error, message):
    with pytest.raises(error, match=message):
        FUNCTIONS[which][0](**(arguments(which) | change), impl=impl)


@pytest.mark.parametrize(
    "which, change, error, message",
    [
        ("epilogue", {"demod": torch.ones(3)}, ValueError, r"demod must have shape \(2, 3\) .* got \(3,\)"),
        ("epilogue", {"next_styles": torch.ones(2, 4)}, ValueError, r"next_styles must have shape \(2, 3\)"),
        ("epilogue", {"activation": "elu"}, ValueError, "activation must be one of None, 'relu', 'leaky_relu'"),
        ("norm", {"scale": torch.ones(3)}, ValueError, r"scale must have shape \(2, 3\) .* got \(3,\)"),
        ("norm", {"shift": torch.ones(1, 3)}, ValueError, r"shift must have shape \(2, 3\) .* got \(1, 3\)"),
        ("norm", {"eps": 0.0}, ValueError, "eps must be positive"),
    ],
)
def test_bad_input_of_one(impl, which, change, error, message):
    with pytest.raises(error, match=message):
        FUNCTIONS[which][0](**(arguments(which) | change), impl=impl)


def test_parameters_have_one_dtype(impl):
    t = {name: tensor.half() for name, tensor in arguments("epilogue").items()} | {"bias": torch.ones(3)}
    with pytest.raises(TypeError, match=r"one dtype, got torch.float16 for demod and torch.float32 for bias"):
        style_epilogue(**t, impl=impl)


def test_one_value_cannot_be_normalised(impl):
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        style_norm(torch.ones(4, 3, 1, 1), torch.ones(4, 3), torch.ones(4, 3), impl=impl)


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_results_are_rounded_to_nearest(kernel, dtype, layout):
    """One product in float32, so the bits are known; the tolerance of other tests would let truncation pass."""
    x = LAYOUTS[layout](torch.randn(2, 33, 5, 7).to(dtype))
    demod = torch.rand(2, 33) + 0.5
    y = style_epilogue(x, demod=demod, activation=None, impl=kernel)
    assert torch.equal(y, (x.float() * demod[..., None, None]).to(dtype))
