"""The SNGAN generator of the SPN paper (arXiv 2201.10725, Tables 2 and 6) and of the GConv paper (arXiv 2111.15171,
Tables 1 and 2): with batch norm, SPN, or batch norm modulated by the latent vector; with plain or generative
convolutions."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnorm.nn import BatchNorm2d, GConv2d, LatentBatchNorm2d, SPN2d
from pixnorm.ops.checks import check_option

NORMS = ("bn", "fused_bn", "spn", "bigbn")
CONVS = ("conv", "gconv")


class UpBlock(nn.Module):
    """Residual block that doubles the resolution: upsample, norm, ReLU, conv, norm, ReLU, conv, plus the shortcut.

    Upsampling, norm and ReLU are one layer, except with plain batch norm: that and ReLU commute with upsampling and
    come before it, at a quarter of the cost. SPN does not commute (its kernels see different neighbours).
    The shortcut is an upsampling, after a 1x1 convolution if the number of channels changes; that one is never
    generative.

    Args:
        in_channels, out_channels: of the block.
        norm, conv, impl, bias: as in :class:`Generator`.
        latent_dim: length of the vectors that modulate ``"bigbn"`` and ``"gconv"``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: str,
        impl: str = "auto",
        *,
        conv: str = "conv",
        latent_dim: int = 0,
        bias: bool = True,
    ):
        super().__init__()
        self.latent_norm, self.latent_conv = norm == "bigbn", conv == "gconv"
        if norm == "bn":
            self.norm1, self.norm2 = nn.BatchNorm2d(in_channels), nn.BatchNorm2d(out_channels)
            self.act1 = nn.Sequential(nn.ReLU(inplace=True), nn.Upsample(scale_factor=2))
            self.act2 = nn.ReLU(inplace=True)
        else:
            kind = {"fused_bn": BatchNorm2d, "spn": SPN2d, "bigbn": partial(LatentBatchNorm2d, latent_dim=latent_dim)}
            self.norm1 = kind[norm](in_channels, upsample=2, activation="relu", impl=impl)
            self.norm2 = kind[norm](out_channels, activation="relu", impl=impl)
            self.act1, self.act2 = nn.Identity(), nn.Identity()

        def convolution(size: int) -> nn.Conv2d | GConv2d:
            if conv == "gconv":
                layer = GConv2d(size, out_channels, 3, latent_dim, padding=1, bias=bias, impl=impl)
            else:
                layer = nn.Conv2d(size, out_channels, 3, padding=1, bias=bias)
            return _glorot(layer, gain=2**0.5)

        self.conv1 = convolution(in_channels)
        self.conv2 = convolution(out_channels)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else _glorot(nn.Conv2d(in_channels, out_channels, 1, bias=bias))
        self.up = nn.Upsample(scale_factor=2)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Features of twice the resolution; z goes to the layers that take it."""
        # Not by isinstance: layers may be wrapped or converted.
        of_norm, of_conv = ((z,) if takes else () for takes in (self.latent_norm, self.latent_conv))
        h = self.conv1(self.act1(self.norm1(x, *of_norm)), *of_conv)
        h = self.conv2(self.act2(self.norm2(h, *of_norm)), *of_conv)
        return h + self.up(self.shortcut(x))


class Generator(nn.Module):
    """The generator for 32x32 images: a fully connected layer to 4x4, three :class:`UpBlock`, norm, ReLU, conv, tanh.

    The last norm is always a batch norm, and the last convolution a plain one. Weights start Glorot uniform,
    with gain √2 for the 3x3 convolutions of the blocks; biases start at 0.

    The SPN paper's is ``norm="bn"`` (4 079 363 parameters) or ``"spn"`` (4 527 875). The GConv paper's is
    ``norm="bigbn", latent_dim=32, bias=False``, with ``conv="conv"`` (3 775 744 parameters, of them 3 538 944 in the
    six convolutions of the blocks) or ``"gconv"`` (4 611 328; 4 374 528, with ten classes 4 389 888).

    Args:
        resolution: of the images; 32.
        norm: in the blocks: ``"bn"``, PyTorch's; ``"fused_bn"``, :class:`pixnorm.BatchNorm2d` with upsampling and ReLU
            in it; ``"spn"``; or ``"bigbn"``, :class:`pixnorm.nn.LatentBatchNorm2d`.
        latent_dim: length of a latent vector.
        channels: width of every block.
        impl: of our layers, see :class:`pixnorm.SPN2d`. Does not affect parameters or state-dict keys.
        conv: in the blocks: ``"conv"``, or ``"gconv"``, :class:`pixnorm.GConv2d`.
        num_classes: of a conditional generator, else 0. Its ``"bigbn"`` and ``"gconv"`` layers get the latent vector
            followed by the one-hot vector of the class; the fully connected layer does not.
        bias: of the fully connected layer and of all convolutions.

    Shape:
        z (N, latent_dim) and, with classes, y (N) of int64 to (N, 3, resolution, resolution), in (-1, 1).

    Raises:
        ValueError: an unknown ``resolution``, ``norm`` or ``conv``, or classes without a layer that uses them.
    """

    def __init__(
        self,
        resolution: int = 32,
        norm: str = "bn",
        latent_dim: int = 128,
        channels: int = 256,
        impl: str = "auto",
        *,
        conv: str = "conv",
        num_classes: int = 0,
        bias: bool = True,
    ):
        super().__init__()
        if resolution != 32:
            raise ValueError(f"resolution must be 32, got {resolution!r}")
        check_option("norm", norm, NORMS)
        check_option("conv", conv, CONVS)
        if num_classes < 0:
            raise ValueError(f"num_classes must not be negative, got {num_classes}")
        if num_classes and norm != "bigbn" and conv != "gconv":
            raise ValueError(f"num_classes={num_classes} needs norm='bigbn' or conv='gconv'")
        self.num_classes = num_classes

        def block() -> UpBlock:
            of = {"conv": conv, "latent_dim": latent_dim + num_classes, "bias": bias}
            return UpBlock(channels, channels, norm, impl, **of)

        self.fc = _glorot(nn.Linear(latent_dim, channels * 4 * 4, bias=bias))
        self.block1, self.block2, self.block3 = block(), block(), block()
        fused = norm == "fused_bn"
        self.norm = BatchNorm2d(channels, activation="relu", impl=impl) if fused else nn.BatchNorm2d(channels)
        self.act = nn.Identity() if fused else nn.ReLU(inplace=True)
        self.conv = _glorot(nn.Conv2d(channels, 3, 3, padding=1, bias=bias))
        self.tanh = nn.Tanh()

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Images from latent vectors and, in a conditional generator, classes."""
        h = self.fc(z).unflatten(1, (-1, 4, 4))
        if (y is None) == bool(self.num_classes):
            raise ValueError(f"a generator of {self.num_classes} classes got {'no ' if y is None else ''}classes")
        if y is not None:
            if y.shape != z.shape[:1] or y.dtype != torch.int64:
                raise ValueError(f"y must be {z.shape[0]} classes of int64, got {tuple(y.shape)} of {y.dtype}")
            z = torch.cat([z, F.one_hot(y, self.num_classes).to(z.dtype)], dim=1)
        h = self.block3(self.block2(self.block1(h, z), z), z)
        return self.tanh(self.conv(self.act(self.norm(h))))


def _glorot(layer: nn.Module, gain: float = 1.0) -> nn.Module:
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
