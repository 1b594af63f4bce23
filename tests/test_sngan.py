"""The SNGANs at all resolutions: sizes, operations, the definitions of blocks and discriminators, gates, activations,
spectral norm. The generator for 32 pixels has tests of its own in test_networks.py."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from pixnorm import SPN2d
from pixnorm.networks import Discriminator, Generator
from pixnorm.networks.sngan import UpBlock
from pixnorm.networks.sngan_discriminator import DownBlock
from pixnorm.nn import BatchNorm2d, ChannelGate, ConditionalBatchNorm2d, ConditionalSPN2d, SpatialGate
from pixnorm.testing import random

# float64 through a network: a few thousand roundings of 1e-16, amplified by the normalisations.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def close(a, b):
    torch.testing.assert_close(a, b, **CLOSE)


def drawn(*shape, seed=1):
    return random(shape, torch.Generator().manual_seed(seed))


def made(kind, *args, **options):
    torch.manual_seed(0)
    return kind(*args, **options).double()


def size(network):
    return sum(parameter.numel() for parameter in network.parameters())


# ---- sizes and operations of the papers


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"norm": "bn", "width": 271, "bias": False}, 4_533_974),
        ({"resolution": 128}, 13_000_451),
        ({"resolution": 128, "bias": False}, 12_988_864),
        ({"resolution": 128, "norm": "spn"}, 13_478_915),
        ({"resolution": 128, "norm": "spn", "bias": False}, 13_467_328),
        ({"resolution": 128, "norm": "cspn", "num_classes": 200}, 17_323_395),
    ],
    ids=str,
)
def test_parameters_of_generators(options, count):
    with torch.device("meta"):
        assert size(Generator(**options)) == count


def test_parameters_that_spn_and_classes_add():
    """SPN: C² + 36 C a layer. Conditional SPN: 10 K C for its mask and kernels and 2 dz C, in place of 2 C; the blocks
    before it get 2 K C in place of 2 C."""
    spn, before = (512, 256, 256, 128, 128, 64), (512,) * 4
    of_spn = sum(c * c + 36 * c for c in spn)
    assert 13_478_915 - 13_000_451 == of_spn == 478_464
    k, dz = 200, 128
    of_classes = sum((10 * k + 2 * dz - 2) * c for c in spn) + sum((2 * k - 2) * c for c in before)
    assert 17_323_395 - 13_478_915 == of_classes == 3_844_480


@pytest.mark.parametrize(("channels", "of_blocks"), [(256, 3_538_944), (284, 4_355_424), (285, 4_386_150)], ids=str)
def test_widened_convolutions(channels, of_blocks):
    """As many weights as with generative convolution, 4 374 528."""
    with torch.device("meta"):
        generator = Generator(norm="bigbn", latent_dim=32, bias=False, channels=channels)
    assert sum(p.numel() for name, p in generator.named_parameters() if ".conv" in name) == of_blocks


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 1_053_825),
        ({"num_classes": 10}, 1_055_105),
        ({"resolution": 128}, 12_238_081),
        ({"resolution": 256}, 12_239_233),
    ],
    ids=str,
)
def test_parameters_of_discriminators(options, count):
    with torch.device("meta"):
        assert size(Discriminator(**options)) == count


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"norm": "fused_bn"}, 1_593_049_088),
        ({"norm": "spn"}, 1_793_982_464),
        ({"norm": "fused_bn", "width": 271}, 1_786_800_192),
        ({"norm": "fused_bn", "resolution": 128}, 7_377_780_736),
        ({"norm": "spn", "resolution": 128}, 8_582_594_560),
    ],
    ids=str,
)
def test_multiply_adds_of_generators(options, count):
    """Those of convolutions and fully connected layers, in the papers' order; ours, with equal results, are fewer."""
    counts = {}
    for impl in ("reference", "auto"):
        with torch.device("meta"):
            generator, z = Generator(**options, impl=impl), torch.randn(1, 128)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            generator.eval()(z)
        counts[impl] = counter.get_total_flops() // 2
    assert counts["reference"] == count
    if options["norm"] == "fused_bn":
        assert counts["auto"] < 0.8 * count


def test_multiply_adds_of_the_discriminator():
    images, counts = torch.randn(1, 3, 32, 32), {}
    for impl in ("reference", "auto"):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            Discriminator(impl=impl).eval()(images)
        counts[impl] = counter.get_total_flops() // 2
    assert counts["reference"] == 272_072_832 and counts["auto"] < 0.62 * counts["reference"]


