"""pixnorm-score: scores of folders and checkpoints, by one process and by two; every error in one line."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from pixnorm.score import main
from pixnorm.training.data import load_dataset
from pixnorm.training.features import feature_network
from pixnorm.training.metrics import score
from pixnorm.training.processes import Processes
from pixnorm.training.recipes import Recipe
from pixnorm.training.settings import Settings
from pixnorm.training.trainer import Trainer

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]

TINY = Recipe("", channels_g=8, channels_d=8, latent_dim=4, d_steps=1, batch_d=4, batch_g=4, steps=1, decay_steps=1)
SCORES = ("precision", "recall", "density", "coverage")


def random_bytes(*shape: int, seed: int = 0, top: int = 256) -> numpy.ndarray:
    return numpy.random.default_rng(seed).integers(0, top, shape, dtype=numpy.uint8)


def save(folder: Path, images: numpy.ndarray) -> Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Real images, their label maps and classes, and generated images: a folder of files each, and an .npz."""
    folder = tmp_path_factory.mktemp("sets")
    real, fake = random_bytes(21, 32, 32, 3), random_bytes(17, 32, 32, 3, seed=1, top=200)
    save(folder / "real", real)
    save(folder / "maps", random_bytes(21, 32, 32, top=5))
    save(folder / "fake", fake)
    numpy.savez(folder / "labelled.npz", images=real, labels=numpy.arange(21) % 3)
    numpy.savez(folder / "fake.npz", images=fake)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, sets):
    """Folders of runs of one step."""
    folder = tmp_path_factory.mktemp("runs")
    digits = load_dataset("digits")
    faces = load_dataset(str(sets / "real"), maps=str(sets / "maps"))
    for name, recipe, data in (
        ("plain", TINY, digits),
        ("conditional", replace(TINY, norm="cspn", conditional=True), digits),
        ("spade", replace(TINY, family="spade", channels_g=1, feature_matching=10.0, decay_steps=0), faces),
    ):
        settings = Settings(folder / name, checkpoint_every=1, sample_every=0, tensorboard=False)
        Trainer(recipe, data, settings, Processes(0, 1, torch.device("cpu"))).train()
    return folder


def scores_of(tmp_path, *arguments) -> dict:
    main([*map(str, arguments), "--device", "cpu", "--out", str(tmp_path / "scores.json")])
    return json.loads((tmp_path / "scores.json").read_text())


def test_scores_of_images(sets, tmp_path, capsys):
    arguments = ("--data", sets / "real", "--network", "random", "--batch", 4)
    found = scores_of(tmp_path, "--images", sets / "fake", *arguments)
    captured = capsys.readouterr()
    real, fake = load_dataset(str(sets / "real")), load_dataset(str(sets / "fake"))
    chosen = torch.randperm(21, generator=torch.Generator().manual_seed(0))[:17].tolist()
    expected = score(fake.image_batches(), real.image_batches(chosen), feature_network("random", real))
    assert all(found[key] == pytest.approx(value, rel=1e-5) for key, value in expected.items())
    assert (found["generated_images"], found["real_images"], found["network"]) == (17, 17, "random")
    assert f"FD-random         {found['FD-random']:.6g}\n" in captured.out
    assert captured.err == "pixnorm-score: there are 17 generated images, not 50000\n"
    zipped = scores_of(tmp_path, "--images", sets / "fake.npz", *arguments)
    assert all(zipped[key] == pytest.approx(found[key]) for key in expected)
    few = scores_of(
        tmp_path, "--images", sets / "real", "--data", sets / "fake", "--network", "random", "--samples", 20
    )
    assert (few["generated_images"], few["real_images"]) == (20, 17)
    assert "there are 17 real images for 20 generated ones; all are used" in capsys.readouterr().err


def test_a_set_is_as_good_as_itself(sets, tmp_path):
    found = scores_of(tmp_path, "--images", sets / "real", "--data", sets / "real", "--network", "random")
    assert abs(found["FD-random"]) < 1e-6
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)


def test_classifier_of_the_data(sets, tmp_path):
    arguments = ("--images", sets / "fake", "--data", sets / "labelled.npz", "--cache", tmp_path / "cache")
    found = scores_of(tmp_path, *arguments)
    assert found["FD-classifier(labelled)"] > 0 and 0 <= found["accuracy"] <= 1 and "FID" not in found
    (file,) = (tmp_path / "cache").iterdir()
    written = file.stat().st_mtime_ns
    assert scores_of(tmp_path, *arguments) == found and file.stat().st_mtime_ns == written


@pytest.mark.parametrize("name", ["plain", "conditional", "spade"])
def test_checkpoints(sets, trained, tmp_path, name):
    data = ("--data", sets / "real", "--maps", sets / "maps") if name == "spade" else ("--data", "digits")
    arguments = ("--checkpoint", trained / name, *data, "--samples", 12, "--batch", 5, "--network", "random")
    found = scores_of(tmp_path, *arguments)
    assert found["FD-random"] > 0 and (found["generated_images"], found["real_images"]) == (12, 12)
    assert scores_of(tmp_path, *arguments) == found
    assert scores_of(tmp_path, *arguments, "--seed", 1)["FD-random"] != found["FD-random"]


