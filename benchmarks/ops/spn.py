"""SPN in the benchmarks: what is measured, its goals, and what the machine code of its kernels must look like."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import ClassVar

from benchmarks.contenders import SQUARE_PRODUCTS
from benchmarks.cuda_code import CudaKernel, Design
from benchmarks.machine_code import STATISTICS, Moves, moves
from benchmarks.model import GPU, WARP
from benchmarks.ops.conditional_spn import HEAD, WHOLES
from benchmarks.registry import PEERS, Goals, Head, Op, Shape, Shapes, SpeedUp, Step, in_layouts
from benchmarks.triton_code import DTYPES, TRITON_GPUS, Configuration, TritonKernel, Wanted
from pixnorm.networks import Generator
from pixnorm.ops.spn import preferred
from pixnorm.testing import CONDITIONAL_SPN, SPN, Case, OpSpec

PROJECTION, FINISH = "spn_projection_kernel", "spn_bwd_finish_kernel"
FINISH_ROWS = "spn_bwd_finish_rows_kernel"  # Triton, with rows
FINISH_SAMPLES, ADD_MEANS = "spn_bwd_finish_samples_kernel", "spn_bwd_add_means_kernel"  # CUDA, with groups or rows
GENERAL_WALK, GENERAL_SUMS, GENERAL_MASK = GENERAL = tuple(
    f"spn_general_{part}_kernel" for part in ("walk", "sums", "mask")
)
GENERAL_FINISH = "spn_general_finish_kernel"
ONE_MASK = tuple(f"spn_one_mask_{part}_kernel" for part in ("sums", "finish", "apply"))
MODULATE, REDUCE, APPLY = WALKS = "spn_fwd_modulate_kernel", "spn_bwd_reduce_kernel", "spn_bwd_apply_kernel"


def kernel_passes(upsample: int, channels_last: bool) -> dict[str, tuple[int, int]]:
    """Elements that each kernel reads and writes, as multiples of x."""
    large = upsample**2
    return {
        STATISTICS: (2, 0),  # x and p
        MODULATE: (2, large),  # x and p; y
        REDUCE: (2 + large, 0),  # x, p and dy
        # x, p and dy; dx and dp, and in NCHW a copy of x for the weight gradient's GEMM
        APPLY: (2 + large, 2 + (not channels_last)),
        # Triton only; forward also sums up the statistics.
        f"{PROJECTION}, forward": (1, 1),  # x; p
        f"{PROJECTION}, backward": (2, 1),  # dp and dx; dx
    }


def gemm_times(gpu: GPU, x: tuple[int, ...], itemsize: int) -> tuple[float, float]:
    """Predicted seconds of the projection's GEMMs, forward and backward, for an x of that shape."""
    forward, grad_input, grad_weight = (
        max(passes * itemsize * prod(x) / gpu.copy, gpu.product_time(prod(x) * x[1], itemsize))
        for passes in (2, 3, 2)  # x to p; dp onto dx; dp and x
    )
    return forward, grad_input + grad_weight


def predicted_times(gpu: GPU, x: tuple[int, ...], itemsize: int, upsample: int) -> tuple[float, float]:
    """Predicted seconds, forward and backward, of GEMMs and bytes, in channels_last."""
    passes = kernel_passes(upsample, channels_last=True)
    return tuple(
        gemm + sum(sum(passes[name]) for name in names) * itemsize * prod(x) / gpu.copy
        for gemm, names in zip(gemm_times(gpu, x, itemsize), ((STATISTICS, MODULATE), (REDUCE, APPLY)), strict=True)
    )


# ---- CUDA C++ ----

SUMS = 38  # per channel, in backward


