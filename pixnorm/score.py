"""``python -m pixnorm.score --checkpoint FILE --data SOURCE`` (or ``pixnorm-score``): scores of generated images.

``--images`` scores images that are there already. ``pixnorm-score miou --pred FOLDER --target FOLDER`` compares label
maps: those that a segmentation network finds in generated images with those that the images were made of.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pixnorm.training import processes
from pixnorm.training.cli import UsageError, extra, run
from pixnorm.training.data import LABEL_NAMES, ImageDataset, LabelMaps, load_dataset, matching_files
from pixnorm.training.features import check_features, default_cache, feature_network
from pixnorm.training.files import VOID, image_files, read_map
from pixnorm.training.metrics import MeanIoU, check_count, real_statistics, score
from pixnorm.training.processes import Processes
from pixnorm.training.sampling import Sampler, load_sampler


@dataclass(frozen=True)
class Options:
    """Score generated images: Fréchet distance, precision, recall, density and coverage of a network's features.

    FID and the inception score are those of --network inception. The distances of other networks are named FD.

    Attributes:
        data: the real images, such as digits, fashion-mnist, cifar10:PATH, a folder or a file .npz; the train split.
        checkpoint: of the generator: a file, or the folder of a run.
        images: or the generated images: a folder or a file .npz.
        samples: how many generated images, and as many real ones.
        network: whose features are compared: a classifier that is trained on the data first, a random network,
            InceptionV3.
        inception_weights: torch-fidelity's file of InceptionV3's weights.
        maps: folder of the data's label maps, of which SPADE makes images.
        average: take the averaged generator, if there is one.
        neighbours: k of precision and recall.
        prdc_samples: at most so many real and generated images for precision and recall.
        seed: of the latent vectors, and of the choice of real images.
        batch: images at a time.
        cache: folder of trained classifiers; by default in ~/.cache/pixnorm.
        impl: of our layers: auto, native, triton or reference.
        device: such as cpu or cuda:1; by default a GPU if there is one.
        out: a file .json for the scores.
    """

    data: str
    checkpoint: Path | None = None
    images: Path | None = None
    samples: int = 50_000
    network: Literal["classifier", "random", "inception"] = "classifier"
    inception_weights: Path | None = None
    maps: Path | None = None
    average: bool = True
    neighbours: int = 5
    prdc_samples: int = 10_000
    seed: int = 0
    batch: int = 100
    cache: Path | None = None
    impl: str = "auto"
    device: str = "auto"
    out: Path | None = None


@dataclass(frozen=True)
class MiouOptions:
    """Mean intersection over union of label maps, over the whole set, of the classes present.

    Attributes:
        pred: folder of predicted label maps, named as the targets.
        target: folder of label maps; names of the labels are in its labels.txt, if it has one.
        out: a file .json for the scores.
    """

    pred: Path
    target: Path
    out: Path | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Score as the command line says."""
    run(_main, sys.argv[1:] if arguments is None else arguments)


def _main(arguments: Sequence[str]) -> None:
    tyro = extra("tyro")
    if arguments[:1] == ["miou"]:
        options = tyro.cli(MiouOptions, prog="pixnorm-score miou", args=arguments[1:])
        _check_out(options.out)
        _report(miou(options.pred, options.target), options.out)
        return
    options = tyro.cli(Options, prog="pixnorm-score", args=arguments)
    _check(options)
    joined = processes.start(options.device)
    try:
        scores = score_images(options, joined)
        if joined.first:
            _report(scores, options.out)
    finally:
        processes.stop(joined)


def _check_out(out: Path | None) -> None:
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise UsageError(f"--out {out} cannot be written: it is a folder, or its folder does not exist")


def _check(options: Options) -> None:
    """What can be seen from the options alone."""
    if (options.checkpoint is None) == (options.images is None):
        raise UsageError("either --checkpoint or --images must be given")
    for name, least in (("samples", 2), ("batch", 1), ("neighbours", 1)):
        if getattr(options, name) < least:
            raise UsageError(f"--{name} must be at least {least}, got {getattr(options, name)}")
    if options.prdc_samples <= options.neighbours:
        raise UsageError(
            f"--prdc-samples must be more than --neighbours, {options.neighbours}, got {options.prdc_samples}"
        )
    for path in (options.checkpoint, options.images):
        if path is not None and not path.exists():
            raise UsageError(f"{path} does not exist")
    if options.network == "inception":
        check_features("inception", None, weights=options.inception_weights)
    _check_out(options.out)


