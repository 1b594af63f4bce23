"""Tests that need a GPU: streams, graphs, synchronisation, TF32, and tensors of more than 2^31 elements."""

import pytest
import torch
from test_ops import assert_same_bits, name_of

from pixnorm.testing import DENSE_LAYOUTS, LAYOUTS, SPN, Case, check_against_eager, evaluate

pytestmark = pytest.mark.cuda


@pytest.mark.products
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_tf32_follows_the_flag_of_convolutions(spec, variant, kernel, layout):
    """With TF32, as accurate as plain PyTorch with TF32; every other test is without."""
    shape = 4, 64, 16, 16
    tensors = spec.inputs(Case(shape, ""), layout=layout)
    strict = spec.function(**tensors, **variant, impl=kernel)
    torch.backends.cudnn.allow_tf32 = True
    try:
        check_against_eager(spec, kernel, Case(shape, "TF32", variant), layout=layout)
        rounded = spec.function(**tensors, **variant, impl=kernel)
    finally:
        torch.backends.cudnn.allow_tf32 = False
    if torch.cuda.get_device_capability() >= (8, 0):
        assert not torch.equal(rounded, strict)
    assert torch.equal(spec.function(**tensors, **variant, impl=kernel), strict)


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_work_is_queued_on_the_current_stream(spec, variant, kernel, layout):
    """A delayed stream overwrites NaN inputs; work on the default stream would read the NaN."""
    tensors = spec.inputs(Case((4, 16, 12, 20), "", variant), layout=layout)
    grad_y = torch.randn_like(spec.reference(**tensors, **variant))
    expected = evaluate(spec, spec.call(kernel), tensors, variant, grad_y)
    late = {name: torch.full_like(t, torch.nan if t.is_floating_point() else 0) for name, t in tensors.items()}
    late_grad = torch.full_like(grad_y, torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)  # cycles: some 50 ms
        for name, tensor in tensors.items():
            late[name].copy_(tensor)
        late_grad.copy_(grad_y)
        actual = evaluate(spec, spec.call(kernel), late, variant, late_grad)
    torch.cuda.synchronize()
    assert_same_bits(actual, expected)


def test_no_call_waits_for_the_gpu(spec, variant, kernel):
    tensors = spec.inputs(Case((4, 16, 8, 8), "", variant))
    leaves, rest = spec.leaves(tensors), {name: tensors[name] for name in tensors if name not in spec.differentiable}

    def step():
        y = spec.function(**leaves, **rest, **variant, impl=kernel)
        return torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))

    step()  # one-time set-up may synchronise
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 16, 4, 4), (4, 64, 32, 32)], ids=str)
def test_a_graph_replays_the_same_bits(spec, variant, kernel, shape, layout, dtype):
    """Forward, backward and running statistics, captured once and replayed on other inputs."""
    first, second = (spec.inputs(Case(shape, "", variant), dtype, layout=layout, seed=seed) for seed in (0, 1))
    grad_y = torch.randn_like(spec.reference(**first, **variant))
    inputs = {name: tensor.clone() for name, tensor in first.items()}
    leaves, constants = spec.leaves(inputs), spec.constants(inputs)
    buffers = {name: inputs[name] for name in spec.buffers}

    def step():
        y = spec.function(**leaves, **buffers, **constants, **variant, impl=kernel)
        return y.detach(), *torch.autograd.grad(y, list(leaves.values()), grad_y)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, *grads = step()
    for name, tensor in second.items():
        inputs[name].copy_(tensor)
    graph.replay()

    expected = evaluate(spec, spec.call(kernel), second, variant, grad_y)
    for name, actual in zip(leaves, grads, strict=True):
        assert torch.equal(actual, expected.grads[name]), name
    for name, actual in buffers.items():
        assert torch.equal(actual, expected.buffers[name]), name
    assert torch.equal(y, expected.y)


def assert_about_equal(actual, expected):
    """Wrong offsets cause differences as large as the values; other GEMMs, and rounding, small ones."""
    assert (actual - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.parametrize("spec", [SPN], ids=str)
@pytest.mark.gpu_memory(60)
@pytest.mark.parametrize("layout, upsample", [("contiguous", 1), ("channels_last", 1), ("contiguous", 2)])
def test_more_elements_than_32_bits_count(spec, kernel, layout, upsample):
    """Samples from either side of the 2^31st element, and sums over all, agree with calls on fewer samples."""
    n, part, side = 36, 12, 2736
    assert n * 8 * side**2 > 2**31 > part * 8 * side**2
    options = {"upsample": upsample}
    tensors = spec.inputs(Case((1, 8, 2, 2), "the parameters"), torch.float16, parameter_dtype=torch.float32)
    x, grad_y = (
        LAYOUTS[layout](torch.randn(n, 8, size, size, dtype=torch.float16)) for size in (side // upsample, side)
    )
    tensors["x"] = x
    grad_y *= 0.01  # sums of so many products overflow float16

    y = spec.function(**tensors, **options, momentum=1.0, impl=kernel)
    means = torch.stack([sample.float().mean((1, 2)) for sample in x]).mean(0)
    squares = torch.stack([sample.float().square().mean((1, 2)) for sample in x]).mean(0)
    torch.testing.assert_close(tensors["running_mean"], means, rtol=0, atol=1e-4)
    torch.testing.assert_close(tensors["running_var"], squares - means.square(), rtol=0, atol=1e-3)

    # With given statistics samples are independent, and the gradients of parameters add up.
    options["training"] = False
    whole = evaluate(spec, spec.call(kernel), tensors, options, grad_y)
    assert_about_equal(y[-1], whole.y[-1])
    del y
    sums = dict.fromkeys(spec.differentiable[1:], 0)
    for start in range(0, n, part):
        of = slice(start, start + part)
        some = evaluate(spec, spec.call(kernel), tensors | {"x": x[of]}, options, grad_y[of])
        assert_about_equal(whole.y[of], some.y)
        assert_about_equal(whole.grads["x"][of], some.grads["x"])
        sums = {name: value + some.grads[name] for name, value in sums.items()}
    for name, value in sums.items():
        assert_about_equal(whole.grads[name], value)
