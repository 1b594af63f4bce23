"""The trainer: recipes, resumption to the bit, divergence, averages, sampling; all on the CPU."""

import dataclasses
import json
import re
import shutil
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch.utils.data import Sampler as TorchSampler

from pixnorm.networks import Generator
from pixnorm.training import checkpoint
from pixnorm.training.averaging import averaged, update_average
from pixnorm.training.batches import Batches
from pixnorm.training.cli import UsageError
from pixnorm.training.data import ImageDataset, load_dataset
from pixnorm.training.processes import Processes
from pixnorm.training.recipes import RECIPES, Recipe
from pixnorm.training.sampling import grid, load_sampler
from pixnorm.training.settings import Settings
from pixnorm.training.systems import build_system
from pixnorm.training.trainer import Trainer

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]

README = Path(__file__).parents[1] / "README.md"
ALONE = Processes(0, 1, torch.device("cpu"))
TINY = Recipe("", channels_g=8, channels_d=8, latent_dim=4, d_steps=1, batch_d=4, batch_g=4, steps=4, decay_steps=4)
STYLE = replace(TINY, loss="logistic", r1=1.0, norm="", ema=0.9)
SPADE = replace(TINY, family="spade", channels_g=1, feature_matching=10.0, decay_steps=0)
SYSTEMS = {
    "spn": TINY,
    "cspn": replace(TINY, norm="cspn", conditional=True, ema=0.9, d_steps=2, batch_d=8),
    "gconv": replace(TINY, norm="bigbn", conv="gconv", loss="lsgan", spectral_norm=True),
    "stylegan": replace(STYLE, family="stylegan"),
    "stylegan2": replace(STYLE, family="stylegan2"),
    "spade": SPADE,
    "spade with an encoder": replace(SPADE, kl=0.05),
}


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return load_dataset("digits")


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> ImageDataset:
    """Pairs of images and label maps, in files."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("faces")
    rng = torch.Generator().manual_seed(0)
    for name, shape, top in (("images", (32, 32, 3), 256), ("maps", (32, 32), 5)):
        (folder / name).mkdir()
        for i in range(10):
            pixels = torch.randint(top, shape, generator=rng, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / name / f"{i}.png")
    return load_dataset(str(folder / "images"), resolution=32, maps=str(folder / "maps"))


def run(recipe, data, out, **settings) -> Trainer:
    options = {"checkpoint_every": 1, "keep": 0, "log_every": 1, "sample_every": 0, "tensorboard": False, **settings}
    trainer = Trainer(recipe, data, Settings(out, **options), ALONE)
    trainer.train()
    return trainer


def assert_equal(a, b, path=""):
    """The same structure with the same bits."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{path}[{i}]")
    elif not path.endswith("seconds"):
        assert a == b, path


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_resumed_run_gives_the_bits_of_one_that_was_not_stopped(name, digits, faces, tmp_path):
    recipe = SYSTEMS[name]
    data = faces if recipe.family == "spade" else digits
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer = run(recipe, data, whole)
    start = {name: value.clone() for name, value in checkpoint.load(checkpoint.path_of(whole, 1))["generator"].items()}
    assert any(not torch.equal(value, start[name]) for name, value in trainer.generator.state_dict().items())
    parts.mkdir()
    shutil.copy(checkpoint.path_of(whole, 2), parts)
    shutil.copy(whole / "log.jsonl", parts)  # also of steps that are done again
    torch.manual_seed(12345)  # nothing may depend on it
    run(recipe, data, parts, resume=True)
    assert_equal(*(checkpoint.load(checkpoint.path_of(folder, 4)) for folder in (whole, parts)))
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (whole, parts)]
    assert [line["step"] for line in logs[1]] == [1, 2, 3, 4]
    assert [line["loss_g"] for line in logs[0]] == [line["loss_g"] for line in logs[1]]


