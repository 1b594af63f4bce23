"""Convolutions of upsampled tensors, and with pooled outputs: their definitions, layers, and wrong input."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pixnorm import functional as pF
from pixnorm.nn import ConvAvgPool2d, GConv2d, UpsampleConv2d
from pixnorm.ops import resampled_conv
from pixnorm.testing import DENSE_LAYOUTS, LAYOUTS

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
DEFINITIONS = {
    pF.upsample_conv2d: lambda x, *args, **of: F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), *args, **of),
    pF.conv_avg_pool2d: lambda *args, **of: F.avg_pool2d(F.conv2d(*args, **of), 2),
}
LAYERS = {UpsampleConv2d: pF.upsample_conv2d, ConvAvgPool2d: pF.conv_avg_pool2d}

functions = pytest.mark.parametrize("function", DEFINITIONS, ids=lambda f: f.__name__)


pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.fixture(autouse=True)
def paying(request, monkeypatch):
    """Also with the few channels of these tests."""
    if "plainly" not in request.node.name:
        monkeypatch.setattr(resampled_conv, "pays", lambda x, weight: True)


def leaves(size=(3, 3), image=(7, 6), dtype=torch.float64, layout=DENSE_LAYOUTS[0]):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, *image, dtype=dtype), torch.randn(4, 3, *size, dtype=dtype)
    x, weight = (LAYOUTS[layout](t).requires_grad_() for t in (x, weight))
    return x, weight, torch.randn(4, dtype=dtype).requires_grad_()


@pytest.fixture(params=["pixels", "taps"])
def sums(request, monkeypatch):
    """What is added up, on any device."""
    monkeypatch.setattr(resampled_conv, "sums_pixels", lambda x: request.param == "pixels")


@functions
@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize("padding", ["same", "valid", 0, 1, (2, 0), (4, 5)])
@pytest.mark.parametrize("size", [(3, 3), (1, 1), (5, 3), (2, 2), (4, 3)], ids=str)
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_definition(function, size, padding, layout):
    """Values, gradients and strides, of odd and even images and kernels."""
    tensors = leaves(size, layout=layout)
    y = function(*tensors, padding=padding)
    expected = DEFINITIONS[function](*tensors, padding=padding)
    torch.testing.assert_close(y, expected, **CLOSE)
    assert y.stride() == expected.stride()
    grad = torch.randn_like(y)
    grads = zip(*(torch.autograd.grad(of, tensors, grad) for of in (y, expected)), strict=True)
    for ours, theirs in grads:
        torch.testing.assert_close(ours, theirs, **CLOSE)


@functions
def test_reference_and_empty_batch(function):
    x, weight, bias = leaves()
    expected = DEFINITIONS[function](x, weight, bias, padding=1)
    assert torch.equal(function(x, weight, bias, padding=1, impl="reference"), expected)
    assert function(x[:0], weight, bias, padding=1).shape == (0, *expected.shape[1:])


@functions
def test_double_backward(function):
    tensors = leaves(image=(4, 4))
    assert torch.autograd.gradgradcheck(lambda *args: function(*args, padding=1), tensors)


@functions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(function, dtype):
    """Kernels are added up in float32 and rounded once: the error stays below twice that of the definition."""
    torch.manual_seed(0)
    x, weight = torch.randn(4, 16, 8, 8, dtype=dtype), torch.randn(16, 16, 3, 3, dtype=dtype)
    exact = DEFINITIONS[function](x.double(), weight.double(), padding=1)
    errors = [
        (y.double() - exact).square().mean().sqrt()
        for y in (function(x, weight, padding=1), DEFINITIONS[function](x, weight, padding=1))
    ]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_taps_are_rounded_once(dtype):
    kernels = torch.randn(64, 8, 3, 3, generator=torch.Generator().manual_seed(0), device="cpu").to(dtype)
    exact = F.conv2d(kernels.double().view(-1, 1, 3, 3), torch.ones(1, 1, 2, 2, device="cpu").double(), padding=1)
    assert torch.equal(resampled_conv._sums_of_taps(kernels), exact.view(64, 8, 4, 4).to(dtype))


def test_pixels_are_not_added_up_in_half_precision():
    x = torch.zeros(1, 1, 2, 2, device="cpu")
    assert resampled_conv.sums_pixels(x) and not resampled_conv.sums_pixels(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not resampled_conv.sums_pixels(x)


@functions
@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize("size, image, padding", [((3, 3), (1, 4), 0), ((3, 5), (4, 1), 1), ((3, 3), (6, 6), (0, -1))])
def test_what_the_convolution_refuses(function, size, image, padding):
    """Images smaller than the kernels, and a negative padding."""
    tensors = leaves(size, image)
    for call in (DEFINITIONS[function], function):
        with pytest.raises(RuntimeError):
            call(*tensors, padding=padding)


@functions
def test_under_autocast_and_transforms(function):
    x, weight, bias = leaves(dtype=torch.float32)
    with torch.autocast(x.device.type, torch.bfloat16):
        assert function(x, weight, bias, padding=1).dtype == torch.bfloat16
    jacobian = torch.func.vmap(torch.func.grad(lambda w: function(x, w, bias, padding=1).sin().sum()))
    weights = torch.stack([weight, 2 * weight]).detach()
    expected = torch.autograd.grad(DEFINITIONS[function](x, weight, bias, padding=1).sin().sum(), weight)[0]
    torch.testing.assert_close(jacobian(weights)[0], expected, rtol=1e-4, atol=1e-4)


@functions
def test_operations(function):
    """For each weight of a 3x3 kernel and four outputs (or inputs) 9 multiply-adds, not 36; where taps are added up,
    16."""
    x, weight, bias = torch.randn(1, 8, 16, 16), torch.randn(8, 8, 3, 3), None
    counts = {}
    for impl in ("auto", "reference"):
        with FlopCounterMode(display=False) as counter:
            function(x, weight, bias, padding=1, impl=impl)
        counts[impl] = counter.get_total_flops()
    assert counts["auto"] * 36 == counts["reference"] * 9
    x, weight = x.bfloat16(), weight.bfloat16()
    with FlopCounterMode(display=False) as counter:
        function(x, weight, bias, padding=1)
    assert counter.get_total_flops() * 36 == counts["reference"] * 16


@functions
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("taken, made", [(64, 64), (16, 16), (128, 8)])
def test_few_channels_are_convolved_plainly(function, layout, taken, made):
    x, weight = LAYOUTS[layout](torch.randn(1, taken, 8, 8, device="cpu")), torch.randn(made, taken, 3, 3, device="cpu")
    counts = {}
    for impl in ("auto", "native", "reference"):
        with FlopCounterMode(display=False) as counter:
            function(x, weight, padding=1, impl=impl)
        counts[impl] = counter.get_total_flops()
    assert counts["native"] * 36 == counts["reference"] * 9
    assert counts["auto"] == counts["native" if min(taken, made) == 64 else "reference"]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_layers(layer):
    """As ``nn.Conv2d`` beside a change of resolution: initial weights, keys, function."""
    torch.manual_seed(0)
    ours = layer(3, 4, 3, padding=1)
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 4, 3, padding=1)
    x = torch.randn(2, 3, 8, 8)
    ours.load_state_dict(plain.state_dict())
    function = LAYERS[layer]
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in plain.state_dict().items())
    expected = DEFINITIONS[function](x, plain.weight, plain.bias, padding=1)
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)
    reference = layer(3, 4, 3, padding=1, impl="reference")
    reference.load_state_dict(plain.state_dict())
    assert torch.equal(reference(x), expected) and "impl='reference'" in repr(reference)
    graph = torch.fx.symbolic_trace(nn.Sequential(ours)).graph
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), ours(x))


@functions
def test_wrong_input(function):
    x, weight, bias = leaves()
    for args, message in (
        ((x[0], weight), r"expected 4D input \(got 3D input\)"),
        (
            (x, weight[:, :2]),
            r"weight must have shape \(O, 3, kh, kw\) for x of shape \(2, 3, 7, 6\), got \(4, 2, 3, 3\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            function(*args)
    with pytest.raises(ValueError, match="impl must be one of"):
        function(x, weight, bias, impl="fast")
    for padding in ("full", (1, 2, 3)):
        with pytest.raises(ValueError, match="padding must be one or two numbers, 'same' or 'valid', got "):
            function(x, weight, bias, padding=padding)
    for layer in LAYERS:
        with pytest.raises(ValueError, match="impl must be one of"):
            layer(3, 4, 3, impl="fast")


# ---- generative convolution of an upsampled input


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_generative_convolution_of_an_upsampled_input(impl, layout):
    torch.manual_seed(0)
    plain = GConv2d(3, 4, 3, 5, padding=1, impl="reference", dtype=torch.float64)
    layer = GConv2d(3, 4, 3, 5, padding=1, upsample=2, impl=impl, dtype=torch.float64)
    layer.load_state_dict(plain.state_dict())
    x, z = LAYOUTS[layout](torch.randn(2, 3, 4, 5, dtype=torch.float64)), torch.randn(2, 5, dtype=torch.float64)
    x.requires_grad_()
    y, expected = layer(x, z), plain(F.interpolate(x, scale_factor=2, mode="nearest"), z)
    torch.testing.assert_close(y, expected, **CLOSE)
    torch.testing.assert_close(layer(x[0], z[0]), expected[0], **CLOSE)
    grad = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(of, x, grad)[0] for of in (y, expected)), **CLOSE)
    assert "upsample=2" in repr(layer)


@pytest.mark.parametrize("options", [{"stride": 2}, {"dilation": 2}, {"padding_mode": "circular"}])
def test_upsampling_goes_with_plain_convolution(options):
    with pytest.raises(ValueError, match="upsample=2 is for stride 1, dilation 1 and padding_mode='zeros'"):
        GConv2d(3, 4, 3, 5, upsample=2, **options)
    with pytest.raises(ValueError, match="upsample must be one of 1, 2, got 3"):
        GConv2d(3, 4, 3, 5, upsample=3)
