"""The SNGANs of the SPN paper (arXiv 2201.10725, Tables 1 and 2) and of the GConv paper (arXiv 2111.15171, Tables 1
and 2): the generators, with batch norm, SPN, their conditional forms, or batch norm modulated by the latent vector;
with plain or generative convolutions. The discriminators are in :mod:`pixnorm.networks.sngan_discriminator`."""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from pixnorm.nn import (
    BatchNorm2d,
    ChannelGate,
    ConditionalBatchNorm2d,
    ConditionalSPN2d,
    GConv2d,
    LatentBatchNorm2d,
    SpatialGate,
    SPN2d,
    UpsampleConv2d,
)
from pixnorm.ops._dispatch import IMPLS
from pixnorm.ops.checks import check_classes, check_option

# What each norm takes besides the features: the latent vector z, the class y.
NORMS = {"bn": "", "fused_bn": "", "spn": "", "bigbn": "z", "eager_cbn": "y", "cbn": "y", "ccbn": "yz", "cspn": "yz"}
EAGER = ("bn", "eager_cbn")  # PyTorch's layers
PIXELWISE = {"spn": "fused_bn", "cspn": "cbn"}  # and what blocks of low resolution have in their place
CONVS = ("conv", "gconv")
ATTENTIONS = (None, "ca", "sa")
ACTIVATIONS = {"relu": partial(nn.ReLU, inplace=True), "elu": nn.ELU, "glu": partial(nn.GLU, dim=1)}


class Widths(NamedTuple):
    """Of a generator: the first block's input, the output of each block, and the first resolution with SPN."""

    first: int
    blocks: tuple[int, ...]
    spn_from: int


