"""Scores: values computed by hand, closed forms of Gaussians, identities; the networks whose features they compare."""

import math
import re
import sys

import numpy
import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn

from pixnorm.training import features as features_module
from pixnorm.training import metrics
from pixnorm.training.cli import UsageError, extra
from pixnorm.training.data import ImageDataset, load_dataset
from pixnorm.training.features import FeatureNetwork, check_features, feature_network
from pixnorm.training.metrics import (
    MeanIoU,
    Moments,
    RealStatistics,
    frechet_distance,
    inception_score,
    mean_iou,
    prdc,
    real_statistics,
    score,
)
from pixnorm.training.processes import Processes

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]


def moments_of(features: Tensor, *sizes: int) -> Moments:
    moments = Moments(features.shape[1])
    for batch in features.split(sizes or len(features)):
        moments.update(batch)
    return moments


def gaussian(mean: Tensor, covariance: Tensor) -> Moments:
    """The moments of 2 D points that have exactly these."""
    root = torch.linalg.cholesky(covariance.double()).T * math.sqrt((2 * len(mean) - 1) / 2)
    return moments_of(torch.cat((mean + root, mean - root)))


def random_covariance(size: int, seed: int) -> Tensor:
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T / size + 0.1 * torch.eye(size)


def test_moments_of_batches_are_those_of_all():
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7) + 1000
    expected = numpy.cov(features.double().numpy(), rowvar=False)
    halves = moments_of(features[:20], 13, 7), moments_of(features[20:], 1, 29)
    halves[0].merge(halves[1])
    for moments in (moments_of(features), moments_of(features, 1, 1, 48), halves[0]):
        assert moments.count == 50 and moments.covariance.dtype == torch.float64
        torch.testing.assert_close(moments.mean, features.double().mean(0), rtol=1e-13, atol=0)
        torch.testing.assert_close(moments.covariance, torch.from_numpy(expected), rtol=1e-11, atol=1e-11)


def test_nothing_adds_nothing_to_moments():
    moments = moments_of(torch.tensor([[1.0, 2.0], [3.0, 5.0]]))
    moments.update(torch.empty(0, 2))
    moments.merge(Moments(2))
    assert (
        moments.count == 2 and moments.mean.tolist() == [2, 3.5] and moments.covariance.tolist() == [[2, 3], [3, 4.5]]
    )


def test_wrong_moments():
    with pytest.raises(ValueError, match=r"features must be \(n, 3\), got \(2, 4\)"):
        Moments(3).update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="a covariance needs two samples or more, got 1"):
        _ = moments_of(torch.zeros(1, 3)).covariance
    with pytest.raises(ValueError, match="moments of 4 features do not go with those of 3"):
        Moments(3).merge(Moments(4))
    with pytest.raises(ValueError, match="features have different sizes: 3 and 4"):
        frechet_distance(moments_of(torch.zeros(2, 3)), moments_of(torch.zeros(2, 4)))


def test_frechet_distance_of_gaussians():
    zeros, ones, eye = torch.zeros(3), torch.ones(3), torch.eye(3)
    assert frechet_distance(gaussian(zeros, eye), gaussian(ones, 4 * eye)) == pytest.approx(6, abs=1e-12)
    # Covariances that commute: Σ (√λ - √μ)² in their common basis.
    basis = torch.linalg.qr(random_covariance(5, 0)).Q
    values = torch.tensor([1.0, 2, 3, 4, 5]).double(), torch.tensor([9.0, 0.5, 4, 1, 2]).double()
    a, b = (gaussian(torch.zeros(5), basis * value @ basis.T) for value in values)
    assert frechet_distance(a, b) == pytest.approx(
        (values[0].sqrt() - values[1].sqrt()).square().sum().item(), rel=1e-12
    )
    # Any two of two features: tr (A B)^½ = (tr A B + 2 (det A B)^½)^½.
    first, second = random_covariance(2, 1), random_covariance(2, 2)
    product = first @ second
    root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    expected = (first.trace() + second.trace() - 2 * root).item()
    assert frechet_distance(gaussian(torch.zeros(2), first), gaussian(torch.zeros(2), second)) == pytest.approx(
        expected
    )


