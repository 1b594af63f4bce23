"""The networks of the papers, built from ``pixnorm.nn`` and ``torch.nn``."""

from pixnorm.networks.sngan import Generator
from pixnorm.networks.ssn import SSNGenerator, distortion_loss, path_length_regularizer, resample_blocks
from pixnorm.networks.style import StyleGAN
from pixnorm.networks.style2 import StyleGAN2, path_gradient, path_lengths
from pixnorm.networks.style_discriminator import StyleGAN2Discriminator, StyleGANDiscriminator, minibatch_stddev

__all__ = [
    "Generator",
    "SSNGenerator",
    "StyleGAN",
    "StyleGAN2",
    "StyleGAN2Discriminator",
    "StyleGANDiscriminator",
    "distortion_loss",
    "minibatch_stddev",
    "path_gradient",
    "path_length_regularizer",
    "path_lengths",
    "resample_blocks",
]
