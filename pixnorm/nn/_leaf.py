"""Layers that ``torch.fx`` leaves whole, as it does PyTorch's own: what they do depends on their mode."""

import torch
from torch import Tensor, nn


def traced(module: nn.Module, *arguments: Tensor | None) -> "torch.fx.Proxy | None":
    """The call of a layer as one node of a graph; None where no graph is recorded, or the layer is all of it."""
    tracer = next((value.tracer for value in arguments if isinstance(value, torch.fx.Proxy)), None)
    if tracer is None:
        return None
    try:
        path = tracer.path_of_module(module)
    except NameError:  # it is no part of the model that is traced
        return None
    return tracer.create_proxy("call_module", path, arguments, {}) if path else None
