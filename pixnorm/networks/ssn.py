r"""Spatially stochastic networks (arXiv 2006.05394): StyleGAN 2's generator with a grid of latent vectors, one for each
block of the image, so that a block can be drawn anew while the rest of the image changes little.

What the paper leaves open is decided in :class:`SSNGenerator`.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as tF
from torch import Tensor, nn

from pixnorm import functional as F
from pixnorm.networks.style2 import path_gradient
from pixnorm.networks.style_base import Noise, NoisyGenerator, check_one_of, resolutions, width
from pixnorm.nn import MappingNetwork, NoiseInjection, SpatiallyModulatedConv2d
from pixnorm.nn._leaf import traced
from pixnorm.nn.equalized import HE
from pixnorm.nn.style import rows_beside
from pixnorm.ops.checks import check_option, check_shape
from pixnorm.ops.common import dense, drawing, is_channels_last, wide

INTERPOLATIONS = ("bilinear", "nearest")


def interpolate_cells(cells: Tensor, size: Sequence[int], mode: str, impl: str = "auto") -> Tensor:
    """A map (N, C, H, W) of cells (N, C, h, w), in their layout: interpolated, or, where there are more cells than
    pixels, means of cells.

    Each is a linear map of a sample's few cells that channels share, so it is a product of matrices: 5 times faster
    than ``F.interpolate``, forward and backward, for 4x4 cells at 64x64 on one core, 2 times for 8x8 cells.

    Args:
        cells: (N, C, h, w).
        size: (H, W), multiples or fractions of (h, w).
        mode: ``"bilinear"`` (cells are at the centres of their blocks; constant beyond those at the border) or
            ``"nearest"``.
        impl: ``"reference"`` does not use products.
    """
    h, w = cells.shape[2:]
    height, width = size
    if (h, w) == (height, width):
        return cells

    def interpolated(x: Tensor) -> Tensor:
        if height < h or width < w:
            return tF.adaptive_avg_pool2d(x, (height, width))
        return tF.interpolate(x, (height, width), mode=mode, align_corners=False if mode == "bilinear" else None)

    if impl == "reference":
        return interpolated(cells)
    each = torch.eye(h * w, dtype=cells.dtype, device=cells.device).view(h * w, 1, h, w)
    weights = interpolated(each).flatten(1)  # (cells, pixels)
    if is_channels_last(cells):
        pixels = weights.mT @ cells.permute(0, 2, 3, 1).flatten(1, 2)  # (N, pixels, C)
        return pixels.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    return (cells.flatten(2) @ weights).unflatten(2, (height, width))


class SpatialStyleBlock(nn.Module):
    r"""A layer of the network: spatially modulated convolution, noise, bias, leaky ReLU with a gain of √2. Upsampling
    is nearest, between the scaling by the styles and the convolution, and followed by a blur.

    The 1x1 convolution that gives styles commutes with the interpolation of cells, so it is done for the cells. All
    after the convolution (and its blur) is one op, :func:`pixnorm.functional.style_epilogue`.

    Args:
        in_channels, out_channels, style_dim: I, O and the length of w.
        upsample: 1 or 2.
        interpolation: of cells, see :func:`interpolate_cells`.
        impl: as in :class:`pixnorm.SpatiallyModulatedConv2d`.

    Shape:
        x (N, I, H, W), w (N, style_dim, h, w) and noise (N, 1, H', W'), (1, 1, H', W') or None, which draws it anew, to
        (N, O, H', W') with H' = H * upsample.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style_dim: int,
        upsample: int = 1,
        interpolation: str = "bilinear",
        impl: str = "auto",
    ):
        super().__init__()
        self.conv = SpatiallyModulatedConv2d(in_channels, out_channels, 3, style_dim, upsample=upsample, impl=impl)
        self.noise = NoiseInjection(1, impl)
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.interpolation = interpolation

    def reset_parameters(self) -> None:
        """The bias starts at 0; the layers inside have methods of their own."""
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, w: Tensor, noise: Tensor | None = None) -> Tensor:
        """The layer's features."""
        if (node := traced(self, input, w, noise)) is not None:
            return node
        styles = _style_map(self.conv, input, w, self.interpolation)
        y, demod = self.conv(input, w, styles=styles, factors_apart=True)
        if self.conv.upsample == 2:
            y = F.blur2d(y, impl=self.conv.impl)
        noise, strength = NoiseInjection.of(self.noise, y, noise)
        demod, strength, bias = rows_beside(y, demod, strength, self.bias)
        return F.style_epilogue(
            y, demod=demod, noise=noise, noise_strength=strength, bias=bias, gain=HE, impl=self.conv.impl
        )


