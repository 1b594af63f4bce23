"""The discriminators of StyleGAN (arXiv 1812.04948; ProGAN's with a blur) and StyleGAN 2 (arXiv 1912.04958)."""

from itertools import pairwise

import torch
import torch.nn.functional as tF
from torch import Tensor, nn

from pixnorm import functional as F
from pixnorm.networks.style_base import check_growth, fades, resolutions, width
from pixnorm.nn import EqualizedConv2d, EqualizedLinear
from pixnorm.nn.equalized import HE
from pixnorm.ops._dispatch import IMPLS
from pixnorm.ops.checks import check_image, check_option
from pixnorm.ops.common import wide


def minibatch_stddev(x: Tensor, group_size: int = 4, features: int = 1, eps: float = 1e-8) -> Tensor:
    """Appends the standard deviation over groups of samples as channels (ProGAN, arXiv 1710.10196, 3), each a mean over
    the pixels and a share of the channels. Sample n is in group n mod (N / group size), as in NVlabs' code.

    Args:
        x: (N, C, H, W).
        group_size: of the groups; for other batches than multiples of it their largest divisor that is smaller.
        features: how many channels to append; C is a multiple of it.
        eps: added to the variance.

    Returns:
        (N, C + features, H, W).

    Raises:
        ValueError: a number is not positive, or C is no multiple of ``features``.
    """
    check_image(x)
    n, c, h, w = x.shape
    if group_size < 1 or features < 1 or c % features:
        options = f"group_size={group_size} and features={features}"
        raise ValueError(f"{options} must be positive, and C a multiple of features, got input of shape {(n, c, h, w)}")
    size = next(size for size in range(group_size, 0, -1) if n % size == 0)
    groups = wide(x).reshape(size, n // size, features, c // features, h, w)
    variances = (groups - groups.mean(0)).square().mean(0)
    stddev = (variances + eps).sqrt().mean((2, 3, 4))  # (N / size, features)
    maps = stddev.to(x.dtype).repeat(size, 1)[..., None, None].expand(-1, -1, h, w)
    return torch.cat([x, maps], 1)


def _scaled(layer: nn.Module, bias_gain: float) -> tuple[Tensor, Tensor]:
    """The weight and the bias of a layer with an equalised learning rate. Gains of activations go into them, which
    saves passes: g · lrelu(x) = lrelu(g · x)."""
    weight, bias = layer.scaled()
    return weight, bias if bias_gain == 1 else bias * bias_gain


def _conv(layer: EqualizedConv2d, x: Tensor, bias_gain: float = 1.0) -> Tensor:
    return tF.leaky_relu(tF.conv2d(x, *_scaled(layer, bias_gain), padding=layer.padding), 0.2)


def _down_conv(layer: EqualizedConv2d, x: Tensor, impl: str) -> Tensor:
    """Blur, convolution, mean of 2x2 pixels, leaky ReLU."""
    y = F.conv_avg_pool2d(F.blur2d(x, impl=impl), *layer.scaled(), padding="same", impl=impl)
    return tF.leaky_relu(y, 0.2)


class DiscriminatorHead(nn.Module):
    """From features of 4x4 to scores: minibatch standard deviation, a convolution, two fully connected layers.

    Args:
        channels: of the features.
        group_size: of the standard deviation.
        bias_gain: of what precedes a leaky ReLU: 1, or √2 if its gain is behind it (StyleGAN 2).

    Shape:
        x (N, channels, 4, 4) to (N, 1).
    """

    def __init__(self, channels: int, group_size: int, bias_gain: float):
        super().__init__()
        if group_size < 1:
            raise ValueError(f"group_size must be positive, got {group_size}")
        self.group_size, self.bias_gain = group_size, bias_gain
        self.conv = EqualizedConv2d(channels + 1, channels, 3, padding=1)
        self.dense = EqualizedLinear(channels * 16, channels)
        self.score = EqualizedLinear(channels, 1, gain=1.0)

    def forward(self, input: Tensor) -> Tensor:
        """The scores."""
        x = _conv(self.conv, minibatch_stddev(input, self.group_size), self.bias_gain)
        x = tF.leaky_relu(tF.linear(x.flatten(1), *_scaled(self.dense, self.bias_gain)), 0.2)
        return self.score(x)


class _Discriminator(nn.Module):
    def __init__(self, resolution: int, image_channels: int, impl: str):
        super().__init__()
        check_option("impl", impl, IMPLS)
        self.resolution, self.image_channels, self.impl = resolution, image_channels, impl

    def _check(self, images: Tensor, resolution: int) -> None:
        check_image(images)
        if tuple(images.shape[1:]) != (self.image_channels, resolution, resolution):
            wanted = f"(N, {self.image_channels}, {resolution}, {resolution})"
            raise ValueError(f"images must have shape {wanted}, got {tuple(images.shape)}")

    def extra_repr(self) -> str:
        return f"{self.resolution}, impl={self.impl!r}"


class DownBlock(nn.Module):
    """A block of StyleGAN's discriminator (arXiv 1812.04948): convolution, leaky ReLU, then a convolution between a
    blur and a mean of 2x2 pixels, leaky ReLU.

    Args:
        in_channels, out_channels: of the block.
        impl: of the blur, see :func:`pixnorm.functional.blur2d`; the others but ``"reference"`` do the second
            convolution and the mean in one.

    Shape:
        x (N, in_channels, H, W) to (N, out_channels, H // 2, W // 2).
    """

    def __init__(self, in_channels: int, out_channels: int, impl: str = "auto"):
        super().__init__()
        self.conv1 = EqualizedConv2d(in_channels, in_channels, 3, padding=1)
        self.conv2 = EqualizedConv2d(in_channels, out_channels, 3, padding=1)
        self.impl = impl

    def forward(self, input: Tensor) -> Tensor:
        """The features of half the resolution."""
        return _down_conv(self.conv2, _conv(self.conv1, input), self.impl)


class StyleGANDiscriminator(_Discriminator):
    """The discriminator of StyleGAN (arXiv 1812.04948): ProGAN's, with blurs before pixels are dropped.

    With the standard sizes it has 23 087 249 parameters at 1024x1024.

    Args:
        resolution, channels_base, channels_max, image_channels, progressive: as in
            :class:`pixnorm.networks.StyleGAN`.
        group_size: of the minibatch standard deviation.
        impl: see :class:`DownBlock`; does not affect parameters, their names or values.

    Shape:
        images (N, image_channels, resolution, resolution) to scores (N, 1).

    Raises:
        ValueError: an argument has a value that is not listed above, or images do not fit.
    """

    def __init__(
        self,
        resolution: int = 1024,
        *,
        channels_base: int = 16384,
        channels_max: int = 512,
        image_channels: int = 3,
        group_size: int = 4,
        progressive: bool = True,
        impl: str = "auto",
    ):
        super().__init__(resolution, image_channels, impl)
        self.progressive = progressive
        sides = resolutions(resolution)
        widths = {side: width(side, channels_base, channels_max) for side in sides}
        of_colours = sides if progressive else sides[-1:]
        self.from_rgb = nn.ModuleDict({str(s): EqualizedConv2d(image_channels, widths[s], 1) for s in of_colours})
        self.blocks = nn.ModuleDict({str(s): DownBlock(widths[s], widths[s // 2], impl) for s in sides[:0:-1]})
        self.head = DiscriminatorHead(widths[4], group_size, 1.0)

    def forward(self, images: Tensor, *, resolution: int | None = None, fade: float = 1.0) -> Tensor:
        """Scores.

        Args:
            images: of the present resolution.
            resolution, fade: as in :meth:`pixnorm.networks.StyleGAN.forward`; ``fade`` weighs the features of the
                newest block against those of the images at half the resolution.
        """
        size = self.resolution if resolution is None else resolution
        sides = check_growth(size, fade, self.resolution, self.progressive)
        self._check(images, size)
        x = _conv(self.from_rgb[str(size)], images)
        for side in sides[:0:-1]:
            x = self.blocks[str(side)](x)
            if side == size and fades(fade):
                small = _conv(self.from_rgb[str(side // 2)], tF.avg_pool2d(images, 2))
                x = small.lerp(x, fade)
        return self.head(x)


class ResidualDownBlock(nn.Module):
    """A block of StyleGAN 2's discriminator (arXiv 1912.04958): convolution, leaky ReLU, blur, convolution with stride
    2, leaky ReLU; plus a blurred 1x1 convolution with stride 2, both divided by √2. The leaky ReLUs have a gain of √2.

    Args:
        in_channels, out_channels, impl: as in :class:`DownBlock`.

    Shape:
        x (N, in_channels, H, W) to (N, out_channels, H // 2, W // 2).

    NVlabs' filter [1, 3, 3, 1] is the binomial one followed by the mean of two pixels; theirs also keeps what a blur
    spreads beyond the border, so that outputs there differ.
    """

    def __init__(self, in_channels: int, out_channels: int, impl: str = "auto"):
        super().__init__()
        self.conv1 = EqualizedConv2d(in_channels, in_channels, 3, padding=1)
        # The gain of the second leaky ReLU and the division of the sum cancel.
        self.conv2 = EqualizedConv2d(in_channels, out_channels, 3, padding=1, gain=1.0)
        self.shortcut = EqualizedConv2d(in_channels, out_channels, 1, bias=False, gain=HE / 2)
        self.impl = impl

    def forward(self, input: Tensor) -> Tensor:
        """The features of half the resolution."""
        x = _down_conv(self.conv2, _conv(self.conv1, input, HE), self.impl)
        return x + self.shortcut(F.blur2d(input, down=2, impl=self.impl))


class StyleGAN2Discriminator(_Discriminator):
    """The discriminator of StyleGAN 2 (arXiv 1912.04958, configuration F): residual blocks.

    With the standard sizes it has 29 012 513 parameters at 1024x1024 and 28 864 129 at 256x256.

    Args:
        resolution, channels_base, channels_max, image_channels: as in :class:`pixnorm.networks.StyleGAN2`.
        group_size: of the minibatch standard deviation.
        impl: see :class:`DownBlock`; does not affect parameters, their names or values.

    Shape:
        images (N, image_channels, resolution, resolution) to scores (N, 1).

    Raises:
        ValueError: an argument has a value that is not listed above, or images do not fit.
    """

    def __init__(
        self,
        resolution: int = 1024,
        *,
        channels_base: int = 32768,
        channels_max: int = 512,
        image_channels: int = 3,
        group_size: int = 4,
        impl: str = "auto",
    ):
        super().__init__(resolution, image_channels, impl)
        widths = [width(side, channels_base, channels_max) for side in resolutions(resolution)][::-1]
        self.from_rgb = EqualizedConv2d(image_channels, widths[0], 1)
        self.blocks = nn.Sequential(*[ResidualDownBlock(*pair, impl) for pair in pairwise(widths)])
        self.head = DiscriminatorHead(widths[-1], group_size, HE)

    def forward(self, images: Tensor) -> Tensor:
        """Scores."""
        self._check(images, self.resolution)
        return self.head(self.blocks(_conv(self.from_rgb, images, HE)))
