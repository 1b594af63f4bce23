"""Adaptive instance normalisation as StyleGAN has it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnorm.nn._leaf import traced
from pixnorm.nn.batchnorm import ModulatedNorm2d
from pixnorm.ops.checks import has_shape


class AdaIN2d(ModulatedNorm2d):
    r"""AdaIN with a learned style (StyleGAN, arXiv 1812.04948): instance norm, then scale and shift from a vector w:

    ``y = (1 + s) · x̂ + b``, with ``[s, b] = A w + a``.

    Args:
        num_features: C, the channels of the input.
        style_dim: the length of w.
        eps: added to the variance.
        device, dtype: of the parameters.
        upsample, activation, negative_slope, impl: as in :func:`pixnorm.functional.modulated_norm`.

    Shape:
        x (N, C, H, W) and w (N, style_dim) to (N, C, H * upsample, W * upsample).

    Parameters ``weight`` (2C, style_dim), Glorot uniform, and ``bias`` (2C), 0 at first: scales, then shifts.

    Raises:
        ValueError: ``num_features`` or ``style_dim`` is not positive, or w does not fit.
    """

    def __init__(
        self,
        num_features: int,
        style_dim: int,
        eps: float = 1e-5,
        upsample: int = 1,
        activation: str | None = None,
        impl: str = "auto",
        device=None,
        dtype=None,
        *,
        negative_slope: float = 0.2,
    ):
        if style_dim < 1:
            raise ValueError(f"style_dim must be positive, got {style_dim}")
        super().__init__(
            num_features,
            eps,
            None,
            False,
            upsample,
            activation,
            negative_slope,
            impl,
            gamma_offset=1.0,
            statistics="instance",
        )
        self.style_dim = style_dim
        self.weight = nn.Parameter(torch.empty(2 * num_features, style_dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(2 * num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, w: Tensor) -> Tensor:
        """Normalise each sample's channels, then scale and shift them as w says."""
        if (node := traced(self, input, w)) is not None:
            return node
        if not has_shape(w, (input.shape[0], self.style_dim)):
            wanted = (input.shape[0], self.style_dim)
            raise ValueError(f"w must have shape {wanted} for x of shape {tuple(input.shape)}, got {tuple(w.shape)}")
        scale, shift = F.linear(w, self.weight, self.bias).chunk(2, dim=1)
        return self._modulated(input, scale, shift)

    def extra_repr(self) -> str:
        return super().extra_repr() + f", style_dim={self.style_dim}"
