"""The papers' recipes, one row each.

Every value can be overridden: on the command line, or by ``dataclasses.replace``.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from pixnorm.training.cli import UsageError
from pixnorm.training.losses import LOSSES

FAMILIES = ("sngan", "spade", "stylegan", "stylegan2")


@dataclass(frozen=True)
class Recipe:
    """Networks, losses and optimisation of a run. Batches are those of all processes together.

    Attributes:
        paper: where the numbers come from.
        family: of networks.
        resolution: of the images.
        conditional: whether generator and discriminator get the images' classes.
        norm: of an SNGAN's generator, see pixnorm.networks.Generator.
        conv: of an SNGAN's generator: conv or gconv.
        channels_g: of the widest layer of the generator; with SPADE of its last. None: the paper's.
        channels_d: of the widest layer of the discriminator; with SPADE of its first. None: the paper's.
        latent_dim: length of a latent vector.
        bias: of the layers of an SNGAN's generator.
        spectral_norm: of an SNGAN's generator, too. SNGAN's and SPADE's discriminators always have it.
        loss: hinge, ce (cross entropy), lsgan or logistic.
        r1: weight of the gradient penalty of real images, γ; the loss has γ/2 |∇D|².
        feature_matching: weight of the differences of the discriminator's features (SPADE).
        vgg: weight of the differences of VGG's features (SPADE); needs --vgg-weights.
        kl: weight of the encoder's divergence, a sum over the batch (SPADE).
        lr_g: Adam's rate for the generator.
        lr_d: Adam's rate for the discriminator.
        beta1: of Adam.
        beta2: of Adam.
        adam_eps: of Adam.
        d_steps: of the discriminator for each of the generator, each on images of its own.
        batch_d: real images, and as many generated ones, of a step of the discriminator.
        batch_g: images of a step of the generator.
        steps: of the generator.
        decay_steps: the rates fall linearly to 0 over the last so many steps, or over all if those are fewer; 0: they
            stay.
        ema: the weight of the past in the averaged generator at each step; 0: there is none.
        label_channels: of label maps (SPADE); 0: as in the data.
    """

    paper: str
    family: Literal["sngan", "spade", "stylegan", "stylegan2"] = "sngan"
    resolution: int = 32
    conditional: bool = False
    norm: str = "spn"
    conv: str = "conv"
    channels_g: int | None = None
    channels_d: int | None = None
    latent_dim: int = 128
    bias: bool = True
    spectral_norm: bool = False
    loss: Literal["hinge", "ce", "lsgan", "logistic"] = "hinge"
    r1: float = 0.0
    feature_matching: float = 0.0
    vgg: float = 0.0
    kl: float = 0.0
    lr_g: float = 2e-4
    lr_d: float = 2e-4
    beta1: float = 0.0
    beta2: float = 0.9
    adam_eps: float = 1e-8
    d_steps: int = 5
    batch_d: int = 64
    batch_g: int = 128
    steps: int = 50_000
    decay_steps: int = 50_000
    ema: float = 0.0
    label_channels: int = 0

    def __post_init__(self):
        """Raises UsageError for values that no run can have."""
        _one_of("family", self.family, FAMILIES)
        _one_of("loss", self.loss, LOSSES)
        for name in ("resolution", "latent_dim", "d_steps", "batch_d", "batch_g", "steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be positive, got {getattr(self, name)}")
        for name in (
            "r1",
            "feature_matching",
            "vgg",
            "kl",
            "lr_g",
            "lr_d",
            "adam_eps",
            "decay_steps",
            "label_channels",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        for name in ("beta1", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} must be in [0, 1), got {getattr(self, name)}")

    def rate_factor(self, step: int) -> float:
        """What the learning rates are multiplied with in step 0, 1, ...: min(1, (steps - step) / decay_steps).

        A run of fewer than ``decay_steps`` decays over all of it, from the whole rate.
        """
        return min(1.0, (self.steps - step) / min(self.decay_steps, self.steps)) if self.decay_steps else 1.0


def _one_of(name: str, value: str, allowed) -> None:
    if value not in allowed:
        raise UsageError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


_CIFAR = Recipe("arXiv 2201.10725, section 4.1; networks of Table 1, learning rate decay over the whole run")
_LSUN = replace(
    _CIFAR,
    paper="arXiv 2201.10725, section 4.1: LSUN church and tower, 128 pixels; networks of Table 2; TTUR (1706.08500)",
    resolution=128,
    spectral_norm=True,
    lr_g=1e-4,
    lr_d=4e-4,
    d_steps=1,
    batch_d=32,
    batch_g=32,
    steps=300_000,
)
_GCONV = replace(
    _CIFAR,
    paper="arXiv 2111.15171, section 4: CIFAR; networks of Table 1, z of 32 numbers (by the count of parameters)",
    norm="bigbn",
    conv="gconv",
    latent_dim=32,
    bias=False,
)

_STYLEGAN = Recipe(
    "arXiv 1812.04948 and its code: FFHQ, 1024 pixels, logistic loss with R1, 25 million images; without growing",
    family="stylegan",
    resolution=1024,
    latent_dim=512,
    loss="logistic",
    r1=10.0,
    lr_g=3e-3,
    lr_d=3e-3,
    beta2=0.99,
    d_steps=1,
    batch_d=32,
    batch_g=32,
    steps=781_250,
    decay_steps=0,
    ema=0.5 ** (32 / 10_000),
)

RECIPES: dict[str, Recipe] = {
    "cifar-spn": _CIFAR,
    "cifar-cspn": replace(
        _CIFAR, paper=_CIFAR.paper + "; conditional: Table 8, projection discriminator", norm="cspn", conditional=True
    ),
    "lsun-spn": _LSUN,
    "tiny-imagenet-cspn": replace(
        _LSUN,
        paper="arXiv 2201.10725, section 4.1: tiny-ImageNet, 128 pixels; networks of Table 2; TTUR, projection",
        norm="cspn",
        conditional=True,
        steps=1_000_000,
    ),
    "cifar-gconv": _GCONV,
    "cifar-gconv-conditional": replace(
        _GCONV, paper=_GCONV.paper + "; conditional: z followed by the class", conditional=True
    ),
    "lsun-gconv": replace(
        _LSUN,
        paper="arXiv 2111.15171, section 4: LSUN and CelebA, 128 pixels; rates of arXiv 2201.10725",
        norm="bigbn",
        conv="gconv",
        latent_dim=32,
        bias=False,
    ),
    "celebahq-gconv": replace(
        _GCONV,
        paper="arXiv 2111.15171, section 4: CelebA-HQ, 256 pixels; networks of Table 1; spectral norm is our choice",
        resolution=256,
        spectral_norm=True,
        batch_d=16,
        batch_g=32,
        steps=100_000,
    ),
    "faces-spade": Recipe(
        "Spatially-Adaptive Normalization for Human Face Synthesis (FFHQ; rates of its Table 1, 10 epochs of "
        "1000 steps); weights, encoder and batch of arXiv 1903.07291",
        family="spade",
        resolution=256,
        latent_dim=256,
        feature_matching=10.0,
        vgg=10.0,
        kl=0.05,
        lr_g=1e-4,
        lr_d=4e-4,
        d_steps=1,
        batch_d=32,
        batch_g=32,
        steps=10_000,
        decay_steps=0,
        label_channels=19,
    ),
    "ffhq-stylegan": _STYLEGAN,
    "ffhq-stylegan2": replace(
        _STYLEGAN,
        paper="arXiv 1912.04958 and its code: FFHQ, 1024 pixels, configuration F without path length regularisation, "
        "R1 in every step",
        family="stylegan2",
        lr_g=2e-3,
        lr_d=2e-3,
    ),
}
