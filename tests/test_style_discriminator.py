"""The discriminators of StyleGAN and StyleGAN 2 against plain PyTorch, minibatch standard deviation by hand, changes of
resolution against NVlabs' filters."""

import pytest
import torch
import torch.nn.functional as tF
from test_style_network import close, discriminator, impls, plain_blur, plain_conv, plain_linear, versions

from pixnorm.functional import blur2d, conv_avg_pool2d, upsample_conv2d
from pixnorm.networks import minibatch_stddev

pytestmark = [pytest.mark.usefixtures("one_thread")]


def plain_stddev(x, group=4):
    """NVlabs' minibatch_stddev_layer."""
    n, c, h, w = x.shape
    group = min(group, n)
    y = x.reshape(group, -1, 1, c, h, w)
    y = y - y.mean(0, keepdim=True)
    y = (y.square().mean(0) + 1e-8).sqrt().mean((2, 3, 4), keepdim=True).mean(2)
    return torch.cat([x, y.repeat(group, 1, h, w)], 1)


def plain_head(head, x, gain):
    x = plain_stddev(x)
    x = tF.leaky_relu(plain_conv(head.conv.weight, x, gain[0], head.conv.bias), 0.2) * gain[1]
    x = tF.leaky_relu(plain_linear(head.dense, x.flatten(1), gain[0]), 0.2) * gain[1]
    return plain_linear(head.score, x, 1.0)


def plain_discriminator(d, x):
    """Weights have the gain of the leaky ReLU."""
    he = 2**0.5
    of_colours = d.from_rgb[str(d.resolution)]
    x = tF.leaky_relu(plain_conv(of_colours.weight, x, he, of_colours.bias), 0.2)
    for block in d.blocks.values():
        x = tF.leaky_relu(plain_conv(block.conv1.weight, x, he, block.conv1.bias), 0.2)
        x = tF.avg_pool2d(plain_conv(block.conv2.weight, plain_blur(x), he), 2)
        x = tF.leaky_relu(x + block.conv2.bias[:, None, None], 0.2)
    return plain_head(d.head, x, (he, 1.0))


def plain_discriminator2(d, x):
    """Leaky ReLUs have a gain, sums of branches are divided by √2."""
    he = 2**0.5
    x = tF.leaky_relu(plain_conv(d.from_rgb.weight, x, 1.0, d.from_rgb.bias), 0.2) * he
    for block in d.blocks:
        shortcut = plain_conv(block.shortcut.weight, tF.avg_pool2d(plain_blur(x), 2), 1.0)
        x = tF.leaky_relu(plain_conv(block.conv1.weight, x, 1.0, block.conv1.bias), 0.2) * he
        x = tF.avg_pool2d(plain_conv(block.conv2.weight, plain_blur(x), 1.0), 2)
        x = tF.leaky_relu(x + block.conv2.bias[:, None, None], 0.2) * he
        x = (x + shortcut) / he
    return plain_head(d.head, x, (1.0, he))


@versions
@impls
@pytest.mark.parametrize("n", [1, 8])
def test_discriminator_in_plain_pytorch(version, impl, n):
    d = discriminator(version, resolution=16, impl=impl)
    images = torch.randn(n, 3, 16, 16, dtype=torch.float64)
    plain = {"1": plain_discriminator, "2": plain_discriminator2}[version]
    expected = plain(d, images)
    assert expected.shape == (n, 1)
    close(d(images), expected)


def plain_fir(x, before, after):
    """NVlabs' filter [1, 3, 3, 1] between pads."""
    taps = torch.tensor([1.0, 3, 3, 1], dtype=x.dtype) / 8
    kernel = (taps[:, None] * taps).expand(x.shape[1], 1, 4, 4)
    return tF.conv2d(tF.pad(x, (before, after, before, after)), kernel, groups=x.shape[1])


def test_changes_of_resolution_are_nvlabs():
    """But at the border: upsample_conv_2d, conv_downsample_2d and the 1x1 convolution of the shortcut, upsample_2d."""
    x, weight = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randn(4, 3, 3, 3, dtype=torch.float64)
    ours = blur2d(upsample_conv2d(x, weight, padding="same"))
    theirs = 4 * plain_fir(tF.conv_transpose2d(x, weight.flip(2, 3).transpose(0, 1), stride=2), 1, 1)
    close(ours[..., 1:-1, 1:-1], theirs[..., 1:-1, 1:-1])
    assert (ours - theirs).abs().max() > 1e-3
    ours, theirs = conv_avg_pool2d(blur2d(x), weight, padding="same"), tF.conv2d(plain_fir(x, 2, 2), weight, stride=2)
    close(ours[..., 1:-1, 1:-1], theirs[..., 1:-1, 1:-1])
    assert (ours - theirs).abs().max() > 1e-3
    close(blur2d(x, down=2), plain_fir(x, 1, 1)[..., ::2, ::2])
    zeros = torch.zeros(2, 3, 16, 16, dtype=torch.float64)
    zeros[..., ::2, ::2] = x
    close(blur2d(x, up=2), 4 * plain_fir(zeros, 2, 1))


def test_minibatch_stddev_by_hand():
    """Groups of two of four samples: 0 and 2, 1 and 3."""
    x = torch.tensor([0.0, 1.0, 2.0, 7.0], dtype=torch.float64).view(4, 1, 1, 1).expand(-1, 2, 2, 2)
    y = minibatch_stddev(x, 2, eps=0.0)
    assert torch.equal(y[:, :2], x)
    close(y[:, 2], torch.tensor([1.0, 3.0, 1.0, 3.0]).double().view(4, 1, 1).expand(-1, 2, 2))
    channels = torch.stack([x[:, 0], 3 * x[:, 0]], 1)
    close(minibatch_stddev(channels, 2, eps=0.0)[:, 2:], 2 * y[:, 2:])
    close(minibatch_stddev(channels, 2, features=2, eps=0.0)[:, 2:], torch.cat([y[:, 2:], 3 * y[:, 2:]], 1))


@pytest.mark.parametrize("n, group", [(0, 4), (1, 1), (2, 2), (3, 3), (4, 4), (6, 3), (7, 1), (8, 4)])
def test_groups_of_a_batch(n, group):
    x = torch.randn(n, 4, 3, 3, dtype=torch.float64)
    y = minibatch_stddev(x)
    assert y.shape == (n, 5, 3, 3)
    if n:
        close(y, plain_stddev(x, group))


def test_errors_of_groups():
    with pytest.raises(ValueError, match=r"C a multiple of features.*\(4, 3, 2, 2\)"):
        minibatch_stddev(torch.randn(4, 3, 2, 2), features=2)
    with pytest.raises(ValueError, match="group_size=0"):
        minibatch_stddev(torch.randn(4, 3, 2, 2), 0)
