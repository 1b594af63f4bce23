"""Sets of images in every format, written by the test as their authors write them, and the scaling of pixels."""

import gzip
import io
import pickle
import tarfile

import numpy
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pixnorm.training.cli import UsageError, extra
from pixnorm.training.data import FASHION_MNIST, load_dataset, scale_images, unscale_images

pytestmark = pytest.mark.cpu


def random_bytes(*shape: int, seed: int = 0) -> numpy.ndarray:
    return numpy.random.default_rng(seed).integers(0, 256, shape, dtype=numpy.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def test_scaling_is_undone_for_every_grey_value():
    grey = torch.arange(256, dtype=torch.uint8).repeat(500)
    for seed in range(4):
        scaled = scale_images(grey, torch.Generator().manual_seed(seed))
        assert scaled.dtype == torch.float32 and scaled.min() >= -1 and scaled.max() < 1
        assert torch.equal(unscale_images(scaled), grey)
    assert torch.equal(scale_images(grey, dither=False), grey / 128 - 1)


def test_dither_is_uniform_and_of_the_generator():
    grey = torch.full((100_000,), 7, dtype=torch.uint8)
    dither = (scale_images(grey, torch.Generator().manual_seed(1)) - (7 / 128 - 1)) * 128
    assert abs(dither.mean() - 0.5) < 0.005 and abs(dither.var() - 1 / 12) < 0.002
    assert 0 <= dither.min() < 1e-3 and 0.999 < dither.max() < 1
    assert torch.equal(*(scale_images(grey, torch.Generator().manual_seed(1)) for _ in range(2)))


def test_what_is_out_of_range_is_clamped():
    values = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.9999, 1.0, 3.0, torch.inf, -torch.inf, torch.nan])
    assert unscale_images(values).tolist() == [0, 0, 0, 128, 255, 255, 255, 255, 0, 0]
    assert unscale_images(values.bfloat16()).dtype == torch.uint8


def test_digits():
    train, test = (load_dataset("digits", split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1438, 359) and train.num_classes == 10 and train.name == "digits"
    image, label = train[0]
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8 and torch.equal(image[0], image[2])
    assert label.dtype == torch.int64 and label.ndim == 0 and label == 0
    own = load_dataset("digits", resolution=8)
    assert set(own.images(range(50)).unique().tolist()) <= {round(grey * 255 / 16) for grey in range(17)}
    unlabelled = load_dataset("digits", labels=False)
    assert len(unlabelled[3]) == 1 and (unlabelled.num_classes, unlabelled.class_names) == (0, ())


def test_loaders_batch_items():
    dataset = load_dataset("digits")
    images, labels = next(iter(DataLoader(dataset, batch_size=5)))
    assert images.shape == (5, 3, 32, 32) and torch.equal(labels, dataset.labels[:5])
    assert torch.equal(images, dataset.images([0, 1, 2, 3, 4]))
    sizes = [len(batch) for batch in dataset.image_batches(range(10), batch=4)]
    assert sizes == [4, 4, 2] and sum(map(len, dataset.image_batches(batch=500))) == len(dataset)
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def idx(array: numpy.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.tobytes()


@pytest.mark.parametrize("compressed", [True, False])
def test_fashion_mnist(tmp_path, compressed):
    images, labels = random_bytes(6, 28, 28), numpy.array([0, 9, 1, 2, 3, 9], dtype=numpy.uint8)
    for name, array in (("t10k-images-idx3-ubyte", images), ("t10k-labels-idx1-ubyte", labels)):
        if compressed:
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (tmp_path / name).write_bytes(idx(array))
    dataset = load_dataset(f"fashion-mnist:{tmp_path}", split="test")
    assert dataset.labels.tolist() == labels.tolist() and dataset.class_names[9] == "ankle boot"
    assert torch.equal(dataset[1][0][1, 2:-2, 2:-2], torch.from_numpy(images[1]))
    assert dataset.resolution == 32 and not dataset[1][0][:, :2].any() and not dataset[1][0][..., -2:].any()
    assert torch.equal(
        load_dataset(f"fashion-mnist:{tmp_path}", split="test", resolution=28)[0][0][0], torch.from_numpy(images[0])
    )
    with pytest.raises(UsageError, match=r"neither train-images-idx3-ubyte.gz nor train-images"):
        load_dataset(f"fashion-mnist:{tmp_path}")


def test_broken_idx(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(random_bytes(2, 28, 28))[:-1])
    with pytest.raises(UsageError, match="train-images-idx3-ubyte is no idx file of bytes, or is cut off"):
        load_dataset(f"fashion-mnist:{tmp_path}")
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(random_bytes(2, 28, 28)))[:-20])
    with pytest.raises(UsageError, match=r"train-images-idx3-ubyte.gz cannot be read"):
        load_dataset(f"fashion-mnist:{tmp_path}")
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(random_bytes(2, 28, 28))))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(random_bytes(3)))
    with pytest.raises(UsageError, match=r"images \(2, 28, 28\) and labels \(3,\) are not Fashion-MNIST's"):
        load_dataset(f"fashion-mnist:{tmp_path}")


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_debian():
    dataset = load_dataset("fashion-mnist", split="test")
    assert len(dataset) == 10_000 and torch.equal(dataset.labels.bincount(), torch.full((10,), 1000))


