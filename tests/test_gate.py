"""CBAM's gates: identities, the authors' layers in plain PyTorch, equal maxima, the modules, and bad input."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pixnorm
from pixnorm.functional import channel_gate, spatial_gate
from pixnorm.ops.common import HALF
from pixnorm.testing import DENSE_LAYOUTS, LAYOUTS
from pixnorm.testing.gate import CHANNEL_GATE, SPATIAL_GATE

SPECS = (CHANNEL_GATE, SPATIAL_GATE)
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
pytestmark = [pytest.mark.usefixtures("one_thread")]

layouts = pytest.mark.parametrize("layout", DENSE_LAYOUTS)


def numbers(*shape):
    return torch.randn(shape, dtype=torch.float64)


def arguments(which, *, n=2, c=6, h=4, w=5, hidden=3):
    """Of either gate."""
    x = {"x": numbers(n, c, h, w)}
    if which == "channel":
        rows = {"fc1_bias": numbers(hidden), "fc2_bias": numbers(c)}
        return x | rows | {"fc1_weight": numbers(hidden, c), "fc2_weight": numbers(c, hidden)}
    ones = {"bn_weight": numbers(1), "bn_bias": numbers(1), "running_mean": numbers(1), "running_var": numbers(1) ** 2}
    return x | ones | {"weight": numbers(1, 2, 3, 5)}


FUNCTIONS = {"channel": channel_gate, "spatial": spatial_gate}
gates = pytest.mark.parametrize("which", FUNCTIONS)


# --- the authors' layers


class PlainChannelGate(nn.Module):
    """As in github.com/Jongchan/attention-module."""

    def __init__(self, channels, reduction):
        super().__init__()
        hidden = channels // reduction
        self.mlp = nn.Sequential(nn.Flatten(), nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))

    def forward(self, x):
        pooled = (pool(x, x.shape[2:]) for pool in (F.avg_pool2d, F.max_pool2d))
        return x * torch.sigmoid(sum(self.mlp(p) for p in pooled))[:, :, None, None].expand_as(x)


class PlainSpatialGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(1, eps=1e-5, momentum=0.01, affine=True)

    def forward(self, x):
        compressed = torch.cat([torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)], 1)
        return x * torch.sigmoid(self.bn(self.conv(compressed)))


def pair(which, impl):
    """A gate, the plain one, and its parameters in the order of the gate's."""
    if which == "channel":
        gate, plain = pixnorm.ChannelGate(12, 4, impl=impl), PlainChannelGate(12, 4)
    else:
        gate, plain = pixnorm.SpatialGate(impl=impl), PlainSpatialGate()
    gate, plain = gate.double(), plain.double()
    with torch.no_grad():
        for parameter, other in zip(gate.parameters(), plain.parameters(), strict=True):
            assert parameter.shape == other.shape
            other.copy_(parameter.copy_(torch.randn_like(parameter)))
    return gate, plain


@gates
@layouts
@pytest.mark.parametrize("ties", [False, True])
def test_the_modules_are_the_authors(impl, which, layout, ties):
    """Output, gradients, buffers; in training and in inference. Rounded features have several maxima."""
    gate, plain = pair(which, impl)
    x = LAYOUTS[layout](numbers(3, 12, 7, 9))
    x = x.round() if ties else x
    for training in (True, True, False):
        gate.train(training), plain.train(training)
        results = []
        for module in (gate, plain):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            results.append([y, *torch.autograd.grad(y.sin().sum(), [leaf, *module.parameters()])])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)
    for ours, theirs in zip(gate.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_both_gates_are_cbam(impl):
    x = numbers(2, 12, 5, 6)
    ours, plain = zip(*(pair(which, impl) for which in FUNCTIONS), strict=True)
    torch.testing.assert_close(nn.Sequential(*ours)(x), nn.Sequential(*plain)(x), **CLOSE)


# --- identities


@layouts
def test_without_a_perceptron_the_gate_is_a_half(impl, layout):
    t = {name: torch.zeros_like(value) for name, value in arguments("channel").items()}
    x = LAYOUTS[layout](numbers(2, 6, 4, 5)).requires_grad_()
    y = channel_gate(**(t | {"x": x}), impl=impl)
    assert torch.equal(y, x / 2)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, torch.full_like(x, 0.5))


def test_without_a_convolution_the_gate_is_that_of_the_bias(impl):
    t = arguments("spatial")
    t["weight"] = torch.zeros_like(t["weight"])
    expected = t["x"] * torch.sigmoid(t["bn_bias"])
    torch.testing.assert_close(spatial_gate(**t, impl=impl), expected, **CLOSE)


