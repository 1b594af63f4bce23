"""What tests and benchmarks know of each op: arguments, the shapes that matter, traffic, and how close is close.

A new op is one more :class:`OpSpec` in ``SPECS``; a new backend is one more name from :func:`available_impls`. Every
check of ``tests/test_ops.py`` and every row of the benchmarks is made from these.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pixnorm import backends
from pixnorm.functional import spn
from pixnorm.ops._dispatch import _triton_obstacle
from pixnorm.ops.spn import _ops, spn_reference

# --- how close is close

# The error of an op may be FACTOR times that of plain PyTorch in the same dtype, both against float64; an error below
# so many units in the last place of the largest value always passes: in half precision one or two roundings, in float32
# a few. float64 is its own yardstick: what shows there is any step that was taken in float32.
FACTOR = 2.0
TOLERANCES = {torch.float64: 2.0**22, torch.float32: 4.0, torch.bfloat16: 1.0, torch.float16: 1.0}


def excess(actual: Tensor, eager: Sequence[Tensor], exact: Tensor, dtype: torch.dtype) -> float:
    """The error of ``actual`` as a multiple of what is allowed: 1 or less is as close as plain PyTorch.

    Errors are the largest absolute ones over the tensor; NaN in ``actual`` counts as infinite.

    Args:
        actual: the result under test.
        eager: the same in plain PyTorch, from the same inputs in the same dtype, once or oftener; the worst counts.
        exact: the same in float64, from the same (already rounded) inputs.
        dtype: that of the activations, in whose units ``TOLERANCES`` is.
    """
    if exact.numel() == 0:
        return 0.0
    error, *eager_errors = ((t.double() - exact).abs().max().item() for t in (actual, *eager))
    floor = TOLERANCES[dtype] * torch.finfo(dtype).eps * exact.abs().max().item()
    allowed = max(FACTOR * max(eager_errors), floor)
    if error <= allowed:
        return error / allowed if allowed else 0.0
    return error / allowed if allowed and math.isfinite(error) else math.inf


def assert_close_as_eager(
    draw: Callable[[int], Iterable[tuple[str, Tensor, Sequence[Tensor], Tensor]]], dtype: torch.dtype
) -> None:
    """Assert that results are about as close to float64 as those of plain PyTorch in the same dtype.

    Rounding errors of a tensor of one number, or three, differ by more than ``FACTOR`` now and then by luck. So where
    the first draw is too far off, the median over several decides. What is wrong is wrong in all of them, and by far.

    Args:
        draw: seed -> (name, actual, eager, exact) of each result, as for :func:`excess`.
        dtype: that of the activations.
    """
    seen: dict[str, list[float]] = {}
    for seed in range(9):
        for name, actual, eager, exact in draw(seed):
            assert actual.dtype == eager[0].dtype, f"{name}: {actual.dtype}, plain PyTorch gives {eager[0].dtype}"
            assert actual.shape == exact.shape, f"{name}: {tuple(actual.shape)}, expected {tuple(exact.shape)}"
            seen.setdefault(name, []).append(excess(actual, eager, exact, dtype))
        worst = max(seen, key=lambda name: seen[name][-1])
        assert seen[worst][-1] <= 10, f"{worst}: the error is {seen[worst][-1]:.3g} times what is allowed"
        if seed == 0 and seen[worst][0] <= 1:
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


# Each gives x's values other strides (`expanded` also repeats the first sample); what lies between them is NaN.
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
# The layouts that an op takes, and gives back, without a copy.
DENSE_LAYOUTS = ("contiguous", "channels_last")


@dataclass(frozen=True, eq=False)
class Case:
    """One call, and the code path that it is there for.

    Attributes:
        shape: that of x.
        why: the code path.
        options: keyword arguments of the op.
        values: which kind of numbers ``make_inputs`` draws.
        sizes: of parameters, where they are not the usual ones; not every impl may take them.
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
    """Bytes that a call must move, each pass over a tensor counted once; the GEMMs' share stands apart."""

    forward: int
    backward: int
    forward_gemm: int
    backward_gemm: int


