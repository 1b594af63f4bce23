"""The experiment of gmm.py: eight Gaussians on a ring, a small GAN that learns them, and how well it has."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from math import exp, pi

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnorm import GLinear
from pixnorm.nn import latent

MODES, RADIUS, STD = 8, 2.0, 0.02
ANGLES = torch.arange(MODES) * (2 * pi / MODES)
CENTRES = RADIUS * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)
GOOD_OF_REAL = 1 - exp(-(3**2) / 2)  # the share of a 2-D Gaussian within 3 standard deviations

LATENT, HIDDEN, BATCH = 2, 128, 256
BETAS, RATE_D, RATE_G = (0.5, 0.999), 1e-4, 1e-3
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "nn.Linear": nn.Linear,
    "GLinear": partial(GLinear, latent_dim=LATENT, bias=True),
}

CHECKPOINTS, SAMPLES = 10, 2500


def real_points(n: int, rng: torch.Generator) -> Tensor:
    """n points of the eight Gaussians: (n, 2)."""
    modes = torch.randint(MODES, (n,), generator=rng)
    return CENTRES[modes] + STD * torch.randn(n, 2, generator=rng)


def perceptron(outputs: int, layer: Callable[..., nn.Module] = nn.Linear) -> nn.Sequential:
    """(N, 2) to (N, outputs), through two hidden layers of a kind; the last is plain."""
    hidden = layer(2, HIDDEN), nn.ReLU(), layer(HIDDEN, HIDDEN), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(HIDDEN, outputs)).apply(_init_plain)


def _init_plain(module: nn.Module) -> None:
    """Plain layers start as generative ones do, so that they differ in nothing but their kind."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Cross-entropy of the logits of real and of fake points: the sum of the two means."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """The non-saturating one, of the logits of fake points."""
    return F.softplus(-fake).mean()


def checkpoints(iterations: int) -> list[int]:
    """The iterations after which samples are taken."""
    return [iterations * (i + 1) // CHECKPOINTS for i in range(CHECKPOINTS)]


def train(kind: str, seed: int, iterations: int, tick: Callable[[int], object]) -> Tensor:
    """One GAN. Those of one seed have the discriminator's first weights, the data and the latent vectors in common.

    Args:
        kind: of the generator's hidden layers, a key of LAYERS.
        tick: told, now and then, how many iterations have passed since it was last.

    Returns:
        Samples at the checkpoints, of the same latent vectors each time: (CHECKPOINTS, SAMPLES, 2).
    """
    torch.manual_seed(seed)
    discriminator, generator = perceptron(1), perceptron(2, LAYERS[kind])
    adam = partial(torch.optim.Adam, betas=BETAS, fused=True)
    optimizer_d, optimizer_g = adam(discriminator.parameters(), RATE_D), adam(generator.parameters(), RATE_G)
    rng = torch.Generator().manual_seed(seed)
    fixed = torch.randn(SAMPLES, LATENT, generator=rng)

    def generate(z: Tensor) -> Tensor:
        with latent(z):
            return generator(z)

    def step() -> None:
        real, fake = real_points(BATCH, rng), generate(torch.randn(BATCH, LATENT, generator=rng))
        optimizer_d.zero_grad()
        discriminator_loss(*discriminator(torch.cat([real, fake.detach()])).split(BATCH)).backward()
        optimizer_d.step()

        discriminator.requires_grad_(False)  # spares the gradients of its weights
        optimizer_g.zero_grad()
        generator_loss(discriminator(fake)).backward()
        optimizer_g.step()
        discriminator.requires_grad_(True)

    samples, done = [], 0
    for checkpoint in checkpoints(iterations):
        while done < checkpoint:
            stretch = min(100, checkpoint - done)
            for _ in range(stretch):
                step()
            done += stretch
            tick(stretch)
        with torch.no_grad():
            samples.append(generate(fixed))
    return torch.stack(samples)


def in_modes(points: Tensor) -> Tensor:
    """How many of the points (..., N, 2) lie within 3 standard deviations of each centre: (..., 8)."""
    return ((points[..., None, :] - CENTRES).norm(dim=-1) <= 3 * STD).sum(-2)


@dataclass(frozen=True)
class Run:
    """What became of one GAN: ``samples`` (CHECKPOINTS, SAMPLES, 2)."""

    kind: str
    seed: int
    samples: Tensor

    @cached_property
    def in_modes(self) -> list[list[int]]:
        """At each checkpoint, how many samples lie in each mode."""
        return in_modes(self.samples).tolist()

    @property
    def modes(self) -> list[int]:
        """At each checkpoint, how many modes have a sample."""
        return [sum(count > 0 for count in counts) for counts in self.in_modes]

    @property
    def good(self) -> list[float]:
        """At each checkpoint, the share of samples that lie in a mode."""
        return [sum(counts) / self.samples.shape[1] for counts in self.in_modes]
