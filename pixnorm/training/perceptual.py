"""The perceptual loss of SPADE and pix2pixHD (arXiv 1711.11585): differences of the features of VGG19."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnorm.training.cli import UsageError

# Channels of the convolutions, "M" for a maximum of 2x2: VGG19 of arXiv 1409.1556 up to relu5_1.
_LAYERS = (64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M", 512, 512, 512, 512, "M", 512)
_TAPS = {1: 1 / 32, 6: 1 / 16, 11: 1 / 8, 20: 1 / 4, 29: 1.0}  # relu1_1 ... relu5_1 and their weights


class VGGLoss(nn.Module):
    """Weighted mean absolute differences of five layers' features; those of the real images get no gradient.

    Images are taken as they are, in [-1, 1], as in NVlabs' SPADE.

    Args:
        weights: a file with torchvision's state dict of ``vgg19``.

    Raises:
        UsageError: the file is missing or of another network.
    """

    def __init__(self, weights: Path):
        super().__init__()
        layers, before = [], 3
        for size in _LAYERS:
            if size == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(before, size, 3, padding=1), nn.ReLU()]
                before = size
        self.features = nn.Sequential(*layers)
        try:
            found = torch.load(weights, map_location="cpu", weights_only=True)
            self.load_state_dict({name: found[name] for name in self.state_dict()})
        except FileNotFoundError:
            raise UsageError(f"there is no file {weights} with VGG19's weights") from None
        except Exception as error:  # of archives, names and shapes, of many kinds
            raise UsageError(f"{weights} has no weights of VGG19: {str(error).splitlines()[0]}") from None
        self.requires_grad_(False)

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:
        """The loss of images (N, 3, H, W) against real ones."""
        loss = fake.new_zeros(())
        with torch.no_grad():
            of_real = self._taps(real.to(fake.dtype))
        for weight, a, b in zip(_TAPS.values(), self._taps(fake), of_real, strict=True):
            loss = loss + weight * F.l1_loss(a.float(), b.float())
        return loss

    def _taps(self, x: Tensor) -> list[Tensor]:
        found = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in _TAPS:
                found.append(x)
        return found
