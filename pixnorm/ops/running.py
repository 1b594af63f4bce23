"""Running statistics, as batch norm keeps them; all of a layer's in one kernel, for at small sizes launches decide."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pixnorm.ops._dispatch import define_op
from pixnorm.ops.common import public


def update_running_reference(running: Sequence[Tensor], batch: Sequence[Tensor], momentum: float, count: int) -> None:
    """Move running statistics towards those of a batch, in place: the specification.

    Args:
        running: means and variances in turn, vectors of one dtype.
        batch: as many, of the same sizes, in the dtype that statistics are reduced in; the variances are biased.
        momentum: weight of the batch.
        count: values per channel; running variances are unbiased.
    """
    if not running:
        return
    weights = [momentum, momentum * count / (count - 1)] * (len(running) // 2)
    torch._foreach_mul_(running, 1 - momentum)
    torch._foreach_add_(running, torch._foreach_mul(batch, weights))


update_running = define_op(
    "update_running(Tensor(a!)[] running, Tensor[] batch, float momentum, SymInt count) -> ()",
    lambda running, batch, momentum, count: None,
    everywhere=update_running_reference,
)


@public
def count_batch(y: Tensor, num_batches_tracked: Tensor) -> Tensor:
    """y; one batch more is counted, in place. What passes y on is ``torch.fx``, which drops calls without a result."""
    num_batches_tracked.add_(1)
    return y
