"""Identities of modulated norm and of the layers on it: what the papers promise, counts, checkpoints, bad input."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pixnorm
from pixnorm.functional import adain, adain_transfer, modulated_norm
from pixnorm.networks import Generator
from pixnorm.testing.modulate import MODULATE, MODULATE_MAPS

SPECS = (MODULATE, MODULATE_MAPS)
CLOSE = {"rtol": 1e-9, "atol": 1e-10}
pytestmark = [pytest.mark.usefixtures("one_thread")]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def numbers(*shape):
    return 2 * torch.randn(shape, dtype=torch.float64) + 1


def count(layer):
    return sum(parameter.numel() for parameter in layer.parameters())


# --- the op


@pytest.mark.emulated
def test_batch_norm_with_its_head(impl):
    """up -> batch norm -> ReLU, as PyTorch's three layers."""
    x, weight, bias = numbers(3, 5, 4, 6), numbers(5), numbers(5)
    buffers = [[torch.zeros(5, dtype=x.dtype), torch.ones(5, dtype=x.dtype)] for _ in range(2)]
    y = modulated_norm(x, weight, bias, *buffers[0], upsample=2, activation="relu", impl=impl)
    expected = F.relu(F.batch_norm(F.interpolate(x, scale_factor=2), *buffers[1], weight, bias, training=True))
    torch.testing.assert_close(y, expected, **CLOSE)
    torch.testing.assert_close(buffers[0], buffers[1], **CLOSE)


@pytest.mark.emulated
def test_constant_maps_are_rows(impl):
    x, rows = numbers(3, 5, 4, 6), [numbers(3, 5) for _ in range(2)]
    maps = [t[:, :, None, None].expand(3, 5, 8, 12).contiguous() for t in rows]
    for statistics in ("batch", "instance"):
        options = {"statistics": statistics, "upsample": 2, "gamma_offset": 1.0, "impl": impl}
        torch.testing.assert_close(modulated_norm(x, *maps, **options), modulated_norm(x, *rows, **options), **CLOSE)


@pytest.mark.emulated
def test_instances_are_independent_and_batches_are_not(impl):
    x, gamma, beta = numbers(3, 5, 4, 6), numbers(3, 5), numbers(3, 5)
    other = x.clone()
    other[0] *= 3
    for statistics in ("batch", "instance"):
        a, b = (modulated_norm(t, gamma, beta, statistics=statistics, impl=impl)[1:] for t in (x, other))
        assert torch.equal(a, b) == (statistics == "instance")
    one = [modulated_norm(x[:1], gamma[:1], beta[:1], statistics=s, impl=impl) for s in ("batch", "instance")]
    torch.testing.assert_close(*one, **CLOSE)


@pytest.mark.emulated
def test_uniform_planes_leave_the_shift(impl):
    """Instance norm of a uniform plane is 0: semantics are lost, and beta is all that is left."""
    x, gamma, beta = numbers(2, 3, 1, 1).expand(2, 3, 4, 5).contiguous(), numbers(2, 3), numbers(2, 3)
    y = modulated_norm(x, gamma, beta, statistics="instance", impl=impl)
    torch.testing.assert_close(y, beta[:, :, None, None].expand_as(y), rtol=1e-6, atol=1e-6)


@pytest.mark.emulated
@pytest.mark.parametrize("statistics", ["batch", "instance"])
def test_gradients_that_normalisation_forbids(impl, statistics):
    """Neither a shift of what is normalised together nor (with eps 0) its scale changes y."""
    x, gamma, beta = numbers(3, 2, 4, 5).requires_grad_(), numbers(3, 2), numbers(3, 2)
    y = modulated_norm(x, gamma, beta, statistics=statistics, eps=1e-30, impl=impl)
    (grad,) = torch.autograd.grad(y.sin().sum(), x)
    together = (2, 3) if statistics == "instance" else (0, 2, 3)
    assert grad.sum(together).abs().max() < 1e-10 and (grad * x).sum(together).abs().max() < 1e-10


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"beta": None}, ValueError, "gamma and beta must either both be None or neither be None"),
        ({"gamma": torch.ones(2, 4)}, ValueError, r"gamma must have shape \(2, 3\) .* got \(2, 4\)"),
        ({"gamma": torch.ones(2, 3, 4)}, ValueError, r"gamma must have shape \(3,\), \(2, 3\), \(2, 3, 4, 5\)"),
        ({"beta": torch.ones(2, 3).double()}, TypeError, "gamma and beta of one dtype"),
        ({"statistics": "layer"}, ValueError, "statistics must be one of 'batch', 'instance', got 'layer'"),
        ({"statistics": "instance"}, ValueError, "there are none"),
        ({"upsample": 3}, ValueError, "upsample must be one of 1, 2"),
        ({"activation": "elu"}, ValueError, "activation must be one of"),
        ({"eps": 0.0}, ValueError, "eps must be positive"),
        ({"x": torch.ones(1, 3, 1, 1)}, ValueError, r"must have shape \(1, 3\)"),
    ],
)
def test_bad_input_leaves_state_untouched(impl, change, error, message):
    arguments = {"x": torch.randn(2, 3, 4, 5), "gamma": torch.ones(2, 3), "beta": torch.ones(2, 3)}
    arguments |= {"running_mean": torch.zeros(3), "running_var": torch.ones(3), "impl": impl} | change
    with pytest.raises(error, match=message):
        modulated_norm(**arguments)
    assert not arguments["running_mean"].any() and (arguments["running_var"] == 1).all()


