"""Pixel-wise normalisations and generative convolutions of GAN generators, as fused kernels for PyTorch."""

from pixnorm import functional, nn
from pixnorm.nn import (
    NORMS,
    AdaIN2d,
    BatchNorm2d,
    ChannelGate,
    ConditionalBatchNorm2d,
    ConditionalConv2d,
    ConditionalSPN2d,
    GConv2d,
    GLinear,
    LatentBatchNorm2d,
    ModulatedConv2d,
    SPADE2d,
    SpatialGate,
    SpatiallyModulatedConv2d,
    SPN2d,
    StyleBlock,
    StyleLayer,
    convert_batchnorm,
    convert_conv,
    convert_sync,
    update_statistics,
)
from pixnorm.ops._dispatch import backends, load_extensions

__version__ = "0.1.0"
__all__ = [
    "NORMS",
    "AdaIN2d",
    "BatchNorm2d",
    "ChannelGate",
    "ConditionalBatchNorm2d",
    "ConditionalConv2d",
    "ConditionalSPN2d",
    "GConv2d",
    "GLinear",
    "LatentBatchNorm2d",
    "ModulatedConv2d",
    "SPADE2d",
    "SPN2d",
    "SpatialGate",
    "SpatiallyModulatedConv2d",
    "StyleBlock",
    "StyleLayer",
    "backends",
    "convert_batchnorm",
    "convert_conv",
    "convert_sync",
    "functional",
    "nn",
    "update_statistics",
]

load_extensions()
