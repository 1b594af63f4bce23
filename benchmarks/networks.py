"""The papers' networks in the benchmarks: a training step of each, against the same network in plain PyTorch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks.contenders import placed
from benchmarks.records import Records
from benchmarks.registry import PRECISIONS, in_layouts
from pixnorm.testing import LAYOUTS, saved_bytes
from pixnorm.testing.networks import NETWORKS, total

OURS = in_layouts("auto")
EAGER, PEERS = in_layouts("eager"), in_layouts("eager", "compile")


@dataclass(frozen=True)
class Measured:
    """Attributes:
    goal: the least speed-up over eager mode in its best layout; the least for all is that none is slower.
    compiled: whether torch.compile takes part: it compiles for a minute.
    gpu_batch: on a GPU.
    """

    goal: float = 1.0
    compiled: bool = False
    gpu_batch: int = 64


MEASURED = {
    "SNGAN": Measured(compiled=True),
    "SNGAN with SPN": Measured(1.4, compiled=True),
    "SNGAN with conditional batch norm": Measured(),
    "SNGAN with conditional SPN": Measured(1.4),
    "SNGAN with GConv": Measured(),
    "SNGAN's discriminator": Measured(),
    "SPADE": Measured(1.3, gpu_batch=8),
    "SPADE's discriminator": Measured(gpu_batch=8),
    "SPADE's encoder": Measured(gpu_batch=8),
    "StyleGAN": Measured(1.3),
    "StyleGAN 2": Measured(1.3, compiled=True),
    "SSN": Measured(1.3),
    "StyleGAN's discriminator": Measured(),
    "StyleGAN 2's discriminator": Measured(),
}


def contenders(name: str) -> tuple[str, ...]:
    return (*(PEERS if MEASURED[name].compiled else EAGER), *OURS)


def network_step(
    name: str, contender: str, batch: int, precision: str, device: torch.device | str
) -> tuple[Callable[[], object], Callable[[], int]]:
    """Forward and backward of a network in training, in bf16 under autocast with weights in float32; and the bytes that
    it keeps for the backward."""
    spec, (impl, layout) = NETWORKS[name], contender.split("-")
    device = torch.device(device)
    network = placed(layout, spec.build("auto" if impl == "auto" else "reference", published=True)).to(device)
    inputs = [tensor.to(device) for tensor in spec.inputs(network, batch)]
    inputs = [LAYOUTS[layout](tensor) if tensor.dim() == 4 else tensor for tensor in inputs]
    weights = list(network.parameters())
    function = torch.compile(network, dynamic=False) if impl == "compile" else network
    torch.backends.cudnn.allow_tf32 = PRECISIONS[precision].tf32

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return total(function(*inputs))

    def kept() -> int:
        return saved_bytes(forward, [*inputs, *weights, *network.buffers()])

    return lambda: torch.autograd.grad(forward(), weights, allow_unused=True), kept


def figures(records: Records, name: str, statistic: str = "median", **where) -> Iterator[float | None]:
    """The speed-ups over eager mode and over torch.compile, each in its best layout."""
    for impl in ("eager", "compile"):
        yield records.ratio(in_layouts(impl), OURS, "network", statistic, network=name, **where)


def saved(records: Records, name: str, impl: str, **where) -> float | None:
    """MiB, in the layout that keeps least."""
    found = records.all("network memory", network=name, **where)
    kept = [entry["saved"] for entry in found if entry["contender"] in in_layouts(impl)]
    return min(kept) / 2**20 if kept else None