def score_images(options: Options, joined: Processes) -> dict[str, float | int | str | None]:
    """The scores, and what they are of. All processes call this, and each draws its share of the images.

    Raises:
        UsageError: before a network runs.
    """
    made: Sampler | ImageDataset
    if options.checkpoint is not None:
        made = load_sampler(options.checkpoint, device=joined.device, use_ema=options.average, impl=options.impl)
        count = options.samples
    else:
        made = load_dataset(str(options.images), labels=False)
        count = min(options.samples, len(made))
    maps = None if options.maps is None else str(options.maps)
    data = load_dataset(options.data, resolution=made.resolution, maps=maps)
    check_features(options.network, data, weights=options.inception_weights)
    if made.num_classes and made.num_classes != data.num_classes:
        raise UsageError(f"the generator has {made.num_classes} classes, and {data.name} {data.num_classes or 'none'}")
    if made.label_channels and not data.label_channels:
        raise UsageError(f"the generator makes images of label maps, and {data.name} has none: --maps gives them")
    if data.label_channels > made.label_channels > 0:
        raise UsageError(f"{data.name} has {data.label_channels} labels, the generator {made.label_channels}")
    reals = min(count, len(data))
    check_count(options.network, count, len(data), options.neighbours)
    if joined.first:
        _say_if_fewer(options.samples, count, reals)

    network = feature_network(
        options.network,
        data,
        weights=options.inception_weights,
        cache=options.cache or default_cache(),
        device=joined.device,
        processes=joined,
    )
    bar = partial(_progress, joined)
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(options.seed))[:reals].tolist()
    sample = {"prdc_samples": options.prdc_samples, "seed": options.seed, "processes": joined}
    real = real_statistics(bar(_batches(data, chosen, options, joined), "real images", reals), network, **sample)
    if isinstance(made, Sampler):
        segmaps = LabelMaps(data, chosen) if made.label_channels else None
        fakes = made.batches(count, options.batch, options.seed, maps=segmaps, rank=joined.rank, world=joined.world)
    else:
        fakes = _batches(made, range(count), options, joined)
    scores = score(bar(fakes, "generated images", count), real, network, neighbours=options.neighbours, **sample)
    accuracy = None if math.isnan(network.accuracy) else network.accuracy
    of = {"generated": str(options.checkpoint or options.images), "data": options.data, "network": network.name}
    return {
        **scores,
        **of,
        "accuracy": accuracy,
        "resolution": made.resolution,
        "generated_images": count,
        "real_images": reals,
        "neighbours": options.neighbours,
        "seed": options.seed,
    }


def _say_if_fewer(samples: int, count: int, reals: int) -> None:
    if count < samples:
        print(f"pixnorm-score: there are {count} generated images, not {samples}", file=sys.stderr)
    if reals < count:
        print(f"pixnorm-score: there are {reals} real images for {count} generated ones; all are used", file=sys.stderr)


def _batches(data: ImageDataset, indices: Sequence[int], options: Options, joined: Processes) -> Iterator[Tensor]:
    return data.image_batches(indices[joined.rank :: joined.world], options.batch)


def _progress(joined: Processes, batches: Iterator[Tensor], what: str, total: int) -> Iterator[Tensor]:
    """A bar on a terminal, of the first process."""
    share = -(-total // joined.world)
    with extra("tqdm").tqdm(total=share, desc=what, unit="image", disable=None if joined.first else True) as bar:
        for images in batches:
            yield images
            bar.update(len(images))


def miou(pred: Path, target: Path) -> dict[str, float | int | str | None]:
    """Of the label maps in two folders, which have the same names.

    Raises:
        UsageError: maps are missing, of different sizes, or have the label 255 (void).
    """
    for folder in (pred, target):
        if not folder.is_dir():
            raise UsageError(f"{folder} is no folder of label maps")
    targets = image_files(target)
    predictions = matching_files(targets, target, pred)
    total = MeanIoU(VOID)  # classes that no map has do not count
    for prediction, truth in zip(predictions, targets, strict=True):
        maps = read_map(prediction, None, VOID), read_map(truth, None, VOID)
        if maps[0].shape != maps[1].shape:
            sizes = [f"{segmap.shape[1]}x{segmap.shape[0]}" for segmap in maps]
            raise UsageError(f"{prediction} ({sizes[0]}) and {truth} ({sizes[1]}) differ in size")
        total.update(*maps)
    names = (target / LABEL_NAMES).read_text().split("\n") if (target / LABEL_NAMES).is_file() else []
    names = [name.strip() for name in names if name.strip()]
    classes = {
        f"IoU of {names[label] if label < len(names) else label}": value
        for label, value in enumerate(total.per_class().tolist())
        if not math.isnan(value)
    }
    return {"mIoU": total.mean(), "accuracy": total.accuracy(), **classes, "images": len(targets)}


def _report(scores: dict[str, float | int | str | None], out: Path | None) -> None:
    width = max(map(len, scores))
    for name, value in scores.items():
        if value is not None:
            print(f"{name:{width}}  {value:.6g}" if isinstance(value, float) else f"{name:{width}}  {value}")
    if out is not None:
        out.write_text(json.dumps(scores, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
