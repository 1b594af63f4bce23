"""The convolution of a one-hot label map as a gather: equal to ``conv2d(one_hot(labels))``."""

import pytest
import torch
import torch.nn.functional as F

from pixnorm.functional import label_conv2d
from pixnorm.ops._dispatch import has_kernels
from pixnorm.testing import DENSE_LAYOUTS, LAYOUTS, assert_close_as_eager, available_impls
from pixnorm.testing.harness import random

pytestmark = [pytest.mark.usefixtures("one_thread")]
DEVICE = torch.get_default_device()
# In Triton on a GPU; on the CPU those have their own tests, in interpreted/.
KERNELS = [
    impl
    for impl in available_impls()[1:]
    if has_kernels("label_conv", impl, DEVICE.type) and (impl, DEVICE.type) != ("triton", "cpu")
]
impls = pytest.mark.parametrize("impl", ["reference", *KERNELS])


def draw(seed, shape, classes, out, k, dtype, *, bias=True, uniform=False):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, shape, generator=generator, device="cpu").to(DEVICE)
    if uniform:  # segments, as label maps have them: most neighbourhoods hold one label
        labels = labels[:, ::4, ::4].repeat_interleave(4, 1).repeat_interleave(4, 2)[:, : shape[1], : shape[2]]
    weight = random((out, classes, k, k), generator).to(dtype)
    return labels.contiguous(), weight, random((out,), generator).to(dtype) if bias else None


def plain(labels, weight, bias, activation, dtype):
    one_hot = F.one_hot(labels, weight.shape[1]).permute(0, 3, 1, 2).to(dtype)
    y = F.conv2d(one_hot, weight, bias, padding=weight.shape[-1] // 2)
    return F.relu(y) if activation else y


CASES = {
    "odd": ((2, 5, 7), 4, 3, 3),
    "one row": ((2, 1, 9), 4, 5, 3),
    "one pixel": ((3, 1, 1), 4, 16, 3),
    "one label": ((1, 4, 4), 1, 8, 3),
    "many outputs": ((1, 6, 17), 19, 133, 3),
    "k = 1": ((2, 4, 5), 3, 9, 1),
    "k = 5": ((2, 6, 5), 3, 9, 5),
    "segments": ((2, 16, 20), 19, 32, 3),
    "many pixels": ((1, 70, 90), 7, 20, 3),
}


def check_against_a_convolution(impl, shape, classes, out, k, dtype, activation=None, layout="contiguous", **options):
    """Output and gradients, by the rule of all ops; the gradient of y comes in that layout."""

    def results(seed):
        given = draw(seed, shape, classes, out, k, dtype, **options)
        labels, weight, bias = given
        grad = random((shape[0], out, *shape[1:]), torch.Generator().manual_seed(seed + 1)).to(dtype)
        exact_y = plain(labels, weight.double(), bias.double() if bias is not None else None, None, torch.float64)
        grad[exact_y.abs() <= 0.1 * exact_y.std()] = 0  # near the kink of ReLU rounding decides

        def run(function, dtype):
            leaves = [t.to(dtype).requires_grad_() for t in given[1:] if t is not None]
            y = function(labels, *leaves)
            return [y.detach(), *torch.autograd.grad(y, leaves, LAYOUTS[layout](grad.to(y.dtype)))]

        def convolution(labels, weight, bias=None):
            return plain(labels, weight, bias, activation, weight.dtype)

        def ours(labels, weight, bias=None):
            return label_conv2d(labels, weight, bias, activation, impl=impl)

        all_found = zip(run(ours, dtype), run(convolution, dtype), run(convolution, torch.float64), strict=True)
        for name, (actual, eager, exact) in zip(("y", "grad of weight", "grad of bias"), all_found, strict=False):
            yield name, actual, [eager], exact

    assert_close_as_eager(results, dtype)


@impls
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("case, layout", [(case, DENSE_LAYOUTS[i % 2]) for i, case in enumerate(CASES)])
def test_as_close_as_a_convolution(impl, case, layout, activation, dtype):
    options = {"bias": activation is None, "uniform": case == "segments"}
    check_against_a_convolution(impl, *CASES[case], dtype, activation, layout, **options)


@impls
def test_gradcheck(impl):
    labels, weight, bias = draw(0, (2, 3, 4), 3, 2, 3, torch.float64)
    leaves = [weight.requires_grad_(), bias.requires_grad_()]

    def function(weight, bias):
        return label_conv2d(labels, weight, bias, impl=impl).sin()

    assert torch.autograd.gradcheck(function, leaves) and torch.autograd.gradgradcheck(function, leaves)


@impls
def test_an_ignored_label_adds_nothing(impl):
    labels, weight, bias = draw(0, (2, 6, 7), 4, 3, 3, torch.float64)
    labels[0, 2:4, 1:5] = 255
    one_hot = F.one_hot(labels.clamp(max=4), 5)[..., :4].permute(0, 3, 1, 2).double()
    y = label_conv2d(labels, weight.requires_grad_(), bias, ignore_index=255, impl=impl)
    expected = F.conv2d(one_hot, weight, bias, padding=1)
    torch.testing.assert_close(y, expected)
    grads = [torch.autograd.grad(t.sin().sum(), weight)[0] for t in (y, expected)]
    torch.testing.assert_close(*grads)


@impls
def test_the_same_bits_for_any_number_of_threads(impl):
    labels, weight, bias = draw(0, (4, 40, 40), 5, 33, 3, torch.float32)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = label_conv2d(labels, weight.requires_grad_(), bias, impl=impl)
        found.append((y, torch.autograd.grad(y, weight, torch.cos(y.detach()))[0]))
    if impl in KERNELS:
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@impls
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"labels": torch.zeros(2, 3, 4)}, TypeError, "expected labels of torch.int64"),
        ({"labels": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, "expected 3D labels"),
        ({"weight": torch.zeros(2, 4, 2, 2)}, ValueError, "with odd k"),
        ({"weight": torch.zeros(2, 4, 3)}, ValueError, r"\(O, L, k, k\)"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must have shape \(2,\)"),
        ({"activation": "gelu"}, ValueError, "activation must be one of None, 'relu'"),
    ],
)
def test_bad_input(impl, change, error, message):
    arguments = {"labels": torch.zeros(1, 3, 4, dtype=torch.int64), "weight": torch.zeros(2, 4, 3, 3)} | change
    with pytest.raises(error, match=message):
        label_conv2d(**arguments, impl=impl)


