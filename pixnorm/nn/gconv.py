"""The modules of generative convolution, and ``latent``, which supplies their latent vectors."""

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from pixnorm import functional as F
from pixnorm.nn._leaf import traced
from pixnorm.ops._dispatch import IMPLS
from pixnorm.ops.checks import check_option
from pixnorm.ops.common import exporting
from pixnorm.ops.convolution import PADDING_MODES
from pixnorm.ops.gconv import check_upsample


class _Current(threading.local):
    def __init__(self):  # runs in each thread
        self.z: Tensor | None = None


_current = _Current()


@contextlib.contextmanager
def latent(z: Tensor) -> Iterator[None]:
    """Supply z to all generative layers that are called without one, inside the context and in this thread.

    For models whose ``forward`` passes only features, such as ``nn.Sequential`` and the result of ``convert_conv``.
    Activation checkpoints run their part of the model again in backward, perhaps in another thread: pass them
    ``use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), pixnorm.nn.latent(z))``. ``torch.export`` would
    make z a constant: pass z explicitly to layers that it traces.

    Args:
        z: (N, latent_dim).

    Example:
        >>> layers = torch.nn.Sequential(pixnorm.GConv2d(8, 8, 3, latent_dim=4), torch.nn.ReLU())
        >>> with pixnorm.nn.latent(torch.randn(2, 4)):
        ...     y = layers(torch.randn(2, 8, 16, 16))
    """
    before = _current.z
    _current.z = z
    try:
        yield
    finally:
        _current.z = before


class _Generative(nn.Module):
    """The parameters of both layers."""

    _may_divide_by_zero = False  # whether spectral norm of mix_weight might

    def __init__(self, kernels: tuple[int, ...], latent_dim: int, bias: bool, impl: str, init: str, device, dtype):
        super().__init__()
        check_option("impl", impl, IMPLS)
        check_option("init", init, ("glorot", "zero"))
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be positive, got {latent_dim}")
        self.latent_dim = latent_dim
        self.impl = impl
        self.init = init
        self._may_divide_by_zero = init == "zero"
        n, m = kernels[:2]

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight = parameter(*kernels)
        self.scale_weight = parameter(n, m + latent_dim)
        self.mix_weight = parameter(n, n)
        if bias:
            self.bias = parameter(n)
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as ``init`` says."""
        nn.init.xavier_uniform_(self.weight)
        nn.init.xavier_uniform_(self.scale_weight)
        if self.init == "zero":
            nn.init.zeros_(self.mix_weight)
        else:
            nn.init.xavier_uniform_(self.mix_weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _mix_weight(self) -> Tensor:
        weight = self.mix_weight
        looks = not (torch.compiler.is_compiling() or exporting() or weight.is_meta)
        if self._may_divide_by_zero and looks and "mix_weight" not in self._parameters:  # but computed
            if weight.isnan().any():
                raise RuntimeError(
                    "mix_weight is NaN: it starts at 0, and spectral norm divides by its norm; use "
                    "init='glorot', or apply spectral norm to the other weights only"
                )
            self._may_divide_by_zero = False
        return weight

    def _load_from_state_dict(self, state_dict, prefix, *others) -> None:
        """A checkpoint of the plain layer loads with a mix_weight of 0."""
        if prefix + "weight" in state_dict and not {prefix + "scale_weight", prefix + "mix_weight"} & state_dict.keys():
            own = {"scale_weight": self.scale_weight.detach(), "mix_weight": torch.zeros_like(self.mix_weight)}
            # A layer on the meta device has no values: they count as missing.
            own = {prefix + name: value for name, value in own.items() if not value.is_meta}
            state_dict = state_dict | own
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _latent(self, z: Tensor | None, x: Tensor) -> Tensor:
        if z is None and exporting():
            raise RuntimeError(
                f"torch.export would make the latent vectors of {type(self).__name__} a constant: pass z"
            )
        if z is None and _current.z is not None:
            z = _current.z.to(x.dtype)  # FSDP casts the inputs of a model, but not this one
        if z is None:
            raise RuntimeError(
                f"{type(self).__name__} needs latent vectors: call it with (x, z), or the model inside "
                "`with pixnorm.nn.latent(z):`"
            )
        return z


class GConv2d(_Generative):
    r"""Generative convolution ("Generative Convolution Layer for Image Generation", arXiv 2111.15171, eq. 5-8).

    Replaces :class:`torch.nn.Conv2d` in a generator: its kernels are scaled by a function of the latent vector and of
    the mean of the input, mixed, and added to the original kernels, so that each sample is convolved with its own. The
    equation is in :func:`pixnorm.functional.gconv2d`, which does all the arithmetic.

    Args:
        in_channels: m, of the input.
        out_channels: n, of the output.
        kernel_size, stride, padding, dilation: as in ``nn.Conv2d``.
        latent_dim: dz, the length of a latent vector.
        bias: added at the end; off by default, as in the paper a normalisation follows.
        impl: ``"auto"``, ``"native"``, ``"triton"`` or ``"reference"``, as in :func:`pixnorm.functional.gconv2d`.
        device, dtype: of the parameters.
        groups: must be 1: mixing adds kernels, so all of them must see all channels.
        padding_mode: as in ``nn.Conv2d``.
        upsample: 2 convolves the input upsampled by 2, see :func:`pixnorm.functional.gconv2d`.
        init: ``"glorot"`` draws all weights Glorot uniform; ``"zero"`` does so except for ``mix_weight``, which is 0:
            the layer starts as plain convolution, and ``scale_weight`` and z get no gradient in the first step. Such a
            ``mix_weight`` cannot have spectral norm, which divides by its norm.

    Shape:
        x (N, m, H, W) and z (N, dz) to (N, n, H', W') as ``nn.Conv2d``, in x's dtype and memory format; without
        batch, x (m, H, W) and z (dz) or (1, dz) to (n, H', W'). z may be omitted inside :func:`pixnorm.nn.latent`.

    Parameters ``weight`` (n, m, kh, kw), ``scale_weight`` (n, m + dz), ``mix_weight`` (n, n), ``bias`` (n) or None.

    Raises:
        ValueError: an argument has a value that is not listed above.

    Example:
        >>> y = pixnorm.GConv2d(64, 64, 3, latent_dim=32, padding=1)(torch.randn(8, 64, 16, 16), torch.randn(8, 32))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        latent_dim: int,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = False,
        impl: str = "auto",
        device=None,
        dtype=None,
        *,
        init: str = "glorot",
        groups: int = 1,
        padding_mode: str = "zeros",
        upsample: int = 1,
    ):
        if groups != 1:
            raise ValueError(
                f"groups must be 1, got {groups}: kernels are mixed with each other, so each must see all channels"
            )
        check_option("padding_mode", padding_mode, PADDING_MODES)
        if in_channels < 1 or out_channels < 1:
            raise ValueError(f"in_channels and out_channels must be positive, got {in_channels} and {out_channels}")
        if isinstance(padding, str) and padding not in ("same", "valid"):
            raise ValueError(f"padding must be numbers, 'same' or 'valid', got {padding!r}")
        if padding == "same" and _pair(stride) != (1, 1):
            raise ValueError(f"padding='same' is for stride 1, got {stride}")
        kernel_size, stride, dilation = _pair(kernel_size), _pair(stride), _pair(dilation)
        for name, value in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation)):
            if len(value) != 2 or min(value) < 1:
                raise ValueError(f"{name} must be one or two positive numbers, got {value}")
        check_upsample(upsample, stride, dilation, padding_mode)
        super().__init__((out_channels, in_channels, *kernel_size), latent_dim, bias, impl, init, device, dtype)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding if isinstance(padding, str) else _pair(padding)
        self.dilation = dilation
        self.padding_mode = padding_mode
        self.upsample = upsample

    def forward(self, input: Tensor, z: Tensor | None = None) -> Tensor:
        """Convolve each sample of the input with its own kernels."""
        if (node := traced(self, input, z)) is not None:
            return node
        return F.gconv2d(
            input,
            self._latent(z, input),
            self.weight,
            self.scale_weight,
            self._mix_weight(),
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            padding_mode=self.padding_mode,
            upsample=self.upsample,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        others = "" if self.padding_mode == "zeros" else f"padding_mode={self.padding_mode!r}, "
        others += "" if self.upsample == 1 else f"upsample={self.upsample}, "
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, latent_dim={self.latent_dim}, "
            f"stride={self.stride}, padding={self.padding!r}, dilation={self.dilation}, "
            f"bias={self.bias is not None}, {others}"
            f"impl={self.impl!r}"
        )


