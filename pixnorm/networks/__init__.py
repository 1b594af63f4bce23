"""The networks of the papers, built from ``pixnorm.nn`` and ``torch.nn``."""

from pixnorm.networks.sngan import Generator
from pixnorm.networks.sngan_discriminator import Discriminator
from pixnorm.networks.spade import SPADEBlock, SPADEEncoder, SPADEGenerator
from pixnorm.networks.spade_checkpoints import from_nvlabs
from pixnorm.networks.spade_discriminator import SPADEDiscriminator

__all__ = [
    "Discriminator",
    "Generator",
    "SPADEBlock",
    "SPADEDiscriminator",
    "SPADEEncoder",
    "SPADEGenerator",
    "from_nvlabs",
]
