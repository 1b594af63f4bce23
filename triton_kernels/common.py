"""What all Triton kernels share: launches, the division of a tensor into lanes, and workarounds for Triton and PyTorch.

The SPN kernels are written per lane: a value is a 1-D tensor of LANES elements, one per thread. A lane owns V adjacent
columns of one row of one channel and holds them as a tuple of V such tensors, so everything it computes stays in its
own registers. In NCHW adjacent lanes own adjacent columns, and the V columns are one vector load of up to 16 bytes; in
channels_last adjacent lanes own adjacent channels.
"""

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op, triton_op

from pixnorm.ops.common import is_channels_last

GPUS = ("cuda", "xpu")
# Sizes on which the kernels that compile slowly are not specialised, so that one binary serves many shapes. What Triton
# would infer from a size, these kernels say by hints (tl.multiple_of).
SIZES = ["N", "C", "H", "W", "G", "rows", "strips", "parts", "count"]
WARP = 32
# Target number of lanes in a walk over rows: 16 warps on each of 132 SMs, twice.
LANES = 1 << 17
LEAST_ROWS = 16
# With TRITON_INTERPRET=1 kernels run on the CPU as Python, for tests; Triton reads it when kernels are defined.
INTERPRETED = bool(triton.knobs.runtime.interpret)
# Lanes per program in the interpreter, where they cost nothing; a program then has several channels in NCHW too.
LANES_OF_INTERPRETER = 1024 if INTERPRETED else 0
# torch.compile traces through a triton_op to its kernels; interpreted kernels cannot be in a graph.
op_of_kernels = custom_op if INTERPRETED else triton_op


def wrap_triton(kernel):
    """``torch.library.wrap_triton``. PyTorch searches the source of an op for calls of this name to find its kernels;
    their source is part of the key under which compiled graphs are cached."""
    return kernel if INTERPRETED else torch.library.wrap_triton(kernel)


def launch(kernel, grid: tuple[int, ...], /, **arguments) -> None:
    """Launch a wrapped kernel on the device of its tensors, which need not be the current device."""
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    on_device = torch.accelerator.device_index(device.index) if device.type in GPUS else contextlib.nullcontext()
    with on_device:
        kernel[grid](**arguments)


