"""GConv's mixing, which follows its convolution, in the benchmarks: measurements, goals, and its machine code."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import ClassVar

from benchmarks.contenders import SQUARE_PRODUCTS
from benchmarks.machine_code import Moves, moves
from benchmarks.model import GPU
from benchmarks.registry import IMPLS, Goals, Head, Op, Shape, Shapes, SpeedUp, Step, in_layouts
from benchmarks.triton_code import DTYPES, TRITON_GPUS, Configuration, ProductKernel, Wanted
from pixnorm.networks import Generator
from pixnorm.ops.gconv import preferred
from pixnorm.testing import GCONV_MIX, Case

FORWARD = "gconv_mix_fwd_kernel"
GRAD_INPUT, GRAD_WEIGHT = "gconv_mix_bwd_input_kernel", "gconv_mix_bwd_weight_kernel"
KERNELS = FORWARD, GRAD_INPUT, GRAD_WEIGHT


def kernel_passes(upsample: int, channels_last: bool) -> dict[str, tuple[int, int]]:
    """Elements that each kernel reads and writes, as multiples of u."""
    return {
        FORWARD: (1, 1),  # u; y
        GRAD_INPUT: (2, 1),  # dy and u; du
        GRAD_WEIGHT: (2, 0),  # dy and u
    }


def predicted_times(gpu: GPU, u: tuple[int, ...], itemsize: int, upsample: int = 1) -> tuple[float, float]:
    """Predicted seconds, forward and backward: of each kernel its bytes or its product."""
    times = {
        name: max(sum(passes) * itemsize * prod(u) / gpu.copy, gpu.product_time(prod(u) * u[1], itemsize))
        for name, passes in kernel_passes(upsample, channels_last=True).items()
    }
    return times[FORWARD], times[GRAD_INPUT] + times[GRAD_WEIGHT]


# ---- Triton ----

CHANNELS = 256  # of an element of u, whose instructions are counted


class GConvKernel(ProductKernel):
    """Gates of its own:

    - The main loop multiplies on tensor cores: on sm_90 with the warp-group instruction, float64 only where they are
      fast at it, strict float32 never.
    - Both operands arrive by 16-byte asynchronous copies, so that loads overlap products. The exception is features in
      channels_last for the weight's gradient: that product sums over pixels, which tensor cores want contiguous, so
      the copy to shared memory transposes, element by element; half types, too narrow for asynchronous copies, go
      through registers, by 16 bytes.
    - Other loads are only scales: one per channel, or where a tile has several samples, as many as features.
    """

    @property
    def operands(self) -> tuple[int, int]:
        """Elements of both operands in a round: features, then weights or features."""
        arguments = self.launch.arguments
        rows, columns = arguments["PIXELS"] * arguments["SAMPLES"], arguments["COLUMNS"]
        if self.name == GRAD_WEIGHT:
            return rows * columns, rows * columns
        return rows * arguments["CHUNK"], arguments["CHUNK"] * columns

    @property
    def multiplier(self) -> str | None:
        """The tensor-core instruction of the design."""
        if self.dtype == "double":
            return "DMMA" if self.gpu.arch in ("sm_80", "sm_90") else None
        return None if self.strict else "HGMMA" if self.gpu.arch == "sm_90" else "HMMA"

    @property
    def scales(self) -> int:
        """Elements of a tile of scales; 0 where a tile has one sample, or its operands are not scaled."""
        several = self.launch.arguments["SAMPLES"] > 1 and self.name != GRAD_INPUT
        return self.operands[0] if several else 0

    @property
    def design(self) -> Moves:
        def tile(elements: int, kind: str = "LDGSTS", width: int = 16) -> Moves:
            return moves(kind, elements * self.itemsize // self.code.threads, width)

        one, other = self.operands
        found = tile(one)
        if self.name != GRAD_WEIGHT or not self.channels_last or not self.multiplier:
            found += tile(other)
        elif self.itemsize == 2:
            found += tile(other, "LDG")
        else:
            found += tile(other, width=self.itemsize)
        if self.name == FORWARD and not self.strict:
            found += tile(self.scales)
        return found

    def may_move(self, beyond: Moves) -> bool:
        """Scales; of one sample no more than 16 bytes per thread."""
        moved = sum(width * count for (_, width), count in beyond.items())
        return moved <= self.rounds * max(16, self.scales * self.itemsize // self.code.threads)

    def counts_rounds(self, kind: str, width: int) -> bool:
        return width == 16

    @property
    def elements(self) -> float:
        """Of u with ``CHANNELS`` channels."""
        products = self.operands[0] * self.launch.arguments["COLUMNS"]
        return products / (CHANNELS * self.code.threads)

    def work(self, x: tuple[int, ...], reads: int) -> float:
        return prod(x) * x[1] / CHANNELS

    def seconds(self, x: tuple[int, ...], passes: Callable) -> tuple[float, ...] | None:
        times = super().seconds(x, passes)
        return times and (*times, self.gpu.product_time(prod(x) * x[1], self.itemsize, bool(self.multiplier)))


@dataclass(frozen=True, order=True)
class GConvConfiguration(Configuration):
    kernels: ClassVar = dict.fromkeys(KERNELS, GConvKernel)
    spec = GCONV_MIX

    strict: bool = False
    small_planes: bool = False

    @property
    def options(self) -> str:
        rounding = ["strict" if self.strict else "TF32"] * (self.dtype == "float")
        return ", ".join(rounding + ["small planes"] * self.small_planes)

    @property
    def modelled(self) -> bool:
        return not self.small_planes and self.dtype != "double"

    def cases(self) -> list[Case]:
        side = 4 if self.small_planes else 32  # a tile has several planes, or a part of one
        return [Case((64, 256, side, side), "")]

    def arguments(self, given: tuple) -> tuple:
        return *given[:-1], not self.strict

    @classmethod
    def selection(cls) -> list[Wanted]:
        """In TF32 and bfloat16 every kernel in both layouts and both sizes of planes, each on another GPU.

        A GPU has three of the four combinations, one per kernel. Other kernels are there once. Half is as bfloat16.
        """
        usual = [
            cls("float"),
            cls("BFloat16", channels_last=True),
            cls("BFloat16", small_planes=True),
            cls("float", channels_last=True, small_planes=True),
        ]
        found = [
            Wanted(usual[(i + j) % 4], gpu, (kernel,))
            for (i, kernel), (j, gpu) in product(enumerate(KERNELS), enumerate(TRITON_GPUS))
        ]
        others = [(cls("double"), GRAD_INPUT), (cls("float", strict=True), FORWARD)]
        return found + [Wanted(of, gpu, (kernel,)) for (of, kernel), gpu in zip(others, TRITON_GPUS, strict=False)]

    @classmethod
    def everything(cls) -> list[Wanted]:
        options = product(DTYPES, (False, True), (False, True), (False, True))
        configurations = [cls(*of) for of in options if of[0] == "float" or not of[2]]
        return [Wanted(*pair) for pair in product(configurations, TRITON_GPUS)]


# ---- what is measured, and goals ----

LATENT_DIM = 32
MIXING = Head("GConv's mixing", sizes={"bias": 0})  # without a bias, as in the generator


def _compiled(head: str, mode: str, shape: Shape) -> tuple[str, ...]:
    """At one shape: eager mode is bound by the same product."""
    return in_layouts("compile") if shape == (16, 256, 32, 32) else ()


def _generator(impl: str) -> Generator:
    options = {"norm": "bigbn", "latent_dim": LATENT_DIM, "bias": False}
    return Generator(conv="conv", **options) if impl == "conv" else Generator(conv="gconv", impl=impl, **options)


def _over_eager(head: str, mode: str, precision: str, machine: str) -> float | None:
    """On a GPU none in strict float32, where both are bound by the same operations, as on the CPU forward."""
    if machine == "cpu":
        return 1.8 if mode == "forward_backward" else None
    return 2 if precision in ("tf32", "bf16") else None


BENCHMARK = Op(
    spec=GCONV_MIX,
    title="GConv",
    heads={"mixing": MIXING},
    shapes=Shapes(
        cpu={
            (64, 256, 8, 8): "early block of a 32x32 generator, large batch: small planes",
            (16, 256, 32, 32): "its last block, at the batch of the generator step",
            (64, 256, 32, 32): "the same, large batch: far larger than any cache",
            (8, 64, 128, 128): "last block of a 128x128 generator: large planes, small products",
        },
        gpu=((64, 256, 32, 32), (64, 256, 8, 8), (16, 256, 16, 16), (32, 64, 128, 128)),
        kernels=((64, 256, 32, 32),),
    ),
    step=Step(
        plain="conv",
        plain_title="plain convolutions",
        title="GConv",
        build=_generator,
        latent_dim=LATENT_DIM,
        calls=[((1, 256, side, side), MIXING) for side in (8, 16, 32, 8, 16, 32)],
        goal={"cpu": 1.12, "cuda": 1.05},  # in operations 1.11
    ),
    goals=Goals(speed_ups=(SpeedUp(IMPLS, ("eager",), _over_eager, lambda *of: 1),)),
    products=SQUARE_PRODUCTS,
    kernel_passes=kernel_passes,
    predicted=predicted_times,
    triton=GConvConfiguration,
    precisions=("tf32", "fp32", "bf16"),
    same_layout=True,
    compiled=_compiled,
    auto=lambda u, options, tf32: preferred(u, tf32),
    order=1,
)
