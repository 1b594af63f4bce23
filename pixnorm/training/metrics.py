"""How far generated images are from real ones: Fréchet distance, inception score, precision and recall of features; and
mean intersection over union of label maps. All arithmetic on features is in float64."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from pixnorm.training.cli import UsageError, extra
from pixnorm.training.features import FeatureNetwork
from pixnorm.training.processes import Processes

ALONE = Processes(0, 1, torch.device("cpu"))


class Moments:
    """Mean and covariance of features that come in batches: those of all of them at once, up to float64's rounding.

    Batches are centred before they are squared, so a mean that is large beside the deviations costs no digits.

    Args:
        features: D.
        device: where batches are expected.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.mean = torch.zeros(features, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(features, features, dtype=torch.float64, device=device)  # Σ (x - mean)(x - mean)ᵀ

    def update(self, features: Tensor) -> None:
        """Add n features (n, D), of any floating-point dtype."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features must be (n, {len(self.mean)}), got {tuple(features.shape)}")
        if len(features):
            features = features.detach().to(self.mean)
            mean = features.mean(dim=0)
            centred = features - mean
            self._scatter.addmm_(centred.T, centred)
            self._join(len(features), mean)

    def merge(self, other: "Moments") -> None:
        """Add what ``other`` has seen."""
        if other.mean.shape != self.mean.shape:
            raise ValueError(f"moments of {len(other.mean)} features do not go with those of {len(self.mean)}")
        if other.count:
            self._scatter += other._scatter.to(self.mean)
            self._join(other.count, other.mean.to(self.mean))

    def _join(self, count: int, mean: Tensor) -> None:
        """Once two scatters are added, the scatter of their two means, and the mean of all.

        Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for sample variances", 1979.
        """
        total = self.count + count
        difference = mean - self.mean
        self._scatter.addmm_(difference[:, None], difference[None], alpha=self.count * count / total)
        self.mean += difference * (count / total)
        self.count = total

    def reduce(self, processes: Processes) -> None:
        """Add what the other processes have seen, if there are any. All of them must call it."""
        if processes.world == 1:
            return
        count = processes.sum(self.mean.new_tensor(self.count))
        mean = processes.sum(self.mean * self.count) / count.clamp(min=1)
        difference = self.mean - mean
        processes.sum(self._scatter.add_(torch.outer(difference, difference), alpha=self.count))
        self.mean, self.count = mean, int(count)

    @property
    def covariance(self) -> Tensor:
        """(D, D), unbiased."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two samples or more, got {self.count}")
        return self._scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|μₐ - μ_b|² + tr Cₐ + tr C_b - 2 tr (Cₐ C_b)^½: the squared 2-Wasserstein distance of two Gaussians.

    With Cₐ = F Fᵀ and C_b = G Gᵀ the last trace is the sum of the singular values of Fᵀ G. Neither a product of two
    covariances, which is not symmetric, nor the square root of rounding errors comes in: with fewer samples than
    features, eigenvalues that are zero up to rounding are left out of F and G.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features have different sizes: {len(a.mean)} and {len(b.mean)}")
    difference = (a.mean.cpu() - b.mean.cpu()).square().sum()
    covariances = a.covariance.cpu(), b.covariance.cpu()
    traces = covariances[0].trace() + covariances[1].trace()
    factors = [_factor(covariance) for covariance in covariances]
    root = torch.linalg.svdvals(factors[0].T @ factors[1]).sum()
    return (difference + traces - 2 * root).clamp(min=0).item()


