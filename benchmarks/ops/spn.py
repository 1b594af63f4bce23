"""SPN in the benchmarks."""

from benchmarks import model
from benchmarks.contenders import square_products
from benchmarks.registry import PEERS, Goals, Head, Op, Shape, Shapes, SpeedUp, Step, in_layouts
from pixnorm.networks import Generator
from pixnorm.ops.spn import preferred
from pixnorm.testing import SPN

UP = Head("up → SPN → ReLU", {"upsample": 2, "activation": "relu"})


def _compiled(head: str, mode: str, shape: Shape) -> tuple[str, ...]:
    """Where torch.compile comes near the fastest peer; elsewhere it would compile for minutes to lose."""
    if (head, mode) == ("plain", "forward"):
        return in_layouts("compile")
    return () if (head, mode) == ("up", "forward_backward") else ("compile-channels_last",)


def _generator(impl: str) -> Generator:
    return Generator(norm="bn") if impl == "bn" else Generator(norm="spn", impl=impl)


# ---- goals ----


def _over_peers(head: str, mode: str, precision: str, machine: str) -> float | None:
    if machine == "cpu":
        return 8 if head == "up" else {"forward": 4, "forward_backward": 3}[mode]
    if head == "up":
        return 8
    return 3 if "H200" in machine and (mode, precision) == ("backward", "bf16") else 4


def _triton_over_peers(head: str, mode: str, precision: str, machine: str) -> float | None:
    return 3 if machine != "cpu" and precision == "tf32" else None


def _triton_over_native(head: str, mode: str, precision: str, machine: str) -> float | None:
    return 0.8 if machine != "cpu" and precision in ("tf32", "bf16") else None


def _share(gpu: str) -> dict[str, tuple[float, float]]:
    on_h200 = "H200" in gpu  # whose bandwidth outruns its instructions in bfloat16
    return {
        "spn_statistics_kernel": (0.90, 0.90),
        "spn_fwd_modulate_kernel": (0.88, 0.70 if on_h200 else 0.85),
        "spn_bwd_reduce_kernel": (0.70, 0.45) if on_h200 else (0.85, 0.75),
        "spn_bwd_apply_kernel": (0.85, 0.60) if on_h200 else (0.88, 0.82),
    }


BENCHMARK = Op(
    spec=SPN,
    title="SPN",
    heads={"plain": Head("SPN"), "up": UP},
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
        goal={"cpu": 1.05, "cuda": 1},
    ),
    goals=Goals(
        speed_ups=(
            SpeedUp(("native",), PEERS, _over_peers),
            SpeedUp(("triton",), PEERS, _triton_over_peers),
            SpeedUp(("triton",), ("native",), _triton_over_native),
        ),
        over_copy=1.5,
        saved={"plain": 1, "up": 0.25},
        share=_share,
        launches={"forward": 4, "backward": 6},
        small=4,
    ),
    products=square_products,
    kernel_passes=model.kernel_passes,
    predicted=model.spn_times,
    compiled=_compiled,
    auto=lambda x, options, tf32: preferred(x, options.get("upsample", 1)),
)