class Result(NamedTuple):
    """What one evaluation leaves: the output, the gradients by argument, the buffers after the call."""

    y: Tensor
    grads: dict[str, Tensor]
    buffers: dict[str, Tensor]

    def named(self) -> Iterator[tuple[str, Tensor]]:
        yield "y", self.y
        for name, grad in self.grads.items():
            yield f"grad of {name}", grad
        yield from self.buffers.items()


@dataclass(frozen=True, eq=False)
class OpSpec:
    """All that tests and benchmarks need to know of one op.

    Attributes:
        name: the op id.
        function: the public function; takes ``impl``.
        reference: the specification, in plain PyTorch.
        make_inputs: ``(case, dtype, parameter_dtype, generator)`` -> the tensor arguments by name, x first.
        differentiable: names of the arguments that have a gradient.
        buffers: names of the arguments that a training call updates in place.
        cases: the grid, each row with its reason.
        traffic: ``(case, dtype)`` -> the two-pass floors in bytes.
        saved_bytes: ``(case, dtype)`` -> bytes kept for backward beyond the arguments.
        takes: ``(impl, case)`` -> whether the impl can run it.
        kernel_calls: ``(impl, tensors, options)`` -> each op of ``torch.ops.pixnorm`` that the impl is made of, with
            arguments that it can be called with.
    """

    name: str
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    make_inputs: Callable[[Case, torch.dtype, torch.dtype, torch.Generator], dict[str, Tensor]]
    differentiable: tuple[str, ...]
    buffers: tuple[str, ...]
    cases: tuple[Case, ...]
    traffic: Callable[[Case, torch.dtype], Traffic]
    saved_bytes: Callable[[Case, torch.dtype], int]
    takes: Callable[[str, Case], bool]
    kernel_calls: Callable[[str, dict[str, Tensor], Mapping[str, Any]], Iterator[tuple[Any, tuple]]]

    def __str__(self) -> str:
        return self.name

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
        """The tensor arguments of a case, the same ones for the same seed on every device; x in the given layout.

        The device is the default one (``torch.set_default_device``), if no other is given.
        """
        generator = torch.Generator().manual_seed(seed)
        tensors = self.make_inputs(case, dtype, parameter_dtype or dtype, generator)
        device = torch.get_default_device() if device is None else device
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        return tensors | {"x": LAYOUTS[layout](tensors["x"])}

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
    """Run a function forward and backward on copies of the buffers; the other tensors keep their strides.

    The gradient of y gets y's dtype and layout; None stands for random numbers, the same ones on every call.
    """
    leaves = {name: tensors[name].detach().requires_grad_() for name in spec.differentiable}
    buffers = {name: tensors[name].clone() for name in spec.buffers}
    y = function(**leaves, **buffers, **options)
    if grad_y is None:
        grad_y = random(y.shape, torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(y, list(leaves.values()), torch.empty_like(y).copy_(grad_y))
    return Result(y.detach(), dict(zip(leaves, grads, strict=True)), buffers)


def in_double(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in float64 of the (already rounded) values."""
    return {name: tensor.to(torch.float64, copy=True) for name, tensor in tensors.items()}


def random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal numbers in float64 on the default device; drawn on the CPU, so that they are the same ones everywhere."""
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return numbers.to(torch.get_default_device())


def available_impls(device: str | None = None) -> list[str]:
    """The impls that can run here on a device (the default one), the reference first."""
    device = device or torch.get_default_device().type
    native = backends().get(f"native ({device})", "").startswith("available")
    return ["reference", *(["native"] if native else []), *([] if _triton_obstacle(device) else ["triton"])]


# --- SPN

_SPN_PARAMETERS = (
    "mask_projection",
    "mask_weight",
    "mask_bias",
    "gamma_weight",
    "gamma_weight_inv",
    "beta_weight",
    "beta_weight_inv",
)
_SPN_BUFFERS = ("running_mean", "running_var", "mask_running_mean", "mask_running_var")


def _spn_inputs(
    case: Case, dtype: torch.dtype, parameter_dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    channels = case.shape[1]
    x = random(case.shape, generator)
    per_channel = (1, channels, 1, 1)
    if case.values == "offset":
        # Sums of squares without a shift lose all digits; in half precision x itself would, with a larger offset.
        x = x + (1000 if dtype in (torch.float64, torch.float32) else 20)
    else:
        x = x * (1 + random(per_channel, generator).abs()) + random(per_channel, generator)
    if case.values == "constant":
        x[:, 0] = 0.75  # no variance, and a mean that is exact in any order of summation

    def draw(shape, scale=1.0):
        return (scale * random(shape, generator)).to(parameter_dtype)

    taps = (channels, 1, *[case.sizes.get("kernel_size", 3)] * 2)
    masks = case.sizes.get("masks", channels)
    tensors = {
        "x": x.to(dtype),
        "mask_projection": draw((masks, channels, 1, 1), channels**-0.5),
        # Saturated: the mask is 0 or 1 nearly everywhere, and the exponential's argument large either way.
        "mask_weight": draw((masks,), 100.0 if case.values == "saturated" else 1.0),
        "mask_bias": draw((masks,)),
    }
    tensors |= {name: draw(taps, 0.5) for name in _SPN_PARAMETERS[3:]}
    for name in _SPN_BUFFERS:
        buffer = draw((masks if name.startswith("mask_") else channels,))
        tensors[name] = buffer.abs() + 0.5 if name.endswith("var") else buffer
    return tensors


def _spn_traffic(case: Case, dtype: torch.dtype) -> Traffic:
    # In passes over x; y and its gradient are upsample^2 passes each.
    tensor_pass = dtype.itemsize * torch.Size(case.shape).numel()
    large = case.options.get("upsample", 1) ** 2
    # p = W x: read x, write p.  dgrad: read dp and dx, write dx; wgrad: read dp and x.
    forward_gemm, backward_gemm = 2, 3 + 2
    # Statistics: x once, p once. Modulate: read x and p, write y.
    forward = (2 + large) + (2 if case.options.get("training", True) else 0)
    # Reduce: read dy, x and p. Apply: read dy, x and p, write dx and dp.
    backward = (2 + large) + (4 + large)
    passes = (forward + forward_gemm, backward + backward_gemm, forward_gemm, backward_gemm)
    return Traffic(*(n * tensor_pass for n in passes))


def _spn_saved_bytes(case: Case, dtype: torch.dtype) -> int:
    # p at the resolution of x, and four vectors of statistics.
    statistic = 8 if dtype == torch.float64 else 4
    return dtype.itemsize * torch.Size(case.shape).numel() + 4 * statistic * case.shape[1]


def _spn_takes(impl: str, case: Case) -> bool:
    return impl != "native" or not case.sizes


def _spn_kernel_calls(impl: str, tensors: dict[str, Tensor], options: Mapping[str, Any]) -> Iterator[tuple[Any, tuple]]:
    forward, backward = _ops(impl)
    training = options.get("training", True)
    inputs = (tensors["x"], *(tensors[name] for name in _SPN_PARAMETERS))
    given = (None,) * 4 if training else tuple(tensors[name] for name in _SPN_BUFFERS)
    settings = options.get("eps", 1e-5), options.get("upsample", 1), options.get("activation") == "relu", True
    yield forward, (*inputs, *given, *settings)
    y, *saved = forward(*inputs, *given, *settings)
    yield backward, (torch.ones_like(y), *inputs, *saved, *settings, training)


def _spn_cases() -> tuple[Case, ...]:
    shapes = {
        (2, 3, 5, 7): "odd everywhere: remainders on every side",
        (5, 2, 1, 1): "one-pixel planes: only the middle tap is inside (of two, the gradient would be mere rounding)",
        (3, 2, 1, 5): "one row: top and bottom border at once",
        (3, 2, 5, 1): "one column: left and right border at once",
        (2, 3, 4, 2): "two columns: both are border, no interior",
        (2, 3, 3, 3): "one interior pixel",
        (1, 2, 2, 2): "one sample, planes smaller than the stencil",
        (5, 6, 4, 4): "tiny planes: all of them are one piece of work",
        (40, 3, 8, 8): "2560 pixels in small planes: two pieces of work, the second one smaller",
        (3, 17, 8, 8): "C = 16 + 1 in channels_last, W a full vector in NCHW",
        (2, 32, 8, 8): "C and W multiples of every vector: no remainders",
        (2, 136, 2, 3): "C = 8 x 16 + 8: many blocks of channels, the last one half full",
        (2, 5, 6, 17): "W = 16 + 1 in NCHW",
        (2, 3, 3, 66): "W > 64: rows are long enough to be read one by one",
        (3, 2, 30, 70): "2100 pixels: a plane is summed in two runs, one image is a piece of work",
        (1, 3, 91, 100): "9100 pixels: a plane is cut into two pieces of rows, so that all threads have work",
        (1, 2, 3, 4200): "12600 pixels in three rows: pieces of one row",
        (0, 3, 5, 7): "empty batch",
    }
    cases = []
    for shape, why in shapes.items():
        cases += [Case(shape, why), Case(shape, why, {"upsample": 2, "activation": "relu"})]

    # In training the scale of a projection of one channel cancels, and its gradient is nothing but rounding.
    cases.append(Case((2, 1, 6, 9), "one channel: the shortest dot products", {"training": False}))

    # The options, each where it meets a remainder and a full vector in both layouts.
    odd = (2, 17, 7, 10)
    options = {
        "inference: given statistics": {"training": False},
        "inference, and nothing of the batch in the gradient": {"training": False, "upsample": 2, "activation": "relu"},
        "activation without upsampling": {"activation": "relu"},
        "upsampling without activation": {"upsample": 2},
        "eps and momentum reach the kernel": {"eps": 0.25, "momentum": 0.75},
    }
    cases += [Case(odd, why, chosen) for why, chosen in options.items()]

    sizes = {
        "kernel_size": {1: "no neighbours", 5: "a stencil that reaches over two pixels"},
        "masks": {1: "one mask for all channels"},
    }
    for name, described in sizes.items():
        for size, why in described.items():
            cases += [
                Case((3, 3, 5, 6), why, {}, sizes={name: size}),
                Case((3, 3, 5, 6), why, {"upsample": 2, "activation": "relu"}, sizes={name: size}),
                Case((2, 17, 6, 4), why, {"activation": "relu", "training": False}, sizes={name: size}),
            ]
    cases.append(Case((3, 3, 6, 8), "both", {"activation": "relu"}, sizes={"kernel_size": 5, "masks": 1}))

    values = {"offset": "|mean| >> std", "saturated": "mask at 0 and 1", "constant": "a channel of zero variance"}
    for name, why in values.items():
        cases += [Case((4, 6, 7, 9), why, {"upsample": upsample}, name) for upsample in (1, 2)]
    return tuple(cases)


SPN = OpSpec(
    name="spn",
    function=spn,
    reference=spn_reference,
    make_inputs=_spn_inputs,
    differentiable=("x", *_SPN_PARAMETERS),
    buffers=_SPN_BUFFERS,
    cases=_spn_cases(),
    traffic=_spn_traffic,
    saved_bytes=_spn_saved_bytes,
    takes=_spn_takes,
    kernel_calls=_spn_kernel_calls,
)

SPECS = (SPN,)
