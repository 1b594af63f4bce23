"""What all Triton kernels share: launches, block sizes, and what the versions of Triton and PyTorch need.

Kernels are written for lanes: 1-D tensors with one element a thread. A lane owns V columns of a row of one channel, as
a tuple of V such tensors, so that what it computes stays in its registers. Where pixels lie side by side in memory
(NCHW) those V columns are one vector of up to 16 bytes; in channels_last neighbouring lanes are neighbouring channels.
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
# What kernels that take long to compile are not specialised on: one serves many shapes. They have hints instead.
SIZES = ["N", "C", "H", "W", "rows", "strips", "parts", "count"]
WARP = 32
# Lanes of a walk where there are enough rows for them: 16 warps for each of 132 multiprocessors, twice.
LANES = 1 << 17
LEAST_ROWS = 16
# Under TRITON_INTERPRET=1 kernels are Python that runs on the CPU, for tests; read as they are defined.
INTERPRETED = bool(triton.knobs.runtime.interpret)
# Then lanes cost nothing: programs have as many as this, those of several channels also in NCHW.
LANES_OF_INTERPRETER = 1024 if INTERPRETED else 0
# torch.compile sees through a triton_op to its kernels; those that are interpreted no graph can hold.
op_of_kernels = custom_op if INTERPRETED else triton_op


def wrap_triton(kernel):
    """``torch.library.wrap_triton``. By this name, in what an op calls, PyTorch finds its kernels, and caches graphs by
    their text."""
    return kernel if INTERPRETED else torch.library.wrap_triton(kernel)


def launch(kernel, grid: tuple[int, ...], *arguments, **options) -> None:
    """Run a wrapped kernel on the GPU of its first argument, whichever the current one is."""
    device = arguments[0].device
    on_device = torch.accelerator.device_index(device.index) if device.type in GPUS else contextlib.nullcontext()
    with on_device:
        kernel[grid](*arguments, **options)


class Walk(NamedTuple):
    """How the lanes of a kernel lie over a tensor, and walk down its rows.

    Attributes:
        columns: of a lane.
        lanes, channels: of a program.
        rows: that a lane walks down.
        strips: of a plane.
        programs: in all.
    """

    columns: int
    lanes: int
    channels: int
    rows: int
    strips: int
    programs: int

    def parts(self, c: int) -> int:
        """Programs for each of c channels."""
        return self.programs // triton.cdiv(c, self.channels)

    def options(self, channels_last: bool) -> dict[str, int | bool]:
        return {
            "LAST": channels_last,
            "V": self.columns,
            "LANES": self.lanes,
            "CHANNELS": self.channels,
            "num_warps": max(1, self.lanes // WARP),
        }


def walk_of(x: Tensor, columns: int, warps: int) -> Walk:
    """The walk over x, cut by shape alone: the same sums on every GPU.

    Args:
        columns: of a lane, at most; as many as divide a row.
        warps: of a program.
    """
    n, c, h, w = x.shape
    channels_last = is_channels_last(x)
    columns, lanes = power_of_two_in(w, columns), warps * WARP
    channels = WARP if channels_last else 1
    if LANES_OF_INTERPRETER:
        lanes, channels = LANES_OF_INTERPRETER, min(WARP, power_of_two_from(c))
    across = w // columns
    # Rows above and below a strip are worked on twice. Lanes enough for any GPU, unless strips would be short.
    strips = max(1, min(LANES // max(1, n * c * across), h // LEAST_ROWS))
    rows = triton.cdiv(h, strips)
    strips = triton.cdiv(h, rows)
    parts = triton.cdiv(n * strips * across, lanes // channels)
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


@triton.jit
def to_accumulator(value, pointer):
    """A value, as it is summed up: in float64 for float64, else in float32."""
    if pointer.dtype.element_ty == tl.float64:
        return value.to(tl.float64)
    else:
        return value.to(tl.float32)


@triton.jit
def activated(value, SLOPE: tl.constexpr):
    """Leaky ReLU; ReLU is the one of slope 0. NaN stays, and slope 0 makes 0 of infinity too (csrc/activation.h)."""
    if SLOPE == 0.0:
        return tl.where(value < 0, tl.zeros_like(value), value)
    else:
        return tl.where(value < 0, value * SLOPE, value)


@triton.jit
def activation_gradient(value, gradient, SLOPE: tl.constexpr):
    """What it lets through, of the value before it."""
    if SLOPE == 0.0:
        return tl.where(value <= 0, tl.zeros_like(gradient), gradient)
    else:
        return tl.where(value <= 0, gradient * SLOPE, gradient)


@triton.jit
def columns_of(tile, V: tl.constexpr, LANES: tl.constexpr):
    """The columns of a (LANES, V) tile, V a power of two; no lane's leave its thread."""
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
    """The (LANES, V) tile of these columns."""
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
def load_columns(pointer, plane, at, pixel, mask, V: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr):
    """V pixels of a plane from `at` on, `pixel` elements apart; 0 where the mask is off. WIDE: side by side."""
    offset = plane + at
    if WIDE:
        # A multiple of V, as rows and planes are. (A hint holds for what is computed here, not for an argument.)
        o_v = tl.arange(0, V)
        pointers = pointer + (tl.multiple_of(offset, V)[:, None] + o_v[None, :])
        tile = to_accumulator(tl.load(pointers, mask=mask[:, None], other=0.0), pointer)
        return columns_of(tile, V, LANES)
    else:
        columns = ()
        for j in tl.static_range(V):
            value = tl.load(pointer + (offset + j * pixel), mask=mask, other=0.0)
            columns = columns + (to_accumulator(value, pointer),)
        return columns


@triton.jit
def store_columns(pointer, plane, at, pixel, columns, mask, V: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr):
    """The opposite of load_columns."""
    offset = plane + at
    if WIDE:
        # A multiple of V, as rows and planes are. (A hint holds for what is computed here, not for an argument.)
        o_v = tl.arange(0, V)
        pointers = pointer + (tl.multiple_of(offset, V)[:, None] + o_v[None, :])
        tl.store(pointers, tile_of(columns, V, LANES).to(pointer.dtype.element_ty), mask=mask[:, None])
    else:
        for j in tl.static_range(V):
            tl.store(pointer + (offset + j * pixel), columns[j].to(pointer.dtype.element_ty), mask=mask)
