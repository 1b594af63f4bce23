"""The layers as modules, and functions that convert a model's layers into them."""

from pixnorm.nn.adain import AdaIN2d
from pixnorm.nn.batchnorm import BatchNorm2d, ConditionalBatchNorm2d, LatentBatchNorm2d
from pixnorm.nn.conditional_conv import ConditionalConv2d
from pixnorm.nn.convert import Conversion, convert_batchnorm, convert_conv
from pixnorm.nn.gconv import GConv2d, GLinear, latent
from pixnorm.nn.spade import SPADE2d
from pixnorm.nn.spn import ConditionalSPN2d, SPN2d, self_latent_mask
from pixnorm.nn.statistics import NORMS, update_statistics

__all__ = [
    "NORMS",
    "AdaIN2d",
    "BatchNorm2d",
    "ConditionalBatchNorm2d",
    "ConditionalConv2d",
    "ConditionalSPN2d",
    "Conversion",
    "GConv2d",
    "GLinear",
    "LatentBatchNorm2d",
    "SPADE2d",
    "SPN2d",
    "convert_batchnorm",
    "convert_conv",
    "latent",
    "self_latent_mask",
    "update_statistics",
]
