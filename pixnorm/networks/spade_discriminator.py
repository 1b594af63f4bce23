"""The discriminator of SPADE (arXiv 1903.07291), as in NVlabs/SPADE: a PatchGAN at several scales (1711.11585)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from pixnorm.functional import label_conv2d
from pixnorm.networks.spade import check_positive, nvlabs_init
from pixnorm.nn import InstanceNorm2d
from pixnorm.nn.spade import check_label_map
from pixnorm.ops._dispatch import IMPLS
from pixnorm.ops.checks import check_image, check_option
from pixnorm.ops.common import dense
from pixnorm.ops.label_conv import check_labels


class LabelImageConv2d(nn.Conv2d):
    """The 4x4 convolution of stride 2 and padding 2 of a one-hot label map and an image, without the one-hot map.

    Args:
        label_channels, image_channels: of the input; the filters of the label map come first.
        out_channels: of the output.
        impl: ``"reference"`` makes the one-hot map.

    Shape:
        Label map (N, H, W) of int64 or (N, L, H, W) of floating point, and image (N, C, H, W), to
        (N, out_channels, H // 2 + 1, W // 2 + 1).
    """

    def __init__(self, label_channels: int, image_channels: int, out_channels: int, impl: str = "auto"):
        super().__init__(label_channels + image_channels, out_channels, 4, stride=2, padding=2)
        self.label_channels, self.impl = label_channels, impl

    def forward(self, segmap: Tensor, image: Tensor) -> Tensor:
        """Features of both."""
        if segmap.dim() == 4:
            return super().forward(torch.cat([segmap.to(image.dtype), image], 1))
        y = F.conv2d(image, self.weight[:, self.label_channels :], self.bias, self.stride, self.padding)
        return y + self._of_labels(segmap).to(y.dtype)

    def _of_labels(self, labels: Tensor) -> Tensor:
        """The sum over the 2x2 phases of the labels, each convolved with its 2x2 filters, at stride 1.

        Output p takes inputs 2p + t - 2 with taps t = 2s + phase, so of a phase the positions p - 1 (s = 0) and p.
        """
        height, width = (side // 2 + 1 for side in labels.shape[1:])
        nothing = self.label_channels
        ends = (0, 2 * width - labels.shape[2], 0, 2 * height - labels.shape[1])
        labels = F.pad(labels, ends, value=nothing)
        impl = "auto" if self.impl == "native" else self.impl
        parts = []
        for i in (0, 1):
            for j in (0, 1):
                filters = F.pad(self.weight[:, : self.label_channels, i::2, j::2], (0, 1, 0, 1))
                phase = labels[:, i::2, j::2]
                parts.append(label_conv2d(phase, filters, ignore_index=nothing, impl=impl))
        return sum(parts[1:], parts[0])


def one_hot_map(labels: Tensor, label_channels: int, like: Tensor) -> Tensor:
    """The one-hot map (N, L, H, W) of labels (N, H, W), in the dtype of an image."""
    classes = torch.arange(label_channels, device=labels.device)
    return (labels[:, None] == classes[:, None, None]).to(like.dtype)


def downsample(x: Tensor) -> Tensor:
    """The next scale of an image or a soft label map: 3x3 means of stride 2, over what is inside the image."""
    return F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)


def downsample_labels(labels: Tensor, label_channels: int, like: Tensor) -> Tensor:
    """``downsample(one_hot(labels))`` without the one-hot map at full resolution: labels are counted.

    Args:
        labels: (N, H, W) of int64, in [0, L).
        label_channels: L.
        like: an image, whose dtype and layout the result has.

    Returns:
        The shares of the labels (N, L, ceil(H / 2), ceil(W / 2)).
    """
    height, width = ((side + 1) // 2 for side in labels.shape[1:])
    padded = F.pad(labels, (1, 1, 1, 1), value=label_channels)  # counted in a channel of its own
    taps = [padded[:, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2] for i in range(3) for j in range(3)]
    seen = torch.stack(taps, -1)
    counts = torch.zeros((*seen.shape[:3], label_channels + 1), device=labels.device, dtype=like.dtype)
    # Sums of ones are exact, so their order does not matter.
    counts = counts.scatter_add(3, seen, torch.ones_like(seen, dtype=like.dtype))[..., :label_channels]
    return dense((counts / counts.sum(3, keepdim=True)).permute(0, 3, 1, 2), like)


class PatchDiscriminator(nn.Module):
    """One scale: 4x4 convolutions of padding 2, all but the last two of stride 2, with leaky ReLU 0.2; all but the
    first and the last have spectral norm, instance norm and no bias.

    Args, shapes: as in :class:`SPADEDiscriminator`, whose scales these are; returns one list of features.
    """

    def __init__(self, label_channels: int, image_channels: int, width: int, num_layers: int, impl: str):
        super().__init__()
        widths = [min(width << n, 8 * width) for n in range(num_layers)]
        convs = [nvlabs_init(LabelImageConv2d(label_channels, image_channels, width, impl))]
        for n in range(1, num_layers):
            stride = 1 if n == num_layers - 1 else 2
            conv = nn.Conv2d(widths[n - 1], widths[n], 4, stride, padding=2, bias=False)
            convs.append(spectral_norm(nvlabs_init(conv)))
        convs.append(nvlabs_init(nn.Conv2d(widths[-1], 1, 4, padding=2)))
        self.convs = nn.ModuleList(convs)
        self.norms = nn.ModuleList(InstanceNorm2d(to, activation="leaky_relu", impl=impl) for to in widths[1:])

    def forward(self, segmap: Tensor, image: Tensor) -> list[Tensor]:
        """Features of all layers; the last are the scores."""
        first, *others, last = self.convs
        features = [F.leaky_relu(first(segmap, image), 0.2)]
        for conv, norm in zip(others, self.norms, strict=True):
            features.append(norm(conv(features[-1])))
        return [*features, last(features[-1])]


class SPADEDiscriminator(nn.Module):
    """SPADE's discriminator: PatchGANs of the image and its label map, each at half the resolution of the one before.

    Integer labels are neither one-hot encoded at full resolution nor for the next scale: the first convolution adds
    rows of its filters, and the means of the next scale are counts. Soft maps give the same numbers.

    With 19 labels and the defaults it has 5 566 594 parameters. Weights start as NVlabs', normal with gain 0.02.

    Args:
        label_channels: L, the number of labels.
        width: channels of the first layer (``ndf``); each further one has twice as many, at most 8 times.
        num_layers: layers before the scores (``n_layers_D``), two or more; the last has stride 1, the others 2.
        num_scales: number of PatchGANs (``num_D``).
        image_channels: of the images.
        impl: of our layers; ``"reference"`` makes one-hot maps. Does not affect parameters or state-dict keys.

    Shape:
        image (N, image_channels, H, W) and label map (N, H, W) of int64 or (N, L, H, W) of floating point, to a list
        with, for each scale, the list of its layers' features, the last one the scores (N, 1, h, w): for the hinge loss
        and feature matching.

    Raises:
        ValueError: an argument is out of range, the image or the label map does not fit.
    """

    def __init__(
        self,
        label_channels: int = 19,
        width: int = 64,
        num_layers: int = 4,
        num_scales: int = 2,
        image_channels: int = 3,
        impl: str = "auto",
    ):
        super().__init__()
        sizes = {"label_channels": label_channels, "width": width, "num_scales": num_scales}
        check_positive(**sizes, image_channels=image_channels)
        if num_layers < 2:
            raise ValueError(f"num_layers must be at least 2, got {num_layers}")
        check_option("impl", impl, IMPLS)
        self.label_channels, self.image_channels, self.impl = label_channels, image_channels, impl
        self.scales = nn.ModuleList(
            PatchDiscriminator(label_channels, image_channels, width, num_layers, impl) for _ in range(num_scales)
        )

    def forward(self, image: Tensor, segmap: Tensor) -> list[list[Tensor]]:
        """The features of each layer of each scale."""
        self._check(image, segmap)
        if segmap.dim() == 3 and self.impl == "reference":
            segmap = one_hot_map(segmap, self.label_channels, image)
        results = []
        for i, scale in enumerate(self.scales):
            if i > 0:
                integers = segmap.dim() == 3
                segmap = downsample_labels(segmap, self.label_channels, image) if integers else downsample(segmap)
                image = downsample(image)
            results.append(scale(segmap, image))
        return results

    def _check(self, image: Tensor, segmap: Tensor) -> None:
        check_image(image)
        if image.shape[1] != self.image_channels:
            raise ValueError(f"expected images of {self.image_channels} channels, got {tuple(image.shape)}")
        check_label_map(segmap, self.label_channels, image.shape[0])
        if tuple(segmap.shape[-2:]) != tuple(image.shape[2:]):
            raise ValueError(
                f"image and label map must have one size, got {tuple(image.shape)} and {tuple(segmap.shape)}"
            )
        if segmap.dim() == 3:
            check_labels(segmap, self.label_channels)
