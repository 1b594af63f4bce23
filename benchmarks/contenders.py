"""Who runs against whom: eager PyTorch, torch.compile, every impl; and floors: matrix products alone, copies alone."""

from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import NamedTuple

import cpuinfo
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.registry import LIBRARIES, PRECISIONS, Op, Products, Shape, Step
from benchmarks.stopwatch import Timed
from pixnorm.testing import DENSE_LAYOUTS, LAYOUTS, Case, OpSpec

COPIES = ("copy-used", "copy-fresh")  # into memory that was used before; into fresh memory, as much as the op allocates


class Passes(NamedTuple):
    """A contender's forward (keeping what backward needs), its backward from the result, and its tensors."""

    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], object]
    tensors: dict[str, Tensor]

    def both(self) -> object:
        return self.backward(self.forward())

    @torch.no_grad()
    def inference(self) -> Tensor:
        return self.forward()

    def timed(self) -> dict[str, Timed]:
        """Each pass alone."""
        return {"forward": Timed(lambda _: self.forward()), "backward": Timed(self.backward, self.forward)}


def implementation(spec: OpSpec, name: str) -> Callable[..., Tensor]:
    """The function of a contender: plain PyTorch, eager or compiled, or one impl."""
    if name == "eager":
        return spec.reference
    if name == "compile":
        return torch.compile(spec.reference, dynamic=False)
    if name == "cooperative":  # as TORCHINDUCTOR_COOPERATIVE_REDUCTIONS=1
        return torch.compile(spec.reference, dynamic=False, options={"triton.cooperative_reductions": True})
    return spec.call(name)


@lru_cache(maxsize=1)  # drawing takes longer than measuring; calls of one case follow each other
def draw(spec: OpSpec, case: Case, device: torch.device) -> dict[str, Tensor]:
    return spec.inputs(case, device=device)


class Call:
    """One call of an op in one precision.

    Args:
        head: a key of the op's.
        shape: of the output.
        precision: a key of ``PRECISIONS``; sets the flag that allows TF32.
    """

    def __init__(self, op: Op, head: str, shape: Shape, precision: str, device: torch.device | str):
        torch._dynamo.reset()  # torch.compile specialises on each case
        self.dtype, torch.backends.cudnn.allow_tf32, _ = PRECISIONS[precision]
        self.op, self.spec, self.case = op, op.spec_of(head), op.case(head, shape)
        self.tensors = draw(self.spec, self.case, torch.device(device))

    def inputs(self, layout: str) -> dict[str, Tensor]:
        """The tensors, differentiable ones as leaves. Parameters are float32 where the op takes them so."""
        parameter_dtype = torch.float32 if self.spec.float32_parameters else self.dtype

        def cast(name: str, tensor: Tensor) -> Tensor:
            if name in self.spec.activations:
                return LAYOUTS[layout](tensor.to(self.dtype))
            return tensor.to(parameter_dtype) if tensor.is_floating_point() else tensor

        tensors = {name: cast(name, tensor) for name, tensor in self.tensors.items()}
        return tensors | self.spec.leaves(tensors)

    def passes(self, name: str) -> Passes:
        """Those of a contender; its forward has run once."""
        impl, layout = name.split("-")
        tensors = self.inputs(layout)
        leaves = [tensors[leaf] for leaf in self.spec.differentiable if leaf in tensors]
        function = implementation(self.spec, impl)

        def forward() -> Tensor:
            return function(**tensors, **self.case.options)

        grad = torch.randn_like(forward())
        return Passes(forward, lambda y: torch.autograd.grad(y, leaves, grad), tensors)

    def ready(self, name: str) -> Passes:
        """Those of a contender, after both have run once."""
        passes = self.passes(name)
        passes.both()
        return passes

    def floor(self, name: str, backward: bool) -> Callable[[], object] | None:
        """The matrix products alone, or a copy of the bytes that must move besides; None if none must: all are in the
        processor's cache, from call to call, or none are moved."""
        kind, variant = name.split("-")
        if kind in LIBRARIES:
            return self.op.products and self.op.products.by_library(self.case.shape, variant, backward)[kind]
        traffic = self.spec.traffic(self.case, self.dtype)
        size = traffic.forward - traffic.forward_gemm - traffic.forward_cached
        size += backward * (traffic.backward - traffic.backward_gemm - traffic.backward_cached)
        passes = self.passes(f"eager-{DENSE_LAYOUTS[0]}")
        allocated = passes.inference().nbytes + self.spec.saved_bytes(self.case, self.dtype)
        inputs = sum(passes.tensors[leaf].nbytes for leaf in self.spec.activations)
        # Backward has the gradient of y, and makes those of the inputs.
        held = inputs + allocated + backward * (passes.inference().nbytes + inputs)
        if size == 0 or held <= cache_bytes():
            return None
        return copy(size, self.dtype, allocated + backward * inputs if variant == "fresh" else 0)


@lru_cache(maxsize=1)
def cache_bytes() -> int:
    """The size of the processor's last-level cache; 0 where that is not known."""
    size = cpuinfo.get_cpu_info().get("l3_cache_size", 0)
    return size if isinstance(size, int) else 0


def copy(size: int, dtype: torch.dtype, fresh: int) -> Callable[[], object]:
    """A copy that reads and writes ``size`` bytes in all, ``fresh`` of them written into new memory."""
    source = torch.ones(size // 2 // dtype.itemsize, dtype=dtype)
    target, cut = torch.ones_like(source), fresh // dtype.itemsize

    def run() -> None:
        source[:cut].clone()
        target[cut:].copy_(source[cut:])

    return run


def _square_products(shape: Shape, layout: str, backward: bool) -> dict[str, Callable[[], object]]:
    """Products of every pixel with a square weight: p = W x; then dx (+)= Wᵀ dp and dW = dp xᵀ."""
    n, c, h, w = shape
    weight, grad_weight = torch.ones(c, c), torch.ones(c, c)
    size = (n * h * w, c) if layout == "channels_last" else (n, c, h * w)
    x, p, grad_x = (torch.ones(size) for _ in range(3))

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

    image, kernel = LAYOUTS[layout](torch.ones(shape)), torch.ones(c, c, 1, 1)

    def convolution() -> None:
        y = F.conv2d(image, kernel)
        if backward:
            masks = [True, True, False]
            torch.ops.aten.convolution_backward(y, image, kernel, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, masks)

    return {"matmul": pixels if layout == "channels_last" else planes, "convolution": convolution}


SQUARE_PRODUCTS = Products(
    _square_products, lambda shape, backward: (3 if backward else 1) * 2 * prod(shape) * shape[1]
)


def training_step(op: Op, name: str, batch: int, precision: str, device: torch.device | str) -> Callable[[], object]:
    """Forward and backward of the op's generator; in bf16 under autocast, with weights in float32."""
    impl, layout = name.split("-")
    if impl in LIBRARIES:
        calls = [op.products.by_library((batch, *shape[1:]), layout, True)[impl] for shape, _ in op.step.calls]
        return lambda: [call() for call in calls]
    torch.backends.cudnn.allow_tf32 = PRECISIONS[precision].tf32
    device = torch.device(device)
    model = generator(op.step, impl, layout).to(device)
    z, weights = torch.randn(batch, op.step.latent_dim, device=device), list(model.parameters())

    def forward() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return model(z)

    grad = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), weights, grad)


def generator(step: Step, impl: str, layout: str = DENSE_LAYOUTS[0]) -> nn.Module:
    torch.manual_seed(0)
    return placed(layout, step.build("reference" if impl == "eager" else impl))


def placed(layout: str, model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)
