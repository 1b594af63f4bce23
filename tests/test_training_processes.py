"""Two processes train as one does on the same images and latent vectors, and stop together."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pixnorm.training import trainer as trainer_module
from pixnorm.training.cli import UsageError
from pixnorm.training.data import ImageDataset
from pixnorm.training.processes import Processes
from pixnorm.training.recipes import Recipe
from pixnorm.training.settings import Settings
from pixnorm.training.systems import build_system
from pixnorm.training.trainer import Trainer

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo"),
]

WORLD = 2
TINY = Recipe("", channels_g=8, channels_d=8, latent_dim=4, d_steps=1, batch_d=8, batch_g=8, steps=2, decay_steps=0)
RECIPES = {
    "cspn": replace(TINY, norm="cspn", conditional=True, ema=0.9, d_steps=2, batch_d=4, r1=1.0, loss="logistic"),
    "gconv": replace(TINY, norm="bigbn", conv="gconv", loss="lsgan", spectral_norm=True, conditional=True),
    "spade": replace(TINY, family="spade", channels_g=1, channels_d=4, batch_d=4, batch_g=4, kl=0.05),
}


class Pairs(ImageDataset):
    """Images with label maps, in memory."""

    def __getitem__(self, index):
        image = self._images[index]
        return image, image[0] // 64


def data_of(recipe: Recipe) -> ImageDataset:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (10, 3, 32, 32), generator=rng, dtype=torch.uint8)
    if recipe.family == "spade":
        return Pairs("pairs", images, 32, label_channels=4)
    return ImageDataset("noise", images, 32, labels=torch.arange(10) % 3, num_classes=3)


def trained(recipe: Recipe, of: Processes, out: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The state after a run whose random numbers are those of the whole batch, of which each process has its share."""
    scores = {"score_every": 2, "score_network": "random", "score_samples": 6}
    settings = Settings(out, dtype="float64", sample_every=0, log_every=1, tensorboard=False, **scores)
    trainer = Trainer(recipe, data_of(recipe), settings, of)
    calls = iter(range(1000))

    def inputs(conditions, n, like, rng=None):
        rng = torch.Generator().manual_seed(next(calls))
        z = torch.randn(n * of.world, recipe.latent_dim, dtype=like.dtype, generator=rng)
        classes = torch.randint(3, (n * of.world,), generator=rng)
        mine = slice(of.rank * n, (of.rank + 1) * n)
        return (z[mine], classes[mine])[: 1 + recipe.conditional]

    trainer.system.inputs = inputs
    if recipe.kl:
        trainer.generator.encoder.sample = lambda mu, logvar: mu + logvar.mul(0.5).exp()
    trainer.train()
    found = {"generator": trainer.generator, "discriminator": trainer.discriminator}
    if trainer.average is not None:
        found["average"] = trainer.average
    states = {name: network.state_dict() for name, network in found.items()}
    if of.first:
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert (out / "scores.jsonl").read_text().startswith('{"step": 2, "FD-random": ')
        states["log"] = {name: torch.tensor([line[name] for line in lines]).double() for name in ("loss_d", "loss_g")}
    return states


def undithered(images):
    return images.float() / 128 - 1


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=WORLD)
    of = Processes(rank, WORLD, torch.device("cpu"))
    trainer_module.scale_images = undithered
    found = {name: trained(recipe, of, Path(folder, name)) for name, recipe in RECIPES.items()}

    class Poisoned(Trainer):
        def train_step(self):
            losses = super().train_step()
            if self.step == 2 and rank == 1:
                self.bad |= True
            return losses

    settings = Settings(Path(folder, "poisoned"), checkpoint_every=1, sample_every=0, tensorboard=False)
    try:
        Poisoned(replace(TINY, steps=9), data_of(TINY), settings, of).train()
    except UsageError as error:
        found["error"] = str(error)
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(_process, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_train_as_one(name, found, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "scale_images", undithered)
    alone = trained(RECIPES[name], Processes(0, 1, torch.device("cpu")), tmp_path)
    start = build_system(RECIPES[name], 3 * RECIPES[name].conditional, 4).generator.state_dict()
    assert alone.keys() == found[0][name].keys()
    for network, state in alone.items():
        for key, value in state.items():
            for rank in range(WORLD if network != "log" else 1):
                other = found[rank][name][network][key]
                torch.testing.assert_close(other, value, rtol=1e-8, atol=1e-9, msg=f"{rank} {network} {key}")
    assert any(not torch.allclose(value, start[key].to(value.dtype)) for key, value in alone["generator"].items())


def test_a_loss_that_is_nan_in_one_process_stops_all(found):
    for of_rank in found:
        assert "NaN or infinite after step 2: the last good checkpoint is" in of_rank["error"]
        assert of_rank["error"].endswith("step-00000001.pt")
