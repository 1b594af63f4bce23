"""Pixel-wise normalisations and generative convolutions of GAN generators, as fused kernels for PyTorch."""

from pixnorm import functional, nn
from pixnorm.nn import GConv2d, GLinear, SPN2d, convert_batchnorm, convert_conv
from pixnorm.ops._dispatch import backends, load_extensions

__version__ = "0.1.0"
__all__ = ["GConv2d", "GLinear", "SPN2d", "backends", "convert_batchnorm", "convert_conv", "functional", "nn"]

load_extensions()
