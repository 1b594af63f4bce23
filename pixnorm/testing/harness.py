"""Descriptions of the ops for tests and benchmarks: arguments, shapes, traffic, and tolerances.

A new op is one more :class:`OpSpec`; a new backend is one more name from :func:`available_impls`. Every check of
``tests/test_ops.py`` and every row of the benchmarks is made from these.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pixnorm import backends
from pixnorm.ops._dispatch import has_kernels, native_devices, triton_obstacle

# --- tolerances

# The error of an op may be FACTOR times that of plain PyTorch in the same dtype, both against float64. An error below
# TOLERANCES, in ulps of the largest value, always passes: one or two roundings in half precision, a few in float32.
# float64 is compared with itself: that detects any step computed in float32.
FACTOR = 2.0
TOLERANCES = {torch.float64: 2.0**22, torch.float32: 4.0, torch.bfloat16: 1.0, torch.float16: 1.0}
# By how much a single draw may exceed the tolerance: a tensor, and a single number.
FARTHEST, FARTHEST_NUMBER = 10, 1000


def excess(actual: Tensor, eager: Sequence[Tensor], exact: Tensor, dtype: torch.dtype) -> float:
    """The error of ``actual`` as a multiple of the tolerance: 1 or less is as accurate as plain PyTorch.

    Errors are maximum absolute errors; NaN in ``actual`` counts as infinite.

    Args:
        actual: the result under test.
        eager: results of plain PyTorch, from the same inputs in the same dtype; the worst counts.
        exact: the same in float64, from the same (already rounded) inputs.
        dtype: of the activations, the key of ``TOLERANCES``.
    """
    if exact.numel() == 0:
        return 0.0
    error, *eager_errors = ((t.double() - exact).abs().max().item() for t in (actual, *eager))
    floor = TOLERANCES[dtype] * torch.finfo(dtype).eps * exact.abs().max().item()
    allowed = max(FACTOR * max(eager_errors), floor)
    if error <= allowed:
        if math.isinf(error):  # plain PyTorch overflows, too
            return 1.0
        return error / allowed if allowed else 0.0
    return error / allowed if allowed and math.isfinite(error) else math.inf


def assert_close_as_eager(
    draw: Callable[[int], Iterable[tuple[str, Tensor, Sequence[Tensor], Tensor]]], dtype: torch.dtype
) -> None:
    """Assert that results are about as accurate as those of plain PyTorch in the same dtype.

    Rounding errors of a tensor of very few elements can differ by more than ``FACTOR`` by chance. So if the first draw
    exceeds the tolerance, the median over several decides. A wrong kernel is wrong in all of them, and by far: no draw
    may exceed it by a factor of ten. A single number may happen to be a small sum of large ones (for one draw of the
    gates' tests, of 114 that are 205 times larger in total), so it may by a factor of a thousand; none may be NaN.

    Args:
        draw: seed -> (name, actual, eager, exact) of each result, as for :func:`excess`.
        dtype: of the activations.
    """
    seen: dict[str, list[float]] = {}
    for seed in range(9):
        for name, actual, eager, exact in draw(seed):
            assert actual.dtype == eager[0].dtype, f"{name}: {actual.dtype}, plain PyTorch gives {eager[0].dtype}"
            assert actual.shape == exact.shape, f"{name}: {tuple(actual.shape)}, expected {tuple(exact.shape)}"
            seen.setdefault(name, []).append(excess(actual, eager, exact, dtype))
            farthest = FARTHEST_NUMBER if exact.numel() == 1 else FARTHEST
            assert seen[name][-1] <= farthest, f"{name}: the error is {seen[name][-1]:.3g} times what is allowed"
        if seed == 0 and max(values[0] for values in seen.values()) <= 1:
            return
    for name, values in seen.items():
        median = statistics.median(values)
        assert median <= 1, f"{name}: the error is {median:.3g} times what is allowed (median of {len(values)} draws)"


# --- inputs


def _sliced(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    storage = x.new_full((n, c + 1, h + 2, 2 * w + 1), torch.nan)
    return storage[:, 1:, 1:-1, 1::2].copy_(x)


def _padded_rows(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.new_full((n, c, h, w + 3), torch.nan)[..., :w].copy_(x)


def _padded_pixels(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.new_full((n, h, w, c + 3), torch.nan)[..., :c].permute(0, 3, 1, 2).copy_(x)


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def _expanded(x: Tensor) -> Tensor:
    return x[:1].contiguous().expand_as(x)


def _misaligned(x: Tensor) -> Tensor:
    return x.new_full((x.numel() + 1,), torch.nan)[1:].view(x.shape).copy_(x)


def _misaligned_channels_last(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.new_full((x.numel() + 1,), torch.nan)[1:].view(n, h, w, c).permute(0, 3, 1, 2).copy_(x)


# Each gives x's values other strides (`expanded` also repeats the first sample); the gaps are NaN.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": _sliced,
    "padded_rows": _padded_rows,
    "padded_pixels": _padded_pixels,
    "transposed": _transposed,
    "expanded": _expanded,
    "misaligned": _misaligned,
    "misaligned_channels_last": _misaligned_channels_last,
}
# The layouts that an op accepts and returns without a copy.
DENSE_LAYOUTS = ("contiguous", "channels_last")
# (dtype of the activations, dtype of the parameters), most used first
DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
)


@dataclass(frozen=True, eq=False)
class Case:
    """One call, and the code path that it covers.

    Attributes:
        shape: that of x.
        why: the code path.
        options: keyword arguments of the op.
        values: the kind of numbers that ``make_inputs`` draws.
        sizes: of parameters, if not the usual ones; not every impl may support them.
    """

    shape: tuple[int, ...]
    why: str
    options: Mapping[str, Any] = field(default_factory=dict)
    values: str = "plain"
    sizes: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        options = [f"{key}={value}" for key, value in (self.sizes | self.options).items()]
        values = [] if self.values == "plain" else [self.values]
        return "-".join(["x".join(map(str, self.shape)), *options, *values])


class Traffic(NamedTuple):
    """Bytes that a call must move, each pass over a tensor counted once; ``*_gemm`` is the share of the GEMMs.

    ``*_cached`` is what is still, or stays, in cache where images are taken in chunks, through GEMMs and passes, as on
    the CPU.
    """

    forward: int
    backward: int
    forward_gemm: int = 0
    backward_gemm: int = 0
    forward_cached: int = 0
    backward_cached: int = 0


class Result(NamedTuple):
    """The output, the gradients by argument, and the buffers after the call."""

    y: Tensor
    grads: dict[str, Tensor]
    buffers: dict[str, Tensor]

    def named(self) -> Iterator[tuple[str, Tensor]]:
        yield "y", self.y
        for name, grad in self.grads.items():
            yield f"grad of {name}", grad
        yield from self.buffers.items()


@dataclass(frozen=True, eq=False, kw_only=True)
class OpSpec:
    """The description of one op for tests and benchmarks.

    Tensors of ``make_inputs`` that no other attribute names are constants: passed through unchanged, without gradient.

    Attributes:
        name: the op id.
        title: in the names of tests, where an op has several specs.
        function: the public function; takes ``impl``.
        reference: the specification, in plain PyTorch.
        make_inputs: ``(case, dtype, parameter_dtype, generator)`` -> the tensor arguments by name.
        differentiable: names of the arguments that have a gradient, the first activation first.
        cases: each with the code path that it is for. The first two run with all dtypes in both layouts, so choose them
            for the most: see ``tried_on_cpu``.
        traffic: ``(case, dtype)`` -> the bytes that a two-pass implementation must move.
        kernel_calls: ``(impl, tensors, options)`` -> each op of ``torch.ops.pixnorm`` that the impl consists of, with
            arguments that it can be called with.
        activations: names of the 4D arguments that share a layout and a dtype; a case gives the shape of the first.
        per_sample: names of the other arguments with a batch dimension (rows (N, C), class labels, label maps).
        integers: names of the arguments of an integer dtype: never cast, never differentiated.
        buffers: names of the arguments that a training call updates in place.
        saved_bytes: ``(case, dtype)`` -> bytes kept for backward beyond the arguments; ``composite``: feature maps.
        composite: whether it consists of PyTorch's operations, too; its reference may have other ones.
        helpers: the names of the other ops that it calls, in forward and in backward.
        backends: what there are kernels for: ``"cpu"``, ``"cuda"`` (C++), ``"triton"``, as far as the op has them.
        options: values of the keyword arguments; tests try all combinations. If there are none, the variants.
        variants: the combinations that tests of other things go through.
        inference: the keyword arguments of a call that is not training, where it differs from one that is.
        statistics: what the op normalises by where no option of that name says it; those of an "instance" need two
            pixels.
        product_weight: the weight of the op's matrix product, if it has one; on GPUs it follows TF32 flags.
        float32_parameters: whether parameters may be float32 with activations in half precision; autocast then
            changes nothing inside.
    """

    name: str
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    make_inputs: Callable[[Case, torch.dtype, torch.dtype, torch.Generator], dict[str, Tensor]]
    differentiable: tuple[str, ...]
    cases: tuple[Case, ...]
    traffic: Callable[[Case, torch.dtype], Traffic]
    kernel_calls: Callable[[str, dict[str, Tensor], Mapping[str, Any]], Iterator[tuple[Any, tuple]]]
    activations: tuple[str, ...] = ("x",)
    per_sample: tuple[str, ...] = ()
    integers: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    title: str = ""
    saved_bytes: Callable[[Case, torch.dtype], int] = lambda case, dtype: 0
    composite: bool = False
    helpers: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    backends: tuple[str, ...] = ("cpu", "cuda", "triton")
    options: Mapping[str, tuple] = field(default_factory=dict)
    variants: tuple[Mapping[str, Any], ...] = ({},)
    inference: Mapping[str, Any] = field(default_factory=dict)
    statistics: str = "batch"
    product_weight: str | None = None
    float32_parameters: bool = False

    def __post_init__(self):
        assert self.differentiable[0] == self.first, f"{self.name}: {self.first} must be differentiable, and come first"
        overlap = set(self.differentiable) & {*self.integers, *self.buffers} or set(self.integers) & set(self.buffers)
        assert not overlap, f"{self.name}: {', '.join(sorted(overlap))} cannot be both"

    def __str__(self) -> str:
        return self.title or self.name

    def inputs(
        self,
        case: Case,
        dtype: torch.dtype = torch.float32,
        *,
        parameter_dtype: torch.dtype | None = None,
        layout: str = "contiguous",
        device: str | torch.device | None = None,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """The tensor arguments of a case, the same ones for the same seed everywhere; activations in the given layout.

        The device is the default one (``torch.set_default_device``), if no other is given.
        """
        generator = torch.Generator().manual_seed(seed)
        tensors = self.make_inputs(case, dtype, parameter_dtype or dtype, generator)
        wrong = [name for name, tensor in tensors.items() if tensor.is_floating_point() == (name in self.integers)]
        assert not wrong, f"{self.name}: integers of floating point, or the reverse: {', '.join(wrong)}"
        device = torch.get_default_device() if device is None else device
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        return tensors | {name: LAYOUTS[layout](tensors[name]) for name in self.activations if name in tensors}

    def leaves(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of the given tensors that have a gradient, detached, as leaves of a graph; they keep their strides."""
        return {name: tensors[name].detach().requires_grad_() for name in self.differentiable if name in tensors}

    def constants(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of the given tensors that have no gradient and that no call changes: integers among them."""
        return {name: t for name, t in tensors.items() if name not in self.differentiable and name not in self.buffers}

    def runs(self, impl: str, device: str | None = None) -> bool:
        """Whether the op has kernels, built or not, for an impl and a device type (that of the default device)."""
        device = device or torch.get_default_device().type
        if impl == "reference":
            return True
        backend = "triton" if impl == "triton" else device
        others = {"cpu", "cuda", "triton"} - set(self.backends)
        return backend not in others and has_kernels(self.name, impl, device)

    @property
    def cuda_kernels(self) -> bool:
        """Whether there are kernels in CUDA C++."""
        return "cuda" in self.backends and "cuda" in native_devices[f"{self.name}_fwd"]

    def combinations(self) -> list[dict[str, Any]]:
        """All of ``options``; or the variants, where these are all that are allowed."""
        if not self.options:
            return [dict(variant) for variant in self.variants]
        return [dict(zip(self.options, values, strict=True)) for values in product(*self.options.values())]

    @property
    def dtypes(self) -> tuple[tuple[torch.dtype, torch.dtype], ...]:
        """Those of ``DTYPES`` that it takes."""
        return tuple(pair for pair in DTYPES if self.float32_parameters or pair[0] == pair[1])

    def in_rotation(self, case: Case, dtype: torch.dtype, parameter_dtype: torch.dtype, layout: str) -> bool:
        """Whether a case runs with these dtypes and this layout if it runs with only one combination.

        For kernels that take seconds to compile. Each pair of neighbouring cases (without and with upsampling, say) has
        the next combination, so that similar code paths see different ones.
        """
        choices = list(product(self.dtypes, DENSE_LAYOUTS))
        return choices[self.cases.index(case) // 2 % len(choices)] == ((dtype, parameter_dtype), layout)

    def tried_on_cpu(
        self, case: Case, dtype: torch.dtype, parameter_dtype: torch.dtype, layout: str, *, emulated: bool = False
    ) -> bool:
        """Whether a case runs on the CPU with these dtypes and this layout: one case per code path, not all products.

        The first two cases run with every combination, and so do those with special values, whose error depends on the
        dtype; the others in both layouts, in float32 and in one pair with a half dtype, in turn. Emulated CUDA kernels
        are slow, and run in one layout with each of these. Float64 is left to the first two: gradcheck is in float64,
        and there each case is compared with the reference as well.
        """
        at = self.cases.index(case)
        if at < 2 or case.values != "plain":
            return True
        halves = [pair for pair in self.dtypes if pair[0].itemsize == 2]
        turn, of_dtype = divmod(at // 2, len(halves))
        chosen = {self.dtypes[0], halves[of_dtype]}
        if emulated:
            chosen = {halves[of_dtype] if layout == DENSE_LAYOUTS[turn % 2] else self.dtypes[0]}
        return (dtype, parameter_dtype) in chosen

    @property
    def first(self) -> str:
        """The argument whose shape a case gives."""
        return self.activations[0]

    @property
    def batched(self) -> tuple[str, ...]:
        """All arguments with a batch dimension; the rest are a module's parameters, buffers and constants."""
        return self.activations + self.per_sample

    def call(self, impl: str) -> Callable[..., Tensor]:
        """The public function with its impl bound."""
        return lambda *args, **kwargs: self.function(*args, **kwargs, impl=impl)


def evaluate(
    spec: OpSpec,
    function: Callable[..., Tensor],
    tensors: Mapping[str, Tensor],
    options: Mapping[str, Any],
    grad_y: Tensor | None = None,
) -> Result:
    """Run a function forward and backward, with copies of the buffers; the other tensors keep their strides.

    The gradient of y gets y's dtype and layout; None stands for random numbers, the same ones on every call.
    """
    leaves = spec.leaves(tensors)
    buffers = {name: tensors[name].clone() for name in spec.buffers if name in tensors}
    y = function(**leaves, **buffers, **spec.constants(tensors), **options)
    if grad_y is None:
        grad_y = random(y.shape, torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(y, list(leaves.values()), torch.empty_like(y).copy_(grad_y))
    return Result(y.detach(), dict(zip(leaves, grads, strict=True)), buffers)


def without_kink(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without an activation, whose derivative jumps."""
    return {key: value for key, value in options.items() if key != "activation"}


@lru_cache(maxsize=16)
def _yardsticks(
    spec: OpSpec, case: Case, dtype: torch.dtype, parameter_dtype: torch.dtype, layouts: tuple[str, ...], seed: int
) -> tuple[Tensor, list[Result], Result]:
    """A gradient of y; plain PyTorch in this dtype, in these layouts; and in float64, from the same inputs."""
    eager_inputs = [
        spec.inputs(case, dtype, parameter_dtype=parameter_dtype, layout=layout, seed=seed) for layout in layouts
    ]
    y = spec.reference(**in_double(eager_inputs[0]), **without_kink(case.options))
    grad_y = random(y.shape, torch.Generator().manual_seed(seed + 1)).to(dtype)
    if case.options.get("activation") and y.numel():
        # Zero near the kink, where rounding would decide the derivative.
        grad_y[y.abs() <= 0.1 * y.std()] = 0
    eager = [evaluate(spec, spec.reference, tensors, case.options, grad_y) for tensors in eager_inputs]
    exact = evaluate(spec, spec.reference, in_double(eager_inputs[0]), case.options, grad_y)
    return grad_y, eager, exact


def check_against_eager(
    spec: OpSpec,
    impl: str,
    case: Case,
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    layout: str = "contiguous",
    eager_layouts: tuple[str, ...] = DENSE_LAYOUTS,
) -> None:
    """Assert that output, gradients and buffers are as accurate as those of plain PyTorch, in these layouts."""
    if layout == "expanded":  # the only layout with other values
        eager_layouts = ("expanded",)

    def draw(seed: int) -> Iterator[tuple[str, Tensor, list[Tensor], Tensor]]:
        grad_y, eager, exact = _yardsticks(spec, case, dtype, parameter_dtype, eager_layouts, seed)
        tensors = spec.inputs(case, dtype, parameter_dtype=parameter_dtype, layout=layout, seed=seed)
        actual = evaluate(spec, spec.call(impl), tensors, case.options, grad_y)
        assert actual.y.dtype == dtype, f"y: {actual.y.dtype}, expected {dtype}"
        for (name, a), (_, b), *others in zip(actual.named(), exact.named(), *(r.named() for r in eager), strict=True):
            yield name, a, [tensor for _, tensor in others], b

    assert_close_as_eager(draw, dtype)


def in_double(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in float64 of the (already rounded) values; integers stay integers."""
    return {
        name: tensor.to(torch.float64 if tensor.is_floating_point() else tensor.dtype, copy=True)
        for name, tensor in tensors.items()
    }


def random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal float64 numbers on the default device, drawn on the CPU so that they are the same everywhere."""
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return numbers.to(torch.get_default_device())


def saved_bytes(forward: Callable[[], Tensor], inputs: Iterable[Tensor]) -> int:
    """Bytes that autograd saves for the backward of a function, beyond its inputs."""
    own = {t.untyped_storage().data_ptr() for t in inputs}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(kept.values())


def available_impls(device: str | None = None) -> list[str]:
    """The impls that can run here on a device (default: the default device), the reference first."""
    device = device or torch.get_default_device().type
    native = backends().get(f"native ({device})", "").startswith("available")
    return ["reference", *(["native"] if native else []), *([] if triton_obstacle(device) else ["triton"])]