@layouts
def test_symmetries(impl, layout):
    """The channel gate does not know where pixels are, nor the spatial gate which channel is which."""
    of_channels, of_pixels = arguments("channel"), arguments("spatial")
    x = LAYOUTS[layout](numbers(2, 6, 4, 5))
    pixels, channels = torch.randperm(20), torch.randperm(6)
    moved = x.flatten(2)[:, :, pixels].view_as(x)
    y = channel_gate(**(of_channels | {"x": x}), impl=impl)
    expected = y.flatten(2)[:, :, pixels].view_as(x)
    torch.testing.assert_close(channel_gate(**(of_channels | {"x": moved}), impl=impl), expected, **CLOSE)
    y = spatial_gate(**(of_pixels | {"x": x}), impl=impl)
    moved = spatial_gate(**(of_pixels | {"x": x[:, channels]}), impl=impl)
    torch.testing.assert_close(moved, y[:, channels], **CLOSE)


@layouts
def test_a_gate_of_one_channel_and_one_of_one_pixel(impl, layout):
    """Maximum and mean are the value itself."""
    t = arguments("channel", h=1, w=1)
    v = t["x"][..., 0, 0]
    hidden = F.relu(F.linear(v, t["fc1_weight"], t["fc1_bias"]))
    expected = v * torch.sigmoid(2 * F.linear(hidden, t["fc2_weight"], t["fc2_bias"]))
    torch.testing.assert_close(channel_gate(**t, impl=impl)[..., 0, 0], expected, **CLOSE)
    t = arguments("spatial", c=1)
    z = F.conv2d(t["x"], t["weight"].sum(1, keepdim=True), padding=(1, 2))
    z = F.batch_norm(z, None, None, t["bn_weight"], t["bn_bias"], True)
    torch.testing.assert_close(spatial_gate(**t, impl=impl), t["x"] * torch.sigmoid(z), **CLOSE)


# --- maxima


@layouts
@gates
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_the_gradient_goes_to_the_first_maximum(kernel, which, dtype, layout):
    """All are equal but for a larger pair; the gradient of dy = 0 but for one pixel of the gate shows where it goes."""
    t = {name: value.float() for name, value in arguments(which, c=40, h=9, w=11).items()}
    x = torch.zeros(2, 40, 9, 11)
    if which == "channel":
        x[:, :, 3, 5] = x[:, :, 3, 7] = x[:, :, 8, 10] = 2
    else:
        x[:, 21] = x[:, 33] = x[:, 39] = 2
    leaf = LAYOUTS[layout](x.to(dtype)).requires_grad_()
    y = FUNCTIONS[which](**(t | {"x": leaf}), impl=kernel)
    (grad,) = torch.autograd.grad(y.float().sin().sum(), leaf)
    first, others = (
        (grad[:, :, 3, 5], (grad[:, :, 3, 7], grad[:, :, 8, 10]))
        if which == "channel"
        else (grad[:, 21], (grad[:, 33], grad[:, 39]))
    )
    assert torch.equal(*others)
    assert (first != others[0]).float().mean() > 0.5  # some gradients of maxima are zero