class GLinear(_Generative):
    r"""The generative form of :class:`torch.nn.Linear`: :class:`GConv2d` on a single pixel (arXiv 2111.15171, eq. 5-8).

    Args:
        in_features: m, of the input.
        out_features: n, of the output.
        latent_dim: dz, the length of a latent vector.
        bias, impl, device, dtype, init: as in :class:`GConv2d`.

    Shape:
        x (N, m) and z (N, dz) to (N, n). In the first layer of a generator, both are the latent vectors. z may be
        omitted inside :func:`pixnorm.nn.latent`.

    Parameters ``weight`` (n, m), ``scale_weight`` (n, m + dz), ``mix_weight`` (n, n), ``bias`` (n) or None.

    Raises:
        ValueError: an argument has a value that is not listed above.

    Example:
        >>> z = torch.randn(8, 32)
        >>> y = pixnorm.GLinear(32, 128, latent_dim=32, bias=True)(z, z)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        latent_dim: int,
        bias: bool = False,
        impl: str = "auto",
        device=None,
        dtype=None,
        *,
        init: str = "glorot",
    ):
        if in_features < 1 or out_features < 1:
            raise ValueError(f"in_features and out_features must be positive, got {in_features} and {out_features}")
        super().__init__((out_features, in_features), latent_dim, bias, impl, init, device, dtype)
        self.in_features = in_features
        self.out_features = out_features

    def forward(self, input: Tensor, z: Tensor | None = None) -> Tensor:
        """Multiply each sample of the input by its own weights."""
        if (node := traced(self, input, z)) is not None:
            return node
        weights = self.weight, self.scale_weight, self._mix_weight(), self.bias
        return F.glinear(input, self._latent(z, input), *weights, impl=self.impl)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, latent_dim={self.latent_dim}, bias={self.bias is not None}, "
            f"impl={self.impl!r}"
        )
