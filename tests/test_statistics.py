"""Statistics of activations, and the in-place update of running ones: every device against the specification."""

import pytest
import torch

from pixnorm.ops import statistics as ops
from pixnorm.ops.statistics import statistics_reference, update_running, update_running_reference
from pixnorm.testing import DENSE_LAYOUTS, LAYOUTS, assert_close_as_eager, random

FLOATS = (torch.float64, torch.float32)
HALVES = (torch.bfloat16, torch.float16)
DTYPES = [(t, t) for t in FLOATS] + [(t, torch.float32) for t in HALVES]

# --- statistics of activations

# The op has no public function to choose its backend: here are those of this device.
ON_CPU = torch.get_default_device().type == "cpu"
kernels = pytest.mark.parametrize("kernel", ["native", *["native-cuda-emulated"] * ON_CPU], indirect=True)
instances = pytest.mark.parametrize("instance", [False, True], ids=["batch", "instance"])
layouts = pytest.mark.parametrize("layout", DENSE_LAYOUTS)


def name_of(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


SHAPES = {
    (2, 3, 5, 7): "odd everywhere",
    (1, 3, 9, 11): "one sample: both kinds are the same",
    (5, 2, 1, 1): "one-pixel planes: no variance within a sample",
    (1, 4, 1, 1): "one value per channel",
    (40, 3, 8, 8): "2560 pixels in small planes",
    (2, 136, 2, 3): "many channels, few pixels: the last block of channels is not full",
    (3, 32, 16, 16): "vectors in both layouts, and no remainders",
    (2, 33, 30, 70): "2100 pixels: two runs of a plane, several parts in channels_last",
    (2, 3, 91, 100): "9100 pixels: several runs of a plane",
    (2, 2, 160, 130): "20800 pixels: several parts of a plane",
    (2, 20, 5, 5): "small planes: more than a vector has lanes",
    (9, 2, 64, 32): "parts that straddle samples, of a batch",
}


def draw_tensors(shape, dtype, layout, seed=0, offset=0.0, count=2):
    """Tensors of a mean far from 0; channels differ in scale."""
    generator = torch.Generator().manual_seed(seed)
    scale = 1 + random((1, shape[1], 1, 1), generator).abs()
    return [LAYOUTS[layout]((offset + scale * random(shape, generator)).to(dtype)) for _ in range(count)]


def welford(tensors, instance):
    """What PyTorch does on GPUs, in the dtype of the tensors; on CPUs it reduces float32 in float64."""
    mean, var = [], []
    for tensor in tensors:
        values = tensor.flatten(2)
        if not instance:
            values = values.transpose(0, 1).flatten(1)[None]
        found, squares = torch.zeros_like(values[..., 0]), torch.zeros_like(values[..., 0])
        for count, value in enumerate(values.unbind(-1), start=1):
            d = value - found
            found = found + d / count
            squares = squares + d * (value - found)
        mean.append(found)
        var.append(squares / values.shape[-1])
    return torch.stack(mean), torch.stack(var)


def check_statistics(tensors_of, instance, as_on_gpus=False):
    """The error is at most twice that of plain PyTorch, from the same values in the dtype of the statistics.

    Of means, the error is that of x - mean: those of a few values about 0 may have any relative error.
    """
    dtype = torch.float64 if tensors_of(0)[0].dtype == torch.float64 else torch.float32

    def draw(seed):
        tensors = tensors_of(seed)
        actual = ops.statistics(tensors, instance)
        eager = [statistics_reference([LAYOUTS[name](t) for t in tensors], instance) for name in DENSE_LAYOUTS]
        if as_on_gpus:
            eager.append(welford([t.to(dtype) for t in tensors], instance))
        exact = statistics_reference([t.double() for t in tensors], instance)
        assert all(found.is_contiguous() and found.dtype == dtype for found in actual)
        values = torch.stack([t.double() for t in tensors])

        def centred(mean):
            return values - mean.double()[..., None, None]

        yield "x - mean", centred(actual[0]), [centred(mean) for mean, _ in eager], centred(exact[0])
        yield "var", actual[1], [var for _, var in eager], exact[1]

    assert_close_as_eager(draw, dtype)


@kernels
@layouts
@instances
@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_statistics_are_as_close_as_those_of_pytorch(kernel, shape, dtype, instance, layout):
    for count in (1, 2):
        check_statistics(lambda seed, count=count: draw_tensors(shape, dtype, layout, seed, count=count), instance)


@kernels
@layouts
@instances
@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=name_of)
@pytest.mark.parametrize("shape", [(4, 6, 7, 9), (2, 16, 64, 64)], ids=name_of)
def test_statistics_of_a_mean_far_from_zero(request, kernel, shape, dtype, instance, layout):
    """Sums of squares without a shift would lose all digits; in half precision x itself loses them to a larger mean."""
    offset = 1e4 if dtype in FLOATS else 20.0
    emulated = "emulated" in request.node.name
    check_statistics(lambda seed: draw_tensors(shape, dtype, layout, seed, offset), instance, as_on_gpus=emulated)


