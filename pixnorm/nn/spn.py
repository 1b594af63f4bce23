"""The modules of self pixel-wise normalisation, plain and conditional."""

import torch
from torch import Tensor, nn

from pixnorm import functional as F
from pixnorm.nn._leaf import traced
from pixnorm.nn._norm import Norm2d
from pixnorm.nn.batchnorm import check_classes, check_latent, rows_of_classes
from pixnorm.ops._dispatch import IMPLS
from pixnorm.ops.checks import check_eps, check_option
from pixnorm.ops.common import ACTIVATIONS, onlooker
from pixnorm.ops.modulate import rows_for

NOISE = 0.02  # standard deviation, relative to each channel's scale; without it masks get no gradient in the first step
BATCHNORM = ("running_mean", "running_var", "num_batches_tracked")
KERNELS = ("gamma_weight", "gamma_weight_inv", "beta_weight", "beta_weight_inv")
# Conditional convolution's tables for each of the kernels.
SCALES, SHIFTS = ([name.replace("weight", of) for name in KERNELS] for of in ("scale", "shift"))


class SelfLatentNorm2d(Norm2d):
    """What the layers on :func:`pixnorm.functional.spn` share: projection, mask affine, kernels, options.

    Args:
        num_features, kernel_size, mask_channels, eps, momentum, track_running_stats, upsample, activation, impl,
            device, dtype, init, negative_slope: as in :class:`SPN2d`.
        classes: () or (K,): the leading dimensions of ``mask_weight`` and ``mask_bias``.
        depthwise: whether the kernels are (C, 1, k, k), or (C, C, k, k).
    """

    _KINDS = ("", "mask_")

    def __init__(
        self,
        num_features: int,
        kernel_size: int,
        mask_channels: int | None,
        eps: float,
        momentum: float | None,
        track_running_stats: bool,
        upsample: int,
        activation: str | None,
        impl: str,
        device,
        dtype,
        init: str,
        negative_slope: float,
        *,
        classes: tuple[int, ...] = (),
        depthwise: bool = True,
    ):
        super().__init__(num_features, eps, momentum, track_running_stats)
        mask_channels = num_features if mask_channels is None else mask_channels
        check_eps(eps, training=False)
        check_option("kernel_size", kernel_size, (1, 3, 5))
        check_option("mask_channels", mask_channels, (1, num_features))
        check_option("upsample", upsample, (1, 2))
        check_option("activation", activation, ACTIVATIONS)
        check_option("impl", impl, IMPLS)
        check_option("init", init, ("bn", "keras"))
        self.kernel_size = kernel_size
        self.mask_channels = mask_channels
        self.upsample = upsample
        self.activation = activation
        self.impl = impl
        self.init = init
        self.negative_slope = negative_slope
        self.depthwise = depthwise

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.mask_projection = parameter(mask_channels, num_features, 1, 1)
        self.mask_weight = parameter(*classes, mask_channels)
        self.mask_bias = parameter(*classes, mask_channels)
        for name in KERNELS:
            kernel = parameter(num_features, 1 if depthwise else num_features, kernel_size, kernel_size)
            self.register_parameter(name, kernel)
        self._register_statistics({"": num_features, "mask_": mask_channels}, device, dtype)

    def reset_parameters(self) -> None:
        """Draw the parameters as ``init`` says, and reset the running statistics."""
        self.reset_running_stats()
        nn.init.xavier_uniform_(self.mask_projection)
        nn.init.ones_(self.mask_weight)
        nn.init.zeros_(self.mask_bias)
        if self.init == "bn":
            scale = self.gamma_weight.new_ones(self.num_features)
            start_as_batchnorm_(self, scale, torch.zeros_like(scale))
        else:
            limit = (6 / (self.kernel_size**2 * (self.num_features + self.gamma_weight.shape[1]))) ** 0.5
            for name in KERNELS:
                nn.init.uniform_(getattr(self, name), -limit, limit)

    def _normalised(self, function, x: Tensor, *arguments: Tensor | None) -> Tensor:
        """A function of ``pixnorm.functional``, with the statistics and the options of the layer."""
        buffers, options = self._statistics()
        y = function(
            x,
            *arguments,
            *buffers,
            **options,
            upsample=self.upsample,
            activation=self.activation,
            negative_slope=self.negative_slope,
            impl=self.impl,
        )
        return self._counted(y)

    def _load_from_state_dict(self, state_dict, prefix, *others) -> None:
        """A checkpoint of batch norm loads as if ``convert_batchnorm`` had converted that batch norm."""
        found = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        if found.keys() & {"weight", "running_mean"} and "mask_projection" not in found:
            ones = next(iter(found.values())).new_ones(self.num_features, dtype=self.gamma_weight.dtype)
            affine = found.pop("weight", ones), found.pop("bias", torch.zeros_like(ones))
            own = {**self._parameters, **self._buffers}
            # What batch norm has not; a layer on the meta device has nothing to keep: it counts as missing.
            others_own = {
                name: tensor.detach()
                for name, tensor in own.items()
                if name not in KERNELS and name not in BATCHNORM and tensor is not None and not tensor.is_meta
            }
            found |= others_own | kernels_of_batchnorm(*affine, self.kernel_size, NOISE, self.depthwise)
            state_dict = {prefix + name: value for name, value in found.items()}
        super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        slope = f"negative_slope={self.negative_slope}, " if self.activation == "leaky_relu" else ""
        dense = "" if self.depthwise else "depthwise=False, "
        return (
            f"{self.num_features}, kernel_size={self.kernel_size}, mask_channels={self.mask_channels}, eps={self.eps}, "
            f"momentum={self.momentum}, track_running_stats={self.track_running_stats}, upsample={self.upsample}, "
            f"activation={self.activation!r}, {slope}{dense}impl={self.impl!r}"
        )