def cifar_files(classes: int, binary: bool) -> tuple[dict[str, bytes], numpy.ndarray, list[int]]:
    """Content of the files, and what they hold: two images a file."""
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if classes == 10 else ["train", "test"]
    images = random_bytes(2 * len(names), 3072)
    labels = [(7 * i) % classes for i in range(len(images))]
    files = {}
    for i, name in enumerate(names):
        rows, targets = images[2 * i : 2 * i + 2], labels[2 * i : 2 * i + 2]
        if binary:
            coarse = b"" if classes == 10 else b"\3"
            files[f"{name}.bin"] = b"".join(
                coarse + bytes([label]) + row.tobytes() for row, label in zip(rows, targets, strict=True)
            )
        else:
            batch = {b"data": rows, b"labels" if classes == 10 else b"fine_labels": targets, b"batch_label": b"one"}
            files[name] = pickle.dumps(batch, protocol=2)
    words = [f"class{i}" for i in range(classes)]
    if binary:
        files["batches.meta.txt" if classes == 10 else "fine_label_names.txt"] = ("\n".join(words) + "\n\n").encode()
    else:
        key = "label_names" if classes == 10 else "fine_label_names"
        files["batches.meta" if classes == 10 else "meta"] = pickle.dumps({key: words})
    return files, images.reshape(-1, 3, 32, 32), labels


