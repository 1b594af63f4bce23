"""convert_conv: a model of plain convolutions becomes generative, and starts as the same function."""

import pytest
import torch
from torch import nn

from pixnorm import GConv2d, convert_batchnorm, convert_conv
from pixnorm.nn import latent
from pixnorm.testing import random


def make(**options):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False, **options),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, (3, 2), stride=2, padding="valid", dilation=(1, 2), **options),
        nn.Conv2d(4, 4, 1, **options),
    ).double()


def batch():
    return random((2, 3, 8, 9), torch.Generator().manual_seed(1))


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("training", [True, False])
def test_starts_as_the_same_function(impl, training):
    model = make().train(training)
    expected = model(batch())
    result = convert_conv(model, latent_dim=5)
    assert result.model is model and result.replaced == ["0", "3", "4"] and result.skipped == {}
    for module in model.modules():
        if isinstance(module, GConv2d):
            module.impl = impl
            assert module.training == training
    with latent(random((2, 5), torch.Generator().manual_seed(2))):
        y = model(batch())
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    y.sin().sum().backward()
    assert all(layer.mix_weight.grad.abs().max() > 1e-6 for layer in model if isinstance(layer, GConv2d))


def test_everything_carries_over():
    model = make()
    plain = [module for module in model if isinstance(module, nn.Conv2d)]
    plain[1].weight.requires_grad_(False)
    convert_conv(model, 5)
    for conv, layer in zip(plain, [module for module in model if isinstance(module, GConv2d)], strict=True):
        assert torch.equal(layer.weight, conv.weight) and layer.weight.dtype == torch.float64
        assert (layer.bias is None) == (conv.bias is None)
        assert layer.bias is None or torch.equal(layer.bias, conv.bias)
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"):
            assert getattr(layer, name) == getattr(conv, name), name
        trains = {name: p.requires_grad for name, p in layer.named_parameters()}
        expected = conv.weight.requires_grad
        assert all(value == (expected or name == "bias") for name, value in trains.items())
        assert not layer.mix_weight.any() and layer.scale_weight.any()


def test_one_layer_in_two_places_stays_one():
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": shared})
    assert convert_conv(model, 2).replaced == ["a.0", "b"]
    assert model["a"][0] is model["b"]


def test_the_model_may_be_the_layer():
    result = convert_conv(nn.Conv2d(3, 4, 3), 2)
    assert isinstance(result.model, GConv2d) and result.replaced == [""]


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Called(nn.Conv2d):
    def __call__(self, x):
        return 2 * super().__call__(x)


def with_hook():
    conv = nn.Conv2d(4, 4, 1)
    conv.register_forward_hook(lambda *args: None)
    return conv


@pytest.mark.parametrize(
    "module, reason",
    [
        (nn.Conv2d(4, 4, 3, groups=2), "has 2 groups"),
        (nn.ConvTranspose2d(4, 4, 2), "ConvTranspose2d is not nn.Conv2d"),
        (nn.Conv1d(4, 4, 2), "Conv1d is not nn.Conv2d"),
        (nn.LazyConv2d(4, 3), "LazyConv2d does not know its channels before its first batch"),
        (nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)), "has parametrizations"),
        (Doubled(4, 4, 1), "Doubled has its own forward"),
        (Called(4, 4, 1), "Called has its own __call__"),
        (nn.Conv2d(4, 4, 1, dtype=torch.complex64), "has a weight of torch.complex64"),
        (with_hook(), "has hooks"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_may_compute_something_else_stays(module, reason):
    model = nn.Sequential(module, nn.Conv2d(4, 4, 1))
    result = convert_conv(model, 2)
    assert result.skipped == {"0": reason} and result.replaced == ["1"]
    assert model[0] is module


def test_tied_weights_stay():
    first, second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    second.weight = first.weight
    result = convert_conv(nn.Sequential(first, second), 2)
    assert result.replaced == [] and set(result.skipped.values()) == {
        "shares parameters or buffers with another module"
    }


def test_what_is_kept_stays():
    model = make()
    result = convert_conv(model, 5, keep=["4"])
    assert result.replaced == ["0", "3"] and result.skipped == {"4": "was to be kept"}
    assert isinstance(model[4], nn.Conv2d)
    model = nn.Sequential(make(), make())
    assert convert_conv(model, 5, keep=iter(["0", "1.3"])).replaced == ["1.0", "1.4"]
    assert convert_conv(nn.Conv2d(3, 3, 1), 5, keep=[""]).replaced == []
    with pytest.raises(TypeError, match="keep must be a list of names, got '4'"):
        convert_conv(make(), 5, keep="4")


def test_memory_format_carries_over():
    conv = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    assert convert_conv(conv, 2).model.weight.stride() == conv.weight.stride()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"latent_dim": 0}, "latent_dim must be positive, got 0"),
        ({"latent_dim": 2, "keep": ["4", "out", "last"]}, "keep names what is not in the model: last, out"),
    ],
)
def test_errors_leave_the_model_untouched(arguments, message):
    model = make()
    layers = list(model.modules())
    with pytest.raises(ValueError, match=message):
        convert_conv(model, **arguments)
    assert all(a is b for a, b in zip(layers, model.modules(), strict=True))


def test_both_conversions():
    model = make()
    assert convert_batchnorm(model).replaced == ["1"]
    assert convert_conv(model, 2).replaced == ["0", "3", "4"]
    assert convert_conv(model, 2).replaced == []


def test_report_says_how_to_pass_on_the_latent_vectors():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv1d(3, 4, 1))
    assert repr(convert_conv(model, 7)) == (
        "Conversion of Sequential: 1 replaced by GConv2d\n  0\n1 not replaced\n  1: Conv1d is not nn.Conv2d\n"
        "They need latent vectors z, of shape (N, 7): call them as `layer(x, z)` or, without changing the code, "
        "call\nthe model inside `with pixnorm.nn.latent(z):`."
    )
