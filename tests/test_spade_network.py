"""SPADE's networks: the published sizes, NVlabs' networks and checkpoints, integer label maps, wrong input."""

from itertools import pairwise

import nvlabs_spade
import pytest
import torch
import torch.nn.functional as F

import pixnorm
from pixnorm.networks import SPADEBlock, SPADEDiscriminator, SPADEEncoder, SPADEGenerator, from_nvlabs
from pixnorm.networks.spade_discriminator import downsample, downsample_labels
from pixnorm.nn import InstanceNorm2d
from pixnorm.nn._label_patches import LabelPatches

LABELS, HIDDEN = 5, 8
# float64 through the whole network; norms of nearly uniform features amplify roundings of 1e-16.
CLOSE = {"rtol": 1e-8, "atol": 1e-9}
impls = pytest.mark.parametrize("impl", ["reference", "auto"])
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
pytestmark = [pytest.mark.usefixtures("one_thread")]


def count(module):
    return sum(p.numel() for p in module.parameters())


def label_map(n, height, width, classes=LABELS, cell=5, seed=0):
    """Segments of some size, as label maps have them, so that neighbourhoods of all kinds occur."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randint(classes, (n, -(-height // cell), -(-width // cell)), generator=generator)
    return cells.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, :height, :width].contiguous()


def one_hot(labels, classes=LABELS):
    return F.one_hot(labels, classes).permute(0, 3, 1, 2).double()


def numbers(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close_gradients(actual, expected):
    """By the largest of all: those of biases before a norm are zero but for rounding."""
    scale = max(g.abs().max() for g in expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a / scale, b / scale, **CLOSE)


def flat(features):
    return [feature for scale in features for feature in scale]


def scaled_up(network):
    """Weights as large as in a trained network: after NVlabs' initialisation scales and shifts hardly differ from 0."""
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.copy_(numbers(*p.shape, seed=len(name)) * (p[0].numel() ** -0.5 if p.dim() > 1 else 0.3))
    return network.double()


# --- sizes


def test_parameter_counts_of_the_publication():
    with torch.device("meta"):
        assert count(SPADEGenerator(256)) == 92_538_819
        assert count(SPADEGenerator(256, latent_dim=256)) == 109_205_443
        assert [round(count(SPADEGenerator(label_channels=n)) / 1e5) for n in (36, 151, 184)] == [930, 965, 975]
        assert [count(SPADEBlock(*sizes, 19)) for sizes in ((1024, 1024), (1024, 512), (128, 64))] == [
            23_643_136,
            13_572_608,
            922_880,
        ]
        assert count(SPADEEncoder()) == 10_463_424
        discriminator = SPADEDiscriminator()
    widths = [64, 128, 256, 512]
    inner = sum(16 * of * to for of, to in pairwise(widths))
    assert count(discriminator) == 2 * (16 * 22 * 64 + 64 + inner + 16 * 512 + 1) == 5_566_594


@pytest.mark.parametrize(
    ("resolution", "upsampling", "aspect_ratio", "start", "size"),
    [
        (64, "normal", 1.0, (2, 2), (64, 64)),
        (64, "normal", 2.0, (1, 2), (32, 64)),
        (64, "more", 1.0, (1, 1), (64, 64)),
        (128, "most", 1.0, (1, 1), (128, 128)),
    ],
)
def test_sizes_of_images(resolution, upsampling, aspect_ratio, start, size):
    options = {"upsampling": upsampling, "aspect_ratio": aspect_ratio, "hidden_channels": 2}
    generator = SPADEGenerator(resolution, LABELS, 2, 3, **options)
    assert generator.start == start
    images = generator(label_map(2, *size), torch.randn(2, 3))
    assert images.shape == (2, 3, *size) and images.abs().max() < 1


@pytest.mark.parametrize(("resolution", "start"), [(64, 2), (128, 4), (256, 8), (512, 16)])
def test_resolutions_share_their_parameters(resolution, start):
    with torch.device("meta"):
        generator = SPADEGenerator(resolution)
    assert generator.start == (start, start) and count(generator) == 92_538_819


