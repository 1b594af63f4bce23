"""The papers' generator: its size, its function, and the equality of its three forms."""

import copy
import math

import pytest
import torch
import torch.nn.functional as tF
from torch import nn

from pixnorm import SPN2d, convert_batchnorm, convert_conv
from pixnorm.networks import Generator
from pixnorm.networks.sngan import UpBlock
from pixnorm.nn import latent
from pixnorm.testing import random

norms = pytest.mark.parametrize("norm", ["bn", "spn"])
convs = pytest.mark.parametrize("conv", ["conv", "gconv"])
backends = pytest.mark.parametrize("backend", ["reference", "auto"])

# float64 through three residual blocks: a few thousand roundings of 1e-16, amplified by the normalisations.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def make(norm="spn", **options):
    torch.manual_seed(0)
    return Generator(norm=norm, **{"channels": 8, "latent_dim": 16, **options}).double()


def latents(n=4, dim=16):
    return random((n, dim), torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("norm", "count"), [("bn", 4_079_363), ("spn", 4_527_875)])
def test_parameter_count_of_the_paper(norm, count):
    c, z = 256, 128
    fc, conv, last = z * 16 * c + 16 * c, 9 * c * c + c, 9 * c * 3 + 3
    affine = 2 * c  # of a batch norm, or of that of the mask
    spn = c * c + 4 * 9 * c if norm == "spn" else 0
    assert fc + 3 * 2 * (conv + affine + spn) + affine + last == count
    with torch.device("meta"):
        generator = Generator(norm=norm)
    assert sum(p.numel() for p in generator.parameters()) == count


def test_state_dict_keys():
    bn = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    spn = list(SPN2d(8).state_dict())
    for norm, keys in (("bn", bn), ("spn", spn)):
        expected = ["fc.weight", "fc.bias"]
        for block in ("block1", "block2", "block3"):
            expected += [f"{block}.{layer}.{key}" for layer in ("norm1", "norm2") for key in keys]
            expected += [f"{block}.{layer}.{key}" for layer in ("conv1", "conv2") for key in ("weight", "bias")]
        expected += [f"norm.{key}" for key in bn] + ["conv.weight", "conv.bias"]
        assert sorted(make(norm).state_dict()) == sorted(expected)


@norms
def test_initial_weights(norm):
    torch.manual_seed(0)
    generator = Generator(norm=norm)
    for name, module in generator.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            gain = math.sqrt(2) if name.startswith("block") else 1
            taps = module.weight[0, 0].numel() if module.weight.dim() == 4 else 1
            limit = gain * math.sqrt(6 / (taps * sum(module.weight.shape[:2])))
            assert 0.99 * limit < module.weight.abs().max() <= limit, name
            # Uniform, from at least 6912 draws: the deviation is good to 1 %; allow five times that.
            torch.testing.assert_close(module.weight.std().item(), limit / math.sqrt(3), rtol=0.05, atol=0)
            assert (module.bias == 0).all(), name


@norms
def test_images(norm):
    generator = make(norm)
    images = generator(latents())
    assert images.shape == (4, 3, 32, 32) and images.abs().max() < 1 and images.std() > 0.1
    generator.eval()
    # In eval images are independent.
    torch.testing.assert_close(generator(latents())[:1], generator(latents()[:1]), **CLOSE)
    assert generator(latents(0)).shape == (0, 3, 32, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 48}, "resolution must be one of 32, 64, 128, 256, got 48"),
        (
            {"norm": "in"},
            "norm must be one of 'bn', 'fused_bn', 'spn', 'bigbn', 'eager_cbn', 'cbn', 'ccbn', 'cspn', got 'in'",
        ),
        ({"norm": "spn", "impl": "fast"}, "impl must be one of"),
    ],
)
def test_argument_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Generator(**options)


@backends
@pytest.mark.parametrize("training", [True, False])
def test_spn_block_by_its_definition(backend, training):
    """Upsampling comes before the first norm in the definition with separate layers."""
    torch.manual_seed(0)
    block = UpBlock(8, 8, "spn", backend).double().train(training)
    norm1, norm2 = (SPN2d(8, impl="reference", dtype=torch.float64).train(training) for _ in range(2))
    norm1.load_state_dict(block.norm1.state_dict())
    norm2.load_state_dict(block.norm2.state_dict())
    x = latents(4, 8 * 16).view(4, 8, 4, 4)
    up = tF.interpolate(x, scale_factor=2, mode="nearest")
    expected = up + block.conv2(tF.relu(norm2(block.conv1(tF.relu(norm1(up))))))
    torch.testing.assert_close(block(x), expected, **CLOSE)
    wrong = up + block.conv2(tF.relu(norm2(block.conv1(tF.interpolate(tF.relu(norm1(x)), scale_factor=2)))))
    assert (wrong - expected).abs().max() > 1e-3


