"""Makes layers leaves of ``torch.fx``, as PyTorch's own are: their computation depends on the training mode."""

import torch
from torch import Tensor, nn


def traced(module: nn.Module, *arguments: Tensor | None) -> "torch.fx.Proxy | None":
    """The call of a layer as one graph node; None if no graph is being recorded or the layer is the traced root."""
    tracer = next((value.tracer for value in arguments if isinstance(value, torch.fx.Proxy)), None)
    if tracer is None:
        return None
    try:
        path = tracer.path_of_module(module)
    except NameError:  # not part of the traced model
        return None
    return tracer.create_proxy("call_module", path, arguments, {}) if path else None
