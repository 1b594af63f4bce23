"""Spatially adaptive normalisation."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnorm.functional import label_conv2d
from pixnorm.nn._label_patches import LabelPatches
from pixnorm.nn._leaf import traced
from pixnorm.nn.batchnorm import ModulatedNorm2d
from pixnorm.ops.label_conv import check_labels


class SPADE2d(ModulatedNorm2d):
    r"""SPADE (arXiv 1903.07291; NVlabs/SPADE): a norm whose scale and shift are maps, made from a label map:

    ``y = (1 + γ) · x̂ + β``, with ``[γ, β] = conv(relu(conv(labels)))``, the label map nearest-resized to x.

    Where the map holds integer labels, the first convolution is a gather (:func:`pixnorm.functional.label_conv2d`), and
    no one-hot tensor is made. On the CPU, both convolutions are computed for the distinct neighbourhoods of labels
    only, if these are few, as in segments.

    Args:
        num_features: C, the channels of the input.
        label_channels: L, the number of labels.
        hidden_channels: between the two convolutions.
        kernel_size: of both convolutions, odd.
        statistics: ``"batch"`` or ``"instance"``.
        eps, momentum, track_running_stats, device, dtype: as in ``nn.BatchNorm2d``.
        upsample, activation, negative_slope, impl: as in :func:`pixnorm.functional.modulated_norm`.
        process_group: the processes whose batches are normalised as one, as :func:`pixnorm.convert_sync` sets it.

    Shape:
        x (N, C, H, W) and a label map: one-hot or soft (N, L, h, w), or integers (N, h, w) of int64; to
        (N, C, H * upsample, W * upsample).

    Parameters ``shared_weight`` (hidden, L, k, k) and ``shared_bias`` (hidden); ``weight`` (2C, hidden, k, k) and
    ``bias`` (2C): scales, then shifts. They start as those of ``nn.Conv2d``. Buffers as in ``nn.BatchNorm2d``.

    Raises:
        ValueError: an argument is out of range, or the label map does not fit.
    """

    def __init__(
        self,
        num_features: int,
        label_channels: int,
        hidden_channels: int = 128,
        kernel_size: int = 3,
        statistics: str = "batch",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        upsample: int = 1,
        activation: str | None = None,
        impl: str = "auto",
        device=None,
        dtype=None,
        *,
        negative_slope: float = 0.2,
        process_group=None,
    ):
        for name, value in (("label_channels", label_channels), ("hidden_channels", hidden_channels)):
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        super().__init__(
            num_features,
            eps,
            momentum,
            track_running_stats,
            upsample,
            activation,
            negative_slope,
            impl,
            gamma_offset=1.0,
            statistics=statistics,
            device=device,
            dtype=dtype,
            process_group=process_group,
        )
        self.label_channels, self.hidden_channels, self.kernel_size = label_channels, hidden_channels, kernel_size

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.shared_weight = parameter(hidden_channels, label_channels, kernel_size, kernel_size)
        self.shared_bias = parameter(hidden_channels)
        self.weight = parameter(2 * num_features, hidden_channels, kernel_size, kernel_size)
        self.bias = parameter(2 * num_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew, and reset the running statistics."""
        self.reset_running_stats()
        for weight, bias in ((self.shared_weight, self.shared_bias), (self.weight, self.bias)):
            nn.init.kaiming_uniform_(weight, a=5**0.5)  # as nn.Conv2d
            bound = weight[0].numel() ** -0.5
            nn.init.uniform_(bias, -bound, bound)

    def forward(self, input: Tensor, segmap: Tensor, patches: LabelPatches | None = None) -> Tensor:
        """Normalise the input, then scale and shift each pixel as the label map says.

        Layers that share a map of the output's size may share its ``patches``, ``LabelPatches.of(segmap, L, impl)``.
        """
        if (node := traced(self, input, segmap)) is not None:
            return node
        check_label_map(segmap, self.label_channels, input.shape[0])
        return self._modulated(input, *self._maps(input, segmap, patches))

    def _maps(self, x: Tensor, segmap: Tensor, patches: LabelPatches | None) -> list[Tensor]:
        """Scale and shift."""
        shared = self.shared_weight, self.shared_bias
        # One convolution for both is not faster, and its output would have to be split, and its gradient joined.
        halves = list(zip(self.weight.chunk(2), self.bias.chunk(2), strict=True))
        resized = resized_map(segmap, [side * self.upsample for side in x.shape[2:]])
        if resized.dim() == 3:
            check_labels(resized, self.label_channels)
            if patches is None:
                patches = LabelPatches.of(resized, self.label_channels, self.impl)
            elif patches and (patches.index.shape, patches.label_channels) != (resized.shape, self.label_channels):
                raise ValueError(
                    f"the patches are of {patches.label_channels} labels in a map of shape "
                    f"{tuple(patches.index.shape)}, for {self.label_channels} in one of shape {tuple(resized.shape)}"
                )
            if patches and self.kernel_size == 3:
                hidden = patches.hidden(*shared)
                return [patches.map(hidden, *half, like=x) for half in halves]
            impl = "auto" if self.impl == "native" else self.impl  # its native kernels are for the CPU alone
            hidden = label_conv2d(resized, *shared, "relu", impl=impl)
        else:
            hidden = F.relu(F.conv2d(resized.to(self.shared_weight.dtype), *shared, padding=self.kernel_size // 2))
        return [F.conv2d(hidden, *half, padding=self.kernel_size // 2) for half in halves]

    def load_nvlabs_spade(self, state_dict: dict[str, Tensor]) -> None:
        """Load a SPADE layer of NVlabs/SPADE: keys ``param_free_norm.*``, ``mlp_shared.0.*``, ``mlp_gamma.*``,
        ``mlp_beta.*``.

        Raises:
            RuntimeError: keys are missing or unexpected, or shapes differ, as in ``load_state_dict``.
        """
        self.load_state_dict(from_nvlabs_spade(state_dict))

    def extra_repr(self) -> str:
        sizes = f", label_channels={self.label_channels}, hidden_channels={self.hidden_channels}"
        return super().extra_repr() + sizes + f", kernel_size={self.kernel_size}"


def nearest_labels(labels: Tensor, size: Sequence[int]) -> Tensor:
    """Labels (N, h, w) at another size, as ``F.interpolate(mode="nearest")`` picks them: source index ⌊i h / H⌋."""
    rows, columns = (
        (torch.arange(to, device=labels.device) * (side / to)).to(torch.int64).clamp(max=side - 1)
        for side, to in zip(labels.shape[1:], size, strict=True)
    )
    return labels[:, rows[:, None], columns]


def resized_map(segmap: Tensor, size: Sequence[int]) -> Tensor:
    """A label map, integers (N, h, w) or soft (N, L, h, w), nearest-resized; itself if it has that size."""
    if tuple(segmap.shape[-2:]) == tuple(size):
        return segmap
    return nearest_labels(segmap, size) if segmap.dim() == 3 else F.interpolate(segmap, size, mode="nearest")


def check_label_map(segmap: Tensor, label_channels: int, batch: int | None = None) -> None:
    """A label map holds integers (N, h, w) or is one-hot or soft (N, L, h, w); ``batch`` is N, where it is known.

    Raises:
        ValueError: it does not.
    """
    labels = segmap.dim() == 3 and segmap.dtype == torch.int64
    soft = segmap.dim() == 4 and segmap.is_floating_point() and segmap.shape[1] == label_channels
    if not (labels or soft) or (batch is not None and segmap.shape[0] != batch):
        n = "N" if batch is None else batch
        wanted = f"({n}, h, w) of torch.int64 or ({n}, {label_channels}, h, w) of floating point"
        raise ValueError(f"the label map must be {wanted}, got {tuple(segmap.shape)} of {segmap.dtype}")


def from_nvlabs_spade(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a SPADE layer of NVlabs/SPADE with the keys of :class:`SPADE2d`; other keys stay."""
    renamed = {
        "mlp_shared.0.weight": "shared_weight",
        "mlp_shared.0.bias": "shared_bias",
        **{f"param_free_norm.{name}": name for name in ("running_mean", "running_var", "num_batches_tracked")},
    }
    own = {renamed.get(name, name): value for name, value in state_dict.items()}
    for kind in ("weight", "bias"):
        names = [f"mlp_{half}.{kind}" for half in ("gamma", "beta")]
        if all(name in own for name in names):
            own[kind] = torch.cat([own.pop(name) for name in names])
    return own