# The papers have no network for 64 pixels: it is that for 128 without one of the blocks of 512.
GENERATORS = {
    32: Widths(256, (256, 256, 256), 8),
    64: Widths(512, (512, 256, 128, 64), 32),
    128: Widths(512, (512, 512, 256, 128, 64), 32),
    256: Widths(512, (512, 512, 256, 128, 64, 32), 32),
}


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
    """Residual block that doubles the resolution: upsample, norm, activation, conv, norm, activation, conv, plus the
    shortcut.

    Batch norms and activations commute with upsampling: they come before it, and it is part of the first convolution
    (:func:`pixnorm.functional.upsample_conv2d`). SPN does not commute (its kernels see different neighbours): there
    upsampling, norm and ReLU are one layer. The shortcut is an upsampling and, if the number of channels changes, a 1x1
    convolution, which comes first: they commute, too. With ``impl="reference"`` it comes last, as in the papers, whose
    counts of operations include it so. It is never generative.

    Args:
        in_channels, out_channels: of the block; with ``"glu"`` input and output have twice as many.
        norm, conv, impl, bias, activation, attention: as in :class:`Generator`.
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
        activation: str = "relu",
        attention: str | None = None,
    ):
        super().__init__()
        # Not by isinstance: layers may be wrapped or converted.
        self.norm_takes, self.conv_takes = NORMS[norm], "z" if conv == "gconv" else ""
        halves = 2 if activation == "glu" else 1
        taken, made = halves * in_channels, halves * out_channels
        kinds = {
            "bn": nn.BatchNorm2d,
            "eager_cbn": partial(EagerConditionalBatchNorm2d, num_classes=num_classes),
            "fused_bn": partial(BatchNorm2d, impl=impl),
            "spn": partial(SPN2d, impl=impl),
            "bigbn": partial(LatentBatchNorm2d, latent_dim=latent_dim, impl=impl),
            "cbn": partial(ConditionalBatchNorm2d, num_classes=num_classes, impl=impl),
            "ccbn": partial(ConditionalBatchNorm2d, num_classes=num_classes, latent_dim=latent_dim, impl=impl),
            "cspn": partial(ConditionalSPN2d, num_classes=num_classes, latent_dim=latent_dim, impl=impl),
        }
        upsampled = norm in PIXELWISE  # by the norm
        fused = {"activation": "relu"} if activation == "relu" and norm not in EAGER else {}
        self.norm1 = kinds[norm](taken, **fused, **({"upsample": 2} if upsampled else {}))
        self.norm2 = kinds[norm](made, **fused)
        self.act1, self.act2 = (nn.Identity() if fused else ACTIVATIONS[activation]() for _ in range(2))
        if norm in EAGER:
            self.act1, upsampled = nn.Sequential(self.act1, nn.Upsample(scale_factor=2)), True

        def convolution(size: int, upsample: int) -> nn.Module:
            options = {"padding": 1, "bias": bias}
            if conv == "gconv":
                layer = GConv2d(size, made, 3, latent_dim, upsample=upsample, impl=impl, **options)
            elif upsample == 2:
                layer = UpsampleConv2d(size, made, 3, impl=impl, **options)
            else:
                layer = nn.Conv2d(size, made, 3, **options)
            return glorot(layer, gain=2**0.5)

        self.conv1 = convolution(in_channels, 1 if upsampled else 2)
        self.conv2 = convolution(out_channels, 1)
        self.gate1, self.gate2 = nn.Identity(), nn.Identity()
        if attention == "ca":
            self.gate1, self.gate2 = (ChannelGate(made, min(16, made), impl=impl) for _ in range(2))
        elif attention == "sa":
            self.gate2 = SpatialGate(impl=impl)
        self.shortcut = nn.Identity() if taken == made else glorot(nn.Conv2d(taken, made, 1, bias=bias))
        self.up = nn.Upsample(scale_factor=2)
        self.plain = impl == "reference"

    def forward(self, x: Tensor, z: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """Features of twice the resolution; z and y go to the layers that take them."""
        given = {"z": z, "y": y}
        of_norm, of_conv = ([given[name] for name in takes] for takes in (self.norm_takes, self.conv_takes))
        h = self.gate1(self.conv1(self.act1(self.norm1(x, *of_norm)), *of_conv))
        h = self.gate2(self.conv2(self.act2(self.norm2(h, *of_norm)), *of_conv))
        return h + (self.shortcut(self.up(x)) if self.plain else self.up(self.shortcut(x)))


class Generator(nn.Module):
    """The generator: a fully connected layer to 4x4, an :class:`UpBlock` for each doubling, norm, ReLU, conv, tanh.

    The last norm is always a batch norm, and the last convolution a plain one. Weights start Glorot uniform,
    with gain √2 for the 3x3 convolutions of the blocks; biases start at 0.

    Blocks have 256 channels at 32 pixels; 512, 256, 128, 64 at 64; 512, 512, 256, 128, 64 at 128; and 512, 512, 256,
    128, 64, 32 at 256. Parameters at 32 pixels:

    - the SPN paper's: ``norm="bn"`` 4 079 363, ``"spn"`` 4 527 875; with channels that make up for the difference
      (``norm="bn", width=271, bias=False``) 4 533 974. With ten classes and ``bias=False``: ``"cbn"`` 4 101 376,
      ``"ccbn"`` 4 494 592, ``"cspn"`` 5 065 984; with 100 classes 6 448 384.
    - the GConv paper's: ``norm="bigbn", latent_dim=32, bias=False`` with ``conv="conv"`` 3 775 744, of them 3 538 944
      in the six convolutions of the blocks, or ``"gconv"`` 4 611 328 (4 374 528; with ten classes 4 389 888).
      ``channels=285`` makes up for the difference in plain convolutions (4 386 150).

    At 128 pixels: ``"bn"`` 13 000 451, ``"spn"`` 13 478 915, ``"cspn"`` with 200 classes 17 323 395.

    Args:
        resolution: of the images: 32, 64, 128 or 256.
        norm: in the blocks: ``"bn"``, PyTorch's; ``"fused_bn"``, :class:`pixnorm.BatchNorm2d`; ``"spn"``; ``"bigbn"``,
            :class:`pixnorm.nn.LatentBatchNorm2d`; or conditional: ``"eager_cbn"``, of PyTorch's layers, ``"cbn"``,
            :class:`pixnorm.ConditionalBatchNorm2d`, ``"ccbn"``, the same with the latent vector, and ``"cspn"``,
            :class:`pixnorm.ConditionalSPN2d`, which takes it, too.
        latent_dim: length of a latent vector.
        channels: of the widest block; the others are narrower in proportion. None: the paper's, 256 or 512.
        impl: of our layers, see :class:`pixnorm.SPN2d`. Does not affect parameters or state-dict keys.
        conv: in the blocks: ``"conv"``, or ``"gconv"``, :class:`pixnorm.GConv2d`.
        num_classes: of a conditional generator, else 0. Conditional norms get the class, and ``"gconv"`` layers beside
            them the latent vector alone. Without conditional norms, ``"bigbn"`` and ``"gconv"`` layers get the latent
            vector followed by the one-hot vector of the class. The fully connected layer never gets the class.
        bias: of the fully connected layer and of all convolutions.
        attention: ``"ca"``, :class:`pixnorm.nn.ChannelGate` after every convolution of the blocks (GConv-dagger of the
            GConv paper); ``"sa"``, :class:`pixnorm.nn.SpatialGate` at the end of each block, before the shortcut is
            added (Table 10 of the SPN paper); or None.
        activation: ``"relu"``, or of the GConv paper's Table 5 ``"elu"`` or ``"glu"``: then every layer that feeds a
            gated linear unit has twice the channels.
        width: as ``channels``, of the blocks alone: the fully connected layer keeps its size.
        spectral_norm: of the weights of convolutions and fully connected layers, those in ``"bigbn"`` among them. The
            papers have it above 32 pixels.
        spn_from: with ``"spn"`` and ``"cspn"``, the output resolution of the first block that has them; those before
            it have batch norm, with the class's scale and shift in a ``"cspn"`` generator. None: as in the paper, all
            blocks at 32 pixels and those from 32 at higher resolution.

    Shape:
        z (N, latent_dim) and, with classes, y (N) of int64 to (N, 3, resolution, resolution), in (-1, 1).

    Raises:
        ValueError: an argument has a value that is not listed above, or classes without a layer that uses them, or
            a conditional norm without classes.
    """

    def __init__(
        self,
        resolution: int = 32,
        norm: str = "bn",
        latent_dim: int = 128,
        channels: int | None = None,
        impl: str = "auto",
        *,
        conv: str = "conv",
        num_classes: int = 0,
        bias: bool = True,
        attention: str | None = None,
        activation: str = "relu",
        width: int | None = None,
        spectral_norm: bool = False,
        spn_from: int | None = None,
    ):
        super().__init__()
        of_paper = widths_of(GENERATORS, resolution)
        check_option("norm", norm, NORMS)
        check_option("conv", conv, CONVS)
        check_option("impl", impl, IMPLS)
        check_option("attention", attention, ATTENTIONS)
        check_option("activation", activation, ACTIVATIONS)
        if num_classes < 0:
            raise ValueError(f"num_classes must not be negative, got {num_classes}")
        self.num_classes, self.conditional_norm = num_classes, "y" in NORMS[norm]
        if num_classes and not self.conditional_norm and norm != "bigbn" and conv != "gconv":
            raise ValueError(f"num_classes={num_classes} needs norm='bigbn', a conditional norm, or conv='gconv'")
        if self.conditional_norm and not num_classes:
            raise ValueError(f"norm={norm!r} needs num_classes")
        resolutions = [4 * 2 ** (i + 1) for i in range(len(of_paper.blocks))]
        if spn_from is not None and (norm not in PIXELWISE or spn_from not in resolutions):
            raise ValueError(f"spn_from must be one of {resolutions}, with SPN, got {spn_from} with norm={norm!r}")
        of = {
            "conv": conv,
            "latent_dim": latent_dim + (0 if self.conditional_norm else num_classes),
            "num_classes": num_classes,
            "bias": bias,
            "activation": activation,
            "attention": attention,
        }
        first = scaled(of_paper.first, of_paper.first, channels)
        widths = [scaled(size, of_paper.first, width or channels) for size in of_paper.blocks]
        halves = 2 if activation == "glu" else 1
        self.fc = glorot(nn.Linear(latent_dim, halves * first * 4 * 4, bias=bias))
        self.blocks = len(widths)
        before, spn_from = first, spn_from or of_paper.spn_from
        for i, (size, here) in enumerate(zip(widths, resolutions, strict=True), 1):
            kind = PIXELWISE.get(norm, norm) if here < spn_from else norm
            self.add_module(f"block{i}", UpBlock(before, size, kind, impl, **of))
            before = size
        fused = norm not in EAGER
        if fused:
            relu = "relu" if activation == "relu" else None
            self.norm = BatchNorm2d(halves * before, activation=relu, impl=impl)
        else:
            self.norm = nn.BatchNorm2d(halves * before)
        self.act = nn.Identity() if fused and activation == "relu" else ACTIVATIONS[activation]()
        self.conv = glorot(nn.Conv2d(before, 3, 3, padding=1, bias=bias))
        self.tanh = nn.Tanh()
        if spectral_norm:
            normalize_spectrally(self)

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Images from latent vectors and, in a conditional generator, classes."""
        check_classes_given(self, "generator", z.shape[0], y)
        h = self.fc(z).unflatten(1, (-1, 4, 4))
        if y is not None and not self.conditional_norm:
            z = torch.cat([z, F.one_hot(y, self.num_classes).to(z.dtype)], dim=1)
        for i in range(self.blocks):
            h = self.get_submodule(f"block{i + 1}")(h, z, y)
        return self.tanh(self.conv(self.act(self.norm(h))))