@pytest.mark.parametrize("samples", [2, 10, 200])
def test_frechet_distance_of_a_set_from_itself(samples):
    """Also of fewer samples than features, where a square root of rounding errors would be far from 0."""
    features = torch.randn(samples, 64, generator=torch.Generator().manual_seed(0)).double() * 30 + 5
    a, b = moments_of(features), moments_of(features.flip(0))
    assert frechet_distance(a, b) < 1e-9 * a.covariance.trace()
    shifted = moments_of(features + 2)
    assert frechet_distance(a, shifted) == pytest.approx(4 * 64, rel=1e-9)
    assert frechet_distance(moments_of(features * 2), a) == frechet_distance(a, moments_of(features * 2))


def test_frechet_distance_of_constant_features():
    assert frechet_distance(moments_of(torch.zeros(3, 2)), moments_of(torch.ones(4, 2))) == 2


def test_prdc_by_hand():
    """On a line, k = 1. Real 0, 2, 5, 11 reach 2, 2, 3, 6; fake 1, 3, 30 reach 2, 2, 27."""
    real, fake = torch.tensor([[0.0], [2], [5], [11]]), torch.tensor([[1.0], [3], [30]])
    # 1 is in the balls of 0 and 2; 3 in those of 2 and 5; 30 in none. The balls of 0, 2 and 5 have a fake in them.
    # 0 is in the ball of 1; 2 in those of 1 and 3; 5 in those of 3 and 30; 11 in that of 30.
    assert prdc(real, fake, k=1) == {"precision": 2 / 3, "recall": 1, "density": 4 / 3, "coverage": 3 / 4}
    assert prdc(real, fake + 1000, k=1) == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


def test_points_at_the_radius_are_inside():
    real = torch.tensor([[0.0, 0], [3, 4], [100, 0]])
    assert prdc(real, torch.tensor([[-5.0, 0], [-6, 0]]), k=1)["precision"] == 0.5


@pytest.mark.parametrize("rows", [7, 1024])
def test_prdc_of_a_set_with_itself(rows, monkeypatch):
    original = metrics._squared_distances
    monkeypatch.setattr(metrics, "_squared_distances", lambda a, b: original(a, b, rows))
    points = torch.randint(-100, 100, (40, 8), generator=torch.Generator().manual_seed(0)).float()  # no rounding
    scores = prdc(points, points, k=3)
    assert (scores["precision"], scores["recall"], scores["coverage"]) == (1, 1, 1)
    assert scores["density"] == pytest.approx(4 / 3, abs=0.02)  # k neighbours and the point itself, but for ties


def test_prdc_tells_lost_modes_from_poor_samples():
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    real = torch.cat((normal(100, 4), normal(100, 4) + 20))
    lost = prdc(real, normal(200, 4))
    assert lost["precision"] > 0.9 and lost["coverage"] < 0.6 and lost["recall"] < 0.6
    wide = prdc(real, 40 * normal(200, 4))
    assert wide["precision"] < 0.1 and wide["density"] < 0.1 and wide["recall"] > lost["recall"]


def test_wrong_prdc():
    with pytest.raises(ValueError, match=r"\(N, D\) and \(M, D\), got \(9, 2\) and \(9, 3\)"):
        prdc(torch.zeros(9, 2), torch.zeros(9, 3))
    with pytest.raises(ValueError, match="k must be from 1 to less than the number of images, got 5 for 9 and 5"):
        prdc(torch.zeros(9, 2), torch.zeros(5, 2))


def test_inception_score():
    certain = torch.eye(5).repeat_interleave(200, 0) * 1e3  # five classes, each as frequent
    mean, deviation = inception_score(certain, splits=1)
    assert mean == pytest.approx(5, rel=1e-12) and deviation == 0
    assert inception_score(torch.zeros(20, 5)) == pytest.approx((1, 0))
    mean, deviation = inception_score(certain)
    assert 4.5 < mean < 5 and deviation > 0
    with pytest.raises(ValueError, match="10 splits need as many images, got 9"):
        inception_score(torch.zeros(9, 5))