@layouts
@gates
@pytest.mark.parametrize("at", [(1, 3, 0, 0), (1, 20, 8, 10), (0, 39, 4, 6)], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_pass(kernel, which, layout, at, value):
    """As in plain PyTorch, wherever they are."""
    t = {name: v.float() for name, v in arguments(which, c=40, h=9, w=11).items()}
    x = t["x"].clone()
    x[at] = value
    results = []
    for impl in (kernel, "reference"):
        leaf = LAYOUTS[layout](x).requires_grad_()
        buffers = {name: t[name].clone() for name in ("running_mean", "running_var") if name in t}
        y = FUNCTIONS[which](**(t | buffers | {"x": leaf}), impl=impl)
        results.append([y, *torch.autograd.grad(y.sum(), leaf), *buffers.values()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        assert value is not torch.nan or ours.isnan().any()


@pytest.mark.cpu
@pytest.mark.parametrize("width", [1, 2, 5, 16, 17, 33])
def test_infinity_concerns_the_taps_that_see_it(width):
    """The others' gradients are finite, as plain PyTorch's: no tap sees beyond the border."""
    pooled, grad = torch.randn(1, 2, 4, width), torch.randn(1, 1, 4, width)
    pooled[0, 0, 1, width // 2], pooled[0, 1, 3, width - 1] = torch.inf, torch.nan
    weight = torch.randn(1, 2, 7, 7)
    _, ours = torch.ops.pixnorm.gate_conv_grad(grad, pooled, weight)
    expected = F.conv2d(F.pad(pooled, (3, 3, 3, 3)).transpose(0, 1), grad).transpose(0, 1)
    seen = F.conv2d(F.pad(1 - pooled.isfinite().float(), (3, 3, 3, 3)).transpose(0, 1), torch.ones_like(grad))
    assert torch.equal(~ours.isfinite(), seen.transpose(0, 1) > 0)
    torch.testing.assert_close(ours[ours.isfinite()], expected[ours.isfinite()], rtol=1e-4, atol=1e-4)


@layouts
@pytest.mark.parametrize("spatial", [False, True])
def test_maxima_below_zero_and_their_places(kernel, layout, spatial):
    """Of each size modulo that of a vector; -inf is a maximum like others, and NaN one that counts most."""
    pool = getattr(torch.ops.pixnorm, "gate_pool" + ("_triton" if kernel == "triton" else ""))
    for size in [*range(1, 36), 129, 1025, 5000]:
        x = torch.randn((1, 3, 1, size) if layout == "contiguous" and not spatial else (1, size, 1, 3)).round() - 9
        x[..., 0, 0] = -torch.inf
        if size > 40:
            x.flatten()[-7] = torch.nan
        x = LAYOUTS[layout](x)
        pooled, index = pool(x, spatial)
        flat = x.flatten(2)
        values, places = flat.max(1 if spatial else 2)
        assert torch.equal(pooled[:, 0].reshape_as(values).nan_to_num(), values.nan_to_num())
        assert torch.equal(index.reshape_as(places).long(), places)
        mean = flat.mean(1 if spatial else 2)
        torch.testing.assert_close(pooled[:, 1].reshape_as(mean), mean, equal_nan=True)


@layouts
@gates
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_results_are_rounded_to_nearest(kernel, which, dtype, layout):
    """The products in float32 are known; the tolerance of other tests would let truncation pass."""
    x = LAYOUTS[layout](torch.randn(2, 33, 5, 7).to(dtype))
    logits = torch.randn((2, 33) if which == "channel" else (2, 1, 5, 7))
    forward = getattr(torch.ops.pixnorm, "gate_fwd" + ("_triton" if kernel == "triton" else ""))
    y, exact = (forward(of, logits, which == "spatial") for of in (x, x.float()))
    assert torch.equal(y, exact.to(dtype))


# --- modules


def test_parameters():
    """The counts of the GConv paper: 8 464 of one gate, 50 784 of six; 98 and two of a spatial gate."""
    gate = pixnorm.ChannelGate(256)
    assert sum(p.numel() for p in gate.parameters()) == 8464
    assert gate.fc1_weight.shape == (16, 256)
    assert sum(p.numel() for p in pixnorm.SpatialGate().parameters()) == 98 + 2


def test_initial_parameters_are_pytorchs():
    plain_channel, plain_spatial = PlainChannelGate(64, 4), PlainSpatialGate()
    for gate, plain in ((pixnorm.ChannelGate(64, 4), plain_channel), (pixnorm.SpatialGate(), plain_spatial)):
        for _ in range(2):
            torch.manual_seed(0)
            gate.reset_parameters()
            torch.manual_seed(0)
            for module in plain.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            for ours, theirs in zip(gate.parameters(), plain.parameters(), strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: pixnorm.ChannelGate(0), "got 0 and 16"),
        (lambda: pixnorm.ChannelGate(8), "reduction that is not larger, got 8 and 16"),
        (lambda: pixnorm.ChannelGate(8, 0), "got 8 and 0"),
        (lambda: pixnorm.ChannelGate(8, 2, impl="cuda"), "impl must be one of"),
        (lambda: pixnorm.SpatialGate(4), "kernel_size must be odd, got 4"),
        (lambda: pixnorm.SpatialGate((3, 2)), r"kernel_size must be odd, got \(3, 2\)"),
        (lambda: pixnorm.SpatialGate(eps=-1.0), "eps must be non-negative"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- bad input


@gates
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.ones(3, 4, 5)}, ValueError, "expected 4D input"),
        ({"x": torch.ones(2, 6, 4, 5, dtype=torch.int64)}, TypeError, "expected floating point input"),
        ({"x": torch.ones(2, 0, 4, 5)}, ValueError, r"one channel and one pixel, got input of shape \(2, 0, 4, 5\)"),
        ({"x": torch.ones(2, 6, 4, 0)}, ValueError, r"one channel and one pixel, got input of shape \(2, 6, 4, 0\)"),
    ],
)
def test_bad_images(impl, which, change, error, message):
    with pytest.raises(error, match=message):
        FUNCTIONS[which](**(arguments(which) | change), impl=impl)


@pytest.mark.parametrize(
    "which, change, error, message",
    [
        ("channel", {"fc1_weight": torch.ones(6)}, ValueError, r"fc1_weight must have shape \(R, 6\) .* got \(6,\)"),
        ("channel", {"fc1_weight": torch.ones(0, 6)}, ValueError, r"with R > 0, got \(0, 6\)"),
        ("channel", {"fc1_weight": torch.ones(3, 5)}, ValueError, r"fc1_weight must have shape \(3, 6\)"),
        ("channel", {"fc1_bias": torch.ones(6)}, ValueError, r"fc1_bias must have shape \(3,\) .* got \(6,\)"),
        ("channel", {"fc2_weight": torch.ones(3, 6)}, ValueError, r"fc2_weight must have shape \(6, 3\) .* got"),
        ("channel", {"fc2_bias": torch.ones(6)}, TypeError, "expected parameters of dtype torch.float64"),
        ("spatial", {"weight": torch.ones(1, 2, 3, 4)}, ValueError, r"odd K and L, got \(1, 2, 3, 4\)"),
        ("spatial", {"weight": torch.ones(2, 3, 3)}, ValueError, r"odd K and L, got \(2, 3, 3\)"),
        ("spatial", {"weight": torch.ones(1, 3, 3, 3)}, ValueError, r"weight must have shape \(1, 2, 3, 3\)"),
        ("spatial", {"bn_weight": torch.ones(6)}, ValueError, r"bn_weight must have shape \(1,\) .* got \(6,\)"),
        ("spatial", {"bn_bias": torch.ones(())}, ValueError, r"bn_bias must have shape \(1,\) .* got \(\)"),
        ("spatial", {"running_var": None}, ValueError, "must either both be None or neither be None"),
        ("spatial", {"running_mean": torch.ones(6).double()}, ValueError, r"running_mean must have shape \(1,\)"),
        ("spatial", {"eps": 0.0}, ValueError, "eps must be positive in training"),
    ],
)
def test_bad_parameters(impl, which, change, error, message):
    with pytest.raises(error, match=message):
        FUNCTIONS[which](**(arguments(which) | change), impl=impl)


def test_parameters_have_one_dtype(impl):
    t = {name: tensor.half() for name, tensor in arguments("channel").items()}
    t["fc2_bias"] = t["fc2_bias"].float()
    with pytest.raises(TypeError, match=r"one dtype, got torch.float16 for fc1_weight and torch.float32 for fc2_bias"):
        channel_gate(**t, impl=impl)


def test_inference_needs_statistics(impl):
    t = arguments("spatial") | {"running_mean": None, "running_var": None}
    with pytest.raises(RuntimeError, match="Expected running_mean to be defined"):
        spatial_gate(**t, training=False, impl=impl)


def test_one_value_cannot_be_normalised(impl):
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        spatial_gate(**arguments("spatial", n=1, h=1, w=1), impl=impl)


def test_rejected_input_leaves_the_buffers_as_they_are(impl):
    layer = pixnorm.SpatialGate(impl=impl)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with pytest.raises(ValueError):
        layer(torch.ones(1, 4, 1, 1))
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())