def test_initial_weights_are_nvlabs():
    torch.manual_seed(0)
    block = SPADEBlock(64, 32, 19)
    spade = block.norm1
    convs = {
        "conv": (block.conv1.parametrizations.weight.original, 9 * (64 + 32)),
        "shared": (spade.shared_weight, 9 * (19 + 128)),
        "gamma": (spade.weight[:64], 9 * (128 + 64)),
        "beta": (spade.weight[64:], 9 * (128 + 64)),
    }
    for name, (weight, fans) in convs.items():
        # Thousands of draws: the deviation is good to 1 %.
        torch.testing.assert_close(weight.std().item(), 0.02 * (2 / fans) ** 0.5, rtol=0.05, atol=0, msg=name)
    for bias in (block.conv1.bias, spade.shared_bias, spade.bias):
        assert not bias.any()


# --- NVlabs' networks and checkpoints

GENERATORS = {
    "map": ({}, {}, (64, 64)),
    "latent": ({"latent_dim": 3}, {"z_dim": 3}, (64, 64)),
    "instance": ({"statistics": "instance", "latent_dim": 3}, {"statistics": "instance", "z_dim": 3}, (64, 64)),
    "wide": ({"aspect_ratio": 2.0}, {}, (32, 64)),
    "more": ({"upsampling": "more"}, {"layers": "more"}, (64, 64)),
    "most": ({"upsampling": "most"}, {"layers": "most"}, (128, 128)),
}


def generators(which, impl):
    ours, theirs, size = GENERATORS[which]
    generator = SPADEGenerator(size[1], LABELS, 2, impl=impl, hidden_channels=HIDDEN, **ours).double()
    replica = nvlabs_spade.Generator(*generator.start, LABELS, 2, hidden=HIDDEN, **theirs)
    replica = nvlabs_spade.converged(scaled_up(replica))
    generator.load_state_dict(from_nvlabs(replica.state_dict()))
    return generator, replica, size


@impls
@modes
@pytest.mark.parametrize("which", GENERATORS)
def test_generator_is_nvlabs(which, training, impl):
    """Images, gradients, and what training leaves in the buffers, from integers and from the one-hot map."""
    generator, replica, size = generators(which, impl)
    generator.train(training)
    replica.train(training)
    labels, z = label_map(2, *size), (numbers(2, 3),) if generator.latent_dim else ()
    for _ in range(2):  # in training running statistics move, and spectral norms stay
        expected = replica(one_hot(labels), *z)
        actual = generator(labels, *z)
        torch.testing.assert_close(actual, expected, **CLOSE)
    assert expected.std() > 0.05
    updated = from_nvlabs(replica.state_dict())
    for name, buffer in generator.named_buffers():
        torch.testing.assert_close(buffer, updated[name], **CLOSE)
    direction = numbers(*expected.shape, seed=2)
    grads = torch.autograd.grad((expected * direction).sum(), list(replica.parameters()))
    named = from_nvlabs(dict(zip((name for name, _ in replica.named_parameters()), grads, strict=True)))
    ours = torch.autograd.grad((actual * direction).sum(), list(generator.parameters()))
    close_gradients(ours, [named[name] for name, _ in generator.named_parameters()])
    if not training:
        torch.testing.assert_close(generator(one_hot(labels), *z), actual, **CLOSE)


@impls
@modes
def test_discriminator_is_nvlabs(training, impl):
    """All features and gradients, for even and odd sizes."""
    discriminator = SPADEDiscriminator(LABELS, 4, num_layers=3, num_scales=3, impl=impl).double().train(training)
    replica = nvlabs_spade.MultiscaleDiscriminator(LABELS, 4, layers=3, scales=3)
    replica = nvlabs_spade.converged(scaled_up(replica)).train(training)
    discriminator.load_state_dict(from_nvlabs(replica.state_dict()))
    for size in ((32, 32), (37, 42), (34, 29)):
        labels, image = label_map(2, *size), numbers(2, 3, *size).requires_grad_()
        expected = flat(replica(one_hot(labels), image))
        wanted = torch.autograd.grad(sum(f.sin().sum() for f in expected), [image, *replica.parameters()])
        for segmap in (labels, one_hot(labels)):
            actual = discriminator(image, segmap)
            assert [len(scale) for scale in actual] == [4, 4, 4] and all(s[-1].shape[1] == 1 for s in actual)
            for a, b in zip(flat(actual), expected, strict=True):
                torch.testing.assert_close(a, b, **CLOSE)
            grads = torch.autograd.grad(sum(f.sin().sum() for f in flat(actual)), [image, *discriminator.parameters()])
            close_gradients(grads[:1], wanted[:1])
            names = [name for name, _ in replica.named_parameters()]
            named = from_nvlabs(dict(zip(names, wanted[1:], strict=True)))
            close_gradients(grads[1:], [named[name] for name, _ in discriminator.named_parameters()])


