"""Turns the batch norms of a model into SPN layers."""

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from pixnorm.nn.spn import SPN2d, start_as_batchnorm_


class Conversion(NamedTuple):
    """What :func:`convert_batchnorm` did.

    Attributes:
        model: the model that was given, or its replacement where it was itself a batch norm.
        replaced: names of the layers that are :class:`SPN2d` now, as in ``model.named_modules()``.
        skipped: name and reason for each batch norm (of any kind) that stayed.
    """

    model: nn.Module
    replaced: list[str]
    skipped: dict[str, str]

    def __repr__(self) -> str:
        lines = [f"Conversion of {type(self.model).__name__}: {len(self.replaced)} replaced by SPN2d"]
        lines += [f"  {name or '(the model itself)'}" for name in self.replaced]
        lines += [f"{len(self.skipped)} not replaced"]
        lines += [f"  {name or '(the model itself)'}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def convert_batchnorm(model: nn.Module, noise: float = 0.02) -> Conversion:
    """Replace, in place, every ``nn.BatchNorm2d`` of a model by an :class:`SPN2d` that starts as the same function.

    Scale and shift, running statistics, eps, momentum, dtype, device, training mode and ``requires_grad`` carry over (a
    layer whose scale and shift are both frozen is frozen altogether). The parameters are new: convert before building
    the optimiser and before ``DistributedDataParallel``. In eval mode the mask starts from its initial running
    statistics, and settles as training goes on.

    What computes something else, or might, stays: other kinds of batch norm, subclasses that define methods, layers
    with hooks or parametrizations, layers that share parameters or buffers with others, lazy layers before their first
    batch. One layer that is used in several places stays one layer.

    Args:
        model: any module, also a batch norm.
        noise: standard deviation, relative to each channel's scale, of the noise added to the four kernels. With 0 the
            model computes the same as before, but the masks get no gradient in the first step.

    Returns:
        The model, with the names of what was replaced and of what was not, and why.

    Raises:
        ValueError: ``noise`` is negative. The model is untouched, as after any other error.
    """
    if not noise >= 0:
        raise ValueError(f"noise must not be negative, got {noise}")
    owners = Counter(id(tensor) for module in model.modules() for tensor in _tensors(module))
    fallback = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))

    converted: dict[nn.Module, SPN2d] = {}
    replaced: dict[str, SPN2d] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, _BatchNorm):
            continue
        obstacle = _obstacle(module, owners)
        if obstacle:
            skipped[name] = obstacle
            continue
        if module not in converted:
            converted[module] = _convert(module, noise, fallback)
        replaced[name] = converted[module]

    # Only now, when nothing can fail any more, is the model touched.
    for name, spn in replaced.items():
        parent, _, key = name.rpartition(".")
        if key:
            model.get_submodule(parent).register_module(key, spn)
    return Conversion(replaced.get("", model), list(replaced), skipped)


def _tensors(module: nn.Module) -> list[Tensor]:
    """The module's own parameters and buffers."""
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


def _obstacle(module: _BatchNorm, owners: Counter) -> str | None:
    """Why this batch norm cannot be replaced, None if it can."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return f"{type(module).__name__} does not know its channels before its first batch"
    if not isinstance(module, nn.BatchNorm2d):
        return f"{type(module).__name__} is not nn.BatchNorm2d"
    if is_parametrized(module):
        return "has parametrizations"
    kinds = type(module).__mro__[: type(module).__mro__.index(nn.BatchNorm2d)]
    methods = {name for kind in kinds for name, value in vars(kind).items() if _is_method(name, value)}
    methods |= {"forward"} & vars(module).keys()
    if methods:
        return f"{type(module).__name__} has its own {', '.join(sorted(methods))}"
    if any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks")):
        return "has hooks"
    plain = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    extra = {*module._parameters, *module._buffers, *module._modules} - plain
    if extra:
        return f"has more than a batch norm: {', '.join(sorted(extra))}"
    if any(owners[id(tensor)] > 1 for tensor in _tensors(module)):
        return "shares parameters or buffers with another module"
    return None


def _is_method(name: str, value: object) -> bool:
    return (callable(value) or isinstance(value, property)) and not name.startswith("__")


def _convert(bn: nn.BatchNorm2d, noise: float, fallback: Tensor) -> SPN2d:
    """An SPN2d that starts as ``bn``; ``fallback`` gives dtype and device where ``bn`` has no tensors."""
    like = next((t for t in (bn.weight, bn.bias, bn.running_mean) if t is not None), fallback)
    spn = SPN2d(
        bn.num_features,
        eps=bn.eps,
        momentum=bn.momentum,
        track_running_stats=bn.running_mean is not None,
        device=like.device,
        dtype=like.dtype,
    )
    scale = torch.ones_like(spn.mask_weight) if bn.weight is None else bn.weight
    shift = torch.zeros_like(spn.mask_bias) if bn.bias is None else bn.bias
    start_as_batchnorm_(spn, scale.detach(), shift.detach(), noise)

    train_scale = bn.weight is None or bn.weight.requires_grad
    train_shift = bn.bias is None or bn.bias.requires_grad
    for name, parameter in spn.named_parameters():
        trains = {"gamma": train_scale, "beta": train_shift, "mask": train_scale or train_shift}
        parameter.requires_grad_(trains[name.split("_")[0]])

    if bn.running_mean is not None:
        spn.running_mean = bn.running_mean.clone()
        spn.running_var = bn.running_var.clone()
        spn.mask_running_mean = torch.zeros_like(bn.running_mean)
        spn.mask_running_var = torch.ones_like(bn.running_var)
        spn.num_batches_tracked = bn.num_batches_tracked.clone()
    spn.track_running_stats = bn.track_running_stats
    return spn.train(bn.training)
