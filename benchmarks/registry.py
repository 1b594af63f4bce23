"""What the benchmarks know of an op: an :class:`Op`, one for each file of ``benchmarks.ops``.

Measurements, tables, plots, goals and gates loop over these, and name no op themselves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn

from pixnorm.testing import DENSE_LAYOUTS, Case, OpSpec

Shape = tuple[int, ...]

MODES = {"forward": "forward", "backward": "backward", "forward_backward": "forward + backward"}
LAYOUTS = dict(zip(DENSE_LAYOUTS, ("NCHW", "channels_last"), strict=True))
IMPLS = ("native", "triton")
LIBRARIES = {"matmul": "`matmul`", "convolution": "1x1 convolution"}  # who multiplies: MKL, oneDNN
PEERS = (
    "eager",
    "compile",
    "cooperative",
)  # the last: torch.compile with reductions of blocks that wait for each other


class Precision(NamedTuple):
    """The dtype of the activations, whether convolutions may round to TF32, and both in words."""

    dtype: torch.dtype
    tf32: bool
    title: str


PRECISIONS = {
    "tf32": Precision(torch.float32, True, "fp32 with TF32"),
    "fp32": Precision(torch.float32, False, "fp32"),
    "bf16": Precision(torch.bfloat16, True, "bf16"),
    "fp16": Precision(torch.float16, True, "fp16"),
}
MAIN_PRECISIONS = ("tf32", "bf16")


class Head(NamedTuple):
    """One way to call an op.

    Attributes:
        title: in tables.
        options, sizes: of the ``Case``.
        spec: where it is not the op's first.
        cpu: on the CPU, the only shapes; None for all of the op's.
    """

    title: str
    options: Mapping[str, Any] = {}
    sizes: Mapping[str, int] = {}
    spec: OpSpec | None = None
    cpu: Sequence[Shape] | None = None


@dataclass(frozen=True)
class Shapes:
    """Output shapes; the first of each is the main one.

    Attributes:
        cpu, gpu: of the comparison with eager mode and torch.compile; on the CPU with a remark each.
        kernels: profiled kernel by kernel on a GPU.
        small: launch-bound on a GPU.
        sweep: on the CPU; by the name of the size that grows.
    """

    cpu: Mapping[Shape, str]
    gpu: Sequence[Shape]
    kernels: Sequence[Shape] = ()
    small: Sequence[Shape] = ()
    sweep: Mapping[str, Sequence[Shape]] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """A training step of a generator (forward, backward), with a plain layer and with the op in its place.

    Attributes:
        plain: the contender with the plain layer.
        plain_title, title: both in words.
        build: contender's impl (or ``plain``) -> the generator; weights are equal for all impls.
        latent_dim: of its input.
        calls: input shape (for a batch of 1) and head of each of the op's calls in the generator.
        goal: the longest time relative to the plain generator, on the CPU and on a GPU.
    """

    plain: str
    plain_title: str
    title: str
    build: Callable[[str], nn.Module]
    latent_dim: int
    calls: Sequence[tuple[Shape, Head]]
    goal: Mapping[str, float]


Ratio = Callable[[str, str, str, str], float | None]  # of a head, mode, precision and GPU ("cpu" on the CPU)


class SpeedUp(NamedTuple):
    """A goal: how many times faster some impls must be than others.

    Attributes:
        ours: impls; the best counts.
        over: contenders, or impls; the best counts.
        goal: the least ratio: on the CPU of the geometric mean over all shapes, on a GPU at the main shape.
        never_below: the least ratio at any shape, on the CPU.
    """

    ours: Sequence[str]
    over: Sequence[str]
    goal: Ratio
    never_below: Ratio = lambda *of: None


class Products(NamedTuple):
    """The matrix products of an op, as libraries do them.

    Attributes:
        by_library: (input shape, layout, whether backward too) -> by a key of ``LIBRARIES``, a function that does the
            op's matrix products alone.
        operations: (input shape, whether backward too) -> multiplications and additions.
    """

    by_library: Callable[[Shape, str, bool], Mapping[str, Callable[[], object]]]
    operations: Callable[[Shape, bool], int]


@dataclass(frozen=True)
class Whole:
    """What consists of more than one op, as a user calls it, against the same in plain PyTorch; on the CPU.

    Attributes:
        title: in tables.
        shapes: of its output.
        build: ("eager" or impl, shape, layout) -> the function without arguments, and the tensors that have gradients.
        goal: by mode, the least speed-up over eager mode in its best layout, at any shape; modes without one are not
            measured.
        over: what "eager" stands for, in words.
    """

    title: str
    shapes: Sequence[Shape]
    build: Callable[[str, Shape, str], tuple[Callable[[], torch.Tensor], list[torch.Tensor]]]
    goal: Mapping[str, float]
    over: str = "eager"


@dataclass(frozen=True)
class Goals:
    """Attributes:
    speed_ups: over peers, or over another impl.
    over_copy: on the CPU, the most time outside the matrix products, in copies of the bytes that must move.
    saved: by head, the most memory saved for backward, in tensors of the output's size.
    share: name of the GPU -> by kernel, the least share of a copy's bandwidth in float32 and bfloat16.
    launches: by mode, the most kernel launches of a call.
    small: least speed-up of a launch-bound call over eager mode, in wall time.
    """

    speed_ups: Sequence[SpeedUp] = ()
    over_copy: float | None = None
    saved: Mapping[str, float] = field(default_factory=dict)
    share: Callable[[str], Mapping[str, tuple[float, float]]] = lambda gpu: {}
    launches: Mapping[str, int] = field(default_factory=dict)
    small: float | None = None


@dataclass(frozen=True, eq=False)
class Op:
    """Attributes:
    spec: what tests know of it.
    title: in headings.
    heads: by name.
    shapes, step, goals: see there.
    wholes: by name, what is made of the op and others.
    products: None where it has none.
    kernel_passes: (upsampling, channels_last) -> by kernel, how many tensors of the input's size it reads and writes.
    predicted: (GPU, input shape, bytes per element, upsampling) -> seconds of forward and of backward.
    gemm_times: (GPU, input shape, bytes per element) -> the same of the GEMMs beside its kernels, if there are any.
    cuda: the ``cuda_code.Design`` of each of its CUDA kernels.
    triton: its ``triton_code.Configuration``.
    precisions: of the comparison on a GPU.
    same_layout: whether contenders are compared within a layout; otherwise each one in its best layout.
    compiled: (head, mode, shape) -> contenders under torch.compile that take part on the CPU; each compiles for long.
    auto: (first input, options, whether TF32 is allowed) -> the impl that ``impl="auto"`` takes.
    order: of the op in tables.
    """

    spec: OpSpec
    title: str
    heads: Mapping[str, Head]
    shapes: Shapes
    step: Step
    goals: Goals
    products: Products | None
    kernel_passes: Callable[[int, bool], Mapping[str, tuple[int, int]]]
    predicted: Callable[[Any, Shape, int, int], tuple[float, float]]
    gemm_times: Callable[[Any, Shape, int], tuple[float, float]] | None = None
    cuda: Mapping[str, Any] = field(default_factory=dict)
    triton: Any = None
    precisions: Sequence[str] = tuple(PRECISIONS)
    same_layout: bool = False
    compiled: Callable[[str, str, Shape], Sequence[str]] = lambda head, mode, shape: ()
    auto: Callable[[torch.Tensor, Mapping[str, Any], bool], str] | None = None
    wholes: Mapping[str, Whole] = field(default_factory=dict)
    order: int = 0

    def __str__(self) -> str:
        return self.spec.name

    @lru_cache  # noqa: B019 (one object for each call: drawn inputs are found by it)
    def case(self, head: str, shape: Shape) -> Case:
        """The call with an output of that shape."""
        n, c, h, w = shape
        scale = self.upsample(head)
        return Case((n, c, h // scale, w // scale), "benchmark", self.heads[head].options, sizes=self.heads[head].sizes)

    def kernel_bytes(self, shape: Shape, itemsize: int, upsample: int, channels_last: bool) -> dict[str, int]:
        """By kernel, the bytes that it must read and write for an input of that shape."""
        passes = self.kernel_passes(upsample, channels_last)
        return {name: (reads + writes) * itemsize * prod(shape) for name, (reads, writes) in passes.items()}

    def spec_of(self, head: str) -> OpSpec:
        return self.heads[head].spec or self.spec

    def upsample(self, head: str) -> int:
        return self.heads[head].options.get("upsample", 1)


def label(shape: Shape) -> str:
    return "x".join(map(str, shape))


def number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def in_layouts(*impls: str) -> tuple[str, ...]:
    """The contenders: each impl in each layout."""
    return tuple(f"{impl}-{layout}" for impl in impls for layout in DENSE_LAYOUTS)
