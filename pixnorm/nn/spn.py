"""The modules of self pixel-wise normalisation, plain and conditional."""

from typing import Any

import torch
from torch import Tensor, nn

from pixnorm import functional as F
from pixnorm.nn._conditional import Conditional, check_sizes
from pixnorm.nn._leaf import traced
from pixnorm.nn._norm import Norm2d
from pixnorm.ops._dispatch import IMPLS
from pixnorm.ops.checks import check_classes, check_eps, check_option
from pixnorm.ops.class_parameters import class_parameters
from pixnorm.ops.common import ACTIVATIONS, exporting, onlooker, rows_of_classes
from pixnorm.ops.modulate import rows_for

KERNELS = ("gamma_weight", "gamma_weight_inv", "beta_weight", "beta_weight_inv")
NOISE = 0.02  # standard deviation, relative to each channel's scale; without it masks get no gradient in the first step


class PixelwiseNorm2d(Norm2d):
    """What both layers share: options, the projection, the kernels, and checkpoints of batch norm.

    Arguments as in :class:`SPN2d`; ``classes`` is () or (K,), the leading size of the mask's scale and shift.
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
        depthwise: bool = True,
        classes: tuple[int, ...] = (),
        process_group=None,
    ):
        super().__init__(num_features, eps, momentum, track_running_stats, process_group)
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
        self.mask_weight = parameter(*classes, mask_channels)
        self.mask_bias = parameter(*classes, mask_channels)
        for name in KERNELS:
            depth = 1 if depthwise else num_features
            self.register_parameter(name, parameter(num_features, depth, kernel_size, kernel_size))
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
            channels, depth, *taps = self.gamma_weight.shape
            limit = (6 / (taps[0] * taps[1] * (channels + depth))) ** 0.5
            for name in KERNELS:
                nn.init.uniform_(getattr(self, name), -limit, limit)

    def _fused(self) -> dict[str, Any]:
        """The options of the op that are not about statistics."""
        names = ("upsample", "activation", "negative_slope", "impl")
        return {name: getattr(self, name) for name in names}

    def _converted(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint of batch norm, as if ``convert_batchnorm`` had converted that batch norm; any other as it is."""
        if not found.keys() & {"weight", "running_mean"} or "mask_projection" in found:
            return found
        ones = next(iter(found.values())).new_ones(self.num_features, dtype=self.gamma_weight.dtype)
        weight, bias = found.get("weight", ones), found.get("bias", torch.zeros_like(ones))
        statistics = {name: value for name, value in found.items() if name not in ("weight", "bias")}
        own = {**self._parameters, **self._buffers}
        # A layer on the meta device has no mask to keep: it counts as missing.
        of_mask = {
            name: tensor.detach()
            for name, tensor in own.items()
            if name.startswith("mask_") and tensor is not None and not tensor.is_meta
        }
        return statistics | of_mask | kernels_of_batchnorm(weight, bias, self.gamma_weight.shape[1:], NOISE)

    def _load_from_state_dict(self, state_dict, prefix, *others) -> None:
        found = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        if (converted := self._converted(found)) is not found:
            state_dict = {prefix + name: value for name, value in converted.items()}
        super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        slope = f"negative_slope={self.negative_slope}, " if self.activation == "leaky_relu" else ""
        return (
            f"{self.num_features}, kernel_size={self.kernel_size}, mask_channels={self.mask_channels}, eps={self.eps}, "
            f"momentum={self.momentum}, track_running_stats={self.track_running_stats}, upsample={self.upsample}, "
            f"activation={self.activation!r}, {slope}impl={self.impl!r}{self._repr_of_group()}"
        )


class SPN2d(PixelwiseNorm2d):
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
        depthwise: False for standard convolutions (C, C, k, k) in place of depthwise ones, which the paper compares
            (Table 7): 32 times the parameters at C = 256, for the reference only.
        process_group: the processes whose batches are normalised as one, as :func:`pixnorm.convert_sync` sets it.

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
        process_group=None,
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
            process_group=process_group,
        )
        self.depthwise = depthwise
        self.reset_parameters()

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
            **self._fused(),
        )
        return self._counted(y)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.depthwise else ", depthwise=False")