def _factor(covariance: Tensor) -> Tensor:
    """F (D, rank) with F Fᵀ = covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation over the splits of exp E KL(p(y | x) ‖ p(y)) (arXiv 1606.03498).

    Args:
        logits: (N, classes). They are shuffled first, in the same order as torch-fidelity's.
    """
    if len(logits) < splits:
        raise ValueError(f"{splits} splits need as many images, got {len(logits)}")
    order = extra("numpy").random.RandomState(2020).permutation(len(logits))
    log_p = logits[torch.from_numpy(order).to(logits.device)].double().log_softmax(dim=1)
    scores = []
    for i in range(splits):
        part = log_p[i * len(log_p) // splits : (i + 1) * len(log_p) // splits]
        p = part.exp()
        scores.append((p * (part - p.mean(dim=0).log())).sum(dim=1).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def _squared_distances(a: Tensor, b: Tensor, rows: int = 1024) -> Iterable[Tensor]:
    """|aᵢ - bⱼ|² for ``rows`` of a at a time: (up to rows, len(b)). Exact for small integers."""
    for part in a.split(rows):
        yield torch.addmm(part.square().sum(1, keepdim=True) + b.square().sum(1), part, b.T, alpha=-2).clamp_(min=0)


def _radii(points: Tensor, k: int) -> Tensor:
    """Squared distance of each point to its k-th nearest neighbour; the nearest of all is the point itself."""
    nearest = (rows.topk(k + 1, dim=1, largest=False).values for rows in _squared_distances(points, points))
    return torch.cat([distances[:, -1] for distances in nearest])


def prdc(real: Tensor, fake: Tensor, k: int = 5) -> dict[str, float]:
    """Precision and recall (arXiv 1904.06991, eq. 1 and 2), density and coverage (arXiv 2002.09797, eq. 5 and 6).

    A ball around each point reaches to its k-th nearest neighbour in the same set; points at exactly this distance are
    in it, as in the first paper's equation. Precision: the share of fakes in a real one's ball; density: by how many of
    these balls they are covered, over k; recall: the share of real ones in a fake one's ball; coverage: the share of
    real ones whose ball has a fake.

    Args:
        real, fake: features (N, D) and (M, D), N and M greater than k.
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"features must be (N, D) and (M, D), got {tuple(real.shape)} and {tuple(fake.shape)}")
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(f"k must be from 1 to less than the number of images, got {k} for {len(real)} and {len(fake)}")
    real, fake = real.double(), fake.double()
    real_radii, fake_radii = _radii(real, k), _radii(fake, k)
    precise, dense, recalled, covered = 0, 0, [], torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for distances in _squared_distances(fake, real):
        inside = distances <= real_radii
        precise += inside.any(dim=1).sum().item()
        dense += inside.sum().item()
        covered |= inside.any(dim=0)
    for distances in _squared_distances(real, fake):
        recalled.append((distances <= fake_radii).any(dim=1))
    return {
        "precision": precise / len(fake),
        "recall": torch.cat(recalled).double().mean().item(),
        "density": dense / (k * len(fake)),
        "coverage": covered.double().mean().item(),
    }


class MeanIoU:
    """Intersection over union of each class, summed over a whole set, and its mean over the classes that are present,
    in predictions or in targets.

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int):
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)  # target, prediction

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Add label maps: two tensors of integers from 0 to K - 1, of one shape.

        Raises:
            ValueError: another shape, or a label that is out of range.
        """
        classes = len(self.confusion)
        if pred.shape != target.shape:
            raise ValueError(f"predictions {tuple(pred.shape)} and targets {tuple(target.shape)} differ in shape")
        if not pred.numel():
            return
        pred, target = pred.long().flatten().cpu(), target.long().flatten().cpu()
        for what, labels in (("prediction", pred), ("target", target)):
            if labels.min() < 0 or labels.max() >= classes:
                wrong = labels.min() if labels.min() < 0 else labels.max()
                raise ValueError(
                    f"label {wrong} of a {what} is out of range for {classes} classes (0 to {classes - 1})"
                )
        self.confusion += (target * classes + pred).bincount(minlength=classes**2).view(classes, classes)

    def per_class(self) -> Tensor:
        """float64 (K,), NaN for classes that are absent."""
        intersection = self.confusion.diagonal().double()
        union = self.confusion.sum(dim=0) + self.confusion.sum(dim=1) - intersection
        return intersection / union

    def mean(self) -> float:
        """NaN if there are no pixels."""
        return self.per_class().nanmean().item()

    def accuracy(self) -> float:
        """The share of pixels with the right label."""
        return (self.confusion.trace().double() / self.confusion.sum()).item()


def mean_iou(pred: Tensor, target: Tensor, num_classes: int) -> float:
    """:class:`MeanIoU` of one pair of tensors."""
    total = MeanIoU(num_classes)
    total.update(pred, target)
    return total.mean()


class _Sample:
    """A random sample of ``size`` of the rows that come in batches, in random order: every row draws a number, and
    those with the smallest numbers are kept. (The first rows of a folder would be those of its first class.)"""

    def __init__(self, size: int, seed: int):
        self._size = size
        self._generator = torch.Generator().manual_seed(seed)
        self._rows: list[Tensor] = []
        self._numbers: list[Tensor] = []

    def update(self, rows: Tensor) -> None:
        self._rows.append(rows)
        self._numbers.append(torch.rand(len(rows), generator=self._generator, dtype=torch.float64))
        if sum(map(len, self._rows)) > 2 * self._size:
            self._keep(*self._smallest())

    def _smallest(self) -> tuple[Tensor, Tensor]:
        numbers = torch.cat(self._numbers)
        order = numbers.argsort()[: self._size]
        rows = torch.cat(self._rows)
        return rows[order.to(rows.device)], numbers[order]

    def _keep(self, rows: Tensor, numbers: Tensor) -> None:
        self._rows, self._numbers = [rows], [numbers]

    def reduce(self, processes: Processes) -> None:
        """The sample becomes one of all processes' rows."""
        rows, numbers = self._smallest()
        self._keep(_gathered(rows, processes), _gathered(numbers, processes))

    def rows(self) -> Tensor:
        return self._smallest()[0]


