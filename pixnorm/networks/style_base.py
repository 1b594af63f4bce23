"""What the style-based generators (arXiv 1812.04948, 1912.04958, 2006.05394) and their discriminators share."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pixnorm.nn import MappingNetwork, style_mixing, truncate
from pixnorm.ops.checks import check_option, check_shape
from pixnorm.ops.common import dense, drawing

NOISES = ("random", "const", "none")
Noise = str | Sequence[Tensor | None] | None


def resolutions(resolution: int) -> list[int]:
    """4, 8, ... up to the resolution of a network.

    Raises:
        ValueError: it is no power of 2, or less than 4.
    """
    if resolution < 4 or resolution & (resolution - 1):
        raise ValueError(f"resolution must be a power of 2 and at least 4, got {resolution!r}")
    return [1 << i for i in range(2, resolution.bit_length())]


def width(resolution: int, channels_base: int, channels_max: int) -> int:
    """Channels of the features of a resolution.

    Raises:
        ValueError: there are none.
    """
    channels = min(channels_base // resolution, channels_max)
    if channels < 1:
        sizes = f"channels_base={channels_base} and channels_max={channels_max}"
        raise ValueError(f"{sizes} leave no channels at {resolution}x{resolution}")
    return channels


def fades(fade: float | Tensor) -> bool:
    """Whether colours of two resolutions are needed."""
    return isinstance(fade, Tensor) or fade != 1


def check_growth(size: int, fade: float | Tensor, resolution: int, progressive: bool) -> list[int]:
    """The resolutions in use of a network that grows to ``resolution`` and is at ``size``."""
    sides = resolutions(size)
    if size > resolution:
        raise ValueError(f"resolution must be at most the network's, {resolution}, got {size}")
    if not isinstance(fade, Tensor) and not 0 <= fade <= 1:
        raise ValueError(f"fade must be in [0, 1], got {fade}")
    if fades(fade) and size == 4:
        raise ValueError(f"nothing precedes 4x4, so fade must be 1, got {fade}")
    if not progressive and (size < resolution or fades(fade)):
        raise ValueError(f"resolution={size}, fade={fade} need a network with progressive=True")
    return sides


def check_one_of(z: Tensor | None, w: Tensor | None) -> None:
    if (z is None) == (w is None):
        raise ValueError(f"expected either z or w, got {'neither' if z is None else 'both'}")


class NoisyGenerator(nn.Module):
    """What style-based generators share: the mapping network, the constant, and the noises of their layers.

    Args:
        sizes: the resolutions of the layers that have noise.
        channels: of the constant, which is 4x4.
        noise: ``"random"``, ``"const"`` or ``"none"``, unless a call says otherwise.
        mapping: the mapping network.
    """

    def __init__(self, sizes: Sequence[int], channels: int, noise: str, mapping: MappingNetwork):
        super().__init__()
        check_option("noise", noise, NOISES)
        self.noise, self.noise_sizes = noise, tuple(sizes)
        self.latent_dim, self.style_dim = mapping.latent_dim, mapping.style_dim
        self.mapping = mapping
        self.constant = nn.Parameter(torch.empty(1, channels, 4, 4))
        for i, size in enumerate(self.noise_sizes):
            self.register_buffer(f"noise{i}", torch.empty(1, 1, size, size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The constant and the constant noises start normal; the layers inside have methods of their own."""
        nn.init.normal_(self.constant)
        for i in range(len(self.noise_sizes)):
            nn.init.normal_(getattr(self, f"noise{i}"))

    def noises(
        self, noise: Noise, like: Tensor, generator: torch.Generator | None = None, layers: int | None = None
    ) -> list[Tensor]:
        """The noises of the first layers (all if None): (N, 1, H, W), or (1, 1, H, W) for all samples.

        Args:
            noise: of which kind, or those themselves; see the networks.
            like: latent vectors or styles: N, dtype and device.
        """
        sizes = self.noise_sizes[:layers]
        n, where = like.shape[0], {"dtype": like.dtype, "device": like.device}

        def draw(size: int) -> Tensor:
            return torch.randn((n, 1, size, size), **drawing(generator), **where)

        noise = self.noise if noise is None else noise
        if isinstance(noise, str):
            check_option("noise", noise, NOISES)
            if noise == "random":
                return [draw(size) for size in sizes]
            if noise == "none":
                return [torch.zeros((1, 1, size, size), **where) for size in sizes]
            return [getattr(self, f"noise{i}").to(like.dtype) for i in range(len(sizes))]
        if len(noise) != len(sizes):
            raise ValueError(f"expected noise for {len(sizes)} layers, got {len(noise)}")
        for i, (given, size) in enumerate(zip(noise, sizes, strict=True)):
            if given is not None:
                batch = 1 if given.shape[:1] == (1,) else n
                check_shape(f"noise[{i}]", given, (batch, 1, size, size), like, "z or w")
        return [draw(size) if given is None else given for given, size in zip(noise, sizes, strict=True)]

    def input(self, n: int) -> Tensor:
        """The constant, n times."""
        return dense(self.constant.expand(n, -1, -1, -1), self.constant)