def test_bn_block_by_its_definition():
    """For batch norm the position of the upsampling makes no difference."""
    torch.manual_seed(0)
    block = UpBlock(8, 8, "bn").double()
    x = latents(4, 8 * 16).view(4, 8, 4, 4)
    up = tF.interpolate(x, scale_factor=2, mode="nearest")
    expected = up + block.conv2(tF.relu(block.norm2(block.conv1(tF.relu(block.norm1(up))))))
    torch.testing.assert_close(block(x), expected, **CLOSE)


@norms
def test_shortcut_convolution_only_where_channels_change(norm):
    torch.manual_seed(0)
    block = UpBlock(8, 4, norm).double()
    assert block.shortcut.weight.shape == (4, 8, 1, 1) and block.norm2.num_features == 4
    x = latents(4, 8 * 16).view(4, 8, 4, 4)
    with torch.no_grad():
        block.shortcut.bias.normal_()
        block.conv2.weight.zero_()
    up = tF.interpolate(x, scale_factor=2, mode="nearest")
    torch.testing.assert_close(block(x), tF.conv2d(up, block.shortcut.weight, block.shortcut.bias), **CLOSE)
    assert not any(name.startswith("shortcut") for name, _ in UpBlock(8, 8, norm).named_parameters())


@norms
def test_generator_by_its_definition(norm):
    generator = make(norm)
    h = tF.linear(latents(), generator.fc.weight, generator.fc.bias).view(4, 8, 4, 4)
    h = generator.block3(generator.block2(generator.block1(h)))
    h = tF.relu(tF.batch_norm(h, None, None, generator.norm.weight, generator.norm.bias, training=True))
    expected = torch.tanh(tF.conv2d(h, generator.conv.weight, generator.conv.bias, padding=1))
    torch.testing.assert_close(generator(latents()), expected, **CLOSE)


@backends
def test_converted_generator_is_the_same(backend):
    generator = make("bn")
    converted = copy.deepcopy(generator)
    result = convert_batchnorm(converted, noise=0)
    assert len(result.replaced) == 7 and result.skipped == {}
    for module in converted.modules():
        if isinstance(module, SPN2d):
            module.impl = backend
    for _ in range(2):
        torch.testing.assert_close(converted(latents()), generator(latents()), **CLOSE)
    torch.testing.assert_close(converted.eval()(latents()), generator.eval()(latents()), **CLOSE)


def test_forms_agree():
    """Reference and fused, from one state dict: outputs, gradients and running statistics."""
    reference, fused = make(impl="reference"), make(impl="auto")
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    fused.load_state_dict(reference.state_dict())
    images, expected = fused(latents()), reference(latents())
    torch.testing.assert_close(images, expected, **CLOSE)
    images.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in fused.named_parameters():
        torch.testing.assert_close(parameter.grad, reference.get_parameter(name).grad, **CLOSE)
    for name, buffer in fused.named_buffers():
        torch.testing.assert_close(buffer, reference.get_buffer(name), **CLOSE)


@norms
def test_gradients_reach_every_parameter(norm):
    generator = make(norm)
    generator(latents()).sin().sum().backward()
    for name, parameter in generator.named_parameters():
        largest = parameter.grad.abs().max()
        if name.startswith("block") and name.endswith("bias") and ".conv" in name:
            assert largest < 1e-9, name  # every path ends in a norm, which removes a constant
        else:
            assert largest > 1e-6, name


@norms
@pytest.mark.parametrize("training", [True, False])
def test_channels_last(norm, training):
    # On a GPU float64 convolutions are NCHW only.
    on_cpu = torch.get_default_device().type == "cpu"
    dtype, close = (torch.float64, CLOSE) if on_cpu else (torch.float32, {"rtol": 0, "atol": 0.01})
    plain, z = make(norm).to(dtype).train(training), latents().to(dtype)
    generator = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    layouts = {}
    for name in ("block1", "block2", "block3"):
        block = generator.get_submodule(name)
        block.register_forward_hook(lambda module, args, output, name=name: layouts.update({name: output}))
    images = generator(z)
    torch.testing.assert_close(images, plain(z), **close)
    assert all(h.is_contiguous(memory_format=torch.channels_last) for h in layouts.values()) and len(layouts) == 3
    images.square().sum().backward()