class ConditionalSPN2d(Conditional, PixelwiseNorm2d):
    r"""Conditional self pixel-wise normalisation (cSPN, arXiv 2201.10725, section 3.2): :class:`SPN2d` with a class for
    each sample, and a latent vector.

    The class y chooses the scale and shift of the mask's batch norm, and changes the depthwise kernels as a conditional
    convolution (cConv, arXiv 1906.00709) does, ``w_y = scale[y] · w + shift[y]`` per channel. The latent vector is
    added: ``γ + z Wg``, ``β + z Wb`` (Table 8). Statistics are those of the whole batch. The equation is in
    :func:`pixnorm.functional.conditional_spn`.

    A checkpoint of :class:`SPN2d`, or of batch norm, loads: then all classes start equal, and z has no effect at first.

    Args:
        num_features: C, the channels of the input.
        num_classes: K.
        latent_dim: dz, the length of z; 0 for classes alone.
        kernel_size, mask_channels, eps, momentum, track_running_stats, upsample, activation, impl, device, dtype, init,
            negative_slope, process_group: as in :class:`SPN2d`.

    Shape:
        x (N, C, H, W), y (N) of int64 or one-hot (N, K), and z (N, dz) to (N, C, H * upsample, W * upsample). The rows
        of a floating-point y may also be soft: then every parameter of a sample is the average over classes that they
        say. Kernels are formed for the classes in the batch; on a GPU and in compiled graphs for min(N, K) of them, for
        floating-point y for N.

    Parameters ``mask_projection``, ``gamma_weight``, ``gamma_weight_inv``, ``beta_weight`` and ``beta_weight_inv`` as
    in :class:`SPN2d`; ``mask_weight`` and ``mask_bias`` (K, Cm), 1 and 0 at first; ``kernel_scale`` and
    ``kernel_shift`` (K, 4, C), for the four kernels in this order, 1 and 0 at first; with ``latent_dim``,
    ``gamma_latent`` and ``beta_latent`` (C, dz), Glorot uniform. Buffers as in :class:`SPN2d`.

    Raises:
        ValueError: an argument is out of range; y or z does not fit, or z is missing.

    Example:
        >>> layer = pixnorm.ConditionalSPN2d(64, num_classes=10)
        >>> y = layer(torch.randn(8, 64, 16, 16), torch.randint(10, (8,)))
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
        process_group=None,
    ):
        check_sizes(num_classes, latent_dim)
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
            process_group=process_group,
        )
        for name in ("kernel_scale", "kernel_shift"):
            table = torch.empty(num_classes, len(KERNELS), num_features, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(table))
        self._register_conditions(num_classes, latent_dim, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters as ``init`` says, with equal classes, and reset the running statistics."""
        super().reset_parameters()
        nn.init.ones_(self.kernel_scale)
        nn.init.zeros_(self.kernel_shift)
        self._reset_latent()

    def forward(self, input: Tensor, y: Tensor, z: Tensor | None = None) -> Tensor:
        """Normalise the input with the parameters of each sample's class; in training update the running statistics."""
        if (node := traced(self, input, y, z)) is not None:
            return node
        self._check(input, y, z)
        index, learnt = self._of_classes(y)
        rows = self._rows(z)
        rows = (None, None) if rows is None else [rows_for(row, input) for row in rows]
        buffers, options = self._statistics()
        output = F.conditional_spn(
            input, index, self.mask_projection, *learnt, *rows, *buffers, **options, **self._fused()
        )
        return self._counted(output)

    def _of_classes(self, y: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Each sample's group, and the groups' parameters: the mask's scale and shift and four kernels.

        Groups are the classes that are in the batch. Where looking would synchronise with a GPU or break a graph, they
        are all classes; or the samples, if they are fewer, or if their number is not yet known (``torch.export``). For
        y in floating point they are the samples.
        """
        tables = self.mask_weight, self.mask_bias, self.kernel_scale, self.kernel_shift
        if y.dim() == 2:
            # Autocast computes the products in another dtype.
            tables = [rows_of_classes(y, t.flatten(1)).to(t.dtype).view(y.shape[0], *t.shape[1:]) for t in tables]
            index = classes = torch.arange(y.shape[0], device=y.device)
        elif y.device.type == "cpu" and not torch.compiler.is_compiling() and onlooker() is None:
            classes, index = y.unique(return_inverse=True)
        elif not exporting() and y.shape[0] >= self.num_classes:
            classes, index = torch.arange(self.num_classes, device=y.device), y
        else:
            classes, index = y, torch.arange(y.shape[0], device=y.device)
        mask_weight, mask_bias, scale, shift = tables
        kernels = [getattr(self, name) for name in KERNELS]
        return index, class_parameters(classes, mask_weight, mask_bias, *kernels, scale, shift, impl=self.impl)

    def _converted(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint of plain SPN: all classes get its mask and its kernels, and z no weight."""
        found = super()._converted(found)
        if "gamma_weight" not in found or found.keys() & {"kernel_scale", "kernel_shift"}:
            return found
        like = found["gamma_weight"]
        converted = dict(found)
        for name in ("mask_weight", "mask_bias"):
            if name in found and found[name].dim() == 1:
                converted[name] = found[name].expand(self.num_classes, -1)
        for name, value in (("kernel_scale", 1.0), ("kernel_shift", 0.0)):
            converted[name] = like.new_full((self.num_classes, len(KERNELS), self.num_features), value)
        if self.latent_dim:
            for name in ("gamma_latent", "beta_latent"):
                converted[name] = like.new_zeros((self.num_features, self.latent_dim))
        return converted


def self_latent_mask(layer: SPN2d | ConditionalSPN2d, x: Tensor, y: Tensor | None = None) -> Tensor:
    """The mask m that a layer computes from its input x, as the paper draws it (Fig. 2); the inverted one is 1 - m.

    Statistics are those of x, in this process, in training mode and the running ones in eval mode; the layer stays as
    it is.

    Args:
        layer: an :class:`SPN2d` or :class:`ConditionalSPN2d`.
        x: (N, C, H, W), the layer's input.
        y: the classes of a conditional layer, as its ``forward`` takes them.

    Returns:
        (N, Cm, H, W) in (0, 1), in x's dtype: at the resolution of x, whatever ``upsample``.
    """
    buffers, options = layer._statistics()
    options["process_group"] = None
    if options["training"]:
        buffers = (None,) * len(buffers)
    # With γ = 0 and β = m the layer's output is the mask.
    zero = layer.gamma_weight.new_zeros(layer.num_features, 1, 1, 1)
    kernels = zero, zero, torch.ones_like(zero), zero
    if isinstance(layer, ConditionalSPN2d):
        check_classes(y, x.shape[0], layer.num_classes)
        index, (weight, bias, *_) = layer._of_classes(y)
        kernels = [kernel.expand(weight.shape[0], *kernel.shape) for kernel in kernels]
        m = F.conditional_spn(
            x, index, layer.mask_projection, weight, bias, *kernels, None, None, *buffers, **options, impl=layer.impl
        )
    else:
        learnt = layer.mask_projection, layer.mask_weight, layer.mask_bias
        m = F.spn(x, *learnt, *kernels, *buffers, **options, impl=layer.impl)
    return m[:, : layer.mask_channels]


def kernels_of_batchnorm(weight: Tensor, bias: Tensor, shape: tuple[int, ...], noise: float) -> dict[str, Tensor]:
    """Kernels (C, *shape) for which SPN equals batch norm with this affine, up to noise, for any mask.

    Mask and inverted mask add up to one, so equal kernels weight * delta give the scale ``weight``. The noise has
    standard deviation ``noise * |weight|``, summed over the input's channels: it perturbs every channel's output by the
    same fraction, and is 0 for a channel of scale 0.
    """
    depth, size, _ = shape
    found, centre = {}, size // 2
    for name, value in (("gamma", weight), ("beta", bias)):
        for kernel in (f"{name}_weight", f"{name}_weight_inv"):
            found[kernel] = weight.new_empty((*weight.shape, *shape)).normal_()
            found[kernel].mul_(noise / depth**0.5 * weight.abs().view(-1, 1, 1, 1))
            if depth == 1:
                found[kernel][:, 0, centre, centre] += value
            else:
                found[kernel][:, :, centre, centre].diagonal().add_(value)
    return found


@torch.no_grad()
def start_as_batchnorm_(spn: PixelwiseNorm2d, weight: Tensor, bias: Tensor, noise: float = NOISE) -> None:
    """Fill the kernels as ``kernels_of_batchnorm`` says."""
    for name, kernel in kernels_of_batchnorm(weight, bias, spn.gamma_weight.shape[1:], noise).items():
        getattr(spn, name).copy_(kernel)
