"""Converts the layers of a model: batch norms to SPN or to synchronised ones, convolutions to generative ones."""

from collections import Counter
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from pixnorm.nn._norm import Norm2d, check_group
from pixnorm.nn.batchnorm import BatchNorm2d
from pixnorm.nn.gconv import GConv2d
from pixnorm.nn.spn import NOISE, SPN2d, start_as_batchnorm_
from pixnorm.ops.checks import check_option
from pixnorm.ops.common import FLOAT


class Conversion(NamedTuple):
    """The result of :func:`convert_batchnorm`, :func:`convert_conv` or :func:`convert_sync`.

    Attributes:
        model: the given model, or its replacement if it was itself such a layer.
        replaced: names of the replaced layers, as in ``model.named_modules()``.
        skipped: name and reason for each layer (of any such kind) that was not replaced.
        layer: the class of the new layers: ``"SPN2d"`` or ``"GConv2d"``.
        usage: how calls of the model have to change.
        synchronised: names of the layers that share their statistics now.
    """

    model: nn.Module
    replaced: list[str]
    skipped: dict[str, str]
    layer: str = "SPN2d"
    usage: str = ""
    synchronised: tuple[str, ...] = ()

    def __repr__(self) -> str:
        lines = [f"Conversion of {type(self.model).__name__}: {len(self.replaced)} replaced by {self.layer}"]
        lines += [f"  {name or '(the model itself)'}" for name in self.replaced]
        lines += [f"{len(self.skipped)} not replaced"]
        lines += [f"  {name or '(the model itself)'}: {reason}" for name, reason in self.skipped.items()]
        if self.synchronised:
            lines += [f"{len(self.synchronised)} synchronised"]
            lines += [f"  {name or '(the model itself)'}" for name in self.synchronised]
        return "\n".join(lines + [self.usage] * bool(self.usage and self.replaced))


def convert_batchnorm(model: nn.Module, noise: float = NOISE, *, to: str = "spn") -> Conversion:
    """Replace, in place, every ``nn.BatchNorm2d`` of a model by an :class:`SPN2d` that starts as the same function, or
    by the fused :class:`BatchNorm2d`, which is and stays the same function.

    Scale and shift, running statistics, eps, momentum, dtype, device, training mode and ``requires_grad`` carry over (a
    layer whose scale and shift are both frozen is frozen as a whole). The parameters are new: convert before building
    the optimiser and before ``DistributedDataParallel``. In eval mode the mask starts from its initial running
    statistics, which training then updates.

    Layers that compute something else, or might, are kept: other kinds of batch norm, subclasses that define methods,
    layers with hooks or parametrizations, layers that share parameters or buffers with others, lazy layers before their
    first batch. One layer used in several places stays one layer.

    A checkpoint of the original model loads into the converted one: its batch norms are converted, with new noise.

    Args:
        model: any module, also a batch norm.
        noise: standard deviation, relative to each channel's scale, of the noise added to the four kernels. With 0 the
            model computes the same as before, but the masks get no gradient in the first step.
        to: ``"spn"``, or ``"batchnorm"``: :class:`pixnorm.BatchNorm2d` with the same parameters and buffers.

    Returns:
        The model, the names of the replaced layers, and the others with reasons.

    Raises:
        ValueError: ``noise`` is negative, or ``to`` is unknown. The model is untouched, as after any other error.
    """
    if not noise >= 0:
        raise ValueError(f"noise must not be negative, got {noise}")
    check_option("to", to, ("spn", "batchnorm"))
    fallback = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))

    def convert(bn: nn.BatchNorm2d) -> nn.Module:
        return _convert(bn, noise, fallback) if to == "spn" else _convert_to_batchnorm(bn)

    model, replaced, skipped = _replace(model, _BatchNorm, _obstacle, convert)
    return Conversion(model, replaced, skipped, "SPN2d" if to == "spn" else "BatchNorm2d")


_USAGE = """\
They need latent vectors z, of shape (N, {latent_dim}): call them as `layer(x, z)` or, without changing the code, call
the model inside `with pixnorm.nn.latent(z):`."""


