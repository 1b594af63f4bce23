"""Modulated norm in the benchmarks: batch norm, AdaIN and SPADE's modulation; measurements, goals, machine code."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contenders import placed
from benchmarks.cuda_code import CudaKernel, Design
from benchmarks.machine_code import STATISTICS, Moves, moves
from benchmarks.model import GPU, WARP
from benchmarks.registry import IMPLS, PEERS, Goals, Head, Op, Shape, Shapes, SpeedUp, Step, Whole, in_layouts
from benchmarks.triton_code import DTYPES, TRITON_GPUS, Configuration, PlanesKernel, TileKernel, Wanted
from pixnorm.functional import label_conv2d
from pixnorm.networks import Generator
from pixnorm.nn import SPADE2d
from pixnorm.testing import LAYOUTS, MODULATE, MODULATE_MAPS, Case, OpSpec
from pixnorm.testing.modulate import MAPS, NONE, ROWS, VECTOR

FORWARD = "modulate_fwd_kernel"
REDUCE, APPLY = "modulate_bwd_reduce_kernel", "modulate_bwd_apply_kernel"
# In CUDA C++ alone maps have kernels of their own.
FORWARD_MAPS, REDUCE_MAPS, APPLY_MAPS = (
    "modulate_fwd_maps_kernel",
    "modulate_bwd_reduce_maps_kernel",
    "modulate_bwd_apply_maps_kernel",
)
FORWARD_RESIDENT, BACKWARD_RESIDENT = RESIDENT = "modulate_fwd_resident_kernel", "modulate_bwd_resident_kernel"
FORWARD_RESIDENT_MAPS, BACKWARD_RESIDENT_MAPS = RESIDENT_MAPS = (
    "modulate_fwd_resident_maps_kernel",
    "modulate_bwd_resident_maps_kernel",
)
FINISH = "modulate_bwd_finish_kernel"
UP = Head("up → batch norm → ReLU", {"upsample": 2, "activation": "relu"}, {"affine": VECTOR})
RELU = Head("batch norm → ReLU", {"activation": "relu"}, {"affine": VECTOR})


def kernel_passes(upsample: int, channels_last: bool) -> dict[str, tuple[int, int]]:
    """Elements that each kernel reads and writes, as multiples of x; without an activation, for which maps' backward
    also reads beta. A call runs those of rows, of maps, or a resident one; the first two with STATISTICS."""
    large = upsample**2
    return {
        STATISTICS: (1, 0),
        FORWARD: (1, large),
        REDUCE: (1 + large, 0),  # x and dy
        APPLY: (1 + large, 1),
        FORWARD_MAPS: (1 + 2 * large, large),
        REDUCE_MAPS: (1 + 2 * large, 2 * large),  # x, dy and gamma; the maps' gradients
        APPLY_MAPS: (1 + 2 * large, 1),  # x, d beta and gamma
        FORWARD_RESIDENT: (1, 1),
        BACKWARD_RESIDENT: (2, 1),
        FORWARD_RESIDENT_MAPS: (3, 1),
        BACKWARD_RESIDENT_MAPS: (3, 3),
    }


def predicted_times(gpu: GPU, x: Shape, itemsize: int, upsample: int) -> tuple[float, float]:
    """Predicted seconds of forward and backward with rows: their bytes at the speed of a copy."""
    passes = {name: sum(of) for name, of in kernel_passes(upsample, True).items()}
    seconds = itemsize * prod(x) / gpu.copy
    return (passes[STATISTICS] + passes[FORWARD]) * seconds, (passes[REDUCE] + passes[APPLY]) * seconds


# ---- CUDA C++ ----


def _moves(kernel: CudaKernel) -> Moves:
    """Of a vector of x and its outputs: 16 bytes of y in NCHW, of x and y in channels_last. Single elements have one
    instance for both layouts, which counts as channels_last."""
    size, up, last = kernel.columns * kernel.itemsize, kernel.upsample, kernel.channels_last
    outputs = (size, up**2) if last else (up * size, up)

    def of_y(kind: str, times: int) -> Moves:
        return moves(kind, outputs[0], count=times * (1 if one_by_one(kernel) else outputs[1]))

    x = Counter() if one_by_one(kernel) else moves("LDG", size)  # of several outputs, x stays in registers
    loads, stores, writes_dx = {
        FORWARD: (0, 1, False),
        REDUCE: (1, 0, False),
        APPLY: (1, 0, True),
        FORWARD_MAPS: (2, 1, False),
        REDUCE_MAPS: (3, 2, False),  # beta too, for the sign of y
        APPLY_MAPS: (2, 0, True),
    }[kernel.name]
    found = x + of_y("LDG", loads) + of_y("STG", stores)
    return found + moves("STG", size) if writes_dx else found


def one_by_one(kernel: CudaKernel) -> bool:
    """Whether the main loop is over the outputs of a vector."""
    return kernel.name == REDUCE_MAPS and kernel.channels_last and kernel.upsample == 2


def _numbers(kernel: CudaKernel) -> int:
    """Of shared memory: statistics to merge, and their result; sums of warps."""
    run = max(WARP, 128 // kernel.itemsize) if kernel.channels_last else 1  # channels of a block
    warps = kernel.block_warps
    return {
        FORWARD: 3 * warps * (WARP if kernel.channels_last else 1) + 2 * run * kernel.channels_last,
        REDUCE: 2 * warps * run,
        APPLY: 0,
        FORWARD_RESIDENT: warps * run,
        BACKWARD_RESIDENT: 2 * warps * run,
        FINISH: 4 * warps * WARP,
    }[kernel.name.replace("_maps", "")]


# 16 warps with two to four loads of 16 bytes per thread are 16 to 32 KB in flight, beside stores, which are a third to
# half of the bytes.
ENOUGH = {"sm_86": 16, "sm_90": 16}
CUDA = {
    FORWARD: Design(ENOUGH, _moves, _numbers),
    REDUCE: Design(ENOUGH, _moves, _numbers),  # 4 loads; more warps would cost channels_last the sums in registers
    APPLY: Design(ENOUGH, _moves, _numbers),
    FORWARD_MAPS: Design(ENOUGH, _moves, _numbers),
    REDUCE_MAPS: Design(ENOUGH, _moves, _numbers, share=lambda kernel: 1 / 4 if one_by_one(kernel) else 1),
    APPLY_MAPS: Design(ENOUGH, _moves, _numbers),
    FINISH: Design({"sm_86": 1, "sm_90": 1}, numbers=_numbers),  # moves a few KB
    # No loop: all of a thread's vectors are loaded at once, 4 to 8 times 16 bytes.
    **{name: Design(ENOUGH, numbers=_numbers) for name in RESIDENT + RESIDENT_MAPS},
}


# ---- Triton ----


class Stream(TileKernel):
    """Every load and store of the main loop is of 16 bytes of a row of y, and without upsampling of x."""

    @property
    def design(self) -> Moves:
        name, maps, activated = self.name, self.affine == MAPS, self.launch.arguments["ACTIVATED"]
        size, up = int(self.elements) * self.itemsize, self.upsample
        width = 16 if self.channels_last else 16 // up
        loads, stores = {
            FORWARD: (2 * maps, 1),  # gamma and beta; y
            REDUCE: (1 + maps * (1 + activated), 2 * maps),  # dy, gamma, beta; d gamma, d beta
            APPLY: (1 + maps, 0),  # dy or d beta, gamma
        }[name]
        found = moves("LDG", size, width)  # x
        found += moves("LDG", loads * size * up**2, 16) + moves("STG", stores * size * up**2, 16)
        return found + moves("STG", size, width) if name == APPLY else found

    def may_move(self, beyond: Moves) -> bool:
        return not beyond


class Resident(PlanesKernel):
    """Every tensor moves once, by 16 bytes; beside them rows and statistics."""

    @property
    def design(self) -> Moves:
        maps, activated = self.affine == MAPS, self.launch.arguments["ACTIVATED"]
        loads, stores = {
            FORWARD_RESIDENT: (1 + 2 * maps, 1),  # x, gamma, beta; y
            BACKWARD_RESIDENT: (2 + maps * (1 + activated), 1 + 2 * maps),  # x, dy, gamma, beta; dx, d gamma, d beta
        }[self.name]
        size = int(self.elements) * self.itemsize
        return moves("LDG", loads * size) + moves("STG", stores * size)

    def may_move(self, beyond: Moves) -> bool:
        """Rows and statistics, at most four loaded and two stored for each channel of a thread."""
        channels = self.columns if self.channels_last else self.launch.arguments["CHANNELS"]
        moved = sum(width * count for (_, width), count in beyond.items())
        return moved <= 6 * channels * max(4, self.itemsize)


@dataclass(frozen=True, order=True)
class ModulateConfiguration(Configuration):
    kernels: ClassVar = dict.fromkeys((FORWARD, REDUCE, APPLY), Stream) | dict.fromkeys(RESIDENT, Resident)

    upsample: int = 1
    affine: int = ROWS
    activated: bool = False
    instance: bool = False

    @property
    def spec(self) -> OpSpec:
        return MODULATE_MAPS if self.affine == MAPS else MODULATE

    @property
    def options(self) -> str:
        kinds = {NONE: "no affine", VECTOR: "vector", ROWS: "rows", MAPS: "maps"}
        return ", ".join([kinds[self.affine], *["leaky"] * self.activated, *["instance"] * self.instance])

    @property
    def modelled(self) -> bool:
        return self.affine != MAPS

    def cases(self) -> Iterator[Case]:
        options = {"upsample": self.upsample, "activation": "leaky_relu" if self.activated else None}
        options["statistics"] = "instance" if self.instance else "batch"
        # With so many parts that the statistics of a batch are merged in two steps. Instances in registers, and larger.
        shapes = [(4, 256, 32, 32), (4, 64, 256, 256)] if self.instance else [(4, 256, 64, 64)]
        yield from (Case(shape, "", options, sizes={"affine": self.affine}) for shape in shapes)

    @classmethod
    def selection(cls) -> list[Wanted]:
        """Rows and maps in all layouts, with and without upsampling, in float32 and bfloat16, on the GPUs in turn; and
        what is left: planes in registers in the same way, no gamma and beta, float64, large planes. Half is as
        bfloat16."""
        pairs = list(product((False, True), (1, 2)))
        found = []
        for i, gpu in enumerate(TRITON_GPUS):
            rows = [cls("float", *pairs[i], ROWS, True), cls("BFloat16", *pairs[~i], VECTOR, True)]
            maps = [cls("BFloat16", *pairs[i], MAPS, True), cls("float", *pairs[~i], MAPS, True)]
            found += [Wanted(of, gpu) for of in (*rows, *maps)]
            last, kind = pairs[i]
            planes = [cls("float", last, 1, (ROWS, MAPS)[kind - 1], True, True)]
            planes += [cls("BFloat16", not last, 1, (MAPS, ROWS)[kind - 1], True, True)]
            found += [Wanted(of, gpu, RESIDENT) for of in planes]
        others = cls("float", False, 1, NONE), cls("double", True), cls("float", True, 1, ROWS, False, True)
        return found + [Wanted(of, gpu, tuple(cls.kernels)) for of, gpu in zip(others, TRITON_GPUS, strict=False)]

    @classmethod
    def everything(cls) -> list[Wanted]:
        affine = product((NONE, VECTOR, ROWS, MAPS), (False, True), (False, True))
        configurations = [cls(*of_x, *of) for *of_x, of in product(DTYPES, (False, True), (1, 2), affine)]
        return [Wanted(*pair) for pair in product(configurations, TRITON_GPUS)]


# ---- what is measured, and goals ----


def _compiled(head: str, mode: str, shape: Shape) -> tuple[str, ...]:
    """At one shape: torch.compile fuses the affine and the activation, and takes minutes for all shapes."""
    return in_layouts("compile") if shape == (16, 256, 32, 32) else ()


def _goal(head: str, mode: str, precision: str, machine: str) -> float | None:
    return {"relu": 1.5, "up": 4, "adain": 2, "spade": 2}[head]


LABELS, HIDDEN = 19, 128  # of SPADE's face model


def _label_map(shape: Shape) -> Tensor:
    """Labels of rectangles of 8x8 pixels and larger, as segments are."""
    n, _, h, w = shape
    torch.manual_seed(0)
    coarse = torch.randint(LABELS, (n, 1, h // 8, w // 8)).float()
    return F.interpolate(coarse, (h, w), mode="nearest")[:, 0].long()


def _one_hot(labels: Tensor, layout: str) -> Tensor:
    return LAYOUTS[layout](F.one_hot(labels, LABELS).permute(0, 3, 1, 2).float())


def _label_conv(impl: str, shape: Shape, layout: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """The one-hot map is made beforehand."""
    labels, weight = _label_map(shape), torch.randn(shape[1], LABELS, 3, 3, requires_grad=True)
    if impl != "eager":
        return lambda: label_conv2d(labels, weight, impl=impl), [weight]
    one_hot, own = _one_hot(labels, layout), LAYOUTS[layout](weight.detach()).requires_grad_()
    return lambda: F.conv2d(one_hot, own, padding=1), [own]


def _spade(impl: str, shape: Shape, layout: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """The layer as NVlabs/SPADE writes it, from integer labels: two convolutions for scale and shift."""
    c = shape[1]
    labels, x = _label_map(shape), LAYOUTS[layout](torch.randn(shape)).requires_grad_()
    if impl != "eager":
        layer = placed(layout, SPADE2d(c, LABELS, HIDDEN, impl=impl))
        return lambda: layer(x, labels), [x, *layer.parameters()]
    shared, gamma, beta = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((LABELS, HIDDEN), (HIDDEN, c), (HIDDEN, c)))
    layer = placed(layout, nn.ModuleList([nn.BatchNorm2d(c, affine=False), shared, gamma, beta]))

    def forward() -> Tensor:
        hidden = F.relu(shared(_one_hot(labels, layout)))
        return layer[0](x) * (1 + gamma(hidden)) + beta(hidden)

    return forward, [x, *layer.parameters()]


WHOLES = {
    "label convolution": Whole(
        "`label_conv2d` over `conv2d` of the one-hot map",
        [(4, HIDDEN, 64, 64), (4, HIDDEN, 128, 128)],
        _label_conv,
        {"forward": 6, "forward_backward": 6},
    ),
    "SPADE": Whole(
        "SPADE layer from labels",
        [(4, 128, 64, 64), (4, 128, 128, 128)],
        _spade,
        {"forward": 1.5, "forward_backward": 1.5},
    ),
}

BENCHMARK = Op(
    spec=MODULATE,
    title="Modulated norm",
    heads={
        "relu": RELU,
        "up": UP,
        "adain": Head("AdaIN", {"statistics": "instance"}, {"affine": ROWS}),
        "spade": Head(
            "SPADE's modulation → leaky ReLU",
            {"activation": "leaky_relu", "gamma_offset": 1.0},
            {"affine": MAPS},
            MODULATE_MAPS,
        ),
    },
    shapes=Shapes(
        cpu={
            (64, 256, 8, 8): "early block of a 32x32 generator, large batch: small planes",
            (16, 256, 32, 32): "its last block, at the batch of the generator step",
            (64, 256, 32, 32): "the same, large batch: far larger than any cache",
            (8, 64, 128, 128): "last block of a 128x128 generator: large planes",
        },
        gpu=((64, 256, 32, 32), (32, 64, 128, 128)),
        kernels=((64, 256, 32, 32),),
        small=((64, 256, 4, 4),),
    ),
    step=Step(
        plain="bn",
        plain_title="batch norm",
        title="fused batch norm",
        build=lambda impl: Generator(norm="bn") if impl == "bn" else Generator(norm="fused_bn", impl=impl),
        latent_dim=128,
        calls=[
            *(((1, 256, side, side), UP) for side in (4, 8, 16)),
            *(((1, 256, side, side), RELU) for side in (8, 16, 32, 32)),
        ],
        goal={"cpu": 0.97, "cuda": 0.97},
    ),
    goals=Goals(
        speed_ups=(SpeedUp(IMPLS, PEERS, _goal, lambda *of: 1),),
        over_copy=1.5,
        saved={"relu": 0, "up": 0, "adain": 0, "spade": 0},
        launches={"forward": 2, "backward": 3},
    ),
    products=None,
    kernel_passes=kernel_passes,
    predicted=predicted_times,
    cuda=CUDA,
    triton=ModulateConfiguration,
    precisions=("fp32", "bf16"),
    compiled=_compiled,
    wholes=WHOLES,
    order=2,
)
