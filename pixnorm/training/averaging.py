"""The average of a generator over its training, with its running statistics."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def averaged(generator: nn.Module, decay: float) -> AveragedModel:
    """A copy of a generator, in eval mode, that ``update_average`` moves: PyTorch's exponential moving average.

    Args:
        decay: the weight of the past.
    """
    average = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    average.requires_grad_(False)
    return average.eval()


@torch.no_grad()
def update_average(average: AveragedModel, generator: nn.Module) -> None:
    """Move parameters and running statistics towards the generator's; copy what else it has.

    An average of the vectors of spectral norm would not be of norm 1, one of counters no count.
    """
    average.update_parameters(generator)
    for (name, kept), buffer in zip(average.module.named_buffers(), generator.buffers(), strict=True):
        if not name.endswith(("running_mean", "running_var")):
            kept.copy_(buffer)