def _style_map(conv: SpatiallyModulatedConv2d, x: Tensor, w: Tensor, mode: str) -> Tensor:
    """The styles of cells at the resolution of x, in its layout."""
    return interpolate_cells(dense(conv.styles(w), x), x.shape[2:], mode, conv.impl)


class SpatialToRGB(nn.Module):
    """Colours of features: a spatially modulated 1x1 convolution without demodulation, plus a bias.

    Args:
        in_channels, image_channels, style_dim, interpolation, impl: as in :class:`SpatialStyleBlock`.

    Shape:
        x (N, I, H, W) and w (N, style_dim, h, w) to (N, image_channels, H, W), in half precision of float32.
    """

    def __init__(
        self,
        in_channels: int,
        image_channels: int,
        style_dim: int,
        interpolation: str = "bilinear",
        impl: str = "auto",
    ):
        super().__init__()
        self.conv = SpatiallyModulatedConv2d(in_channels, image_channels, 1, style_dim, demodulate=False, impl=impl)
        self.bias = nn.Parameter(torch.zeros(image_channels))
        self.interpolation = interpolation

    def reset_parameters(self) -> None:
        """The bias starts at 0; the layers inside have methods of their own."""
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, w: Tensor) -> Tensor:
        """The colours."""
        if (node := traced(self, input, w)) is not None:
            return node
        colours = self.conv(input, w, styles=_style_map(self.conv, input, w, self.interpolation))
        return wide(colours) + wide(self.bias)[:, None, None]


