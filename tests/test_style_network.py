"""StyleGAN and StyleGAN 2: their sizes, their functions against plain PyTorch, what styles and noise do, growth. The
discriminators' functions are in test_style_discriminator.py."""

import copy
import math

import pytest
import torch
import torch.nn.functional as tF

from pixnorm.networks import (
    StyleGAN,
    StyleGAN2,
    StyleGAN2Discriminator,
    StyleGANDiscriminator,
    path_gradient,
    path_lengths,
)

pytestmark = [pytest.mark.usefixtures("one_thread")]
GENERATORS = {"1": StyleGAN, "2": StyleGAN2}
DISCRIMINATORS = {"1": StyleGANDiscriminator, "2": StyleGAN2Discriminator}
versions = pytest.mark.parametrize("version", GENERATORS)
impls = pytest.mark.parametrize("impl", ["reference", "auto"])
SMALL = {"latent_dim": 6, "style_dim": 5, "mapping_layers": 2, "channels_base": 64, "channels_max": 8}
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, **CLOSE)


def generator(version="2", resolution=8, **options):
    """In float64, with noise that matters and biases."""
    torch.manual_seed(0)
    network = GENERATORS[version](resolution, **(SMALL | options)).double()
    return randomised(network)


def discriminator(version="2", resolution=8, **options):
    torch.manual_seed(0)
    network = DISCRIMINATORS[version](resolution, channels_base=64, channels_max=8, **options).double()
    return randomised(network)


def randomised(network):
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(("strength", "bias")):
                parameter.add_(torch.randn_like(parameter))
    return network


def latents(n=3, dim=6):
    return torch.randn(n, dim, dtype=torch.float64)


# ---- sizes


def count(network):
    return sum(p.numel() for p in network.parameters())


def on_meta(kind, *args, **options):
    with torch.device("meta"):
        return count(kind(*args, **options))


def test_parameters_of_stylegan():
    """All resolutions have colours. The counts are those of NVlabs' networks."""
    widths = {4: 512, 8: 512, 16: 512, 32: 512, 64: 256, 128: 128, 256: 64, 512: 32, 1024: 16}
    mapping = 8 * (512 * 512 + 512)
    end = {c: 2 * c + 512 * 2 * c + 2 * c for c in widths.values()}  # noise, bias, affine
    synthesis = 512 * 16 + 2 * end[512] + 512 * 512 * 9
    critic = (512 + 1) * 512 * 9 + 512 + 512 * 16 * 512 + 512 + 512 + 1
    for side, c in widths.items():
        synthesis += 3 * c + 3
        critic += 3 * c + c
        if side > 4:
            before = widths[side // 2]
            synthesis += before * c * 9 + c * c * 9 + 2 * end[c]
            critic += c * c * 9 + c + c * before * 9 + before
    assert (mapping, synthesis, critic) == (2_101_248, 24_118_379, 23_087_249)
    assert on_meta(StyleGAN) == mapping + synthesis == 26_219_627
    assert on_meta(StyleGANDiscriminator) == critic
    unused = sum(3 * c + 3 for side, c in widths.items() if side < 1024)
    assert on_meta(StyleGAN, progressive=False) == mapping + synthesis - unused


@pytest.mark.parametrize(
    "resolution, of_generator, of_discriminator", [(256, 30_034_338, 28_864_129), (1024, 30_370_060, 29_012_513)]
)
def test_parameters_of_stylegan_2(resolution, of_generator, of_discriminator):
    """Configuration F; the counts at 1024 are those that NVlabs' code prints."""
    widths = {2**i: min(2**15 >> i, 512) for i in range(2, int(math.log2(resolution)) + 1)}

    def layer(i, o, k=3, noise=1):  # weight, bias, affine, strength of the noise
        return i * o * k * k + o + 512 * i + i + noise

    wanted, critic = 8 * (512 * 512 + 512) + 512 * 16 + layer(512, 512), 3 * widths[resolution] + widths[resolution]
    for side, c in widths.items():
        wanted += layer(c, 3, 1, noise=0)
        if side > 4:
            before = widths[side // 2]
            wanted += layer(before, c) + layer(c, c)
            critic += c * c * 9 + c + c * before * 9 + before + c * before
    critic += 513 * 512 * 9 + 512 + 512 * 16 * 512 + 512 + 512 + 1
    assert (wanted, critic) == (of_generator, of_discriminator)
    assert on_meta(StyleGAN2, resolution) == wanted
    assert on_meta(StyleGAN2Discriminator, resolution) == critic


# ---- functions, in plain PyTorch


def plain_linear(layer, x, gain, lr=1.0):
    weight = layer.weight * (gain * lr / layer.weight.shape[1] ** 0.5)
    return x @ weight.T + layer.bias * lr


def plain_conv(weight, x, gain, bias=None):
    fan_in = weight[0].numel()
    return tF.conv2d(x, weight * (gain / fan_in**0.5), bias, padding=weight.shape[2] // 2)


def plain_blur(x):
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]], dtype=x.dtype) / 16
    return tF.conv2d(x, kernel.expand(x.shape[1], 1, 3, 3), padding=1, groups=x.shape[1])


