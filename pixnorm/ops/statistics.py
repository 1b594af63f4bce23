"""Statistics of activations, and running statistics, as batch norm keeps them.

Both ops serve the layers and have no public function. A layer's running statistics move in one kernel: small layers are
launch-bound.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pixnorm.ops._dispatch import define_op
from pixnorm.ops.common import public


def statistics_reference(tensors: Sequence[Tensor], instance: bool) -> tuple[Tensor, Tensor]:
    """Means and biased variances of each channel: the specification. NaN where there are no pixels.

    Args:
        tensors: one or two of T = 1, 2, each (N, C, H, W), of one shape and dtype.
        instance: of each sample by itself (G = N groups); otherwise of the batch (G = 1).

    Returns:
        mean and variance, (T, G, C), contiguous, in float64 for float64 and otherwise in float32.
    """
    dims = (2, 3) if instance else (0, 2, 3)
    dtype = _dtype_of_statistics(tensors[0])
    found = [torch.var_mean(tensor.to(dtype), dims, correction=0) for tensor in tensors]
    shape = _shape_of_statistics(tensors, instance)
    return torch.stack([mean for _, mean in found]).view(shape), torch.stack([var for var, _ in found]).view(shape)


def _shape_of_statistics(tensors: Sequence[Tensor], instance: bool) -> tuple[int, int, int]:
    n, c, _, _ = tensors[0].shape
    return len(tensors), n if instance else 1, c


def _dtype_of_statistics(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _statistics_fake(tensors, instance):
    shape, dtype = _shape_of_statistics(tensors, instance), _dtype_of_statistics(tensors[0])
    return tensors[0].new_empty(shape, dtype=dtype), tensors[0].new_empty(shape, dtype=dtype)


# A building block of kernels: not differentiable.
statistics = define_op(
    "statistics(Tensor[] tensors, bool instance) -> (Tensor mean, Tensor var)",
    _statistics_fake,
    everywhere=statistics_reference,
)


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