class StyleGenerator(NoisyGenerator):
    """A :class:`NoisyGenerator` with a w for each layer.

    Args:
        num_layers: how many.
        mixing, truncation, truncated_layers: see the networks.
    """

    def __init__(self, sizes, channels, noise, mapping, num_layers, mixing, truncation, truncated_layers):
        super().__init__(sizes, channels, noise, mapping)
        if not 0 <= mixing <= 1:
            raise ValueError(f"mixing must be in [0, 1], got {mixing}")
        if truncated_layers is not None and truncated_layers < 0:
            raise ValueError(f"truncated_layers must not be negative, got {truncated_layers}")
        self.num_layers, self.mixing = num_layers, mixing
        self.truncation, self.truncated_layers = truncation, truncated_layers

    def styles(
        self,
        z: Tensor,
        *,
        psi: float | None = None,
        layers: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The styles of latent vectors: mapped, in training mixed with those of others, and truncated.

        Each sample is mixed with probability ``mixing``, with a crossover of its own, uniform between the layers;
        NVlabs' code draws one for a batch.

        Args:
            z: (N, latent_dim).
            psi: of the truncation; None: 1 in training, else ``truncation``.
            layers: the first of the network's, of which there are styles; None: all.
            generator: draws what is mixed.

        Returns:
            (N, layers, style_dim).
        """
        self._check_z(z)
        n, layers = z.shape[0], self.num_layers if layers is None else layers
        if self.training and self.mixing > 0:
            draws = {**drawing(generator), "device": z.device}
            others = torch.randn(z.shape, dtype=z.dtype, **draws)
            both = self.mapping(torch.cat([z, others]))[:, None].expand(-1, layers, -1)
            cut = torch.randint(1, max(layers, 2), (n,), **draws)  # one layer has nothing to mix
            mixed = torch.rand((n,), **draws) < self.mixing
            w = style_mixing(both[:n], both[n:], torch.where(mixed, cut, layers))
        else:
            w = self.mapping(z)[:, None].expand(-1, layers, -1)
        if psi is None:
            psi = 1.0 if self.training else self.truncation
        return w if psi == 1 else truncate(w, self.mapping.w_avg, psi, self.truncated_layers)

    def given(self, z: Tensor | None, w: Tensor | None, psi: float | None, layers: int) -> Tensor:
        """z or w, whichever a call has, after all checks of them."""
        check_one_of(z, w)
        if w is None:
            self._check_z(z)
            return z
        if psi is not None:
            raise ValueError("psi is for styles of z; w is used as it is (truncate() truncates it)")
        if w.dim() not in (2, 3) or w.shape[-1] != self.style_dim or (w.dim() == 3 and w.shape[1] != layers):
            wanted = f"(N, {self.style_dim}) or (N, {layers}, {self.style_dim})"
            raise ValueError(f"w must have shape {wanted}, got {tuple(w.shape)}")
        return w

    def styles_of(self, z, w, psi, generator, layers) -> Tensor:
        """The styles of what ``given`` accepted."""
        if w is None:
            return self.styles(z, psi=psi, layers=layers, generator=generator)
        return w[:, None].expand(-1, layers, -1) if w.dim() == 2 else w

    def _check_z(self, z: Tensor) -> None:
        if z.dim() != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(f"z must have shape (N, {self.latent_dim}), got {tuple(z.shape)}")

    def extra_repr(self) -> str:
        texts = f"mixing={self.mixing}, truncation={self.truncation}, truncated_layers={self.truncated_layers}"
        return f"{texts}, noise={self.noise!r}"
