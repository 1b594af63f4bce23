"""The networks of the papers, built from ``pixnorm.nn`` and ``torch.nn``."""

from pixnorm.networks.sngan import Generator
from pixnorm.networks.sngan_discriminator import Discriminator
from pixnorm.networks.spade import SPADEBlock, SPADEEncoder, SPADEGenerator
from pixnorm.networks.spade_checkpoints import from_nvlabs
from pixnorm.networks.spade_discriminator import SPADEDiscriminator
from pixnorm.networks.ssn import SSNGenerator, distortion_loss, path_length_regularizer, resample_blocks
from pixnorm.networks.style import StyleGAN
from pixnorm.networks.style2 import StyleGAN2, path_gradient, path_lengths
from pixnorm.networks.style_discriminator import StyleGAN2Discriminator, StyleGANDiscriminator, minibatch_stddev

__all__ = [
    "Discriminator",
    "Generator",
    "SPADEBlock",
    "SPADEDiscriminator",
    "SPADEEncoder",
    "SPADEGenerator",
    "SSNGenerator",
    "StyleGAN",
    "StyleGAN2",
    "StyleGAN2Discriminator",
    "StyleGANDiscriminator",
    "distortion_loss",
    "from_nvlabs",
    "minibatch_stddev",
    "path_gradient",
    "path_length_regularizer",
    "path_lengths",
    "resample_blocks",
]