@impls
@modes
def test_encoder_is_nvlabs(training, impl):
    encoder = SPADEEncoder(2, 6, impl=impl).double().train(training)
    replica = nvlabs_spade.converged(scaled_up(nvlabs_spade.Encoder(2, 6))).train(training)
    encoder.load_state_dict(from_nvlabs(replica.state_dict()))
    for size in ((256, 256), (64, 48)):
        image = numbers(2, 3, *size)
        torch.testing.assert_close(encoder(image), replica(image), **CLOSE)


def test_the_published_sizes_take_nvlabs_checkpoints():
    """Every key of the networks as published is mapped, and nothing is missing."""
    with torch.device("meta"):
        pairs = [
            (SPADEGenerator(256), nvlabs_spade.Generator(8, 8, 19, 64, hidden=128)),
            (SPADEGenerator(256, latent_dim=256), nvlabs_spade.Generator(8, 8, 19, 64, 256, hidden=128)),
            (SPADEEncoder(), nvlabs_spade.Encoder(64, 256)),
            (SPADEDiscriminator(), nvlabs_spade.MultiscaleDiscriminator(19, 64)),
        ]
    for ours, theirs in pairs:
        ours.load_state_dict(from_nvlabs(theirs.state_dict()), assign=True)


def test_unknown_checkpoints():
    checkpoint = nvlabs_spade.Encoder(2, 3).state_dict()
    with pytest.raises(ValueError, match=r"not a key of NVlabs/SPADE's .*: 'mapping\.0\.weight'"):
        from_nvlabs({**checkpoint, "mapping.0.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"'layer1\.0\.scale'"):
        from_nvlabs({"layer1.0.scale": torch.ones(1)})
    checkpoint.pop("layer3.0.weight_u")
    with pytest.raises(RuntimeError, match=r"convs\.2\.parametrizations\.weight\.0\._u"):
        SPADEEncoder(2, 3).load_state_dict(from_nvlabs(checkpoint))


# --- blocks and label maps


@impls
@pytest.mark.parametrize("channels", [(4, 4), (6, 4)], ids=["identity", "learned"])
def test_upsampling_inside_a_block_is_upsampling_before_it(channels, impl):
    block = scaled_up(SPADEBlock(*channels, LABELS, HIDDEN, upsample=2, impl=impl)).eval()
    plain = SPADEBlock(*channels, LABELS, HIDDEN, impl="reference").double().eval()
    plain.load_state_dict(block.state_dict())
    x, labels = numbers(2, channels[0], 5, 4), label_map(2, 20, 16, cell=3)
    torch.testing.assert_close(block(x, labels), plain(F.interpolate(x, scale_factor=2), labels), **CLOSE)


def test_norms_of_one_resolution_share_the_label_map(monkeypatch):
    found = []

    class Counted(LabelPatches):
        @classmethod
        def of(cls, segmap, *args):
            found.append(tuple(segmap.shape))
            return LabelPatches.of(segmap, *args)

    for module in (pixnorm.networks.spade, pixnorm.nn.spade):
        monkeypatch.setattr(module, "LabelPatches", Counted)
    SPADEGenerator(64, LABELS, 2, hidden_channels=HIDDEN)(label_map(2, 64, 64))
    assert found == [(2, side, side) for side in (2, 4, 8, 16, 32, 64)]


def test_same_seed_same_weights():
    for make in (
        lambda impl: SPADEGenerator(64, LABELS, 2, impl=impl, hidden_channels=HIDDEN),
        lambda impl: SPADEEncoder(2, 3, impl=impl),
        lambda impl: SPADEDiscriminator(LABELS, 2, impl=impl),
    ):
        states = []
        for impl in ("auto", "reference"):
            torch.manual_seed(3)
            states.append(make(impl).state_dict())
        assert list(states[0]) == list(states[1])
        assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (1, 5), (2, 1)])
