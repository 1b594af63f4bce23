"""Statistics of a batch that is spread over the processes of a group, as differentiable functions of its parts.

A synchronised norm is these statistics, then the norm with given statistics, whose gradients of mean and variance come
back here. Each direction is one all_reduce, in forward of n, μ and σ² of all tensors, in float64, each process in a row
of its own; in backward of dμ and dσ²:

    μ = Σ nᵢ μᵢ / n,    σ² = Σ nᵢ (σᵢ² + (μᵢ - μ)²) / n,    n = Σ nᵢ        sums over the processes
    dx = (Σ dμ + 2 (x - μ) Σ dσ²) / n

(Sums of x and x² in one row would be wrong where |μ| is much larger than σ.) Backward is differentiable itself, so
gradients of gradients are those of one process that has the whole batch.

Every process of the group must run the same forward and the same backward passes, in the same order, also with a local
batch that is smaller, or empty; an error in one process (wrong input, say) leaves the others waiting, as with any
collective. ``in_turn`` gives the exchanges of a backward pass one order in all processes.
"""

import threading
from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pixnorm.ops.common import exporting, onlooker, through_reference
from pixnorm.ops.statistics import statistics, statistics_reference


def group_of(process_group: "dist.ProcessGroup | None", training: bool) -> "dist.ProcessGroup | None":
    """The group to exchange statistics in; None where there is nothing to exchange: without a group, if the statistics
    are not the batch's, and in a group of one.

    Raises:
        RuntimeError: this process is not in the group, or a transform or tracer is active.
    """
    if process_group is None or not training:
        return None
    size = dist.get_world_size(process_group)
    if size < 1:
        raise RuntimeError("this process is not in the process_group whose statistics are to be synchronised")
    if size == 1:
        return None
    watched = "torch.export is active" if exporting() else onlooker()
    if watched is not None:
        raise RuntimeError(
            f"statistics cannot be synchronised across processes while {watched}; use eval mode or process_group=None"
        )
    return process_group


_TURNS = 1024  # more than a graph has exchanges
_thread = threading.local()
_exchanges: Counter[str] = Counter()  # so far, in each group: the same number in all its processes


def in_turn(output: Tensor, group: "dist.ProcessGroup") -> None:
    """Put the exchange in the backward of ``output.grad_fn`` at its place in an order that all processes have.

    Of several nodes that are ready autograd runs the one with the highest number: that of its creation, in its thread.
    Backward passes on GPUs run in a thread of their own, so nodes of a gradient's graph are numbered apart from those
    of the forward pass, and which come first depends on what this process has differentiated before, such as the
    samples that only one process draws. Exchanges therefore are numbered by themselves, lower than what a thread
    creates after its first one: they run once nothing else can, the last first.
    """
    if not hasattr(_thread, "counted"):
        _thread.counted = True
        with torch.enable_grad():
            one = torch.ones((), requires_grad=True)
            for _ in range(_TURNS):  # takes the low numbers, in a millisecond
                one.view_as(one)
    _exchanges[group.group_name] += 1
    if output.grad_fn is not None:
        output.grad_fn._set_sequence_nr(_exchanges[group.group_name] % _TURNS)


class AllReduce(torch.autograd.Function):
    """The sum of a tensor over the processes of a group. Its gradient is the sum of their gradients, and so on."""

    @staticmethod
    def forward(ctx, t, group):
        ctx.group = group
        total = t.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad, ctx.group), None