@kernels
@layouts
@instances
def test_statistics_of_every_width(kernel, instance, layout):
    """Each size modulo each vector width: columns in NCHW, channels in channels_last."""
    for size in range(1, 36):
        shape = (2, 2, 3, size) if layout == "contiguous" else (2, size, 2, 3)
        for dtype in (torch.float32, torch.bfloat16):
            check_statistics(lambda seed, shape=shape, dtype=dtype: draw_tensors(shape, dtype, layout, seed), instance)


@kernels
@instances
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_any_strides(kernel, layout, dtype, instance):
    """Also at addresses that vectors cannot be read from, and of a second tensor that lies otherwise."""
    for shape in [(2, 3, 5, 7), (3, 16, 4, 8)]:
        check_statistics(lambda seed, shape=shape: draw_tensors(shape, dtype, layout, seed), instance)
        x, p = draw_tensors(shape, dtype, layout)
        for first, second in ((x, LAYOUTS["sliced"](p)), (LAYOUTS["channels_last"](x), p)):
            check_statistics(lambda seed, pair=(first, second): list(pair), instance)


@kernels
@layouts
@instances
def test_statistics_of_two_tensors_are_those_of_each(kernel, instance, layout):
    tensors = draw_tensors((3, 17, 9, 10), torch.float32, layout)
    both = ops.statistics(tensors, instance)
    for i, tensor in enumerate(tensors):
        for together, alone in zip(both, ops.statistics([tensor], instance), strict=True):
            assert torch.equal(together[i], alone[0])


@kernels
@layouts
@instances
def test_statistics_of_a_constant_have_no_variance(kernel, instance, layout):
    (x,) = draw_tensors((3, 5, 20, 30), torch.float32, layout, count=1)
    x[:, 2] = 0.75
    mean, var = ops.statistics([x], instance)
    assert (mean[..., 2] == 0.75).all() and (var[..., 2] == 0).all() and (var[..., :2] > 0).all()


@kernels
@layouts
@instances
def test_a_value_that_is_no_number_stays_in_its_group(kernel, instance, layout):
    (x,) = draw_tensors((3, 5, 6, 7), torch.float32, layout, count=1)
    x[1, 2, 3, 4] = torch.nan
    expected = torch.zeros(1, 3 if instance else 1, 5, dtype=torch.bool)
    expected[0, 1 if instance else 0, 2] = True
    for found in ops.statistics([x], instance):
        assert torch.equal(found.isnan(), expected)


@kernels
@layouts
@instances
@pytest.mark.parametrize("shape", [(0, 3, 5, 7), (2, 3, 0, 5), (2, 0, 3, 4)], ids=name_of)
@pytest.mark.filterwarnings("ignore:var_mean")
def test_statistics_of_nothing_are_those_of_pytorch(kernel, shape, instance, layout):
    x = LAYOUTS[layout](torch.empty(shape))
    for actual, expected in zip(ops.statistics([x], instance), statistics_reference([x], instance), strict=True):
        assert actual.shape == expected.shape and actual.isnan().all() and expected.isnan().all()