# --- the GConv paper's form


def make_generative(conv="gconv", num_classes=0, **options):
    torch.manual_seed(0)
    sizes = {"channels": 8, "latent_dim": 5, "bias": False}
    return Generator(norm="bigbn", conv=conv, num_classes=num_classes, **sizes, **options).double()


@pytest.mark.parametrize(
    ("conv", "num_classes", "of_blocks"),
    [("conv", 0, 3_538_944), ("gconv", 0, 4_374_528), ("gconv", 10, 4_389_888), ("gconv", 100, 4_528_128)],
)
def test_convolution_weights_of_the_paper(conv, num_classes, of_blocks):
    """And of the whole generator without classes: 3 775 744, or 4 611 328."""
    c, dz = 256, 32 + num_classes
    generative = ((c + dz) * c + c * c) if conv == "gconv" else 0
    assert 6 * (9 * c * c + generative) == of_blocks
    with torch.device("meta"):
        generator = Generator(norm="bigbn", latent_dim=32, bias=False, conv=conv, num_classes=num_classes)
    counts = {name: p.numel() for name, p in generator.named_parameters()}
    assert sum(count for name, count in counts.items() if ".conv" in name) == of_blocks
    assert sum(counts.values()) == of_blocks + 32 * 16 * c + 6 * 2 * dz * c + 2 * c + 9 * c * 3
    if not num_classes:
        assert sum(counts.values()) == {"conv": 3_775_744, "gconv": 4_611_328}[conv]


@backends
@convs
@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("training", [True, False])
def test_generative_block_by_its_definition(backend, conv, num_classes, training):
    """Upsampling before the first convolution; latent vector and class in norms and convolutions."""
    generator = make_generative(conv, num_classes, impl=backend).train(training)
    z, y = latents(4, 5), torch.tensor([0, 2, 1, 2]) if num_classes else None
    code = z if y is None else torch.cat([z, tF.one_hot(y, 3).double()], 1)
    h = tF.linear(z, generator.fc.weight).view(4, 8, 4, 4)

    def affine(norm, x):
        x_hat = tF.batch_norm(x, norm.running_mean.clone(), norm.running_var.clone(), training=training)
        gamma, beta = 1 + code @ norm.gamma.weight.T, code @ norm.beta.weight.T
        return tF.relu(gamma[..., None, None] * x_hat + beta[..., None, None])

    def convolved(layer, x):
        u = tF.conv2d(x, layer.weight, padding=1)
        if conv == "conv":
            return u
        s = torch.sigmoid(torch.cat([x.mean((2, 3)), code], 1) @ layer.scale_weight.T)
        return u + torch.einsum("ji,bi,bihw->bjhw", layer.mix_weight, s, u)

    images = copy.deepcopy(generator)(*((z,) if y is None else (z, y)))
    for block in (generator.block1, generator.block2, generator.block3):
        up = tF.interpolate(h, scale_factor=2, mode="nearest")
        h = up + convolved(block.conv2, affine(block.norm2, convolved(block.conv1, affine(block.norm1, up))))
    norm = generator.norm
    statistics = norm.running_mean.clone(), norm.running_var.clone()
    h = tF.relu(tF.batch_norm(h, *statistics, norm.weight, norm.bias, training=training))
    torch.testing.assert_close(images, torch.tanh(tF.conv2d(h, generator.conv.weight, padding=1)), **CLOSE)


@convs
def test_initial_weights_of_the_generative_form(conv):
    torch.manual_seed(0)
    generator = Generator(norm="bigbn", latent_dim=32, bias=False, conv=conv)
    for name, weight in generator.named_parameters():
        if weight.dim() > 1:
            gain = math.sqrt(2) if ".conv" in name and weight.dim() == 4 else 1
            limit = gain * math.sqrt(6 / (weight[0, 0].numel() * sum(weight.shape[:2])))
            assert 0.98 * limit < weight.abs().max() <= limit, name


def test_gradients_reach_every_parameter_of_the_generative_form():
    generator = make_generative(num_classes=3)
    generator(latents(4, 5), torch.tensor([0, 1, 2, 0])).sin().sum().backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad.abs().max() > 1e-9, name


