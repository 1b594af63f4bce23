"""Readers of image files and of data sets in the formats that their authors publish. Whatever is wrong with a file is a
:class:`~pixnorm.training.cli.UsageError` that names it."""

import gzip
import io
import pickle
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pixnorm.training.cli import UsageError, extra

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"})
VOID = 255  # what 8-bit label maps have where nobody has said what is there


def open_image(path: Path) -> "Image":
    """Header read, pixels not yet."""
    image = extra("PIL.Image")
    try:
        return image.open(path)
    except (OSError, ValueError, image.DecompressionBombError) as error:
        raise UsageError(f"{path} cannot be read as an image: {error}") from error


def fit(image: "Image", resolution: int, *, nearest: bool = False) -> "Image":
    """The largest square in the centre, resized: by means over squares where the factor is whole, otherwise antialiased
    (Lanczos), and bilinearly to a larger size. ``nearest`` for labels, which cannot be averaged."""
    from PIL.Image import Resampling

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if side == resolution:
        return image
    if nearest:
        method = Resampling.NEAREST
    elif side < resolution:
        method = Resampling.BILINEAR
    else:
        method = Resampling.LANCZOS if side % resolution else Resampling.BOX
    return image.resize((resolution, resolution), method)


def to_tensor(image: "Image") -> Tensor:
    """uint8 (C, H, W) of an image with C channels of 8 bits."""
    numpy = extra("numpy")
    pixels = torch.from_numpy(numpy.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def _decoded(image: "Image", path: Path, mode: str | None = None) -> "Image":
    try:
        return image.convert(mode) if mode else image.copy()
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three for truncated or broken files
        raise UsageError(f"{path} cannot be read as an image: {error}") from error


def read_image(path: Path, resolution: int) -> Tensor:
    """uint8 (1 or 3, R, R); transparency is dropped."""
    with open_image(path) as image:
        if image.mode.startswith(("I", "F")):
            raise UsageError(f"{path} has more than 8 bits per channel (mode {image.mode})")
        grey = image.mode in ("1", "L", "LA")
        return to_tensor(fit(_decoded(image, path, "L" if grey else "RGB"), resolution))


def _labels(path: Path) -> "Image":
    """The label map as an image of one channel of 8 bits; a palette's indices are the labels."""
    with open_image(path) as image:
        if image.mode not in ("L", "P", "1"):
            raise UsageError(f"{path} is no label map: it has mode {image.mode}, not one channel of 8 bits")
        labels = _decoded(image, path)
        if labels.mode == "P":
            labels = extra("PIL.Image").frombytes("L", labels.size, labels.tobytes())
        elif labels.mode == "1":
            labels = labels.point(bool, "L")
        return labels


def largest_label(path: Path) -> int:
    """Of a label map. Void (255) is an error: one-hot labels have no channel for it."""
    largest = _labels(path).getextrema()[1]
    if largest == VOID:
        raise UsageError(f"{path} has label {VOID} (void); labels must be 0, 1, ..., one for each channel")
    return largest


def read_map(path: Path, resolution: int | None = None, label_channels: int = VOID + 1) -> Tensor:
    """uint8 (R, R), or the map's own (H, W); labels are 0 to ``label_channels - 1``."""
    labels = _labels(path)
    largest = labels.getextrema()[1]
    if largest >= label_channels:
        raise UsageError(
            f"{path} has label {largest}, out of range for {label_channels} labels (0 to {label_channels - 1})"
        )
    return to_tensor(labels if resolution is None else fit(labels, resolution, nearest=True))[0]


def image_files(folder: Path) -> list[Path]:
    """All images below the folder, in the order of their paths; hidden files and folders are left out."""
    found = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]
    if not found:
        raise UsageError(f"{folder} has no images ({', '.join(sorted(SUFFIXES))})")
    return sorted(found)


def read_idx(folder: Path, name: str) -> Tensor:
    """The array of bytes in ``name`` or ``name.gz``, in the format of MNIST (yann.lecun.com/exdb/mnist)."""
    path = next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)
    if path is None:
        raise UsageError(f"{folder} has neither {name}.gz nor {name}")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    rank = content[3] if content[:3] == b"\0\0\x08" else 0  # 8: unsigned bytes
    start = 4 + 4 * rank
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
    if not rank or torch.Size(shape).numel() != len(content) - start or len(content) == start:
        raise UsageError(f"{path} is no idx file of bytes, or is cut off")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(shape)


