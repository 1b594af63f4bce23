"""The networks of the papers, built from ``pixnorm.nn`` and ``torch.nn``."""

from pixnorm.networks.sngan import Generator
from pixnorm.networks.sngan_discriminator import Discriminator

__all__ = ["Discriminator", "Generator"]