def test_two_processes_share_the_images(sets, trained, tmp_path):
    """The command as it is typed, with torchrun."""
    arguments = ["--checkpoint", str(trained / "plain"), "--data", "digits", "--samples", "23", "--batch", "5"]
    arguments += ["--network", "random", "--device", "cpu", "--out"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*command, "-m", "pixnorm.score", *arguments, str(tmp_path / "two.json")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("FD-random") == 1
    main([*arguments, str(tmp_path / "one.json")])
    two, one = (json.loads((tmp_path / name).read_text()) for name in ("two.json", "one.json"))
    assert all(two[key] == pytest.approx(one[key], rel=1e-4) for key in ("FD-random", *SCORES))
    assert two["generated_images"] == 23


def test_miou(tmp_path, capsys):
    target = save(tmp_path / "target", numpy.array([[[0, 1], [1, 1]], [[3, 3], [3, 3]]], dtype=numpy.uint8))
    pred = save(tmp_path / "pred", numpy.array([[[0, 0], [1, 1]], [[3, 3], [3, 3]]], dtype=numpy.uint8))
    (target / "labels.txt").write_text("sky\nface\nhair\n")
    main(["miou", "--pred", str(pred), "--target", str(target), "--out", str(tmp_path / "miou.json")])
    found = json.loads((tmp_path / "miou.json").read_text())
    assert found.pop("mIoU") == pytest.approx((1 / 2 + 2 / 3 + 1) / 3)
    ious = {"IoU of sky": 0.5, "IoU of face": pytest.approx(2 / 3), "IoU of 3": 1}
    assert found == {"accuracy": 7 / 8, **ious, "images": 2}
    assert "mIoU         0.722222\n" in capsys.readouterr().out


def test_wrong_label_maps(tmp_path, capsys):
    maps = random_bytes(2, 4, 4, top=3)
    target = save(tmp_path / "target", maps)
    void = maps.copy()
    void[1] = 255
    for name, pred, message in (
        ("short", maps[:1], r"short has nothing named 1 (1 of 2 missing)"),
        ("wide", random_bytes(2, 4, 5, top=3), "wide/0.png (5x4) and"),
        ("void", void, "1.png has label 255, out of range for 255 labels"),
    ):
        assert_error(["miou", "--pred", save(tmp_path / name, pred), "--target", target], message, capsys)
    assert_error(
        ["miou", "--pred", tmp_path / "absent", "--target", target], "absent is no folder of label maps", capsys
    )


def assert_error(arguments, message: str, capsys) -> None:
    """One line, and status 2."""
    with pytest.raises(SystemExit) as error:
        main([*map(str, arguments)])
    captured = capsys.readouterr()
    assert error.value.code == 2 and not captured.out
    assert captured.err.startswith("pixnorm-score: ") and captured.err.count("\n") == 1
    assert message in captured.err


def test_errors_come_before_any_work(sets, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pixnorm.score.feature_network", None)  # calling it would be another error
    images, data = ("--images", sets / "fake"), ("--data", sets / "real")
    (tmp_path / "text.pt").write_text("no checkpoint")
    numpy.savez(tmp_path / "grey.npz", images=random_bytes(9, 8, 8, 2))
    save(tmp_path / "few", random_bytes(5, 8, 8, 3))
    for arguments, message in (
        (data, "either --checkpoint or --images must be given"),
        ((*data, *images, "--checkpoint", tmp_path), "either --checkpoint or --images must be given"),
        ((*images, *data), "the classifier is trained on labels, and real has none: use the network random or"),
        ((*images, *data, "--network", "inception"), "FID needs a file of InceptionV3's weights (--inception-weights)"),
        (
            (*images, *data, "--network", "inception", "--inception-weights", tmp_path / "absent.pth"),
            "absent.pth; InceptionV3's weights are at https://github.com/",
        ),
        (("--images", tmp_path / "absent", *data), "absent does not exist"),
        (("--images", tmp_path / "text.pt", *data), "text.pt is neither a folder nor .npz"),
        (("--images", tmp_path / "grey.npz", *data), "images must be (N, H, W) or have 1 or 3 channels"),
        (("--images", tmp_path / "few", *data, "--network", "random"), "need 6 images or more, got 5 generated and 21"),
        ((*images, "--data", "absent"), "absent does not exist; data are digits, fashion-mnist,"),
        (("--checkpoint", tmp_path / "text.pt", *data), "text.pt is not a checkpoint"),
        (("--checkpoint", tmp_path / "few", *data), "there are no checkpoints in"),
        (
            ("--checkpoint", trained / "conditional", *data, "--network", "random"),
            "the generator has 10 classes, and real none",
        ),
        (
            ("--checkpoint", trained / "spade", *data, "--network", "random"),
            "the generator makes images of label maps, and real has none: --maps gives them",
        ),
        ((*images, *data, "--samples", 1), "--samples must be at least 2, got 1"),
        ((*images, *data, "--batch", 0), "--batch must be at least 1, got 0"),
        ((*images, *data, "--neighbours", 0), "--neighbours must be at least 1, got 0"),
        ((*images, *data, "--prdc-samples", 5), "--prdc-samples must be more than --neighbours, 5, got 5"),
        ((*images, *data, "--device", "abacus"), "abacus"),
        ((*images, *data, "--out", tmp_path), "cannot be written: it is a folder, or its folder does not exist"),
        ((*images, *data, "--out", tmp_path / "no" / "a.json"), "a.json cannot be written"),
    ):
        assert_error(arguments, message, capsys)
