"""What conditional norms share: a class for each sample, and a latent vector that is added to scale and shift."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnorm.ops.checks import check_classes, has_shape


def check_sizes(num_classes: int, latent_dim: int) -> None:
    if num_classes < 1:
        raise ValueError(f"num_classes must be positive, got {num_classes}")
    if latent_dim < 0:
        raise ValueError(f"latent_dim must not be negative, got {latent_dim}")


def check_latent(z: Tensor | None, x: Tensor, latent_dim: int) -> None:
    """z is there where it is needed, (N, dz)."""
    if z is None and latent_dim:
        raise ValueError(f"z is needed, of shape {(x.shape[0], latent_dim)}")
    if z is not None and not has_shape(z, (x.shape[0], latent_dim)):
        wanted = (x.shape[0], latent_dim)
        raise ValueError(f"z must have shape {wanted} for x of shape {tuple(x.shape)}, got {tuple(z.shape)}")


class Conditional(nn.Module):
    """A mixin before the norm, whose constructor comes first; parameters ``gamma_latent`` and ``beta_latent``."""

    def _register_conditions(self, num_classes: int, latent_dim: int, device, dtype) -> None:
        self.num_classes = num_classes
        self.latent_dim = latent_dim
        for name in ("gamma_latent", "beta_latent"):
            weight = torch.empty(self.num_features, latent_dim, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(weight) if latent_dim else None)

    def _reset_latent(self) -> None:
        if self.latent_dim:
            nn.init.xavier_uniform_(self.gamma_latent)
            nn.init.xavier_uniform_(self.beta_latent)

    def _check(self, x: Tensor, y: Tensor, z: Tensor | None) -> None:
        check_classes(y, x.shape[0], self.num_classes)
        check_latent(z, x, self.latent_dim)

    def _rows(self, z: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """What z adds to scale and shift, each (N, C)."""
        if not self.latent_dim:
            return None
        return F.linear(z, self.gamma_latent), F.linear(z, self.beta_latent)

    def extra_repr(self) -> str:
        return super().extra_repr() + f", num_classes={self.num_classes}, latent_dim={self.latent_dim}"
