"""Networks whose features scores compare: a classifier trained here on the same data, a random one, InceptionV3.

Only InceptionV3 makes a Fréchet distance an FID. The others need no download; their scores can only be compared with
scores by the same network, which is why its name is in theirs."""

import hashlib
import math
import os
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnorm.training import checkpoint
from pixnorm.training.cli import UsageError, extra
from pixnorm.training.data import ImageDataset
from pixnorm.training.processes import Processes

NETWORKS = ("classifier", "random", "inception")
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
RECIPE = "1"  # of the classifier's architecture and training: cached ones of another recipe are not used
FEATURES = 128
SIZES = (16, 32, 64)  # of the input: the smallest that is not less than the images'
BATCH = 128
HELD_OUT = 10  # one image in ten tells the accuracy


class FeatureNetwork(nn.Module):
    """Features of images. Its parameters need no gradients, and it is always in eval mode.

    Attributes:
        name: what scores are named by.
        features: D.
        is_inception: whether Fréchet distances are FIDs.
        accuracy: of a classifier, on held-out images; NaN otherwise.
    """

    name: str
    features: int
    is_inception = False
    accuracy = math.nan

    def train(self, mode: bool = True) -> "FeatureNetwork":
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) to float32 (N, D)."""
        raise NotImplementedError

    def logits(self, features: Tensor) -> Tensor:
        """Of classes, of the features (N, D), for the inception score."""
        raise NotImplementedError


class _Body(nn.Sequential):
    """Convolutions of stride 2 from ``size`` to 4x4 pixels, then a linear layer: (N, 3, size, size) to (N, D)."""

    def __init__(self, size: int):
        layers: list[nn.Module] = []
        channels, width = 3, 32
        for _ in range(int(math.log2(size // 4))):
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels, width = width, min(2 * width, 128)
        # Normalised, so that Fréchet distances by any of these networks have one scale.
        features = nn.Linear(16 * channels, FEATURES), nn.BatchNorm1d(FEATURES), nn.ReLU(inplace=True)
        super().__init__(*layers, nn.Flatten(), *features)
        self.size = size

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 images of any size as the input: in [-1, 1], means over areas if they are larger."""
        pixels = images.float() / 127.5 - 1
        if images.shape[-2:] == (self.size, self.size):
            return pixels
        if min(images.shape[-2:]) < self.size:
            return F.interpolate(pixels, (self.size, self.size), mode="bilinear", align_corners=False)
        return F.adaptive_avg_pool2d(pixels, self.size)


class _ConvFeatures(FeatureNetwork):
    def __init__(self, name: str, body: _Body, accuracy: float = math.nan):
        super().__init__()
        self.name = name
        self.features = FEATURES
        self.accuracy = accuracy
        self.body = body
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.body(self.body.prepare(_checked(images)))


def _checked(images: Tensor) -> Tensor:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
    return images


class _Inception(FeatureNetwork):
    """torch-fidelity's InceptionV3, which gives the features of TensorFlow's, on which FID and IS are defined."""

    name = "inception"
    features = 2048
    is_inception = True

    def __init__(self, extractor: nn.Module):
        super().__init__()
        self.extractor = extractor

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.extractor(_checked(images))[0]

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        return features.mm(self.extractor.fc.weight.T)  # without the bias: "logits_unbiased", of which IS is


def feature_network(
    name: str,
    dataset: ImageDataset | None = None,
    *,
    weights: Path | None = None,
    cache: Path | None = None,
    device: torch.device | str = "cpu",
    processes: Processes | None = None,
) -> FeatureNetwork:
    """The network with this name, one of :data:`NETWORKS`.

    Args:
        name:
            ``classifier``: a small convolutional network, trained on the data set's labels unless ``cache`` has a
            trained one. It sees at most 64x64 pixels. Its score is named "FD-classifier(<data set>)".
            ``random``: the same network as it is initialised, always with the same numbers.
            ``inception``: InceptionV3 by torch-fidelity.
        dataset: the classifier's; for ``random``, its resolution matters alone (32 without a data set).
        weights: a file with InceptionV3's.
        cache: a folder for trained classifiers.
        device: where the network is trained and used.
        processes: those that all call this: the first trains the classifier or reads it, for all.

    Raises:
        UsageError: what is needed is missing.
    """
    check_features(name, dataset, weights=weights)
    if name == "inception":
        return _inception(Path(weights)).to(device)
    resolution = 32 if dataset is None else dataset.resolution
    size = next((size for size in SIZES if resolution <= size), SIZES[-1])
    if name == "random":
        return _ConvFeatures("random", _random_body(size)).to(device)
    trained = None
    if processes is None or processes.first:
        trained = _trained(dataset, size, cache, torch.device(device))
    if processes is not None:
        trained = processes.gather(trained)[0]
    body = _Body(size)
    body.load_state_dict(trained["body"])
    return _ConvFeatures(f"classifier({dataset.name})", body, trained["accuracy"]).to(device)


