"""Conditional SPN in the benchmarks: beside SPN, and in what users call. Its kernels are SPN's."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor, nn

from benchmarks.contenders import placed
from benchmarks.registry import Head, Shape, Whole
from benchmarks.triton_code import DTYPES, TRITON_GPUS, Configuration, Wanted
from pixnorm.networks import Generator
from pixnorm.nn import ConditionalSPN2d
from pixnorm.nn.spn import KERNELS
from pixnorm.testing import CONDITIONAL_SPN, LAYOUTS, SPN, Case

Built = tuple[Callable[[], Tensor], list[Tensor]]
CLASSES, LATENT = (10, 100), 128
SHAPES = [(64, 256, 8, 8), (16, 256, 32, 32), (8, 64, 128, 128)]  # of SPN's

HEAD = Head("conditional SPN, 10 classes", sizes={"groups": 10}, spec=CONDITIONAL_SPN, cpu=SHAPES)


@dataclass(frozen=True, order=True)
class ClassParametersConfiguration(Configuration):
    """The op that forms the parameters of classes. It moves little: the gates are the usual ones."""

    kernels: ClassVar = {}
    modelled = False

    k: int = 3

    @property
    def options(self) -> str:
        return f"k = {self.k}"

    def run(self) -> None:
        from pixnorm.triton_kernels.class_parameters import class_parameters_fwd, class_parameters_grad

        layer = ConditionalSPN2d(256, 100, kernel_size=self.k, dtype=DTYPES[self.dtype], device="meta")
        names = ["mask_weight", "mask_bias", *KERNELS, "kernel_scale", "kernel_shift"]
        tensors = [getattr(layer, name).detach() for name in names]
        classes = torch.empty((64,), dtype=torch.int64, device="meta")
        class_parameters_grad(*class_parameters_fwd(classes, *tensors), classes, *tensors[:-1])

    @classmethod
    def selection(cls) -> list[Wanted]:
        """Usual kernels on the GPUs in turn; the largest."""
        usual = [Wanted(cls(("float", "BFloat16")[i % 2]), gpu) for i, gpu in enumerate(TRITON_GPUS)]
        return [*usual, Wanted(cls("double", k=5), TRITON_GPUS[0])]

    @classmethod
    def everything(cls) -> list[Wanted]:
        configurations = [cls(dtype, k=k) for dtype, k in product(DTYPES, (1, 3, 5))]
        return [Wanted(*pair) for pair in product(configurations, TRITON_GPUS)]


def _reference_or(impl: str) -> str:
    return "reference" if impl == "eager" else impl


def _layer(classes: int) -> Callable[[str, Shape, str], Built]:
    """The module, with the kernels of the classes and the rows of the latent vectors that it forms."""

    def build(impl: str, shape: Shape, layout: str) -> Built:
        torch.manual_seed(0)
        layer = placed(layout, ConditionalSPN2d(shape[1], classes, LATENT, impl=_reference_or(impl)))
        x = LAYOUTS[layout](torch.randn(shape)).requires_grad_()
        y, z = torch.randint(classes, shape[:1]), torch.randn(shape[0], LATENT)
        return lambda: layer(x, y, z), [x, *layer.parameters()]

    return build


def _against_spn(classes: int) -> Callable[[str, Shape, str], Built]:
    """The op, and in the place of eager mode SPN."""

    def build(impl: str, shape: Shape, layout: str) -> Built:
        spec = SPN if impl == "eager" else CONDITIONAL_SPN
        tensors = spec.inputs(Case(shape, "", sizes={} if spec is SPN else {"groups": classes}), layout=layout)
        leaves = spec.leaves(tensors)
        call = spec.call("native" if impl == "eager" else impl)
        return lambda: call(**(tensors | leaves)), list(leaves.values())

    return build


def _generator(impl: str, shape: Shape, layout: str) -> Built:
    """With conditional SPN; in the place of eager mode one with PyTorch's conditional batch norm."""
    torch.manual_seed(0)
    norm = {"norm": "eager_cbn"} if impl == "eager" else {"norm": "cspn", "impl": impl}
    model: nn.Module = placed(layout, Generator(**norm, latent_dim=LATENT, num_classes=CLASSES[0]))
    y, z = torch.randint(CLASSES[0], shape[:1]), torch.randn(shape[0], LATENT)
    return lambda: model(z, y), list(model.parameters())


WHOLES = {
    **{
        f"layer of {k}": Whole(
            f"`ConditionalSPN2d`, {k} classes", SHAPES, _layer(k), {"forward": 3, "forward_backward": 4}
        )
        for k in CLASSES
    },
    **{
        f"against SPN, {k}": Whole(
            f"conditional SPN, {k} classes",
            SHAPES,
            _against_spn(k),
            {"forward": 1 / 1.1, "forward_backward": 1 / 1.1},
            "fused SPN",
        )
        for k in CLASSES
    },
    "generator": Whole(
        "generator with conditional SPN, 10 classes",
        [(16, 3, 32, 32)],
        _generator,
        {"forward_backward": 1 / 1.05},
        "eager conditional batch norm",
    ),
}