class Walk(NamedTuple):
    """How the lanes of a kernel are laid out over a tensor. Each lane walks down the rows of a strip.

    Attributes:
        columns: per lane.
        lanes, channels: per program.
        rows: per strip.
        strips: per plane.
        programs: in total.
    """

    columns: int
    lanes: int
    channels: int
    rows: int
    strips: int
    programs: int

    def parts(self, c: int) -> int:
        """Programs per channel, if there are c channels."""
        return self.programs // triton.cdiv(c, self.channels)

    def options(self, channels_last: bool) -> dict[str, int | bool]:
        return {
            "rows": self.rows,
            "strips": self.strips,
            "LAST": channels_last,
            "V": self.columns,
            "LANES": self.lanes,
            "CHANNELS": self.channels,
            "num_warps": max(1, self.lanes // WARP),
        }


def walk_of(x: Tensor, columns: int, warps: int, by_sample: bool = False) -> Walk:
    """The walk over x. It depends on the shape alone, so sums have the same order on every GPU.

    Args:
        columns: per lane, at most; reduced to a power of two that divides the row.
        warps: per program.
        by_sample: all lanes of a program are of one sample; of small planes a program then has several channels.
    """
    n, c, h, w = x.shape
    channels_last = is_channels_last(x)
    columns, lanes = power_of_two_in(w, columns), warps * WARP
    channels = WARP if channels_last else 1
    if LANES_OF_INTERPRETER:
        lanes, channels = LANES_OF_INTERPRETER, min(WARP, power_of_two_from(c))
    across = w // columns
    # Each strip recomputes the halo rows above and below it, so cut planes only as far as needed to fill a GPU.
    strips = max(1, min(LANES // max(1, n * c * across), h // LEAST_ROWS))
    rows = triton.cdiv(h, strips)
    strips = triton.cdiv(h, rows)
    of_plane = strips * across
    if by_sample:
        channels = max(channels, min(power_of_two_from(c), lanes // power_of_two_from(of_plane)))
        parts = n * triton.cdiv(of_plane, lanes // channels)
    else:
        parts = triton.cdiv(n * of_plane, lanes // channels)
    return Walk(columns, lanes, channels, rows, strips, parts * triton.cdiv(c, channels))


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype of sums and statistics."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def power_of_two_in(size: int, most: int) -> int:
    """The largest power of two, up to ``most``, that divides ``size``."""
    divisor = 1
    while divisor < most and size % (2 * divisor) == 0:
        divisor *= 2
    return divisor


def power_of_two_from(size: int) -> int:
    """The smallest power of two that is not smaller."""
    power = 1
    while power < size:
        power *= 2
    return power


@triton.constexpr_function
def record(fields):
    """A named tuple type, to be called in a kernel: ``record("N C")(N, C)``.

    A class would be simpler, but Inductor copies the source of kernels, and of what it copies from their globals only
    jitted functions, constexpr functions and constants. A tuple of compile-time constants must be assigned to a
    ``tl.constexpr`` variable; assigned to any other, its constants become tensors.

    A function must not return pointers that are written to, or offsets, if it has other pointers as arguments. PyTorch
    takes each result to depend on all arguments, and torch.compile copies every tensor that may be written.
    """
    from collections import namedtuple

    return namedtuple("record", fields)


@triton.jit
def to_accumulator(value, pointer):
    """The value in the dtype of sums: float64 if the pointer is to float64, else float32."""
    if pointer.dtype.element_ty == tl.float64:
        return tl.cast(value, tl.float64)
    else:
        return tl.cast(value, tl.float32)


@triton.jit
def activated(value, SLOPE: tl.constexpr):
    """Leaky ReLU; ReLU is slope 0. NaN passes; with slope 0, -inf gives 0 and not NaN (as in csrc/activation.h)."""
    if SLOPE == 0.0:
        return tl.where(value < 0, tl.zeros_like(value), value)
    else:
        return tl.where(value < 0, value * SLOPE, value)


@triton.jit
def activation_gradient(value, gradient, SLOPE: tl.constexpr):
    """Backward of ``activated``; value is its input."""
    if SLOPE == 0.0:
        return tl.where(value <= 0, tl.zeros_like(gradient), gradient)
    else:
        return tl.where(value <= 0, gradient * SLOPE, gradient)


@triton.jit
def columns_of(tile, V: tl.constexpr, LANES: tl.constexpr):
    """The columns of a (LANES, V) tile, V a power of two. Each lane's elements are in one thread, and stay there."""
    if V == 1:
        return (tl.reshape(tile, [LANES]),)
    else:
        even, odd = tl.split(tl.reshape(tile, [LANES, V // 2, 2]))
        evens = columns_of(even, V // 2, LANES)
        odds = columns_of(odd, V // 2, LANES)
        columns = ()
        for j in tl.static_range(V // 2):
            columns = columns + (evens[j], odds[j])
        return columns


@triton.jit
def tile_of(columns, V: tl.constexpr, LANES: tl.constexpr):
    """The inverse of ``columns_of``."""
    if V == 1:
        return tl.reshape(columns[0], [LANES, 1])
    else:
        evens = ()
        odds = ()
        for j in tl.static_range(V // 2):
            evens = evens + (columns[2 * j],)
            odds = odds + (columns[2 * j + 1],)
        pairs = tl.join(tile_of(evens, V // 2, LANES), tile_of(odds, V // 2, LANES))
        return tl.reshape(pairs, [LANES, V])


@triton.jit
def load_columns(pointer, plane, at, mask, V: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr):
    """V pixels from pixel ``at`` of a plane on; 0 where the mask is off.

    Args:
        pointer: to the tensor.
        plane: its offset in the tensor; the stride of a pixel.
        WIDE: the stride is 1, and the pixels are one vector.
    """
    offset = plane.offset + at * plane.pixel
    if WIDE:
        # Rows and planes are multiples of V. Triton needs the hint here: it forgets hints on arguments of functions.
        o_v = tl.arange(0, V)
        pointers = pointer + (tl.multiple_of(offset, V)[:, None] + o_v[None, :])
        tile = to_accumulator(tl.load(pointers, mask=mask[:, None], other=0.0), pointer)
        return columns_of(tile, V, LANES)
    else:
        columns = ()
        for j in tl.static_range(V):
            value = tl.load(pointer + (offset + j * plane.pixel), mask=mask, other=0.0)
            columns = columns + (to_accumulator(value, pointer),)
        return columns


@triton.jit
def store_columns(pointer, plane, at, columns, mask, V: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr):
    """The inverse of ``load_columns``."""
    offset = plane.offset + at * plane.pixel
    dtype = pointer.dtype.element_ty
    if WIDE:
        # See load_columns.
        o_v = tl.arange(0, V)
        pointers = pointer + (tl.multiple_of(offset, V)[:, None] + o_v[None, :])
        tl.store(pointers, tile_of(columns, V, LANES).to(dtype), mask=mask[:, None])
    else:
        for j in tl.static_range(V):
            tl.store(pointer + (offset + j * plane.pixel), columns[j].to(dtype), mask=mask)