def check_features(name: str, dataset: ImageDataset | None, *, weights: Path | None = None) -> None:
    """Whether :func:`feature_network` has what it needs, without work.

    Raises:
        UsageError: it has not.
    """
    if name not in NETWORKS:
        raise UsageError(f"the network for scores must be one of {', '.join(NETWORKS)}, got {name!r}")
    if name == "classifier" and (dataset is None or not dataset.num_classes):
        what = "there are no data" if dataset is None else f"{dataset.name} has none"
        raise UsageError(f"the classifier is trained on labels, and {what}: use the network random or inception")
    if name == "inception":
        if weights is None:
            raise UsageError(f"FID needs a file of InceptionV3's weights (--inception-weights): {INCEPTION_URL}")
        if not Path(weights).is_file():
            raise UsageError(f"there is no file {weights}; InceptionV3's weights are at {INCEPTION_URL}")
        _extractor_class()


def _extractor_class() -> type:
    try:
        return extra("torch_fidelity.feature_extractor_inceptionv3", "score").FeatureExtractorInceptionV3
    except UsageError:
        raise
    except Exception as error:  # a torchvision for another PyTorch raises RuntimeError, for instance
        raise UsageError(f"torch_fidelity is installed and cannot be imported: {error}") from error


def _inception(weights: Path) -> FeatureNetwork:
    extractor = _extractor_class()
    try:
        torch.load(weights, map_location="cpu", weights_only=True)  # torch-fidelity would run what a pickle says
        return _Inception(extractor("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)))
    except Exception as error:
        raise UsageError(
            f"{weights} is no file of InceptionV3's weights (they are at {INCEPTION_URL}): {error}"
        ) from error


def _random_body(size: int) -> _Body:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = _Body(size)
        for layer in body:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # so that features vary as pixels do
    return body


def default_cache() -> Path:
    """Where the commands keep trained classifiers: $XDG_CACHE_HOME/pixnorm, or ~/.cache/pixnorm."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pixnorm"


def _trained(dataset: ImageDataset, size: int, cache: Path | None, device: torch.device) -> dict:
    """The classifier's ``body`` (a state dict) and ``accuracy``, from the cache if it is there."""
    if cache is None:
        return _train(dataset, size, device)
    fingerprint = hashlib.sha256(f"{RECIPE} {size} {dataset.fingerprint()}".encode()).hexdigest()
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", dataset.name)
    path = Path(cache) / f"classifier-{stem}-{fingerprint[:16]}.pt"
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        if found["fingerprint"] == fingerprint:
            return found
    except Exception:  # missing, cut off, of another program: trained again
        pass
    trained = {"fingerprint": fingerprint, **_train(dataset, size, device)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(path, trained)
    except OSError as error:
        raise UsageError(f"the trained classifier cannot be written to {path}: {error}") from error
    return trained


def _train(dataset: ImageDataset, size: int, device: torch.device) -> dict:
    """At most 1000 batches, at most 20 epochs; one image in ten is held out. Deterministic on the CPU."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.arange(len(dataset))
    held_out = numbers[numbers % HELD_OUT == HELD_OUT - 1]
    used = numbers[numbers % HELD_OUT != HELD_OUT - 1]
    body = _random_body(size).to(device)
    head = nn.Linear(FEATURES, dataset.num_classes).to(device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    parameters = [*body.parameters(), *head.parameters()]
    per_epoch = max(1, len(used) // BATCH)
    steps = min(1000, 20 * per_epoch)
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    progress = extra("tqdm").trange(
        steps, desc=f"classifier of {dataset.name}", disable=None
    )  # None: on terminals only
    with torch.enable_grad():
        for step in progress:
            if step % per_epoch == 0:
                order = used[torch.randperm(len(used), generator=generator)]
            chosen = order[step % per_epoch * BATCH :][:BATCH]
            logits = head(body(body.prepare(dataset.images(chosen).to(device))))
            loss = F.cross_entropy(logits, dataset.labels[chosen].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    body.eval()
    right = 0
    with torch.no_grad():
        for part in held_out.split(BATCH):
            guess = head(body(body.prepare(dataset.images(part).to(device)))).argmax(dim=1)
            right += (guess.cpu() == dataset.labels[part]).sum().item()
    state = {name: value.cpu() for name, value in body.state_dict().items()}
    return {"body": state, "accuracy": right / max(1, len(held_out))}