def test_counted_labels_are_the_pooled_one_hot_map(size):
    labels, image = label_map(2, *size, cell=1), numbers(2, 3, *size)
    for layout in (torch.contiguous_format, torch.channels_last):
        like = image.contiguous(memory_format=layout)
        pooled = downsample_labels(labels, LABELS, like)
        assert torch.equal(pooled, downsample(one_hot(labels)))
        assert pooled.is_contiguous(memory_format=layout) and pooled.dtype == like.dtype


def test_soft_maps_are_means_of_the_first_convolution():
    """What a linear layer promises: half of one label and half of another give the mean of their features."""
    first = scaled_up(SPADEDiscriminator(LABELS, 4)).scales[0].convs[0]
    image, labels = numbers(2, 3, 9, 8), [label_map(2, 9, 8, seed=seed) for seed in (0, 1)]
    soft = sum(one_hot(each) for each in labels) / 2
    mean = sum(first(each, image) for each in labels) / 2
    torch.testing.assert_close(first(soft, image), mean, **CLOSE)


@impls
def test_gradient_penalty(impl):
    """R1's gradient, of second order, is that of plain PyTorch; label maps are integers."""
    discriminator = scaled_up(SPADEDiscriminator(LABELS, 2, num_layers=3, impl=impl)).eval()
    replica = nvlabs_spade.MultiscaleDiscriminator(LABELS, 2, layers=3).double().eval()
    replica = nvlabs_spade.converged(scaled_up(replica))
    discriminator.load_state_dict(from_nvlabs(replica.state_dict()))
    labels, image = label_map(1, 16, 16), numbers(1, 3, 16, 16).requires_grad_()

    def penalty(features, parameters):
        (grad,) = torch.autograd.grad(sum(scale[-1].sum() for scale in features), image, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), parameters, materialize_grads=True)

    actual = penalty(discriminator(image, labels), list(discriminator.parameters()))
    named = [name for name, _ in replica.named_parameters()]
    expected = penalty(replica(one_hot(labels), image), list(replica.parameters()))
    expected = from_nvlabs(dict(zip(named, expected, strict=True)))
    close_gradients(actual, [expected[name] for name, _ in discriminator.named_parameters()])


def test_samples_of_the_encoder():
    mu, logvar = torch.tensor([[1.0, -2.0]]).expand(4000, 2), torch.tensor([[0.0, 2.0]]).expand(4000, 2)
    z = SPADEEncoder.sample(mu, logvar, torch.Generator().manual_seed(0))
    # Errors of means are σ / √4000, of deviations σ / √8000; four times that.
    torch.testing.assert_close(z.mean(0), mu[0], rtol=0, atol=4 * 2.72 / 4000**0.5)
    torch.testing.assert_close(z.std(0), torch.tensor([1.0, 2.718]), rtol=4 / 8000**0.5, atol=0)
    assert torch.equal(z, SPADEEncoder.sample(mu, logvar, torch.Generator().manual_seed(0)))


@impls
def test_instance_norm_is_pytorch(impl):
    x = numbers(2, 3, 6, 5)
    layer = InstanceNorm2d(3, eps=1e-3, activation="leaky_relu", negative_slope=0.1, upsample=2, impl=impl)
    expected = F.leaky_relu(F.instance_norm(F.interpolate(x, scale_factor=2), eps=1e-3), 0.1)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.eval()(x), expected)
    assert not layer.state_dict()


@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@pytest.mark.parametrize("n", [1, 2])
@impls
def test_gradients_of_instance_norm_in_any_layout(n, activation, impl):
    """PyTorch's is wrong for one sample and a gradient in channels_last. The second derivative of ours is the
    reference's."""
    x, w = numbers(n, 3, 6, 5), numbers(n, 3, 6, 5).sin()
    layer = InstanceNorm2d(3, activation=activation, impl=impl)
    found = []
    for last in (False, True):
        leaf = x.clone(memory_format=torch.channels_last if last else torch.contiguous_format).requires_grad_()
        y = layer(leaf)
        grad = torch.autograd.grad(y, leaf, w.contiguous(memory_format=torch.channels_last), create_graph=True)[0]
        second = torch.autograd.grad(grad, leaf, w.contiguous(memory_format=torch.channels_last))[0]
        found.append((y.detach(), grad.detach(), second))
    leaf = x.clone().requires_grad_()
    centred = leaf - leaf.mean((2, 3), keepdim=True)
    y = centred / (centred.square().mean((2, 3), keepdim=True) + layer.eps).sqrt()
    y = y if activation is None else F.leaky_relu(y, 0.2)
    grad = torch.autograd.grad(y, leaf, w, create_graph=True)[0]
    expected = y.detach(), grad.detach(), torch.autograd.grad(grad, leaf, w)[0]
    for ours in found:
        torch.testing.assert_close(ours, expected)