# ---- generators


@pytest.mark.parametrize("resolution", [32, 64, 128, 256])
def test_images_of_all_resolutions(resolution):
    generator = Generator(resolution, "spn", 8, 16)
    widths = [block.norm2.num_features for name, block in generator.named_children() if name.startswith("block")]
    assert (
        widths
        == {
            32: [16, 16, 16],
            64: [16, 8, 4, 2],
            128: [16, 16, 8, 4, 2],
            256: [16, 16, 8, 4, 2, 1],
        }[resolution]
    )
    images = generator(torch.randn(2, 8))
    assert images.shape == (2, 3, resolution, resolution) and images.abs().max() <= 1


@pytest.mark.parametrize(
    ("options", "first", "kinds"),
    [
        ({"norm": "spn"}, 32, (BatchNorm2d, SPN2d)),
        ({"norm": "spn", "spn_from": 8}, 8, (None, SPN2d)),
        ({"norm": "spn", "spn_from": 128}, 128, (BatchNorm2d, SPN2d)),
        ({"norm": "cspn", "num_classes": 3}, 32, (ConditionalBatchNorm2d, ConditionalSPN2d)),
    ],
    ids=str,
)
def test_where_spn_begins(options, first, kinds):
    generator = Generator(128, latent_dim=8, channels=16, **options)
    for i, resolution in enumerate((8, 16, 32, 64, 128), 1):
        block = generator.get_submodule(f"block{i}")
        assert type(block.norm1) is type(block.norm2) is kinds[resolution >= first]
        assert getattr(block.norm1, "latent_dim", 0) == (8 if kinds[resolution >= first] is ConditionalSPN2d else 0)


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "spn", "attention": "ca"},
        {"norm": "fused_bn", "attention": "sa"},
        {"norm": "bigbn", "attention": "ca", "conv": "gconv"},
        {"norm": "spn", "activation": "elu"},
        {"norm": "cbn", "num_classes": 3, "activation": "elu"},
        {"norm": "spn", "activation": "glu"},
        {"norm": "bigbn", "activation": "glu"},
        {"norm": "cspn", "num_classes": 3, "resolution": 64},
    ],
    ids=str,
)
def test_forms_agree(options):
    """Reference and fused start with equal weights, and give equal images and gradients."""
    options = {"latent_dim": 8, "channels": 32, **options}
    reference, fused = made(Generator, **options, impl="reference"), made(Generator, **options)
    y = torch.tensor([2, 0, 1]) if "num_classes" in options else None
    results = []
    for generator in (reference, fused):
        images = generator(drawn(3, 8), y)
        results.append((images, torch.autograd.grad(images.square().sum(), list(generator.parameters()))))
    (expected, expected_grads), (images, grads) = results
    assert reference.state_dict().keys() == fused.state_dict().keys()
    close(images, expected)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        close(ours, theirs)


ACTIVATIONS = {"relu": F.relu, "elu": F.elu, "glu": lambda x: F.glu(x, dim=1)}


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("norm", ["bn", "fused_bn", "spn"])
@pytest.mark.parametrize(("activation", "attention"), [("relu", "ca"), ("relu", "sa"), ("elu", None), ("glu", "ca")])
def test_block_by_its_definition(norm, activation, attention, impl):
    """Upsampling first, then norm, activation, convolution and gate, twice; the shortcut beside it."""
    block = made(UpBlock, 16, 32, norm, impl, activation=activation, attention=attention)
    halves = 2 if activation == "glu" else 1
    x = drawn(2, halves * 16, 4, 4)
    act, up = ACTIVATIONS[activation], F.interpolate(x, scale_factor=2, mode="nearest")

    def normalised(layer, h):
        if norm == "spn":
            plain = made(SPN2d, h.shape[1], impl="reference")
            plain.load_state_dict(layer.state_dict())
            return plain(h)
        return F.batch_norm(h, None, None, layer.weight, layer.bias, training=True)

    h = block.gate1(F.conv2d(act(normalised(block.norm1, up)), block.conv1.weight, block.conv1.bias, padding=1))
    h = block.gate2(F.conv2d(act(normalised(block.norm2, h)), block.conv2.weight, block.conv2.bias, padding=1))
    close(block(x), h + block.shortcut(up))


