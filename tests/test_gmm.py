"""The toy example of the GConv paper: data, networks, losses, metrics, and a run of the program."""

import json
import math

import pytest
import torch
from matplotlib import image

from benchmarks.paper import gmm
from benchmarks.paper.gaussians import (
    CENTRES,
    CHECKPOINTS,
    GOOD_OF_REAL,
    LAYERS,
    STD,
    Run,
    checkpoints,
    discriminator_loss,
    generator_loss,
    in_modes,
    perceptron,
    real_points,
    train,
)
from pixnorm import GLinear

pytestmark = pytest.mark.cpu


def test_centres_are_on_a_ring():
    assert CENTRES.norm(dim=1).tolist() == pytest.approx([2] * 8)
    root = math.sqrt(2)
    corners = torch.tensor([[2, 0], [root, root], [0, 2], [-root, root]])
    torch.testing.assert_close(CENTRES, torch.cat([corners, -corners]), rtol=0, atol=1e-6)


def test_real_points():
    points = real_points(200_000, torch.Generator().manual_seed(0))
    assert points.square().sum(1).mean().item() == pytest.approx(2**2 + 2 * STD**2, abs=1e-3)
    assert points.mean(0).tolist() == pytest.approx([0, 0], abs=0.02)
    counts = in_modes(points)
    assert pytest.approx(0.98889, abs=1e-5) == GOOD_OF_REAL
    assert (counts.sum() / len(points)).item() == pytest.approx(GOOD_OF_REAL, abs=1e-3)
    assert (counts / len(points)).tolist() == pytest.approx([GOOD_OF_REAL / 8] * 8, abs=4e-3)


def test_metrics():
    near, far = CENTRES[:2] + torch.tensor([2.9 * STD, 0]), CENTRES[2:] + torch.tensor([0, 3.1 * STD])
    torch.testing.assert_close(in_modes(near), torch.tensor([1, 1, 0, 0, 0, 0, 0, 0]))
    run = Run("plain", 0, torch.stack([torch.cat([near, far]), CENTRES, torch.zeros(8, 2)]))
    assert run.modes == [2, 8, 0]
    assert run.good == [0.25, 1, 0]


@pytest.mark.parametrize(("kind", "count"), [("nn.Linear", 17_154), ("GLinear", 67_074)])
def test_parameter_counts(kind, count):
    assert gmm.parameters(kind) == count


def test_networks():
    generator = perceptron(2, LAYERS["GLinear"])
    assert [type(layer) for layer in generator[::2]] == [GLinear, GLinear, torch.nn.Linear]
    assert sum(p.numel() for p in perceptron(1).parameters()) == 17_025
    for layer in perceptron(2)[::2]:
        limit = math.sqrt(6 / (layer.in_features + layer.out_features))
        assert 0.9 * limit < layer.weight.abs().max() <= limit
        assert layer.bias.count_nonzero() == 0


def test_losses_by_hand():
    real, fake = torch.tensor([0.5, 2]), torch.tensor([-0.5, -2, 1])
    assert discriminator_loss(real, fake).item() == pytest.approx(0.93859139)
    assert generator_loss(fake).item() == pytest.approx(1.13808889)


def test_checkpoints():
    assert checkpoints(25_000) == list(range(2500, 25_001, 2500))
    assert checkpoints(23)[-1] == 23


@pytest.mark.parametrize("kind", LAYERS)
def test_training(kind, one_thread):
    ticks = []
    samples = train(kind, 0, 40, ticks.append)
    assert samples.shape == (CHECKPOINTS, 2500, 2)
    assert sum(ticks) == 40
    assert not torch.equal(samples[0], samples[-1])
    torch.testing.assert_close(train(kind, 0, 40, ticks.append), samples, rtol=0, atol=0)
    assert not torch.equal(train(kind, 1, 40, ticks.append), samples)


def test_the_program(tmp_path, capsys, one_thread):
    gmm.main(["--iterations", "20", "--seeds", "2", "--results", str(tmp_path / "new")])
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["gmm.json", "gmm.md", "gmm.png"]

    text = (tmp_path / "new" / "gmm.md").read_text()
    assert text in capsys.readouterr().out
    for said in ("![samples over training](gmm.png)", "17,154", "67,074", "--iterations 20", "GLinear, seed 1"):
        assert said in text

    raw = json.loads((tmp_path / "new" / "gmm.json").read_text())
    keys = [(entry["kind"], entry["seed"], entry["iteration"]) for entry in raw["checkpoints"]]
    assert keys == [(kind, seed, at) for kind in LAYERS for seed in range(2) for at in range(2, 21, 2)]
    for entry in raw["checkpoints"]:
        assert entry["modes"] == sum(count > 0 for count in entry["in_modes"])
        assert entry["good"] == pytest.approx(sum(entry["in_modes"]) / raw["samples"])

    height, width, _ = image.imread(tmp_path / "new" / "gmm.png").shape
    assert width > height > 600


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--iterations", "9"], "--iterations: expected a whole number, 10 or more, got '9'"),
        (["--iterations", "many"], "got 'many'"),
        (["--seeds", "0"], "--seeds: expected a whole number, 1 or more, got '0'"),
        (["--seeds", "-1"], "--seeds"),
        (["--results", __file__], "--results"),
    ],
)
def test_bad_options(options, said, capsys):
    with pytest.raises(SystemExit):
        gmm.main(options)
    assert said in capsys.readouterr().err


def test_an_interrupted_run_leaves_old_results(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(gmm, "train_all", interrupted)
    (tmp_path / "gmm.md").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        gmm.main(["--results", str(tmp_path)])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("gmm.md", "old")]