def _moves(kernel: CudaKernel) -> Moves:
    """Of a row: in NCHW a thread moves 16 bytes of y at once, in channels_last single elements."""
    itemsize, up, name = kernel.itemsize, kernel.upsample, kernel.name
    row = 16 if kernel.columns > 1 else up * itemsize  # of y, in NCHW
    size, width = (kernel.columns * itemsize, itemsize) if kernel.channels_last else (row // up, 16)
    load, store = moves("LDG", size, width), moves("STG", size, width)
    load_y, store_y = moves("LDG", size * up, width, up), moves("STG", size * up, width, up)
    if name == MODULATE:
        return load + load + store_y
    if name == REDUCE:  # in channels_last p is read twice, the second time from the L1 cache, for want of registers
        return load + load + load_y + (load if kernel.channels_last and kernel.dtype != "double" else Counter())
    return load + load + load_y + store + store + (Counter() if kernel.channels_last else store)


def _numbers(kernel: CudaKernel) -> int:
    """Of shared memory: taps and factors, what neighbouring warps exchange, sums."""
    channels = WARP if kernel.channels_last else 1
    warps = kernel.code.threads // WARP
    table = (18 + 32 * kernel.upsample + 36) * channels
    exchange = 4 * kernel.code.threads if kernel.channels_last else 0  # for each number that is exchanged
    walk = table + 2 * kernel.upsample * exchange
    return {
        MODULATE: table + max(exchange, 6 * warps * channels),
        REDUCE: max(walk, SUMS * (warps // 2 * WARP if kernel.channels_last else warps)),
        APPLY: walk if kernel.channels_last else table + 4 + SUMS * warps,
        FINISH: SUMS * warps,
        FINISH_SAMPLES: SUMS * warps,
    }[kernel.name]


def _general_numbers(kernel: CudaKernel) -> int:
    """Of shared memory in channels_last, which needs more: taps and their constants, or sums."""
    taps, warps = kernel.kernel_size**2, kernel.code.threads // WARP
    table, sums = (4 * taps + 2) * WARP, 2 * taps * warps // 2 * WARP
    return {GENERAL_WALK: table, GENERAL_SUMS: sums, GENERAL_MASK: table}[kernel.name]


CUDA = {
    # 2 loads, 16 KB of reads; a third of its traffic is stores.
    MODULATE: Design({"sm_86": 16, "sm_90": 16}, _moves, _numbers),
    # 3 loads, 18 KB; more warps would cost the sums that it keeps in registers.
    REDUCE: Design({"sm_86": 12, "sm_90": 12}, _moves, _numbers),
    # 3 loads, 18 KB of reads; about half of its traffic is stores.
    APPLY: Design({"sm_86": 12, "sm_90": 12}, _moves, _numbers),
    FINISH: Design({"sm_86": 1, "sm_90": 1}, numbers=_numbers),  # moves a few KB
    FINISH_SAMPLES: Design({"sm_86": 1, "sm_90": 1}, numbers=_numbers),
    ADD_MEANS: Design({"sm_86": 1, "sm_90": 1}),
    # For other kernel sizes and masks; one column per thread.
    **{
        name: Design({"sm_86": 12, "sm_90": 12}, numbers=_general_numbers, sizes=("upsample", "kernel_size"))
        for name in GENERAL
    },
    GENERAL_FINISH: Design({"sm_86": 1, "sm_90": 1}, numbers=lambda kernel: 6 * 25),
    **{name: Design({"sm_86": 1, "sm_90": 1}, numbers=lambda kernel: 8) for name in ONE_MASK},
}


# ---- Triton ----


class Projection(TritonKernel):
    @property
    def name(self) -> str:
        return f"{PROJECTION}, {'forward' if self.launch.arguments['STATISTICS'] else 'backward'}"

    @property
    def design(self) -> Moves:
        """Weight and x, through shared memory."""
        chunk, *outer = (self.launch.arguments[name] for name in ("CHUNK", "OUT", "PIXELS"))
        weight, x = (moves("LDGSTS", chunk * size // self.code.threads * self.itemsize) for size in outer)
        return weight + x

    @property
    def elements(self) -> float:
        return self.launch.arguments["CHUNK"] * self.launch.arguments["PIXELS"] / self.code.threads

    def work(self, x: tuple[int, ...], reads: int) -> float:
        return prod(x)


class Walk(TritonKernel):
    """Gates of its own:

    - Loads and stores are of 16 bytes of a row of y in NCHW, apart from the few bytes of neighbours.
    - Threads never wait for each other: no barrier and no shared memory in the main loop, and in NCHW in the whole
      kernel. Triton inserts them where the next tensor has another layout over the threads. Where lanes have channels
      of their own, in channels_last and for groups, taps are moved from lane to lane before the loop.
    """

    @property
    def design(self) -> Moves:
        """Without neighbours, and without what is one number per channel."""
        name, itemsize = self.name, self.itemsize
        row, sums = self.columns * itemsize, max(4, itemsize)
        wide = itemsize if self.channels_last else 16
        p = moves("LDG", row, 16 if self.one_mask else wide)  # one mask is one channel
        found = moves("LDG", row, wide) + p
        found += moves("STG" if name == MODULATE else "LDG", row * self.upsample, wide, self.upsample)  # y, dy
        if name == REDUCE and self.one_mask:
            found += moves("STG", self.columns * sums, sums if self.channels_last else 16)  # dm
        elif name != MODULATE:
            found += p  # again, for p̂ of the row above (the mask is of the row below); with one mask, the finished dp
        if name == APPLY:
            found += moves("STG", row, wide, 1 if self.one_mask else 2)
        return found

    def counts_rounds(self, kind: str, width: int) -> bool:
        return kind == "STG"  # loads may be of neighbours

    def may_move(self, beyond: Moves) -> bool:
        return not any(kind == "STG" for kind, _ in beyond)

    def violations(self) -> list[str]:
        found = super().violations()
        many_channels = self.channels_last or (self.grouped and self.launch.arguments["CHANNELS"] > 1)
        code = self.code.main_loop if many_channels else self.code.opcodes
        waits = sorted({opcode for opcode in code if opcode.startswith(("BAR", "LDS", "STS"))})
        if waits or (self.shared and not many_channels):
            found.append(f"{self.shared} bytes of shared memory, {waits}")
        return found


@dataclass(frozen=True, order=True)
class SPNConfiguration(Configuration):
    kernels: ClassVar = {PROJECTION: Projection} | dict.fromkeys(WALKS, Walk)

    upsample: int = 1
    relu: bool = False
    kernel_size: int = 3
    one_mask: bool = False
    grouped: bool = False

    @property
    def spec(self) -> OpSpec:
        return CONDITIONAL_SPN if self.grouped else SPN

    @property
    def options(self) -> str:
        taps = [f"k = {self.kernel_size}"] * (self.kernel_size != 3)
        return ", ".join(["relu"] * self.relu + taps + ["one mask"] * self.one_mask + ["groups"] * self.grouped)

    @property
    def modelled(self) -> bool:
        return not self.one_mask

    @property
    def may_spill(self) -> bool:
        return self.dtype == "double" or self.kernel_size == 5

    def cases(self) -> Iterator[Case]:
        options = {"upsample": self.upsample, "activation": "relu" if self.relu else None}
        sizes = {"kernel_size": self.kernel_size} | ({"masks": 1} if self.one_mask else {})
        # So few channels that the projection is our kernel, and so many that it is cuDNN's. In the first, statistics
        # have so many parts that they are merged in two steps.
        for shape in ((32, 64, 64, 64), (4, 256, 64, 64)):
            yield Case(shape, "", options, sizes=sizes)

    @classmethod
    def selection(cls) -> list[Wanted]:
        """Each row of the tables of block sizes, in float32 and in bfloat16, on one GPU.

        A GPU has one of the four pairs of layout and upsampling in float32 and the opposite one in bfloat16, so every
        walk in both, and the other kernels in one. Other walks, in NCHW, are on one GPU each. Half is as bfloat16. Of
        the walks of groups, one pair in each dtype; the sums of rows, which compile in no time, on all GPUs.
        """
        pairs = [(last, upsample, upsample == 2) for last, upsample in product((False, True), (1, 2))]
        found = []
        for i, gpu in enumerate(TRITON_GPUS):
            of_both = [cls("float", *pairs[i]), cls("BFloat16", *pairs[~i])]
            found += [Wanted(of_both[i % 2], gpu), Wanted(of_both[1 - i % 2], gpu, WALKS)]
        others = [cls("double"), cls("float", kernel_size=1), cls("float", kernel_size=5), cls("float", one_mask=True)]
        found += [Wanted(of, gpu, WALKS) for of, gpu in zip(others, TRITON_GPUS, strict=True)]
        grouped = [cls("float", grouped=True), cls("BFloat16", True, 2, True, grouped=True)]
        found += [Wanted(of, gpu, (*WALKS, FINISH)) for of, gpu in zip(grouped, TRITON_GPUS, strict=False)]
        return found + [Wanted(grouped[0], gpu, (FINISH_ROWS,)) for gpu in TRITON_GPUS]

    @classmethod
    def everything(cls) -> list[Wanted]:
        sizes = (3, False), (3, True), (1, False), (5, False)
        parameters = [(*of, False) for of in sizes] + [(3, False, True)]
        options = product(DTYPES, (False, True), (1, 2), (False, True), parameters)
        configurations = [cls(*of_x, *of_parameters) for *of_x, of_parameters in options]
        return [Wanted(*pair) for pair in product(configurations, TRITON_GPUS)]


# ---- what is measured, and goals ----

UP = Head("up → SPN → ReLU", {"upsample": 2, "activation": "relu"})


def _compiled(head: str, mode: str, shape: Shape) -> tuple[str, ...]:
    """Where torch.compile comes near the fastest peer; elsewhere it would compile for minutes to lose."""
    if (head, mode) == ("plain", "forward"):
        return in_layouts("compile")
    lost = ("up", "forward_backward"), ("conditional", "forward_backward")
    return () if (head, mode) in lost else ("compile-channels_last",)


def _generator(impl: str) -> Generator:
    return Generator(norm="bn") if impl == "bn" else Generator(norm="spn", impl=impl)


# ---- goals ----


def _over_peers(head: str, mode: str, precision: str, machine: str) -> float | None:
    if machine == "cpu":
        return {"forward": (8, 3), "forward_backward": (12, 4)}[mode][head != "up"]
    if head == "up":
        return 8
    return 3 if "H200" in machine and (mode, precision) == ("backward", "bf16") else 4


def _never_below(head: str, mode: str, precision: str, machine: str) -> float | None:
    return {"forward": 1.5, "forward_backward": 1.7}[mode] if head == "plain" else None


def _triton_over_peers(head: str, mode: str, precision: str, machine: str) -> float | None:
    return 3 if machine != "cpu" and precision == "tf32" else None


def _triton_over_native(head: str, mode: str, precision: str, machine: str) -> float | None:
    return 0.8 if machine != "cpu" and precision in ("tf32", "bf16") else None


def _share(gpu: str) -> dict[str, tuple[float, float]]:
    on_h200 = "H200" in gpu  # whose bandwidth outruns its instructions in bfloat16
    return {
        STATISTICS: (0.90, 0.90),
        MODULATE: (0.88, 0.70 if on_h200 else 0.85),
        REDUCE: (0.70, 0.45) if on_h200 else (0.85, 0.75),
        APPLY: (0.85, 0.60) if on_h200 else (0.88, 0.82),
    }


BENCHMARK = Op(
    spec=SPN,
    title="SPN",
    heads={"plain": Head("SPN"), "up": UP, "conditional": HEAD},
    shapes=Shapes(
        cpu={
            (64, 256, 8, 8): "early block of a 32x32 generator, large batch: small planes",
            (16, 256, 32, 32): "its last block, at the batch of the generator step",
            (64, 256, 32, 32): "the same, large batch: far larger than any cache",
            (8, 64, 128, 128): "last block of a 128x128 generator: large planes, small products",
        },
        gpu=((64, 256, 32, 32), (16, 256, 32, 32), (32, 64, 128, 128)),
        kernels=((64, 256, 32, 32), (64, 256, 64, 64)),
        small=((64, 256, 4, 4), (64, 256, 8, 8), (16, 256, 4, 4)),
        sweep={
            "N": [(n, 64, 32, 32) for n in (4, 8, 16, 32, 64)],
            "C": [(16, c, 32, 32) for c in (16, 32, 64, 128, 256)],
            "HW": [(16, 64, side, side) for side in (8, 16, 32, 64)],
        },
    ),
    step=Step(
        plain="bn",
        plain_title="batch norm",
        title="SPN",
        build=_generator,
        latent_dim=128,
        calls=[
            *(((1, 256, side, side), UP) for side in (4, 8, 16)),  # norm1 of each block, before its upsampling
            *(((1, 256, side, side), Head("SPN → ReLU", {"activation": "relu"})) for side in (8, 16, 32)),
        ],
        goal={"cpu": 1, "cuda": 1},
    ),
    goals=Goals(
        speed_ups=(
            SpeedUp(("native",), PEERS, _over_peers, _never_below),
            SpeedUp(("triton",), PEERS, _triton_over_peers),
            SpeedUp(("triton",), ("native",), _triton_over_native),
        ),
        over_copy=1.5,
        saved={"plain": 1, "up": 0.25, "conditional": 1},
        share=_share,
        launches={"forward": 4, "backward": 6},
        small=4,
    ),
    products=SQUARE_PRODUCTS,
    kernel_passes=kernel_passes,
    predicted=predicted_times,
    gemm_times=gemm_times,
    cuda=CUDA,
    triton=SPNConfiguration,
    compiled=_compiled,
    wholes=WHOLES,
    auto=lambda x, options, tf32: preferred(x, options.get("upsample", 1)),
)
