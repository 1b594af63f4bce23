"""The adversarial losses of the papers, and what is added to them.

Losses of scores: ``discriminator(real, fake)`` and ``generator(fake)``, means over all scores, of any shape (a PatchGAN
has several for an image). Definitions: arXiv 2201.10725 and 2111.15171 (hinge; eq. 1-2 of the latter, cross entropy),
arXiv 1611.04076 (least squares), arXiv 1812.04948 (logistic, which is the cross entropy, with R1).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """E max(0, 1 - D(x)) + E max(0, 1 + D(G(z)))."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def hinge_generator(fake: Tensor) -> Tensor:
    """-E D(G(z))."""
    return -fake.mean()


def cross_entropy_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """-E log σ(D(x)) - E log(1 - σ(D(G(z))))."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def cross_entropy_generator(fake: Tensor) -> Tensor:
    """The form that does not saturate, -E log σ(D(G(z)))."""
    return F.softplus(-fake).mean()


def least_squares_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """½ E (D(x) - 1)² + ½ E D(G(z))²."""
    return 0.5 * (real - 1).square().mean() + 0.5 * fake.square().mean()


def least_squares_generator(fake: Tensor) -> Tensor:
    """½ E (D(G(z)) - 1)²."""
    return 0.5 * (fake - 1).square().mean()


class Loss(NamedTuple):
    """The two sides of an adversarial loss."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


LOSSES = {
    "hinge": Loss(hinge_discriminator, hinge_generator),
    "ce": Loss(cross_entropy_discriminator, cross_entropy_generator),
    "lsgan": Loss(least_squares_discriminator, least_squares_generator),
    "logistic": Loss(cross_entropy_discriminator, cross_entropy_generator),  # its name in StyleGAN
}


def gradient_penalty(scores: Tensor, images: Tensor) -> Tensor:
    """R1 without its weight (arXiv 1801.04406): ½ E |∇ D(x)|², itself differentiable.

    Args:
        scores: (N, ...), of a discriminator in which samples do not see each other, or all of them together.
        images: (N, ...), of which ``scores`` were computed, with ``requires_grad``.
    """
    (grad,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    return 0.5 * grad.square().flatten(1).sum(1).mean()


def feature_matching(real: Sequence[Sequence[Tensor]], fake: Sequence[Sequence[Tensor]]) -> Tensor:
    """Mean absolute differences of a discriminator's features (arXiv 1711.11585): summed over layers, averaged over
    scales.

    Args:
        real, fake: for each scale the features of each layer, the last of which are scores and do not count. No
            gradient goes to ``real``.
    """
    of_scales = [
        sum(F.l1_loss(b, a.detach()) for a, b in zip(of_real[:-1], of_fake[:-1], strict=True))
        for of_real, of_fake in zip(real, fake, strict=True)
    ]
    return sum(of_scales) / len(of_scales)


def kl_divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    """Of N(mu, exp(logvar)) from N(0, 1), summed over dimensions and samples, as in NVlabs' SPADE."""
    return -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum()
