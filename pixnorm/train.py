"""``python -m pixnorm.train RECIPE --data SOURCE --out FOLDER`` (or ``pixnorm-train``) trains the networks of a paper.

On several processes: ``torchrun --nproc-per-node 2 -m pixnorm.train ...``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pixnorm.training import processes
from pixnorm.training.cli import extra, run
from pixnorm.training.data import load_dataset
from pixnorm.training.recipes import RECIPES, Recipe
from pixnorm.training.settings import Settings
from pixnorm.training.trainer import Trainer


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    run(_main, arguments)


def _main(arguments: Sequence[str] | None) -> None:
    tyro = extra("tyro")

    @dataclass(frozen=True)
    class Options:
        """Options of a run.

        Attributes:
            data: digits, fashion-mnist, cifar10:PATH, cifar100:PATH, an .npz file, or a folder of images.
            recipe: values of the paper, each can be another one.
            settings: how to run it.
            maps: folder of label maps, for SPADE.
            device: such as cpu or cuda:1; by default a GPU if there is one.
        """

        data: str
        recipe: Annotated[Recipe, tyro.conf.arg(name="")]
        settings: Annotated[Settings, tyro.conf.arg(name="")]
        maps: Path | None = None
        device: str = "auto"

    defaults = {
        name: (recipe.paper, Options(tyro.MISSING, recipe, Settings(tyro.MISSING))) for name, recipe in RECIPES.items()
    }
    options = tyro.extras.overridable_config_cli(defaults, prog="pixnorm-train", args=arguments)
    train(options.recipe, options.data, options.settings, maps=options.maps, device=options.device)


def train(recipe: Recipe, data: str, settings: Settings, *, maps: Path | None = None, device: str = "auto") -> Trainer:
    """Train a recipe; returns the trainer, after its last step.

    Args:
        recipe: of ``RECIPES``, or one of your own.
        data: as :func:`pixnorm.training.data.load_dataset` takes it.
        settings: how.
        maps: folder of label maps, for SPADE.
        device: "auto", or the name of one.

    Raises:
        UsageError: the arguments do not go together, the data cannot be read, or a loss became NaN.
    """
    images = load_dataset(data, resolution=recipe.resolution, maps=None if maps is None else str(maps))
    of = processes.start(device)
    try:
        trainer = Trainer(recipe, images, settings, of)
        trainer.train()
    finally:
        processes.stop(of)
    return trainer


if __name__ == "__main__":
    main()
