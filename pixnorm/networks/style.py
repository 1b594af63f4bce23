"""The generator of StyleGAN (arXiv 1812.04948). Its discriminator is in ``style_discriminator.py``."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from pixnorm.networks.style_base import Noise, StyleGenerator, check_growth, fades, resolutions, width
from pixnorm.nn import EqualizedConv2d, MappingNetwork, StyleLayer, StyleNorm2d


class StyleGAN(StyleGenerator):
    r"""The generator of StyleGAN (arXiv 1812.04948): a mapping network, and a synthesis network of
    :class:`pixnorm.StyleLayer` on a constant of 4x4, two for each resolution.

    With the standard sizes it has 26 219 627 parameters at 1024x1024, 2 101 248 of them in the mapping network.

    Args:
        resolution: of the images, a power of 2 from 4.
        latent_dim, style_dim: the lengths of z and w.
        mapping_layers: of the mapping network.
        channels_base, channels_max: features of r x r have min(channels_base // r, channels_max) channels.
        image_channels: 3.
        mixing: the probability in training that a sample's later layers take the styles of another latent vector.
        truncation, truncated_layers: in evaluation, psi of the first layers (None: all); for metrics of the paper it is
            1, in a call or here.
        noise: ``"random"`` is drawn for each sample and call; ``"const"`` is that of the buffers ``noise0``, ...;
            ``"none"``.
        progressive: whether images of all resolutions have colours (a 1x1 convolution each), for progressive growing;
            else only those of the last one. In a step those of one resolution get gradients, with ``fade`` of two: in
            DDP with ``find_unused_parameters=True``.
        impl: of our layers, see :class:`pixnorm.StyleLayer`; does not affect parameters, their names or values.

    Shape:
        z (N, latent_dim) to (N, image_channels, resolution, resolution), in the parameters' dtype, under autocast, too.

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
        channels_base: int = 16384,
        channels_max: int = 512,
        image_channels: int = 3,
        mixing: float = 0.9,
        truncation: float = 0.7,
        truncated_layers: int | None = 8,
        noise: str = "random",
        progressive: bool = True,
        impl: str = "auto",
    ):
        sides = resolutions(resolution)
        widths = [width(side, channels_base, channels_max) for side in sides]
        super().__init__(
            [side for side in sides for _ in range(2)],
            widths[0],
            noise,
            MappingNetwork(latent_dim, style_dim, mapping_layers),
            2 * len(sides),
            mixing,
            truncation,
            truncated_layers,
        )
        self.resolution, self.progressive, self.impl = resolution, progressive, impl
        layers = [
            StyleNorm2d(widths[0], style_dim, impl=impl),
            StyleLayer(widths[0], widths[0], 3, style_dim, impl=impl),
        ]
        for before, after in pairwise(widths):
            layers += [
                StyleLayer(before, after, 3, style_dim, upsample=2, impl=impl),
                StyleLayer(after, after, 3, style_dim, impl=impl),
            ]
        self.layers = nn.ModuleList(layers)
        of_colours = [(side, w) for side, w in zip(sides, widths, strict=True) if progressive or side == resolution]
        self.to_rgb = nn.ModuleDict(
            {str(side): EqualizedConv2d(w, image_channels, 1, gain=1.0) for side, w in of_colours}
        )

    def reset_parameters(self) -> None:
        """The constant starts at 1, the constant noises normal; the layers inside have methods of their own."""
        super().reset_parameters()
        nn.init.ones_(self.constant)

    def forward(
        self,
        z: Tensor | None = None,
        *,
        w: Tensor | None = None,
        noise: Noise = None,
        psi: float | None = None,
        resolution: int | None = None,
        fade: float = 1.0,
        generator: torch.Generator | None = None,
        return_w: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Images.

        Args:
            z: latent vectors; or
            w: (N, style_dim), or (N, layers, style_dim), styles that are used as they are.
            noise: ``"random"``, ``"const"``, ``"none"``, or a list of a tensor for each layer, (N, 1, H, W) or
                (1, 1, H, W), or None, which is drawn; by default the network's.
            psi: of the truncation; by default 1 in training, else the network's.
            resolution: of a network that grows, at present; by default the last.
            fade: the weight of the colours of the newest resolution, against those of the one before, upsampled.
            generator: draws noise and what is mixed; by default PyTorch's.
            return_w: also return the styles of the layers in use, of which the images have gradients.
        """
        size = self.resolution if resolution is None else resolution
        count = 2 * len(check_growth(size, fade, self.resolution, self.progressive))
        noises = self.noises(noise, self.given(z, w, psi, count), generator, count)
        w = self.styles_of(z, w, psi, generator, count)
        x, before = self.input(w.shape[0]), None
        for i, (layer, given) in enumerate(zip(self.layers[:count], noises, strict=True)):
            if i == count - 2:
                before = x  # the features of half the resolution
            x = layer(x, w[:, i], given)
        images = self.to_rgb[str(size)](x)
        if fades(fade):
            old = nn.functional.interpolate(self.to_rgb[str(size // 2)](before), scale_factor=2, mode="nearest")
            images = old.lerp(images, fade)
        images = images.to(self.constant.dtype)
        return (images, w) if return_w else images

    def extra_repr(self) -> str:
        return f"{self.resolution}, {super().extra_repr()}, progressive={self.progressive}, impl={self.impl!r}"