def test_another_seed_gives_another_run(digits, tmp_path):
    weights = [run(TINY, digits, tmp_path / str(seed), seed=seed).generator.fc.weight for seed in (0, 1)]
    assert not torch.equal(*weights)


@pytest.mark.parametrize("name", ["spn", "cspn", "gconv"])
def test_fused_and_reference_train_alike_in_float64(name, digits, tmp_path):
    recipe = replace(SYSTEMS[name], steps=20, decay_steps=20)
    fused, reference = (
        run(recipe, digits, tmp_path / impl, impl=impl, dtype="float64", checkpoint_every=20)
        for impl in ("native", "reference")
    )
    for (key, a), b in zip(
        fused.generator.state_dict().items(), reference.generator.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}")


def test_a_part_of_a_batch_has_its_share_of_the_gradient(digits, tmp_path):
    """The discriminator's samples do not see each other: parts change rounding alone."""
    recipe = replace(TINY, batch_d=32, batch_g=32, lr_g=0.0, steps=1)
    trainers = [Trainer(recipe, digits, Settings(tmp_path, accumulate=k, dtype="float64"), ALONE) for k in (1, 4)]
    grads = []
    for trainer in trainers:
        latents = torch.randn(32, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        trainer.generator.eval()
        count = iter(range(1000))
        parts = trainer.settings.accumulate
        trainer.system.inputs = lambda conditions, n, like, rng=None, parts=parts, count=count, z=latents: (
            z.chunk(parts)[next(count) % parts],
        )
        for module in trainer.discriminator.modules():
            module.eval()  # one more power iteration for each part else
        images, *_ = digits.images(range(32)), None
        trainer._descend(
            torch.optim.SGD(trainer.discriminator.parameters(), 0.0),
            trainer.critic,
            [images.double() / 128 - 1],
            trainer._discriminator_loss,
        )
        grads.append([p.grad for p in trainer.discriminator.parameters()])
    assert any(grad.abs().max() > 0 for grad in grads[0])
    for one, four in zip(*grads, strict=True):
        torch.testing.assert_close(one, four, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{"amp": True, "channels_last": True}, {"accumulate": 2}, {"workers": 1}])
def test_settings(options, digits, tmp_path):
    trainer = run(replace(TINY, steps=2), digits, tmp_path, sample_every=1, tensorboard=True, **options)
    assert all(p.isfinite().all() for p in trainer.generator.parameters())
    assert len(list((tmp_path / "samples").glob("*.png"))) == 2
    assert list((tmp_path / "tensorboard").glob("events*"))
    weight = trainer.generator.block1.conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == bool(options.get("channels_last"))


def test_a_loss_that_is_nan_names_the_last_good_checkpoint(digits, tmp_path):
    class Poisoned(Trainer):
        def train_step(self):
            found = super().train_step()
            if self.step == 3:
                next(self.discriminator.parameters()).data.fill_(float("nan"))
            return found

    settings = Settings(tmp_path, checkpoint_every=2, log_every=1, sample_every=0, tensorboard=False)
    with pytest.raises(
        UsageError, match=r"NaN or infinite after step 4: the last good checkpoint is .*step-00000002.pt"
    ):
        Poisoned(replace(TINY, steps=10), digits, settings, ALONE).train()
    assert checkpoint.steps_in(tmp_path) == [2]


def test_weights_that_are_not_finite_are_not_saved(digits, tmp_path):
    trainer = Trainer(TINY, digits, Settings(tmp_path), ALONE)
    next(trainer.generator.parameters()).data[0, 0] = float("inf")
    with pytest.raises(UsageError, match="there is no checkpoint yet"):
        trainer.save()
    assert checkpoint.newest(tmp_path) is None


