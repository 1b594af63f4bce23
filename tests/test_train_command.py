"""pixnorm-train and pixnorm-sample as commands: errors of one line, a killed run, several processes."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pixnorm import sample, train
from pixnorm.training import checkpoint

np = pytest.importorskip("numpy")
pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]

TINY = [
    *("--channels-g", "8", "--channels-d", "8", "--latent-dim", "4", "--d-steps", "1", "--batch-d", "4"),
    *("--batch-g", "4", "--decay-steps", "0", "--sample-every", "0", "--keep", "0", "--no-tensorboard"),
]


def start(*arguments: str, processes: int = 0) -> subprocess.Popen:
    """pixnorm-train in a process, or in several of torchrun, of one thread each: the same bits every time."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    command = [sys.executable, *launcher, "-m", "pixnorm.train", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]


def weights(folder: Path, step: int) -> list[torch.Tensor]:
    """All that a checkpoint says of the networks, the optimisers and the generators of random numbers."""
    found = checkpoint.load(checkpoint.path_of(folder, step))
    states = [of_step for key in ("optimizer_g", "optimizer_d") for of_step in found[key]["state"].values()]
    of_networks = [*found["generator"].values(), *found["discriminator"].values()]
    return [*of_networks, *(t for state in states for t in state.values()), *(state["cpu"] for state in found["rng"])]


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ["cifar-spn", "--data", "digits", *TINY, "--steps", "60", "--checkpoint-every", "3"]
    process, other = start(*options, "--out", str(killed)), start(*options, "--out", str(whole))
    while (checkpoint.steps_in(killed) or [0])[-1] < 6:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = checkpoint.steps_in(killed)
    assert before[-1] < 60
    checkpoint.load(checkpoint.path_of(killed, before[-1]))  # whole, whenever it was killed
    finish(start(*options, "--out", str(killed), "--resume"))
    finish(other)
    for one, two in zip(weights(whole, 60), weights(killed, 60), strict=True):
        assert torch.equal(one, two)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")
def test_two_processes_resume_to_the_bit(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["cifar-cspn", "--data", "digits", *TINY, "--steps", "4", "--checkpoint-every", "2", "--ema", "0.9"]
    scores = ["--score-every", "2", "--score-network", "random", "--score-samples", "20"]
    finish(start(*options, *scores, "--out", str(whole), processes=2))
    assert checkpoint.load(checkpoint.path_of(whole, 4))["run"]["world"] == 2
    assert len((whole / "scores.jsonl").read_text().splitlines()) == 2
    parts.mkdir()
    shutil.copy(checkpoint.path_of(whole, 2), parts)
    finish(start(*options, "--out", str(parts), "--resume", processes=2))
    a, b = weights(whole, 4), weights(parts, 4)
    assert all(torch.equal(*pair) for pair in zip(a, b, strict=True))
    assert not torch.equal(a[-1], a[-2])  # the processes draw different numbers


# --- errors


@pytest.fixture
def plain(tmp_path) -> str:
    """Images without labels."""
    path = tmp_path / "plain.npz"
    np.savez(path, images=np.zeros((8, 32, 32, 3), np.uint8))
    return str(path)


ERRORS = {
    "cifar-spn --data {folder}/missing": "missing",
    "cifar-spn --data {folder}": "no images",
    "cifar-cspn --data {plain}": "conditional, and .* has no classes",
    "cifar-spn --data digits --resolution 48": "resolution must be one of 32, 64, 128, 256, got 48",
    "cifar-spn --data digits --norm layer": "norm must be one of",
    "cifar-spn --data digits --batch-d 6 --accumulate 4": r"batch_d must be a multiple of 4 .* got 6",
    "cifar-spn --data digits --dtype float16": "dtype must be one of float32, float64",
    "cifar-spn --data digits --device nonsense": "device 'nonsense' cannot be used",
    "cifar-spn --data digits --lr-g -1": "lr_g must be finite and not negative, got -1",
    "cifar-spn --data {plain} --score-every 1": "classifier is trained on labels",
    "cifar-spn --data digits --score-every 1 --score-network inception": "FID needs a file of InceptionV3's weights",
    "faces-spade --data {plain} --vgg 0": "spade needs label maps",
    "ffhq-stylegan --data digits --resolution 32 --conditional": "stylegan has no classes",
}


@pytest.mark.parametrize("command", ERRORS)
def test_errors_of_training_are_one_line_before_any_work(command, plain, tmp_path, capsys):
    out, folder = tmp_path / "out", tmp_path / "empty"
    folder.mkdir()
    arguments = [word.format(plain=plain, folder=folder) for word in command.split()]
    with pytest.raises(SystemExit) as stopped:
        train.main([*arguments, "--out", str(out)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("pixnorm-train: ")
    assert re.search(ERRORS[command], line), line
    assert not out.exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train.main(["cifar-cspn", "--data", "digits", *TINY, "--steps", "1", "--log-every", "1", "--out", str(out)])
    return out


def sampled(*arguments: object) -> None:
    sample.main([str(argument) for argument in arguments])


def test_samples_as_a_grid_as_an_array_and_as_files(trained, tmp_path):
    from PIL import Image

    for name in ("grid.png", "all.npz", "folder"):
        sampled(trained, "--out", tmp_path / name, "--samples", 6, "--batch", 4)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (3 * 34 - 2, 2 * 34 - 2)
    images = np.load(tmp_path / "all.npz")["images"]
    assert images.shape == (6, 32, 32, 3) and images.dtype == np.uint8
    for i, image in enumerate(images):
        with Image.open(tmp_path / "folder" / f"{i}.png") as written:
            assert np.array_equal(np.asarray(written), image)
    sampled(trained, "--out", tmp_path / "again.npz", "--samples", 4, "--batch", 4, "--classes", 0, 1, 2, 3)
    assert np.array_equal(np.load(tmp_path / "again.npz")["images"], images[:4])


def test_errors_of_sampling(trained, tmp_path, capsys):
    foreign = torch.load(checkpoint.newest(trained), weights_only=True)
    foreign["generator"]["fc.weight"] = torch.zeros(1, 1)
    torch.save(foreign, tmp_path / "foreign.pt")
    for arguments, text in (
        ((tmp_path,), "no checkpoints in"),
        ((tmp_path / "none.pt",), "there is no checkpoint"),
        ((tmp_path / "foreign.pt",), "is of another network: size mismatch for fc.weight"),
        ((trained, "--classes", 10), "classes must be from 0 to 9"),
        ((trained, "--samples", 0), "--samples must be positive"),
    ):
        with pytest.raises(SystemExit) as stopped:
            sampled(*arguments, "--out", tmp_path / "out.png")
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert stopped.value.code == 2 and line.startswith("pixnorm-sample: ") and text in line
    assert not (tmp_path / "out.png").exists()
