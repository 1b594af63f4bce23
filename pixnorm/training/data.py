"""Sets of images, with labels, with label maps, or without, and the scaling between their pixels and the networks'."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from pixnorm.training.cli import UsageError, extra
from pixnorm.training.files import (
    fit,
    image_files,
    largest_label,
    open_image,
    read_cifar,
    read_idx,
    read_image,
    read_map,
    read_npz,
    to_tensor,
)

SOURCES = "digits, fashion-mnist, fashion-mnist:PATH, cifar10:PATH, cifar100:PATH, a folder, or a file .npz"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
FASHION_MNIST_CLASSES = (
    *("t-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
SPLITS = ("train", "test")
LABEL_NAMES = "labels.txt"  # in a folder of label maps: one name a line


class ImageDataset(Dataset[tuple[Tensor, ...]]):
    """Square images with three channels; one channel becomes three equal ones.

    An item is ``(image,)``, ``(image, label)`` or ``(image, segmap)``: uint8 (3, R, R); int64 (); uint8 (R, R).

    Args:
        name: for reports, such as "fashion-mnist".
        images: uint8 (N, 1 or 3, R, R), or N paths of files, each of which is read when it is asked for.
        resolution: R.
        labels: int64 (N,), the images' classes.
        num_classes: K, 0 without labels.
        class_names: of the K classes, or of the label maps' labels; may be empty.
        maps: N paths of label maps.
        label_channels: the number of labels in these, 0 without maps.
    """

    def __init__(
        self,
        name: str,
        images: Tensor | Sequence[Path],
        resolution: int,
        *,
        labels: Tensor | None = None,
        num_classes: int = 0,
        class_names: Sequence[str] = (),
        maps: Sequence[Path] = (),
        label_channels: int = 0,
    ):
        self.name = name
        self.resolution = resolution
        self.num_classes = num_classes
        self.class_names = tuple(class_names)
        self.label_channels = label_channels
        self.labels = labels
        self._images = images
        self._maps = maps

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        if self.labels is not None:
            return self._image(index), self.labels[index]
        if self._maps:
            return self._image(index), self._map(index)
        return (self._image(index),)

    def _image(self, index: int) -> Tensor:
        images = self._images
        image = images[index] if isinstance(images, Tensor) else read_image(images[index], self.resolution)
        return image.expand(3, -1, -1)

    def _map(self, index: int) -> Tensor:
        with open_image(self._images[index]) as image, open_image(self._maps[index]) as segmap:
            if image.width * segmap.height != segmap.width * image.height:  # the centres would show different parts
                raise UsageError(
                    f"{self._maps[index]} ({segmap.width}x{segmap.height}) has not the proportions of its image"
                    f" ({image.width}x{image.height})"
                )
        return read_map(self._maps[index], self.resolution, self.label_channels)

    @property
    def in_memory(self) -> bool:
        """Whether the images are; if not, they are read from files when asked for."""
        return isinstance(self._images, Tensor)

    def images(self, indices: Sequence[int]) -> Tensor:
        """uint8 (n, 3, R, R): these images, without their labels."""
        if isinstance(self._images, Tensor):
            return self._images[torch.as_tensor(indices, dtype=torch.int64)].expand(-1, 3, -1, -1)
        return torch.stack([self._image(index) for index in indices])

    def image_batches(self, indices: Sequence[int] | None = None, batch: int = 128) -> Iterator[Tensor]:
        """The images with these indices (all, in their order), uint8 (up to ``batch``, 3, R, R) at a time."""
        indices = range(len(self)) if indices is None else indices
        for start in range(0, len(indices), batch):
            yield self.images(indices[start : start + batch])

    def fingerprint(self) -> str:
        """Of the images and labels: of their bytes, or of their files' paths, sizes and times."""
        parts = hashlib.sha256(f"{len(self)} {self.resolution} {self.num_classes}".encode())
        if isinstance(self._images, Tensor):
            parts.update(self._images.contiguous().numpy().data)
        else:
            for path in self._images:
                status = path.stat()
                parts.update(f"{path.absolute()} {status.st_size} {status.st_mtime_ns}\n".encode())
        if self.labels is not None:
            parts.update(self.labels.numpy().data)
        return parts.hexdigest()


class LabelMaps(Sequence[Tensor]):
    """The label maps of some images, read when they are asked for."""

    def __init__(self, data: ImageDataset, indices: Sequence[int]):
        self._data, self._indices = data, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Tensor:
        return self._data[self._indices[index]][1]