def test_an_interrupted_write_leaves_the_older_file(tmp_path, monkeypatch):
    path = checkpoint.path_of(tmp_path, 1)
    checkpoint.save(path, {"a": 1})

    def fails(contents, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space.*step-00000001\.pt"):
        patch.setattr(torch, "save", fails)
        checkpoint.save(path, {"a": 2})
    assert torch.load(path, weights_only=True) == {"a": 1}
    (tmp_path / ".step-00000002.pt.123").write_bytes(b"of a process that was killed")
    assert checkpoint.steps_in(tmp_path) == [1]
    checkpoint.prune(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001.pt"]


def test_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "step-00000001.pt"
    with pytest.raises(UsageError, match="there is no checkpoint"):
        checkpoint.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(UsageError, match="is not a checkpoint"):
        checkpoint.load(path)
    torch.save({"code": print}, path)  # would be called
    with pytest.raises(UsageError, match="is not a checkpoint"):
        checkpoint.load(path)
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(UsageError, match="not a checkpoint of pixnorm-train"):
        checkpoint.load(path)


def test_a_folder_with_a_run_is_not_overwritten(digits, tmp_path):
    run(replace(TINY, steps=1), digits, tmp_path)
    with pytest.raises(UsageError, match="--resume continues it"):
        run(replace(TINY, steps=1), digits, tmp_path)
    with pytest.raises(UsageError, match=r"another run: lr_g \(0.0002, now 0.1\), seed \(0, now 1\)"):
        run(replace(TINY, steps=1, lr_g=0.1), digits, tmp_path, resume=True, seed=1)


# --- parts


def test_each_epoch_has_every_image_once_whatever_the_number_of_processes():
    def indices(start=0, rank=0, world=1, count=7):
        batches = Batches(20, 6, 3, start, rank, world)
        assert isinstance(batches, TorchSampler)
        return [batch for batch, _ in zip(batches, range(count), strict=False)]

    alone = indices()
    flat = [*chain.from_iterable(alone)]
    assert sorted(flat[:20]) == sorted(flat[20:40]) == list(range(20)) and flat[:20] != flat[20:40]
    of_ranks = [indices(0, rank, 3) for rank in range(3)]
    assert [[*chain.from_iterable(parts)] for parts in zip(*of_ranks, strict=True)] == alone
    assert indices(4, count=3) == alone[4:]
    with pytest.raises(ValueError, match="cannot divide batches of 6"):
        Batches(20, 6, 0, world=4)


def test_the_average_of_a_generator_has_averaged_statistics_and_no_averaged_counters():
    generator = Generator(norm="spn", channels=8, latent_dim=4, spectral_norm=True)
    average = averaged(generator, 0.75)
    z = torch.randn(4, 4)
    generator(z)
    update_average(average, generator)  # the first one copies
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(1)
    generator(z)
    update_average(average, generator)
    for name, value in average.module.state_dict().items():
        now = generator.state_dict()[name]
        mixed = name in dict(generator.named_parameters()) or name.endswith(("running_mean", "running_var"))
        torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * now if mixed else now)
    assert average.module.norm.num_batches_tracked == 2 and not average.module.training


def test_samples_depend_on_seed_and_place_alone(digits, tmp_path):
    run(SYSTEMS["cspn"], digits, tmp_path)
    sampler = load_sampler(tmp_path)
    whole = list(sampler.batches(10, 4, seed=7))
    assert [len(batch) for batch in whole] == [4, 4, 2] and whole[0].dtype == torch.uint8
    torch.manual_seed(99)
    parts = [list(sampler.batches(10, 4, seed=7, rank=rank, world=2)) for rank in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(whole, [parts[0][0], parts[1][0], parts[0][1]], strict=True))
    assert not torch.equal(whole[0], sampler.draw(4, 8))
    without = load_sampler(tmp_path, use_ema=False)
    assert not torch.equal(without.draw(4, 7), whole[0])
    classes = [sampler.draw(2, 7, 0, (torch.tensor([k, k]),)) for k in (0, 1)]
    assert not torch.equal(*classes)


def test_a_grid():
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 4, 6)
    whole = grid(images, 3, padding=1)
    assert whole.shape == (3, 9, 20) and whole[0, 0, 0] == 0 and whole[0, 5, 8] == 4 and whole[0, 4, 0] == 255
    assert grid(images).shape == (3, 2 * 6 - 2, 3 * 8 - 2)
    assert grid(images[:1]).equal(images[0])


