"""The machine code of the convolution of a label map, in Triton. It has no measurements of its own."""

from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch

from benchmarks.machine_code import Moves, moves
from benchmarks.triton_code import DTYPES, TRITON_GPUS, Configuration, ProductKernel, TritonKernel, Wanted
from pixnorm.testing import LAYOUTS

FORWARD, GRADIENT = "label_conv_fwd_kernel", "label_conv_grad_kernel"
LABEL = 8  # bytes


class Gather(TritonKernel):
    """The main loop, over a row of taps, reads the rows of the table by 16 bytes, and a label for each of them."""

    @property
    def design(self) -> Moves:
        arguments = self.launch.arguments
        size = arguments["K"] * arguments["PIXELS"] * arguments["CHANNELS"] * self.itemsize // self.code.threads
        return moves("LDG", size) + moves("LDG", size // 16 * LABEL, LABEL)

    def may_move(self, beyond: Moves) -> bool:
        return not beyond


class Product(ProductKernel):
    """The main loop reads dy and y by asynchronous copies of 16 bytes, and labels; float32 is three bfloat16."""

    @property
    def multiplier(self) -> str | None:
        if self.dtype == "double":
            return "DMMA" if self.gpu.arch in ("sm_80", "sm_90") else None
        return "HMMA"

    @property
    def design(self) -> Moves:
        arguments = self.launch.arguments
        return moves("LDGSTS", arguments["PIXELS"] * arguments["CHANNELS"] * self.itemsize * 2 // self.code.threads)

    def may_move(self, beyond: Moves) -> bool:
        return {width for _, width in beyond} == {LABEL}

    def counts_rounds(self, kind: str, width: int) -> bool:
        return width == 16


@dataclass(frozen=True, order=True)
class LabelConvConfiguration(Configuration):
    kernels: ClassVar = {FORWARD: Gather, GRADIENT: Product}
    modelled = False

    k: int = 3

    @property
    def options(self) -> str:
        return f"k = {self.k}"

    def run(self) -> None:
        """Those of SPADE: ReLU, 128 channels; more labels than a tile of the gradient has."""
        from pixnorm.triton_kernels.label_conv import label_conv_fwd, label_conv_grad

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=DTYPES[self.dtype], device="meta")

        labels = torch.empty((4, 64, 64), dtype=torch.int64, device="meta")
        weight, bias, y = empty(128, 35, self.k, self.k), empty(128), empty(4, 128, 64, 64)
        label_conv_fwd(labels, weight, bias, -1, 0.0)
        grad_y = LAYOUTS["channels_last" if self.channels_last else "contiguous"](y)
        label_conv_grad(grad_y, labels, weight, y, True, -1, 0.0)

    @classmethod
    def selection(cls) -> list[Wanted]:
        """Float32 and bfloat16 in both layouts of dy, on the GPUs in turn; float64; another k. Half is as bfloat16."""
        usual = [cls(*of) for of in product(("float", "BFloat16"), (False, True))]
        found = [Wanted(usual[(i + j) % 4], gpu) for i, gpu in enumerate(TRITON_GPUS) for j in (0, 3)]
        others = [Wanted(cls("float", k=5), gpu, (GRADIENT,)) for gpu in TRITON_GPUS[:1]]
        return [*found, *others, *(Wanted(cls("double"), gpu) for gpu in TRITON_GPUS[:2])]

    @classmethod
    def everything(cls) -> list[Wanted]:
        configurations = [cls(*of) for of in product(DTYPES, (False, True), (1, 3, 5))]
        return [Wanted(*pair) for pair in product(configurations, TRITON_GPUS)]
