"""Images of trained generators: in batches, from checkpoints, as grids and files."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pixnorm.training import checkpoint
from pixnorm.training.cli import UsageError
from pixnorm.training.data import unscale_images
from pixnorm.training.seeds import seed_of
from pixnorm.training.systems import System, build_system


class Sampler:
    """Makes images of a generator.

    An image depends on the seed, the size of the batches and its place, and on no generator of random numbers outside.

    Args:
        system: of the generator.
        generator: in eval mode.
        options: of each call, such as ``psi`` of StyleGAN's truncation.

    Attributes:
        resolution, num_classes, label_channels: of the images.
    """

    def __init__(self, system: System, generator: nn.Module, **options):
        self.system, self.generator, self.options = system, generator, options
        self.resolution = system.recipe.resolution
        self.num_classes, self.label_channels = system.num_classes, system.label_channels

    @torch.no_grad()
    def draw(self, n: int, seed: int, index: int = 0, conditions: Sequence[Tensor] = ()) -> Tensor:
        """The images of one batch, uint8 (n, 3, R, R).

        Args:
            n: how many.
            seed, index: of the batch.
            conditions: classes (n,), or label maps (n, R, R); classes are drawn if there are none.
        """
        like = next(self.generator.parameters())
        rng = torch.Generator(like.device).manual_seed(seed_of(seed, "batch", index))
        conditions = tuple(t.to(like.device) for t in conditions)
        return unscale_images(self.system.sample(self.generator, n, rng, like, conditions, **self.options))

    def batches(
        self,
        total: int,
        batch: int,
        seed: int = 0,
        *,
        maps: Sequence[Tensor] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[Tensor]:
        """Batches of images, uint8 (n, 3, R, R), ``total`` in all processes; each process has every ``world``-th batch.

        Args:
            maps: label maps, each (R, R), of which images are made in turn; SPADE needs them.
        """
        if self.label_channels and not maps:
            raise UsageError("this generator makes images of label maps: --data and --maps give some")
        for index in range(rank, -(-total // batch), world):
            n = min(batch, total - index * batch)
            conditions = ()
            if maps:
                conditions = (torch.stack([maps[(index * batch + i) % len(maps)] for i in range(n)]),)
            yield self.draw(n, seed, index, conditions)


def load_sampler(
    path: Path, *, device: torch.device | str = "cpu", use_ema: bool = True, impl: str = "auto", psi: float = 1.0
) -> Sampler:
    """Of the generator in a checkpoint.

    Args:
        path: of the checkpoint, or of the folder of a run, whose newest is taken.
        use_ema: take the averaged generator, if there is one.
        impl: of our layers.
        psi: of StyleGAN's truncation; scores are of 1.

    Raises:
        UsageError: there is no checkpoint, or no such impl.
    """
    path = Path(path)
    if path.is_dir():
        found = checkpoint.newest(path)
        if found is None:
            raise UsageError(f"there are no checkpoints in {path}")
        path = found
    contents = checkpoint.load(path)
    recipe, run = checkpoint.recipe_of(contents), contents["run"]
    try:
        system = build_system(recipe, run["num_classes"], run["label_channels"], impl)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if use_ema and contents["average"] is not None:
        weights = {
            name.removeprefix("module."): value
            for name, value in contents["average"].items()
            if name.startswith("module.")
        }
    else:
        weights = contents["generator"]
    try:
        system.generator.load_state_dict(weights)
    except RuntimeError as error:
        raise UsageError(f"{path} is of another network: {str(error).splitlines()[-1].strip()}") from None
    generator = system.generator.to(device).eval().requires_grad_(False)
    return Sampler(system, generator, **({"psi": psi} if recipe.family.startswith("stylegan") else {}))


def grid(images: Tensor, columns: int | None = None, padding: int = 2) -> Tensor:
    """Images side by side.

    Args:
        images: uint8 (N, 3, H, W).
        columns: by default those of a square, about.
        padding: white pixels between the images.

    Returns:
        uint8 (3, rows, columns) of pixels.
    """
    n, _, h, w = images.shape
    columns = min(n, columns or round(n**0.5 + 0.49))
    rows = -(-n // columns)
    cells = images.new_full((rows * columns, 3, h + padding, w + padding), 255)
    cells[:n, :, :h, :w] = images
    whole = cells.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    return whole[:, : rows * (h + padding) - padding, : columns * (w + padding) - padding]


def save_image(path: Path, image: Tensor) -> None:
    """Write uint8 (3, H, W) as a file of the kind that the name says."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(path)
