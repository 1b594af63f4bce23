"""Layers with an equalised learning rate (ProGAN, arXiv 1710.10196, 4.1): weights are stored with unit variance, and
scaled when they are used, so that optimisers with normalised steps learn all layers at one speed."""

from math import prod

from torch import Tensor, nn
from torch.nn.modules.utils import _pair

HE = 2**0.5  # the gain of He's initialisation


class _Equalized(nn.Module):
    """Mixed into a layer with ``weight`` and ``bias``: what its forward uses in their place."""

    gain: float
    lr_multiplier: float
    bias_init: float

    def reset_parameters(self) -> None:
        """Draw the weights anew: normal, so that ``lr_multiplier`` times them has unit variance."""
        nn.init.normal_(self.weight, std=1 / self.lr_multiplier)
        if self.bias is not None:
            nn.init.constant_(self.bias, self.bias_init / self.lr_multiplier)

    def scaled(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias (or None) in use."""
        weight = self.weight * (self.gain * self.lr_multiplier / prod(self.weight.shape[1:]) ** 0.5)
        return weight, self.bias if self.bias is None or self.lr_multiplier == 1 else self.bias * self.lr_multiplier

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gain={self.gain:.4g}, lr_multiplier={self.lr_multiplier}"


def _check_multiplier(lr_multiplier: float) -> None:
    if not lr_multiplier > 0:
        raise ValueError(f"lr_multiplier must be positive, got {lr_multiplier}")


class EqualizedLinear(_Equalized, nn.Linear):
    r"""``nn.Linear`` with an equalised learning rate: ``x (c W)ᵀ + lr_multiplier · b``, ``c = gain · lr_multiplier /
    √in_features``.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        gain: of the standard deviation of the weights; √2 before a ReLU (He), 1 without.
        lr_multiplier: scales the learning rate; the layer's function at the start is the same.
        bias_init: the bias in use at the start.

    Raises:
        ValueError: ``lr_multiplier`` is not positive.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        gain: float = HE,
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
    ):
        _check_multiplier(lr_multiplier)
        # nn.Linear draws the weights in its constructor.
        self.__dict__.update(gain=gain, lr_multiplier=lr_multiplier, bias_init=bias_init)
        super().__init__(in_features, out_features, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear``."""
        return nn.functional.linear(input, *self.scaled())


class EqualizedConv2d(_Equalized, nn.Conv2d):
    r"""``nn.Conv2d`` with an equalised learning rate: it uses kernels ``c W``, ``c = gain · lr_multiplier / √fan_in``,
    and a bias ``lr_multiplier · b``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            in ``nn.Conv2d``.
        gain, lr_multiplier, bias_init: as in :class:`EqualizedLinear`.

    Raises:
        ValueError: ``lr_multiplier`` is not positive.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        gain: float = HE,
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
    ):
        _check_multiplier(lr_multiplier)
        self.__dict__.update(gain=gain, lr_multiplier=lr_multiplier, bias_init=bias_init)
        geometry = _pair(kernel_size), stride, padding, dilation, groups
        super().__init__(in_channels, out_channels, *geometry, bias, padding_mode, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Conv2d``."""
        return self._conv_forward(input, *self.scaled())