def nearest(x):
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def plain_mapping(mapping, z):
    x = z / (z.square().mean(1, keepdim=True) + 1e-8).sqrt()
    for layer in mapping.layers:
        x = tF.leaky_relu(plain_linear(layer, x, 2**0.5, 0.01), 0.2)
    return x


def plain_stylegan(g, w, noises):
    """NVlabs' order: upsample, convolve, blur; noise, bias, leaky ReLU, instance norm, style."""
    x = g.constant.expand(len(w), -1, -1, -1)
    for i, layer in enumerate(g.layers):
        if i > 0:
            large = i % 2 == 0
            x = plain_conv(layer.conv.weight, nearest(x) if large else x, 2**0.5)
            x = plain_blur(x) if large else x
        x = x + layer.noise.strength[:, None, None] * noises[i] + layer.bias[:, None, None]
        x = tF.leaky_relu(x, 0.2)
        x = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), correction=0, keepdim=True) + 1e-8).sqrt()
        scale, shift = plain_linear(layer.affine, w[:, i], 1.0)[..., None, None].chunk(2, 1)
        x = x * (scale + 1) + shift
    last = g.to_rgb[str(g.resolution)]
    return plain_conv(last.weight, x, 1.0, last.bias)


def plain_modulated(conv, x, w, demodulate=True):
    """As NVlabs' fused form: kernels of each sample, in a grouped convolution."""
    n, c, h, width = x.shape
    kernels = conv.weight * conv.weight[0].numel() ** -0.5 * plain_linear(conv.affine, w, 1.0)[:, None, :, None, None]
    if demodulate:
        kernels = kernels / (kernels.square().sum((2, 3, 4), keepdim=True) + 1e-8).sqrt()
    y = tF.conv2d(x.reshape(1, n * c, h, width), kernels.flatten(0, 1), padding=kernels.shape[3] // 2, groups=n)
    return y.view(n, -1, h, width)


def plain_stylegan2(g, w, noises):
    x, images, i = g.constant.expand(len(w), -1, -1, -1), None, 0
    for blocks, to_rgb in zip(g.blocks, g.to_rgb, strict=True):
        for j, block in enumerate(blocks.blocks):
            large = i > 0 and j == 0
            x = plain_modulated(block.conv, nearest(x) if large else x, w[:, i])
            x = plain_blur(x) if large else x
            x = x + block.noise.strength * noises[i] + block.bias[:, None, None]
            x = tF.leaky_relu(x, 0.2) * 2**0.5
            i += 1
        colours = plain_modulated(to_rgb.conv, x, w[:, i], demodulate=False) + to_rgb.bias[:, None, None]
        images = colours if images is None else plain_blur(nearest(images)) + colours
    return images


PLAIN = {"1": plain_stylegan, "2": plain_stylegan2}


@versions
@impls
@pytest.mark.parametrize("n", [1, 3])
def test_generator_in_plain_pytorch(version, impl, n):
    g = generator(version, resolution=16, impl=impl, noise="const", mixing=0.0)
    z = latents(n)
    w = plain_mapping(g.mapping, z)[:, None].expand(-1, 6, -1)
    noises = [getattr(g, f"noise{i}") for i in range(len(g.noise_sizes))]
    assert [noise.shape[2] for noise in noises] == [4, 4, 8, 8, 16, 16][-len(noises) :]
    expected = PLAIN[version](g, w, noises)
    assert expected.std() > 0.1
    close(g(z), expected)
    of_layers = torch.randn(n, 6, 5, dtype=torch.float64)
    close(g(w=of_layers), PLAIN[version](g, of_layers, noises))


@versions
def test_native_as_the_reference(version):
    """A step of both networks: all gradients, those of gradients, too; same weights from the same seed."""
    found = {}
    for impl in ("reference", "auto"):
        g, d = generator(version, impl=impl), discriminator(version, impl=impl)
        torch.manual_seed(1)
        images, w = g(latents(4), return_w=True)
        lengths = path_lengths(images, w)
        scores = d(images)
        (of_images,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
        loss = scores.sum() + (lengths - 1).square().mean() + of_images.square().sum()
        named = [*g.named_parameters(), *d.named_parameters()]
        grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        found[impl] = {name: grad for (name, _), grad in zip(named, grads, strict=True)}
        found[impl] |= {"images": images, "scores": scores, "lengths": lengths}
    without = {name for name, grad in found["auto"].items() if grad is None}
    unused = {f"{of}_rgb.4.{what}" for of in ("to", "from") for what in ("weight", "bias")}
    assert without == (unused if version == "1" else set())
    for name, expected in found["reference"].items():
        torch.testing.assert_close(found["auto"][name], expected, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")


# ---- styles


@versions
def test_psi(version):
    g = generator(version, noise="const", truncated_layers=None)
    g(latents(8))  # in training, which moves the mean
    g.eval()
    z = latents()
    of_mean = g(w=g.mapping.w_avg.expand(3, -1))
    close(g(z, psi=0.0), of_mean)
    close(g(z, psi=1.0), g(w=g.mapping(z)))
    close(g(z), g(w=g.mapping.w_avg + g.truncation * (g.mapping(z) - g.mapping.w_avg)))
    assert (g(z, psi=1.0) - of_mean).abs().max() > 1e-3


@versions
def test_psi_of_the_first_layers(version):
    g = generator(version, truncated_layers=2).eval()
    g.mapping.w_avg.normal_()
    z = latents()
    w = g.styles(z, psi=0.0)
    assert torch.equal(w[:, :2], g.mapping.w_avg.expand(3, 2, -1))
    assert torch.equal(w[:, 2:], g.styles(z, psi=1.0)[:, 2:])
    in_training = g.train().styles(z, psi=0.0)  # where asked for, and after the mean has moved
    assert torch.equal(in_training[:, :2], g.mapping.w_avg.expand(3, 2, -1))


@versions
def test_defaults_of_truncation(version):
    with torch.device("meta"):
        g = GENERATORS[version](4)
    assert (g.truncation, g.truncated_layers) == {"1": (0.7, 8), "2": (0.5, None)}[version]


@versions
def test_mixing(version):
    """Layers before the cut have the sample's own styles, the others those of another one."""
    g = generator(version, resolution=16, mixing=1.0)
    z = latents(64)
    w = g.styles(z)
    own = g.eval().styles(z, psi=1.0)[:, 0]
    is_own = (w == own[:, None]).all(2)
    cuts = is_own.sum(1)
    assert torch.equal(is_own, torch.arange(6) < cuts[:, None])
    assert set(cuts.tolist()) == {1, 2, 3, 4, 5}
    of_others = w[torch.arange(64), 5]
    assert torch.equal(w, torch.where(is_own[..., None], own[:, None], of_others[:, None]))
    assert of_others.unique(dim=0).shape[0] == 64
    assert torch.equal(g.styles(z, psi=1.0), own[:, None].expand(-1, 6, -1))  # not in evaluation


@pytest.mark.parametrize("mixing", [0.0, 0.5, 0.9])
def test_probability_of_mixing(mixing):
    g = generator(mixing=mixing)
    w = g.styles(latents(2000))
    share = (w[:, 0] != w[:, -1]).any(1).double().mean().item()
    assert abs(share - mixing) <= 4 * (mixing * (1 - mixing) / 2000) ** 0.5


def test_one_layer_is_not_mixed():
    g, z = generator(mixing=1.0), latents(3)
    close(g.styles(z, layers=1), g.styles(z)[:, :1])


# ---- noise


@versions
@impls
def test_noise_of_strength_0_has_no_effect(version, impl):
    g = generator(version, impl=impl).eval()
    for name, parameter in g.named_parameters():
        if name.endswith("strength"):
            torch.nn.init.zeros_(parameter)
    z = latents()
    off = g(z, noise="none")
    for noise in ("random", "const"):
        assert torch.equal(g(z, noise=noise), off)


@versions
def test_kinds_of_noise(version):
    g = generator(version).eval()
    z = latents()
    constants = [getattr(g, f"noise{i}") for i in range(len(g.noise_sizes))]
    const, off = g(z, noise="const"), g(z, noise="none")
    assert torch.equal(g(z, noise="const"), const) and torch.equal(g(z, noise=constants), const)
    assert torch.equal(g(z, noise=[torch.zeros_like(noise) for noise in constants]), off)
    random = g(z)
    for one, other in ((random, const), (random, off), (const, off), (random, g(z))):
        assert (one - other).abs().amax((1, 2, 3)).min() > 1e-3  # of each sample
    g.noise = "const"
    assert torch.equal(g(z), const)
    drawn = g(z, noise=[None, *constants[1:]])
    assert (drawn - const).abs().max() > 1e-3


@versions
def test_noise_is_of_each_sample(version):
    g = generator(version).eval()
    images = g(latents(1).expand(2, -1))
    assert (images[0] - images[1]).abs().max() > 1e-3
    images = g(latents(1).expand(2, -1), noise="const")
    close(images[0], images[1])


@versions
def test_draws_can_be_repeated(version):
    g = generator(version)
    z = latents()

    def drawn(seed):
        return copy.deepcopy(g)(z, generator=torch.Generator().manual_seed(seed))

    state = torch.get_rng_state()
    first = drawn(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(drawn(1), first)
    assert not torch.equal(drawn(2), first)
    torch.manual_seed(3)
    with_global = copy.deepcopy(g)(z)
    torch.manual_seed(3)
    assert torch.equal(copy.deepcopy(g)(z), with_global)


@versions
def test_draws_for_any_batch(version):
    """Noise and what is mixed, compiled with a symbol for the number of samples."""
    torch.compiler.reset()
    g = generator(version)

    def draws(z):
        return g.styles(z), *g.noises("random", z)

    compiled = torch.compile(draws, fullgraph=True, dynamic=True, backend="eager")
    for n in (4, 3):
        z, found = latents(n), []
        for draw in (compiled, draws):
            torch.manual_seed(1)
            found.append(draw(z))
        close(*found)


def test_noise_requires_gradients():
    """As in a projector."""
    g = generator("2").eval()
    noises = [torch.randn(1, 1, s, s, dtype=torch.float64, requires_grad=True) for s in g.noise_sizes]
    grads = torch.autograd.grad(g(latents(), noise=noises).square().sum(), noises)
    assert all(grad.abs().min() > 0 for grad in grads)


# ---- growth


@impls
def test_limits_of_fading(impl):
    g, d = (make("1", resolution=16, impl=impl) for make in (generator, discriminator))
    z = latents()
    w = g.eval().styles(z)
    small, large = (g(w=w[:, :count], resolution=size, noise="const") for size, count in ((8, 4), (16, 6)))
    close(g(w=w, fade=0.0, noise="const"), nearest(small))
    close(g(w=w, fade=1.0, noise="const"), large)
    close(g(w=w, fade=0.25, noise="const"), 0.75 * nearest(small) + 0.25 * large)
    close(g(w=w, fade=torch.tensor(0.25).double(), noise="const"), 0.75 * nearest(small) + 0.25 * large)
    close(g(z, resolution=8, noise="const"), small)
    assert small.shape == (3, 3, 8, 8)
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    close(d(images, fade=0.0), d(tF.avg_pool2d(images, 2), resolution=8))
    assert (d(images, fade=0.0) - d(images)).abs().max() > 1e-3


def test_a_weight_on_another_device_is_not_looked_at():
    """A graph, or a GPU that has not computed it yet, need not know the number."""
    with torch.device("meta"):
        images = generator("1")(latents(), fade=torch.empty((), dtype=torch.float64))
    assert images.shape == (3, 3, 8, 8)


def test_mixing_of_a_growing_network():
    """The cut is between layers that are in use: at 4x4 there are two."""
    g = generator("1", mixing=1.0)
    w = g.styles(latents(16), layers=2)
    assert w.shape == (16, 2, 5) and (w[:, 0] != w[:, 1]).any(1).all()


def test_a_network_that_does_not_grow():
    g, d = (make("1", progressive=False) for make in (generator, discriminator))
    d(g(latents(4))).sum().backward()
    assert all(p.grad is not None for network in (g, d) for p in network.parameters())
    with pytest.raises(ValueError, match="progressive=True"):
        g(latents(), fade=0.5)
    with pytest.raises(ValueError, match="progressive=True"):
        d(torch.randn(1, 3, 4, 4), resolution=4)


# ---- path lengths


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 4)], ids=str)
def test_path_lengths_by_hand(shape):
    """Images that are linear in w: the gradient is the transposed map of the noise."""
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    a = torch.randn(math.prod(shape[1:]), 2 * 5 * 6, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(3, 2, 5, 6, dtype=torch.float64)
    images = (w.flatten(1) @ a).view(3, 2, 5, 6)
    expected = (noise.flatten(1) @ a.T / 30**0.5).view(shape)
    close(path_gradient(images, w, noise), expected)
    layers = shape[1] if len(shape) == 3 else 1
    lengths = path_lengths(images, w, noise)
    close(lengths, expected.flatten(1).norm(dim=1) / layers**0.5)
    (found,) = torch.autograd.grad(lengths.sum(), a)
    (wanted,) = torch.autograd.grad((expected.flatten(1).norm(dim=1) / layers**0.5).sum(), a)
    close(found, wanted)


@versions
def test_path_lengths_of_the_network(version):
    """Against finite differences of the images, sample by sample: networks do not mix samples."""
    g = generator(version).eval()
    _, w = g(latents(2), return_w=True)
    w = w.detach().clone().requires_grad_()
    images = g(w=w, noise="const")
    noise, step = torch.randn_like(images), torch.randn_like(w)
    gradient = path_gradient(images, w, noise)
    with torch.no_grad():
        ahead, behind = (g(w=w + h * step, noise="const") for h in (1e-6, -1e-6))
    slopes = ((ahead - behind) * noise).sum((1, 2, 3)) / 2e-6 / 8
    torch.testing.assert_close((gradient * step).sum((1, 2)), slopes, rtol=1e-5, atol=1e-6)


# ---- setups


@versions
@impls
def test_empty_batch(version, impl):
    g, d = (make(version, impl=impl) for make in (generator, discriminator))
    images = g(latents(0))
    assert images.shape == (0, 3, 8, 8) and d(images).shape == (0, 1)


@versions
def test_images_have_the_parameters_dtype(version):
    g = generator(version).float()
    with torch.autocast("cpu", torch.bfloat16):
        images = g(latents().float())
    assert images.dtype == torch.float32 and images.isfinite().all()
    assert g.bfloat16()(latents().bfloat16()).dtype == torch.bfloat16


def test_channels_last():
    for version in GENERATORS:
        g, d = (make(version) for make in (generator, discriminator))
        z = latents(4)
        images = g.eval()(z, noise="const")
        scores = d(images)
        g, d = (network.to(memory_format=torch.channels_last) for network in (g, d))
        close(g(z, noise="const"), images)
        close(d(images.contiguous(memory_format=torch.channels_last)), scores)


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: StyleGAN(12), "resolution must be a power of 2 and at least 4, got 12"),
        (lambda: StyleGAN2(2), "resolution must be a power of 2 and at least 4, got 2"),
        (lambda: StyleGAN(64, channels_base=32), "channels_base=32 and channels_max=512 leave no channels at 64x64"),
        (lambda: StyleGAN2(4, mixing=1.5), r"mixing must be in \[0, 1\], got 1.5"),
        (lambda: StyleGAN2(4, truncated_layers=-1), "truncated_layers must not be negative, got -1"),
        (lambda: StyleGAN2(4, noise="some"), "noise must be one of 'random', 'const', 'none', got 'some'"),
        (lambda: StyleGAN2(4, channels_max=8, impl="fast"), "impl must be one of"),
        (lambda: StyleGANDiscriminator(4, channels_max=8, impl="fast"), "impl must be one of"),
        (lambda: StyleGAN2Discriminator(8, channels_max=8, group_size=0), "group_size must be positive, got 0"),
    ],
)
def test_errors_of_options(build, words):
    with pytest.raises(ValueError, match=words):
        build()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda g: g(), "expected either z or w, got neither"),
        (lambda g: g(latents(), w=latents(3, 5)), "expected either z or w, got both"),
        (lambda g: g(latents(3, 5)), r"z must have shape \(N, 6\), got \(3, 5\)"),
        (lambda g: g(w=latents(3, 6)), r"w must have shape \(N, 5\) or \(N, 4, 5\), got \(3, 6\)"),
        (lambda g: g(w=torch.randn(3, 3, 5)), r"w must have shape \(N, 5\) or \(N, 4, 5\), got \(3, 3, 5\)"),
        (lambda g: g(w=latents(3, 5), psi=0.5), "psi is for styles of z"),
        (lambda g: g(latents(), noise="some"), "noise must be one of 'random', 'const', 'none', got 'some'"),
        (lambda g: g(latents(), noise=[None]), "expected noise for 4 layers, got 1"),
        (lambda g: g(latents(), noise=[None, torch.zeros(3, 1, 8, 8), None, None]), r"noise\[1\] must have shape"),
        (
            lambda g: g(latents(), noise=[torch.zeros(2, 1, 4, 4), None, None, None]),
            r"noise\[0\] must have shape",
        ),
        (lambda g: g(latents(), resolution=16), "resolution must be at most the network's, 8, got 16"),
        (lambda g: g(latents(), fade=1.5), r"fade must be in \[0, 1\], got 1.5"),
        (lambda g: g(latents(), resolution=4, fade=0.5), "nothing precedes 4x4, so fade must be 1, got 0.5"),
    ],
)
def test_errors_change_nothing(call, words):
    g = generator("1")
    before = {name: tensor.clone() for name, tensor in g.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        call(g)
    for name, tensor in g.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@versions
def test_errors_of_images(version):
    d = discriminator(version)
    with pytest.raises(ValueError, match=r"images must have shape \(N, 3, 8, 8\), got \(2, 3, 16, 16\)"):
        d(torch.randn(2, 3, 16, 16, dtype=torch.float64))
    images, w = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(3, 5)
    with pytest.raises(ValueError, match=r"as many samples, got \(2, 3, 4, 4\) and \(3, 5\)"):
        path_gradient(images, w)
    with pytest.raises(ValueError, match=r"noise must have shape \(2, 3, 4, 4\)"):
        path_lengths(images, images, torch.randn(2, 3, 4, 5))
