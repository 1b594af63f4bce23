"""``python -m pixnorm.sample CHECKPOINT --out FILE`` (or ``pixnorm-sample``): images of a trained generator.

Written as one grid (a file such as samples.png), as an .npz file, or as a folder of images (a name without a suffix).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from pixnorm.training import processes
from pixnorm.training.cli import UsageError, extra, run
from pixnorm.training.data import load_dataset
from pixnorm.training.sampling import Sampler, grid, load_sampler, save_image


def main(arguments: Sequence[str] | None = None) -> None:
    """Sample as the command line says."""
    run(_main, arguments)


def _main(arguments: Sequence[str] | None) -> None:
    tyro = extra("tyro")

    @dataclass(frozen=True)
    class Options:
        """What to draw.

        Attributes:
            checkpoint: a file, or the folder of a run.
            out: samples.png, samples.npz, or a folder.
            samples: how many.
            classes: of the images in turn, in a conditional model; by default all, in turn.
            columns: of the grid.
            seed: of the latent vectors.
            batch: images at a time.
            psi: of StyleGAN's truncation.
            average: take the averaged generator, if there is one.
            data: images with label maps, for SPADE, see pixnorm-train.
            maps: folder of these label maps.
            impl: of our layers: auto, native, triton or reference.
            device: such as cpu or cuda:1; by default a GPU if there is one.
        """

        checkpoint: Annotated[Path, tyro.conf.arg(name="checkpoint"), tyro.conf.Positional]
        out: Path
        samples: int = 64
        classes: tuple[int, ...] = ()
        columns: int | None = None
        seed: int = 0
        batch: int = 64
        psi: float = 1.0
        average: bool = True
        data: str | None = None
        maps: Path | None = None
        impl: str = "auto"
        device: str = "auto"

    options = tyro.cli(Options, prog="pixnorm-sample", args=arguments)
    for name in ("samples", "batch", "columns"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be positive, got {value}")
    kinds = {"", ".npz", *extra("PIL.Image").registered_extensions()}
    if options.out.suffix.lower() not in kinds and not options.out.is_dir():
        raise UsageError(f"--out {options.out} is no kind of image; .png, .npz, or a folder, without a suffix")
    device = processes.start(options.device).device
    sampler = load_sampler(
        options.checkpoint, device=device, use_ema=options.average, impl=options.impl, psi=options.psi
    )
    images = list(_images(sampler, options))
    write(options.out, torch.cat(images), options.columns)
    print(f"{options.samples} images in {options.out}")


def _images(sampler: Sampler, options) -> Iterator[Tensor]:
    """Batches; classes and label maps in turn."""
    conditions = _conditions(sampler, options)
    for index, first in enumerate(range(0, options.samples, options.batch)):
        n = min(options.batch, options.samples - first)
        chosen = [conditions[i % len(conditions)] for i in range(first, first + n)] if conditions else []
        yield sampler.draw(n, options.seed, index, (torch.stack(chosen),) if chosen else ())


def _conditions(sampler: Sampler, options) -> list[Tensor]:
    if options.classes and not sampler.num_classes:
        raise UsageError("--classes are given, and the model is not conditional")
    if sampler.num_classes:
        classes = options.classes or range(sampler.num_classes)
        if not all(0 <= k < sampler.num_classes for k in classes):
            raise UsageError(f"classes must be from 0 to {sampler.num_classes - 1}, got {tuple(classes)}")
        return [torch.tensor(k) for k in classes]
    if sampler.label_channels:
        if options.data is None or options.maps is None:
            raise UsageError("this generator makes images of label maps: --data and --maps give some")
        data = load_dataset(options.data, resolution=sampler.resolution, maps=str(options.maps))
        if data.label_channels > sampler.label_channels:
            raise UsageError(f"the maps have {data.label_channels} labels, the generator {sampler.label_channels}")
        return [data[i][1] for i in range(min(len(data), options.samples))]
    return []


def write(out: Path, images: Tensor, columns: int | None = None) -> None:
    """Write uint8 (N, 3, R, R) as the name says: one grid, an .npz file, or a folder."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npz" and not out.is_dir():
        extra("numpy").savez_compressed(out, images=images.permute(0, 2, 3, 1).cpu().numpy())
    elif out.suffix and not out.is_dir():
        save_image(out, grid(images, columns))
    else:
        digits = len(str(len(images) - 1))
        for i, image in enumerate(images):
            save_image(out / f"{i:0{digits}d}.png", image)


if __name__ == "__main__":
    main()