def convert_conv(model: nn.Module, latent_dim: int, *, keep: Collection[str] = ()) -> Conversion:
    """Replace, in place, every ``nn.Conv2d`` of a model by a :class:`GConv2d` that starts as the same function.

    Weight, bias, dtype, device, training mode and ``requires_grad`` carry over. ``mix_weight`` starts at 0, so the
    model computes the same as before until the first step. The parameters are new: convert before building
    the optimiser and before ``DistributedDataParallel``.

    The layers need latent vectors: call them as ``layer(x, z)``, or leave the model's code as it is and call the model
    inside ``with pixnorm.nn.latent(z):``.

    Layers that compute something else, or might, are kept: other kinds of convolution, groups, subclasses that define
    methods, layers with hooks or parametrizations, layers that share parameters with others, lazy layers before their
    first batch. One layer used in several places stays one layer.

    A checkpoint of the original model loads into the converted one, with ``mix_weight`` 0. Spectral norm would divide
    that weight by its norm, 0: apply it to ``weight`` and ``scale_weight`` only, or after some training.

    Args:
        model: any module, also a convolution.
        latent_dim: length of a latent vector.
        keep: names of layers to keep, as in ``model.named_modules()``, or of modules whose layers to keep. The paper
            keeps the last convolution of a generator and those of shortcuts.

    Returns:
        The model, the names of the replaced layers, and the others with reasons.

    Raises:
        ValueError: ``latent_dim`` is not positive, or ``keep`` names a module that does not exist.
        TypeError: ``keep`` is a string. The model is untouched, as after any other error.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 3, 3))
        >>> pixnorm.convert_conv(model, latent_dim=4, keep=["2"])
    """
    if latent_dim < 1:
        raise ValueError(f"latent_dim must be positive, got {latent_dim}")
    if isinstance(keep, str):
        raise TypeError(f"keep must be a list of names, got {keep!r}")
    keep, named = set(keep), dict(model.named_modules(remove_duplicate=False))
    unknown = sorted(keep - named.keys())
    if unknown:
        raise ValueError(f"keep names what is not in the model: {', '.join(unknown)}")
    kept = {module for name in keep for module in named[name].modules()}

    def obstacle(conv: _ConvNd, owners: Counter) -> str | None:
        return "was to be kept" if conv in kept else _obstacle_of_conv(conv, owners)

    model, replaced, skipped = _replace(model, _ConvNd, obstacle, lambda conv: _convert_conv(conv, latent_dim))
    return Conversion(model, replaced, skipped, "GConv2d", _USAGE.format(latent_dim=latent_dim))


def convert_sync(model: nn.Module, group: "dist.ProcessGroup | None" = None) -> Conversion:
    """Synchronise, in place, the batch norms of a model across processes: in training they normalise the batches of all
    processes of a group as one.

    Every layer of pixnorm with statistics of the batch gets the group (its attribute ``process_group``, None to go
    back). Every ``nn.BatchNorm2d`` is replaced, as by ``convert_batchnorm(model, to="batchnorm")``, by
    :class:`pixnorm.BatchNorm2d` with the same parameters and buffers.

    The result is that of one process with the whole batch, also if local batches differ in size or are empty: outputs,
    running statistics, and gradients to any order, so gradient penalties are right. Forward and backward exchange one
    vector per layer. A gradient of a parameter is that of the sum of the processes' losses once it is summed over the
    processes; ``DistributedDataParallel`` takes the mean.

    All processes of the group must run the same forward and backward passes in the same order, and a gradient penalty
    in all or none; an error in one leaves the others waiting. (So does an empty batch if gradients of gradients are
    differentiated once more: PyTorch's convolutions cut the graph then.) In eval mode nothing is exchanged.

    Under ``torch.compile`` the graph breaks at each such layer, so ``fullgraph=True`` is an error; under
    ``torch.utils.checkpoint`` what is computed again is exchanged again. Copies of a model share the group; a pickled
    one (``torch.save(model)``) comes back without, and ``state_dict`` never has it.

    Args:
        model: any module, also a norm.
        group: a process group of ``torch.distributed`` that this process is in; None for all processes. With gloo for
            tensors on the CPU, with NCCL for those on GPUs.

    Returns:
        The model, the names of the replaced and of the synchronised layers, and other batch norms with reasons.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialised.
        TypeError: ``group`` is not a process group, or this process is not in it. The model is untouched, as after any
            other error.

    Example:
        >>> model = pixnorm.convert_sync(model).model  # after torch.distributed.init_process_group
        >>> model = torch.nn.parallel.DistributedDataParallel(model)
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("there are no processes yet: call torch.distributed.init_process_group before convert_sync")
    group = dist.group.WORLD if group is None else group
    check_group(group)

    model, replaced, skipped = _replace(model, _BatchNorm, _obstacle_to_synchronise, _convert_to_batchnorm)
    synchronised = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Norm2d) and module.has_batch_statistics:
            module.process_group = group
            synchronised.append(name)
    return Conversion(model, replaced, skipped, "BatchNorm2d", synchronised=tuple(synchronised))


def _replace(
    model: nn.Module,
    kind: type[nn.Module],
    obstacle: Callable[[nn.Module, Counter], str | None],
    convert: Callable[[nn.Module], nn.Module],
) -> tuple[nn.Module, list[str], dict[str, str]]:
    """Replace the layers of a kind that have no obstacle; return the model, the replaced, and reasons for the rest."""
    owners = Counter(_storage(tensor) for module in model.modules() for tensor in _tensors(module))
    converted: dict[nn.Module, nn.Module] = {}
    replaced: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, kind):
            continue
        reason = obstacle(module, owners)
        if reason:
            skipped[name] = reason
            continue
        if module not in converted:
            converted[module] = convert(module)
        replaced[name] = converted[module]

    # The model is changed only here, after everything that can fail.
    for name, layer in replaced.items():
        parent, _, key = name.rpartition(".")
        if key:
            model.get_submodule(parent).register_module(key, layer)
    return replaced.get("", model), list(replaced), skipped


def _tensors(module: nn.Module) -> list[Tensor]:
    """The module's own parameters and buffers."""
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


