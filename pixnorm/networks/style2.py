"""The generator of StyleGAN 2 (arXiv 1912.04958), and the lengths that its path regularisation is about. Its
discriminator is in ``style_discriminator.py``."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from pixnorm import functional as F
from pixnorm.networks.style_base import Noise, StyleGenerator, resolutions, width
from pixnorm.nn import MappingNetwork, ModulatedConv2d, StyleBlock, StyleBlocks
from pixnorm.nn._leaf import traced
from pixnorm.ops.checks import check_shape
from pixnorm.ops.common import drawing, wide


class StyleGAN2(StyleGenerator):
    r"""The generator of StyleGAN 2 (arXiv 1912.04958, configuration F): a mapping network, and a synthesis network of
    :class:`pixnorm.StyleBlock` on a constant of 4x4; the images are a sum of the colours of all resolutions, each
    upsampled (with a blur) to the next.

    With the standard sizes it has 30 370 060 parameters at 1024x1024 and 30 034 338 at 256x256.

    Compared with NVlabs' code, upsampling blurs after a convolution whose outputs beyond the border are zeros; in
    theirs those are computed, so that pixels at the border differ. The mapping network is StyleGAN 1's: theirs scales
    its biases by √2, too.

    Args:
        resolution, latent_dim, style_dim, mapping_layers, image_channels, mixing, noise: as in :class:`StyleGAN`.
        channels_base, channels_max: features of r x r have min(channels_base // r, channels_max) channels; half the
            base is configuration E.
        truncation, truncated_layers: as in :class:`StyleGAN`; here of all layers.
        impl: of our layers, see :class:`pixnorm.StyleBlock`; does not affect parameters, their names or values.

    Shape:
        z (N, latent_dim) to (N, image_channels, resolution, resolution).

    Raises:
        ValueError: an argument has a value that is not listed above.
    """

    def __init__(
        self,
        resolution: int = 1024,
        latent_dim: int = 512,
        style_dim: int = 512,
        *,
        mapping_layers: int = 8,
        channels_base: int = 32768,
        channels_max: int = 512,
        image_channels: int = 3,
        mixing: float = 0.9,
        truncation: float = 0.5,
        truncated_layers: int | None = None,
        noise: str = "random",
        impl: str = "auto",
    ):
        sides = resolutions(resolution)
        widths = [width(side, channels_base, channels_max) for side in sides]
        super().__init__(
            [side for side in sides for _ in range(2)][1:],
            widths[0],
            noise,
            MappingNetwork(latent_dim, style_dim, mapping_layers),
            2 * len(sides),
            mixing,
            truncation,
            truncated_layers,
        )
        self.resolution, self.impl = resolution, impl
        blocks = [StyleBlocks(StyleBlock(widths[0], widths[0], 3, style_dim, impl=impl))]
        for before, after in pairwise(widths):
            up = StyleBlock(before, after, 3, style_dim, upsample=2, impl=impl)
            blocks.append(StyleBlocks(up, StyleBlock(after, after, 3, style_dim, impl=impl)))
        self.blocks = nn.ModuleList(blocks)
        self.to_rgb = nn.ModuleList([ToRGB(channels, image_channels, style_dim, impl) for channels in widths])

    def forward(
        self,
        z: Tensor | None = None,
        *,
        w: Tensor | None = None,
        noise: Noise = None,
        psi: float | None = None,
        generator: torch.Generator | None = None,
        return_w: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Images; arguments as those of :class:`StyleGAN`."""
        noises = self.noises(noise, self.given(z, w, psi, self.num_layers), generator)
        w = self.styles_of(z, w, psi, generator, self.num_layers)
        x, images, first = self.input(w.shape[0]), None, 0
        for block, to_rgb in zip(self.blocks, self.to_rgb, strict=True):
            # The styles of the colours are those of the convolution that follows in the next resolution.
            last = first + len(block.blocks)
            x = block(x, w[:, first:last], noises[first:last])
            colours = to_rgb(x, w[:, last])
            images = colours if images is None else F.blur2d(images, up=2, impl=self.impl) + colours
            first = last
        images = images.to(self.constant.dtype)
        return (images, w) if return_w else images

    def extra_repr(self) -> str:
        return f"{self.resolution}, {super().extra_repr()}, impl={self.impl!r}"


class ToRGB(nn.Module):
    """Colours of features: a modulated 1x1 convolution without demodulation, plus a bias (arXiv 1912.04958).

    The features are not chained to the convolution that follows (:class:`pixnorm.nn.StyleBlocks`), which has other
    styles: it scales them itself, at a quarter of the pixels that it gives.

    Args:
        in_channels, image_channels, style_dim, impl: as in :class:`pixnorm.ModulatedConv2d`.

    Shape:
        x (N, I, H, W) and w (N, style_dim) to (N, image_channels, H, W), in half precision of float32.
    """

    def __init__(self, in_channels: int, image_channels: int, style_dim: int, impl: str = "auto"):
        super().__init__()
        self.conv = ModulatedConv2d(in_channels, image_channels, 1, style_dim, demodulate=False, impl=impl)
        self.bias = nn.Parameter(torch.zeros(image_channels))

    def reset_parameters(self) -> None:
        """The bias starts at 0."""
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, w: Tensor) -> Tensor:
        """The colours."""
        if (node := traced(self, input, w)) is not None:
            return node
        return wide(self.conv(input, w)) + wide(self.bias)[:, None, None]


def path_gradient(
    images: Tensor, w: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """The gradient of Σ images · noise / √(H W) with respect to the styles: the product of normal noise with the
    Jacobian (arXiv 1912.04958, 3.2). It can be differentiated again.

    Args:
        images: (N, C, H, W).
        w: (N, ...), from which the images were made: ``return_w`` of the networks.
        noise: of the images' shape; None draws it, normal.
        generator: draws it.

    Returns:
        w's shape.

    Raises:
        ValueError: a shape does not fit.
    """
    if images.dim() != 4 or w.shape[:1] != images.shape[:1]:
        found = f"{tuple(images.shape)} and {tuple(w.shape)}"
        raise ValueError(f"expected images (N, C, H, W) and w of as many samples, got {found}")
    if noise is None:
        noise = torch.randn(images.shape, **drawing(generator), dtype=images.dtype, device=images.device)
    check_shape("noise", noise, images.shape, images, "images")
    pixels = images.shape[2] * images.shape[3]
    (gradient,) = torch.autograd.grad((images * noise).sum() * pixels**-0.5, w, create_graph=True)
    return gradient


def path_lengths(
    images: Tensor, w: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """The lengths of :func:`path_gradient` for each sample, whose deviation from their mean StyleGAN 2 penalises:
    ``√(mean over layers of |gradient|²)`` for w (N, layers, style_dim), else ``|gradient|``.

    Args:
        images, w, noise, generator: as in :func:`path_gradient`.

    Returns:
        (N,). Differentiable, but with respect to gradients of 0.
    """
    squares = path_gradient(images, w, noise, generator).square()
    squares = squares.mean(1) if w.dim() == 3 else squares
    return squares.flatten(1).sum(1).sqrt()
