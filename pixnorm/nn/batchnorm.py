"""Normalisation whose scale and shift come from a latent vector."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnorm.nn._leaf import traced
from pixnorm.nn._norm import Norm2d
from pixnorm.ops.checks import check_eps, has_shape
from pixnorm.ops.common import public


class LatentBatchNorm2d(Norm2d):
    r"""The batch norm of BigGAN (arXiv 1809.11096), whose scale and shift are linear in a latent vector:

    ``y = (1 + z Wg) · x̂ + z Wb``, without biases, where x̂ is x normalised as by ``nn.BatchNorm2d``.

    For conditional models, z is the latent vector followed by the one-hot vector of the class; the corresponding rows
    of the weights are then the tables of a conditional batch norm.

    Args:
        num_features: C, the channels of the input.
        latent_dim: dz, the length of z.
        eps, momentum, track_running_stats: as in ``nn.BatchNorm2d``.
        device, dtype: of parameters and buffers.

    Shape:
        x (N, C, H, W) and z (N, dz) to (N, C, H, W).

    Parameters ``gamma.weight`` and ``beta.weight`` (C, dz), Glorot uniform; buffers as in ``nn.BatchNorm2d``.
    (Older checkpoints, with the buffer prefix ``norm.``, load.)

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
        super().__init__(num_features, eps, momentum, track_running_stats)
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be positive, got {latent_dim}")
        check_eps(eps, training=False)
        where = {"device": device, "dtype": dtype}
        self._register_statistics({"": num_features}, **where)
        self.gamma = nn.Linear(latent_dim, num_features, bias=False, **where)
        self.beta = nn.Linear(latent_dim, num_features, bias=False, **where)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, and reset the running statistics."""
        self.reset_running_stats()
        nn.init.xavier_uniform_(self.gamma.weight)
        nn.init.xavier_uniform_(self.beta.weight)

    def forward(self, input: Tensor, z: Tensor) -> Tensor:
        """Normalise the input, then scale and shift each sample's channels by functions of z."""
        if (node := traced(self, input, z)) is not None:
            return node
        buffers, options = self._statistics()
        y = latent_batch_norm(input, z, self.gamma.weight, self.beta.weight, *buffers, **options)
        return self._counted(y)

    def _load_from_state_dict(self, state_dict, prefix, *others) -> None:
        old = f"{prefix}norm."
        renamed = {name: prefix + name.removeprefix(old) for name in state_dict if name.startswith(old)}
        state_dict = {renamed.get(name, name): value for name, value in state_dict.items()}
        super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, latent_dim={self.gamma.in_features}, eps={self.eps}, momentum={self.momentum}, "
            f"track_running_stats={self.track_running_stats}"
        )


@public
def latent_batch_norm(
    x: Tensor,
    z: Tensor,
    gamma_weight: Tensor,
    beta_weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """The arithmetic of the layer above: ``(1 + z Wgᵀ) · x̂ + z Wbᵀ``."""
    if not has_shape(z, (x.shape[0], gamma_weight.shape[1])):
        wanted = (x.shape[0], gamma_weight.shape[1])
        raise ValueError(f"z must have shape {wanted} for x of shape {tuple(x.shape)}, got {tuple(z.shape)}")
    if x.dim() != 4:
        raise ValueError(f"expected 4D input (got {x.dim()}D input)")
    x_hat = F.batch_norm(x, running_mean, running_var, None, None, training, momentum, eps)
    gamma, beta = (F.linear(z, weight).to(x_hat.dtype)[:, :, None, None] for weight in (gamma_weight, beta_weight))
    return torch.addcmul(beta, x_hat, 1 + gamma)