def test_one_value_cannot_be_normalised(impl):
    for statistics, x in (("batch", torch.ones(1, 3, 1, 1)), ("instance", torch.ones(4, 3, 1, 1))):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            modulated_norm(x, statistics=statistics, impl=impl)


# --- the layers


@pytest.mark.parametrize("training", [True, False])
def test_batchnorm_is_pytorchs(impl, training):
    ours, plain = pixnorm.BatchNorm2d(4, impl=impl).double(), nn.BatchNorm2d(4).double()
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(plain.state_dict())
    x = numbers(3, 4, 5, 6)
    for layer in (ours, plain):
        layer.train(training)
    torch.testing.assert_close(ours(x), plain(x), **CLOSE)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(dict(ours.named_buffers()), dict(plain.named_buffers()), **CLOSE)
    without = pixnorm.BatchNorm2d(4, affine=False, track_running_stats=False, dtype=torch.float64)
    torch.testing.assert_close(without(x), F.batch_norm(x, None, None, training=True), **CLOSE)
    assert count(without) == 0 and "affine=False" in repr(without)


def test_models_take_the_fused_batchnorm():
    """With the same parameters and buffers, which an optimiser may hold already."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4, affine=False)).double()
    before, x = {**dict(model.named_parameters()), **dict(model.named_buffers())}, numbers(2, 3, 6, 7)
    expected = model(x)
    conversion = pixnorm.convert_batchnorm(model, to="batchnorm")
    assert conversion.replaced == ["1", "3"] and conversion.layer == "BatchNorm2d"
    assert isinstance(model[1], pixnorm.BatchNorm2d) and isinstance(model[3], pixnorm.BatchNorm2d)
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    torch.testing.assert_close(model(x), expected, **CLOSE)
    with pytest.raises(ValueError, match="to must be one of 'spn', 'batchnorm', got 'gn'"):
        pixnorm.convert_batchnorm(model, to="gn")


def test_the_generator_with_fused_batchnorms(impl):
    """The same function as the plain one, with the same keys."""
    torch.manual_seed(0)
    plain = Generator(channels=8, latent_dim=4).double()
    fused = Generator(norm="fused_bn", channels=8, latent_dim=4, impl=impl).double()
    fused.load_state_dict(plain.state_dict())
    z = numbers(3, 4)
    torch.testing.assert_close(fused(z), plain(z), **CLOSE)
    assert count(fused) == count(plain)


def test_conditional_batchnorm_by_its_definition(impl):
    norm = pixnorm.ConditionalBatchNorm2d(4, 5, 3, impl=impl).double()
    x, y, z = numbers(6, 4, 3, 2), torch.tensor([0, 1, 4, 4, 2, 0]), numbers(6, 3)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    gamma = norm.gamma_table[y] + z @ norm.gamma_latent.T
    beta = norm.beta_table[y] + z @ norm.beta_latent.T
    expected = gamma[..., None, None] * F.batch_norm(x, None, None, training=True) + beta[..., None, None]
    torch.testing.assert_close(norm(x, y, z), expected, **CLOSE)
    torch.testing.assert_close(norm(x, F.one_hot(y, 5).double(), z), expected, **CLOSE)
    fresh = pixnorm.ConditionalBatchNorm2d(4, 5).double()
    torch.testing.assert_close(fresh(x, y), F.batch_norm(x, None, None, training=True), **CLOSE)


def test_latent_and_conditional_batchnorm_agree(impl):
    """BigGAN's norm of [z, one-hot] is ccBN with tables 1 + its rows for the classes."""
    latent = pixnorm.nn.LatentBatchNorm2d(4, 3 + 5, impl=impl).double()
    conditional = pixnorm.ConditionalBatchNorm2d(4, 5, 3, impl=impl).double()
    with torch.no_grad():
        for name, offset in (("gamma", 1), ("beta", 0)):
            weight = getattr(latent, name).weight
            getattr(conditional, f"{name}_latent").copy_(weight[:, :3])
            getattr(conditional, f"{name}_table").copy_(offset + weight[:, 3:].T)
    x, y, z = numbers(6, 4, 3, 2), torch.tensor([0, 1, 4, 4, 2, 0]), numbers(6, 3)
    both = latent(x, torch.cat([z, F.one_hot(y, 5)], 1)), conditional(x, y, z)
    torch.testing.assert_close(*both, **CLOSE)


