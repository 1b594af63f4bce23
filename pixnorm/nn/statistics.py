"""Running statistics of all norms of a model, pixnorm's and PyTorch's."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pixnorm.nn._norm import Norm2d

# For `isinstance`, to find norms: to freeze them, or to exclude them from weight decay.
NORMS: tuple[type[nn.Module], ...] = (Norm2d, _BatchNorm)


@torch.no_grad()
def update_statistics(loader: Iterable[Any], model: nn.Module, device: torch.device | str | int | None = None) -> None:
    """Set the running statistics of a model's norms to averages over the batches of a loader.

    ``torch.optim.swa_utils.update_bn`` for all of ``NORMS``: needed after averaging weights, as no running statistics
    belong to the average.

    Args:
        loader: yields batches: a tensor; a list or tuple whose first element is the input; or a dict of arguments.
        model: any module. It is called in training mode, without gradients, and is otherwise unchanged afterwards.
        device: where to move tensors first, if given.
    """
    norms = {module: module.momentum for module in model.modules() if isinstance(module, NORMS)}
    if not norms:
        return
    modes = {module: module.training for module in model.modules()}
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the average over all batches
        model.train()
        for batch in loader:
            if isinstance(batch, Mapping):
                model(**{name: _moved(value, device) for name, value in batch.items()})
            else:
                model(_moved(batch[0] if isinstance(batch, list | tuple) else batch, device))
    finally:
        for norm, momentum in norms.items():
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode


def _moved(value: Any, device: torch.device | str | int | None) -> Any:
    return value.to(device) if device is not None and isinstance(value, torch.Tensor) else value
