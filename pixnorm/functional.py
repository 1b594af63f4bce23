"""The public functions, in the manner of ``torch.nn.functional``."""

from pixnorm.ops.gconv import gconv2d, gconv_mix, glinear
from pixnorm.ops.spn import spn

__all__ = ["gconv2d", "gconv_mix", "glinear", "spn"]