# --- wrong input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SPADEGenerator(100), "resolution must be a multiple of 32 .*'normal'.*, got 100"),
        (lambda: SPADEGenerator(64, upsampling="most"), "resolution must be a multiple of 128"),
        (lambda: SPADEGenerator(upsampling="least"), "upsampling must be one of 'normal', 'more', 'most'"),
        (
            lambda: SPADEGenerator(64, aspect_ratio=8),
            r"aspect_ratio must leave a row .* \(2 columns\), got 8",
        ),
        (lambda: SPADEGenerator(64, aspect_ratio=-1), "aspect_ratio must leave a row"),
        (lambda: SPADEGenerator(width=0), "width must be positive, got 0"),
        (lambda: SPADEGenerator(128, width=1, upsampling="most"), "width // 2 must be positive"),
        (lambda: SPADEGenerator(label_channels=0), "label_channels must be positive"),
        (lambda: SPADEGenerator(latent_dim=-1), "latent_dim must not be negative, got -1"),
        (lambda: SPADEGenerator(64, 3, 1, statistics="layer"), "statistics must be one of"),
        (lambda: SPADEGenerator(64, 3, 1, impl="fast"), "impl must be one of"),
        (lambda: SPADEBlock(0, 4, 3), "in_channels must be positive, got 0"),
        (lambda: SPADEEncoder(0), "width must be positive, got 0"),
        (lambda: SPADEEncoder(1, 0), "latent_dim must be positive, got 0"),
        (lambda: SPADEDiscriminator(num_layers=1), "num_layers must be at least 2, got 1"),
        (lambda: SPADEDiscriminator(num_scales=0), "num_scales must be positive, got 0"),
        (lambda: SPADEDiscriminator(3, 2, impl="fast"), "impl must be one of"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_input_leaves_no_trace():
    generator = SPADEGenerator(64, 3, 1, 2, hidden_channels=2)
    discriminator, encoder = SPADEDiscriminator(3, 2), SPADEEncoder(1, 2)
    image, labels, z = torch.ones(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.int64), torch.ones(2, 2)
    bad = labels.clone()
    bad[0, 1, 1] = 3  # not seen at low resolution
    cases = [
        (lambda: generator(labels.float(), z), r"label map must be \(N, h, w\) of torch.int64 or \(N, 3, h, w\)"),
        (lambda: generator(bad, z), r"labels must be in \[0, 3\), got labels from 0 to 3"),
        (lambda: generator(labels, z[:1]), r"z must have shape \(2, 2\) for a label map of shape \(2, 64, 64\)"),
        (lambda: SPADEGenerator(64, 3, 1, hidden_channels=2)(labels, z), "z was given to a generator without"),
        (lambda: discriminator(image[:, :2], labels), r"expected images of 3 channels, got \(2, 2, 64, 64\)"),
        (lambda: discriminator(image, labels[:1]), r"label map must be \(2, h, w\)"),
        (lambda: discriminator(image, labels[:, 1:]), r"must have one size, got \(2, 3, 64, 64\) and \(2, 63, 64\)"),
        (lambda: discriminator(image, bad), r"labels must be in \[0, 3\)"),
        (lambda: encoder(image[:, :2]), r"image must have shape \(2, 3, 64, 64\) for images of shape \(2, 2, 64, 64\)"),
        (lambda: encoder.sample(z, z[:1]), r"mu and logvar must have one shape, got \(2, 2\) and \(1, 2\)"),
        (lambda: InstanceNorm2d(4)(image), r"expected input of 4 channels, got \(2, 3, 64, 64\)"),
    ]
    networks = (generator, discriminator, encoder)
    before = [buffer.clone() for network in networks for buffer in network.buffers()]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    after = [buffer for network in networks for buffer in network.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
