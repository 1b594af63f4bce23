"""The mapping network of StyleGAN (arXiv 1812.04948), and what is done with the styles w that it gives."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnorm.nn._leaf import traced
from pixnorm.nn.equalized import EqualizedLinear
from pixnorm.ops.common import wide


def pixel_norm(x: Tensor, eps: float = 1e-8) -> Tensor:
    """Divide by the root mean square over dimension 1: channels, or the numbers of a latent vector (arXiv 1710.10196).

    Args:
        x: (N, C, ...).
        eps: added to the mean square.

    Returns:
        x's shape and dtype.
    """
    values = wide(x)
    return (values * (values.square().mean(1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def style_mixing(w1: Tensor, w2: Tensor, cut: int | Tensor) -> Tensor:
    """Mixing regularisation (arXiv 1812.04948, 3.1): layers before ``cut`` take w1, the others w2.

    Args:
        w1, w2: (N, L, D), the styles of L layers.
        cut: one for all samples, or (N,) of integers.

    Returns:
        (N, L, D).

    Raises:
        ValueError: the shapes differ or do not fit.
    """
    if w1.dim() != 3 or w1.shape != w2.shape:
        raise ValueError(f"w1 and w2 must both be (N, L, D), got {tuple(w1.shape)} and {tuple(w2.shape)}")
    if isinstance(cut, Tensor):
        if cut.dim() > 1 or (cut.dim() == 1 and cut.shape[0] not in (1, w1.shape[0])):
            raise ValueError(f"cut must be a number or have shape ({w1.shape[0]},), got {tuple(cut.shape)}")
        cut = cut.reshape(-1, 1, 1)
    layers = torch.arange(w1.shape[1], device=w1.device)[:, None]
    return torch.where(layers < cut, w1, w2)


def truncate(w: Tensor, w_avg: Tensor, psi: float = 0.7, layers: int | None = 8) -> Tensor:
    """The truncation trick (arXiv 1812.04948, B): ``w_avg + psi * (w - w_avg)`` in the first layers.

    Args:
        w: (N, L, D), or (N, D), of all layers.
        w_avg: (D,), the mean of w.
        psi: 0 gives w_avg, 1 gives w.
        layers: how many are truncated; None: all.

    Returns:
        w's shape.

    Raises:
        ValueError: a shape does not fit.
    """
    if w.dim() not in (2, 3) or w_avg.shape != w.shape[-1:]:
        raise ValueError(f"expected w (N, L, D) or (N, D) and w_avg (D,), got {tuple(w.shape)}, {tuple(w_avg.shape)}")
    if layers is not None and layers < 0:
        raise ValueError(f"layers must not be negative, got {layers}")
    truncated = w_avg.to(w.dtype).lerp(w, psi)
    if w.dim() == 2 or layers is None:
        return truncated
    return torch.cat([truncated[:, :layers], w[:, layers:]], 1)


class MappingNetwork(nn.Module):
    """From latent vectors to styles: pixel norm, then fully connected layers with leaky ReLU 0.2 and an equalised
    learning rate (arXiv 1812.04948).

    In training it follows the mean of its results in the buffer ``w_avg`` (D,), for :func:`truncate`.

    Args:
        latent_dim, style_dim: the lengths of z and w.
        layers: their number.
        hidden_dim: of the layers between; as ``style_dim`` if None.
        lr_multiplier: of the layers' learning rate.
        w_avg_decay: the weight of the past in ``w_avg``; 1 leaves it as it is.
        device, dtype: of parameters and buffer.

    Shape:
        z (N, latent_dim) to w (N, style_dim).

    With the standard sizes it has 2 101 248 parameters.

    Raises:
        ValueError: ``layers`` is not positive, or a weight is out of range.
    """

    def __init__(
        self,
        latent_dim: int = 512,
        style_dim: int = 512,
        layers: int = 8,
        hidden_dim: int | None = None,
        lr_multiplier: float = 0.01,
        w_avg_decay: float = 0.995,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers must be positive, got {layers}")
        if not 0 <= w_avg_decay <= 1:
            raise ValueError(f"w_avg_decay must be in [0, 1], got {w_avg_decay}")
        self.latent_dim, self.style_dim, self.w_avg_decay = latent_dim, style_dim, w_avg_decay
        sizes = [latent_dim, *[hidden_dim or style_dim] * (layers - 1), style_dim]
        where = {"device": device, "dtype": dtype}
        self.layers = nn.ModuleList(
            [EqualizedLinear(i, o, lr_multiplier=lr_multiplier, **where) for i, o in pairwise(sizes)]
        )
        self.register_buffer("w_avg", torch.zeros(style_dim, **where))

    def reset_parameters(self) -> None:
        """``w_avg`` starts at 0; the layers inside have methods of their own."""
        nn.init.zeros_(self.w_avg)

    def forward(self, z: Tensor) -> Tensor:
        """The styles of latent vectors."""
        if (node := traced(self, z)) is not None:
            return node
        if z.dim() != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(f"z must have shape (N, {self.latent_dim}), got {tuple(z.shape)}")
        w = pixel_norm(z)
        for layer in self.layers:
            w = F.leaky_relu(layer(w), 0.2)
        if self.training and self.w_avg_decay < 1 and w.shape[0] > 0:
            with torch.no_grad():
                mean = wide(w.detach()).mean(0)
                self.w_avg.copy_(mean.lerp(self.w_avg.to(mean.dtype), self.w_avg_decay))
        return w

    def extra_repr(self) -> str:
        return f"latent_dim={self.latent_dim}, style_dim={self.style_dim}, w_avg_decay={self.w_avg_decay}"
