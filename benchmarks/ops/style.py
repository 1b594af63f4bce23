"""The machine code of StyleGAN's epilogues, in Triton. They have no measurements of their own."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

from benchmarks.machine_code import Moves, moves
from benchmarks.triton_code import DTYPES, TRITON_GPUS, Configuration, PlanesKernel, TileKernel, Wanted
from pixnorm.testing import Case, OpSpec
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
    modelled = False

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
        found = [Wanted(cls(*usual[i], norm), gpu) for norm in (False, True) for i, gpu in enumerate(TRITON_GPUS)]
        return [*found, *(Wanted(cls("double", norm, norm), TRITON_GPUS[norm]) for norm in (False, True))]

    @classmethod
    def everything(cls) -> list[Wanted]:
        configurations = [cls(*of) for of in product(DTYPES, (False, True), (False, True))]
        return [Wanted(*pair) for pair in product(configurations, TRITON_GPUS)]