# --- recipes

PARAMETERS = {
    "cifar-spn": (4_527_875, 1_053_825),
    "cifar-cspn": (5_071_619, 1_055_105),
    "cifar-gconv": (4_611_328, 1_053_825),
    "lsun-spn": (13_478_915, 12_238_081),
    "ffhq-stylegan2": (30_370_060, 29_012_513),
}


@pytest.mark.parametrize("name", RECIPES)
def test_networks_of_recipes_have_the_published_sizes(name):
    recipe = RECIPES[name]
    if recipe.family == "stylegan":
        recipe = replace(recipe, channels_g=16, channels_d=16)
    with torch.device("meta"):
        system = build_system(recipe, 10 if recipe.conditional else 0, recipe.label_channels)
    sizes = [sum(p.numel() for p in net.parameters()) for net in (system.generator, system.discriminator)]
    if name in PARAMETERS:
        assert tuple(sizes) == PARAMETERS[name]
    assert recipe.paper and all(size > 0 for size in sizes)


def test_learning_rates_fall_as_in_the_papers():
    cifar, lsun = RECIPES["cifar-spn"], RECIPES["lsun-spn"]
    assert [cifar.lr_g * cifar.rate_factor(t) for t in (0, 25_000, 50_000)] == [2e-4, 1e-4, 0]
    assert [lsun.lr_g * lsun.rate_factor(t) for t in (0, 250_000, 275_000)] == [1e-4, 1e-4, 5e-5]
    assert replace(cifar, decay_steps=0).rate_factor(49_999) == 1
    assert [replace(cifar, steps=400).rate_factor(t) for t in (0, 100, 400)] == [1, 0.75, 0]  # not 400/50000 at first
    assert (cifar.batch_d, cifar.batch_g, cifar.d_steps) == (64, 128, 5)
    assert (lsun.lr_d, lsun.batch_g, lsun.d_steps) == (4e-4, 32, 1)


def test_the_table_in_the_readme_is_that_of_the_recipes():
    rows = [
        line.split("|")[1:-1]
        for line in README.read_text().splitlines()
        if re.match(r"\| `[a-z0-9]+-[a-z0-9-]+`", line)
    ]
    listed = {}
    for names, _, _, rates, d_steps, batches, steps, _ in rows:
        count, unit = steps.split()
        values = [float(rate) for rate in rates.split(",")], int(d_steps), [int(n) for n in batches.split(",")]
        listed |= dict.fromkeys(re.findall(r"`(.+?)`", names), (*values, int(count) * {"k": 1000, "M": 10**6}[unit]))
    for name, recipe in RECIPES.items():
        values = [recipe.lr_g, recipe.lr_d], recipe.d_steps, [recipe.batch_d, recipe.batch_g]
        assert listed.pop(name) == (*values, recipe.steps // 1000 * 1000), name
    assert not listed


def test_the_rates_reach_the_optimisers(digits, tmp_path):
    trainer = Trainer(TINY, digits, Settings(tmp_path), ALONE)
    found = []
    for _ in range(4):
        trainer.train_step()
        found.append((trainer.optimizer_g.param_groups[0]["lr"], trainer.optimizer_d.param_groups[0]["lr"]))
    assert found == [(TINY.lr_g * f, TINY.lr_d * f) for f in (1, 0.75, 0.5, 0.25)]


def test_impossible_values_of_a_recipe():
    for field, value in (
        ("loss", "l1"),
        ("steps", 0),
        ("lr_g", -1.0),
        ("beta1", 1.0),
        ("r1", float("nan")),
        ("lr_d", float("inf")),
    ):
        with pytest.raises(ValueError, match=field):
            replace(TINY, **{field: value})
    assert dataclasses.asdict(TINY)["loss"] == "hinge"
