"""Losses of whole systems against their definitions, and what a step and a sample do with them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pixnorm.training import checkpoint
from pixnorm.training.cli import UsageError
from pixnorm.training.data import ImageDataset, load_dataset
from pixnorm.training.perceptual import VGGLoss
from pixnorm.training.processes import Processes
from pixnorm.training.recipes import RECIPES, Recipe
from pixnorm.training.sampling import Sampler, load_sampler
from pixnorm.training.settings import Settings
from pixnorm.training.systems import System, build_system
from pixnorm.training.trainer import Trainer

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]

ALONE = Processes(0, 1, torch.device("cpu"))
TINY = Recipe("", channels_g=8, channels_d=8, latent_dim=4, d_steps=1, batch_d=4, batch_g=4, steps=2, decay_steps=0)
CONDITIONAL = replace(TINY, norm="cspn", conditional=True)


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return load_dataset("digits")


def run(recipe: Recipe, data: ImageDataset, out: Path, **settings) -> Trainer:
    options = {"log_every": 1, "sample_every": 0, "tensorboard": False, **settings}
    trainer = Trainer(recipe, data, Settings(out, **options), ALONE)
    trainer.train()
    return trainer


def still(system: System) -> System:
    """In eval mode, where a second call gives the same; in float64."""
    for network in (system.generator, system.discriminator):
        network.double().eval()
    return system


def fixed_inputs(system: System, z, classes):
    system.inputs = lambda conditions, n, like, rng=None: (z, classes)
    return system


def test_losses_of_a_conditional_system():
    """The real images are real, each image has its own class, and the penalty is that of the real ones."""
    torch.manual_seed(0)
    system = still(build_system(replace(CONDITIONAL, r1=3.0), 3))
    z, classes = torch.randn(4, 4).double(), torch.tensor([0, 1, 2, 1])
    images, labels = torch.randn(4, 3, 32, 32).double(), torch.tensor([2, 0, 1, 1])
    fixed_inputs(system, z, classes)
    generator, discriminator = system.generator, system.discriminator
    found = system.discriminator_loss(generator, system.critic(), (images, labels))
    x = images.clone().requires_grad_()
    of_real, of_fake = discriminator(x, labels), discriminator(generator(z, classes), classes)
    adversarial = F.relu(1 - of_real).mean() + F.relu(1 + of_fake).mean()
    (slope,) = torch.autograd.grad(of_real.sum(), x)
    penalty = 0.5 * slope.square().sum() / 4
    torch.testing.assert_close(found["adversarial"], adversarial)
    torch.testing.assert_close(found["gradient_penalty"], penalty.to(found["gradient_penalty"].dtype))
    torch.testing.assert_close(found["loss"], adversarial + 3 * penalty)
    assert not torch.allclose(of_real, of_fake) and penalty > 0
    found = system.generator_loss(generator, discriminator, (images, labels), 4)
    torch.testing.assert_close(found["loss"], -of_fake.mean())


def test_losses_of_spade():
    torch.manual_seed(0)
    recipe = replace(TINY, family="spade", channels_g=1, channels_d=4, feature_matching=3.0, vgg=5.0, kl=0.5)
    system = still(build_system(recipe, label_channels=3))
    generator, discriminator, encoder = system.generator, system.discriminator, system.generator.encoder
    encoder.sample = lambda mu, logvar: mu
    system.perceptual = lambda fake, real: (fake - real).abs().mean()
    images, segmap = torch.randn(4, 3, 32, 32).double().tanh(), torch.randint(3, (4, 32, 32))
    mu, logvar = encoder(images)
    fake = generator.generator(segmap, mu)
    of_fake, of_real = discriminator(fake, segmap), discriminator(images, segmap)
    scales = len(of_fake)
    assert scales == 2
    seen = []

    def critic(x, segmap):
        seen.append(x)
        return discriminator(x, segmap)

    found = system.discriminator_loss(generator, critic, (images, segmap))
    torch.testing.assert_close(seen, [torch.cat([fake, images])])  # of the encoder's latent vectors, in one call
    hinge = [F.relu(1 - a[-1]).mean() + F.relu(1 + b[-1]).mean() for a, b in zip(of_real, of_fake, strict=True)]
    torch.testing.assert_close(found["loss"], sum(hinge) / scales)
    parts = {
        "adversarial": -sum(scale[-1].mean() for scale in of_fake) / scales,
        "feature_matching": sum(
            (a - b).abs().mean()
            for real, made in zip(of_real, of_fake, strict=True)
            for a, b in zip(real[:-1], made[:-1], strict=True)
        )
        / scales,
        "vgg": (fake - images).abs().mean(),
        "kl": -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(),
    }
    found = system.generator_loss(generator, discriminator, (images, segmap), 4)
    for name, value in parts.items():
        torch.testing.assert_close(found[name], value, msg=name)
    weighted = parts["adversarial"] + 3 * parts["feature_matching"] + 5 * parts["vgg"] + 0.5 * parts["kl"]
    torch.testing.assert_close(found["loss"], weighted)
    half = [t[:2] for t in (images, segmap)], [t[2:] for t in (images, segmap)]
    of_parts = sum(system.generator_loss(generator, discriminator, part, 2)["kl"] for part in half) / 2
    torch.testing.assert_close(of_parts, parts["kl"])


def test_drawn_classes_are_all_classes():
    system = build_system(CONDITIONAL, 3)
    z, classes = system.inputs((), 300, torch.zeros(1))
    counts = classes.bincount(minlength=3)
    assert z.shape == (300, 4) and len(counts) == 3 and counts.min() > 50


def test_the_perceptual_loss_is_that_of_five_layers(tmp_path):
    """Of torchvision's vgg19: a maximum before layers 5, 10, 19 and 28, features after 1, 6, 11, 20 and 29."""
    rng = torch.Generator().manual_seed(0)
    weights, before = {}, 3
    for i, width in zip(
        (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30),
        (64, 64, 128, 128, *[256] * 4, *[512] * 6),
        strict=True,
    ):
        weights[f"features.{i}.weight"] = torch.randn(width, before, 3, 3, generator=rng) * (2 / (9 * before)) ** 0.5
        weights[f"features.{i}.bias"] = torch.randn(width, generator=rng) * 0.1
        before = width
    torch.save(weights, tmp_path / "vgg.pt")
    fake, real = torch.randn(2, 1, 3, 32, 32, generator=rng).requires_grad_()
    found = VGGLoss(tmp_path / "vgg.pt")(fake, real)
    expected, a, b = 0.0, fake, real
    for i in (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28):
        if i in (5, 10, 19, 28):
            a, b = F.max_pool2d(a, 2), F.max_pool2d(b, 2)
        w = weights[f"features.{i}.weight"], weights[f"features.{i}.bias"]
        a, b = (F.relu(F.conv2d(x, *w, padding=1)) for x in (a, b))
        weight = {0: 1 / 32, 5: 1 / 16, 10: 1 / 8, 19: 1 / 4, 28: 1}.get(i, 0)
        expected = expected + weight * (a - b).abs().mean()
    torch.testing.assert_close(found, expected)
    del weights["features.28.weight"]
    torch.save(weights, tmp_path / "other.pt")
    with pytest.raises(UsageError, match=r"has no weights of VGG19: .*features\.28\.weight"):
        VGGLoss(tmp_path / "other.pt")