def test_mean_iou():
    pred, target = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1])
    assert mean_iou(pred, target, 2) == pytest.approx(0.583333, abs=1e-6)
    assert mean_iou(pred, target, 9) == mean_iou(pred, target, 2)  # classes that are absent do not count
    assert mean_iou(pred, pred, 2) == 1
    assert mean_iou(torch.tensor([0, 2]), torch.tensor([0, 0]), 3) == 0.25  # a class that is only predicted does
    assert math.isnan(mean_iou(pred[:0], target[:0], 2))


def test_mean_iou_sums_over_the_set():
    """The mean of the images' values is another number."""
    total = MeanIoU(3)
    pred, target = torch.tensor([[0, 0], [0, 1]]), torch.tensor([[0, 1], [0, 1]])
    total.update(pred.to(torch.uint8), target)
    total.update(torch.tensor([[1, 1]]), torch.tensor([[1, 0]]))
    assert total.per_class()[:2].tolist() == [2 / 4, 2 / 4] and total.per_class()[2].isnan()
    assert (total.mean(), total.accuracy()) == (0.5, 4 / 6)


def test_wrong_label_maps():
    total = MeanIoU(3)
    total.update(torch.tensor([0]), torch.tensor([0]))
    for pred, target, message in (
        ([3], [0], r"label 3 of a prediction is out of range for 3 classes \(0 to 2\)"),
        ([0], [255], "label 255 of a target is out of range"),
        ([0], [-1], "label -1 of a target"),
        ([0, 1], [0], r"predictions \(2,\) and targets \(1,\) differ in shape"),
    ):
        with pytest.raises(ValueError, match=message):
            total.update(torch.tensor(pred), torch.tensor(target))
    assert total.confusion.sum() == 1


class Pixels(FeatureNetwork):
    """The values of four pixels."""

    name, features = "pixels", 4

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0, 0, :4].float()


def random_images(count: int, seed: int, low: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)


def test_score():
    real, fake = random_images(60, 0), random_images(50, 1, low=100)
    scores = score(fake.split(16), real.split(7), Pixels())
    assert list(scores) == ["FD-pixels", "precision", "recall", "density", "coverage"]
    network = Pixels()
    assert scores["FD-pixels"] == pytest.approx(
        frechet_distance(moments_of(network(real)), moments_of(network(fake))), rel=1e-9
    )
    known = real_statistics(real.split(60), network)
    assert known.moments.count == 60 and len(known.sample) == 60
    assert score([fake], known, network) == pytest.approx(scores, rel=1e-9)
    same = score([real], known, network)
    assert same["FD-pixels"] < 1e-8 and (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)


def test_precision_and_recall_are_of_a_random_sample():
    images = random_images(1000, 0)
    images[:, 0, 0, 0] = torch.arange(1000) // 4  # in order, as files of classes are
    known = real_statistics(images.split(100), Pixels(), prdc_samples=200)
    assert known.sample.shape == (200, 4) and known.moments.count == 1000
    assert abs(known.sample[:, 0].mean() - 124.5) < 20 and abs(known.sample[:50, 0].mean() - 124.5) < 40
    again = real_statistics(images.split(37), Pixels(), prdc_samples=200)
    assert torch.equal(again.sample, known.sample)  # of the images, however they are batched
    assert not torch.equal(real_statistics([images], Pixels(), prdc_samples=200, seed=1).sample, known.sample)


def test_wrong_scores():
    known = RealStatistics("classifier(digits)", moments_of(torch.zeros(2, 4)), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"are of classifier\(digits\)'s features, not of pixels's"):
        score([random_images(9, 0)], known, Pixels())
    with pytest.raises(UsageError, match="scores need two images or more, got 1"):
        real_statistics([random_images(1, 0)], Pixels())