@impls
@pytest.mark.cpu
@pytest.mark.parametrize("label", [5, -1])
def test_labels_out_of_range_are_refused(impl, label):
    with pytest.raises(ValueError, match=rf"labels must be in \[0, 4\), got labels from {label} to {label}"):
        label_conv2d(torch.full((1, 3, 4), label), torch.zeros(2, 4, 3, 3), impl=impl)


@impls
@pytest.mark.cuda
def test_labels_out_of_range_add_nothing(impl):
    """On a GPU, where looking would wait for it."""
    labels, weight, bias = draw(0, (2, 6, 7), 4, 3, 3, torch.float64)
    ignored = labels.clone()
    labels[0, 2, 1:4], ignored[0, 2, 1:4] = torch.tensor([4, -1, 2**40]), 255
    y, expected = (label_conv2d(*of, bias, impl=impl) for of in ((labels, weight), (ignored, weight)))
    assert torch.equal(y, expected)


@impls
def test_gradients_have_the_strides_of_their_parameters(impl):
    labels, weight, bias = draw(0, (2, 5, 7), 4, 3, 3, torch.float32)
    weight = LAYOUTS["channels_last"](weight).requires_grad_()
    (grad,) = torch.autograd.grad(label_conv2d(labels, weight, bias, impl=impl).sum(), weight)
    assert grad.stride() == weight.stride()


@impls
def test_empty_batch(impl):
    y = label_conv2d(torch.zeros(0, 3, 4, dtype=torch.int64), torch.zeros(2, 4, 3, 3).requires_grad_(), impl=impl)
    assert y.shape == (0, 2, 3, 4)
    y.sum().backward()


@impls
def test_compiles(impl):
    labels, weight, bias = draw(0, (2, 5, 7), 4, 3, 3, torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(label_conv2d, fullgraph=True, backend="aot_eager", dynamic=True)
    weight.requires_grad_()
    y, expected = compiled(labels, weight, bias, impl=impl), label_conv2d(labels, weight, bias, impl=impl)
    torch.testing.assert_close(y, expected)
    grads = [torch.autograd.grad(t.sum(), weight)[0] for t in (y, expected)]
    torch.testing.assert_close(*grads)
