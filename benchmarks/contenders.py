"""Who runs against whom: eager PyTorch, torch.compile, every backend; and the floors, GEMMs alone and copies alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, lru_cache

import pytest
import torch
from torch import Tensor

from pixnorm.testing import DENSE_LAYOUTS, Case, OpSpec, available_impls, saved_bytes

DEVICE = "cpu"
DTYPE = torch.float32
MODES = ("forward", "forward_backward")
LARGE = 1 << 22  # elements of x above which the memory saved for backward is not measured: it is proportional
PEERS = tuple(f"{peer}-{layout}" for peer in ("eager", "compile") for layout in DENSE_LAYOUTS)
# With no kernel built, ask for the native one all the same: it fails, and says how to get it.
KERNELS = tuple(available_impls(DEVICE)[1:]) or ("native",)
FUSED = tuple(f"{impl}-{layout}" for impl in KERNELS for layout in DENSE_LAYOUTS)
GEMMS = tuple(f"gemm-{layout}" for layout in DENSE_LAYOUTS)  # of SPN its projection alone, of GConv its mixing
COPIES = ("copy", "copy_fresh")


@dataclass
class Contender:
    """A function to time.

    Attributes:
        run: one round.
        info: what else is known of it; stored beside the times.
        seconds: of the shortest round so far.
    """

    run: Callable[[], object]
    info: dict = field(default_factory=dict)
    seconds: float = math.inf


def laps(count: int) -> pytest.MarkDecorator:
    """The contenders of a race take turns, so that a machine that slows down slows them all."""
    return pytest.mark.parametrize("lap", range(count), ids="lap{}".format)


@lru_cache(maxsize=len(DENSE_LAYOUTS))  # the races over one case follow each other
def draw(spec: OpSpec, case: Case, layout: str) -> dict[str, Tensor]:
    return spec.inputs(case, DTYPE, layout=layout, device=DEVICE)


def implementation(spec: OpSpec, name: str) -> Callable[..., Tensor]:
    """The function of a contender: plain PyTorch, eager or compiled, or one impl."""
    if name == "eager":
        return spec.reference
    if name == "compile":
        return torch.compile(spec.reference, dynamic=False)
    return spec.call(name)


class Race:
    """One call of an op, and the contenders that run it: by name, each made when it is first asked for.

    Args:
        spec: the op.
        case: shape and options.
        mode: ``"forward"``, without gradients, or ``"forward_backward"``.
    """

    def __init__(self, spec: OpSpec, case: Case, mode: str):
        torch._dynamo.reset()  # every race compiles for its own shape
        self.spec, self.case, self.backward = spec, case, mode == "forward_backward"
        self.contenders: dict[str, Contender] = {}
        self.inputs = cache(self._inputs)

    def __getitem__(self, name: str) -> Contender:
        if name not in self.contenders:
            self.contenders[name] = self._contender(name)
        return self.contenders[name]

    def _inputs(self, layout: str) -> tuple[dict[str, Tensor], list[Tensor], Tensor]:
        """All tensors, those of them that get a gradient, and a gradient of the output."""
        tensors = draw(self.spec, self.case, layout)
        differentiable = [name for name in self.spec.differentiable if name in tensors]
        leaves = [tensors[name].requires_grad_(self.backward) for name in differentiable]
        with torch.no_grad():
            grad = torch.randn_like(self.spec.call(KERNELS[0])(**tensors, **self.case.options))
        return tensors, leaves, grad

    def _contender(self, name: str) -> Contender:
        if name in COPIES:
            return Contender(self._copy(fresh=name == "copy_fresh"))
        impl, layout = name.split("-")
        if impl == "gemm":
            return Contender(projection(self.case.shape, layout, self.backward))
        function = implementation(self.spec, impl)
        tensors, leaves, grad = self.inputs(layout)

        def forward() -> Tensor:
            return function(**tensors, **self.case.options)

        if not self.backward:
            forward = torch.no_grad()(forward)
            if impl == "compile":
                forward()
            return Contender(forward)

        def run() -> None:
            torch.autograd.grad(forward(), leaves, grad)

        if impl == "compile":
            run()
        if tensors[self.spec.first].numel() > LARGE:
            return Contender(run)
        return Contender(run, {"saved_bytes": saved_bytes(forward, tensors.values())})

    def _copy(self, fresh: bool) -> Callable[[], object]:
        """A copy that moves as many bytes as the op must move outside its GEMMs: half are read, half are written.

        Args:
            fresh: write as much as the op allocates (its outputs, and what it saves) into fresh memory, the rest into
                memory that has been used before; otherwise write all into such memory.
        """
        traffic = self.spec.traffic(self.case, DTYPE)
        size = traffic.forward - traffic.forward_gemm
        allocated = self.inputs(DENSE_LAYOUTS[0])[2].nbytes + self.spec.saved_bytes(self.case, DTYPE)
        if self.backward:
            size += traffic.backward - traffic.backward_gemm
            allocated += self.inputs(DENSE_LAYOUTS[0])[0][self.spec.first].nbytes
        source = torch.ones(size // 2 // DTYPE.itemsize, dtype=DTYPE, device=DEVICE)
        ready = torch.ones_like(source)
        cut = allocated // DTYPE.itemsize if fresh else 0

        def run() -> None:
            source[:cut].clone()
            ready[cut:].copy_(source[cut:])

        return run


def projection(shape: tuple[int, ...], layout: str, backward: bool) -> Callable[[], None]:
    """The products with a square weight, as SPN's kernels do those with its projection: p = W x; then dx += Wᵀ dp and
    dW = dp xᵀ. GConv's mixing has three of the same sizes."""
    n, c, h, w = shape
    weight, grad_weight = torch.ones(c, c, dtype=DTYPE), torch.ones(c, c, dtype=DTYPE)
    size = (n * h * w, c) if layout == "channels_last" else (n, c, h * w)
    x, p, grad_x = (torch.ones(size, dtype=DTYPE) for _ in range(3))

    def pixels() -> None:
        torch.mm(x, weight.t(), out=p)
        if backward:
            torch.addmm(grad_x, p, weight, out=grad_x)
            torch.mm(p.t(), x, out=grad_weight)

    def planes() -> None:
        torch.bmm(weight.expand(n, c, c), x, out=p)
        if backward:
            torch.baddbmm(grad_x, weight.t().expand(n, c, c), p, out=grad_x)
            for i in range(n):
                torch.addmm(grad_weight, p[i], x[i].t(), beta=float(i > 0), out=grad_weight)

    return pixels if layout == "channels_last" else planes
