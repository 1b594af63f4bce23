"""The generator and the image encoder of SPADE (arXiv 1903.07291), as in NVlabs/SPADE.

The discriminator is in ``spade_discriminator.py``; :func:`pixnorm.networks.from_nvlabs` reads released checkpoints.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from pixnorm.functional import label_conv2d
from pixnorm.nn import InstanceNorm2d, SPADE2d
from pixnorm.nn._label_patches import LabelPatches
from pixnorm.nn.spade import check_label_map, resized_map
from pixnorm.ops.checks import check_image, check_option, check_shape
from pixnorm.ops.common import drawing
from pixnorm.ops.label_conv import check_labels

# Doublings of the resolution, by NVlabs' option num_upsampling_layers.
UPSAMPLINGS = {"normal": 5, "more": 6, "most": 7}


def nvlabs_init(layer: nn.Module) -> nn.Module:
    """Draw a layer's weights as NVlabs/SPADE does: normal, Glorot's variance with gain 0.02; biases are 0."""
    if isinstance(layer, SPADE2d):  # two layers there, so each half has a fan of its own
        weights = [layer.shared_weight, *layer.weight.data.chunk(2)]
        biases = [layer.shared_bias, layer.bias]
    else:
        weights, biases = [layer.weight], [] if layer.bias is None else [layer.bias]
    for weight in weights:
        nn.init.xavier_normal_(weight, gain=0.02)
    for bias in biases:
        nn.init.zeros_(bias)
    return layer


def check_positive(**sizes: int) -> None:
    """Sizes of a network are positive, or a ValueError names the one that is not."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be positive, got {size}")