def test_size_of_gates():
    """Of six channel gates 50 784 parameters, of three spatial gates 98 weights and a batch norm each."""
    with torch.device("meta"):
        plain, channel, spatial = (size(Generator(attention=attention)) for attention in (None, "ca", "sa"))
    assert channel - plain == 6 * 8_464 == 50_784 and spatial - plain == 3 * (98 + 2)


def test_where_gates_are():
    """Of channels after both convolutions, of pixels after the second."""
    kinds = {"ca": [ChannelGate, ChannelGate], "sa": [nn.Identity, SpatialGate], None: [nn.Identity] * 2}
    for attention, expected in kinds.items():
        block = UpBlock(8, 8, "bn", attention=attention)
        assert [type(block.gate1), type(block.gate2)] == expected, attention


def test_glu_has_twice_the_channels_where_it_is_fed():
    with torch.device("meta"):
        generator = Generator(activation="glu")
    block = generator.block1
    assert (generator.fc.out_features, generator.conv.in_channels) == (2 * 256 * 16, 256)
    assert [tuple(conv.weight.shape[:2]) for conv in (block.conv1, block.conv2)] == [(512, 256)] * 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: made(Generator, 64, "fused_bn", 16, 64),
        lambda: made(Discriminator, 32, 10, 64, spectral_norm=False),
        lambda: made(Discriminator, 64, 0, 64, spectral_norm=False),
    ],
)
def test_initial_weights(make):
    """Glorot uniform, with gain √2 for the 3x3 convolutions of the blocks."""
    for name, weight in make().named_parameters():
        if name.endswith("bias"):
            assert not weight.any(), name
        elif weight.dim() > 1:
            gain = 2**0.5 if "block" in name and weight[0, 0].numel() == 9 else 1
            limit = gain * (6 / (weight[0, 0].numel() * sum(weight.shape[:2]))) ** 0.5
            assert 0.85 * limit < weight.abs().max() <= limit, name


# ---- spectral norm


def normalised(network):
    return {
        f"{name}.{weight}".removeprefix(".")
        for name, module in network.named_modules()
        if parametrize.is_parametrized(module)
        for weight in module.parametrizations
    }


def test_weights_with_spectral_norm():
    """Convolutions, all three weights of generative ones, fully connected layers, linears of norms; not SPN, not gates.
    In the discriminator every weight."""
    options = {"latent_dim": 8, "channels": 16, "spectral_norm": True}
    generator = Generator(64, "spn", attention="ca", **options)
    convolutions = {f"block{i}.{name}.weight" for i in range(1, 5) for name in ("conv1", "conv2")}
    shortcuts = {f"block{i}.shortcut.weight" for i in range(2, 5)}
    assert normalised(generator) == convolutions | shortcuts | {"fc.weight", "conv.weight"}
    generator = Generator(32, "bigbn", conv="gconv", **options)
    found = {name for name in normalised(generator) if name.startswith("block1")}
    of_conv = {f"block1.conv{i}.{name}" for i in (1, 2) for name in ("weight", "scale_weight", "mix_weight")}
    assert found == of_conv | {f"block1.norm{i}.{name}.weight" for i in (1, 2) for name in ("gamma", "beta")}
    discriminator = Discriminator(32, 3, 8)
    matrices = {name for name, p in discriminator.named_parameters() if p.dim() > 1}
    assert {name.replace("parametrizations.weight.original", "weight") for name in matrices} == normalised(
        discriminator
    )
    assert "embedding.weight" in normalised(discriminator)


@pytest.mark.parametrize(
    "make", [lambda: made(Discriminator, 32, 3, 8), lambda: made(Generator, 32, "spn", 8, 16, spectral_norm=True)]
)
def test_spectral_norm_is_one(make):
    network = make()
    for module in network.modules():
        if parametrize.is_parametrized(module):
            for _ in range(200):
                weight = module.weight  # each use in training is a power iteration
            norm = torch.linalg.matrix_norm(weight.flatten(1), 2).item()
            assert norm == pytest.approx(1, abs=1e-3)


