"""The papers' networks, for tests and benchmarks: each with its arguments, small and as published, and its inputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnorm.networks import (
    Discriminator,
    Generator,
    SPADEDiscriminator,
    SPADEEncoder,
    SPADEGenerator,
    SSNGenerator,
    StyleGAN,
    StyleGAN2,
    StyleGAN2Discriminator,
    StyleGANDiscriminator,
)


@dataclass(frozen=True, eq=False)
class NetworkSpec:
    """Attributes:
    name: in tests and tables.
    kind: the class.
    draw: (network, batch) -> the arguments of a call, float32 and integers, drawn from PyTorch's global generator.
    options: what makes the network what it is.
    small: more options; of the smallest network that has all of its kinds of layers.
    published: the same, of the smallest that has been published; with how much it is reduced for a CPU.
    batch: in benchmarks on a CPU.
    independent: whether samples do not see each other in eval mode.
    """

    name: str
    kind: type[nn.Module]
    draw: Callable[[nn.Module, int], tuple[Tensor, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    small: Mapping[str, Any] = field(default_factory=dict)
    published: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 16
    independent: bool = True

    def __str__(self) -> str:
        return self.name

    def build(self, impl: str, published: bool = False) -> nn.Module:
        """The network; the same weights whatever the impl."""
        torch.manual_seed(0)
        return self.kind(**self.options, **(self.published if published else self.small), impl=impl)

    def inputs(self, network: nn.Module, batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """Arguments of a call; floating-point ones in that dtype."""
        torch.manual_seed(1)
        return tuple(t.to(dtype) if t.is_floating_point() else t for t in self.draw(network, batch))


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors that a network returns, in lists or tuples of lists or by themselves."""
    return [output] if isinstance(output, Tensor) else [tensor for part in output for tensor in tensors_of(part)]


def total(output: Any) -> Tensor:
    """A number that depends on all that a network returns, smoothly, and to which every sample contributes alike."""
    return sum(tensor.sin().mean() for tensor in tensors_of(output))


# ---- SNGAN ----


def _latents(network: nn.Module, n: int) -> tuple[Tensor, ...]:
    z = torch.randn(n, network.fc.in_features)
    return (z, torch.randint(network.num_classes, (n,))) if network.num_classes else (z,)


def _images(network: nn.Module, n: int) -> tuple[Tensor, ...]:
    x = torch.rand(n, 3, network.resolution, network.resolution) * 2 - 1
    return (x, torch.randint(network.num_classes, (n,))) if getattr(network, "num_classes", 0) else (x,)


def _sngan(name: str, batch: int = 16, published: Mapping[str, Any] | None = None, **options: Any) -> NetworkSpec:
    small = {"channels": 16, "latent_dim": 8}
    return NetworkSpec(name, Generator, _latents, options, small, published or {}, batch)


SNGAN = (
    _sngan("SNGAN", norm="fused_bn"),
    _sngan("SNGAN with SPN", norm="spn"),
    _sngan("SNGAN with conditional batch norm", norm="ccbn", num_classes=10),
    _sngan("SNGAN with conditional SPN", norm="cspn", num_classes=10),
    _sngan("SNGAN with GConv", published={"latent_dim": 32}, norm="bigbn", conv="gconv", bias=False),
    NetworkSpec("SNGAN's discriminator", Discriminator, _images, {"num_classes": 10}, {"channels": 16}),
)

# ---- SPADE ----


def segments(n: int, labels: int, resolution: int) -> Tensor:
    """Label maps (N, resolution, resolution) of segments with smooth borders, some dozens in an image."""
    fields = torch.randn(n, labels, 6, 6)
    return F.interpolate(fields, size=(resolution, resolution), mode="bicubic").argmax(1)


def _maps(network: nn.Module, n: int) -> tuple[Tensor, ...]:
    resolution = network.start[1] * 2 ** sum(block.upsample == 2 for block in network.blocks)
    maps = segments(n, network.label_channels, resolution)
    return (maps, torch.randn(n, network.latent_dim)) if network.latent_dim else (maps,)


def _images_and_maps(network: nn.Module, n: int) -> tuple[Tensor, ...]:
    resolution = 32 if network.label_channels < 19 else 128
    return torch.rand(n, 3, resolution, resolution) * 2 - 1, segments(n, network.label_channels, resolution)


def _faces(network: nn.Module, n: int) -> tuple[Tensor, ...]:
    return (torch.rand(n, 3, network.RESOLUTION, network.RESOLUTION) * 2 - 1,)


_FEW = {"label_channels": 4, "width": 4}
_SMALL_SPADE = {"resolution": 64, "hidden_channels": 8, **_FEW}
_FACES = {"resolution": 128, "width": 16}

SPADE = (
    NetworkSpec("SPADE", SPADEGenerator, _maps, {}, _SMALL_SPADE, _FACES, batch=4),
    NetworkSpec("SPADE of latent vectors", SPADEGenerator, _maps, {"latent_dim": 16}, _SMALL_SPADE, _FACES, batch=4),
    NetworkSpec("SPADE's discriminator", SPADEDiscriminator, _images_and_maps, {}, _FEW, {"width": 16}, batch=4),
    NetworkSpec("SPADE's encoder", SPADEEncoder, _faces, {}, {"width": 2, "latent_dim": 4}, {"width": 16}, batch=4),
)

# ---- StyleGAN ----


def _style_latents(network: nn.Module, n: int) -> tuple[Tensor, ...]:
    return (torch.randn(n, network.latent_dim),)


def _cells(network: nn.Module, n: int) -> tuple[Tensor, ...]:
    return (torch.randn(n, network.latent_dim, network.grid, network.grid),)


_TINY = {"resolution": 8, "channels_max": 8}
_TINY_GENERATOR = _TINY | {"latent_dim": 6, "style_dim": 5, "mapping_layers": 2}
_OF_64 = {"resolution": 64, "channels_max": 128}  # reduced, for a CPU
_LAST = {"progressive": False}  # every parameter gets a gradient

STYLE = (
    NetworkSpec("StyleGAN", StyleGAN, _style_latents, _LAST, _TINY_GENERATOR, _OF_64, batch=8),
    NetworkSpec("StyleGAN 2", StyleGAN2, _style_latents, {}, _TINY_GENERATOR, _OF_64, batch=8),
    NetworkSpec("SSN", SSNGenerator, _cells, {"grid": 4}, _TINY_GENERATOR, _OF_64, batch=8),
    NetworkSpec("StyleGAN's discriminator", StyleGANDiscriminator, _images, _LAST, _TINY, _OF_64, 8, False),
    NetworkSpec("StyleGAN 2's discriminator", StyleGAN2Discriminator, _images, {}, _TINY, _OF_64, 8, False),
)

NETWORKS = {spec.name: spec for spec in (*SNGAN, *SPADE, *STYLE)}
