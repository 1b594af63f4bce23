"""The layers of StyleGAN 1's synthesis network (arXiv 1812.04948)."""

import torch
from torch import Tensor, nn

from pixnorm import functional as F
from pixnorm.nn._leaf import traced
from pixnorm.nn.equalized import EqualizedConv2d, EqualizedLinear
from pixnorm.nn.style import NoiseInjection, check_noise, check_w, rows_beside
from pixnorm.ops._dispatch import IMPLS
from pixnorm.ops.checks import check_image, check_option


class StyleNorm2d(nn.Module):
    r"""The end of a layer of StyleGAN 1 (arXiv 1812.04948): noise, bias, leaky ReLU, AdaIN, as one op,
    :func:`pixnorm.functional.style_norm`. On its own it follows StyleGAN's constant input.

    Args:
        num_features: C.
        style_dim: the length of w.
        noise: whether there is noise.
        negative_slope, eps, impl: as in :func:`pixnorm.functional.style_norm`.
        device, dtype: of the parameters.

    Shape:
        x (N, C, H, W), w (N, style_dim) and noise (N, 1, H, W), (1, 1, H, W) or None, which draws it anew, to
        (N, C, H, W).

    Parameters ``noise`` with a strength for each channel, ``bias`` (C), 0 at first, and ``affine``, an
    :class:`EqualizedLinear` that gives scales, then shifts.

    Raises:
        ValueError: an argument has a value that is not listed above, or w or noise do not fit.
    """

    def __init__(
        self,
        num_features: int,
        style_dim: int,
        noise: bool = True,
        negative_slope: float = 0.2,
        eps: float = 1e-8,
        impl: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_option("impl", impl, IMPLS)
        where = {"device": device, "dtype": dtype}
        self.noise = NoiseInjection(num_features, impl, **where) if noise else None
        self.bias = nn.Parameter(torch.zeros(num_features, **where))
        self.affine = EqualizedLinear(style_dim, 2 * num_features, gain=1.0, **where)
        self.style_dim = style_dim
        self.negative_slope, self.eps, self.impl = negative_slope, eps, impl

    def reset_parameters(self) -> None:
        """The bias starts at 0; the layers inside have methods of their own."""
        nn.init.zeros_(self.bias)

    def _check(self, x: Tensor, w: Tensor, noise: Tensor | None) -> None:
        check_image(x)
        check_w(w, x, self.style_dim)
        check_noise(self.noise, noise)

    def _end(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        noise, strength = NoiseInjection.of(self.noise, x, noise)
        scale, shift, strength, bias = rows_beside(x, *self.affine(w).chunk(2, 1), strength, self.bias)
        return F.style_norm(
            x,
            scale,
            shift,
            noise=noise,
            noise_strength=strength,
            bias=bias,
            negative_slope=self.negative_slope,
            eps=self.eps,
            impl=self.impl,
        )

    def forward(self, input: Tensor, w: Tensor, noise: Tensor | None = None) -> Tensor:
        """The layer's features."""
        if (node := traced(self, input, w, noise)) is not None:
            return node
        self._check(input, w, noise)
        return self._end(input, w, noise)

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope}, eps={self.eps}, impl={self.impl!r}"


class StyleLayer(StyleNorm2d):
    r"""A layer of StyleGAN 1 (arXiv 1812.04948): convolution, noise, bias, leaky ReLU, AdaIN. Upsampling is nearest,
    before the convolution, and followed by a blur.

    All after the convolution is one op, :func:`pixnorm.functional.style_norm`.

    Args:
        in_channels, out_channels, kernel_size: as in ``nn.Conv2d``; the padding keeps the size.
        style_dim: the length of w.
        upsample: 1 or 2.
        noise: whether there is noise.
        negative_slope, eps, impl: as in :func:`pixnorm.functional.style_norm`.
        device, dtype: of the parameters.

    Shape:
        x (N, I, H, W), w (N, style_dim) and noise (N, 1, H', W'), (1, 1, H', W') or None, which draws it anew, to
        (N, O, H', W') with H' = H * upsample.

    Parameters ``conv``, an :class:`EqualizedConv2d`, and those of :class:`StyleNorm2d`.

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
        negative_slope: float = 0.2,
        eps: float = 1e-8,
        impl: str = "auto",
        device=None,
        dtype=None,
    ):
        where = {"device": device, "dtype": dtype}
        super().__init__(out_channels, style_dim, noise, negative_slope, eps, impl, **where)
        check_option("upsample", upsample, (1, 2))
        self.upsample = upsample
        self.conv = EqualizedConv2d(in_channels, out_channels, kernel_size, padding="same", bias=False, **where)

    def forward(self, input: Tensor, w: Tensor, noise: Tensor | None = None) -> Tensor:
        """The layer's features."""
        if (node := traced(self, input, w, noise)) is not None:
            return node
        self._check(input, w, noise)
        if self.upsample == 2:
            x = F.upsample_conv2d(input, self.conv.scaled()[0], padding="same", impl=self.impl)
            x = F.blur2d(x, impl=self.impl)
        else:
            x = self.conv(input)
        return self._end(x, w, noise)

    def extra_repr(self) -> str:
        return f"upsample={self.upsample}, {super().extra_repr()}"