def test_counts():
    assert count(pixnorm.ConditionalBatchNorm2d(256, 10)) == 5120
    assert count(pixnorm.ConditionalBatchNorm2d(256, 10, 128)) == 70656
    assert [count(pixnorm.SPADE2d(c, 19)) for c in (64, 256, 1024)] == [169_600, 612_352, 2_383_360]


def test_adain_by_its_definition(impl):
    x, scale, shift = numbers(3, 4, 5, 6), numbers(3, 4), numbers(3, 4)
    y = adain(x, scale, shift, eps=1e-30, impl=impl)
    torch.testing.assert_close(y.mean((2, 3)), shift, **CLOSE)
    torch.testing.assert_close(y.std((2, 3), correction=0), scale.abs(), **CLOSE)
    layer, w = pixnorm.AdaIN2d(4, 7, impl=impl).double(), numbers(3, 7)
    s, b = (w @ layer.weight.T + layer.bias).chunk(2, 1)
    torch.testing.assert_close(layer(x, w), adain(x, 1 + s, b, impl="reference"), **CLOSE)
    assert not list(layer.buffers())


def test_style_transfer_takes_over_the_statistics(impl):
    content, style = numbers(3, 4, 5, 6), 3 * numbers(3, 4, 7, 2)
    y = adain_transfer(content, style, eps=1e-30, impl=impl)
    for statistic in (torch.mean, lambda t, dim: torch.std(t, dim, correction=0)):
        torch.testing.assert_close(statistic(y, (2, 3)), statistic(style, (2, 3)), **CLOSE)
    with pytest.raises(ValueError, match="the same batch and channels"):
        adain_transfer(content, style[:2])


@pytest.mark.parametrize("statistics", ["batch", "instance"])
def test_spade_by_nvlabs_definition(impl, statistics):
    layer = pixnorm.SPADE2d(4, 5, 6, statistics=statistics, impl=impl).double()
    x, labels = numbers(3, 4, 6, 8), torch.randint(5, (3, 3, 4))
    one_hot = F.one_hot(labels, 5).permute(0, 3, 1, 2).double()
    resized = F.interpolate(one_hot, x.shape[2:], mode="nearest")
    hidden = F.relu(F.conv2d(resized, layer.shared_weight, layer.shared_bias, padding=1))
    gamma, beta = (
        F.conv2d(hidden, w, b, padding=1) for w, b in zip(layer.weight.chunk(2), layer.bias.chunk(2), strict=True)
    )
    plain = F.instance_norm(x) if statistics == "instance" else F.batch_norm(x, None, None, training=True)
    expected = plain * (1 + gamma) + beta
    torch.testing.assert_close(layer(x, one_hot), expected, **CLOSE)
    torch.testing.assert_close(layer(x, labels), expected, **CLOSE)


def test_spade_without_its_convolutions_is_batchnorm(impl):
    layer = pixnorm.SPADE2d(4, 5, 6, impl=impl).double()
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    x = numbers(3, 4, 6, 8)
    plain = F.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(layer(x, torch.randint(5, (3, 6, 8))), plain, **CLOSE)


