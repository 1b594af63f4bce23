"""CBAM's gates on any GPU that Triton reaches: ``pixnorm::gate_pool_triton`` and others, with the schemas of the native
ops (pixnorm/ops/gate.py, where the equations are).

In memory a sample is a matrix [row][column]. Its columns are pooled, one result for each row, or its rows, one for each
column: the channel gate pools planes, which are rows in NCHW and columns in channels_last, and the spatial gate pools
channels, with the two the other way round. A program has some results of a sample and goes over a part of what they are
pooled from, tile by tile; tiles move as vectors of up to 16 bytes along a row. With several parts a second kernel adds
up what they give, in a fixed order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixnorm.ops.common import dense, dense_like, is_channels_last
from pixnorm.ops.gate import gate_bwd_fake, gate_fwd_fake, gate_pool_fake, gate_reduce_fake
from pixnorm.triton_kernels.common import (
    WARP,
    launch,
    op_of_kernels,
    power_of_two_from,
    power_of_two_in,
    record,
    to_accumulator,
    wrap_triton,
)

# Elements per tile; bytes of a row of it where columns are kept; programs that fill a GPU.
TILE, TILE_OF_DOUBLE, RUN, PROGRAMS, WARPS = 2048, 1024, 256, 2048, 4
RESULTS = 256  # per program that finishes sums

NOT_SPECIALISED = ["gates", "kept", "size", "parts", "steps"]
META_FIELDS = tl.constexpr("COLUMNS V KEPT POOLED")
PLACE_FIELDS = tl.constexpr("n first part kept size o_kept exists")
FOUND_FIELDS = tl.constexpr("total top place")
BEYOND = tl.constexpr(2**31 - 1)  # of any place


class Grid(NamedTuple):
    """How programs go over x. It depends on the shape alone, so sums have the same order on every GPU.

    Attributes:
        of_columns: whether there is a result for each column.
        vector: adjacent elements that move at once.
        kept: results of a sample; ``tile_kept`` of them in a tile.
        size: elements of each; ``tile_pooled`` of them in a tile.
        steps: tiles of a program.
        parts: programs for the same results.
        programs: in total.
        warps: per program.
    """

    of_columns: bool
    vector: int
    kept: int
    tile_kept: int
    size: int
    tile_pooled: int
    steps: int
    parts: int
    programs: int
    warps: int

    @classmethod
    def of(cls, x: Tensor, spatial: bool) -> "Grid":
        n, c, h, w = x.shape
        of_columns = spatial != is_channels_last(x)
        kept, size = (h * w, c) if spatial else (c, h * w)
        tile = TILE_OF_DOUBLE if x.dtype == torch.float64 else TILE
        vector = power_of_two_in(kept if of_columns else size, 16 // x.element_size())
        if of_columns:
            least = max(RUN // x.element_size(), tile // power_of_two_from(size))
            tile_kept = min(power_of_two_from(kept), least)
            tile_pooled = max(1, min(power_of_two_from(size), tile // tile_kept))
        else:
            tile_pooled = min(power_of_two_from(size), tile)
            tile_kept = max(1, min(power_of_two_from(kept), tile // tile_pooled))
        blocks, tiles = triton.cdiv(kept, tile_kept), triton.cdiv(size, tile_pooled)
        steps = triton.cdiv(tiles, max(1, PROGRAMS // max(1, n * blocks)))
        parts = triton.cdiv(tiles, steps)
        warps = max(1, min(WARPS, tile_kept * tile_pooled // (vector * WARP)))
        programs = n * blocks * parts
        return cls(of_columns, vector, kept, tile_kept, size, tile_pooled, steps, parts, programs, warps)

    def options(self) -> dict[str, int | bool]:
        return {
            "kept": self.kept,
            "size": self.size,
            "parts": self.parts,
            "steps": self.steps,
            "COLUMNS": self.of_columns,
            "V": self.vector,
            "KEPT": self.tile_kept,
            "POOLED": self.tile_pooled,
            "num_warps": self.warps,
        }


@triton.jit
def place_of_program(kept, size, parts, META: tl.constexpr):
    """The sample, results and part of a program; neighbours are adjacent in memory.

    Sizes are rounded to vectors, which changes nothing but tells the compiler that masks are of whole vectors.
    """
    blocks = tl.cdiv(kept, META.KEPT)
    program = tl.program_id(0)
    if META.COLUMNS:
        block = program % blocks
        part = (program // blocks) % parts
        kept = kept // META.V * META.V
    else:
        part = program % parts
        block = (program // parts) % blocks
        size = size // META.V * META.V
    n = (program // (blocks * parts)).to(tl.int64)
    first = block * META.KEPT
    o_kept = tl.arange(0, META.KEPT)
    return record(PLACE_FIELDS)(n, first, part, kept, size, o_kept, o_kept < kept - first)


@triton.jit
def along(values, META: tl.constexpr):
    """Numbers of results, to be broadcast along what they are pooled from."""
    if META.COLUMNS:
        return values[None, :]
    else:
        return values[:, None]


@triton.jit
def across(values, META: tl.constexpr):
    """Numbers of elements of a result, to be broadcast along results."""
    if META.COLUMNS:
        return values[:, None]
    else:
        return values[None, :]


@triton.jit
def tile_at(place, at, META: tl.constexpr):
    """Offsets in a sample, and which exist, of the tile from element ``at`` of each result on."""
    o_pooled = tl.arange(0, META.POOLED)
    if META.COLUMNS:
        starts = tl.multiple_of((at + o_pooled) * place.kept + place.first, META.V)
        column = tl.max_contiguous(tl.multiple_of(place.o_kept, META.V), META.V)
    else:
        starts = tl.multiple_of((place.first + place.o_kept) * place.size + at, META.V)
        column = tl.max_contiguous(tl.multiple_of(o_pooled, META.V), META.V)
    exists = along(place.exists, META) & across(o_pooled < place.size - at, META)
    return record("offset exists")(starts[:, None] + column[None, :], exists)


@triton.jit
def load_tile(pointer, at, other: tl.constexpr):
    return to_accumulator(tl.load(pointer + at.offset, mask=at.exists, other=other), pointer)


@triton.jit
def of_results(pointer, place):
    """A number for each result, from (N, kept)."""
    at = place.n * place.kept + place.first
    return tl.load(pointer + at + place.o_kept, mask=place.exists, other=0.0)


@triton.jit
def larger(value, top):
    """NaN is larger than any number."""
    return (value > top) | ((value != value) & (top == top))


@triton.jit
def first_maximum(top, place, AXIS: tl.constexpr):
    """The maximum along an axis, and the first place where it is."""
    number = tl.where(top == top, top, -float("inf"))
    value = tl.max(number, axis=AXIS, keep_dims=True)
    at = tl.min(tl.where(number == value, place, BEYOND), axis=AXIS)
    nan_at = tl.min(tl.where(top != top, place, BEYOND), axis=AXIS)
    is_nan = nan_at < BEYOND
    value = tl.where(is_nan, float("nan"), tl.reshape(value, is_nan.shape))
    return value, tl.where(is_nan, nan_at, at)


@triton.jit
def store_pooled(pooled_ptr, index_ptr, n, k, exists, kept, size, found):
    """Maxima and means of results k of samples n."""
    to = pooled_ptr + n * (2 * kept) + k
    tl.store(to, found.top, mask=exists)
    tl.store(to + kept, found.total / tl.cast(size, found.total.dtype), mask=exists)
    tl.store(index_ptr + n * kept + k, found.place, mask=exists)


@triton.jit
def gradient_of_logits(total, logits):
    gate = tl.sigmoid(logits)
    return total * (gate * (1.0 - gate))


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def gate_pool_kernel(
    x_ptr, pooled_ptr, index_ptr, sums_ptr, tops_ptr, places_ptr, gates, kept, size, parts, steps,
    ALONE: tl.constexpr, COLUMNS: tl.constexpr, V: tl.constexpr, KEPT: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """Maxima, means and where maxima are; or of parts [part][N, kept] those maxima, and sums."""
    META: tl.constexpr = record(META_FIELDS)(COLUMNS=COLUMNS, V=V, KEPT=KEPT, POOLED=POOLED)
    place = place_of_program(kept, size, parts, META)
    x_ptr += tl.multiple_of(place.n * kept * size, V)
    total = to_accumulator(tl.zeros([POOLED, KEPT] if COLUMNS else [KEPT, POOLED], dtype=tl.float32), x_ptr)
    top = total - float("inf")
    first = place.part * steps * POOLED
    where = tl.zeros_like(total).to(tl.int32) + first
    for step in range(steps):
        at = first + step * POOLED
        tile = tile_at(place, at, META)
        x = load_tile(x_ptr, tile, 0.0)
        total += x
        better = larger(x, top) & tile.exists
        top = tl.where(better, x, top)
        where = tl.where(better, across(at + tl.arange(0, POOLED), META), where)
    AXIS: tl.constexpr = 0 if COLUMNS else 1
    value, value_at = first_maximum(top, where, AXIS)
    found = record(FOUND_FIELDS)(tl.sum(total, axis=AXIS), value, value_at)
    k = place.first + place.o_kept
    if ALONE:
        store_pooled(pooled_ptr, index_ptr, place.n, k, place.exists, kept, size, found)
    else:
        to = place.part.to(tl.int64) * gates + place.n * kept + k
        tl.store(sums_ptr + to, found.total, mask=place.exists)
        tl.store(tops_ptr + to, found.top, mask=place.exists)
        tl.store(places_ptr + to, found.place, mask=place.exists)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def gate_pool_finish_kernel(
    sums_ptr, tops_ptr, places_ptr, pooled_ptr, index_ptr, gates, kept, size, parts, RESULTS: tl.constexpr
):  # fmt: skip
    """Maxima and means from those of parts."""
    i = tl.program_id(0) * RESULTS + tl.arange(0, RESULTS)
    exists = i < gates
    total = tl.load(sums_ptr + i, mask=exists, other=0.0)
    top = tl.load(tops_ptr + i, mask=exists, other=0.0)
    where = tl.load(places_ptr + i, mask=exists, other=0)
    for part in range(1, parts):
        at = tl.cast(part, tl.int64) * gates + i
        total += tl.load(sums_ptr + at, mask=exists, other=0.0)
        of_part = tl.load(tops_ptr + at, mask=exists, other=0.0)
        better = larger(of_part, top)
        top = tl.where(better, of_part, top)
        where = tl.where(better, tl.load(places_ptr + at, mask=exists, other=0), where)
    n = i // kept
    found = record(FOUND_FIELDS)(total, top, where)
    store_pooled(pooled_ptr, index_ptr, n.to(tl.int64), i - n * kept, exists, kept, size, found)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def gate_reduce_kernel(
    dy_ptr, x_ptr, logits_ptr, grad_ptr, sums_ptr, gates, kept, size, parts, steps,
    ALONE: tl.constexpr, COLUMNS: tl.constexpr, V: tl.constexpr, KEPT: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits; or of parts [part][N, kept] the sums of dy x."""
    META: tl.constexpr = record(META_FIELDS)(COLUMNS=COLUMNS, V=V, KEPT=KEPT, POOLED=POOLED)
    place = place_of_program(kept, size, parts, META)
    start = tl.multiple_of(place.n * kept * size, V)
    total = to_accumulator(tl.zeros([POOLED, KEPT] if COLUMNS else [KEPT, POOLED], dtype=tl.float32), x_ptr)
    for step in range(steps):
        tile = tile_at(place, (place.part * steps + step) * POOLED, META)
        total += load_tile(dy_ptr + start, tile, 0.0) * load_tile(x_ptr + start, tile, 0.0)
    found = tl.sum(total, axis=0 if COLUMNS else 1)
    to = place.n * kept + place.first + place.o_kept
    if ALONE:
        tl.store(grad_ptr + to, gradient_of_logits(found, of_results(logits_ptr, place)), mask=place.exists)
    else:
        tl.store(sums_ptr + place.part.to(tl.int64) * gates + to, found, mask=place.exists)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def gate_reduce_finish_kernel(sums_ptr, logits_ptr, grad_ptr, gates, parts, RESULTS: tl.constexpr):
    """The gradient of the logits from the sums of parts."""
    i = tl.program_id(0) * RESULTS + tl.arange(0, RESULTS)
    exists = i < gates
    total = tl.load(sums_ptr + i, mask=exists, other=0.0)
    for part in range(1, parts):
        total += tl.load(sums_ptr + (tl.cast(part, tl.int64) * gates + i), mask=exists, other=0.0)
    logits = tl.load(logits_ptr + i, mask=exists, other=0.0)
    tl.store(grad_ptr + i, gradient_of_logits(total, logits), mask=exists)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def gate_fwd_kernel(
    x_ptr, logits_ptr, y_ptr, kept, size, parts, steps,
    COLUMNS: tl.constexpr, V: tl.constexpr, KEPT: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """y = σ(logits) x."""
    META: tl.constexpr = record(META_FIELDS)(COLUMNS=COLUMNS, V=V, KEPT=KEPT, POOLED=POOLED)
    place = place_of_program(kept, size, parts, META)
    start = tl.multiple_of(place.n * kept * size, V)
    gate = along(tl.sigmoid(of_results(logits_ptr, place)), META)
    for step in range(steps):
        tile = tile_at(place, (place.part * steps + step) * POOLED, META)
        y = load_tile(x_ptr + start, tile, 0.0) * gate
        tl.store(y_ptr + start + tile.offset, y.to(y_ptr.dtype.element_ty), mask=tile.exists)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def gate_bwd_kernel(
    dy_ptr, logits_ptr, pooled_ptr, index_ptr, dx_ptr, kept, size, parts, steps,
    COLUMNS: tl.constexpr, V: tl.constexpr, KEPT: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """dx = σ(logits) dy + the gradient of the mean, and at the first maximum its gradient."""
    META: tl.constexpr = record(META_FIELDS)(COLUMNS=COLUMNS, V=V, KEPT=KEPT, POOLED=POOLED)
    place = place_of_program(kept, size, parts, META)
    start = tl.multiple_of(place.n * kept * size, V)
    gate = along(tl.sigmoid(of_results(logits_ptr, place)), META)
    of_sample = pooled_ptr + place.n * kept
    top = along(of_results(of_sample, place), META)
    mean = of_results(of_sample + kept, place)
    mean = along(mean / tl.cast(size, mean.dtype), META)
    where = along(of_results(index_ptr, place), META)
    for step in range(steps):
        at = (place.part * steps + step) * POOLED
        tile = tile_at(place, at, META)
        of_top = tl.where(where == across(at + tl.arange(0, POOLED), META), top, 0.0)
        dx = load_tile(dy_ptr + start, tile, 0.0) * gate + (mean + of_top)
        tl.store(dx_ptr + start + tile.offset, dx.to(dx_ptr.dtype.element_ty), mask=tile.exists)


def gate_pool(x: Tensor, spatial: bool) -> tuple[Tensor, Tensor]:
    """Maxima and means, see pixnorm/ops/gate.py."""
    x = dense(x, x)
    pooled, index = gate_pool_fake(x, spatial)
    if x.numel() == 0:
        return pooled, index
    grid = Grid.of(x, spatial)
    alone, gates = grid.parts == 1, index.numel()
    sums, tops = pooled.new_empty((2, 0 if alone else grid.parts, gates)).unbind()
    places = torch.empty_like(sums, dtype=torch.int32)
    launch(
        wrap_triton(gate_pool_kernel),
        (grid.programs,),
        x_ptr=x,
        pooled_ptr=pooled,
        index_ptr=index,
        sums_ptr=sums,
        tops_ptr=tops,
        places_ptr=places,
        gates=gates,
        ALONE=alone,
        **grid.options(),
    )
    if not alone:
        launch(
            wrap_triton(gate_pool_finish_kernel),
            (triton.cdiv(gates, RESULTS),),
            sums_ptr=sums,
            tops_ptr=tops,
            places_ptr=places,
            pooled_ptr=pooled,
            index_ptr=index,
            gates=gates,
            kept=grid.kept,
            size=grid.size,
            parts=grid.parts,
            RESULTS=RESULTS,
        )
    return pooled, index


def gate_fwd(x: Tensor, logits: Tensor, spatial: bool) -> Tensor:
    """The product, see pixnorm/ops/gate.py."""
    x = dense(x, x)
    y = dense_like(x)
    if x.numel() == 0:
        return y
    grid = Grid.of(x, spatial)
    launch(
        wrap_triton(gate_fwd_kernel),
        (grid.programs,),
        x_ptr=x,
        logits_ptr=logits.contiguous(),
        y_ptr=y,
        **grid.options(),
    )
    return y


def gate_reduce(grad_y: Tensor, x: Tensor, logits: Tensor, spatial: bool) -> Tensor:
    """The gradient of the logits, see pixnorm/ops/gate.py."""
    x, grad_y, logits = dense(x, x), dense(grad_y, x), logits.contiguous()
    grad = gate_reduce_fake(grad_y, x, logits, spatial)
    if x.numel() == 0:
        return grad
    grid = Grid.of(x, spatial)
    alone, gates = grid.parts == 1, grad.numel()
    sums = grad.new_empty((0 if alone else grid.parts, gates))
    launch(
        wrap_triton(gate_reduce_kernel),
        (grid.programs,),
        dy_ptr=grad_y,
        x_ptr=x,
        logits_ptr=logits,
        grad_ptr=grad,
        sums_ptr=sums,
        gates=gates,
        ALONE=alone,
        **grid.options(),
    )
    if not alone:
        launch(
            wrap_triton(gate_reduce_finish_kernel),
            (triton.cdiv(gates, RESULTS),),
            sums_ptr=sums,
            logits_ptr=logits,
            grad_ptr=grad,
            gates=gates,
            parts=grid.parts,
            RESULTS=RESULTS,
        )
    return grad


def gate_bwd(grad_y: Tensor, logits: Tensor, grad_pooled: Tensor, index: Tensor, spatial: bool) -> Tensor:
    """The gradient of x, see pixnorm/ops/gate.py."""
    grad_y = dense(grad_y, grad_y)
    dx = dense_like(grad_y)
    if grad_y.numel() == 0:
        return dx
    grid = Grid.of(grad_y, spatial)
    launch(
        wrap_triton(gate_bwd_kernel),
        (grid.programs,),
        dy_ptr=grad_y,
        logits_ptr=logits.contiguous(),
        pooled_ptr=grad_pooled.contiguous(),
        index_ptr=index.contiguous(),
        dx_ptr=dx,
        **grid.options(),
    )
    return dx


gate_pool_triton = op_of_kernels("pixnorm::gate_pool_triton", mutates_args=())(gate_pool)
gate_fwd_triton = op_of_kernels("pixnorm::gate_fwd_triton", mutates_args=())(gate_fwd)
gate_reduce_triton = op_of_kernels("pixnorm::gate_reduce_triton", mutates_args=())(gate_reduce)
gate_bwd_triton = op_of_kernels("pixnorm::gate_bwd_triton", mutates_args=())(gate_bwd)
# Shapes, dtypes and strides are those of the native ops.
gate_pool_triton.register_fake(gate_pool_fake)
gate_fwd_triton.register_fake(gate_fwd_fake)
gate_reduce_triton.register_fake(gate_reduce_fake)
gate_bwd_triton.register_fake(gate_bwd_fake)