def all_reduce(t: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """``AllReduce``, in turn."""
    total = AllReduce.apply(t, group)
    in_turn(total, group)
    return total


def exchange(tensors: Sequence[Tensor], group: "dist.ProcessGroup", local: Callable = statistics) -> tuple[Tensor, ...]:
    """The number of values per channel in the whole batch, (), then mean and biased variance of each tensor, (C,).

    Args:
        tensors: (N, C, H, W) each, of one dtype, with their own C and one N, H, W.
        local: computes the statistics of this process.
    """
    n, _, h, w = tensors[0].shape
    sizes = [tensor.shape[1] for tensor in tensors]
    own = tensors[0].new_zeros(1 + 2 * sum(sizes), dtype=torch.float64)
    if n * h * w > 0:  # statistics of nothing are NaN
        alike = len(set(sizes)) == 1
        found = [local(together, False) for together in ([tensors] if alike else [[t] for t in tensors])]
        means, variances = (torch.cat([one.flatten() for one in kind]) for kind in zip(*found, strict=True))
        own = torch.cat([own[:1] + n * h * w, means, variances])
    everyone = own.new_zeros((dist.get_world_size(group), own.numel()))
    everyone[dist.get_rank(group)] = own
    dist.all_reduce(everyone, group=group)

    counts, means, variances = everyone.split([1, sum(sizes), sum(sizes)], dim=1)
    count = counts.sum()
    mean = (counts * means).sum(0) / count
    var = (counts * (variances + (means - mean).square())).sum(0) / count
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    pairs = zip(mean.to(dtype).split(sizes), var.to(dtype).split(sizes), strict=True)
    return count, *(t.contiguous() for pair in pairs for t in pair)


def exchange_gradients(
    tensors: Sequence[Tensor],
    means: Sequence[Tensor],
    count: Tensor,
    grads: Sequence[Tensor],
    group: "dist.ProcessGroup",
    norm: torch._ops.OpOverload | None,
    needed: Sequence[bool] = (True, True),
) -> list[Tensor | None]:
    """The gradients of ``tensors`` from those of their means and variances (in turn, (C,) each) in all processes.

    Args:
        norm: as in ``statistics_of_all``.
        needed: which of them; None for the others.
    """
    total = all_reduce(torch.cat(list(grads)), group) / count
    parts = total.split([len(grad) for grad in grads])
    found = []
    for x, mean, of_mean, of_var, need in zip(tensors, means, parts[::2], parts[1::2], needed, strict=False):
        if not need:
            found.append(None)
        elif norm is None or through_reference():
            found.append((of_mean[:, None, None] + 2 * of_var[:, None, None] * (x - mean[:, None, None])).to(x.dtype))
        else:  # scale and shift, in one pass
            found.append(norm(x, 2 * of_var, of_mean, mean, torch.ones_like(mean), 0.0, False, 0.0, 1, None)[0])
    return found


class SynchronisedStatistics(torch.autograd.Function):
    """``exchange``, differentiable to any order: a backward that is itself differentiated consists of PyTorch's
    operations, and the means that it uses are this function's own outputs."""

    @staticmethod
    def forward(ctx, group, norm, *tensors):
        count, *found = exchange(tensors, group, statistics_reference if norm is None else statistics)
        ctx.group, ctx.norm = group, norm
        ctx.save_for_backward(count, *tensors, *found[::2])
        ctx.mark_non_differentiable(count)
        return count, *found

    @staticmethod
    def backward(ctx, _, *grads):
        count, *saved = ctx.saved_tensors  # once: each access unpacks them, which checkpoints and offloading hook into
        tensors, means = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        return (
            None,
            None,
            *exchange_gradients(tensors, means, count, grads, ctx.group, ctx.norm, ctx.needs_input_grad[2:]),
        )


@torch._disable_dynamo  # compiled graphs break here: what is exchanged must not be moved or cut by a compiler
def statistics_of_all(
    tensors: Sequence[Tensor], upsample: int, group: "dist.ProcessGroup", norm: torch._ops.OpOverload | None
) -> tuple[Tensor, ...]:
    """The count of values to normalise in the whole batch, and mean and biased variance of each tensor, differentiable.

    Args:
        tensors: (N, C, H, W) each; what is normalised first.
        upsample: 2 counts each pixel four times.
        norm: the forward op of ``modulated_norm`` that runs where the tensors are; None for PyTorch's operations alone.

    Returns:
        count, () of float64; then means and variances in turn, (C,), in float64 for float64 and otherwise in float32.

    Raises:
        ValueError: on the CPU, in every process: the whole batch has one value per channel.
    """
    count, *found = SynchronisedStatistics.apply(group, norm, *tensors)
    in_turn(found[0], group)
    count = count * upsample**2
    check_count(count, tensors[0])
    return count, *found


def check_count(count: Tensor, x: Tensor) -> None:
    """The whole batch has several values per channel. Not on a GPU, where looking would wait for it."""
    if count.device.type == "cpu" and int(count) == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got 1 in all processes together, "
            f"and here input size {x.shape}"
        )


def gradients_of_given(of_x_hat: Tensor, of_x_hat_x_hat: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The gradients of given mean and variance, (C,), from Σ dx̂ and Σ dx̂ x̂, which a norm's parameters know."""
    scale = (var + eps).rsqrt()
    return -scale * of_x_hat, -0.5 * scale.square() * of_x_hat_x_hat


@torch.no_grad()
def move_running(running: Sequence[Tensor | None], batch: Sequence[Tensor], momentum: float, count: Tensor) -> None:
    """Move running statistics towards those of the whole batch, in place; they stay as they are if it has no variance.

    ``update_running`` for a count that stays on its device.

    Args:
        running: means and variances in turn, or None for those that are not kept.
        batch: as many; the variances are biased.
    """
    for i, (buffer, value) in enumerate(zip(running, batch, strict=True)):
        if buffer is not None:
            unbiased = value * (count / (count - 1)) if i % 2 else value
            moved = buffer * (1 - momentum) + unbiased * momentum
            buffer.copy_(torch.where(count > 1, moved, buffer))