@pytest.mark.parametrize("packed", ["archive", "folder", "folder around"])
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "python"])
@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(tmp_path, classes, binary, packed):
    files, images, labels = cifar_files(classes, binary)
    where = tmp_path / "cifar"
    if packed == "archive":
        where = tmp_path / "cifar.tar.gz"
        with tarfile.open(where, "w:gz") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(f"cifar-batches/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    else:
        folder = where if packed == "folder" else where / "cifar-batches"
        folder.mkdir(parents=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
    train, test = (load_dataset(f"cifar{classes}:{where}", split=split) for split in ("train", "test"))
    assert torch.equal(torch.cat([*train.image_batches(), *test.image_batches()]), torch.from_numpy(images))
    assert torch.cat((train.labels, test.labels)).tolist() == labels
    assert (len(test), train.num_classes, train.class_names[7]) == (2, classes, "class7")
    assert train.name == f"cifar{classes}"


def test_pickles_of_numpy_of_any_age():
    """The published files name numpy.core, those written by NumPy 2 numpy._core; protocol 5 has another constructor."""
    from pixnorm.training.files import _unpickled

    array = random_bytes(3, 4)
    for protocol in (2, 4, 5):
        content = pickle.dumps({b"data": array}, protocol=protocol)
        for module in (b"numpy.core.", b"numpy._core."):
            if protocol == 2:  # names are lines, without lengths
                content = content.replace(b"numpy._core.", module).replace(b"numpy.core.", module)
            assert numpy.array_equal(_unpickled(content, "")[b"data"], array)


class Malicious:
    def __reduce__(self):
        return (print, ("code has run",))


def test_pickles_run_no_code(tmp_path, capsys):
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (tmp_path / name).write_bytes(pickle.dumps({b"data": Malicious()}))
    with pytest.raises(UsageError, match=r"data_batch_1 is no pickle of arrays: it asks for builtins\.print"):
        load_dataset(f"cifar10:{tmp_path}")
    assert not capsys.readouterr().out


def test_broken_cifar(tmp_path):
    with pytest.raises(
        UsageError, match=r"lacks files of CIFAR-10: data_batch_1, .*, data_batch_5, or with the suffix"
    ):
        load_dataset(f"cifar10:{tmp_path}")
    with pytest.raises(UsageError, match=r"cifar10 needs the path of its archive or folder: cifar10:PATH"):
        load_dataset("cifar10")
    (tmp_path / "train.bin").write_bytes(bytes(3073))
    with pytest.raises(UsageError, match=r"train\.bin has 3073 bytes, not a multiple of 3074"):
        load_dataset(f"cifar100:{tmp_path}")
    (tmp_path / "train.bin").write_bytes(bytes([0, 100]) + bytes(3072))
    with pytest.raises(UsageError, match=r"train\.bin has label 100, out of range for 100 classes"):
        load_dataset(f"cifar100:{tmp_path}")
    (tmp_path / "not.tar.gz").write_bytes(b"text")
    with pytest.raises(UsageError, match=r"not\.tar\.gz is neither a folder nor a readable \.tar\.gz"):
        load_dataset(f"cifar10:{tmp_path / 'not.tar.gz'}")


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 8, 8, 1), (4, 8, 8, 3), (4, 3, 8, 8), (4, 1, 8, 8)])
def test_npz(tmp_path, shape):
    images = random_bytes(*shape)
    numpy.savez(tmp_path / "some.npz", images=images, labels=numpy.array([0, 2, 1, 2]))
    dataset = load_dataset(str(tmp_path / "some.npz"))
    assert (dataset.name, dataset.num_classes, dataset.resolution, len(dataset)) == ("some", 3, 8, 4)
    channels_last = shape if images.ndim == 4 and shape[-1] < 4 else None
    expected = torch.from_numpy(images.transpose(0, 3, 1, 2) if channels_last else images).reshape(4, -1, 8, 8)
    assert torch.equal(dataset.images([0, 1, 2, 3]), expected.expand(4, 3, 8, 8))
    assert dataset[1][1] == 2


def test_npz_without_names(tmp_path):
    numpy.savez(tmp_path / "samples.npz", random_bytes(2, 6, 6, 3))
    assert load_dataset(str(tmp_path / "samples.npz")).num_classes == 0


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"x": random_bytes(2, 8, 8)}, "has no array 'images', only x"),
        ({"images": random_bytes(2, 8, 8).astype("float32")}, "images must be uint8, got float32"),
        ({"images": random_bytes(2, 8, 8, 4)}, r"have 1 or 3 channels, .* got \(2, 8, 8, 4\)"),
        ({"images": random_bytes(0, 8, 8)}, r"has no images: their shape is \(0, 8, 8\)"),
        ({"images": random_bytes(2, 8, 8), "labels": numpy.arange(3)}, r"one for each of 2 images, got int64 \(3,\)"),
        ({"images": random_bytes(2, 8, 8), "labels": numpy.array([0, -1])}, "labels must be integers from 0"),
        ({"images": random_bytes(2, 8, 8), "labels": numpy.zeros(2)}, r"got float64 \(2,\)"),
        ({"images": numpy.array([None])}, "cannot be read as .npz"),
    ],
)
def test_broken_npz(tmp_path, arrays, message):
    numpy.savez(tmp_path / "broken.npz", **arrays)
    with pytest.raises(UsageError, match=message):
        load_dataset(str(tmp_path / "broken.npz"))


