"""The SNGAN generator with batch norm or SPN, as in the SPN paper (arXiv 2201.10725, Tables 2 and 6)."""

from torch import Tensor, nn

from pixnorm.nn import SPN2d


class UpBlock(nn.Module):
    """Residual block that doubles the resolution: upsample, norm, ReLU, conv, norm, ReLU, conv, plus the shortcut.

    With SPN, upsampling, norm and ReLU are one layer. Batch norm and ReLU commute with nearest upsampling, so there
    they come first, at a quarter of the cost; SPN does not commute (its kernels see different neighbours), and must
    follow it. The shortcut is an upsampling, after a 1x1 convolution only where the number of channels changes.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: str, impl: str = "auto"):
        super().__init__()
        if norm == "spn":
            self.norm1 = SPN2d(in_channels, upsample=2, activation="relu", impl=impl)
            self.act1 = nn.Identity()
            self.norm2 = SPN2d(out_channels, activation="relu", impl=impl)
            self.act2 = nn.Identity()
        else:
            self.norm1 = nn.BatchNorm2d(in_channels)
            self.act1 = nn.Sequential(nn.ReLU(inplace=True), nn.Upsample(scale_factor=2))
            self.norm2 = nn.BatchNorm2d(out_channels)
            self.act2 = nn.ReLU(inplace=True)
        self.conv1 = _glorot(nn.Conv2d(in_channels, out_channels, 3, padding=1), gain=2**0.5)
        self.conv2 = _glorot(nn.Conv2d(out_channels, out_channels, 3, padding=1), gain=2**0.5)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else _glorot(nn.Conv2d(in_channels, out_channels, 1))
        self.up = nn.Upsample(scale_factor=2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.act1(self.norm1(x)))
        h = self.conv2(self.act2(self.norm2(h)))
        return h + self.up(self.shortcut(x))


class Generator(nn.Module):
    """The generator for 32x32 images: a fully connected layer to 4x4, three :class:`UpBlock`, norm, ReLU, conv, tanh.

    The last norm is a batch norm in both forms. Weights start Glorot uniform, with gain √2 for the 3x3 convolutions of
    the blocks; biases start at 0.

    Args:
        resolution: of the images; 32.
        norm: in the blocks: ``"bn"`` (4 079 363 parameters) or ``"spn"`` (4 527 875).
        latent_dim: length of a latent vector.
        channels: width of every block.
        impl: of the SPN layers, see :class:`pixnorm.SPN2d`. Of no effect on parameters and state-dict keys.

    Shape:
        (N, latent_dim) to (N, 3, resolution, resolution), in (-1, 1).

    Raises:
        ValueError: an unknown ``resolution`` or ``norm``.
    """

    def __init__(
        self,
        resolution: int = 32,
        norm: str = "bn",
        latent_dim: int = 128,
        channels: int = 256,
        impl: str = "auto",
    ):
        super().__init__()
        if resolution != 32:
            raise ValueError(f"resolution must be 32, got {resolution!r}")
        if norm not in ("bn", "spn"):
            raise ValueError(f"norm must be 'bn' or 'spn', got {norm!r}")
        self.fc = _glorot(nn.Linear(latent_dim, channels * 4 * 4))
        self.block1 = UpBlock(channels, channels, norm, impl)
        self.block2 = UpBlock(channels, channels, norm, impl)
        self.block3 = UpBlock(channels, channels, norm, impl)
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)
        self.conv = _glorot(nn.Conv2d(channels, 3, 3, padding=1))
        self.tanh = nn.Tanh()

    def forward(self, z: Tensor) -> Tensor:
        """Images from latent vectors."""
        h = self.fc(z).unflatten(1, (-1, 4, 4))
        h = self.block3(self.block2(self.block1(h)))
        return self.tanh(self.conv(self.act(self.norm(h))))


def _glorot(layer: nn.Linear | nn.Conv2d, gain: float = 1.0) -> nn.Linear | nn.Conv2d:
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer
