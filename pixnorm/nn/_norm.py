"""The common part of normalisation layers: running statistics, as in ``nn.BatchNorm2d``."""

from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from pixnorm.ops.statistics import count_batch


class _Group:
    """Holds a process group for a module: copies of the module share the group, and pickles leave it behind."""

    def __init__(self, group: "torch.distributed.ProcessGroup | None" = None):
        self.group = group

    def __deepcopy__(self, memo: dict) -> "_Group":
        return self

    def __reduce__(self) -> tuple:
        return _Group, ()


def check_group(group: object) -> None:
    """A process group; ``torch.distributed.new_group`` gives processes outside it something else."""
    if not (torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup)):
        raise TypeError(f"expected a process group that this process is in, got {group!r}")


class Norm2d(nn.Module):
    """A layer that normalises by the statistics of the batch, and in eval mode by running ones.

    Not a subclass of PyTorch's batch norms, as ``convert_sync_batchnorm`` would replace it.

    Args:
        num_features: C, the channels of the input.
        eps, momentum, track_running_stats: as in ``nn.BatchNorm2d``.
        process_group: the processes (``torch.distributed``) whose batches, in training mode, are normalised as one, by
            statistics of all; ``torch.distributed.group.WORLD``, once it is initialised, for all processes, None for
            this one alone. All of them must run the same forward and backward passes. Gradients of gradients are right.
            An attribute, which may be set later (:func:`pixnorm.convert_sync`). Copies of the layer share the group; a
            pickle does not have it.

    Raises:
        TypeError: ``process_group`` is something else, such as a group that this process is not in.
    """

    _group = _Group()
    _version = 2  # as in PyTorch: version 1 had no num_batches_tracked
    _KINDS = ("",)  # prefixes of the layer's statistics
    num_batches_tracked: Tensor | None

    def __init__(
        self, num_features: int, eps: float, momentum: float | None, track_running_stats: bool, process_group=None
    ):
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features must be positive, got {num_features}")
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.track_running_stats = track_running_stats
        self.process_group = process_group

    @property
    def process_group(self) -> "torch.distributed.ProcessGroup | None":
        """The processes that share the statistics of a batch."""
        return self._group.group

    @process_group.setter
    def process_group(self, group: "torch.distributed.ProcessGroup | None") -> None:
        if group is not None:
            check_group(group)
        self._group = _Group(group)

    @property
    def has_batch_statistics(self) -> bool:
        """Whether the layer normalises by the statistics of batches at all."""
        return True

    def _repr_of_group(self) -> str:
        """The end of ``extra_repr``."""
        group = self.process_group
        return "" if group is None else f", process_group=<{group.name()} of {group.size()}>"

    def _register_statistics(self, sizes: dict[str, int], device: Any, dtype: torch.dtype | None) -> None:
        """Register mean and variance buffers; ``sizes`` maps each prefix in ``_KINDS`` to its number of channels."""
        track = self.track_running_stats
        for prefix, size in sizes.items():
            for name in ("running_mean", "running_var"):
                self.register_buffer(prefix + name, torch.empty(size, device=device, dtype=dtype) if track else None)
        counter = torch.zeros((), device=device, dtype=torch.long) if track else None
        self.register_buffer("num_batches_tracked", counter)
        self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Set the running means to 0, the running variances to 1 and the count of batches to 0."""
        if self.running_mean is None:
            return
        for prefix in self._KINDS:
            getattr(self, f"{prefix}running_mean").zero_()
            getattr(self, f"{prefix}running_var").fill_(1)
        self.num_batches_tracked.zero_()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others) -> None:
        version, counter = local_metadata.get("version"), f"{prefix}num_batches_tracked"
        if (version is None or version < 2) and self.num_batches_tracked is not None and counter not in state_dict:
            state_dict = state_dict | {counter: torch.tensor(0, dtype=torch.long)}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)

    @property
    def _updates(self) -> bool:
        """Whether a call updates the running statistics."""
        return self.training and self.track_running_stats and self.running_mean is not None

    def _statistics(self) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
        """The buffers to pass to the op (or None each), and its options. Follow with ``_counted``."""
        given = self._updates or not self.training
        buffers = tuple(
            getattr(self, f"{prefix}{name}") if given else None
            for prefix in self._KINDS
            for name in ("running_mean", "running_var")
        )
        momentum = self.momentum
        if momentum is None:
            momentum = 1 / (int(self.num_batches_tracked) + 1) if self._updates else 0.0
        return buffers, {
            "training": self.training or self.running_mean is None,
            "momentum": momentum,
            "eps": self.eps,
            "process_group": self.process_group if self.training else None,
        }

    def _counted(self, y: Tensor) -> Tensor:
        """y, after counting the batch; not called if the op raises, so rejected input leaves no trace."""
        return count_batch(y, self.num_batches_tracked) if self._updates else y
