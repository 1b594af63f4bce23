"""How a recipe is run, and whether it can be."""

from dataclasses import dataclass
from pathlib import Path

import torch

from pixnorm.ops._dispatch import triton_obstacle
from pixnorm.training.cli import UsageError
from pixnorm.training.data import ImageDataset
from pixnorm.training.features import check_features
from pixnorm.training.metrics import check_count
from pixnorm.training.processes import Processes
from pixnorm.training.recipes import Recipe


@dataclass(frozen=True)
class Settings:
    """How a recipe is run; nothing here changes what is learnt, but for rounding and random numbers.

    Attributes:
        out: folder of the run: checkpoints, samples, logs.
        seed: of weights, data and noise.
        impl: of our layers: auto, native, triton or reference.
        dtype: of weights and images.
        amp: compute in bfloat16 where PyTorch's autocast does.
        compile: the networks by torch.compile.
        channels_last: layout of images and weights.
        deterministic: PyTorch's deterministic algorithms, on GPUs slower.
        accumulate: parts that a batch is divided into, to save memory; batch statistics are those of a part.
        sync_statistics: statistics of norms over all processes.
        workers: processes that read data; by default up to 4, or none if the data is in memory.
        resume: continue the run in the folder, if there is one.
        checkpoint_every: steps.
        keep: the newest checkpoints that stay; 0: all.
        sample_every: steps between grids of samples; 0: none.
        log_every: steps.
        score_every: steps between scores; 0: none.
        score_network: of their features: classifier (trained on the data first), random or inception.
        score_samples: generated images, and at most as many real ones.
        inception_weights: a file for the last.
        vgg_weights: a file with torchvision's VGG19, for SPADE's perceptual loss.
        tensorboard: whether to write its files, too.
    """

    out: Path
    seed: int = 0
    impl: str = "auto"
    dtype: str = "float32"
    amp: bool = False
    compile: bool = False
    channels_last: bool = False
    deterministic: bool = False
    accumulate: int = 1
    sync_statistics: bool = True
    workers: int | None = None
    resume: bool = False
    checkpoint_every: int = 1000
    keep: int = 2
    sample_every: int = 1000
    log_every: int = 50
    score_every: int = 0
    score_network: str = "classifier"
    score_samples: int = 10_000
    inception_weights: Path | None = None
    vgg_weights: Path | None = None
    tensorboard: bool = True


# Of the settings, those without which a resumed run gives other bits; with others it goes on, and says so.
BITS = ("impl", "dtype", "amp", "compile", "channels_last", "accumulate", "sync_statistics")
LEAST = {
    **{name: 1 for name in ("accumulate", "checkpoint_every", "log_every")},
    **{name: 0 for name in ("workers", "keep", "sample_every", "score_every")},
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def check(recipe: Recipe, data: ImageDataset, settings: Settings, processes: Processes) -> None:
    """Raise a UsageError if a run is impossible, before any work."""
    if settings.dtype not in DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, got {settings.dtype!r}")
    for name, least in LEAST.items():
        value = getattr(settings, name)
        if value is not None and value < least:
            raise UsageError(f"{name} must be at least {least}, got {value}")
    if settings.impl == "triton" and (obstacle := triton_obstacle(processes.device.type, processes.device.index)):
        raise UsageError(f"impl 'triton' cannot run: {obstacle}")
    if not -(2**63) <= settings.seed < 2**64:
        raise UsageError(f"seed must have at most 64 bits, got {settings.seed}")
    if settings.out.exists() and not settings.out.is_dir():
        raise UsageError(f"{settings.out} is not a folder")
    if len(data) == 0:
        raise UsageError(f"there are no images in {data.name}")
    if data.resolution != recipe.resolution:
        raise UsageError(f"images of {data.name} have {data.resolution} pixels, the recipe's {recipe.resolution}")
    if recipe.conditional and not data.num_classes:
        raise UsageError(f"the recipe is conditional, and {data.name} has no classes")
    if recipe.family == "spade":
        if not data.label_channels:
            raise UsageError(f"spade needs label maps, and {data.name} has none: --maps gives them")
        if recipe.label_channels and data.label_channels > recipe.label_channels:
            raise UsageError(f"{data.name} has {data.label_channels} labels, the recipe {recipe.label_channels}")
    if recipe.vgg and settings.vgg_weights is None:
        raise UsageError(
            "the recipe has VGG's loss: --vgg-weights FILE (torchvision's vgg19), or --vgg 0 to go without"
        )
    if settings.score_every:
        check_features(settings.score_network, data, weights=settings.inception_weights)
        check_count(settings.score_network, settings.score_samples, len(data))
    parts = processes.world * settings.accumulate
    for name in ("batch_d", "batch_g"):
        if getattr(recipe, name) % parts:
            raise UsageError(
                f"{name} must be a multiple of {parts} ({processes.world} processes, accumulate "
                f"{settings.accumulate}), got {getattr(recipe, name)}"
            )