@pytest.mark.cpu
@pytest.mark.parametrize(
    "name, shapes, message",
    [
        ("conv_fwd", ((1, 2, 4, 0), (1, 2, 3, 3)), "at least one pixel"),
        ("conv_grad", ((1, 1, 0, 4), (1, 2, 0, 4), (1, 2, 3, 3)), "at least one pixel"),
        ("conv_grad", ((1, 1, 4, 5), (1, 2, 4, 5), (1, 2, 3, 4)), "an odd kernel"),
        ("conv_grad", ((1, 1, 4, 4), (1, 2, 4, 5), (1, 2, 3, 3)), "grad_z has the wrong shape"),
        ("perceptron_fwd", ((2, 2, 6), (3, 6, 0), (3,), (6, 3), (6,)), "fc1_weight has the wrong shape"),
        ("perceptron_fwd", ((2, 2, 0), (3, 0), (3,), (0, 3), (0,)), "at least one channel and one hidden unit"),
        ("perceptron_grad", ((2, 6), (2, 2, 6), (0, 6), (0,), (6, 0)), "at least one channel and one hidden unit"),
        ("perceptron_grad", ((2, 5), (2, 2, 6), (3, 6), (3,), (6, 3)), "grad_logits has the wrong shape"),
    ],
)
def test_small_layers_check_their_arguments(name, shapes, message):
    """Direct calls of the ops."""
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.pixnorm, f"gate_{name}")(*(torch.ones(shape) for shape in shapes))
