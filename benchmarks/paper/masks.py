"""``python -m benchmarks.paper.masks --results DIR`` draws the masks of a generator with SPN as DIR/masks.png.

Fig. 2 of the SPN paper (arXiv 2201.10725): masks and inverted masks of chosen channels beside the images. The generator
is that of a checkpoint, or one trained for a minute on scikit-learn's digits.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from pytest_benchmark.utils import get_commit_info
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from tqdm import tqdm

from benchmarks.plots import STYLE
from benchmarks.records import json_by_line, provenance
from benchmarks.report import table
from pixnorm.networks import Generator
from pixnorm.nn import self_latent_mask

OPTIONS = {"norm": "spn", "channels": 32, "latent_dim": 32}
BATCH, RATE_G, RATE_D = 32, 4e-4, 8e-4
SAMPLES, CHANNELS = 6, 3  # in the picture
LAYER = "block3.norm2"  # the last SPN, at the resolution of the image


def digits() -> Tensor:
    """(1797, 3, 32, 32) in [-1, 1]: scikit-learn's 8x8 digits, enlarged."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
    return F.interpolate(images, size=32, mode="bilinear").expand(-1, 3, -1, -1)


def discriminator() -> nn.Sequential:
    layers, channels = [], (3, 32, 64, 128)
    for before, after in pairwise(channels):
        layers += [spectral_norm(nn.Conv2d(before, after, 4, stride=2, padding=1)), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers, nn.Flatten(), spectral_norm(nn.Linear(128 * 4 * 4, 1)))


def train(seconds: float) -> tuple[Generator, int]:
    """A generator after that time, and its number of steps: hinge loss, one discriminator step each."""
    torch.manual_seed(0)
    real, generator, critic = digits(), Generator(**OPTIONS), discriminator()
    of_g = torch.optim.Adam(generator.parameters(), RATE_G, betas=(0.0, 0.9))
    of_d = torch.optim.Adam(critic.parameters(), RATE_D, betas=(0.0, 0.9))
    start, steps = time.monotonic(), 0
    with tqdm(total=round(seconds), desc="training", unit=" s", dynamic_ncols=True) as bar:
        while (passed := time.monotonic() - start) < seconds:
            bar.update(round(passed) - bar.n)
            fake = generator(torch.randn(BATCH, OPTIONS["latent_dim"]))
            of_real, of_fake = critic(real[torch.randint(len(real), (BATCH,))]), critic(fake.detach())
            of_d.zero_grad()
            (F.relu(1 - of_real).mean() + F.relu(1 + of_fake).mean()).backward()
            of_d.step()
            of_g.zero_grad()
            (-critic(fake).mean()).backward()
            of_g.step()
            steps += 1
    return generator, steps


@torch.no_grad()
def images_and_masks(generator: Generator, *codes: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 3, H, W) and (N, Cm, h, w), of ``LAYER``, for latent vectors and, in a conditional generator, classes."""
    found = []
    layer = generator.get_submodule(LAYER)
    # Of what the layer is given, the features and the class; a latent vector does not reach the mask.
    hook = layer.register_forward_pre_hook(lambda layer, given: found.append(self_latent_mask(layer, *given[:2])))
    try:
        images = generator(*codes)
    finally:
        hook.remove()
    return images, found[0]


def of_greatest_contrast(masks: Tensor) -> list[int]:
    """The channels whose masks vary most within an image."""
    return masks.std((2, 3)).mean(0).topk(CHANNELS).indices.tolist()


def draw(images: Tensor, masks: Tensor, path: Path) -> None:
    """A row for each sample: the image, then mask and inverted mask of each of the chosen channels."""
    matplotlib.use("agg")
    columns = ["image"]
    rows = [[(image.movedim(0, 2).numpy() + 1) / 2] for image in images]
    for channel in of_greatest_contrast(masks):
        columns += [f"m, channel {channel}", f"1 − m, channel {channel}"]
        for row, mask in zip(rows, masks[:, channel].numpy(), strict=True):
            row += [mask, 1 - mask]
    with plt.rc_context(STYLE):
        size = 1.45 * len(columns) + 0.2, 1.45 * len(rows) + 0.8
        figure, axes = plt.subplots(len(rows), len(columns), figsize=size, layout="constrained")
        figure.suptitle(
            f"Self-latent masks of {LAYER}: black is 0, white is 1; the channels of greatest contrast",
            x=0.01,
            ha="left",
        )
        for row, of_row in zip(rows, axes, strict=True):
            for picture, axis in zip(row, of_row, strict=True):
                axis.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
        for title, axis in zip(columns, axes[0], strict=True):
            axis.set_title(title, loc="center", fontsize=8)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def markdown(masks: Tensor, facts: dict[str, str]) -> str:
    """The page: what ran, the picture, the figures."""
    figures = [
        (channel, *(f"{value:.3f}" for value in (mask.mean(), mask.std((1, 2)).mean(), mask.min(), mask.max())))
        for channel in of_greatest_contrast(masks)
        for mask in (masks[:, channel],)
    ]
    parts = [
        "# Self-latent masks",
        table(("", ""), facts.items(), "left"),
        f"Fig. 2 of the SPN paper (arXiv 2201.10725): masks of the layer `{LAYER}`, and the inverted ones, beside the "
        "images that the generator makes.",
        "![images, masks and inverted masks](masks.png)",
        table(("channel", "mean", "deviation within an image", "least", "greatest"), figures),
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.masks", description=__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="of torch.save: {'options': of Generator, 'model': state dict}"
    )
    parser.add_argument("--seconds", type=float, default=60, metavar="S", help="of training, otherwise (%(default)s)")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), metavar="DIR", help="(%(default)s)")
    found = parser.parse_args(arguments)
    found.results.mkdir(parents=True, exist_ok=True)
    command = ["python", "-m", "benchmarks.paper.masks", *(sys.argv[1:] if arguments is None else arguments)]
    facts = provenance(get_commit_info(), shlex.join(command))
    if found.checkpoint:
        saved = torch.load(found.checkpoint, weights_only=True)
        generator = Generator(**saved["options"])
        generator.load_state_dict(saved["model"])
        facts["generator"] = found.checkpoint.name
    else:
        generator, steps = train(found.seconds)
        facts["generator"] = (
            f"{OPTIONS['channels']} channels; {steps:,} steps of {BATCH} images of scikit-learn's digits at 32x32, "
            f"hinge loss, Adam with betas 0 and 0.9, rates {RATE_G:g} (generator) and {RATE_D:g} (discriminator)"
        )
    torch.manual_seed(1)
    codes = [torch.randn(SAMPLES, generator.fc.in_features)]
    if generator.num_classes:
        codes.append(torch.arange(SAMPLES) % generator.num_classes)
    images, masks = images_and_masks(generator.eval(), *codes)
    text = markdown(masks, facts)
    of_channels = [
        {"channel": i, "mean": round(mask.mean().item(), 4), "deviation": round(mask.std((1, 2)).mean().item(), 4)}
        for i, mask in enumerate(masks.unbind(1))
    ]
    (found.results / "masks.json").write_text(json_by_line({"facts": facts, "layer": LAYER}, "channels", of_channels))
    (found.results / "masks.md").write_text(text)
    draw(images, masks, found.results / "masks.png")
    print(text, f"\nwritten: {found.results / 'masks'}.md, .json, .png")


if __name__ == "__main__":
    main()
