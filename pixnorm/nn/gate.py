"""CBAM's attention (arXiv 1807.06521): gates of channels and of pixels."""

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from pixnorm import functional as F
from pixnorm.nn._leaf import traced
from pixnorm.nn._norm import Norm2d
from pixnorm.ops._dispatch import IMPLS
from pixnorm.ops.checks import check_eps, check_option


class ChannelGate(nn.Module):
    """CBAM's channel gate (arXiv 1807.06521, eq. 2): scales each channel of a sample by a number in (0, 1) that a
    perceptron of two layers makes of the channels' means and maxima.

    Args:
        num_features: C.
        reduction: the perceptron has C // reduction hidden units.
        impl: as in :func:`pixnorm.functional.channel_gate`.
        device, dtype: of the parameters.

    Shape:
        (N, C, H, W) to (N, C, H, W).

    Parameters ``fc1_weight`` (C // reduction, C), ``fc1_bias``, ``fc2_weight`` (C, C // reduction) and ``fc2_bias``,
    initialised as those of ``nn.Linear``. They are ``mlp.1`` and ``mlp.3`` in the authors' code.

    Raises:
        ValueError: ``num_features`` or ``reduction`` is not positive, or there would be no hidden units.
    """

    def __init__(self, num_features: int, reduction: int = 16, impl: str = "auto", device=None, dtype=None):
        super().__init__()
        if num_features < 1 or not 1 <= reduction <= num_features:
            raise ValueError(
                "expected a positive num_features, and a positive reduction that is not larger, "
                f"got {num_features} and {reduction}"
            )
        check_option("impl", impl, IMPLS)
        self.num_features, self.reduction, self.impl = num_features, reduction, impl
        hidden, where = num_features // reduction, {"device": device, "dtype": dtype}
        self.fc1_weight = nn.Parameter(torch.empty((hidden, num_features), **where))
        self.fc1_bias = nn.Parameter(torch.empty(hidden, **where))
        self.fc2_weight = nn.Parameter(torch.empty((num_features, hidden), **where))
        self.fc2_bias = nn.Parameter(torch.empty(num_features, **where))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as ``nn.Linear`` does."""
        for weight, bias in ((self.fc1_weight, self.fc1_bias), (self.fc2_weight, self.fc2_bias)):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(weight.shape[1])
            nn.init.uniform_(bias, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        """The scaled features."""
        if (node := traced(self, input)) is not None:
            return node
        parameters = self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias
        return F.channel_gate(input, *parameters, impl=self.impl)

    def extra_repr(self) -> str:
        return f"{self.num_features}, reduction={self.reduction}, impl={self.impl!r}"


class SpatialGate(Norm2d):
    """CBAM's spatial gate (arXiv 1807.06521, eq. 3): scales each pixel by a number in (0, 1) that a convolution and a
    batch norm make of the maximum and the mean over its channels.

    Args:
        kernel_size: of the convolution, odd; an integer or a pair.
        eps, momentum, track_running_stats: of the batch norm, as in ``nn.BatchNorm2d``; the default momentum is that of
            the authors' code.
        impl: as in :func:`pixnorm.functional.spatial_gate`.
        device, dtype: of the parameters and buffers.
        process_group: the processes whose batches are normalised as one, as :func:`pixnorm.convert_sync` sets it.

    Shape:
        (N, C, H, W) to (N, C, H, W), for any C.

    Parameters ``weight`` (1, 2, *kernel_size), initialised as that of ``nn.Conv2d``, ``bn_weight`` (1,), 1 at first,
    and ``bn_bias`` (1,), 0. The buffers are those of ``nn.BatchNorm2d``.

    Raises:
        ValueError: the kernel size is not odd, or eps is negative.
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, int] = 7,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        track_running_stats: bool = True,
        impl: str = "auto",
        device=None,
        dtype=None,
        *,
        process_group=None,
    ):
        super().__init__(1, eps, momentum, track_running_stats, process_group)
        self.kernel_size = _pair(kernel_size)
        if any(size < 1 or size % 2 == 0 for size in self.kernel_size):
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        check_eps(eps, training=False)
        check_option("impl", impl, IMPLS)
        self.impl = impl
        where = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty((1, 2, *self.kernel_size), **where))
        self.bn_weight = nn.Parameter(torch.empty(1, **where))
        self.bn_bias = nn.Parameter(torch.empty(1, **where))
        self._register_statistics({"": 1}, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew, as ``nn.Conv2d`` does, and start the batch norm anew, as ``nn.BatchNorm2d`` does."""
        self.reset_running_stats()
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn.init.ones_(self.bn_weight)
        nn.init.zeros_(self.bn_bias)

    def forward(self, input: Tensor) -> Tensor:
        """The scaled features."""
        if (node := traced(self, input)) is not None:
            return node
        buffers, options = self._statistics()
        y = F.spatial_gate(input, self.weight, self.bn_weight, self.bn_bias, *buffers, **options, impl=self.impl)
        return self._counted(y)

    def extra_repr(self) -> str:
        sizes = f"kernel_size={self.kernel_size}, eps={self.eps}, momentum={self.momentum}"
        return f"{sizes}, track_running_stats={self.track_running_stats}, impl={self.impl!r}{self._repr_of_group()}"
