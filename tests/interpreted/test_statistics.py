"""The Triton kernels for statistics in the interpreter; see test_spn.py."""

import pytest
import torch
from test_ops import name_of

from pixnorm.testing import DENSE_LAYOUTS, LAYOUTS
from pixnorm.triton_kernels import statistics as kernels
from pixnorm.triton_kernels.statistics import statistics

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
both_layouts = pytest.mark.parametrize("layout", DENSE_LAYOUTS)
both_groups = pytest.mark.parametrize("instance", [False, True], ids=["batch", "instance"])


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that a few pixels are several tiles and several parts, which are merged in two steps."""
    for name, value in {
        "TILE": 32,
        "TILE_OF_DOUBLE": 32,
        "RUN": 32,
        "LEAST_TILES": 1,
        "MOST_PARTS": 2,
        "BLOCK": 2,
    }.items():
        monkeypatch.setattr(kernels, name, value)


def numbers(shape, dtype=torch.float32, layout="contiguous", mean=0.0):
    torch.manual_seed(0)
    return LAYOUTS[layout]((mean + torch.randn(shape, dtype=torch.float64)).to(dtype))


def plain(tensors, instance, dtype):
    """The same of PyTorch, (T, G, C), computed in that dtype."""
    dim = (2, 3) if instance else (0, 2, 3)
    both = [torch.var_mean(t.to(dtype), dim, correction=0) for t in tensors]
    shape = len(tensors), -1, tensors[0].shape[1]
    return tuple(torch.stack([of[i] for of in both]).view(shape) for i in (1, 0))


def check(tensors, instance):
    """At most twice the error of PyTorch, plus that of sums in the dtype.

    PyTorch's CPU kernels sum float32 in float64 and round once, so twice their error is less than any sum in float32
    can keep. What is added is the effect of some roundings of each number (the interpreter sums one after the other).
    """
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    found = statistics(tensors, instance)
    n, c = tensors[0].shape[:2]
    exact, eager = (plain(tensors, instance, of) for of in (torch.float64, dtype))
    dim = (2, 3) if instance else (0, 2, 3)
    x = [t.double() for t in tensors]
    rounded = [t.abs().mean(dim) for t in x], [2 * ((t - t.mean(dim, True)) * t).abs().mean(dim) for t in x]
    for ours, theirs, value, of_x in zip(found, eager, exact, rounded, strict=True):
        assert ours.shape == (len(tensors), n if instance else 1, c)
        assert ours.dtype == dtype and ours.is_contiguous()
        error, allowed = ((of.double() - value).abs() for of in (ours, theirs))
        allowed = 2 * allowed.max() + 16 * torch.finfo(dtype).eps * torch.stack(of_x).max()
        assert error.max() <= allowed, (error.max(), allowed)


@both_groups
@both_layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_dtypes(dtype, layout, instance):
    check([numbers((3, 5, 7, 6), dtype, layout)], instance)


@both_groups
@both_layouts
@pytest.mark.parametrize(
    "shape",
    [(1, 3, 5, 7), (4, 3, 1, 1), (1, 1, 1, 1), (2, 33, 3, 3), (3, 2, 16, 16), (2, 1, 4, 8), (5, 64, 2, 2)],
    ids=str,
)
def test_shapes(shape, layout, instance):
    check([numbers(shape, layout=layout)], instance)


@both_groups
@both_layouts
def test_two_tensors(layout, instance):
    x = numbers((3, 5, 4, 6), layout=layout, mean=10)
    mean, var = statistics([x, LAYOUTS[layout](2 * x)], instance)
    alone = statistics([x], instance)
    check([x, LAYOUTS[layout](x.square())], instance)
    assert torch.equal(mean[0], alone[0][0]) and torch.equal(var[0], alone[1][0])
    assert torch.equal(mean[1], 2 * mean[0]) and torch.equal(var[1], 4 * var[0])


@both_groups
@both_layouts
@pytest.mark.parametrize("count", [1, 2])
def test_several_parts(small_tiles, count, layout, instance):
    """Parts that are merged in blocks first."""
    x = numbers((3, 18, 8, 9), torch.float64, layout, mean=1000)
    tensors = [x, LAYOUTS[layout](x.square())][:count]
    assert kernels.partial_statistics(tensors, instance).shape[2] > kernels.MOST_PARTS
    check(tensors, instance)


@both_groups
@both_layouts
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=name_of)
def test_large_mean(small_tiles, dtype, layout, instance):
    """Σ x² - (Σ x)² / n would lose all digits of the variance."""
    check([numbers((2, 3, 8, 16), dtype, layout, mean=1e4)], instance)


@both_groups
@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - set(DENSE_LAYOUTS)))
def test_other_strides(layout, instance):
    x = numbers((2, 3, 4, 6), layout=layout)
    check([x, x.contiguous(memory_format=torch.channels_last)], instance)


@both_groups
@both_layouts
def test_nan_stays_in_its_group(layout, instance):
    x = numbers((3, 5, 4, 6), layout=layout)
    x[1, 2, 3, 4] = torch.nan
    for result in statistics([x], instance):
        spoilt = torch.zeros_like(result, dtype=torch.bool)
        spoilt[0, 1 if instance else 0, 2] = True
        assert torch.equal(result.isnan(), spoilt)


@both_layouts
def test_the_same_bits_for_a_sample_alone(layout):
    x = numbers((3, 5, 4, 6), layout=layout)
    together = statistics([x], instance=True)
    for i in range(3):
        alone = statistics([LAYOUTS[layout](x[i : i + 1].clone())], instance=True)
        assert all(torch.equal(a[0, 0], b[0, i]) for a, b in zip(alone, together, strict=True))


@both_groups
def test_empty(instance):
    mean, var = statistics([torch.empty(0, 3, 4, 5)], instance)
    assert mean.shape == var.shape == (1, 0 if instance else 1, 3) and not mean.any() and not var.any()