def _score_in_a_process(rank: int, where: str, results: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{where}", rank=rank, world_size=2)
    processes = Processes(rank, 2, torch.device("cpu"))
    real, fake = random_images(61, 0), random_images(2, 1)  # the second process has none
    known = real_statistics(real[rank::2].split(8), Pixels(), processes=processes)
    scores = score([] if rank else [fake], known, Pixels(), neighbours=1, processes=processes)
    network = feature_network("classifier", labelled(rank), processes=processes)
    torch.save((scores, known.moments.covariance, network.state_dict()), f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


def labelled(seed: int) -> ImageDataset:
    images = random_images(30, seed)
    return ImageDataset("noise", images, 8, labels=torch.arange(30) % 3, num_classes=3)


def test_processes_share_the_images(tmp_path):
    """All have the scores of all images, and one and the same classifier, that of the first process."""
    torch.multiprocessing.spawn(_score_in_a_process, (str(tmp_path / "meet"), str(tmp_path)), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    real, fake = random_images(61, 0), random_images(2, 1)
    alone = score([fake], [real], Pixels(), neighbours=1)
    network = feature_network("classifier", labelled(0))
    for scores, covariance, state in results:
        assert scores["FD-pixels"] == pytest.approx(alone["FD-pixels"], rel=1e-10)
        assert scores == results[0][0]
        torch.testing.assert_close(covariance, real_statistics([real], Pixels()).moments.covariance)
        assert all(torch.equal(state[key], value) for key, value in results[0][2].items())
        torch.testing.assert_close(state, network.state_dict())


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", resolution=16)


def test_classifier(digits, tmp_path):
    network = feature_network("classifier", digits, cache=tmp_path)
    assert network.name == "classifier(digits)" and network.accuracy > 0.97
    held_out = load_dataset("digits", resolution=16, split="test")
    features = network(held_out.images(range(len(held_out))))
    assert features.shape == (len(held_out), network.features) and features.dtype == torch.float32
    assert not features.requires_grad and not any(parameter.requires_grad for parameter in network.parameters())
    known = real_statistics(digits.image_batches(), network)
    scores = score(held_out.image_batches(), known, network)
    worse = score([held_out.images(range(len(held_out))).bitwise_and(128)], known, network)
    noise = score([random_images(300, 0)], known, network)
    assert scores["FD-classifier(digits)"] < worse["FD-classifier(digits)"] < noise["FD-classifier(digits)"]
    assert all(scores[key] > 0.8 for key in ("precision", "recall", "coverage"))
    assert noise["precision"] < 0.1 and noise["coverage"] < 0.1

    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    again = feature_network("classifier", digits, cache=tmp_path)
    assert file.stat().st_mtime_ns == written and again.accuracy == network.accuracy
    torch.testing.assert_close(again(held_out.images(range(len(held_out)))), features)
    again.train()
    assert not again.body.training


def test_classifiers_are_trained_once_for_each_set_and_anew_if_a_file_is_broken(tmp_path, monkeypatch):
    trained = []
    original = features_module._train
    monkeypatch.setattr(features_module, "_train", lambda *args: trained.append(args[0].name) or original(*args))
    for seed, count in ((0, 1), (0, 1), (1, 2)):
        feature_network("classifier", labelled(seed), cache=tmp_path / "new" / "folder")
        assert len(trained) == count
    files = sorted((tmp_path / "new" / "folder").iterdir())
    assert len(files) == 2
    for file in files:
        file.write_bytes(file.read_bytes()[:1000])
    first = feature_network("classifier", labelled(0), cache=tmp_path / "new" / "folder")
    assert len(trained) == 3
    assert all(
        torch.equal(value, feature_network("classifier", labelled(0)).state_dict()[key])
        for key, value in first.state_dict().items()
    )  # deterministic
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="the trained classifier cannot be written to"):
        feature_network("classifier", labelled(0), cache=tmp_path / "file")


def test_random_network():
    state = torch.random.get_rng_state()
    networks = [feature_network("random", dataset) for dataset in (None, load_dataset("digits"))]
    assert torch.equal(torch.random.get_rng_state(), state)
    images = random_images(4, 0)
    assert torch.equal(networks[0](images), networks[1](images)) and math.isnan(networks[0].accuracy)
    for size in (5, 32, 70):
        assert networks[0](images[..., :1, :1].expand(-1, -1, size, size)).shape == (4, networks[0].features)
    assert networks[0](images).std() > 0.01 and networks[0].name == "random"
    with pytest.raises(ValueError, match=r"images must be uint8 \(N, 3, H, W\), got torch.float32 \(4, 3, 8, 8\)"):
        networks[0](images.float())


def test_what_networks_need(tmp_path, digits):
    for arguments, message in (
        (("vgg", digits), r"must be one of classifier, random, inception, got 'vgg'"),
        (("classifier", None), "the classifier is trained on labels, and there are no data"),
        (("classifier", load_dataset("digits", labels=False)), r"and digits has none: use the network random"),
        (
            ("inception", digits),
            r"FID needs a file of InceptionV3's weights \(--inception-weights\): https://github.com/",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            check_features(*arguments)
        with pytest.raises(UsageError, match=message):
            feature_network(*arguments)
    with pytest.raises(UsageError, match=r"there is no file .*absent\.pth; InceptionV3's weights are at https://"):
        check_features("inception", digits, weights=tmp_path / "absent.pth")


def test_torch_fidelity_that_cannot_be_imported(tmp_path, monkeypatch):
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"")
    for module in [module for module in sys.modules if module.partition(".")[0] == "torch_fidelity"]:
        monkeypatch.delitem(sys.modules, module)
    (tmp_path / "torch_fidelity.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UsageError, match="torch_fidelity is installed and cannot be imported: operator torchvision::nms"
    ):
        check_features("inception", None, weights=weights)
    monkeypatch.delitem(sys.modules, "torch_fidelity", raising=False)


@pytest.fixture(scope="module")
def torch_fidelity():
    """PyPI's torchvision has no operators for some builds of PyTorch, and then fails on import for lack of their names;
    torch-fidelity imports it, but InceptionV3 does not use it. Names without operators do."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for _ in range(10):
        try:
            module = extra("torch_fidelity", "score")
            break
        except RuntimeError as error:
            for name in [name for name in sys.modules if name.partition(".")[0] in ("torchvision", "torch_fidelity")]:
                del sys.modules[name]
            library.define(re.search(r"operator torchvision::(\w+) does not exist", str(error))[1] + "() -> ()")
    yield module
    library._destroy()


@pytest.fixture(scope="module")
def inception_weights(torch_fidelity, tmp_path_factory):
    """InceptionV3 of random numbers, for which images differ."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    class_ = extra("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(class_, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda *args, **kwargs: None)
        network = class_("inception-v3-compat", ["2048"], feature_extractor_weights_path="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
    torch.save(network.state_dict(), path)
    return path


def test_fid_and_inception_score_are_those_of_torch_fidelity(torch_fidelity, inception_weights):
    class Images(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def __getitem__(self, index):
            return self.images[index]

    real, fake = random_images(4, 0), random_images(10, 1, low=128)
    network = feature_network("inception", weights=inception_weights)
    scores = score(fake.split(5), real.split(5), network, neighbours=2)
    expected = torch_fidelity.calculate_metrics(
        input1=Images(fake),
        input2=Images(real),
        cuda=False,
        isc=True,
        fid=True,
        batch_size=5,
        save_cpu_ram=True,  # no processes for loading
        feature_extractor_weights_path=str(inception_weights),
        verbose=False,
        cache=False,
    )
    assert list(scores) == ["FID", "IS", "IS-std", "precision", "recall", "density", "coverage"]
    assert scores["FID"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    assert scores["IS"] == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert scores["IS-std"] == pytest.approx(expected["inception_score_std"], rel=1e-4)


def test_broken_inception_weights(torch_fidelity, tmp_path):
    path = tmp_path / "weights.pth"
    for content in (b"no weights", None):
        path.write_bytes(content) if content else torch.save({"conv": torch.zeros(3)}, path)
        with pytest.raises(UsageError, match=r"weights\.pth is no file of InceptionV3's weights \(they are at https:"):
            feature_network("inception", weights=path)
