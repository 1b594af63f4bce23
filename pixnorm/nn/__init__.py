"""The layers as modules, and functions that convert a model's layers into them."""

from pixnorm.nn.adain import AdaIN2d
from pixnorm.nn.batchnorm import BatchNorm2d, ConditionalBatchNorm2d, LatentBatchNorm2d
from pixnorm.nn.conditional_conv import ConditionalConv2d
from pixnorm.nn.convert import Conversion, convert_batchnorm, convert_conv, convert_sync
from pixnorm.nn.equalized import EqualizedConv2d, EqualizedLinear
from pixnorm.nn.gate import ChannelGate, SpatialGate
from pixnorm.nn.gconv import GConv2d, GLinear, latent
from pixnorm.nn.instancenorm import InstanceNorm2d
from pixnorm.nn.mapping import MappingNetwork, pixel_norm, style_mixing, truncate
from pixnorm.nn.resampled_conv import ConvAvgPool2d, UpsampleConv2d
from pixnorm.nn.spade import SPADE2d
from pixnorm.nn.spn import ConditionalSPN2d, SPN2d, self_latent_mask
from pixnorm.nn.statistics import NORMS, update_statistics
from pixnorm.nn.style import (
    ModulatedConv2d,
    NoiseInjection,
    SpatiallyModulatedConv2d,
    StyleBlock,
    StyleBlocks,
)
from pixnorm.nn.style_layer import StyleLayer, StyleNorm2d

__all__ = [
    "NORMS",
    "AdaIN2d",
    "BatchNorm2d",
    "ChannelGate",
    "ConditionalBatchNorm2d",
    "ConditionalConv2d",
    "ConditionalSPN2d",
    "ConvAvgPool2d",
    "Conversion",
    "EqualizedConv2d",
    "EqualizedLinear",
    "GConv2d",
    "GLinear",
    "InstanceNorm2d",
    "LatentBatchNorm2d",
    "MappingNetwork",
    "ModulatedConv2d",
    "NoiseInjection",
    "SPADE2d",
    "SPN2d",
    "SpatialGate",
    "SpatiallyModulatedConv2d",
    "StyleBlock",
    "StyleBlocks",
    "StyleLayer",
    "StyleNorm2d",
    "UpsampleConv2d",
    "convert_batchnorm",
    "convert_conv",
    "convert_sync",
    "latent",
    "pixel_norm",
    "self_latent_mask",
    "style_mixing",
    "truncate",
    "update_statistics",
]
