"""StyleGAN's layers in the benchmarks: both epilogues, what stands between two convolutions; modulated convolutions and
the blur, in what users call; and a generator with all of them, beside the same with grouped convolutions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.machine_code import Moves, moves
from benchmarks.model import GPU
from benchmarks.registry import IMPLS, PEERS, Goals, Head, Op, Shape, Shapes, SpeedUp, Step, Whole, in_layouts
from benchmarks.triton_code import DTYPES, TRITON_GPUS, Configuration, PlanesKernel, TileKernel, Wanted
from pixnorm.functional import blur2d, modulated_conv2d, spatially_modulated_conv2d
from pixnorm.nn import MappingNetwork, ModulatedConv2d, StyleBlock, StyleBlocks
from pixnorm.testing import LAYOUTS, Case, OpSpec
from pixnorm.testing.modulated_conv import SPATIALLY_MODULATED
from pixnorm.testing.style import STYLE_EPILOGUE, STYLE_NORM

# Tensors of x's size that each kernel reads and writes: x, dy; y, dx.
STREAMS = {
    "style_epilogue_fwd_kernel": (1, 1),
    "style_epilogue_bwd_kernel": (2, 1),
    "style_norm_statistics_kernel": (1, 0),
    "style_norm_fwd_kernel": (1, 1),
    "style_norm_bwd_reduce_kernel": (2, 0),
    "style_norm_bwd_apply_kernel": (2, 1),
}
RESIDENT = {"style_norm_fwd_resident_kernel": (1, 1), "style_norm_bwd_resident_kernel": (2, 1)}
FINISH = "style_finish_kernel"


class Stream(TileKernel):
    """Every tensor moves by 16 bytes. Beside them the noise, once for all channels of a thread."""

    @property
    def design(self) -> Moves:
        loads, stores = (STREAMS | RESIDENT)[self.name]
        size = int(self.elements) * self.itemsize
        return moves("LDG", loads * size) + moves("STG", stores * size)

    @property
    def pixels(self) -> float:
        """Of a thread, per round."""
        return (
            self.elements / self.columns if self.channels_last else self.launch.arguments["PIXELS"] / self.code.threads
        )

    def may_move(self, beyond: Moves) -> bool:
        moved = sum(width * count for (_, width), count in beyond.items())
        return {kind for kind, _ in beyond} <= {"LDG"} and moved <= self.pixels * self.itemsize


class Planes(PlanesKernel, Stream):
    """The same; and of each channel up to five numbers that are loaded, and four that are stored."""

    def may_move(self, beyond: Moves) -> bool:
        channels = self.columns if self.channels_last else self.launch.arguments["CHANNELS"]
        moved = sum(width * count for (_, width), count in beyond.items())
        return moved <= self.pixels * self.itemsize + 9 * channels * max(4, self.itemsize)


@dataclass(frozen=True, order=True)
class StyleConfiguration(Configuration):
    """StyleGAN 2's epilogue, or StyleGAN 1's, with all arguments."""

    kernels: ClassVar = dict.fromkeys(STREAMS, Stream) | dict.fromkeys(RESIDENT, Planes)

    norm: bool = False

    @property
    def spec(self) -> OpSpec:
        return STYLE_NORM if self.norm else STYLE_EPILOGUE

    @property
    def options(self) -> str:
        return "StyleGAN 1" if self.norm else "StyleGAN 2"

    def cases(self) -> Iterator[Case]:
        """Large planes; of the norm also the largest that stay in registers, forward and backward."""
        shapes = [(4, 64, 256, 256)]
        if self.norm:
            h = 64 if self.dtype == "double" else 128
            shapes += [(4, 256, 16, 32)] if self.channels_last else [(4, 64, h, 128), (4, 64, h // 2, 128)]
        yield from (Case(shape, "") for shape in shapes)

    @classmethod
    def selection(cls) -> list[Wanted]:
        """Both epilogues in float32 and bfloat16 and in both layouts, on the GPUs in turn; float64."""
        usual = list(product(("float", "BFloat16"), (False, True)))
        of_gpus = [(cls(*usual[i], norm), gpu) for norm in (False, True) for i, gpu in enumerate(TRITON_GPUS)]
        others = [(cls("double", norm, norm), TRITON_GPUS[norm]) for norm in (False, True)]
        # Not those of statistics, which have a selection of their own.
        return [Wanted(*pair, (*STREAMS, *RESIDENT, FINISH)) for pair in (*of_gpus, *others)]

    @classmethod
    def everything(cls) -> list[Wanted]:
        configurations = [cls(*of) for of in product(DTYPES, (False, True), (False, True))]
        return [Wanted(*pair) for pair in product(configurations, TRITON_GPUS)]


# ---- x · s with the sums of s² ----


class Scale(TileKernel):
    """x, s and their product, or three and two gradients, move by 16 bytes; beside them how often taps see pixels."""

    @property
    def design(self) -> Moves:
        loads, stores = SCALES[self.name]
        size = int(self.elements) * self.itemsize
        return moves("LDG", loads * size) + moves("STG", stores * size)

    def may_move(self, beyond: Moves) -> bool:
        """A count of each row and column of taps for each pixel of a thread."""
        moved = sum(width * count for (_, width), count in beyond.items())
        own = self.elements / self.columns if self.channels_last else self.columns * self.rounds_of_pixels
        return {kind for kind, _ in beyond} <= {"LDG"} and moved <= 4 * 2 * self.k * own

    @property
    def rounds_of_pixels(self) -> float:
        """Vectors of pixels of a thread, in NCHW, that differ."""
        return max(1, self.launch.arguments["PIXELS"] / (self.columns * self.code.threads))


SCALES = {"spatial_scale_fwd_kernel": (2, 1), "spatial_scale_bwd_kernel": (3, 2)}


@dataclass(frozen=True, order=True)
class SpatialScaleConfiguration(Configuration):
    kernels: ClassVar = dict.fromkeys(SCALES, Scale)
    spec: ClassVar = SPATIALLY_MODULATED
    modelled = False

    k: int = 3

    @property
    def options(self) -> str:
        return f"k = {self.k}"

    def cases(self) -> Iterator[Case]:
        yield Case((4, 64, 256, 256), "", sizes={"kh": self.k, "kw": self.k})

    @classmethod
    def selection(cls) -> list[Wanted]:
        """Float32 and bfloat16 in both layouts, on the GPUs in turn; float64; many taps."""
        usual = [cls(*of) for of in product(("float", "BFloat16"), (False, True))]
        found = [(usual[i], gpu) for i, gpu in enumerate(TRITON_GPUS)]
        found += [(cls("double", True), TRITON_GPUS[0]), (cls("float", k=5), TRITON_GPUS[1])]
        return [Wanted(*pair, tuple(SCALES)) for pair in found]  # not that of the demodulation

    @classmethod
    def everything(cls) -> list[Wanted]:
        configurations = [cls(*of) for of in product(DTYPES, (False, True), (1, 3, 5))]
        return [Wanted(*pair) for pair in product(configurations, TRITON_GPUS)]


# ---- what is measured, and goals ----

SHAPES = {
    (8, 256, 32, 32): "early layers",
    (4, 128, 64, 64): "in the middle",
    (2, 64, 128, 128): "late layers: large planes",
}
STYLES, LATENT = 512, 128  # the length of w, in layers and in the generator
Built = tuple[Callable[[], Tensor], list[Tensor]]


def grouped_convolution(x: Tensor, weight: Tensor, styles: Tensor) -> Tensor:
    """Modulated convolution as StyleGAN 2's code has it: kernels of each sample, in a grouped convolution."""
    n, c, h, w = x.shape
    kernels = weight * styles[:, None, :, None, None]
    kernels = kernels * (kernels.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
    y = F.conv2d(x.reshape(1, n * c, h, w), kernels.flatten(0, 1), padding="same", groups=n)
    return y.view(n, -1, *y.shape[2:])


class Synthesis(nn.Module):
    """A generator of 32x32 images with StyleGAN 2's layers of 256 channels, by an impl or (``"grouped"``) in PyTorch's
    operations, with grouped convolutions. The noise is the same in all calls."""

    def __init__(self, impl: str):
        super().__init__()
        self.grouped, impl = impl == "grouped", "reference" if impl in ("grouped", "eager") else impl
        self.mapping = MappingNetwork(LATENT, LATENT, layers=2)
        self.constant = nn.Parameter(torch.ones(1, 256, 4, 4))
        ups = (1, 2, 1, 2, 1, 2, 1)
        self.layers = StyleBlocks(*[StyleBlock(256, 256, 3, LATENT, upsample=up, impl=impl) for up in ups])
        self.colours = ModulatedConv2d(256, 3, 1, LATENT, demodulate=False, impl=impl)
        side = 4
        for i, block in enumerate(self.layers.blocks):
            side *= block.conv.upsample
            self.register_buffer(f"noise{i}", torch.randn(1, 1, side, side))
            nn.init.constant_(block.noise.strength, 0.1)

    def forward(self, z: Tensor) -> Tensor:
        w = self.mapping(z)
        x = self.constant.expand(z.shape[0], -1, -1, -1)
        noises = [getattr(self, f"noise{i}") for i in range(len(self.layers.blocks))]
        if not self.grouped:
            return self.colours(self.layers(x, w, noises), w)
        for block, noise in zip(self.layers.blocks, noises, strict=True):
            x = self.in_groups(block, x, w, noise)
        return self.colours(x, w)

    @staticmethod
    def in_groups(block: StyleBlock, x: Tensor, w: Tensor, noise: Tensor) -> Tensor:
        if block.conv.upsample == 2:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        x = grouped_convolution(x, block.conv._scaled_weight(), block.conv.styles(w))
        if block.conv.upsample == 2:
            x = blur2d(x, impl="reference")
        x = x + block.noise.strength * noise + block.bias[:, None, None]
        return F.leaky_relu(x, 0.2) * block.gain


def _generator(impl: str) -> nn.Module:
    torch.manual_seed(0)
    return Synthesis(impl)


def _modulated(over: str) -> Callable[[str, Shape, str], Built]:
    """A modulated convolution; in the place of eager mode the plain form, or the grouped one."""

    def build(impl: str, shape: Shape, layout: str) -> Built:
        torch.manual_seed(0)
        x = LAYOUTS[layout](torch.randn(shape)).requires_grad_()
        weight = LAYOUTS[layout](torch.randn(shape[1], shape[1], 3, 3) * 0.02).requires_grad_()
        styles = torch.rand(shape[:2]).requires_grad_()
        if impl == "eager" and over == "grouped":
            return lambda: grouped_convolution(x, weight, styles), [x, weight, styles]
        impl = "reference" if impl == "eager" else impl
        return lambda: modulated_conv2d(x, weight, styles, impl=impl), [x, weight, styles]

    return build


def _spatially_modulated(impl: str, shape: Shape, layout: str) -> Built:
    torch.manual_seed(0)
    x, style_map = (LAYOUTS[layout](torch.randn(shape)).requires_grad_() for _ in range(2))
    weight = LAYOUTS[layout](torch.randn(shape[1], shape[1], 3, 3) * 0.02).requires_grad_()
    impl = "reference" if impl == "eager" else impl
    return lambda: spatially_modulated_conv2d(x, weight, style_map, impl=impl), [x, weight, style_map]


def _blur(up: int, down: int) -> Callable[[str, Shape, str], Built]:
    def build(impl: str, shape: Shape, layout: str) -> Built:
        n, c, h, w = shape
        x = LAYOUTS[layout](torch.randn(n, c, h * down // up, w * down // up)).requires_grad_()
        impl = "reference" if impl == "eager" else impl
        return lambda: blur2d(x, up=up, down=down, impl=impl), [x]

    return build


WHOLES = {
    "modulated": Whole(
        "modulated convolution",
        list(SHAPES),
        _modulated("scales"),
        {"forward": 1.1, "forward_backward": 1.1},
        "scale, convolution, scale in eager mode",
    ),
    "grouped": Whole(
        "modulated convolution",
        list(SHAPES),
        _modulated("grouped"),
        {"forward": 1, "forward_backward": 1},
        "grouped convolution",
    ),
    "spatially modulated": Whole(
        "spatially modulated convolution",
        list(SHAPES),
        _spatially_modulated,
        {"forward": 1.6, "forward_backward": 1.5},
    ),
    **{
        title: Whole(f"`blur2d`, {title}", list(SHAPES), _blur(up, down), {"forward": 1, "forward_backward": 1})
        for title, up, down in (("same size", 1, 1), ("up", 2, 1), ("down", 1, 2))
    },
}


def kernel_passes(upsample: int, channels_last: bool) -> dict[str, tuple[int, int]]:
    """Tensors of x's size that each Triton kernel reads and writes. A call of the first epilogue runs one forward and
    one backward, besides the one that adds parts up; of the second all streaming ones, or the two resident ones."""
    return STREAMS | RESIDENT


def predicted_times(gpu: GPU, x: Shape, itemsize: int, upsample: int) -> tuple[float, float]:
    """Predicted seconds of StyleGAN 2's epilogue, forward and backward: its bytes at the speed of a copy."""
    seconds = itemsize * prod(x) / gpu.copy
    return tuple(sum(STREAMS[f"style_epilogue_{of}_kernel"]) * seconds for of in ("fwd", "bwd"))


def _goal(head: str, mode: str, precision: str, machine: str) -> float | None:
    return {"epilogue": 3 if mode == "forward" else 2.5, "norm": 3}[head]


EPILOGUE = Head("StyleGAN 2's epilogue", {"gain": 2**0.5})

BENCHMARK = Op(
    spec=STYLE_EPILOGUE,
    title="Style",
    heads={"epilogue": EPILOGUE, "norm": Head("StyleGAN 1's epilogue", spec=STYLE_NORM)},
    shapes=Shapes(
        cpu=SHAPES,
        gpu=((64, 256, 32, 32), (32, 64, 128, 128)),
        kernels=((64, 256, 32, 32),),
        small=((64, 256, 4, 4),),
    ),
    step=Step(
        plain="grouped",
        plain_title="grouped convolutions",
        title="StyleGAN 2's layers",
        build=_generator,
        latent_dim=LATENT,
        calls=[((1, 256, side, side), EPILOGUE) for side in (4, 8, 8, 16, 16, 32, 32)],
        goal={"cpu": 1, "cuda": 0.8},
    ),
    goals=Goals(
        speed_ups=(SpeedUp(IMPLS, PEERS, _goal, lambda *of: 1),),
        over_copy=1.5,
        saved={"epilogue": 0, "norm": 0},
        launches={"forward": 1, "backward": 2},
    ),
    products=None,
    kernel_passes=kernel_passes,
    predicted=predicted_times,
    triton=StyleConfiguration,
    precisions=("fp32", "bf16"),
    compiled=lambda head, mode, shape: in_layouts("compile"),
    wholes=WHOLES,
    order=3,
)