class SSNGenerator(NoisyGenerator):
    r"""The generator of spatially stochastic networks (arXiv 2006.05394): :class:`pixnorm.networks.StyleGAN2` with
    styles for each pixel, from a grid of latent vectors. It has as many parameters.

    Decisions where the paper is silent:

    - The mapping network maps each cell by itself (it is a chain of 1x1 convolutions).
    - Cells are interpolated to the resolution of each convolution's input, bilinearly, each being at the centre of its
      block. Where the grid is finer than the features, as 8x8 cells are at 4x4, their styles are averaged.
    - A layer that upsamples scales its input before, as StyleGAN 2's do.
    - Convolutions have zero padding, and so has the variance by which they are divided: constant grids differ from
      StyleGAN 2 by a factor for each layer, see :func:`pixnorm.functional.spatially_modulated_conv2d`.
    - No mixing, and no truncation unless asked for. All layers get one grid.

    Args:
        resolution, latent_dim, style_dim, mapping_layers, channels_base, channels_max, image_channels, noise: as in
            :class:`pixnorm.networks.StyleGAN2`.
        grid: the number of cells per side, a power of 2 up to the resolution; 4 and 8 in the paper.
        interpolation: ``"bilinear"`` or ``"nearest"``.
        impl: of our layers; does not affect parameters, their names or values.

    Shape:
        z (N, latent_dim, grid, grid) to (N, image_channels, resolution, resolution).

    Raises:
        ValueError: an argument has a value that is not listed above.
    """

    def __init__(
        self,
        resolution: int = 256,
        latent_dim: int = 512,
        style_dim: int = 512,
        *,
        grid: int = 4,
        mapping_layers: int = 8,
        channels_base: int = 32768,
        channels_max: int = 512,
        image_channels: int = 3,
        interpolation: str = "bilinear",
        noise: str = "random",
        impl: str = "auto",
    ):
        check_option("interpolation", interpolation, INTERPOLATIONS)
        sides = resolutions(resolution)
        if grid < 1 or grid & (grid - 1) or grid > resolution:
            raise ValueError(f"grid must be a power of 2 up to the resolution, {resolution}, got {grid!r}")
        widths = [width(side, channels_base, channels_max) for side in sides]
        sizes = [side for side in sides for _ in range(2)][1:]
        super().__init__(sizes, widths[0], noise, MappingNetwork(latent_dim, style_dim, mapping_layers))
        self.resolution, self.grid, self.interpolation, self.impl = resolution, grid, interpolation, impl
        options = {"interpolation": interpolation, "impl": impl}
        layers = [SpatialStyleBlock(widths[0], widths[0], style_dim, **options)]
        for before, after in pairwise(widths):
            layers.append(SpatialStyleBlock(before, after, style_dim, upsample=2, **options))
            layers.append(SpatialStyleBlock(after, after, style_dim, **options))
        self.layers = nn.ModuleList(layers)
        self.to_rgb = nn.ModuleList([SpatialToRGB(c, image_channels, style_dim, **options) for c in widths])

    def styles(self, z: Tensor, *, psi: float = 1.0) -> Tensor:
        """The styles of cells.

        Args:
            z: (N, latent_dim, grid, grid).
            psi: of a truncation towards the mean of the cells of all images.

        Returns:
            (N, style_dim, grid, grid).
        """
        self._check("z", z, self.latent_dim)
        cells = z.permute(0, 2, 3, 1)
        w = self.mapping(cells.flatten(0, 2))
        if psi != 1:
            w = self.mapping.w_avg.to(w.dtype).lerp(w, psi)
        return w.unflatten(0, cells.shape[:3]).permute(0, 3, 1, 2)

    def _check(self, name: str, cells: Tensor, dim: int) -> None:
        if cells.dim() != 4 or tuple(cells.shape[1:]) != (dim, self.grid, self.grid):
            raise ValueError(f"{name} must have shape (N, {dim}, {self.grid}, {self.grid}), got {tuple(cells.shape)}")

    def forward(
        self,
        z: Tensor | None = None,
        *,
        w: Tensor | None = None,
        noise: Noise = None,
        psi: float = 1.0,
        generator: torch.Generator | None = None,
        return_w: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Images.

        Args:
            z: latent vectors of cells; or
            w: (N, style_dim, grid, grid), their styles, which are used as they are.
            noise, generator: as in :meth:`pixnorm.networks.StyleGAN.forward`.
            psi: of :meth:`styles`.
            return_w: also return the styles.
        """
        check_one_of(z, w)
        if w is None:
            self._check("z", z, self.latent_dim)
        else:
            self._check("w", w, self.style_dim)
            if psi != 1:
                raise ValueError("psi is for styles of z; w is used as it is")
        noises = self.noises(noise, z if w is None else w, generator)
        w = self.styles(z, psi=psi) if w is None else w
        x, images = self.input(w.shape[0]), None
        for i, (layer, given) in enumerate(zip(self.layers, noises, strict=True)):
            x = layer(x, w, given)
            if i % 2 == 0:  # the last layer of its resolution
                colours = self.to_rgb[i // 2](x, w)
                images = colours if images is None else F.blur2d(images, up=2, impl=self.impl) + colours
        images = images.to(self.constant.dtype)
        return (images, w) if return_w else images

    def extra_repr(self) -> str:
        sizes = f"{self.resolution}, grid={self.grid}, interpolation={self.interpolation!r}"
        return f"{sizes}, noise={self.noise!r}, impl={self.impl!r}"


def _check_mask(mask: Tensor, of: Tensor) -> None:
    if mask.dtype != torch.bool or mask.dim() != 3 or mask.shape[0] not in (1, of.shape[0]):
        wanted = f"({of.shape[0]}, h, w) or (1, h, w)"
        raise ValueError(f"mask must be bool of shape {wanted}, got {tuple(mask.shape)} of {mask.dtype}")


def resample_blocks(z: Tensor, mask: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Latent vectors in which those of some cells are drawn anew.

    Args:
        z: (N, latent_dim, h, w).
        mask: (N, h, w), or (1, h, w) for all samples, of bool: where.
        generator: draws them; by default PyTorch's.

    Returns:
        z's shape.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    if z.dim() != 4:
        raise ValueError(f"z must have shape (N, latent_dim, h, w), got {tuple(z.shape)}")
    _check_mask(mask, z)
    check_shape("mask", mask, (mask.shape[0], *z.shape[2:]), z, "z")
    drawn = torch.randn(z.shape, **drawing(generator), dtype=z.dtype, device=z.device)
    return torch.where(mask[:, None], drawn, z)


def distortion_loss(images: Tensor, resampled: Tensor, mask: Tensor, weight: float = 100.0) -> Tensor:
    """How much images change outside the blocks that were drawn anew: the mean absolute difference over pixels and
    channels there, of each sample, then over samples. 0 for a sample without such pixels.

    The paper gives the weight for 256x256 FFHQ, and neither the distance nor its scale: L1 and means are decisions.

    Args:
        images, resampled: (N, C, H, W), before and after.
        mask: (N, h, w), or (1, h, w) for all samples, of bool: the blocks that were drawn; H and W are multiples of
            h and w.
        weight: of the loss.

    Returns:
        A scalar, in float32 for half precision.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    if images.dim() != 4:
        raise ValueError(f"images must have shape (N, C, H, W), got {tuple(images.shape)}")
    check_shape("resampled", resampled, images.shape, images, "images")
    _check_mask(mask, images)
    channels, height, width = images.shape[1:]
    h, w = mask.shape[1:]
    if height % h or width % w:
        raise ValueError(f"mask {tuple(mask.shape)} does not divide images of shape {tuple(images.shape)}")
    distances = wide(images - resampled).abs()  # a sum of pixels is beyond float16
    kept = (~mask).to(distances.dtype)
    # Sums over blocks first: the mask is never enlarged.
    of_blocks = distances.sum(1).unflatten(2, (w, -1)).unflatten(1, (h, -1)).sum((2, 4))
    pixels = kept.sum((1, 2)) * (channels * (height // h) * (width // w))
    return weight * ((of_blocks * kept).sum((1, 2)) / pixels.clamp(min=1)).mean()


def path_length_regularizer(
    images: Tensor,
    z: Tensor,
    target: float | Tensor,
    *,
    near: float = 1.0,
    far: float = 0.1,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Low-distortion path length regularisation (arXiv 2006.05394 eq. 15): StyleGAN 2's, with a weight γ_ab for how
    cell a moves block b of the image, ``near`` for a = b and ``far`` otherwise,

        mean over samples of (length - target)²,     length² = Σ_a |Σ_b γ_ab ∂⟨image_b, noise_b⟩/∂z_a|² / (H W)

    The paper reports it as a negative result: no weight lowered the distortion without a loss of quality. The equation
    itself is lost in the text that we have; this one is exactly StyleGAN 2's where both weights are 1, as the paper
    says of its own. It costs a backward for each cell, and one more.

    Args:
        images: (N, C, H, W).
        z: (N, D, h, w), the latent vectors (or styles) of cells from which they were made; H and W are multiples.
        target: the length that is aimed at: a running mean of lengths.
        near, far: γ+ and γ-.
        noise: of the images' shape; None draws it, normal.
        generator: draws it.

    Returns:
        The penalty, a scalar, and the lengths (N,). Both can be differentiated, but with respect to gradients of 0.

    Raises:
        ValueError: a shape does not fit.
    """
    if z.dim() != 4 or images.dim() != 4 or images.shape[2] % z.shape[2] or images.shape[3] % z.shape[3]:
        found = f"{tuple(z.shape)} for images of shape {tuple(images.shape)}"
        raise ValueError(f"z must have shape (N, D, h, w), with sizes that divide those of images, got {found}")
    if noise is None:
        noise = torch.randn(images.shape, **drawing(generator), dtype=images.dtype, device=images.device)
    gradient = far * path_gradient(images, z, noise)
    if near != far:
        h, w = z.shape[2:]
        cells = [_of_block(images, z, noise, a, b) for a in range(h) for b in range(w)]
        gradient = gradient + (near - far) * torch.stack(cells, 2).unflatten(2, (h, w))
    lengths = gradient.square().flatten(1).sum(1).sqrt()
    return (lengths - target).square().mean(), lengths


def _of_block(images: Tensor, z: Tensor, noise: Tensor, a: int, b: int) -> Tensor:
    """(N, D): how cell (a, b) moves its own block."""
    height, width = images.shape[2] // z.shape[2], images.shape[3] // z.shape[3]
    own = torch.zeros_like(noise)
    rows, columns = slice(a * height, (a + 1) * height), slice(b * width, (b + 1) * width)
    own[:, :, rows, columns] = noise[:, :, rows, columns]
    return path_gradient(images, z, own)[:, :, a, b]
