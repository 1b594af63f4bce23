"""The module of conditional convolution."""

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from pixnorm import functional as F
from pixnorm.nn._leaf import traced


class ConditionalConv2d(nn.Conv2d):
    r"""Conditional convolution (cConv, arXiv 1906.00709): the kernels of class y are ``scale[y] · W + shift[y]``, one
    scale for each kernel and one shift for each input channel. The equation is in
    :func:`pixnorm.functional.conditional_conv2d`, which does all the arithmetic.

    A checkpoint of ``nn.Conv2d`` loads: then all classes start equal.

    Args:
        num_classes: K.
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            in ``nn.Conv2d``.

    Shape:
        x (N, Ci, H, W) and y (N) of int64 or one-hot (N, K), also soft, to (N, Co, H', W') as ``nn.Conv2d``.

    Parameters ``weight`` and ``bias`` as in ``nn.Conv2d``, which initialises them; ``scale`` (K, Co) and ``shift``
    (K, Ci), 1 and 0 at first.

    Raises:
        ValueError: ``num_classes`` is not positive, or y does not fit.

    Example:
        >>> layer = pixnorm.ConditionalConv2d(64, 64, 3, num_classes=10, padding=1)
        >>> out = layer(torch.randn(8, 64, 16, 16), torch.randint(10, (8,)))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        num_classes: int,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
    ):
        if num_classes < 1:
            raise ValueError(f"num_classes must be positive, got {num_classes}")
        where = {"device": device, "dtype": dtype}
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, **where
        )
        self.num_classes = num_classes
        self.scale = nn.Parameter(torch.ones(num_classes, out_channels, **where))
        self.shift = nn.Parameter(torch.zeros(num_classes, in_channels, **where))

    def reset_parameters(self) -> None:
        """Draw the weights anew, as ``nn.Conv2d`` does, with equal classes."""
        super().reset_parameters()
        if "scale" in self._parameters:  # not yet while nn.Conv2d initialises itself
            nn.init.ones_(self.scale)
            nn.init.zeros_(self.shift)

    def forward(self, input: Tensor, y: Tensor) -> Tensor:
        """Convolve each sample with the kernels of its class."""
        if (node := traced(self, input, y)) is not None:
            return node
        padding = self.padding
        if self.padding_mode != "zeros":
            input = nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = _pair(0)
        tables = self.scale, self.shift
        return F.conditional_conv2d(
            input, y, self.weight, *tables, self.bias, self.stride, padding, self.dilation, self.groups
        )

    def _load_from_state_dict(self, state_dict, prefix, *others) -> None:
        """A checkpoint of the plain layer loads with equal classes."""
        if prefix + "weight" in state_dict and not {prefix + "scale", prefix + "shift"} & state_dict.keys():
            weight = state_dict[prefix + "weight"]
            state_dict = state_dict | {
                prefix + "scale": weight.new_ones(self.scale.shape),
                prefix + "shift": weight.new_zeros(self.shift.shape),
            }
        super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        return super().extra_repr() + f", num_classes={self.num_classes}"