def test_spade_of_uniform_planes_is_its_label(impl):
    """Away from the border, of an instance norm: what AdaIN loses, SPADE keeps."""
    layer = pixnorm.SPADE2d(4, 5, 6, statistics="instance", impl=impl).double()
    x = numbers(1, 4, 1, 1).expand(1, 4, 8, 8).contiguous()
    y = layer(x, torch.full((1, 8, 8), 3))[:, :, 2:-2, 2:-2]
    torch.testing.assert_close(y, y[..., :1, :1].expand_as(y), rtol=1e-6, atol=1e-6)
    other = layer(x, torch.full((1, 8, 8), 1))[:, :, 2:-2, 2:-2]
    assert (y - other).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(3, 5), (6, 6), (7, 4), (13, 2)])
def test_labels_are_resized_as_pytorch_does(size):
    from pixnorm.nn.spade import nearest_labels

    labels = torch.randint(9, (2, 6, 5))
    expected = F.interpolate(labels[:, None].double(), size, mode="nearest")[:, 0].long()
    assert torch.equal(nearest_labels(labels, list(size)), expected)


def test_nvlabs_checkpoints_load():
    layer = pixnorm.SPADE2d(4, 5, 6)
    theirs = {"mlp_shared.0.weight": torch.randn(6, 5, 3, 3), "mlp_shared.0.bias": torch.randn(6)}
    for half in ("gamma", "beta"):
        theirs |= {f"mlp_{half}.weight": torch.randn(4, 6, 3, 3), f"mlp_{half}.bias": torch.randn(4)}
    theirs |= {"param_free_norm.running_mean": torch.randn(4), "param_free_norm.running_var": torch.rand(4)}
    theirs |= {"param_free_norm.num_batches_tracked": torch.tensor(7)}
    layer.load_nvlabs_spade(theirs)
    assert torch.equal(layer.weight, torch.cat([theirs["mlp_gamma.weight"], theirs["mlp_beta.weight"]]))
    assert torch.equal(layer.running_mean, theirs["param_free_norm.running_mean"]) and layer.num_batches_tracked == 7
    del theirs["mlp_beta.bias"]
    with pytest.raises(RuntimeError, match="bias"):
        layer.load_nvlabs_spade(theirs)


@pytest.mark.parametrize(
    "layer, arguments, message",
    [
        (
            pixnorm.ConditionalBatchNorm2d(4, 3),
            (torch.tensor([0, 3]),),
            r"y must be in \[0, 3\), got classes from 0 to 3",
        ),
        (pixnorm.ConditionalBatchNorm2d(4, 3), (torch.tensor([0.0, 1.0]),), r"y must be \(2,\) of torch.int64"),
        (pixnorm.ConditionalBatchNorm2d(4, 3), (torch.tensor([0]),), r"y must be \(2,\)"),
        (pixnorm.ConditionalBatchNorm2d(4, 3, 2), (torch.tensor([0, 1]),), r"z is needed, of shape \(2, 2\)"),
        (
            pixnorm.ConditionalBatchNorm2d(4, 3, 2),
            (torch.tensor([0, 1]), torch.ones(2, 3)),
            r"z must have shape \(2, 2\)",
        ),
        (pixnorm.AdaIN2d(4, 3), (torch.ones(2, 4),), r"w must have shape \(2, 3\)"),
        (pixnorm.SPADE2d(4, 3, 2), (torch.ones(2, 4, 5, 5),), "the label map must be"),
        (pixnorm.SPADE2d(4, 3, 2), (torch.full((2, 5, 5), 3),), r"labels must be in \[0, 3\)"),
    ],
)
def test_layers_refuse_before_any_work(layer, arguments, message):
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(2, 4, 5, 5), *arguments)
    assert all(torch.equal(before[name], buffer) for name, buffer in layer.named_buffers())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: pixnorm.ConditionalBatchNorm2d(4, 0), "num_classes must be positive, got 0"),
        (lambda: pixnorm.ConditionalBatchNorm2d(4, 2, -1), "latent_dim must not be negative"),
        (lambda: pixnorm.AdaIN2d(4, 0), "style_dim must be positive"),
        (lambda: pixnorm.SPADE2d(4, 3, kernel_size=2), "kernel_size must be odd, got 2"),
        (lambda: pixnorm.SPADE2d(4, 0), "label_channels must be positive"),
        (lambda: pixnorm.BatchNorm2d(0), "num_features must be positive"),
        (lambda: pixnorm.BatchNorm2d(4, upsample=3), "upsample must be one of 1, 2, got 3"),
    ],
)
def test_constructors_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()
