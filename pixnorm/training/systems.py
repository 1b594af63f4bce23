"""Generator and discriminator of a family of networks, with their losses: what the trainer and the sampler call.

A system holds no optimiser and does not know of processes: the trainer gives it the modules to call, which may be
wrapped for DistributedDataParallel. Random numbers are drawn from PyTorch's generators.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from pixnorm.networks import (
    Discriminator,
    Generator,
    SPADEDiscriminator,
    SPADEEncoder,
    SPADEGenerator,
    StyleGAN,
    StyleGAN2,
    StyleGAN2Discriminator,
    StyleGANDiscriminator,
)
from pixnorm.ops.common import drawing, wide
from pixnorm.training.losses import LOSSES, feature_matching, gradient_penalty, kl_divergence
from pixnorm.training.recipes import Recipe

Losses = dict[str, Tensor]  # "loss", of which the gradient is taken, and its parts, for the log


class Critic(nn.Module):
    """A discriminator's two calls in a step of its own, as one: one forward pass for DistributedDataParallel, and one
    graph for ``torch.compile``, in which the vectors of spectral norm move twice."""

    def __init__(self, discriminator: nn.Module):
        super().__init__()
        self.discriminator = discriminator

    def forward(self, real: Sequence[Tensor], fake: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Scores of real and of generated images, each with its classes."""
        return self.discriminator(*real), self.discriminator(*fake)


