"""GConv's mixing, that is, what follows its convolution, in the benchmarks."""

from benchmarks import model
from benchmarks.contenders import square_products
from benchmarks.registry import IMPLS, Goals, Head, Op, Shape, Shapes, SpeedUp, Step, in_layouts
from pixnorm.networks import Generator
from pixnorm.ops.gconv import preferred
from pixnorm.testing import GCONV_MIX

LATENT_DIM = 32
MIXING = Head("GConv's mixing", sizes={"bias": 0})  # without a bias, as in the generator


def _compiled(head: str, mode: str, shape: Shape) -> tuple[str, ...]:
    """At one shape: eager mode is bound by the same product."""
    return in_layouts("compile") if shape == (16, 256, 32, 32) else ()


def _generator(impl: str) -> Generator:
    options = {"norm": "bigbn", "latent_dim": LATENT_DIM, "bias": False}
    return Generator(conv="conv", **options) if impl == "conv" else Generator(conv="gconv", impl=impl, **options)


def _over_eager(head: str, mode: str, precision: str, machine: str) -> float | None:
    """On a GPU none in strict float32, where both are bound by the same operations."""
    return 2 if machine == "cpu" or precision in ("tf32", "bf16") else None


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
        goal={"cpu": 1.05, "cuda": 1.05},
    ),
    goals=Goals(speed_ups=(SpeedUp(IMPLS, ("eager",), _over_eager),)),
    products=square_products,
    kernel_passes=model.kernel_passes,
    predicted=model.spn_times,
    precisions=("tf32", "fp32", "bf16"),
    same_layout=True,
    compiled=_compiled,
    auto=lambda u, options, tf32: preferred(u, tf32),
    order=1,
)
