"""The networks of the papers, built from ``pixnorm.nn`` and ``torch.nn``."""

from pixnorm.networks.sngan import Generator
from pixnorm.networks.style import StyleGAN
from pixnorm.networks.style2 import StyleGAN2, path_gradient, path_lengths
from pixnorm.networks.style_discriminator import StyleGAN2Discriminator, StyleGANDiscriminator, minibatch_stddev

__all__ = [
    "Generator",
    "StyleGAN",
    "StyleGAN2",
    "StyleGAN2Discriminator",
    "StyleGANDiscriminator",
    "minibatch_stddev",
    "path_gradient",
    "path_lengths",
]