def test_folder(tmp_path):
    colours = random_bytes(16, 16, 3)
    save(tmp_path / "b.png", colours)
    save(tmp_path / "a.png", colours[..., 0])  # grey
    save(tmp_path / "deep" / "c.PNG", numpy.concatenate((colours, colours[..., :1]), axis=2))  # transparent
    save(tmp_path / ".hidden" / "d.png", colours)
    (tmp_path / "notes.txt").write_text("no image")
    dataset = load_dataset(str(tmp_path))
    assert (len(dataset), dataset.num_classes, dataset.resolution) == (3, 0, 16) and dataset.name == tmp_path.name
    expected = torch.from_numpy(colours).permute(2, 0, 1)
    assert torch.equal(dataset[0][0], expected[:1].expand(3, -1, -1))
    assert torch.equal(dataset[1][0], expected) and torch.equal(dataset[2][0], expected)
    assert torch.equal(dataset.images([2, 0]), torch.stack((dataset[2][0], dataset[0][0])))


def test_images_are_cropped_and_resized(tmp_path):
    wide = random_bytes(8, 14, 3)
    save(tmp_path / "wide.png", wide)
    square = torch.from_numpy(wide[:, 3:11]).permute(2, 0, 1).double()
    means = torch.nn.functional.avg_pool2d(square, 2)
    image = load_dataset(str(tmp_path), resolution=4)[0][0]
    assert (image - means).abs().max() <= 1  # Pillow rounds after rows and after columns
    assert torch.equal(load_dataset(str(tmp_path))[0][0], square.byte())
    for resolution in (5, 12):
        assert load_dataset(str(tmp_path), resolution=resolution)[0][0].shape == (3, resolution, resolution)


def test_folder_of_classes(tmp_path):
    for name in ("dog/1.png", "cat/2.png", "cat/more/3.png"):
        save(tmp_path / "train" / name, random_bytes(4, 4, 3))
    save(tmp_path / "test" / "dog" / "4.png", random_bytes(4, 4, 3))
    dataset = load_dataset(str(tmp_path / "train"))
    assert dataset.class_names == ("cat", "dog") and dataset.labels.tolist() == [0, 0, 1] and len(dataset[0]) == 2
    assert load_dataset(str(tmp_path / "train"), labels=False).num_classes == 0
    test = load_dataset(str(tmp_path), split="test")
    assert (len(test), test.num_classes, test.name) == (1, 0, tmp_path.name)  # one subfolder makes no classes
    save(tmp_path / "train" / "stray.png", random_bytes(4, 4, 3))
    assert load_dataset(str(tmp_path / "train")).num_classes == 0


def test_pairs(tmp_path):
    for i in range(3):
        save(tmp_path / "images" / f"{i}.jpg", random_bytes(8, 12, 3))
    maps = [random_bytes(8, 12, seed=i) % 5 for i in range(3)]
    save(tmp_path / "maps" / "0.png", maps[0])
    palette = Image.fromarray(maps[1], "P")
    palette.putpalette(list(random_bytes(768)))
    palette.save(tmp_path / "maps" / "1.png")
    save(tmp_path / "maps" / "2.png", maps[2])
    dataset = load_dataset(str(tmp_path / "images"), maps=str(tmp_path / "maps"))
    assert (dataset.label_channels, dataset.num_classes, dataset.resolution) == (5, 0, 8)
    for (_, segmap), expected in zip((dataset[i] for i in range(3)), maps, strict=True):
        assert segmap.dtype == torch.uint8 and torch.equal(segmap, torch.from_numpy(expected[:, 2:10]))
    small = load_dataset(str(tmp_path / "images"), maps=str(tmp_path / "maps"), resolution=4)[0]
    assert small[0].shape == (3, 4, 4) and small[1].shape == (4, 4)
    assert all(
        value in maps[0][2 * i : 2 * i + 2, 2 + 2 * j : 4 + 2 * j] for (i, j), value in numpy.ndenumerate(small[1])
    )

    (tmp_path / "maps" / "labels.txt").write_text("sky\nface\n\nhair\neye\nnose\nmouth\n")
    named = load_dataset(str(tmp_path / "images"), maps=str(tmp_path / "maps"))
    assert named.label_channels == 6 and named.class_names[2] == "hair"
    (tmp_path / "maps" / "labels.txt").write_text("sky\nface\nhair\neye\n")
    with pytest.raises(UsageError, match=r"maps/0\.png has label 4, out of range for 4 labels \(0 to 3\)"):
        load_dataset(str(tmp_path / "images"), maps=str(tmp_path / "maps"))


