"""The convolution of a label map in Triton, in the interpreter; see test_spn.py."""

import pytest
import torch
from test_label_conv import CASES, check_against_a_convolution, draw
from test_ops import name_of

from pixnorm.functional import label_conv2d
from pixnorm.nn import SPADE2d
from pixnorm.ops.label_conv import ops_of
from pixnorm.testing import DENSE_LAYOUTS, LAYOUTS
from pixnorm.triton_kernels import label_conv as kernels

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]

# The interpreter takes a tenth of a second per tile of y.
SMALL = [name for name, (shape, *_) in CASES.items() if torch.Size(shape).numel() <= 120]
both_layouts = pytest.mark.parametrize("layout", DENSE_LAYOUTS)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that an image has several, whose sums are in several parts."""
    for name, value in {"PIXELS": 16, "COLUMNS_OF_DOUBLE": 16, "PROGRAMS": 24}.items():
        monkeypatch.setattr(kernels, name, value)


@pytest.mark.parametrize("i, case", list(enumerate(SMALL)))
def test_in_double(i, case):
    """With hardly any rounding to tolerate, every mistake shows."""
    activation, layout = (None, "relu")[i // 2 % 2], DENSE_LAYOUTS[i % 2]
    check_against_a_convolution("triton", *CASES[case], torch.float64, activation, layout, bias=i % 3 > 0)


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)
def test_other_dtypes(dtype, layout):
    check_against_a_convolution("triton", (2, 5, 8), 19, 40, 3, dtype, "relu", layout)


@both_layouts
@pytest.mark.parametrize("bias", [True, False])
def test_several_tiles(small_tiles, layout, bias):
    """Of pixels, labels (the bias may be one more) and channels; parts of several tiles, the last one shorter."""
    check_against_a_convolution("triton", (3, 5, 7), 16, 17, 3, torch.float64, None, layout, bias=bias)


def test_an_ignored_label_adds_nothing():
    labels, weight, bias = draw(0, (2, 6, 7), 4, 3, 3, torch.float64)
    weight.requires_grad_()
    for ignored in (2, 255):
        labels[0, 2:4, 1:5] = ignored
        found = []
        for impl in ("triton", "reference"):
            y = label_conv2d(labels, weight, bias, ignore_index=ignored, impl=impl)
            found.append((y.detach(), *torch.autograd.grad(y.sin().sum(), weight)))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


def test_labels_out_of_range_add_nothing():
    """On a GPU they are not looked at. The label after the last is not taken for the row that sums the bias."""
    labels, weight, bias = draw(0, (2, 6, 7), 4, 3, 3, torch.float64)
    ignored = labels.clone()
    labels[0, 2, 1:4], ignored[0, 2, 1:4] = torch.tensor([4, -1, 2**40]), 3
    forward, backward = ops_of("triton")
    weight[:, 3], ignored[ignored == 3], labels[labels == 3] = 0, 255, 255
    y, expected = (forward(of, weight, bias, ignore, None) for of, ignore in ((labels, -1), (ignored, 255)))
    assert torch.equal(y, expected)
    found, wanted = (backward(y.cos(), of, weight, None, True, i, None) for of, i in ((labels, -1), (ignored, 255)))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_gradcheck():
    labels, weight, bias = draw(0, (2, 2, 3), 3, 2, 3, torch.float64)

    def function(weight, bias):
        return label_conv2d(labels, weight, bias, impl="triton").sin()

    leaves = [weight.requires_grad_(), bias.requires_grad_()]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("has_bias", [True, False])
def test_opcheck(has_bias):
    """Schemas and fakes (shapes, dtypes, strides) match the kernels."""
    labels, weight, bias = draw(0, (2, 3, 4), 3, 2, 3, torch.float32, bias=has_bias)
    forward, backward = ops_of("triton")
    y = forward(labels, weight, bias, -1, 0.0)
    for op, arguments in (
        (forward, (labels, weight, bias, -1, 0.0)),
        (backward, (y, labels, LAYOUTS["channels_last"](weight), y, has_bias, 1, 0.0)),
    ):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_two_runs_are_bit_identical():
    labels, weight, bias = draw(0, (3, 5, 9), 4, 5, 3, torch.float32)
    found = []
    for _ in range(2):
        y = label_conv2d(labels, weight.requires_grad_(), bias, impl="triton")
        found.append((y.detach(), *torch.autograd.grad(y.sin().sum(), weight)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_float32_is_not_rounded_but_in_sums():
    """One pixel with that label and tap: its gradient as it is, in all 24 bits."""
    labels = torch.tensor([[[0, 1]]])
    weight = torch.zeros(1, 2, 1, 1, requires_grad=True)
    grad = torch.tensor([1 + 2**-23, -1.2345678e-20]).view(1, 1, 1, 2)
    (found,) = torch.autograd.grad(label_conv2d(labels, weight, impl="triton"), weight, grad)
    assert torch.equal(found.flatten(), grad.flatten())


def test_empty_batch():
    weight = torch.zeros(2, 4, 3, 3).requires_grad_()
    y = label_conv2d(torch.zeros(0, 3, 4, dtype=torch.int64), weight, impl="triton")
    assert y.shape == (0, 2, 3, 4)
    y.sum().backward()
    assert not weight.grad.any()


def test_in_a_layer():
    """``impl="triton"`` of SPADE is that of its label convolution, too."""
    layer = SPADE2d(3, 5, hidden_channels=4, impl="triton").double()
    x, labels = torch.randn(2, 3, 4, 6, dtype=torch.float64), torch.randint(5, (2, 8, 12))
    y = layer(x, labels)
    called = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "launch", lambda *args, **kwargs: called.append(args[0].fn.__name__))
        layer(x, labels)
    assert called == ["label_conv_fwd_kernel"]
    layer.impl = "reference"
    torch.testing.assert_close(y, layer(x, labels))
