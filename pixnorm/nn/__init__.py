"""Modules: parameters, buffers and shape checks around the functions of ``pixnorm.functional``."""

from pixnorm.nn.convert import convert_batchnorm
from pixnorm.nn.spn import SPN2d

__all__ = ["SPN2d", "convert_batchnorm"]
