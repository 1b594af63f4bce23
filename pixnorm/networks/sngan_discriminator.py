"""The discriminators of the SNGANs (arXiv 2201.10725 and 2111.15171, Tables 1 and 2), as in Miyato's code
(pfnet-research/sngan_projection), with projection of the class (arXiv 1802.05637)."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from pixnorm.networks.sngan import check_classes_given, glorot, normalize_spectrally, scaled, widths_of
from pixnorm.nn import ConvAvgPool2d
from pixnorm.ops._dispatch import IMPLS
from pixnorm.ops.checks import check_option


class Widths(NamedTuple):
    """Of a discriminator: the outputs of blocks that halve the resolution, and of those that keep it."""

    down: tuple[int, ...]
    same: tuple[int, ...]


# For 64 pixels, which the papers do not have: that for 128 without one of the blocks of 512.
DISCRIMINATORS = {
    32: Widths((128, 128), (128, 128)),
    64: Widths((64, 128, 256, 512), (512,)),
    128: Widths((64, 128, 256, 512, 512), (512,)),
    256: Widths((32, 64, 128, 256, 512, 512), (512,)),
}


class DownBlock(nn.Module):
    """Residual block: ReLU, conv, ReLU, conv, mean of 2x2, plus the shortcut, a 1x1 convolution and the mean of 2x2.

    The second convolution and the mean are one (:func:`pixnorm.functional.conv_avg_pool2d`), and in the shortcut, where
    they commute, the mean comes first. With ``impl="reference"`` both means come last, as in Miyato's code (but for the
    shortcut of its first block, where the mean comes first).

    Args:
        in_channels, out_channels: of the block. The first convolution keeps the channels.
        down: whether the resolution is halved; if not, there is no mean, and no shortcut convolution where the number
            of channels is kept.
        first: in the network: without the first ReLU, and the first convolution makes ``out_channels``.
        impl: see above.
    """

    def __init__(self, in_channels: int, out_channels: int, down: bool, first: bool = False, impl: str = "auto"):
        super().__init__()
        self.first, self.down = first, down
        self.pools_last = down and not first and impl == "reference"
        hidden = out_channels if first else in_channels
        self.conv1 = glorot(nn.Conv2d(in_channels, hidden, 3, padding=1), gain=2**0.5)
        last = (
            ConvAvgPool2d(hidden, out_channels, 3, 1, impl=impl) if down else nn.Conv2d(hidden, out_channels, 3, 1, 1)
        )
        self.conv2 = glorot(last, gain=2**0.5)
        kept = in_channels == out_channels and not down
        self.shortcut = nn.Identity() if kept else glorot(nn.Conv2d(in_channels, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Features of half, or of the same, resolution."""
        h = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        if self.pools_last:
            return h + F.avg_pool2d(self.shortcut(x), 2)
        return h + self.shortcut(F.avg_pool2d(x, 2) if self.down else x)


class Discriminator(nn.Module):
    """The discriminator: a :class:`DownBlock` for each width, ReLU, sum over pixels, a fully connected layer; with
    classes, plus the inner product of the summed features with the class's embedding.

    Blocks have 128 channels at 32 pixels, where two of four halve the resolution; 64, 128, 256, 512, 512 at 64;
    64, 128, 256, 512, 512, 512 at 128; 32, 64, 128, 256, 512, 512, 512 at 256: there all but the last halve it.
    Parameters: 1 053 825 at 32 pixels (1 055 105 with ten classes), 12 238 081 at 128, 12 239 233 at 256.

    Args:
        resolution: of the images: 32, 64, 128 or 256.
        num_classes: of a conditional discriminator, else 0.
        channels: of the widest block; the others are narrower in proportion. None: the paper's, 128 or 512.
        spectral_norm: of all weights, the embedding's too: one power iteration in each forward pass in training.
        impl: ``"reference"`` has separate means of 2x2, see :class:`DownBlock`. Does not affect parameters or keys.

    Shape:
        images (N, 3, resolution, resolution) and, with classes, y (N) of int64 to scores (N).

    Weights start Glorot uniform, with gain √2 for the 3x3 convolutions; biases start at 0.

    Raises:
        ValueError: an argument has a value that is not listed above; images or classes do not fit.
    """

    def __init__(
        self,
        resolution: int = 32,
        num_classes: int = 0,
        channels: int | None = None,
        spectral_norm: bool = True,
        impl: str = "auto",
    ):
        super().__init__()
        check_option("impl", impl, IMPLS)
        of_paper = widths_of(DISCRIMINATORS, resolution)
        if num_classes < 0:
            raise ValueError(f"num_classes must not be negative, got {num_classes}")
        self.resolution, self.num_classes = resolution, num_classes
        widest = max(of_paper.down + of_paper.same)
        blocks, before = [], 3
        for down, sizes in ((True, of_paper.down), (False, of_paper.same)):
            for size in sizes:
                after = scaled(size, widest, channels)
                blocks.append(DownBlock(before, after, down, first=not blocks, impl=impl))
                before = after
        self.blocks = nn.ModuleList(blocks)
        self.fc = glorot(nn.Linear(before, 1))
        self.embedding = None
        if num_classes:
            self.embedding = nn.Embedding(num_classes, before)
            nn.init.xavier_uniform_(self.embedding.weight)
        if spectral_norm:
            normalize_spectrally(self)

    def forward(self, images: Tensor, y: Tensor | None = None) -> Tensor:
        """Scores of images and, in a conditional discriminator, classes: larger for real ones."""
        wanted = (3, self.resolution, self.resolution)
        if images.dim() != 4 or images.shape[1:] != wanted:
            raise ValueError(f"images must have shape (N, {', '.join(map(str, wanted))}), got {tuple(images.shape)}")
        check_classes_given(self, "discriminator", images.shape[0], y)
        h = images
        for block in self.blocks:
            h = block(h)
        h = F.relu(h).sum((2, 3))
        scores = self.fc(h).squeeze(1)
        return scores if y is None else scores + (self.embedding(y) * h).sum(1)