def widths_of(table: dict[int, NamedTuple], resolution: int) -> NamedTuple:
    """Those of a network for that resolution."""
    if resolution not in table:
        raise ValueError(f"resolution must be one of {', '.join(map(str, table))}, got {resolution!r}")
    return table[resolution]


def check_classes_given(network: nn.Module, title: str, n: int, y: Tensor | None) -> None:
    """A class for each sample, if the network has classes."""
    if (y is None) == bool(network.num_classes):
        raise ValueError(f"a {title} of {network.num_classes} classes got {'no ' if y is None else ''}classes")
    if y is None:
        return
    if y.shape != (n,) or y.dtype != torch.int64:
        raise ValueError(f"y must be {n} classes of int64, got {tuple(y.shape)} of {y.dtype}")
    check_classes(y, n, network.num_classes)  # here, as spectral norm moves its vectors before an embedding would look


def scaled(size: int, widest: int, wanted: int | None) -> int:
    """The channels of a layer of the paper, in a network whose widest layer has another number of them, or None."""
    if wanted is None:
        return size
    if wanted * size % widest or wanted < 1:
        raise ValueError(f"channels must be a positive multiple of {widest // size}, got {wanted}")
    return wanted * size // widest


def glorot(layer: nn.Module, gain: float = 1.0) -> nn.Module:
    """The initialisation of the papers' networks."""
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def normalize_spectrally(network: nn.Module) -> None:
    """Spectral norm on the weights of convolutions, fully connected layers and embeddings. Gates and the layers of SPN
    consist of none of these, and have none. One power iteration in each forward pass in training."""
    for module in list(network.modules()):
        if not isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding | GConv2d):
            continue
        for weight in ("weight", "scale_weight", "mix_weight") if isinstance(module, GConv2d) else ("weight",):
            parametrizations.spectral_norm(module, weight)
