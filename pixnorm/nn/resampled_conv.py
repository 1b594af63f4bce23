"""Convolutions of upsampled tensors, and convolutions whose output is pooled, at 2.25 times fewer operations."""

from torch import Tensor, nn

from pixnorm import functional as F
from pixnorm.nn._leaf import traced
from pixnorm.ops._dispatch import IMPLS
from pixnorm.ops.checks import check_option
from pixnorm.ops.convolution import Padding


class _ResampledConv2d(nn.Conv2d):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        padding: Padding = 0,
        bias: bool = True,
        impl: str = "auto",
        device=None,
        dtype=None,
    ):
        check_option("impl", impl, IMPLS)
        options = {"padding": padding, "bias": bias, "device": device, "dtype": dtype}
        super().__init__(in_channels, out_channels, kernel_size, **options)
        self.impl = impl

    def forward(self, input: Tensor) -> Tensor:
        """Convolve between the two resolutions."""
        if (node := traced(self, input)) is not None:
            return node
        return self._function(input, self.weight, self.bias, padding=self.padding, impl=self.impl)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", impl={self.impl!r}" if self.impl != "auto" else "")


class UpsampleConv2d(_ResampledConv2d):
    """``nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(...))`` in one convolution, see
    :func:`pixnorm.functional.upsample_conv2d`. A checkpoint of the ``nn.Conv2d`` loads.

    Args:
        in_channels, out_channels, kernel_size, padding, bias, device, dtype: as in ``nn.Conv2d``.
        impl: ``"reference"`` upsamples, then convolves, as does ``"auto"`` on a CPU with few channels.

    Shape:
        (N, in_channels, H, W) to (N, out_channels, H', W'), the convolution's for 2H x 2W.

    Raises:
        ValueError: as ``nn.Conv2d``, and an unknown ``impl``.
    """

    _function = staticmethod(F.upsample_conv2d)


class ConvAvgPool2d(_ResampledConv2d):
    """``nn.Sequential(nn.Conv2d(...), nn.AvgPool2d(2))`` in one convolution, see
    :func:`pixnorm.functional.conv_avg_pool2d`. A checkpoint of the ``nn.Conv2d`` loads.

    Args:
        in_channels, out_channels, kernel_size, padding, bias, device, dtype: as in ``nn.Conv2d``.
        impl: ``"reference"`` convolves, then pools, as does ``"auto"`` on a CPU with few channels.

    Shape:
        (N, in_channels, H, W) to (N, out_channels, H' // 2, W' // 2), where H' x W' is the convolution's.

    Raises:
        ValueError: as ``nn.Conv2d``, and an unknown ``impl``.
    """

    _function = staticmethod(F.conv_avg_pool2d)