class System:
    """Generator and discriminator of a recipe.

    Args:
        recipe: of which ``build`` makes the networks.
        num_classes: of a conditional recipe's data.
        label_channels: of label maps.
        impl: of our layers.

    Attributes:
        without: what its loss has not, of the recipe's weights.
        generator, discriminator: in training mode, in float32, on the CPU.
        compiles: whether ``torch.compile`` can differentiate the discriminator's loss: not twice.

    Raises:
        ValueError: the networks do not have the recipe's resolution, norm, number of channels, ...
    """

    without: tuple[str, ...] = ()

    def __init__(self, recipe: Recipe, num_classes: int = 0, label_channels: int = 0, impl: str = "auto"):
        self.recipe, self.impl = recipe, impl
        self.num_classes = num_classes if recipe.conditional else 0
        self.label_channels = recipe.label_channels or label_channels
        for name in self.without:
            if getattr(recipe, name):
                raise ValueError(
                    f"the loss of {recipe.family} has no {name}, and the recipe's is {getattr(recipe, name)}"
                )
        self.loss = LOSSES[recipe.loss]
        self.compiles = not recipe.r1
        self.generator, self.discriminator = self.build()

    def build(self) -> tuple[nn.Module, nn.Module]:
        raise NotImplementedError

    def critic(self) -> nn.Module:
        """What ``discriminator_loss`` calls."""
        return Critic(self.discriminator)

    def conditions(self, real: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Of real images: their classes, or label maps."""
        raise NotImplementedError

    def inputs(self, conditions: tuple[Tensor, ...], n: int, like: Tensor, rng: torch.Generator | None = None):
        """The arguments of the generator for n images."""
        raise NotImplementedError

    def discriminator_loss(self, generator, critic, real: Sequence[Tensor]) -> Losses:
        """Of a step of the discriminator.

        Args:
            generator, critic: the modules to call.
            real: images (N, 3, R, R) in [-1, 1], and what the data has beside them.
        """
        raise NotImplementedError

    def generator_loss(self, generator, discriminator, real: Sequence[Tensor], n: int) -> Losses:
        """Of a step of the generator, for n of the batch's images; the mean over such parts is the batch's."""
        raise NotImplementedError

    def sample(
        self, generator: nn.Module, n: int, rng: torch.Generator, like: Tensor, conditions=(), **options
    ) -> Tensor:
        """Images (n, 3, R, R) of a generator in eval mode.

        Args:
            rng: draws latent vectors, and classes where there are no ``conditions``.
            like: a tensor of the device and the dtype wanted.
            options: of the generator, such as ``psi``.
        """
        raise NotImplementedError


class FromLatents(System):
    """Images are made of latent vectors, and of classes: SNGAN, StyleGAN."""

    without = ("feature_matching", "vgg", "kl")

    def conditions(self, real):
        return (real[1],) if self.num_classes else ()

    def inputs(self, conditions, n, like, rng=None):
        where = {"device": like.device, **drawing(rng)}
        z = torch.randn((n, self.recipe.latent_dim), dtype=like.dtype, **where)
        if self.num_classes and not conditions:
            conditions = (torch.randint(self.num_classes, (n,), **where),)
        return z, *conditions

    def discriminator_loss(self, generator, critic, real):
        images, of_real = real[0], self.conditions(real)
        with torch.no_grad():
            z, *of_fake = self.inputs((), images.shape[0], images)
            fake = generator(z, *of_fake)
        if self.recipe.r1:
            images = images.detach().requires_grad_()
        scores, of_generated = critic((images, *of_real), (fake, *of_fake))
        loss = adversarial = self.loss.discriminator(wide(scores), wide(of_generated))
        parts = {"adversarial": adversarial}
        if self.recipe.r1:
            parts["gradient_penalty"] = gradient_penalty(wide(scores), images)
            loss = adversarial + self.recipe.r1 * parts["gradient_penalty"]
        return {"loss": loss, **parts}

    def generator_loss(self, generator, discriminator, real, n):
        z, *conditions = self.inputs((), n, real[0])
        scores = discriminator(generator(z, *conditions), *conditions)
        return {"loss": self.loss.generator(wide(scores))}

    def sample(self, generator, n, rng, like, conditions=(), **options):
        return generator(*self.inputs(tuple(conditions), n, like, rng), **options)


class SNGAN(FromLatents):
    """The networks of arXiv 2201.10725 and 2111.15171."""

    def build(self):
        recipe, classes = self.recipe, self.num_classes
        generator = Generator(
            recipe.resolution,
            recipe.norm,
            recipe.latent_dim,
            recipe.channels_g,
            self.impl,
            conv=recipe.conv,
            num_classes=classes,
            bias=recipe.bias,
            spectral_norm=recipe.spectral_norm,
        )
        return generator, Discriminator(recipe.resolution, classes, recipe.channels_d, impl=self.impl)


class StyleBased(FromLatents):
    """The networks of arXiv 1812.04948 and 1912.04958, at one resolution throughout."""

    def __init__(self, recipe: Recipe, *args, kinds: tuple[Callable, Callable], **kwargs):
        self.kinds = kinds
        if recipe.conditional:
            raise ValueError(f"{recipe.family} has no classes, and the recipe is conditional")
        super().__init__(recipe, *args, **kwargs)

    def build(self):
        of_generator, of_discriminator = self.kinds
        recipe = self.recipe
        widths = [{} if c is None else {"channels_max": c} for c in (recipe.channels_g, recipe.channels_d)]
        return (
            of_generator(recipe.resolution, recipe.latent_dim, recipe.latent_dim, **widths[0], impl=self.impl),
            of_discriminator(recipe.resolution, **widths[1], impl=self.impl),
        )

    def sample(self, generator, n, rng, like, conditions=(), **options):
        return generator(*self.inputs((), n, like, rng), generator=rng, **options)  # which draws the noise, too


class EncodedSPADE(nn.Module):
    """SPADE's generator with its encoder, as one module: gradients of both are averaged over processes together."""

    def __init__(self, generator: SPADEGenerator, encoder: SPADEEncoder | None):
        super().__init__()
        self.generator, self.encoder = generator, encoder

    def forward(
        self, segmap: Tensor, image: Tensor | None = None, z: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Images, and mean and logarithm of the variance of the latent vectors of ``image`` (None without it)."""
        mu = logvar = None
        if self.encoder is not None and image is not None:
            mu, logvar = self.encoder(image)
            z = self.encoder.sample(mu, logvar)
        return self.generator(segmap, *(() if z is None else (z,))), mu, logvar


class SPADE(System):
    """The networks of arXiv 1903.07291: images are made of label maps, and of latent vectors of the images' encoder.

    Attributes:
        perceptual: (fake, real) -> the differences of VGG's features; set by the trainer.
    """

    without = ("r1",)
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None

    def __init__(self, recipe: Recipe, *args, **kwargs):
        if recipe.conditional:
            raise ValueError("spade has label maps in place of classes, and the recipe is conditional")
        if recipe.batch_d != recipe.batch_g:
            raise ValueError(
                "with spade both steps are on the same images: batch_d and batch_g must be equal, "
                f"got {recipe.batch_d} and {recipe.batch_g}"
            )
        super().__init__(recipe, *args, **kwargs)

    def build(self):
        recipe, labels = self.recipe, self.label_channels
        width = 64 if recipe.channels_g is None else recipe.channels_g
        encoder = SPADEEncoder(width, recipe.latent_dim, self.impl) if recipe.kl else None
        latent_dim = recipe.latent_dim if recipe.kl else 0
        generator = SPADEGenerator(recipe.resolution, labels, width, latent_dim, self.impl)
        channels_d = 64 if recipe.channels_d is None else recipe.channels_d
        return EncodedSPADE(generator, encoder), SPADEDiscriminator(labels, channels_d, impl=self.impl)

    def critic(self):
        return self.discriminator  # which gets real and generated images in one call

    def conditions(self, real):
        return (real[1].long(),)

    def features(self, discriminator, fake: Tensor, real: Sequence[Tensor]) -> tuple[list, list]:
        """Of generated and of real images, in one call, as in NVlabs' code."""
        n, (segmap,) = fake.shape[0], self.conditions(real)
        both = discriminator(torch.cat([fake, real[0].to(fake.dtype)]), torch.cat([segmap, segmap]))
        return [[f[:n] for f in scale] for scale in both], [[f[n:] for f in scale] for scale in both]

    def discriminator_loss(self, generator, critic, real):
        with torch.no_grad():
            fake, _, _ = generator(*self.conditions(real), real[0])
        of_fake, of_real = self.features(critic, fake, real)
        scales = list(zip(of_real, of_fake, strict=True))
        loss = sum(self.loss.discriminator(wide(a[-1]), wide(b[-1])) for a, b in scales) / len(scales)
        return {"loss": loss, "adversarial": loss}

    def generator_loss(self, generator, discriminator, real, n):
        recipe = self.recipe
        fake, mu, logvar = generator(*self.conditions(real), real[0])
        of_fake, of_real = self.features(discriminator, fake, real)
        parts = {"adversarial": sum(self.loss.generator(wide(scale[-1])) for scale in of_fake) / len(of_fake)}
        loss = parts["adversarial"]
        if recipe.feature_matching:
            parts["feature_matching"] = feature_matching(of_real, of_fake)
            loss = loss + recipe.feature_matching * parts["feature_matching"]
        if recipe.vgg:
            parts["vgg"] = self.perceptual(fake, real[0])
            loss = loss + recipe.vgg * parts["vgg"]
        if mu is not None:
            share = recipe.batch_g / n  # a sum over the batch: the mean over parts and processes follows
            parts["kl"] = kl_divergence(wide(mu), wide(logvar)) * share
            loss = loss + recipe.kl * parts["kl"]
        return {"loss": loss, **parts}

    def sample(self, generator, n, rng, like, conditions=(), **options):
        if not conditions:
            raise ValueError("SPADE makes images of label maps, and there are none")
        z = None
        if generator.encoder is not None:
            shape = n, self.recipe.latent_dim
            z = torch.randn(shape, dtype=like.dtype, device=like.device, generator=rng)
        return generator(conditions[0].long(), z=z, **options)[0]


SYSTEMS: dict[str, Callable[..., System]] = {
    "sngan": SNGAN,
    "spade": SPADE,
    "stylegan": partial(
        StyleBased, kinds=(partial(StyleGAN, progressive=False), partial(StyleGANDiscriminator, progressive=False))
    ),
    "stylegan2": partial(StyleBased, kinds=(StyleGAN2, StyleGAN2Discriminator)),
}


def build_system(recipe: Recipe, num_classes: int = 0, label_channels: int = 0, impl: str = "auto") -> System:
    """The system of a recipe's family. Arguments as of :class:`System`."""
    return SYSTEMS[recipe.family](recipe, num_classes, label_channels, impl)