def test_a_step_moves_one_network_at_a_time(digits, tmp_path):
    recipe = replace(TINY, lr_g=0.25, lr_d=0.125, beta1=0.5, beta2=0.75, adam_eps=1e-3)
    trainer = Trainer(recipe, digits, Settings(tmp_path), ALONE)
    seen = []

    def before_d(optimizer, *_):
        seen.append("d")
        assert all(p.grad is None for p in trainer.generator.parameters())
        assert all(p.grad is not None for p in trainer.discriminator.parameters())

    def before_g(optimizer, *_):
        seen.append("g")
        assert not any(p.requires_grad for p in trainer.discriminator.parameters())
        assert all(p.grad is not None for p in trainer.generator.parameters())

    trainer.optimizer_d.register_step_pre_hook(before_d)
    trainer.optimizer_g.register_step_pre_hook(before_g)
    trainer.train_step()
    assert seen == ["d", "g"] and all(p.requires_grad for p in trainer.discriminator.parameters())
    for optimizer, rate in ((trainer.optimizer_g, 0.25), (trainer.optimizer_d, 0.125)):
        (group,) = optimizer.param_groups
        assert (group["lr"], group["betas"], group["eps"]) == (rate, (0.5, 0.75), 1e-3)


def test_samples_and_scores_change_nothing(digits, tmp_path):
    """Of a generator without an average, which is put into eval mode and back."""
    often = {"sample_every": 1, "score_every": 1, "score_network": "random", "score_samples": 6}
    one, two = run(TINY, digits, tmp_path / "one"), run(TINY, digits, tmp_path / "two", **often)
    for (name, a), b in zip(one.generator.state_dict().items(), two.generator.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert two.generator.training


@pytest.mark.parametrize(
    "recipe", [replace(CONDITIONAL, ema=0.5), replace(TINY, family="stylegan", ema=0.5)], ids=["cspn", "stylegan"]
)
def test_the_trainer_samples_as_its_checkpoint_does(recipe, digits, tmp_path):
    trainer = run(recipe, digits, tmp_path)
    with trainer.sampler() as sampler:
        batches = list(sampler.batches(6, 3, 7))
    assert not torch.equal(*batches)
    torch.manual_seed(1)
    assert all(map(torch.equal, batches, load_sampler(tmp_path).batches(6, 3, 7)))
    assert not torch.equal(batches[0], load_sampler(tmp_path, use_ema=False).draw(3, 7))
    if recipe.family == "stylegan":
        same = load_sampler(tmp_path, psi=0.0).draw(3, 7).float()  # of one style, whatever the latent vector
        assert (same - same[:1]).abs().mean() < (batches[0].float() - batches[0][:1].float()).abs().mean()


def test_label_maps_are_taken_in_turn():
    maps = [torch.full((2, 2), i) for i in range(3)]

    class Shown:
        recipe, num_classes, label_channels = replace(TINY, resolution=2), 0, 3

        def sample(self, generator, n, rng, like, conditions):
            return conditions[0][:, None].expand(-1, 3, -1, -1) / 128 - 1

    sampler = Sampler(Shown(), torch.nn.Linear(1, 1))
    labels = [batch[:, 0, 0, 0].tolist() for batch in sampler.batches(5, 2, maps=maps)]
    assert labels == [[0, 1], [2, 0], [1]]
    with pytest.raises(UsageError, match="makes images of label maps"):
        next(sampler.batches(5, 2))


def test_bfloat16_and_parts_in_the_losses(digits, tmp_path):
    """--amp computes something else; the losses that the log has of parts are their mean."""
    exact = run(replace(TINY, steps=1, lr_d=0.0), digits, tmp_path / "exact")
    trainers = {
        name: Trainer(replace(TINY, lr_d=0.0), digits, Settings(tmp_path / name, **{name: value}), ALONE)
        for name, value in (("amp", True), ("accumulate", 2))
    }
    losses = {name: trainer.train_step()["loss_d"].item() for name, trainer in trainers.items()}
    plain = Trainer(replace(TINY, lr_d=0.0), digits, Settings(tmp_path / "plain"), ALONE).train_step()["loss_d"].item()
    assert exact.step == 1 and losses["amp"] != plain
    assert losses["amp"] == pytest.approx(plain, rel=0.1)
    assert losses["accumulate"] == pytest.approx(plain, rel=0.4)  # other latent vectors; a sum would be twice it


def test_checkpoints_of_other_versions(digits, tmp_path):
    run(replace(TINY, steps=1), digits, tmp_path)
    path = checkpoint.newest(tmp_path)
    contents = checkpoint.load(path)
    contents["recipe"]["of_the_future"] = 1
    del contents["recipe"]["kl"]
    assert checkpoint.recipe_of(contents) == replace(TINY, steps=1)
    checkpoint.save(path, {**contents, "format": 99})
    with pytest.raises(UsageError, match=f"format 99, this pixnorm reads format {checkpoint.FORMAT}"):
        load_sampler(tmp_path)


def test_weights_and_moments_of_the_recipes():
    def of(name):
        recipe = RECIPES[name]
        return recipe.loss, (recipe.beta1, recipe.beta2), recipe.r1, (recipe.feature_matching, recipe.vgg, recipe.kl)

    for name in ("cifar-spn", "cifar-cspn", "lsun-spn", "tiny-imagenet-cspn", "cifar-gconv", "celebahq-gconv"):
        assert of(name) == ("hinge", (0.0, 0.9), 0.0, (0.0, 0.0, 0.0))
    assert of("faces-spade") == ("hinge", (0.0, 0.9), 0.0, (10.0, 10.0, 0.05))
    for name in ("ffhq-stylegan", "ffhq-stylegan2"):
        assert of(name) == ("logistic", (0.0, 0.99), 10.0, (0.0, 0.0, 0.0))
