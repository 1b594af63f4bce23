"""Batch norms: plain, and with scale and shift from a class, from a latent vector, or from both."""

import torch
from torch import Tensor, nn

from pixnorm.functional import modulated_norm
from pixnorm.nn._conditional import Conditional, check_latent, check_sizes
from pixnorm.nn._leaf import traced
from pixnorm.nn._norm import Norm2d
from pixnorm.ops._dispatch import IMPLS
from pixnorm.ops.checks import check_eps, check_option
from pixnorm.ops.common import ACTIVATIONS, rows_of_classes
from pixnorm.ops.modulate import rows_for


class ModulatedNorm2d(Norm2d):
    """What layers on :func:`pixnorm.functional.modulated_norm` share: its options.

    Args:
        num_features: C, the channels of the input.
        eps, momentum, track_running_stats: as in ``nn.BatchNorm2d``.
        upsample: 2 normalises ``interpolate(x, scale_factor=2, mode="nearest")``, at the cost of low resolution.
        activation: None, ``"relu"`` or ``"leaky_relu"``, applied to the result.
        negative_slope: of the latter.
        impl: ``"auto"``, ``"native"``, ``"triton"`` or ``"reference"``.
        gamma_offset: added to the scale.
        statistics: ``"batch"``, or ``"instance"``, which has no buffers.
        device, dtype: of the buffers.
        process_group: as in ``Norm2d``; nothing to exchange with instances.
    """

    def __init__(
        self,
        num_features: int,
        eps: float,
        momentum: float | None,
        track_running_stats: bool,
        upsample: int,
        activation: str | None,
        negative_slope: float,
        impl: str,
        *,
        gamma_offset: float = 0.0,
        statistics: str = "batch",
        device=None,
        dtype=None,
        process_group=None,
    ):
        super().__init__(num_features, eps, momentum, track_running_stats and statistics == "batch", process_group)
        check_eps(eps, training=False)
        check_option("statistics", statistics, ("batch", "instance"))
        check_option("upsample", upsample, (1, 2))
        check_option("activation", activation, ACTIVATIONS)
        check_option("impl", impl, IMPLS)
        self.upsample = upsample
        self.activation = activation
        self.negative_slope = negative_slope
        self.impl = impl
        self.gamma_offset = gamma_offset
        self.statistics = statistics
        self._register_statistics({"": num_features}, device, dtype)

    @property
    def has_batch_statistics(self) -> bool:
        return self.statistics == "batch"

    def _modulated(self, x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
        buffers, options = self._statistics()
        if gamma is not None:
            gamma, beta = rows_for(gamma, x), rows_for(beta, x)
        y = modulated_norm(
            x,
            gamma,
            beta,
            *buffers,
            **options,
            statistics=self.statistics,
            gamma_offset=self.gamma_offset,
            upsample=self.upsample,
            activation=self.activation,
            negative_slope=self.negative_slope,
            impl=self.impl,
        )
        return self._counted(y)

    def extra_repr(self) -> str:
        options = {
            "eps": self.eps,
            **({"momentum": self.momentum} if self.statistics == "batch" else {"statistics": self.statistics}),
            **({} if self.track_running_stats or self.statistics != "batch" else {"track_running_stats": False}),
            **({"upsample": self.upsample} if self.upsample != 1 else {}),
            **({"activation": self.activation} if self.activation else {}),
            **({"impl": self.impl} if self.impl != "auto" else {}),
        }
        shown = [str(self.num_features), *(f"{name}={value!r}" for name, value in options.items())]
        return ", ".join(shown) + self._repr_of_group()


class BatchNorm2d(ModulatedNorm2d):
    r"""``nn.BatchNorm2d``, with nearest upsampling before it and an activation after it in the same pass.

    ``BatchNorm2d(C, upsample=2, activation="relu")`` is the head of a GAN's block in one op, with statistics, backward
    and memory at low resolution. Checkpoints of ``nn.BatchNorm2d`` load.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as in ``nn.BatchNorm2d``.
        upsample, activation, negative_slope, impl: as in :func:`pixnorm.functional.modulated_norm`.
        process_group: the processes whose batches are normalised as one, as :func:`pixnorm.convert_sync` sets it.

    Shape:
        (N, C, H, W) to (N, C, H * upsample, W * upsample).

    Parameters ``weight`` and ``bias`` (C), 1 and 0 at first; buffers as in ``nn.BatchNorm2d``.

    Example:
        >>> y = pixnorm.nn.BatchNorm2d(64, upsample=2, activation="relu")(torch.randn(8, 64, 16, 16))
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
        *,
        upsample: int = 1,
        activation: str | None = None,
        negative_slope: float = 0.2,
        impl: str = "auto",
        process_group=None,
    ):
        super().__init__(
            num_features,
            eps,
            momentum,
            track_running_stats,
            upsample,
            activation,
            negative_slope,
            impl,
            device=device,
            dtype=dtype,
            process_group=process_group,
        )
        self.affine = affine
        for name in ("weight", "bias"):
            parameter = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if affine else None
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set scale to 1 and shift to 0, and reset the running statistics."""
        self.reset_running_stats()
        if self.affine:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the input; in training also update the running statistics."""
        if (node := traced(self, input)) is not None:
            return node
        return self._modulated(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", affine=False" if not self.affine else "")


class ConditionalBatchNorm2d(Conditional, ModulatedNorm2d):
    r"""Batch norm with a scale and a shift for each class (cBN, arXiv 1610.07629), and from a latent vector (ccBN):

    ``y = (G[y] + z Wg) · x̂ + B[y] + z Wb``; without ``latent_dim``, only the tables.

    Args:
        num_features: C, the channels of the input.
        num_classes: K.
        latent_dim: dz, the length of z; 0 for classes alone.
        eps, momentum, track_running_stats, device, dtype: as in ``nn.BatchNorm2d``.
        upsample, activation, negative_slope, impl: as in :func:`pixnorm.functional.modulated_norm`.
        process_group: the processes whose batches are normalised as one, as :func:`pixnorm.convert_sync` sets it.

    Shape:
        x (N, C, H, W), y (N) of int64 or one-hot (N, K), and z (N, dz) to (N, C, H * upsample, W * upsample).

    Parameters ``gamma_table`` and ``beta_table`` (K, C), 1 and 0 at first; with ``latent_dim``, ``gamma_latent`` and
    ``beta_latent`` (C, dz), Glorot uniform. Buffers as in ``nn.BatchNorm2d``.

    Raises:
        ValueError: an argument is out of range; y or z does not fit, or z is missing.
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        latent_dim: int = 0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        upsample: int = 1,
        activation: str | None = None,
        impl: str = "auto",
        device=None,
        dtype=None,
        *,
        negative_slope: float = 0.2,
        process_group=None,
    ):
        check_sizes(num_classes, latent_dim)
        super().__init__(
            num_features,
            eps,
            momentum,
            track_running_stats,
            upsample,
            activation,
            negative_slope,
            impl,
            device=device,
            dtype=dtype,
            process_group=process_group,
        )
        self.gamma_table = nn.Parameter(torch.empty(num_classes, num_features, device=device, dtype=dtype))
        self.beta_table = nn.Parameter(torch.empty(num_classes, num_features, device=device, dtype=dtype))
        self._register_conditions(num_classes, latent_dim, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew, and reset the running statistics."""
        self.reset_running_stats()
        nn.init.ones_(self.gamma_table)
        nn.init.zeros_(self.beta_table)
        self._reset_latent()

    def forward(self, input: Tensor, y: Tensor, z: Tensor | None = None) -> Tensor:
        """Normalise the input, then scale and shift each sample's channels as its class, and z, say."""
        if (node := traced(self, input, y, z)) is not None:
            return node
        self._check(input, y, z)
        gamma, beta = rows_of_classes(y, self.gamma_table), rows_of_classes(y, self.beta_table)
        if (rows := self._rows(z)) is not None:
            gamma, beta = gamma + rows[0], beta + rows[1]
        return self._modulated(input, gamma, beta)


class LatentBatchNorm2d(ModulatedNorm2d):
    r"""The batch norm of BigGAN (arXiv 1809.11096), whose scale and shift are linear in a latent vector:

    ``y = (1 + z Wg) · x̂ + z Wb``, without biases, where x̂ is x normalised as by ``nn.BatchNorm2d``.

    For conditional models, z is the latent vector followed by the one-hot vector of the class; the corresponding rows
    of the weights are then the tables of a conditional batch norm.

    Args:
        num_features: C, the channels of the input.
        latent_dim: dz, the length of z.
        eps, momentum, track_running_stats: as in ``nn.BatchNorm2d``.
        device, dtype: of parameters and buffers.
        upsample, activation, negative_slope, impl: as in :func:`pixnorm.functional.modulated_norm`.
        process_group: the processes whose batches are normalised as one, as :func:`pixnorm.convert_sync` sets it.

    Shape:
        x (N, C, H, W) and z (N, dz) to (N, C, H * upsample, W * upsample).

    Parameters ``gamma.weight`` and ``beta.weight`` (C, dz), Glorot uniform; buffers as in ``nn.BatchNorm2d``.
    (Older checkpoints, with the buffer prefix ``norm.``, load.)

    Raises:
        ValueError: ``num_features`` or ``latent_dim`` is not positive, or z does not fit.
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
        *,
        upsample: int = 1,
        activation: str | None = None,
        negative_slope: float = 0.2,
        impl: str = "auto",
        process_group=None,
    ):
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be positive, got {latent_dim}")
        where = {"device": device, "dtype": dtype}
        super().__init__(
            num_features,
            eps,
            momentum,
            track_running_stats,
            upsample,
            activation,
            negative_slope,
            impl,
            gamma_offset=1.0,
            process_group=process_group,
            **where,
        )
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
        check_latent(z, input, self.gamma.in_features)
        return self._modulated(input, self.gamma(z), self.beta(z))

    def _load_from_state_dict(self, state_dict, prefix, *others) -> None:
        old = f"{prefix}norm."
        renamed = {name: prefix + name.removeprefix(old) for name in state_dict if name.startswith(old)}
        state_dict = {renamed.get(name, name): value for name, value in state_dict.items()}
        super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        return super().extra_repr() + f", latent_dim={self.gamma.in_features}"