# ---- discriminators


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(
    ("options", "hidden", "shortcut"),
    [
        ({"in_channels": 3, "out_channels": 5, "down": True, "first": True}, 5, True),
        ({"in_channels": 4, "out_channels": 4, "down": True}, 4, True),
        ({"in_channels": 4, "out_channels": 6, "down": True}, 4, True),
        ({"in_channels": 4, "out_channels": 4, "down": False}, 4, False),
    ],
    ids=str,
)
def test_down_block_by_its_definition(options, hidden, shortcut, impl):
    block = made(DownBlock, **options, impl=impl)
    for layer in (block.conv1, block.conv2):
        nn.init.normal_(layer.bias)
    assert block.conv1.out_channels == hidden and isinstance(block.shortcut, nn.Conv2d) == shortcut
    x = drawn(2, options["in_channels"], 8, 8)
    h = x if options.get("first") else F.relu(x)
    h = F.relu(F.conv2d(h, block.conv1.weight, block.conv1.bias, padding=1))
    h = F.conv2d(h, block.conv2.weight, block.conv2.bias, padding=1) + block.shortcut(x)
    close(block(x), F.avg_pool2d(h, 2) if options["down"] else h)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_scores_are_projected(impl):
    """Sums over pixels, a fully connected layer, and the inner product with the class's embedding."""
    discriminator = made(Discriminator, 32, 3, 8, spectral_norm=False, impl=impl)
    images, y = drawn(4, 3, 32, 32), torch.tensor([0, 2, 1, 2])
    h = images
    for block in discriminator.blocks:
        h = block(h)
    assert h.shape == (4, 8, 8, 8)
    features = F.relu(h).sum((2, 3))
    expected = features @ discriminator.fc.weight[0] + discriminator.fc.bias
    close(discriminator(images, y), expected + (features * discriminator.embedding.weight[y]).sum(1))


@pytest.mark.parametrize(("resolution", "channels"), [(32, 8), (64, 16), (128, 16), (256, 16)])
def test_forms_of_discriminators_agree(resolution, channels):
    reference = made(Discriminator, resolution, 3, channels, impl="reference")
    ours = made(Discriminator, resolution, 3, channels)
    images, y = drawn(2, 3, resolution, resolution).requires_grad_(), torch.tensor([2, 0])
    results = []
    for discriminator in (reference, ours):
        scores = discriminator(images, y)
        assert scores.shape == (2,)
        results.append((scores, *torch.autograd.grad(scores.sin().sum(), [images, *discriminator.parameters()])))
    for theirs, mine in zip(*results, strict=True):
        close(mine, theirs)


# ---- wrong input


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Generator, {"attention": "se"}, "attention must be one of None, 'ca', 'sa', got 'se'"),
        (Generator, {"activation": "gelu"}, "activation must be one of 'relu', 'elu', 'glu', got 'gelu'"),
        (Generator, {"resolution": 128, "channels": 100}, "channels must be a positive multiple of 8, got 100"),
        (Generator, {"channels": 0}, "channels must be a positive multiple of 1, got 0"),
        (Generator, {"width": -1}, "channels must be a positive multiple of 1, got -1"),
        (Generator, {"norm": "spn", "spn_from": 64}, r"spn_from must be one of \[8, 16, 32\], with SPN, got 64"),
        (Generator, {"spn_from": 8}, "with SPN, got 8 with norm='bn'"),
        (Discriminator, {"resolution": 16}, "resolution must be one of 32, 64, 128, 256, got 16"),
        (Discriminator, {"num_classes": -1}, "num_classes must not be negative, got -1"),
        (Discriminator, {"impl": "fast"}, "impl must be one of"),
    ],
)
def test_wrong_arguments(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_wrong_input_of_a_discriminator():
    plain, conditional = Discriminator(channels=8), Discriminator(num_classes=3, channels=8)
    images, y = torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.long)
    for args, message in (
        ((images[..., :16],), r"images must have shape \(N, 3, 32, 32\), got \(2, 3, 32, 16\)"),
        ((images, y), "a discriminator of 0 classes got classes"),
    ):
        with pytest.raises(ValueError, match=message):
            plain(*args)
    for wrong, message in (
        (None, "a discriminator of 3 classes got no classes"),
        (y.float(), "y must be 2 classes of"),
        (y + 3, r"y must be in \[0, 3\), got classes from 3 to 3"),
        (y - 1, r"y must be in \[0, 3\), got classes from -1 to -1"),
    ):
        before = copy.deepcopy(conditional.state_dict())
        with pytest.raises(ValueError, match=message):
            conditional(images, wrong)
        assert all(torch.equal(value, before[name]) for name, value in conditional.state_dict().items())
