"""The SNGAN generator of the SPN paper (arXiv 2201.10725, Tables 2 and 6) and of the GConv paper (arXiv 2111.15171,
Tables 1 and 2): with batch norm, SPN, their conditional forms, or batch norm modulated by the latent vector; with plain
or generative convolutions."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnorm.nn import BatchNorm2d, ConditionalBatchNorm2d, ConditionalSPN2d, GConv2d, LatentBatchNorm2d, SPN2d
from pixnorm.ops.checks import check_option

# What each norm takes besides the features: the latent vector z, the class y.
NORMS = {"bn": "", "fused_bn": "", "spn": "", "bigbn": "z", "eager_cbn": "y", "cbn": "y", "ccbn": "yz", "cspn": "yz"}
CONVS = ("conv", "gconv")


class EagerConditionalBatchNorm2d(nn.Module):
    """Batch norm with a scale and a shift for each class, of PyTorch's layers: what the fused one is compared with.

    Args:
        num_features, num_classes: C and K.
    """

    def __init__(self, num_features: int, num_classes: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(num_features, affine=False)
        self.gamma = nn.Embedding(num_classes, num_features)
        self.beta = nn.Embedding(num_classes, num_features)
        nn.init.ones_(self.gamma.weight)
        nn.init.zeros_(self.beta.weight)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Normalise x, and scale and shift as the classes y say."""
        gamma, beta = (table(y)[:, :, None, None] for table in (self.gamma, self.beta))
        return self.norm(x) * gamma + beta


