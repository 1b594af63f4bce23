"""What happens around a run's steps: its folder, files that are broken, times, settings."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pixnorm import sample, train
from pixnorm.training import checkpoint
from pixnorm.training.batches import Batches, loaded
from pixnorm.training.cli import UsageError, run
from pixnorm.training.data import ImageDataset, load_dataset
from pixnorm.training.logs import Log
from pixnorm.training.processes import Processes
from pixnorm.training.recipes import Recipe
from pixnorm.training.settings import Settings
from pixnorm.training.systems import build_system
from pixnorm.training.trainer import Trainer

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]

ALONE = Processes(0, 1, torch.device("cpu"))
TINY = Recipe("", channels_g=8, channels_d=8, latent_dim=4, d_steps=1, batch_d=4, batch_g=4, steps=4, decay_steps=0)


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return load_dataset("digits")


def trainer(recipe, data, out, cls=Trainer, **settings) -> Trainer:
    options = {"log_every": 1, "sample_every": 0, "tensorboard": False, **settings}
    return cls(recipe, data, Settings(out, **options), ALONE)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def status_and_line(capsys, main, *arguments) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        main(*arguments)
    (line,) = capsys.readouterr().err.strip().splitlines()
    return stopped.value.code, line


# --- the folder


def test_a_log_keeps_whole_lines_of_the_steps_that_were_done_and_leaves_other_files_alone(tmp_path):
    path, foreign = tmp_path / "log.jsonl", tmp_path / "notes.jsonl"
    foreign.write_text("not ours\n")
    whole = '{"step": 1, "loss_g": 0.5}\n{"step": 2, "loss_g": 0.25}\n'
    later = '{"step": 3, "loss_g": 1}\n'
    for rest in (later + '{"step": 4, "lo', '{"step": null}\n7\n', later + "\0\0\0", '{"step": "x"}\n{"st\xe9'):
        path.write_bytes((whole + rest).encode("latin1"))
        Log(tmp_path, 2, tensorboard=False).close()
        assert path.read_text() == whole
    path.write_text(whole.rstrip("\n"))  # cut off before the end of the line: the next one must not join it
    log = Log(tmp_path, 2, tensorboard=False)
    log.write(3, {"loss_g": 1})
    assert path.read_text() == whole + later
    assert foreign.read_text() == "not ours\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.jsonl", "notes.jsonl"]


def test_two_processes_cannot_train_in_one_folder(digits, tmp_path):
    code = f"""
