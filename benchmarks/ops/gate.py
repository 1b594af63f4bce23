"""CBAM's gates in the benchmarks: both gates, and a stack of residual blocks with them."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import ClassVar

from torch import nn

from benchmarks.machine_code import Moves, moves
from benchmarks.model import GPU
from benchmarks.registry import IMPLS, PEERS, Goals, Head, Op, Shape, Shapes, SpeedUp, Step, in_layouts
from benchmarks.triton_code import DTYPES, TRITON_GPUS, Configuration, TritonKernel, Wanted
from pixnorm.networks import Generator
from pixnorm.testing import Case, OpSpec
from pixnorm.testing.gate import CHANNEL_GATE, SPATIAL_GATE

# Tensors of x's size that each kernel reads and writes.
STREAMS = {
    "gate_pool_kernel": (1, 0),
    "gate_fwd_kernel": (1, 1),
    "gate_reduce_kernel": (2, 0),
    "gate_bwd_kernel": (1, 1),
}


class Stream(TritonKernel):
    """Every tensor moves by 16 bytes, and nothing else moves in the loop."""

    @property
    def elements(self) -> float:
        """Of x, per thread and round."""
        return self.launch.arguments["KEPT"] * self.launch.arguments["POOLED"] / self.code.threads

    @property
    def design(self) -> Moves:
        loads, stores = STREAMS[self.name]
        size = int(self.elements) * self.itemsize
        return moves("LDG", loads * size) + moves("STG", stores * size)

    def may_move(self, beyond: Moves) -> bool:
        return not beyond

    def work(self, x: Shape, reads: int) -> float:
        return prod(x)


@dataclass(frozen=True, order=True)
class GateConfiguration(Configuration):
    """The passes of one of the gates."""

    kernels: ClassVar = dict.fromkeys(STREAMS, Stream)

    spatial: bool = False

    @property
    def spec(self) -> OpSpec:
        return SPATIAL_GATE if self.spatial else CHANNEL_GATE

    @property
    def options(self) -> str:
        return "pixels" if self.spatial else "channels"

    def cases(self) -> Iterator[Case]:
        yield Case((4, 256, 128, 256), "")

    @classmethod
    def selection(cls) -> list[Wanted]:
        """Float32 and bfloat16 in both layouts, on the GPUs in turn; float64."""
        usual = [cls(*of) for of in product(("float", "BFloat16"), (False, True), (False, True))]
        found = [Wanted(of, TRITON_GPUS[(i + i // 4) % len(TRITON_GPUS)]) for i, of in enumerate(usual)]
        return [*found, Wanted(cls("double"), TRITON_GPUS[0]), Wanted(cls("double", True), TRITON_GPUS[1])]

    @classmethod
    def everything(cls) -> list[Wanted]:
        configurations = [cls(*of) for of in product(DTYPES, (False, True), (False, True))]
        return [Wanted(*pair) for pair in product(configurations, TRITON_GPUS)]


# ---- what is measured, and goals ----

SHAPES = {
    (64, 256, 8, 8): "early layers: small planes",
    (16, 256, 32, 32): "in the middle",
    (8, 64, 128, 128): "late layers: large planes",
}
LATENT = 128


def _generator(impl: str) -> nn.Module:
    """That of the GConv paper's comparison (its Table 3): PyTorch's layers, and gates after the convolutions."""
    gates = {} if impl == "plain" else {"attention": "ca", "impl": impl}
    return Generator(norm="bn", latent_dim=LATENT, **gates)


def kernel_passes(upsample: int, channels_last: bool) -> dict[str, tuple[int, int]]:
    """Tensors of x's size that each Triton kernel reads and writes."""
    return STREAMS


def predicted_times(gpu: GPU, x: Shape, itemsize: int, upsample: int) -> tuple[float, float]:
    """Predicted seconds, forward and backward: the bytes at the speed of a copy."""
    seconds = itemsize * prod(x) / gpu.copy
    passes = ("pool", "fwd"), ("reduce", "bwd")
    return tuple(seconds * sum(sum(STREAMS[f"gate_{name}_kernel"]) for name in names) for names in passes)


CHANNEL, SPATIAL = Head("channel gate"), Head("spatial gate", sizes={"kh": 7, "kw": 7}, spec=SPATIAL_GATE)

BENCHMARK = Op(
    spec=CHANNEL_GATE,
    title="CBAM",
    heads={"channel": CHANNEL, "spatial": SPATIAL},
    shapes=Shapes(
        cpu=SHAPES,
        gpu=((64, 256, 32, 32), (32, 64, 128, 128)),
        kernels=((64, 256, 32, 32),),
        small=((64, 256, 4, 4),),
    ),
    step=Step(
        plain="plain",
        plain_title="no gates",
        title="channel gates",
        build=_generator,
        latent_dim=LATENT,
        calls=[((1, 256, side, side), CHANNEL) for side in (8, 8, 16, 16, 32, 32)],
        goal={"cpu": 1.05, "cuda": 1.05},
    ),
    goals=Goals(speed_ups=(SpeedUp(IMPLS, PEERS, lambda *of: 1.5, lambda *of: 1),)),
    products=None,
    kernel_passes=kernel_passes,
    predicted=predicted_times,
    triton=GateConfiguration,
    precisions=("fp32", "bf16"),
    compiled=lambda head, mode, shape: in_layouts("compile"),
    order=6,
)