def read_npz(path: Path) -> tuple[Tensor, Tensor | None]:
    """Images, uint8 (N, 1 or 3, H, W), and labels, int64 (N,), if there are any.

    The file has ``images`` (or ``arr_0``): (N, H, W), (N, H, W, C) or (N, C, H, W), and perhaps ``labels`` (``arr_1``).
    """
    numpy = extra("numpy")
    try:
        with numpy.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("images", "arr_0", "labels", "arr_1") if name in file}
            names = list(file)
    except (OSError, ValueError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise UsageError(f"{path} cannot be read as .npz: {error}") from error
    images, labels = arrays.get("images", arrays.get("arr_0")), arrays.get("labels", arrays.get("arr_1"))
    if images is None:
        raise UsageError(f"{path} has no array 'images', only {', '.join(names) or 'nothing'}")
    shape = images.shape
    if images.dtype != numpy.uint8:
        raise UsageError(f"{path}: images must be uint8, got {images.dtype}")
    if images.ndim == 4 and shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    elif images.ndim == 3:
        images = images[:, None]
    elif images.ndim != 4 or shape[1] not in (1, 3):
        raise UsageError(
            f"{path}: images must be (N, H, W) or have 1 or 3 channels, (N, H, W, C) or (N, C, H, W), got {shape}"
        )
    if not images.size:
        raise UsageError(f"{path} has no images: their shape is {shape}")
    if labels is not None:
        if labels.shape != shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0:
            raise UsageError(
                f"{path}: labels must be integers from 0, one for each of {shape[0]} images,"
                f" got {labels.dtype} {labels.shape}"
            )
        labels = torch.from_numpy(labels.astype(numpy.int64))
    return torch.from_numpy(numpy.ascontiguousarray(images)), labels


class _ArraysOnly(pickle.Unpickler):
    """Lists, dicts, strings and NumPy's arrays: a pickle that asks for anything else could run any code."""

    def find_class(self, module: str, name: str) -> object:
        numpy = extra("numpy")
        core = getattr(numpy, "_core", None) or numpy.core
        known = {
            ("numpy", "ndarray"): numpy.ndarray,
            ("numpy", "dtype"): numpy.dtype,
            ("multiarray", "_reconstruct"): core.multiarray._reconstruct,
            ("numeric", "_frombuffer"): core.numeric._frombuffer,
            ("_codecs", "encode"): lambda text, _: text.encode(
                "latin1"
            ),  # bytes, as Python 3 writes them in protocol 2
        }
        for prefix in ("numpy.core.", "numpy._core."):
            module = module.removeprefix(prefix)
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return known[module, name]


def _cifar_files(path: Path, wanted: Sequence[str]) -> dict[str, bytes]:
    """Those of the wanted files that are in the folder, one folder below, or in the archive."""
    if path.is_dir():
        files = {file.name: file for pattern in ("*/*", "*") for file in sorted(path.glob(pattern)) if file.is_file()}
        return {name: files[name].read_bytes() for name in wanted if name in files}
    try:
        with tarfile.open(path) as archive:
            members = {Path(member.name).name: member for member in archive if member.isfile()}
            return {name: archive.extractfile(members[name]).read() for name in wanted if name in members}
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UsageError(f"{path} is neither a folder nor a readable .tar.gz: {error}") from error


def read_cifar(path: Path, classes: int, split: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Images (N, 3, 32, 32), labels (N,) and the classes' names (CIFAR-100's fine ones; none without their file).

    The path is the archive (Python's or the binary version, .tar.gz), the folder that it unpacks to, or the one around.
    """
    pickles = {
        (10, "train"): tuple(f"data_batch_{i}" for i in range(1, 6)),
        (10, "test"): ("test_batch",),
        (100, "train"): ("train",),
        (100, "test"): ("test",),
    }[classes, split]
    binaries = tuple(f"{name}.bin" for name in pickles)
    meta, text = ("batches.meta", "batches.meta.txt") if classes == 10 else ("meta", "fine_label_names.txt")
    files = _cifar_files(path, (*pickles, *binaries, meta, text))
    kind = next((names for names in (pickles, binaries) if all(name in files for name in names)), None)
    if kind is None:
        raise UsageError(f"{path} lacks files of CIFAR-{classes}: {', '.join(pickles)}, or with the suffix .bin")
    read = _read_pickle if kind is pickles else _read_binary
    batches = [read(files[name], classes, f"{path}: {name}") for name in kind]
    names: tuple[str, ...] = ()
    if meta in files:
        key = b"label_names" if classes == 10 else b"fine_label_names"
        found = _unpickled(files[meta], f"{path}: {meta}").get(key, ())
        names = tuple(name.decode("latin1") for name in found)
    elif text in files:
        names = tuple(files[text].decode().split())
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches]), names


def _read_binary(content: bytes, classes: int, where: str) -> tuple[Tensor, Tensor]:
    before = 1 if classes == 10 else 2  # CIFAR-100 has the coarse label first
    if not content or len(content) % (before + 3072):
        raise UsageError(f"{where} has {len(content)} bytes, not a multiple of {before + 3072}")
    rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, before + 3072)
    return _cifar_batch(rows[:, before:], rows[:, before - 1].long(), classes, where)


def _read_pickle(content: bytes, classes: int, where: str) -> tuple[Tensor, Tensor]:
    numpy = extra("numpy")
    batch = _unpickled(content, where)
    data, labels = batch.get(b"data"), batch.get(b"labels" if classes == 10 else b"fine_labels")
    if not isinstance(data, numpy.ndarray) or data.dtype != numpy.uint8 or not isinstance(labels, list):
        raise UsageError(f"{where} is no batch of CIFAR-{classes}")
    return _cifar_batch(torch.from_numpy(data.copy()), torch.tensor(labels, dtype=torch.int64), classes, where)


def _unpickled(content: bytes, where: str) -> dict:
    try:
        batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a broken pickle raises nearly anything
        raise UsageError(f"{where} is no pickle of arrays: {error}") from error
    if not isinstance(batch, dict):
        raise UsageError(f"{where} is no pickle of a dict")
    # Files of Python 2 have bytes for keys and names, files written by Python 3 may have strings.
    encoded = lambda value: value.encode("latin1") if isinstance(value, str) else value  # noqa: E731
    return {
        encoded(key): [encoded(item) for item in value] if isinstance(value, list) else value
        for key, value in batch.items()
    }


def _cifar_batch(images: Tensor, labels: Tensor, classes: int, where: str) -> tuple[Tensor, Tensor]:
    if images.ndim != 2 or images.shape[1] != 3072 or labels.shape != images.shape[:1]:
        raise UsageError(f"{where}: images {tuple(images.shape)} and labels {tuple(labels.shape)} are not CIFAR's")
    if labels.min() < 0 or labels.max() >= classes:
        raise UsageError(f"{where} has label {labels.max().item()}, out of range for {classes} classes")
    return images.reshape(-1, 3, 32, 32).contiguous(), labels