def _storage(tensor: Tensor) -> object:
    """A key that is equal for tensors that share memory."""
    try:
        storage = tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError, ValueError):  # lazy, or a subclass without storage
        storage = id(tensor)
    return storage


def _obstacle(module: _BatchNorm, owners: Counter) -> str | None:
    """Why this batch norm cannot be replaced, None if it can."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return f"{type(module).__name__} does not know its channels before its first batch"
    buffers = {"running_mean", "running_var", "num_batches_tracked"}
    if len({module._buffers.get(name) is None for name in buffers}) > 1:
        return "has some of the buffers of running statistics, and not all"
    return _difference(module, nn.BatchNorm2d, buffers, owners)


def _obstacle_to_synchronise(module: _BatchNorm, owners: Counter) -> str | None:
    """The same for a synchronised one."""
    if type(module) is nn.SyncBatchNorm:
        return "SyncBatchNorm cannot be differentiated twice; start from nn.BatchNorm2d"
    return _obstacle(module, owners)


def _obstacle_of_conv(module: _ConvNd, owners: Counter) -> str | None:
    """Why this convolution cannot be replaced, None if it can."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return f"{type(module).__name__} does not know its channels before its first batch"
    if module.weight.dtype not in FLOAT:
        return f"has a weight of {module.weight.dtype}"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"has {module.groups} groups"
    return _difference(module, nn.Conv2d, set(), owners)


def _difference(module: nn.Module, base: type[nn.Module], buffers: set[str], owners: Counter) -> str | None:
    """How a layer differs from its base class; None if it does not."""
    if not isinstance(module, base):
        return f"{type(module).__name__} is not nn.{base.__name__}"
    if is_parametrized(module):
        return "has parametrizations"
    kinds = type(module).__mro__[: type(module).__mro__.index(base)]
    methods = {name for kind in kinds for name, value in vars(kind).items() if _is_method(name, value)}
    methods |= {"forward"} & vars(module).keys()
    if methods:
        return f"{type(module).__name__} has its own {', '.join(sorted(methods))}"
    if any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks")):
        return "has hooks"
    extra = {*module._parameters, *module._buffers, *module._modules} - {"weight", "bias"} - buffers
    if extra:
        return f"has more than nn.{base.__name__}: {', '.join(sorted(extra))}"
    tensors = _tensors(module)
    if any(owners[_storage(tensor)] > 1 for tensor in tensors):
        return "shares parameters or buffers with another module"
    if any(tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None) for tensor in tensors):
        return "has parameters with hooks"
    return None


def _is_method(name: str, value: object) -> bool:
    hidden = name.startswith("__") and name not in ("__call__", "__getattr__", "__getattribute__")
    return (callable(value) or isinstance(value, property)) and not hidden


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


def _convert_to_batchnorm(bn: nn.BatchNorm2d) -> BatchNorm2d:
    """The fused batch norm with the same parameters and buffers."""
    fused = BatchNorm2d(bn.num_features, bn.eps, bn.momentum, bn.affine, bn.running_mean is not None, device="meta")
    fused.weight, fused.bias = bn.weight, bn.bias
    for name, buffer in bn._buffers.items():
        fused._buffers[name] = buffer
    fused.track_running_stats = bn.track_running_stats
    return fused.train(bn.training)


def _convert_conv(conv: nn.Conv2d, latent_dim: int) -> GConv2d:
    """A GConv2d that starts as ``conv``."""
    gconv = GConv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        latent_dim,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.bias is not None,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
        init="zero",
        padding_mode=conv.padding_mode,
    )
    gconv.weight = nn.Parameter(conv.weight.detach().clone())  # a clone keeps the memory format
    if conv.bias is not None:
        gconv.bias = nn.Parameter(conv.bias.detach().clone())
    for name, parameter in gconv.named_parameters():
        parameter.requires_grad_(conv.bias.requires_grad if name == "bias" else conv.weight.requires_grad)
    return gconv.train(conv.training)
