"""The layers of StyleGAN 2's synthesis network (arXiv 1912.04958), and spatially modulated convolution (arXiv
2006.05394). Those of StyleGAN 1 are in ``style_layer.py``."""

from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from pixnorm import functional as F
from pixnorm.nn._leaf import traced
from pixnorm.nn.equalized import HE, EqualizedConv2d, EqualizedLinear
from pixnorm.ops._dispatch import IMPLS
from pixnorm.ops.checks import check_image, check_option, check_shape
from pixnorm.ops.common import ACTIVATIONS, HALF
from pixnorm.ops.convolution import PADDING_MODES, Padding
from pixnorm.ops.modulated_conv import modulated, spatially_modulated


def check_w(w: Tensor, x: Tensor, style_dim: int) -> None:
    check_shape("w", w, (x.shape[0], style_dim), x)


def check_noise(layer: "NoiseInjection | None", noise: Tensor | None) -> None:
    if layer is None and noise is not None:
        raise ValueError("noise was given to a layer without noise")


def rows_beside(x: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """Rows in one dtype that the ops take beside x: linear layers give another one under autocast."""
    dtypes = {t.dtype for t in tensors if t is not None}
    dtype = x.dtype if dtypes == {x.dtype} or x.dtype not in HALF else torch.float32
    return [None if t is None else t.to(dtype) for t in tensors]


class NoiseInjection(nn.Module):
    """Adds noise that all channels of a sample share, each with a strength of its own: ``x + strength · noise``
    (arXiv 1812.04948).

    Args:
        num_features: C; 1 gives all channels one strength, as in StyleGAN 2.
        impl: as in :func:`pixnorm.functional.style_epilogue`.
        device, dtype: of the parameter.

    Shape:
        x (N, C, H, W) and noise (N, 1, H, W), (1, 1, H, W) or None to (N, C, H, W). None draws it anew at each call.

    Parameter ``strength`` (num_features), 0 at first.

    Raises:
        ValueError: ``num_features`` is not positive.
    """

    def __init__(self, num_features: int, impl: str = "auto", device=None, dtype=None):
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features must be positive, got {num_features}")
        check_option("impl", impl, IMPLS)
        self.num_features = num_features
        self.impl = impl
        self.strength = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """No noise."""
        nn.init.zeros_(self.strength)

    @staticmethod
    def drawn(x: Tensor, noise: Tensor | None) -> Tensor:
        """The given noise in x's dtype, or new noise for x."""
        n, _, h, w = x.shape
        return torch.randn((n, 1, h, w), device=x.device, dtype=x.dtype) if noise is None else noise.to(x.dtype)

    @classmethod
    def of(cls, layer: "NoiseInjection | None", x: Tensor, noise: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The noise and its strength for an epilogue; None each for a layer without noise."""
        return (None, None) if layer is None else (cls.drawn(x, noise), layer.strength)

    def forward(self, input: Tensor, noise: Tensor | None = None) -> Tensor:
        """Add noise to x."""
        if (node := traced(self, input, noise)) is not None:
            return node
        check_image(input)
        (strength,) = rows_beside(input, self.strength)
        noise = self.drawn(input, noise)
        return F.style_epilogue(input, noise=noise, noise_strength=strength, activation=None, impl=self.impl)

    def extra_repr(self) -> str:
        return f"{self.num_features}, impl={self.impl!r}"


class _ModulatedConv(nn.Module):
    """What both modulated convolutions share: the weight, with an equalised learning rate, and the options."""

    def __init__(self, in_channels, out_channels, kernel_size, style_dim, demodulate, padding, eps, impl, **where):
        super().__init__()
        sizes = {"in_channels": in_channels, "out_channels": out_channels, "style_dim": style_dim}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be positive, got {size}")
        if isinstance(padding, str):
            check_option("padding", padding, ("same", "valid"))
        check_option("impl", impl, IMPLS)
        self.in_channels, self.out_channels, self.style_dim = in_channels, out_channels, style_dim
        self.kernel_size = _pair(kernel_size)
        self.demodulate, self.padding, self.eps, self.impl = demodulate, padding, eps, impl
        self.weight = nn.Parameter(torch.empty((out_channels, in_channels, *self.kernel_size), **where))
        nn.init.normal_(self.weight)

    def reset_parameters(self) -> None:
        """Draw the weight anew, normal, and that of the styles, whose mean is 1 at first."""
        nn.init.normal_(self.weight)
        self.affine.reset_parameters()

    def _check(self, x: Tensor) -> None:
        check_image(x)
        if x.shape[1] != self.in_channels:
            raise ValueError(f"expected input of {self.in_channels} channels, got {tuple(x.shape)}")

    def _scaled_weight(self) -> Tensor:
        return self.weight * prod(self.weight.shape[1:]) ** -0.5

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, style_dim={self.style_dim}"
        return f"{text}, demodulate={self.demodulate}, padding={self.padding!r}, impl={self.impl!r}"


class ModulatedConv2d(_ModulatedConv):
    r"""Modulated convolution of StyleGAN 2 (arXiv 1912.04958): the styles ``s = A w + a`` scale the input's channels,
    and the output is divided by the standard deviation that this gives it. The equation is in
    :func:`pixnorm.functional.modulated_conv2d`.

    There is no bias: it is added after the demodulation, see :class:`StyleBlock`.

    Args:
        in_channels, out_channels, kernel_size: as in ``nn.Conv2d``.
        style_dim: the length of w.
        demodulate: divide by the standard deviation; off where colours are made.
        upsample: 2 convolves the input upsampled by 2 (nearest).
        padding, eps, impl: as in :func:`pixnorm.functional.modulated_conv2d`.
        device, dtype: of the parameters.

    Shape:
        x (N, I, H, W) and w (N, style_dim) to (N, O, H * upsample, W * upsample).

    Parameters ``weight`` (O, I, kh, kw), normal, in use divided by √(I · kh · kw), and those of ``affine``,
    an :class:`EqualizedLinear` whose bias starts at 1.

    Raises:
        ValueError: an argument has a value that is not listed above, or w does not fit.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        style_dim: int,
        demodulate: bool = True,
        upsample: int = 1,
        padding: Padding = "same",
        eps: float = 1e-8,
        impl: str = "auto",
        device=None,
        dtype=None,
    ):
        where = {"device": device, "dtype": dtype}
        super().__init__(in_channels, out_channels, kernel_size, style_dim, demodulate, padding, eps, impl, **where)
        check_option("upsample", upsample, (1, 2))
        self.upsample = upsample
        self.affine = EqualizedLinear(style_dim, in_channels, gain=1.0, bias_init=1.0, **where)

    def styles(self, w: Tensor) -> Tensor:
        """(N, I)."""
        return self.affine(w)

    @property
    def _options(self) -> dict:
        names = ("demodulate", "upsample", "padding", "eps", "impl")
        return {name: getattr(self, name) for name in names}

    def forward(
        self,
        input: Tensor,
        w: Tensor,
        *,
        styles: Tensor | None = None,
        scaled: bool = False,
        factors_apart: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Convolve with the styles of w.

        Args:
            styles: those of w, if they are known already.
            scaled: the input is already multiplied by them.
            factors_apart: return the convolution before its demodulation, and the factors (N, O) that are left (or
                None): ``demod`` of :func:`pixnorm.functional.style_epilogue`.
        """
        if (node := traced(self, input, w)) is not None:
            return node
        self._check(input)
        if styles is None:
            check_w(w, input, self.style_dim)
            styles = self.styles(w)
        (styles,) = rows_beside(input, styles)
        if factors_apart:
            return modulated(input, self._scaled_weight(), styles, **self._options, scaled=scaled)
        if scaled:
            raise ValueError("a scaled input is for factors_apart=True")
        return F.modulated_conv2d(input, self._scaled_weight(), styles, **self._options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, upsample={self.upsample}"


class SpatiallyModulatedConv2d(_ModulatedConv):
    r"""Spatially modulated convolution (arXiv 2006.05394 eq. 12-14): as :class:`ModulatedConv2d`, with styles for each
    pixel, from a map of w by a 1x1 convolution. The equation is in
    :func:`pixnorm.functional.spatially_modulated_conv2d`.

    Args:
        in_channels, out_channels, kernel_size, style_dim, demodulate, padding, eps, impl, device, dtype: as in
            :class:`ModulatedConv2d`.
        padding_mode, upsample: as in :func:`pixnorm.functional.spatially_modulated_conv2d`.

    Shape:
        x (N, I, H, W) and w (N, style_dim, H, W) to (N, O, H', W').

    Parameters as in :class:`ModulatedConv2d`; ``affine`` is an :class:`EqualizedConv2d`.

    Raises:
        ValueError: an argument has a value that is not listed above, or w does not fit.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        style_dim: int,
        demodulate: bool = True,
        padding: Padding = "same",
        padding_mode: str = "zeros",
        eps: float = 1e-8,
        impl: str = "auto",
        device=None,
        dtype=None,
        *,
        upsample: int = 1,
    ):
        where = {"device": device, "dtype": dtype}
        super().__init__(in_channels, out_channels, kernel_size, style_dim, demodulate, padding, eps, impl, **where)
        check_option("padding_mode", padding_mode, PADDING_MODES)
        check_option("upsample", upsample, (1, 2))
        self.padding_mode, self.upsample = padding_mode, upsample
        self.affine = EqualizedConv2d(style_dim, in_channels, 1, gain=1.0, bias_init=1.0, **where)

    def styles(self, w: Tensor) -> Tensor:
        """(N, I, H, W)."""
        return self.affine(w)

    def forward(
        self, input: Tensor, w: Tensor, *, styles: Tensor | None = None, factors_apart: bool = False
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Convolve with the styles of a map of w.

        Args:
            styles: (N, I, H, W), if they are known already; w is not used then.
            factors_apart: as in :class:`ModulatedConv2d`.
        """
        if (node := traced(self, input, w)) is not None:
            return node
        self._check(input)
        n, _, height, width = input.shape
        if styles is None:
            check_shape("w", w, (n, self.style_dim, height, width), input)
            styles = self.styles(w)
        check_shape("styles", styles, input.shape, input)
        names = ("demodulate", "upsample", "padding", "padding_mode", "eps", "impl")
        options = {name: getattr(self, name) for name in names}
        convolve = spatially_modulated if factors_apart else F.spatially_modulated_conv2d
        return convolve(input, self._scaled_weight(), styles.to(input.dtype), **options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, padding_mode={self.padding_mode!r}, upsample={self.upsample}"


class StyleBlock(nn.Module):
    r"""A layer of StyleGAN 2 (arXiv 1912.04958): modulated convolution, noise, bias, leaky ReLU. Upsampling is nearest,
    before the convolution, and followed by a blur.

    All after the convolution is one op, :func:`pixnorm.functional.style_epilogue`, and in :class:`StyleBlocks` what the
    convolution of the next layer needs first, too.

    Args:
        in_channels, out_channels, kernel_size, style_dim, upsample, impl, device, dtype: as in
            :class:`ModulatedConv2d`.
        noise: whether there is noise.
        activation, negative_slope, gain: as in :func:`pixnorm.functional.style_epilogue`.

    Shape:
        x (N, I, H, W), w (N, style_dim) and noise (N, 1, H', W'), (1, 1, H', W') or None, which draws it anew, to
        (N, O, H', W') with H' = H * upsample.

    Parameters ``conv``, a :class:`ModulatedConv2d`, ``noise`` with one strength, and ``bias`` (O), 0 at first.

    Raises:
        ValueError: an argument has a value that is not listed above, or w or noise do not fit.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        style_dim: int,
        upsample: int = 1,
        noise: bool = True,
        activation: str | None = "leaky_relu",
        negative_slope: float = 0.2,
        gain: float = HE,
        impl: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_option("activation", activation, ACTIVATIONS)
        where = {"device": device, "dtype": dtype}
        options = {"upsample": upsample, "impl": impl, **where}
        self.conv = ModulatedConv2d(in_channels, out_channels, kernel_size, style_dim, **options)
        self.noise = NoiseInjection(1, impl, **where) if noise else None
        self.bias = nn.Parameter(torch.zeros(out_channels, **where))
        self.activation, self.negative_slope, self.gain = activation, negative_slope, gain

    def reset_parameters(self) -> None:
        """The bias starts at 0; the layers inside have methods of their own."""
        nn.init.zeros_(self.bias)

    def forward(
        self,
        input: Tensor,
        w: Tensor,
        noise: Tensor | None = None,
        *,
        styles: Tensor | None = None,
        next_styles: Tensor | None = None,
        scaled: bool = False,
    ) -> Tensor:
        """The layer's features.

        Args:
            styles: (N, I), those of w, if they are known already.
            next_styles: (N, O), multiplied with the result: those of the convolution that follows.
            scaled: the input is already multiplied by the styles, by the layer before.
        """
        if (node := traced(self, input, w, noise)) is not None:
            return node
        check_noise(self.noise, noise)
        conv = self.conv
        y, demod = conv(input, w, styles=styles, scaled=scaled, factors_apart=True)
        if conv.upsample == 2:
            y = F.blur2d(y, impl=conv.impl)
        noise, strength = NoiseInjection.of(self.noise, y, noise)
        demod, strength, bias, next_styles = rows_beside(y, demod, strength, self.bias, next_styles)
        return F.style_epilogue(
            y,
            demod=demod,
            noise=noise,
            noise_strength=strength,
            bias=bias,
            activation=self.activation,
            negative_slope=self.negative_slope,
            gain=self.gain,
            next_styles=next_styles,
            impl=conv.impl,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, gain={self.gain:.4g}"


class StyleBlocks(nn.Module):
    """Layers of StyleGAN 2 one after the other. Between two convolutions there is one pass over the features: each
    layer's last op multiplies with the styles of the next.

    Args:
        blocks: each takes as many channels as the one before gives.

    Shape:
        x (N, I, H, W), w (N, style_dim) for all layers or (N, L, style_dim), and a noise or None for each layer, or
        None, to the features of the last layer.

    Raises:
        ValueError: no blocks, or channels, w or the number of noises do not fit.
    """

    def __init__(self, *blocks: StyleBlock):
        super().__init__()
        if not blocks:
            raise ValueError("expected at least one block")
        if wrong := [type(block).__name__ for block in blocks if not isinstance(block, StyleBlock)]:
            raise TypeError(f"expected StyleBlocks, got {', '.join(wrong)}")
        for before, after in pairwise(blocks):
            if before.conv.out_channels != after.conv.in_channels:
                channels = f"{after.conv.in_channels} channels follows one that gives {before.conv.out_channels}"
                raise ValueError(f"a block of {channels}")
        if len({block.conv.style_dim for block in blocks}) > 1:
            raise ValueError(f"blocks of different style_dim: {[block.conv.style_dim for block in blocks]}")
        self.blocks = nn.ModuleList(blocks)

    def forward(self, input: Tensor, w: Tensor, noises: list[Tensor | None] | None = None) -> Tensor:
        """The features of the last layer."""
        if (node := traced(self, input, w, noises)) is not None:
            return node
        count = len(self.blocks)
        if w.dim() == 2:
            w = w[:, None].expand(-1, count, -1)
        style_dim = self.blocks[0].conv.style_dim
        check_shape("w", w, (input.shape[0], count, style_dim), input)
        noises = [None] * count if noises is None else noises
        if len(noises) != count:
            raise ValueError(f"expected noise for {count} layers, got {len(noises)}")
        styles = [block.conv.styles(of_layer) for block, of_layer in zip(self.blocks, w.unbind(1), strict=True)]
        x = input
        for i, block in enumerate(self.blocks):
            after = styles[i + 1] if i + 1 < count else None
            x = block(x, w[:, i], noises[i], styles=styles[i], next_styles=after, scaled=i > 0)
        return x