@kernels
@layouts
@instances
def test_statistics_opcheck(kernel, instance, layout):
    tensors = draw_tensors((2, 3, 4, 5), torch.bfloat16, layout)
    for count in (1, 2):
        torch.library.opcheck(ops.statistics, (tensors[:count], instance))


@pytest.mark.cpu
@layouts
@instances
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("shape", [(4, 64, 16, 16), (7, 33, 4, 4), (1, 3, 150, 131), (3, 5, 33, 40)], ids=name_of)
def test_any_number_of_threads_gives_the_same_statistics(shape, dtype, instance, layout, threads):
    tensors = draw_tensors(shape, dtype, layout)
    threads(1)
    one = ops.statistics(tensors, instance)
    for number in (2, 3):
        threads(number)
        for a, b in zip(ops.statistics(tensors, instance), one, strict=True):
            assert torch.equal(a, b)


@kernels
@pytest.mark.parametrize(
    "change",
    [
        lambda x: [x, x, x],
        lambda x: [x, x[..., :-1]],
        lambda x: [x, x.double()],
        lambda x: [x[0]],
        lambda x: [x.int()],
    ],
    ids=["three", "narrower", "another dtype", "3-D", "integers"],
)
def test_tensors_that_do_not_fit_are_an_error(kernel, change):
    with pytest.raises(RuntimeError, match="pixnorm: "):
        ops.statistics(change(torch.ones(2, 3, 4, 5)), False)


# --- running statistics


def running_and_batch(dtype, batch_dtype, size=37, count=2):
    running = [torch.randn(size).abs().to(dtype) for _ in range(2 * count)]
    return running, [torch.randn(size).abs().to(batch_dtype) for _ in range(2 * count)]


@pytest.mark.parametrize("dtype, batch_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pairs", [0, 1, 2])
def test_running_statistics_against_the_specification(dtype, batch_dtype, pairs):
    running, batch = running_and_batch(dtype, batch_dtype, count=pairs)
    expected = [t.double() for t in running]
    update_running_reference(expected, [t.double() for t in batch], 0.3, 5)
    update_running(running, batch, 0.3, 5)
    for actual, exact in zip(running, expected, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=torch.finfo(dtype).eps, atol=0)


def test_variances_are_unbiased_and_means_are_not_touched():
    running, batch = [torch.zeros(3), torch.zeros(3)], [torch.ones(3), torch.ones(3)]
    update_running(running, batch, 1.0, 4)
    torch.testing.assert_close(running, [torch.ones(3), torch.full((3,), 4 / 3)])


def test_slices_of_larger_tensors():
    storage = torch.full((2, 2 * 5), torch.nan)
    running = [storage[i, ::2].zero_() for i in range(2)]
    batch = [torch.ones(5, 3)[:, 1] for _ in range(2)]
    update_running(running, batch, 0.5, 2)
    torch.testing.assert_close(running, [torch.full((5,), 0.5), torch.full((5,), 1.0)])
    assert storage[:, 1::2].isnan().all()


@pytest.mark.parametrize(
    "change",
    [
        lambda running, batch: (running, batch[:1], 0.1, 5),
        lambda running, batch: (running, [t[:-1] for t in batch], 0.1, 5),
        lambda running, batch: (running, [t.double() for t in batch], 0.1, 5),
        lambda running, batch: (running, batch, 0.1, 1),
    ],
    ids=["fewer", "shorter", "another dtype", "one value"],
)
def test_what_does_not_fit_is_an_error(change):
    running, batch = running_and_batch(torch.float32, torch.float32, count=1)
    before = [t.clone() for t in running]
    with pytest.raises(RuntimeError, match="pixnorm: "):
        update_running(*change(running, batch))
    assert all(torch.equal(a, b) for a, b in zip(running, before, strict=True))


def test_update_running_opcheck():
    running, batch = running_and_batch(torch.float32, torch.float32)
    torch.library.opcheck(update_running, (running, batch, 0.1, 5))