class SPADEBlock(nn.Module):
    """Residual block of SPADE's generator (``SPADEResnetBlock``): twice SPADE, leaky ReLU 0.2 and a 3x3 convolution.

    The shortcut is the input or, where the number of channels changes, a 1x1 convolution without bias of a SPADE
    without activation. All three convolutions have spectral norm; those inside the SPADE layers do not.

    Args:
        in_channels, out_channels: of the block; between the convolutions the smaller of both.
        label_channels, hidden_channels, statistics: as in :class:`pixnorm.SPADE2d`.
        upsample: 2 is the block of the nearest-upsampled input. Upsampling is part of the norms that need it, whose
            statistics stay at low resolution.
        impl: as in :class:`pixnorm.SPADE2d`.

    Shape:
        x (N, in_channels, H, W) and a label map (N, h, w) of int64 or (N, label_channels, h, w) of floating point, of
        any size, to (N, out_channels, H * upsample, W * upsample).

    Raises:
        ValueError: an argument is out of range, or the label map does not fit.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        label_channels: int,
        hidden_channels: int = 128,
        *,
        upsample: int = 1,
        statistics: str = "batch",
        impl: str = "auto",
    ):
        super().__init__()
        check_positive(in_channels=in_channels, out_channels=out_channels)
        middle = min(in_channels, out_channels)

        def norm(channels: int, upsample: int = 1, activation: str | None = "leaky_relu") -> SPADE2d:
            options = {"statistics": statistics, "upsample": upsample, "activation": activation, "impl": impl}
            return nvlabs_init(SPADE2d(channels, label_channels, hidden_channels, **options))

        def convolution(of: int, to: int, size: int, bias: bool = True) -> nn.Conv2d:
            return spectral_norm(nvlabs_init(nn.Conv2d(of, to, size, padding=size // 2, bias=bias)))

        self.upsample = upsample
        self.norm1 = norm(in_channels, upsample)
        self.conv1 = convolution(in_channels, middle, 3)
        self.norm2 = norm(middle)
        self.conv2 = convolution(middle, out_channels, 3)
        learned = in_channels != out_channels
        self.norm_shortcut = norm(in_channels, upsample, activation=None) if learned else None
        self.conv_shortcut = convolution(in_channels, out_channels, 1, bias=False) if learned else None

    def forward(self, x: Tensor, segmap: Tensor, patches: LabelPatches | None = None) -> Tensor:
        """Features at ``upsample`` times the resolution; the patches are those of :class:`pixnorm.SPADE2d`."""
        h = self.conv1(self.norm1(x, segmap, patches))
        h = self.conv2(self.norm2(h, segmap, patches))
        if self.conv_shortcut is not None:
            return h + self.conv_shortcut(self.norm_shortcut(x, segmap, patches))
        return h + (F.interpolate(x, scale_factor=2, mode="nearest") if self.upsample == 2 else x)


class SPADEGenerator(nn.Module):
    """SPADE's generator: an image from a label map and, in a variational autoencoder, a latent vector.

    A start at low resolution, seven :class:`SPADEBlock` (eight with ``upsampling="most"``) of width 16, 16, 16, 8, 4,
    2, 1 (and 1/2) times ``width``, leaky ReLU, a 3x3 convolution and tanh. The start is a 3x3 convolution of the
    resized label map, or with ``latent_dim`` a linear layer of the latent vector.

    As in NVlabs' code, ``upsampling`` fixes how often the resolution doubles, and with ``resolution`` where it starts:
    ``"normal"`` five times (256 from 8x8, as published; 64 from 2x2, 128 from 4x4, 512 from 16x16), ``"more"`` six
    times (512 from 8x8), ``"most"`` seven times (512 from 4x4). With ``"normal"`` and ``latent_dim=0`` all resolutions
    thus have the same parameters: with 19 labels 92 538 819 (109 205 443 with a latent vector of 256 at 256 pixels).

    Weights start as NVlabs', normal with gain 0.02.

    Args:
        resolution: width of the images; a multiple of 32, 64 or 128, by ``upsampling``.
        label_channels: L, the number of labels.
        width: that of the last block (``ngf``).
        latent_dim: length of the latent vectors z; 0 for none.
        aspect_ratio: width over height of the images.
        upsampling: ``"normal"``, ``"more"`` or ``"most"``.
        hidden_channels, statistics: as in :class:`pixnorm.SPADE2d`.
        impl: of our layers, see :class:`pixnorm.SPADE2d`. Does not affect parameters or state-dict keys.

    Shape:
        Label map (N, h, w) of int64, or one-hot or soft (N, L, h, w), of any size (best that of the images), and z
        (N, latent_dim) to (N, 3, resolution / aspect_ratio, resolution), in (-1, 1). Without z it is drawn, normal.

    Raises:
        ValueError: an argument is out of range; the label map or z does not fit.
    """

    def __init__(
        self,
        resolution: int = 256,
        label_channels: int = 19,
        width: int = 64,
        latent_dim: int = 0,
        impl: str = "auto",
        *,
        aspect_ratio: float = 1.0,
        upsampling: str = "normal",
        hidden_channels: int = 128,
        statistics: str = "batch",
    ):
        super().__init__()
        check_option("upsampling", upsampling, tuple(UPSAMPLINGS))
        doublings = UPSAMPLINGS[upsampling]
        if resolution < 1 or resolution % 2**doublings:
            raise ValueError(f"resolution must be a multiple of {2**doublings} ({upsampling=}), got {resolution}")
        check_positive(label_channels=label_channels, width=width)
        if latent_dim < 0:
            raise ValueError(f"latent_dim must not be negative, got {latent_dim}")
        columns = resolution >> doublings
        rows = round(columns / aspect_ratio) if aspect_ratio > 0 else 0
        if rows < 1:
            raise ValueError(f"aspect_ratio must leave a row at the start ({columns} columns), got {aspect_ratio}")
        self.label_channels, self.latent_dim, self.impl = label_channels, latent_dim, impl
        self.start = rows, columns

        widths = [16 * width, 16 * width, 16 * width, 16 * width, 8 * width, 4 * width, 2 * width, width]
        doubling = [False, True, upsampling != "normal", True, True, True, True]
        if upsampling == "most":
            check_positive(**{"width // 2": width // 2})
            widths.append(width // 2)
            doubling.append(True)
        if latent_dim:
            self.fc = nvlabs_init(nn.Linear(latent_dim, widths[0] * rows * columns))
        else:
            self.fc = nvlabs_init(nn.Conv2d(label_channels, widths[0], 3, padding=1))
        options = {"hidden_channels": hidden_channels, "statistics": statistics, "impl": impl}
        self.blocks = nn.ModuleList(
            SPADEBlock(of, to, label_channels, upsample=2 if doubles else 1, **options)
            for (of, to), doubles in zip(pairwise(widths), doubling, strict=True)
        )
        self.conv_img = nvlabs_init(nn.Conv2d(widths[-1], 3, 3, padding=1))

    def forward(self, segmap: Tensor, z: Tensor | None = None) -> Tensor:
        """Images of the label maps."""
        self._check(segmap, z)
        size = list(self.start)
        resized = resized_map(segmap, size)
        patches = LabelPatches.of(resized, self.label_channels, self.impl)
        x = self._first(resized, z)
        for block in self.blocks:
            if block.upsample == 2:  # once for all norms of a resolution
                size = [2 * side for side in size]
                resized = resized_map(segmap, size)
                patches = LabelPatches.of(resized, self.label_channels, self.impl)
            x = block(x, resized, patches)
        return torch.tanh(self.conv_img(F.leaky_relu(x, 0.2)))

    def _check(self, segmap: Tensor, z: Tensor | None) -> None:
        check_label_map(segmap, self.label_channels)
        if segmap.dim() == 3:
            check_labels(segmap, self.label_channels)  # before any layer: at low resolution some labels are not seen
        if z is not None and not self.latent_dim:
            raise ValueError("z was given to a generator without latent_dim")
        if z is not None:
            check_shape("z", z, (segmap.shape[0], self.latent_dim), segmap, "a label map")

    def _first(self, resized: Tensor, z: Tensor | None) -> Tensor:
        weight, bias = self.fc.weight, self.fc.bias
        if self.latent_dim:
            if z is None:
                z = torch.randn(resized.shape[0], self.latent_dim, device=weight.device, dtype=weight.dtype)
            return self.fc(z).unflatten(1, (-1, *self.start))
        if resized.dim() == 4:
            return self.fc(resized.to(weight.dtype))
        return label_conv2d(resized, weight, bias, impl="auto" if self.impl == "native" else self.impl)


class SPADEEncoder(nn.Module):
    """The image encoder of SPADE's variational autoencoder: mean and log variance of the latent vector of an image.

    Images are resized to 256x256 (bilinear); six times a 3x3 convolution of stride 2 without bias, with spectral norm,
    instance norm and leaky ReLU 0.2; then a linear layer each. 10 463 424 parameters.

    Args:
        width: channels of the first convolution (``ngf``); then twice, 4, 8, 8 and 8 times as many.
        latent_dim: length of the latent vector.
        impl: of the instance norms, see :class:`pixnorm.nn.InstanceNorm2d`.

    Shape:
        (N, 3, H, W) to mu and logvar, both (N, latent_dim).

    Raises:
        ValueError: ``width`` or ``latent_dim`` is not positive, or the images do not have three channels.
    """

    RESOLUTION = 256

    def __init__(self, width: int = 64, latent_dim: int = 256, impl: str = "auto"):
        super().__init__()
        check_positive(width=width, latent_dim=latent_dim)
        widths = [3, width, 2 * width, 4 * width, 8 * width, 8 * width, 8 * width]
        self.convs = nn.ModuleList(
            spectral_norm(nvlabs_init(nn.Conv2d(of, to, 3, stride=2, padding=1, bias=False)))
            for of, to in pairwise(widths)
        )
        self.norms = nn.ModuleList(InstanceNorm2d(to, activation="leaky_relu", impl=impl) for to in widths[1:])
        features = widths[-1] * (self.RESOLUTION >> len(self.convs)) ** 2
        self.fc_mu = nvlabs_init(nn.Linear(features, latent_dim))
        self.fc_logvar = nvlabs_init(nn.Linear(features, latent_dim))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance."""
        check_image(image)
        check_shape("image", image, (image.shape[0], 3, *image.shape[2:]), image, "images")
        size = (self.RESOLUTION, self.RESOLUTION)
        x = image if tuple(image.shape[2:]) == size else F.interpolate(image, size, mode="bilinear")
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x))
        x = x.flatten(1)
        return self.fc_mu(x), self.fc_logvar(x)

    @staticmethod
    def sample(mu: Tensor, logvar: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A latent vector of that mean and log variance: ``mu + exp(logvar / 2) · eps``, eps normal.

        Args:
            mu, logvar: (N, D).
            generator: of the random numbers.

        Returns:
            (N, D).
        """
        if mu.shape != logvar.shape:
            raise ValueError(f"mu and logvar must have one shape, got {tuple(mu.shape)} and {tuple(logvar.shape)}")
        eps = torch.randn(mu.shape, **drawing(generator), device=mu.device, dtype=mu.dtype)
        return mu + eps * torch.exp(0.5 * logvar)
