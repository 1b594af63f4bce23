"""Instance normalisation."""

from torch import Tensor

from pixnorm.nn._leaf import traced
from pixnorm.nn.batchnorm import ModulatedNorm2d


class InstanceNorm2d(ModulatedNorm2d):
    r"""``nn.InstanceNorm2d`` without scale and shift (arXiv 1607.08022), with nearest upsampling before it and an
    activation after it in the same pass: ``y = act((x - μ) / √(σ² + eps))``, over H, W of each sample and channel.

    It has neither parameters nor buffers, so it adds no keys to a state dict.

    Args:
        num_features: C, the channels of the input.
        eps: added to the variance.
        upsample, activation, negative_slope, impl: as in :func:`pixnorm.functional.modulated_norm`.

    Shape:
        (N, C, H, W) to (N, C, H * upsample, W * upsample).

    Raises:
        ValueError: ``num_features`` is not positive, or the input has other channels or one value per channel.

    Example:
        >>> y = pixnorm.nn.InstanceNorm2d(64, activation="leaky_relu")(torch.randn(8, 64, 16, 16))
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        *,
        upsample: int = 1,
        activation: str | None = None,
        negative_slope: float = 0.2,
        impl: str = "auto",
    ):
        super().__init__(
            num_features, eps, None, False, upsample, activation, negative_slope, impl, statistics="instance"
        )

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each sample's channels."""
        if (node := traced(self, input)) is not None:
            return node
        if input.dim() == 4 and input.shape[1] != self.num_features:
            raise ValueError(f"expected input of {self.num_features} channels, got {tuple(input.shape)}")
        return self._modulated(input, None, None)
