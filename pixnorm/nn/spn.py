"""The module of self pixel-wise normalisation."""

import torch
from torch import Tensor, nn

from pixnorm import functional as F
from pixnorm.ops._dispatch import IMPLS


class SPN2d(nn.Module):
    r"""Self pixel-wise normalisation ("Image Generation with Self Pixel-wise Normalization", arXiv 2201.10725).

    Batch norm whose scale and shift differ from pixel to pixel: depthwise convolutions make them from a mask, and the
    mask comes from the input itself. Takes the place of :class:`torch.nn.BatchNorm2d` and keeps its arguments, its
    running statistics and its behaviour in training and eval. The equation stands in
    :func:`pixnorm.functional.spn`, which does all the arithmetic.

    Args:
        num_features: C, the channels of the input.
        kernel_size: of the depthwise kernels: 1, 3 or 5.
        mask_channels: C (also if None), or 1 for one mask shared by all channels.
        eps: added to the variances of the input and of the projected input.
        momentum: weight of the new batch in the running statistics; None averages over all batches.
        track_running_stats: if False there are no running statistics, and eval mode uses those of the batch too.
        upsample: 2 normalises ``interpolate(x, scale_factor=2, mode="nearest")``, at the cost of low resolution.
        activation: None or ``"relu"``, applied to the result.
        impl: ``"auto"``, ``"native"``, ``"triton"`` or ``"reference"``, as in :func:`pixnorm.functional.spn`.
        device: of parameters and buffers.
        dtype: of parameters and buffers; float32 also serves float16 and bfloat16 inputs.
        init: ``"bn"`` starts as plain batch norm with scale 1 and shift 0: each depthwise kernel is that times a delta,
            plus noise N(0, 0.02²), without which the mask would get no gradient in the first step. ``"keras"`` draws
            the depthwise kernels Glorot uniform in the way of Keras, with limit √(6 / (k² (C + 1))). The projection is
            Glorot uniform in both.

    Shape:
        (N, C, H, W) to (N, C, H * upsample, W * upsample), in the input's dtype and memory format.

    Parameters ``mask_projection`` (Cm, C, 1, 1), ``mask_weight`` and ``mask_bias`` (Cm), ``gamma_weight``,
    ``gamma_weight_inv``, ``beta_weight`` and ``beta_weight_inv`` (C, 1, k, k), where Cm is ``mask_channels``. Buffers
    ``running_mean`` and ``running_var`` (C), ``mask_running_mean`` and ``mask_running_var`` (Cm),
    ``num_batches_tracked``.

    Raises:
        ValueError: an argument is outside what is listed above.

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
    ):
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features must be positive, got {num_features}")
        mask_channels = num_features if mask_channels is None else mask_channels
        for name, value, allowed in (
            ("kernel_size", kernel_size, (1, 3, 5)),
            ("mask_channels", mask_channels, (1, num_features)),
            ("upsample", upsample, (1, 2)),
            ("activation", activation, (None, "relu")),
            ("impl", impl, IMPLS),
            ("init", init, ("bn", "keras")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")

        self.num_features = num_features
        self.kernel_size = kernel_size
        self.mask_channels = mask_channels
        self.eps = eps
        self.momentum = momentum
        self.track_running_stats = track_running_stats
        self.upsample = upsample
        self.activation = activation
        self.impl = impl
        self.init = init

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.mask_projection = parameter(mask_channels, num_features, 1, 1)
        self.mask_weight = parameter(mask_channels)
        self.mask_bias = parameter(mask_channels)
        self.gamma_weight = parameter(num_features, 1, kernel_size, kernel_size)
        self.gamma_weight_inv = parameter(num_features, 1, kernel_size, kernel_size)
        self.beta_weight = parameter(num_features, 1, kernel_size, kernel_size)
        self.beta_weight_inv = parameter(num_features, 1, kernel_size, kernel_size)

        def buffer(name: str, *shape: int, dtype: torch.dtype | None = dtype) -> None:
            self.register_buffer(name, torch.empty(shape, device=device, dtype=dtype) if track_running_stats else None)

        buffer("running_mean", num_features)
        buffer("running_var", num_features)
        buffer("mask_running_mean", mask_channels)
        buffer("mask_running_var", mask_channels)
        buffer("num_batches_tracked", dtype=torch.long)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Set the running means to 0, the running variances to 1 and the count of batches to 0."""
        if self.running_mean is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.mask_running_mean.zero_()
            self.mask_running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as ``init`` says, and reset the running statistics."""
        self.reset_running_stats()
        nn.init.xavier_uniform_(self.mask_projection)
        nn.init.ones_(self.mask_weight)
        nn.init.zeros_(self.mask_bias)
        if self.init == "bn":
            scale = self.gamma_weight.new_ones(self.num_features)
            start_as_batchnorm_(self, scale, torch.zeros_like(scale), noise=0.02)
        else:
            limit = (6 / (self.kernel_size**2 * (self.num_features + 1))) ** 0.5
            for kernel in (self.gamma_weight, self.gamma_weight_inv, self.beta_weight, self.beta_weight_inv):
                nn.init.uniform_(kernel, -limit, limit)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x; in training also update the running statistics."""
        update = self.training and self.track_running_stats and self.running_mean is not None
        buffers = (self.running_mean, self.running_var, self.mask_running_mean, self.mask_running_var)
        momentum = self.momentum
        if momentum is None:
            momentum = 1 / (int(self.num_batches_tracked) + 1) if update else 0.0
        y = F.spn(
            x,
            self.mask_projection,
            self.mask_weight,
            self.mask_bias,
            self.gamma_weight,
            self.gamma_weight_inv,
            self.beta_weight,
            self.beta_weight_inv,
            *(buffers if update or not self.training else (None,) * 4),
            training=self.training or self.running_mean is None,
            momentum=momentum,
            eps=self.eps,
            upsample=self.upsample,
            activation=self.activation,
            impl=self.impl,
        )
        if update:  # after the call: input that it refuses leaves no trace
            self.num_batches_tracked.add_(1)
        return y

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, kernel_size={self.kernel_size}, mask_channels={self.mask_channels}, eps={self.eps}, "
            f"momentum={self.momentum}, track_running_stats={self.track_running_stats}, upsample={self.upsample}, "
            f"activation={self.activation!r}, impl={self.impl!r}"
        )


@torch.no_grad()
def start_as_batchnorm_(spn: SPN2d, weight: Tensor, bias: Tensor, noise: float) -> None:
    """Fill the depthwise kernels so that ``spn`` equals batch norm with this affine, up to noise, for any mask.

    Mask and inverted mask add up to one, so equal kernels weight * delta give the scale ``weight``. The noise has
    standard deviation ``noise * |weight|``: it perturbs every channel's output by the same fraction, and leaves alone a
    channel that is switched off.
    """
    centre = spn.kernel_size // 2
    for kernel, value in (
        (spn.gamma_weight, weight),
        (spn.gamma_weight_inv, weight),
        (spn.beta_weight, bias),
        (spn.beta_weight_inv, bias),
    ):
        kernel.normal_().mul_(noise * weight.abs().view(-1, 1, 1, 1))
        kernel[:, 0, centre, centre] += value
