"""Scale and shift of SPADE from the distinct neighbourhoods of a label map.

Both convolutions of a SPADE layer see labels only: its maps at a pixel are a function of the 5x5 labels around it. In a
map of segments most pixels share them with others (inside a segment, along straight borders). So what depends on the
weights is computed for each distinct neighbourhood, and then placed by an index:

    hidden[i]  = relu(b₁ + Σ_t W₁[:, labels of patch i at t, t])          a row per distinct 3x3 patch of labels
    z[i, t]    = W₂[:, :, t] hidden[i]                                    one matrix product, instead of a convolution
    maps[j]    = b₂ + Σ_t z[patch of neighbourhood j at t, t]             a row per distinct 5x5 neighbourhood
    γ, β at p  = maps[neighbourhood of p]

This changes nothing but the order of sums. Outside the image there is a label without weights, and hidden is zero.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from pixnorm.ops.common import dense, onlooker

# Distinct 3x3 patches per pixel above which the convolutions are faster; and pixels whose patch is not uniform, above
# which the distinct ones are hardly so few.
MOST_PATCHES, MOST_PLACES = 0.25, 0.75
# Pixels whose gradients are added up one after another.
STRETCH = 1024
# Numbers below this are combined in an int64; above, by their ranks.
LIMIT = 2**63


class RowSums:
    """The linear map ``y[i] = Σ x[j]`` over the rows j of bag i, in tensors (rows, D); differentiable to any order.

    PyTorch's embedding, followed by a sum, takes tens of times as long, and the gradient of its ``F.embedding_bag`` is
    slow and not differentiable. Here it is the transposed map, in the same form.

    Args:
        rows: (M,), the rows j, bag by bag.
        starts: of the bags in ``rows``.
        size: number of rows of x.
    """

    def __init__(self, rows: Tensor, starts: Tensor, size: int):
        self.rows, self.starts, self.size = rows, starts, size

    @classmethod
    def of_taps(cls, rows: Tensor, size: int) -> "RowSums":
        """y[i] = Σ_t x[t, rows[i, t]], for x of ``size`` rows for each tap."""
        bags, taps = rows.shape
        return cls((rows + torch.arange(taps) * size).flatten(), torch.arange(bags) * taps, taps * size)

    @cached_property
    def transposed(self) -> "RowSums":
        order = self.rows.argsort(stable=True)
        counts = self.rows.bincount(minlength=self.size)
        # The bag of each entry: every bag has at least one.
        bag = torch.zeros_like(self.rows).index_fill_(0, self.starts[1:], 1).cumsum(0)
        return RowSums(bag[order], counts.cumsum(0) - counts, len(self.starts))

    def __call__(self, x: Tensor) -> Tensor:
        return _RowSumsFunction.apply(x, self, False)


class _RowSumsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sums, transposed):
        ctx.sums, ctx.transposed = sums, transposed
        used = sums.transposed if transposed else sums
        return F.embedding_bag(used.rows, x.contiguous(), used.starts, mode="sum")

    @staticmethod
    def backward(ctx, grad):
        return _RowSumsFunction.apply(grad, ctx.sums, not ctx.transposed), None, None


@dataclass(frozen=True, eq=False)
class LabelPatches:
    """The distinct neighbourhoods of a label map (N, H, W); all None where convolutions are to be used.

    ``patches`` (A, 9): the labels of the distinct 3x3 patches; L is outside. ``neighbourhoods`` (B, 9): the patches at
    the 3x3 positions; A is outside. ``index`` (N, H, W): the neighbourhood of each pixel. (Neighbourhoods of one label
    occur several times, see ``_in_stretches``.)
    """

    patches: Tensor | None = None
    neighbourhoods: Tensor | None = None
    index: Tensor | None = None
    label_channels: int = 0

    def __bool__(self) -> bool:
        return self.index is not None

    @classmethod
    def of(cls, segmap: Tensor, label_channels: int, impl: str = "auto") -> "LabelPatches":
        """The neighbourhoods of a map of labels in [0, L), (N, H, W) of int64, at the resolution of its use.

        There are none of soft maps; of labels with too many different ones; with ``impl="reference"``; for tracers,
        transforms and subclasses of tensors; and on GPUs, which would have to be waited for to know how many there are.
        """
        labels = type(segmap) is Tensor and segmap.dim() == 3 and segmap.device.type == "cpu" and segmap.numel() > 0
        if not labels or impl == "reference" or torch.compiler.is_compiling() or onlooker() is not None:
            return cls()
        found = _distinct(segmap, label_channels, label_channels, MOST_PATCHES)
        if found is None:
            return cls()
        patches, ids = found
        if (len(patches) + 1) ** 3 >= LIMIT:
            return cls()
        # Patches 0 to L - 1 are uniform, so neighbourhoods of one of these are, too.
        return cls(
            patches, *_in_stretches(*_distinct(ids, len(patches), label_channels), label_channels), label_channels
        )

    @cached_property
    def _sums(self) -> tuple[RowSums, RowSums, RowSums]:
        """To the patches from the labels, from these to the neighbourhoods, from these to the pixels."""
        pixels = self.index.flatten()
        return (
            RowSums.of_taps(self.patches, self.label_channels + 1),
            RowSums.of_taps(self.neighbourhoods, len(self.patches) + 1),
            RowSums(pixels, torch.arange(len(pixels)), len(self.neighbourhoods)),
        )

    def map(self, hidden: Tensor, weight: Tensor, bias: Tensor, like: Tensor) -> Tensor:
        """The second convolution, from the rows of :meth:`hidden`.

        Args:
            hidden: (A + 1, hidden channels).
            weight, bias: (C, hidden channels, 3, 3) and (C,).
            like: a tensor (N, C, H, W), whose layout the result has.

        Returns:
            (N, C, H, W).
        """
        _, to_neighbourhoods, to_pixels = self._sums
        z = hidden @ weight.flatten(2).permute(2, 1, 0)  # (9, A + 1, C)
        rows = to_neighbourhoods(z.flatten(0, 1)) + bias
        n, h, w = self.index.shape
        return dense(to_pixels(rows).view(n, h, w, -1).permute(0, 3, 1, 2), like)

    def hidden(self, weight: Tensor, bias: Tensor) -> Tensor:
        """The first convolution and ReLU: a row per patch, and zeros for the one outside.

        Args:
            weight, bias: (hidden channels, L, 3, 3) and (hidden channels,).

        Returns:
            (A + 1, hidden channels).
        """
        table = F.pad(weight.flatten(2).permute(2, 1, 0), (0, 0, 0, 1))  # (9, L + 1, hidden channels)
        return F.pad(F.relu(self._sums[0](table.flatten(0, 1)) + bias), (0, 0, 0, 1))


def _in_stretches(neighbourhoods: Tensor, index: Tensor, uniform: int) -> tuple[Tensor, Tensor]:
    """The same neighbourhoods, with those of one label once for each stretch of pixels that has them.

    The gradient of a row is the sum over its pixels, one after another. Most pixels have a uniform neighbourhood, and
    sums of that many numbers would lose digits in float32; a sum of sums does not.
    """
    flat = index.flatten()
    places = (flat < uniform).nonzero()[:, 0]
    key = places // STRETCH * uniform + flat[places]
    present = torch.zeros((len(flat) // STRETCH + 1) * uniform, dtype=torch.int64).index_fill_(0, key, 1)
    used, rank = present.nonzero()[:, 0], present.cumsum(0) - 1
    flat = (flat - uniform + len(used)).index_copy_(0, places, rank[key])
    return torch.cat([neighbourhoods[used % uniform], neighbourhoods[uniform:]]), flat.view_as(index)


def _distinct(ids: Tensor, outside: int, uniform: int, most: float | None = None) -> tuple[Tensor, Tensor] | None:
    """The distinct 3x3 patches of an image of numbers.

    Args:
        ids: (N, H, W), in [0, outside).
        outside: the number around the image.
        uniform: patches of one number below this come first, in its place, whether they occur or not.
        most: patches per pixel that are too many.

    Returns:
        The patches (A, 9), and for each pixel which one is around it (N, H, W); None where there are too many.
    """
    n, h, w = ids.shape
    padded = F.pad(ids, (1, 1, 1, 1), value=outside)
    triples = padded[..., :-2], padded[..., 1:-1], padded[..., 2:]
    even = (triples[0] == triples[1]) & (triples[1] == triples[2])
    middle = padded[:, 1:-1, 1:-1]
    one = even[:, :-2] & even[:, 1:-1] & even[:, 2:] & (padded[:, :-2, 1:-1] == middle)
    one &= (padded[:, 2:, 1:-1] == middle) & (middle < uniform)
    places = (~one).flatten().nonzero()[:, 0]
    if most is not None and len(places) > MOST_PLACES * ids.numel():
        return None
    key = (triples[0] * (outside + 1) + triples[1]) * (outside + 1) + triples[2]  # (N, H + 2, W), by rows
    start = places + places // (h * w) * (2 * w)  # of the row above
    rows, bound = torch.stack([key.flatten()[start + i * w] for i in range(3)]), (outside + 1) ** 3
    if bound**3 >= LIMIT:
        values, rows = torch.unique(rows, return_inverse=True)
        bound = len(values)
    top, center, bottom = rows
    pairs = top * bound + center
    if bound**3 >= LIMIT:
        pairs = torch.unique(pairs, return_inverse=True)[1]
    values, inverse = torch.unique(pairs * bound + bottom, return_inverse=True)
    if most is not None and uniform + len(values) > most * ids.numel():
        return None
    place = torch.empty_like(values).index_copy_(0, inverse, places)  # any of them
    image, pixel = place // (h * w), place % (h * w)
    corner = image * ((h + 2) * (w + 2)) + pixel // w * (w + 2) + pixel % w
    offsets = (torch.arange(3)[:, None] * (w + 2) + torch.arange(3)).flatten()
    others = padded.flatten()[corner[:, None] + offsets]
    index = middle.flatten().index_copy(0, places, inverse + uniform)
    return torch.cat([torch.arange(uniform)[:, None].expand(-1, 9), others]), index.view(n, h, w)
