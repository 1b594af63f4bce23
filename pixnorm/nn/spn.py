"""The module of self pixel-wise normalisation."""

import torch
from torch import Tensor, nn

from pixnorm import functional as F
from pixnorm.nn._leaf import traced
from pixnorm.nn._norm import Norm2d
from pixnorm.ops._dispatch import IMPLS
from pixnorm.ops.checks import check_eps, check_option
from pixnorm.ops.common import ACTIVATIONS

NOISE = 0.02  # standard deviation, relative to each channel's scale; without it masks get no gradient in the first step


class SPN2d(Norm2d):
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

    _KINDS = ("", "mask_")

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

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.mask_projection = parameter(mask_channels, num_features, 1, 1)
        self.mask_weight = parameter(mask_channels)
        self.mask_bias = parameter(mask_channels)
        self.gamma_weight = parameter(num_features, 1, kernel_size, kernel_size)
        self.gamma_weight_inv = parameter(num_features, 1, kernel_size, kernel_size)
        self.beta_weight = parameter(num_features, 1, kernel_size, kernel_size)
        self.beta_weight_inv = parameter(num_features, 1, kernel_size, kernel_size)

        self._register_statistics({"": num_features, "mask_": mask_channels}, device, dtype)
        self.reset_parameters()

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
            limit = (6 / (self.kernel_size**2 * (self.num_features + 1))) ** 0.5
            for kernel in (self.gamma_weight, self.gamma_weight_inv, self.beta_weight, self.beta_weight_inv):
                nn.init.uniform_(kernel, -limit, limit)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the input; in training also update the running statistics."""
        if (node := traced(self, input)) is not None:
            return node
        buffers, options = self._statistics()
        y = F.spn(
            input,
            self.mask_projection,
            self.mask_weight,
            self.mask_bias,
            self.gamma_weight,
            self.gamma_weight_inv,
            self.beta_weight,
            self.beta_weight_inv,
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
            # A layer on the meta device has no mask to keep: it counts as missing.
            of_mask = {
                name: tensor.detach()
                for name, tensor in own.items()
                if name.startswith("mask_") and tensor is not None and not tensor.is_meta
            }
            found |= of_mask | kernels_of_batchnorm(*affine, self.kernel_size, NOISE)
            state_dict = {prefix + name: value for name, value in found.items()}
        super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        slope = f"negative_slope={self.negative_slope}, " if self.activation == "leaky_relu" else ""
        return (
            f"{self.num_features}, kernel_size={self.kernel_size}, mask_channels={self.mask_channels}, eps={self.eps}, "
            f"momentum={self.momentum}, track_running_stats={self.track_running_stats}, upsample={self.upsample}, "
            f"activation={self.activation!r}, {slope}impl={self.impl!r}"
        )


def kernels_of_batchnorm(weight: Tensor, bias: Tensor, kernel_size: int, noise: float) -> dict[str, Tensor]:
    """Depthwise kernels for which SPN equals batch norm with this affine, up to noise, for any mask.

    Mask and inverted mask add up to one, so equal kernels weight * delta give the scale ``weight``. The noise has
    standard deviation ``noise * |weight|``: it perturbs every channel's output by the same fraction, and is 0 for
    a channel of scale 0.
    """
    found, centre = {}, kernel_size // 2
    for name, value in (("gamma", weight), ("beta", bias)):
        for kernel in (f"{name}_weight", f"{name}_weight_inv"):
            found[kernel] = weight.new_empty((*weight.shape, 1, kernel_size, kernel_size)).normal_()
            found[kernel].mul_(noise * weight.abs().view(-1, 1, 1, 1))
            found[kernel][:, 0, centre, centre] += value
    return found


@torch.no_grad()
def start_as_batchnorm_(spn: SPN2d, weight: Tensor, bias: Tensor, noise: float = NOISE) -> None:
    """Fill the depthwise kernels as ``kernels_of_batchnorm`` says."""
    for name, kernel in kernels_of_batchnorm(weight, bias, spn.kernel_size, noise).items():
        getattr(spn, name).copy_(kernel)
