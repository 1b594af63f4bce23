"""Running statistics, as batch norm keeps them: those of a layer in one kernel, since at small sizes launches decide."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pixnorm.ops._dispatch import define_op

# running[i] = (1 - momentum) * running[i] + momentum * corrections[i] * batch[i], rounded once
update_running = define_op(
    "update_running(Tensor(a!)[] running, Tensor[] batch, float momentum, float[] corrections) -> ()",
    lambda running, batch, momentum, corrections: None,
    everywhere=lambda running, batch, momentum, corrections: update_running_reference(
        running, batch, momentum, corrections
    ),
)


def update_running_reference(
    running: Sequence[Tensor], batch: Sequence[Tensor], momentum: float, corrections: Sequence[float]
) -> None:
    """Move running statistics towards those of a batch, in place.

    Args:
        running: vectors of statistics, of one dtype.
        batch: as many, of the same sizes, in the dtype that statistics are reduced in.
        momentum: weight of the batch.
        corrections: a factor for each of ``batch``; for a biased variance count / (count - 1).
    """
    for old, new, correction in zip(running, batch, corrections, strict=True):
        old.copy_(torch.add(old * (1 - momentum), new, alpha=momentum * correction))