def load_dataset(
    source: str, *, resolution: int | None = None, labels: bool = True, split: str = "train", maps: str | None = None
) -> ImageDataset:
    """The set of images that ``source`` names. Folders are read when used, all else is held in memory.

    Args:
        source:
            ``digits``: scikit-learn's 1797 digits, 8x8; one in five is for the test split.
            ``fashion-mnist`` or ``fashion-mnist:PATH``: the four files, those of Debian's package dataset-fashion-mnist
            if no folder is given; 28x28, padded to 32x32 with zeros (unless ``resolution`` is 28).
            ``cifar10:PATH``, ``cifar100:PATH``: the archive or its folder; Python's or the binary version; fine labels.
            A file ``.npz``: ``images``, uint8 (N, H, W), (N, H, W, C) or (N, C, H, W), C 1 or 3, perhaps ``labels``.
            A folder: all images below it. If every one is in a subfolder, and there are two or more subfolders, these
            are the classes.
        resolution: R. None: the data's own, 32 for digits and Fashion-MNIST, in a folder that of the first image. Other
            images are cropped to the square in their centre and resized (:func:`~pixnorm.training.files.fit`).
        labels: whether the images' labels are wanted, if there are any.
        split: "train" or "test". A folder or a file has no split: "test" is the folder ``test`` in it, or an error.
        maps: a folder of label maps, for images in a folder: files of 8 bits of the images' names, whatever the suffix.
            Labels are 0, 1, ...; their number and names are those in the folder's ``labels.txt``, one a line; without
            this file, all maps are read once, for the largest label. There are no class labels then.

    Raises:
        UsageError: for everything that can be wrong with these, in one line.
    """
    if split not in SPLITS:
        raise UsageError(f"split must be train or test, got {split!r}")
    if resolution is not None and resolution < 1:
        raise UsageError(f"resolution must be positive, got {resolution}")
    name, colon, where = source.partition(":")
    if maps is not None and not Path(source).is_dir():
        raise UsageError(f"label maps go with a folder of images, and {source} is none")
    if source == "digits":
        dataset = _digits(resolution, split)
    elif name == "fashion-mnist":
        dataset = _fashion_mnist(Path(where) if colon else FASHION_MNIST, resolution, split)
    elif name in ("cifar10", "cifar100"):
        if not where:
            raise UsageError(f"{name} needs the path of its archive or folder: {name}:PATH")
        classes = int(name.removeprefix("cifar"))
        images, targets, names = read_cifar(_existing(where), classes, split)
        dataset = _in_memory(name, images, resolution, targets, classes, names)
    else:
        path = _existing(source)
        if split == "test":
            if not (path / split).is_dir():
                raise UsageError(f"{path} has no test split: it has no folder test")
            path = path / split
        if path.is_dir():
            name = Path(source).resolve().name
            if maps is not None:
                return _pairs(name, path, _existing(maps), resolution)
            return _folder(name, path, resolution, labels)
        if path.suffix != ".npz":
            raise UsageError(f"{path} is neither a folder nor .npz; data are {SOURCES}")
        images, targets = read_npz(path)
        classes = 0 if targets is None else int(targets.max()) + 1
        dataset = _in_memory(path.stem, images, resolution, targets, classes)
    if not labels:
        dataset.labels, dataset.num_classes, dataset.class_names = None, 0, ()
    return dataset


def _existing(path: str) -> Path:
    if not Path(path).exists():
        raise UsageError(f"{path} does not exist; data are {SOURCES}")
    return Path(path)


def _in_memory(
    name: str,
    images: Tensor,
    resolution: int | None,
    labels: Tensor | None,
    num_classes: int,
    class_names: Sequence[str] = (),
) -> ImageDataset:
    resolution = resolution or min(images.shape[-2:])
    if images.shape[-2:] != (resolution, resolution):
        pillow = extra("PIL.Image")
        resized = images.new_empty(*images.shape[:2], resolution, resolution)
        for out, image in zip(resized, images, strict=True):
            pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
            out.copy_(to_tensor(fit(pillow.fromarray(pixels.numpy()), resolution)))
        images = resized
    return ImageDataset(name, images, resolution, labels=labels, num_classes=num_classes, class_names=class_names)


def _digits(resolution: int | None, split: str) -> ImageDataset:
    digits = extra("sklearn.datasets").load_digits()
    numbers = torch.arange(len(digits.target))
    chosen = (numbers % 5 == 4) == (split == "test")
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)[chosen, None]
    labels = torch.from_numpy(digits.target).long()[chosen]
    return _in_memory("digits", images, resolution or 32, labels, 10, [str(digit) for digit in range(10)])


