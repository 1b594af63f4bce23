"""The public functions, in the manner of ``torch.nn.functional``."""

from pixnorm.ops.blur import blur2d
from pixnorm.ops.conditional_conv import conditional_conv2d
from pixnorm.ops.gate import channel_gate, spatial_gate
from pixnorm.ops.gconv import gconv2d, gconv_mix, glinear
from pixnorm.ops.label_conv import label_conv2d
from pixnorm.ops.modulate import adain, adain_transfer, modulated_norm
from pixnorm.ops.modulated_conv import modulated_conv2d, spatially_modulated_conv2d
from pixnorm.ops.resampled_conv import conv_avg_pool2d, upsample_conv2d
from pixnorm.ops.spn import conditional_spn, spn
from pixnorm.ops.style import style_epilogue, style_norm

__all__ = [
    "adain",
    "adain_transfer",
    "blur2d",
    "channel_gate",
    "conditional_conv2d",
    "conditional_spn",
    "conv_avg_pool2d",
    "gconv2d",
    "gconv_mix",
    "glinear",
    "label_conv2d",
    "modulated_conv2d",
    "modulated_norm",
    "spatial_gate",
    "spatially_modulated_conv2d",
    "spn",
    "style_epilogue",
    "style_norm",
    "upsample_conv2d",
]
