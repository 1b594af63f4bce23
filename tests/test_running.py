"""The in-place update of running statistics: every device against the specification."""

import pytest
import torch

from pixnorm.ops.running import update_running, update_running_reference

DTYPES = [(t, t) for t in (torch.float64, torch.float32)] + [
    (t, torch.float32) for t in (torch.bfloat16, torch.float16)
]


def statistics(dtype, batch_dtype, size=37, count=2):
    running = [torch.randn(size).abs().to(dtype) for _ in range(2 * count)]
    return running, [torch.randn(size).abs().to(batch_dtype) for _ in range(2 * count)]


@pytest.mark.parametrize("dtype, batch_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pairs", [0, 1, 2])
def test_against_the_specification(dtype, batch_dtype, pairs):
    running, batch = statistics(dtype, batch_dtype, count=pairs)
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
    running, batch = statistics(torch.float32, torch.float32, count=1)
    before = [t.clone() for t in running]
    with pytest.raises(RuntimeError, match="pixnorm: "):
        update_running(*change(running, batch))
    assert all(torch.equal(a, b) for a, b in zip(running, before, strict=True))


def test_opcheck():
    running, batch = statistics(torch.float32, torch.float32)
    torch.library.opcheck(update_running, (running, batch, 0.1, 5))