def _fashion_mnist(folder: Path, resolution: int | None, split: str) -> ImageDataset:
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder: install Debian's dataset-fashion-mnist, or give fashion-mnist:PATH")
    prefix = "train" if split == "train" else "t10k"
    images, labels = read_idx(folder, f"{prefix}-images-idx3-ubyte"), read_idx(folder, f"{prefix}-labels-idx1-ubyte")
    if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or labels.max() > 9:
        raise UsageError(
            f"{folder}: images {tuple(images.shape)} and labels {tuple(labels.shape)} are not Fashion-MNIST's"
        )
    images = images[:, None] if resolution == 28 else F.pad(images[:, None], (2, 2, 2, 2))
    return _in_memory("fashion-mnist", images, resolution, labels.long(), 10, FASHION_MNIST_CLASSES)


def _resolution_of(path: Path) -> int:
    with open_image(path) as image:
        return min(image.size)


def _folder(name: str, folder: Path, resolution: int | None, labels: bool) -> ImageDataset:
    files = image_files(folder)
    resolution = resolution or _resolution_of(files[0])
    read_image(files[0], resolution)  # a folder of what cannot be read is found out now
    tops = [path.relative_to(folder).parts[0] for path in files]
    classes = sorted(set(tops))
    if not labels or len(classes) < 2 or any(len(path.relative_to(folder).parts) == 1 for path in files):
        return ImageDataset(name, files, resolution)
    number = {top: index for index, top in enumerate(classes)}
    targets = torch.tensor([number[top] for top in tops])
    return ImageDataset(name, files, resolution, labels=targets, num_classes=len(classes), class_names=classes)


def matching_files(files: Sequence[Path], root: Path, others: Path) -> list[Path]:
    """For each of the files below ``root``, that below ``others`` of the same relative path, whatever the suffix."""
    found: dict[Path, Path] = {}
    for path in image_files(others):
        key = path.relative_to(others).with_suffix("")
        if key in found:
            raise UsageError(f"{found[key]} and {path} have one name")
        found[key] = path
    keys = [path.relative_to(root).with_suffix("") for path in files]
    missing = [key for key in keys if key not in found]
    if missing:
        raise UsageError(f"{others} has nothing named {missing[0]} ({len(missing)} of {len(keys)} missing)")
    return [found[key] for key in keys]


def _pairs(name: str, folder: Path, maps: Path, resolution: int | None) -> ImageDataset:
    if not maps.is_dir():
        raise UsageError(f"{maps} is no folder of label maps")
    files = image_files(folder)
    segmaps = matching_files(files, folder, maps)
    names: tuple[str, ...] = ()
    if (maps / LABEL_NAMES).is_file():
        names = tuple(line.strip() for line in (maps / LABEL_NAMES).read_text().splitlines() if line.strip())
    channels = len(names) or 1 + max(largest_label(path) for path in segmaps)
    dataset = ImageDataset(
        name,
        files,
        resolution or _resolution_of(files[0]),
        class_names=names,
        maps=segmaps,
        label_channels=channels,
    )
    dataset[0]  # what is wrong with the first pair is found out now
    return dataset


def scale_images(images: Tensor, generator: torch.Generator | None = None, *, dither: bool = True) -> Tensor:
    """x/128 - 1 + U(0, 1/128), float32: bytes as numbers in [-1, 1), as PFN's SNGAN scales them.

    The 256 grey values become adjacent intervals of 1/128. The dither has 16 bits: sums are exact in float32, and none
    is rounded up into the next interval.

    Args:
        images: uint8, any shape.
        generator: of the dither, on the images' device.
    """
    scaled = images.to(torch.float32).div_(128).sub_(1)
    if dither:
        noise = torch.rand(images.shape, generator=generator, device=images.device)
        scaled += noise.mul_(2**16).floor_().mul_(2.0**-23)
    return scaled


def unscale_images(images: Tensor) -> Tensor:
    """floor(128 (x + 1)), clamped to bytes, uint8: the grey value whose interval of :func:`scale_images` x is in.

    PFN's code saves 127.5 x + 127.5 instead, without the fraction, which makes one in two of its own scaled pixels
    darker by one. Scores compare real bytes with generated ones, so the inverse is exact here. NaN becomes 0.
    """
    return images.detach().float().add(1).mul_(128).nan_to_num_(0.0).clamp_(0, 255).to(torch.uint8)