def _gathered(rows: Tensor, processes: Processes) -> Tensor:
    """The rows of all processes, in the order of their ranks."""
    return rows if processes.world == 1 else torch.cat(processes.gather(rows.cpu())).to(rows.device)


@dataclass(frozen=True)
class RealStatistics:
    """What a set of real images is compared by.

    Attributes:
        network: the name of the network whose features these are.
        moments: of all images.
        sample: features of some of the images, for precision and recall: (n, D).
    """

    network: str
    moments: Moments
    sample: Tensor


def _statistics(
    batches: Iterable[Tensor],
    network: FeatureNetwork,
    samples: int,
    seed: int,
    processes: Processes,
    each: Callable[[Tensor], object] | None = None,
) -> RealStatistics:
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    none = torch.empty(0, network.features, device=device)  # gives a process without images the right shapes
    moments, sample = Moments(network.features, device), _Sample(samples, seed)
    for features in chain([none], (network(images.to(device, non_blocking=True)) for images in batches)):
        moments.update(features)
        sample.update(features)
        if each is not None:
            each(features)
    moments.reduce(processes)
    sample.reduce(processes)
    if moments.count < 2:
        raise UsageError(f"scores need two images or more, got {moments.count}")
    return RealStatistics(network.name, moments, sample.rows())


def _seed(seed: int, processes: Processes, made: bool) -> int:
    """Another one for each process, for real and for generated images."""
    return 2 * (seed * processes.world + processes.rank) + made


def real_statistics(
    batches: Iterable[Tensor],
    network: FeatureNetwork,
    *,
    prdc_samples: int = 10_000,
    seed: int = 0,
    processes: Processes = ALONE,
) -> RealStatistics:
    """Of real images, uint8 (n, 3, H, W) at a time; each of the processes passes its share of them."""
    return _statistics(batches, network, prdc_samples, _seed(seed, processes, made=False), processes)


def check_count(network: str, generated: int, real: int, neighbours: int = 5) -> None:
    """Whether there are images enough for all scores.

    Raises:
        UsageError: there are not.
    """
    least = max(neighbours + 1, 10 if network == "inception" else 2)  # 10: parts of the inception score
    if min(generated, real) < least:
        raise UsageError(f"scores need {least} images or more, got {generated} generated and {real} real ones")


def score(
    fake: Iterable[Tensor],
    real: Iterable[Tensor] | RealStatistics,
    network: FeatureNetwork,
    *,
    neighbours: int = 5,
    prdc_samples: int = 10_000,
    seed: int = 0,
    processes: Processes = ALONE,
) -> dict[str, float]:
    """Scores of generated images.

    ``FD-<network>``: Fréchet distance of the network's features. It is ``FID`` for InceptionV3 alone, which also gives
    the inception score and its standard deviation over ten splits, ``IS`` and ``IS-std``. ``precision``, ``recall``,
    ``density`` and ``coverage`` (:func:`prdc`) are of as many real as generated images, at most ``prdc_samples``.

    Args:
        fake: uint8 (n, 3, H, W) at a time.
        real: the same, or what :func:`real_statistics` has made of it with this network.
        neighbours: k of :func:`prdc`.
        seed: for the choice of images for :func:`prdc`.
        processes: those that all call this, each with its share of the images; all get the scores of all images.
    """
    if not isinstance(real, RealStatistics):
        real = real_statistics(real, network, prdc_samples=prdc_samples, seed=seed, processes=processes)
    if real.network != network.name:
        raise ValueError(f"the real images' statistics are of {real.network}'s features, not of {network.name}'s")
    logits: list[Tensor] = []
    each = (lambda features: logits.append(network.logits(features))) if network.is_inception else None
    made = _statistics(fake, network, prdc_samples, _seed(seed, processes, made=True), processes, each)
    scores = {"FID" if network.is_inception else f"FD-{network.name}": frechet_distance(real.moments, made.moments)}
    if network.is_inception:
        scores["IS"], scores["IS-std"] = inception_score(_gathered(torch.cat(logits), processes))
    count = min(len(real.sample), len(made.sample))
    return scores | prdc(real.sample[:count], made.sample[:count], neighbours)