class SPN2d(SelfLatentNorm2d):
    r"""Self pixel-wise normalisation ("Image Generation with Self Pixel-wise Normalization", arXiv 2201.10725).

    Batch norm whose scale and shift differ from pixel to pixel: depthwise convolutions compute them from a mask of the
    input itself. Replaces :class:`torch.nn.BatchNorm2d` and keeps its arguments, its running statistics and its
    behaviour in training and eval. The equation is in :func:`pixnorm.functional.spn`, which does all the arithmetic.

    It is no subclass of PyTorch's batch norms, so code that looks for those (``torch.optim.swa_utils.update_bn``,
    freezing by ``isinstance``) does not find it: use ``pixnorm.update_statistics`` and ``isinstance(module,
    pixnorm.NORMS)``. A checkpoint of the replaced batch norm loads: the kernels start as after ``convert_batchnorm``.

    Args:
        num_features: C, the channels of the input.
        kernel_size: of the depthwise kernels: 1, 3 or 5.
        mask_channels: C (the default), or 1 for one mask shared by all channels.
        eps: added to the variances of the input and of the projected input.
        momentum: weight of the new batch in the running statistics; None averages over all batches.
        track_running_stats: if False there are no running statistics, and eval mode also uses those of the batch.
        upsample: 2 normalises ``interpolate(x, scale_factor=2, mode="nearest")``, at the cost of the low resolution.
        activation: None, ``"relu"`` or ``"leaky_relu"``, applied to the result.
        impl: ``"auto"``, ``"native"``, ``"triton"`` or ``"reference"``, as in :func:`pixnorm.functional.spn`.
        device: of parameters and buffers.
        dtype: of parameters and buffers; float32 also serves float16 and bfloat16 inputs.
        init: ``"bn"`` starts as plain batch norm with scale 1 and shift 0: each depthwise kernel is that times a delta,
            plus noise N(0, 0.02²), without which the mask would get no gradient in the first step. ``"keras"`` draws
            the depthwise kernels Glorot uniform as Keras does, with limit √(6 / (k² (C + 1))). The projection is Glorot
            uniform in both.
        negative_slope: of ``"leaky_relu"``.
        depthwise: False makes the kernels standard convolutions (C, C, k, k), which the paper's Table 7 has found to be
            worse; they run on the reference.

    Shape:
        (N, C, H, W) to (N, C, H * upsample, W * upsample), in the input's dtype and memory format.

    Parameters ``mask_projection`` (Cm, C, 1, 1), ``mask_weight`` and ``mask_bias`` (Cm), ``gamma_weight``,
    ``gamma_weight_inv``, ``beta_weight`` and ``beta_weight_inv`` (C, 1, k, k), where Cm is ``mask_channels``. Buffers
    ``running_mean`` and ``running_var`` (C), ``mask_running_mean`` and ``mask_running_var`` (Cm),
    ``num_batches_tracked``.

    Raises:
        ValueError: an argument has a value that is not listed above.

    Example:
        >>> y = pixnorm.SPN2d(64)(torch.randn(8, 64, 16, 16))
    """

    def __init__(
        self,
        num_features: int,
        kernel_size: int = 3,
        mask_channels: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        upsample: int = 1,
        activation: str | None = None,
        impl: str = "auto",
        device=None,
        dtype=None,
        *,
        init: str = "bn",
        negative_slope: float = 0.2,
        depthwise: bool = True,
    ):
        super().__init__(
            num_features,
            kernel_size,
            mask_channels,
            eps,
            momentum,
            track_running_stats,
            upsample,
            activation,
            impl,
            device,
            dtype,
            init,
            negative_slope,
            depthwise=depthwise,
        )
        self.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the input; in training also update the running statistics."""
        if (node := traced(self, input)) is not None:
            return node
        kernels = [getattr(self, name) for name in KERNELS]
        return self._normalised(F.spn, input, self.mask_projection, self.mask_weight, self.mask_bias, *kernels)


class ConditionalSPN2d(SelfLatentNorm2d):
    r"""Conditional self pixel-wise normalisation (arXiv 2201.10725, section 3.2 and Table 8): :class:`SPN2d` whose mask
    and kernels depend on the class of each sample, and whose scale and shift also on a latent vector.

    - The mask's batch norm is conditional: ``mask_weight`` and ``mask_bias`` have a row for each class.
    - The kernels are those of conditional convolution (arXiv 1906.00709): in class y, channel c of each of the four is
      ``scale[y, c] * w[c] + shift[y, c]``.
    - With ``latent_dim``, ``z Wg`` is added to γ and ``z Wb`` to β.

    Statistics are those of the whole batch. Kernels are formed only for classes that are in the batch: on a GPU, where
    looking would wait for it, and in compiled graphs, for each sample or for each class, whichever are fewer.

    Args:
        num_features: C, the channels of the input.
        num_classes: K.
        latent_dim: dz, the length of z; 0 for classes alone.
        kernel_size, mask_channels, eps, momentum, track_running_stats, upsample, activation, impl, device, dtype, init,
            negative_slope: as in :class:`SPN2d`.

    Shape:
        x (N, C, H, W), y (N) of int64 or one-hot (also soft) (N, K), and z (N, dz) to (N, C, H * upsample,
        W * upsample). Vectors in place of classes mix the classes' parameters, which then are formed for each sample.

    Parameters of :class:`SPN2d`, with ``mask_weight`` and ``mask_bias`` (K, Cm); tables (K, C), 1 and 0 at first,
    ``gamma_scale`` and ``gamma_shift``, ``gamma_scale_inv``, ``gamma_shift_inv``, and the same four of beta; with
    ``latent_dim``, ``gamma_latent`` and ``beta_latent`` (C, dz), Glorot uniform. Buffers as in :class:`SPN2d`.
    Checkpoints of :class:`SPN2d` load: all classes start as that layer.

    Raises:
        ValueError: an argument is out of range; y or z does not fit, or z is missing.

    Example:
        >>> norm = pixnorm.ConditionalSPN2d(64, num_classes=10, latent_dim=128)
        >>> y = norm(torch.randn(8, 64, 16, 16), torch.randint(10, (8,)), torch.randn(8, 128))
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        latent_dim: int = 0,
        kernel_size: int = 3,
        mask_channels: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        upsample: int = 1,
        activation: str | None = None,
        impl: str = "auto",
        device=None,
        dtype=None,
        *,
        init: str = "bn",
        negative_slope: float = 0.2,
    ):
        if num_classes < 1:
            raise ValueError(f"num_classes must be positive, got {num_classes}")
        if latent_dim < 0:
            raise ValueError(f"latent_dim must not be negative, got {latent_dim}")
        super().__init__(
            num_features,
            kernel_size,
            mask_channels,
            eps,
            momentum,
            track_running_stats,
            upsample,
            activation,
            impl,
            device,
            dtype,
            init,
            negative_slope,
            classes=(num_classes,),
        )
        self.num_classes = num_classes
        self.latent_dim = latent_dim

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        for name in (*SCALES, *SHIFTS):
            self.register_parameter(name, parameter(num_classes, num_features))
        for name in ("gamma_latent", "beta_latent"):
            self.register_parameter(name, parameter(num_features, latent_dim) if latent_dim else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters as ``init`` says, and reset the running statistics."""
        super().reset_parameters()
        for scale, shift in zip(SCALES, SHIFTS, strict=True):
            nn.init.ones_(getattr(self, scale))
            nn.init.zeros_(getattr(self, shift))
        if self.latent_dim:
            nn.init.xavier_uniform_(self.gamma_latent)
            nn.init.xavier_uniform_(self.beta_latent)

    def forward(self, input: Tensor, y: Tensor, z: Tensor | None = None) -> Tensor:
        """Normalise the input, with the mask and the kernels of each sample's class, and by z, say."""
        if (node := traced(self, input, y, z)) is not None:
            return node
        check_classes(y, input.shape[0], self.num_classes)
        check_latent(z, input, self.latent_dim)
        index, mask_weight, mask_bias, kernels = self._groups(y)
        rows = (None, None)
        if self.latent_dim:
            rows = [rows_for(nn.functional.linear(z, of), input) for of in (self.gamma_latent, self.beta_latent)]
        learnt = self.mask_projection, mask_weight, mask_bias, *kernels
        return self._normalised(F.conditional_spn, input, index, *learnt, *rows)

    def _groups(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """Each sample's group; and the groups' mask affine (G, Cm) and kernels (G, C, 1, k, k)."""
        samples = y.shape[0]
        if y.dim() == 2:
            index = torch.arange(samples, device=y.device)
        elif y.device.type == "cpu" and not torch.compiler.is_compiling() and onlooker() is None:
            y, index = y.unique(return_inverse=True)
        elif samples < self.num_classes:
            index = torch.arange(samples, device=y.device)
        else:
            y, index = None, y

        def of_groups(table: Tensor) -> Tensor:
            return table if y is None else rows_of_classes(y, table).to(table.dtype)

        # All four at once: small operations, whose overhead counts.
        weight = torch.stack([getattr(self, name) for name in KERNELS])
        scale, shift = (
            torch.stack([of_groups(getattr(self, name)) for name in names])[..., None, None, None]
            for names in (SCALES, SHIFTS)
        )
        kernels = torch.addcmul(shift, scale, weight[:, None]).unbind()
        return index, of_groups(self.mask_weight), of_groups(self.mask_bias), kernels

    def _load_from_state_dict(self, state_dict, prefix, *others) -> None:
        """A checkpoint of SPN2d loads: every class gets its parameters."""
        weight = state_dict.get(f"{prefix}mask_weight")
        if weight is not None and weight.dim() == 1:
            state_dict = dict(state_dict)
            for name in ("mask_weight", "mask_bias"):
                state_dict[prefix + name] = state_dict[prefix + name].expand(self.num_classes, -1)
            for name, table in self._parameters.items():
                if prefix + name not in state_dict and table is not None and not table.is_meta:
                    state_dict[prefix + name] = table.detach()
        super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        return super().extra_repr() + f", num_classes={self.num_classes}, latent_dim={self.latent_dim}"


def kernels_of_batchnorm(
    weight: Tensor, bias: Tensor, kernel_size: int, noise: float, depthwise: bool = True
) -> dict[str, Tensor]:
    """Kernels for which SPN equals batch norm with this affine, up to noise, for any mask.

    Mask and inverted mask add up to one, so equal kernels weight * delta give the scale ``weight``. The noise has
    standard deviation ``noise * |weight|``: it perturbs every channel's output by the same fraction, and is 0 for
    a channel of scale 0. (In a standard convolution that is the deviation of a sum over channels.)
    """
    found, centre, channels = {}, kernel_size // 2, weight.shape[0]
    depth = 1 if depthwise else channels
    for name, value in (("gamma", weight), ("beta", bias)):
        for kernel in (f"{name}_weight", f"{name}_weight_inv"):
            found[kernel] = weight.new_empty((channels, depth, kernel_size, kernel_size)).normal_()
            found[kernel].mul_(noise * depth**-0.5 * weight.abs().view(-1, 1, 1, 1))
            middle = found[kernel][:, :, centre, centre]
            middle += value[:, None] if depthwise else value.diag()
    return found


@torch.no_grad()
def start_as_batchnorm_(spn: SelfLatentNorm2d, weight: Tensor, bias: Tensor, noise: float = NOISE) -> None:
    """Fill the kernels as ``kernels_of_batchnorm`` says."""
    for name, kernel in kernels_of_batchnorm(weight, bias, spn.kernel_size, noise, spn.depthwise).items():
        getattr(spn, name).copy_(kernel)