class UpBlock(nn.Module):
    """Residual block that doubles the resolution: upsample, norm, ReLU, conv, norm, ReLU, conv, plus the shortcut.

    Upsampling, norm and ReLU are one layer, except with PyTorch's batch norms: those and ReLU commute with upsampling
    and come before it, at a quarter of the cost. SPN does not commute (its kernels see different neighbours).
    The shortcut is an upsampling, after a 1x1 convolution if the number of channels changes; that one is never
    generative.

    Args:
        in_channels, out_channels: of the block.
        norm, conv, impl, bias: as in :class:`Generator`.
        latent_dim: length of the vectors z that modulate ``"bigbn"``, ``"ccbn"``, ``"cspn"`` and ``"gconv"``.
        num_classes: of the conditional norms.
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
        num_classes: int = 0,
        bias: bool = True,
    ):
        super().__init__()
        # Not by isinstance: layers may be wrapped or converted.
        self.norm_takes, self.conv_takes = NORMS[norm], "z" if conv == "gconv" else ""
        if norm in ("bn", "eager_cbn"):
            eager_cbn = partial(EagerConditionalBatchNorm2d, num_classes=num_classes)
            plain = nn.BatchNorm2d if norm == "bn" else eager_cbn
            self.norm1, self.norm2 = plain(in_channels), plain(out_channels)
            self.act1 = nn.Sequential(nn.ReLU(inplace=True), nn.Upsample(scale_factor=2))
            self.act2 = nn.ReLU(inplace=True)
        else:
            of_both = {"num_classes": num_classes, "latent_dim": latent_dim}
            kind = {
                "fused_bn": BatchNorm2d,
                "spn": SPN2d,
                "bigbn": partial(LatentBatchNorm2d, latent_dim=latent_dim),
                "cbn": partial(ConditionalBatchNorm2d, num_classes=num_classes),
                "ccbn": partial(ConditionalBatchNorm2d, **of_both),
                "cspn": partial(ConditionalSPN2d, **of_both),
            }
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

    def forward(self, x: Tensor, z: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """Features of twice the resolution; z and y go to the layers that take them."""
        given = {"z": z, "y": y}
        of_norm, of_conv = ([given[name] for name in takes] for takes in (self.norm_takes, self.conv_takes))
        h = self.conv1(self.act1(self.norm1(x, *of_norm)), *of_conv)
        h = self.conv2(self.act2(self.norm2(h, *of_norm)), *of_conv)
        return h + self.up(self.shortcut(x))


class Generator(nn.Module):
    """The generator for 32x32 images: a fully connected layer to 4x4, three :class:`UpBlock`, norm, ReLU, conv, tanh.

    The last norm is always a batch norm, and the last convolution a plain one. Weights start Glorot uniform,
    with gain √2 for the 3x3 convolutions of the blocks; biases start at 0.

    The SPN paper's is ``norm="bn"`` (4 079 363 parameters) or ``"spn"`` (4 527 875). The GConv paper's is
    ``norm="bigbn", latent_dim=32, bias=False``, with ``conv="conv"`` (3 775 744 parameters, of them 3 538 944 in the
    six convolutions of the blocks) or ``"gconv"`` (4 611 328; 4 374 528, with ten classes 4 389 888). Conditional ones
    of the SPN paper, with ten classes and without biases: ``"cbn"`` (4 101 376), ``"ccbn"`` (4 494 592) and ``"cspn"``
    (5 065 984; with 100 classes 6 448 384).

    Args:
        resolution: of the images; 32.
        norm: in the blocks: ``"bn"``, PyTorch's; ``"fused_bn"``, :class:`pixnorm.BatchNorm2d` with upsampling and ReLU
            in it; ``"spn"``; ``"bigbn"``, :class:`pixnorm.nn.LatentBatchNorm2d`; or conditional: ``"eager_cbn"``, of
            PyTorch's layers, ``"cbn"``, :class:`pixnorm.ConditionalBatchNorm2d`, ``"ccbn"``, the same with the latent
            vector, and ``"cspn"``, :class:`pixnorm.ConditionalSPN2d`, which takes it, too.
        latent_dim: length of a latent vector.
        channels: width of every block.
        impl: of our layers, see :class:`pixnorm.SPN2d`. Does not affect parameters or state-dict keys.
        conv: in the blocks: ``"conv"``, or ``"gconv"``, :class:`pixnorm.GConv2d`.
        num_classes: of a conditional generator, else 0. Conditional norms get the class, and ``"gconv"`` layers beside
            them the latent vector alone. Without conditional norms, ``"bigbn"`` and ``"gconv"`` layers get the latent
            vector followed by the one-hot vector of the class. The fully connected layer never gets the class.
        bias: of the fully connected layer and of all convolutions.

    Shape:
        z (N, latent_dim) and, with classes, y (N) of int64 to (N, 3, resolution, resolution), in (-1, 1).

    Raises:
        ValueError: an unknown ``resolution``, ``norm`` or ``conv``, or classes without a layer that uses them, or
            a conditional norm without classes.
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
        self.num_classes, self.conditional_norm = num_classes, "y" in NORMS[norm]
        if num_classes and not self.conditional_norm and norm != "bigbn" and conv != "gconv":
            raise ValueError(f"num_classes={num_classes} needs norm='bigbn', a conditional norm, or conv='gconv'")
        if self.conditional_norm and not num_classes:
            raise ValueError(f"norm={norm!r} needs num_classes")
        appended = 0 if self.conditional_norm else num_classes

        def block() -> UpBlock:
            of = {"conv": conv, "latent_dim": latent_dim + appended, "num_classes": num_classes, "bias": bias}
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
        if y is not None and (y.shape != z.shape[:1] or y.dtype != torch.int64):
            raise ValueError(f"y must be {z.shape[0]} classes of int64, got {tuple(y.shape)} of {y.dtype}")
        if y is not None and not self.conditional_norm:
            z = torch.cat([z, F.one_hot(y, self.num_classes).to(z.dtype)], dim=1)
        for block in (self.block1, self.block2, self.block3):
            h = block(h, z, y)
        return self.tanh(self.conv(self.act(self.norm(h))))


def _glorot(layer: nn.Module, gain: float = 1.0) -> nn.Module:
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
