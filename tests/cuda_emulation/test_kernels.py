"""The emulated CUDA kernels, beyond the checks of tests/test_ops.py."""

from functools import partial

import pytest
import torch

from pixnorm.ops import spn as spn_ops
from pixnorm.ops import statistics as statistics_ops
from pixnorm.testing import CONDITIONAL_SPN, DENSE_LAYOUTS, LAYOUTS, SPECS, SPN, Case, evaluate, in_double

from . import emulated, set_seed
from .build import environment

pytestmark = pytest.mark.cpu
specs = pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.cuda_kernels], ids=str)


@specs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 64, 16, 16), (7, 33, 4, 4), (1, 3, 33, 131)], ids=str)
def test_any_order_of_threads_gives_the_same_bits(spec, shape, layout, dtype):
    for options in spec.variants:
        _check_any_order(spec, Case(shape, "", options), dtype, layout)


@pytest.mark.parametrize("spec", [SPN, CONDITIONAL_SPN], ids=str)
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("sizes", [{"kernel_size": 1}, {"kernel_size": 5}, {"masks": 1}], ids=str)
def test_any_order_of_threads_gives_the_same_bits_for_other_sizes(spec, sizes, layout):
    for options in spec.variants:
        _check_any_order(spec, Case((3, 33, 17, 9), "", options, sizes=sizes), torch.float32, layout)


def _check_any_order(spec, case, dtype, layout):
    tensors = spec.inputs(case, dtype, layout=layout)
    results = []
    with emulated():
        for seed in range(3):
            set_seed(seed)
            results.append(evaluate(spec, spec.call("native"), tensors, case.options))
    for result in results[1:]:
        for (name, a), (_, b) in zip(result.named(), results[0].named(), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("instance", [False, True], ids=["batch", "instance"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 64, 16, 16), (7, 33, 4, 4), (2, 3, 91, 100)], ids=str)
def test_any_order_of_threads_gives_the_same_statistics(shape, layout, dtype, instance):
    tensors = [LAYOUTS[layout](torch.randn(shape).to(dtype)) for _ in range(2)]
    with emulated():
        results = []
        for seed in range(4):
            set_seed(seed)
            results.append(statistics_ops.statistics(tensors, instance))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def _conditional_spn(tensors):
    """What both ops return, which nothing has checked in Python."""
    (forward, inputs), (_, backward_inputs) = CONDITIONAL_SPN.kernel_calls("native", tensors, {})
    backward = spn_ops.spn_bwd
    grads = backward(torch.cos(torch.arange(tensors["x"].numel())).view_as(tensors["x"]), *backward_inputs[1:])
    return [*forward(*inputs), *grads]


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_a_group_out_of_range_is_the_nearest(layout):
    tensors = CONDITIONAL_SPN.inputs(Case((4, 5, 6, 7), "", sizes={"groups": 3}), torch.float32, layout=layout)
    with emulated():
        given = _conditional_spn(tensors | {"index": torch.tensor([-5, 1, 2**40, 3])})
        nearest = _conditional_spn(tensors | {"index": torch.tensor([0, 1, 2, 2])})
    assert all(map(torch.equal, given, nearest))


@pytest.mark.parametrize("sizes", [{}, {"kernel_size": 1}, {"kernel_size": 5}, {"masks": 1}], ids=str)
def test_not_a_number_in_a_group_without_samples(sizes):
    tensors = CONDITIONAL_SPN.inputs(Case((2, 3, 4, 5), "", sizes=sizes), torch.float32)
    tensors["index"] = torch.tensor([2, 1])
    with emulated():
        clean = _conditional_spn(tensors)
        for name in ("mask_weight", "mask_bias", "gamma_weight", "beta_weight_inv"):
            tensors[name][0] = torch.nan
        assert all(map(torch.equal, _conditional_spn(tensors), clean))


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("row", ["gamma_bias", "beta_bias"])
def test_a_row_needs_neither_groups_nor_the_other_row(row, layout):
    one_group = CONDITIONAL_SPN.inputs(Case((4, 5, 6, 7), "", sizes={"groups": 1}), torch.float32, layout=layout)
    one_group.pop("beta_bias" if row == "gamma_bias" else "gamma_bias")
    no_groups = {
        name: t[0] if name.endswith(("weight", "bias", "inv")) and name != row else t for name, t in one_group.items()
    }
    del no_groups["index"]
    with emulated():
        by_index, without = _conditional_spn(one_group), _conditional_spn(no_groups)
    assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(by_index, without, strict=True))
    grads = dict(zip(("gamma_bias", "beta_bias"), without[-2:], strict=True))
    assert grads.pop(row).shape == (4, 5) and grads.popitem()[1].shape == (0,)


@pytest.mark.products
@specs
def test_tf32_is_the_flag_of_convolutions(spec, monkeypatch):
    """The emulated cuBLAS rounds as a GPU would, which shows the mode that was requested."""
    tensors = spec.inputs(Case((2, 16, 8, 8), ""))
    exact = spec.reference(**in_double(tensors))
    errors = {}
    with emulated():
        for allowed in (False, True):
            monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
            errors[allowed] = (spec.function(**tensors, impl="native") - exact).abs().max().item()
    assert 10 * errors[False] < errors[True] < 0.1


SHAPES = "2x3x5x7 or 3x2x1x5 or 2x5x6x17 or 2x17x7x10"
SIZES = "kernel_size or masks"
VALUES = f"(forward_and_gradients and ({SHAPES} or {SIZES}) and (float32-float32 or bfloat16-float32))"
STATISTICS = f"(test_statistics.py and (opcheck or any_strides or of_nothing or (float32 and ({SHAPES}))))"
CHOSEN = f"native-cuda-emulated and ({VALUES} or (test_layouts and bfloat16) or empty_batch or {STATISTICS})"
FILES = ("tests/test_ops.py", "tests/test_statistics.py")


@pytest.mark.beside(*FILES, "-x", "-k", CHOSEN, environment=partial(environment, "sanitized"))
def test_under_the_sanitizers(beside):
    """No out-of-bounds access to tensors or shared memory, no misaligned vector, no overflow: small cases."""
    assert beside.returncode == 0 and " passed" in beside.stdout, beside.stdout[-4000:]