def test_broken_pairs(tmp_path):
    images, maps = tmp_path / "images", tmp_path / "maps"
    for i in range(3):
        save(images / f"{i}.png", random_bytes(8, 8, 3))
        save(maps / f"{i}.png", random_bytes(8, 8) % 3)

    def message(match: str):
        with pytest.raises(UsageError, match=match):
            load_dataset(str(images), maps=str(maps))

    save(maps / "1.png", numpy.full((8, 8), 255, dtype=numpy.uint8))
    message(r"maps/1\.png has label 255 \(void\); labels must be 0, 1, \.\.\.")
    save(maps / "1.png", random_bytes(8, 8, 3))
    message(r"maps/1\.png is no label map: it has mode RGB")
    save(maps / "1.png", random_bytes(8, 8) % 3)
    save(maps / "0.png", random_bytes(8, 6) % 3)
    message(r"maps/0\.png \(6x8\) has not the proportions of its image \(8x8\)")
    (maps / "0.png").unlink()
    message(r"maps has nothing named 0 \(1 of 3 missing\)")
    save(maps / "1.bmp", random_bytes(8, 8) % 3)
    message(r"maps/1\.bmp and .*maps/1\.png have one name")
    with pytest.raises(UsageError, match="label maps go with a folder of images, and digits is none"):
        load_dataset("digits", maps=str(maps))
    with pytest.raises(UsageError, match=r"digits does not exist"):
        load_dataset(str(images), maps="digits")


def test_broken_folders(tmp_path):
    with pytest.raises(UsageError, match=r"has no images \(.bmp, "):
        load_dataset(str(tmp_path))
    with pytest.raises(UsageError, match="nowhere does not exist; data are digits, fashion-mnist"):
        load_dataset("nowhere")
    with pytest.raises(UsageError, match="split must be train or test, got 'val'"):
        load_dataset("digits", split="val")
    with pytest.raises(UsageError, match="resolution must be positive, got 0"):
        load_dataset("digits", resolution=0)
    with pytest.raises(UsageError, match="has no test split"):
        load_dataset(str(tmp_path), split="test")
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(UsageError, match=r"a\.tar is neither a folder nor \.npz"):
        load_dataset(str(tmp_path / "a.tar"))
    save(tmp_path / "deep.png", random_bytes(4, 4).astype("uint16") * 257)
    with pytest.raises(UsageError, match=r"deep\.png has more than 8 bits per channel \(mode I;16\)"):
        load_dataset(str(tmp_path))
    (tmp_path / "deep.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"deep\.png cannot be read as an image"):
        load_dataset(str(tmp_path))
    save(tmp_path / "deep.png", random_bytes(64, 64, 3))
    (tmp_path / "deep.png").write_bytes((tmp_path / "deep.png").read_bytes()[:5000])
    with pytest.raises(UsageError, match=r"deep\.png cannot be read as an image: .*truncated"):
        load_dataset(str(tmp_path))


def test_fingerprints_tell_sets_apart(tmp_path):
    digits = [
        load_dataset("digits"),
        load_dataset("digits", labels=False),
        load_dataset("digits", resolution=16),
        load_dataset("digits", split="test"),
    ]
    save(tmp_path / "0.png", random_bytes(4, 4, 3))
    folder = load_dataset(str(tmp_path))
    prints = [dataset.fingerprint() for dataset in (*digits, folder)]
    assert len(set(prints)) == 5
    assert load_dataset("digits").fingerprint() == prints[0]
    save(tmp_path / "0.png", random_bytes(5, 5, 3))
    assert folder.fingerprint() != prints[4]


def test_missing_packages_are_named(monkeypatch):
    with pytest.raises(UsageError, match=r"absent_package is not installed: pip install 'pixnorm\[score\]'"):
        extra("absent_package.part", "score")
    assert extra("PIL.Image") is Image


def test_what_an_installed_package_lacks_is_another_error(tmp_path, monkeypatch):
    (tmp_path / "present_package.py").write_text("import absent_package")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'absent_package'"):
        extra("present_package")
