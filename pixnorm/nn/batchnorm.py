"""Normalisation whose scale and shift come from a latent vector."""

import torch
from torch import Tensor, nn


class LatentBatchNorm2d(nn.Module):
    r"""The batch norm of BigGAN (arXiv 1809.11096), whose scale and shift are linear in a latent vector:

    ``y = (1 + z Wg) · x̂ + z Wb``, without biases, where x̂ is x normalised as by ``nn.BatchNorm2d``.

    For classes too, z is the latent vector followed by the one-hot vector of the class: the rows of the weights that
    belong to it are then the tables of a conditional batch norm.

    Args:
        num_features: C, the channels of the input.
        latent_dim: dz, the length of z.
        eps, momentum, track_running_stats: as in ``nn.BatchNorm2d``.
        device, dtype: of parameters and buffers.

    Shape:
        x (N, C, H, W) and z (N, dz) to (N, C, H, W).

    Parameters ``gamma.weight`` and ``beta.weight`` (C, dz), Glorot uniform; buffers those of ``norm``, a batch norm
    without an affine of its own.

    Raises:
        ValueError: ``num_features`` or ``latent_dim`` is not positive.
    """

    def __init__(
        self,
        num_features: int,
        latent_dim: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if num_features < 1 or latent_dim < 1:
            raise ValueError(f"num_features and latent_dim must be positive, got {num_features} and {latent_dim}")
        where = {"device": device, "dtype": dtype}
        self.norm = nn.BatchNorm2d(num_features, eps, momentum, False, track_running_stats, **where)
        self.gamma = nn.Linear(latent_dim, num_features, bias=False, **where)
        self.beta = nn.Linear(latent_dim, num_features, bias=False, **where)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, and reset the running statistics."""
        self.norm.reset_parameters()
        nn.init.xavier_uniform_(self.gamma.weight)
        nn.init.xavier_uniform_(self.beta.weight)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Normalise x, then scale and shift each sample's channels as z says."""
        if z.dim() != 2 or z.shape != (x.shape[0], self.gamma.in_features):
            wanted = (x.shape[0], self.gamma.in_features)
            raise ValueError(f"z must have shape {wanted} for x of shape {tuple(x.shape)}, got {tuple(z.shape)}")
        x_hat = self.norm(x)
        gamma, beta = (linear(z).to(x_hat.dtype)[:, :, None, None] for linear in (self.gamma, self.beta))
        return torch.addcmul(beta, x_hat, 1 + gamma)