def test_converted_generator_starts_as_the_same():
    """The convolutions of its blocks become generative, the others are kept."""
    generator = make("bn")
    converted = copy.deepcopy(generator)
    result = convert_conv(converted, 16, keep=["conv"])
    assert result.replaced == [f"block{i}.conv{j}" for i in (1, 2, 3) for j in (1, 2)]
    assert result.skipped == {"conv": "was to be kept"}
    with latent(latents()):
        torch.testing.assert_close(converted(latents()), generator(latents()), **CLOSE)


def test_classes():
    generator = make_generative(num_classes=3)
    with pytest.raises(ValueError, match="a generator of 3 classes got no classes"):
        generator(latents(4, 5))
    with pytest.raises(ValueError, match="a generator of 0 classes got classes"):
        make_generative()(latents(4, 5), torch.zeros(4, dtype=torch.long))
    for y in (torch.zeros(4, 1, dtype=torch.long), torch.zeros(4), torch.zeros(3, dtype=torch.long)):
        with pytest.raises(ValueError, match="y must be 4 classes of int64, got"):
            generator(latents(4, 5), y)
    for options, message in (
        ({"num_classes": 3}, "num_classes=3 needs norm='bigbn', a conditional norm, or conv='gconv'"),
        ({"norm": "cspn"}, "norm='cspn' needs num_classes"),
        ({"num_classes": -1}, "num_classes must not be negative, got -1"),
        ({"conv": "dense"}, "conv must be one of 'conv', 'gconv', got 'dense'"),
    ):
        with pytest.raises(ValueError, match=message):
            Generator(**options)


# -- conditional norms


@pytest.mark.parametrize(
    ("norm", "classes", "count"),
    [
        ("eager_cbn", 10, 4_101_376),
        ("cbn", 10, 4_101_376),
        ("ccbn", 10, 4_494_592),
        ("cspn", 10, 5_065_984),
        ("cspn", 100, 6_448_384),
    ],
)
def test_parameter_counts_of_conditional_generators(norm, classes, count):
    with torch.device("meta"):
        generator = Generator(norm=norm, num_classes=classes, bias=False)
    assert sum(p.numel() for p in generator.parameters()) == count


def test_conditional_batch_norm_of_pytorch_and_fused():
    eager = make("eager_cbn", num_classes=3)
    fused = make("cbn", num_classes=3, impl="reference")
    with torch.no_grad():
        for name, parameter in eager.named_parameters():
            if "gamma" in name or "beta" in name:
                parameter.normal_()
    renamed = {
        name.replace("gamma.weight", "gamma_table").replace("beta.weight", "beta_table").replace(".norm.", "."): value
        for name, value in eager.state_dict().items()
    }
    fused.load_state_dict(renamed)
    y = torch.tensor([0, 2, 1, 2])
    for _ in (eager.train(), fused.train(), eager.eval(), fused.eval()):
        torch.testing.assert_close(fused(latents(), y), eager(latents(), y), **CLOSE)


@pytest.mark.parametrize("conv", ["conv", "gconv"])
@pytest.mark.parametrize("norm", ["cbn", "ccbn", "cspn"])
def test_images_of_classes(norm, conv):
    """In eval a sample's image depends on its own class and latent vector, and on those of no other."""
    generator = make(norm, num_classes=3, conv=conv, impl="reference").eval()
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if "norm" in name:
                parameter.normal_()
    y = torch.tensor([0, 2, 1, 2])
    images = generator(latents(), y)
    torch.testing.assert_close(generator(latents()[1:2], y[1:2]), images[1:2], **CLOSE)
    other = generator(latents(), torch.tensor([0, 1, 1, 2]))
    assert [torch.equal(a, b) for a, b in zip(images, other, strict=True)] == [True, False, True, True]


@pytest.mark.parametrize("norm", ["ccbn", "cspn"])
def test_conditional_norms_see_the_latent_vector(norm):
    torch.manual_seed(0)
    block = UpBlock(4, 4, norm, "reference", latent_dim=5, num_classes=3).double()
    x, z, y = latents(4, 4 * 16).view(4, 4, 4, 4), latents(4, 5), torch.tensor([0, 2, 1, 2])
    up = tF.interpolate(x, scale_factor=2, mode="nearest")
    h = block.conv1(block.norm1(x, y, z))
    torch.testing.assert_close(block(x, z, y), up + block.conv2(block.norm2(h, y, z)), **CLOSE)
    assert (block(x, 2 * z, y) - block(x, z, y)).abs().max() > 1e-3