from pathlib import Path
from pixnorm.training.checkpoint import claim
held = claim(Path({str(tmp_path)!r}))
print(flush=True)
input()"""
    other = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    try:
        assert other.stdout.readline()
        with pytest.raises(UsageError, match="another process is training in"):
            trainer(TINY, digits, tmp_path).train()
        assert not (tmp_path / "log.jsonl").exists()
    finally:
        other.communicate(b"\n")
    trainer(replace(TINY, steps=1), digits, tmp_path).train()
    assert checkpoint.steps_in(tmp_path) == [1]


def test_files_with_names_like_checkpoints_are_not_taken_for_them(tmp_path):
    for name in ("step-7.pt", "step-best.pt", "my-step-00000009.pt", "step-00000009.pt.bak"):
        (tmp_path / name).touch()
    assert checkpoint.newest(tmp_path) is None
    checkpoint.save(checkpoint.path_of(tmp_path, 123_456_789), {})
    assert checkpoint.newest(tmp_path).name == "step-123456789.pt"
    checkpoint.prune(tmp_path, 1)
    assert len(list(tmp_path.iterdir())) == 5


def test_the_newest_checkpoints_stay(digits, tmp_path):
    trainer(TINY, digits, tmp_path, checkpoint_every=1, keep=2).train()
    assert checkpoint.steps_in(tmp_path) == [3, 4]


def test_a_run_can_be_made_longer_if_its_steps_so_far_stay_the_same(digits, tmp_path):
    whole, longer, decayed = tmp_path / "whole", tmp_path / "longer", tmp_path / "decayed"
    trainer(TINY, digits, whole).train()
    trainer(replace(TINY, steps=2, paper="before"), digits, longer).train()
    trainer(TINY, digits, longer, resume=True).train()
    one, two = (checkpoint.load(checkpoint.path_of(folder, 4))["generator"] for folder in (whole, longer))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    trainer(replace(TINY, steps=2, decay_steps=2), digits, decayed).train()
    with pytest.raises(UsageError, match=r"of another run: decay_steps \(2, now 0\), steps \(2, now 4\)"):
        trainer(TINY, digits, decayed, resume=True)


# --- errors


def test_what_fails_in_the_operating_system_is_one_line(capsys, tmp_path):
    def full():
        raise OSError(28, "No space left on device", "run/step-00000001.pt")

    def interrupted():
        raise KeyboardInterrupt

    assert status_and_line(capsys, run, full) == (
        2,
        "test_training_runs: run/step-00000001.pt: No space left on device",
    )
    assert status_and_line(capsys, run, interrupted) == (130, "test_training_runs: interrupted")
    file = tmp_path / "file"
    file.touch()
    for out in (file, file / "below"):
        arguments = ["cifar-spn", "--data", "digits", "--channels-g", "8", "--channels-d", "8", "--out", str(out)]
        status, line = status_and_line(capsys, train.main, arguments)
        assert status == 2 and line.startswith("pixnorm-train: ") and str(file) in line


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_one_line(workers, tmp_path):
    from PIL import Image

    for i in range(3):
        Image.effect_noise((32, 32), 50).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:300])
    batches = loaded(load_dataset(str(tmp_path)), Batches(3, 3, 0), workers, torch.device("cpu"))
    with pytest.raises(UsageError) as stopped:
        next(batches)
    assert str(stopped.value).startswith(f"{tmp_path}/1.png cannot be read as an image")
    assert "Traceback" not in str(stopped.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": -1}, "keep must be at least 0, got -1"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"score_every": -1}, "score_every must be at least 0, got -1"),
        ({"log_every": 0}, "log_every must be at least 1, got 0"),
        ({"seed": 2**64}, "seed must have at most 64 bits"),
        ({"score_every": 1, "score_network": "random", "score_samples": 5}, "scores need 6 images or more, got 5 gen"),
        ({"impl": "triton"}, "impl 'triton' cannot run: .*GPU|impl 'triton' cannot run: Triton is not there"),
    ],
)
def test_settings_that_no_run_can_have(settings, message, digits, tmp_path):
    if settings.get("impl") == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter runs Triton's kernels on the CPU")
    with pytest.raises(UsageError, match=message):
        trainer(TINY, digits, tmp_path, **settings)
    assert not list(tmp_path.iterdir())


def test_weights_of_losses_that_a_family_has_not():
    with pytest.raises(ValueError, match=r"the loss of spade has no r1, and the recipe's is 1.0"):
        build_system(replace(TINY, family="spade", r1=1.0), label_channels=3)
    with pytest.raises(ValueError, match="the loss of sngan has no kl"):
        build_system(replace(TINY, kl=0.5))


def test_impossible_options_of_sampling(digits, tmp_path, capsys):
    trainer(replace(TINY, steps=1), digits, tmp_path / "run").train()
    capsys.readouterr()
    for options, message in (
        (("--out", tmp_path / "x.xyz"), "x.xyz is no kind of image"),
        (("--out", tmp_path / "x.png", "--columns", -1), "--columns must be positive, got -1"),
        (("--out", tmp_path / "x.png", "--impl", "nope"), "impl must be one of"),
    ):
        status, line = status_and_line(capsys, sample.main, [str(o) for o in (tmp_path / "run", *options)])
        assert status == 2 and message in line
    (tmp_path / "images.v2").mkdir()
    sample.main([str(tmp_path / "run"), "--out", str(tmp_path / "images.v2"), "--samples", "1"])
    assert [path.name for path in (tmp_path / "images.v2").iterdir()] == ["0.png"]


# --- numbers


class Slow(Trainer):
    """Steps of a fiftieth of a second; samples and checkpoints take half a second."""

    def train_step(self):
        time.sleep(0.02)
        self.step += 1
        return {"loss_g": torch.tensor(float(self.step)), "loss_d": torch.tensor(0.0)}

    def _samples(self, n=64):
        time.sleep(0.5)
        return super()._samples(4)


def test_times_and_means_in_the_log(digits, tmp_path):
    recipe = replace(TINY, steps=7)
    trainer(recipe, digits, tmp_path, Slow, log_every=3, sample_every=2, checkpoint_every=5, keep=0).train()
    found = lines(tmp_path / "log.jsonl")
    assert [(line["step"], line["loss_g"]) for line in found] == [(3, 2.0), (6, 5.0), (7, 7.0)]
    for line in found:
        assert 0.02 * line["step"] <= line["seconds"] < 0.02 * line["step"] + 0.4  # without the samples
    for line, n in zip(found, (3, 3, 1), strict=True):
        assert 4 * n / (0.02 * n + 0.4) < line["images_per_second"] <= 200
    assert checkpoint.load(checkpoint.path_of(tmp_path, 5))["seconds"] >= 0.1  # also between lines of the log


def test_deterministic_algorithms_are_on_in_such_a_run_alone(digits, tmp_path):
    seen = []

    class Looking(Slow):
        def train_step(self):
            seen.append(torch.are_deterministic_algorithms_enabled())
            return super().train_step()

    torch.use_deterministic_algorithms(False)  # as in most programs, and not in these tests
    try:
        for on in (False, True):
            trainer(replace(TINY, steps=1), digits, tmp_path / str(on), Looking, deterministic=on).train()
        assert seen == [False, True] and not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)
