"""What the blur promises: bilinear upsampling, constants, adjoints; and wrong input. test_ops.py has the values."""

import pytest
import torch
import torch.nn.functional as F
from test_ops import name_of

from pixnorm.functional import blur2d
from pixnorm.ops.blur import ops_of
from pixnorm.testing import BLUR, DENSE_LAYOUTS, LAYOUTS, Case
from pixnorm.testing.blur import DOWN, UP

SPECS = (BLUR,)
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.emulated(runs=False)]

both_layouts = pytest.mark.parametrize("layout", DENSE_LAYOUTS)
all_options = pytest.mark.parametrize("options", [{}, UP, DOWN], ids=str)


@both_layouts
def test_upsampling_is_bilinear_but_for_the_border(impl, layout):
    """There the neighbour beyond is 0, and in F.interpolate the border pixel itself."""
    x = LAYOUTS[layout](torch.randn(2, 5, 7, 18, dtype=torch.float64))
    y, expected = blur2d(x, up=2, impl=impl), F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(y[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1])
    torch.testing.assert_close(y[..., 0, 1:-1], 0.75 * expected[..., 0, 1:-1])
    torch.testing.assert_close(y[..., -1, -1], 0.75**2 * expected[..., -1, -1])


@both_layouts
@all_options
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_constants_stay_constant_in_the_interior(impl, dtype, options, layout):
    x = LAYOUTS[layout](torch.full((2, 3, 8, 22), 1.25, dtype=dtype))
    y = blur2d(x, **options, impl=impl)
    assert (y[..., 1:-1, 1:-1] == 1.25).all()
    assert (y[..., 0, :] < 1.25).all() and (y[..., -1] < 1.25).all()


@both_layouts
@all_options
@pytest.mark.parametrize("shape", [(2, 3, 8, 22), (2, 5, 7, 33), (3, 17, 3, 5), (1, 2, 2, 2)], ids=str)
def test_backward_is_the_adjoint(kernel, shape, options, layout):
    """<blur(x), y> = <x, adjoint(y)>, and the adjoint of the adjoint is the blur, to the bit."""
    x = LAYOUTS[layout](torch.randn(shape, dtype=torch.float64)).requires_grad_()
    blurred = blur2d(x, **options, impl=kernel)
    y = torch.randn_like(blurred).requires_grad_()
    (adjoint,) = torch.autograd.grad(blurred, x, y, create_graph=True)
    torch.testing.assert_close((blurred * y).sum(), (x * adjoint).sum())
    (back,) = torch.autograd.grad(adjoint, y, x.detach(), create_graph=True)
    assert torch.equal(back, blurred)


@both_layouts
@all_options
@pytest.mark.parametrize("shape", [(2, 2, 3, 5), (1, 3, 4, 2)], ids=str)
def test_derivatives_of_all_orders(impl, shape, options, layout):
    x = LAYOUTS[layout](torch.randn(shape, dtype=torch.float64)).requires_grad_()

    def function(x):
        return blur2d(x, **options, impl=impl).sin()

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)

    def gradient(x):
        return torch.autograd.grad(function(x).sum(), x, create_graph=True)[0].sin()

    assert torch.autograd.gradgradcheck(gradient, x)


@pytest.mark.cpu
@all_options
def test_all_derivatives_are_the_ops(kernel, options, monkeypatch):
    """And not the reference, which is slow."""
    monkeypatch.setattr(F, "conv2d", None)
    x = torch.randn(2, 3, 5, 6, requires_grad=True)
    y = blur2d(x, **options, impl=kernel)
    for _ in range(3):
        (y,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert y.isfinite().all()


@both_layouts
@all_options
@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (2, 3, 4, 4)], ids=str)
def test_batches_of_gradients(kernel, shape, options, layout):
    """vmap over backward, as in functional Jacobians."""
    x = LAYOUTS[layout](torch.randn(shape, dtype=torch.float64)).requires_grad_()
    y = blur2d(x, **options, impl=kernel)
    batch = torch.randn(3, *y.shape, dtype=torch.float64)
    (grads,) = torch.autograd.grad(y, x, batch, is_grads_batched=True, retain_graph=True)
    for grad, of in zip(grads, batch, strict=True):
        torch.testing.assert_close(grad, torch.autograd.grad(y, x, of, retain_graph=True)[0])


@both_layouts
@pytest.mark.parametrize("dynamic", [False, True])
@all_options
def test_compiles(impl, options, dynamic, layout):
    torch.compiler.reset()
    compiled = torch.compile(blur2d, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in [(2, 3, 5, 6), (3, 3, 9, 8)]:
        x = LAYOUTS[layout](torch.randn(shape)).requires_grad_()
        y, expected = compiled(x, **options, impl=impl), blur2d(x, **options, impl=impl)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(*(torch.autograd.grad(t.sin().sum(), x)[0] for t in (y, expected)))


@all_options
def test_not_a_number_stays_near(impl, options):
    """No output whose window it is not in is touched, at the borders either."""
    x = torch.zeros(1, 1, 6, 22, dtype=torch.float64)
    x[..., 3, 4], x[..., 0, 21], x[..., 5, 20] = torch.nan, torch.inf, -torch.inf
    touched = ~blur2d(x, **options, impl=impl).isfinite()
    marked = blur2d(x.isfinite().logical_not().double(), **options, impl=impl)
    assert torch.equal(touched, marked != 0)


@all_options
def test_autocast_changes_nothing(impl, options):
    x = torch.randn(2, 3, 5, 6)
    expected = blur2d(x, **options, impl=impl)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        assert torch.equal(blur2d(x, **options, impl=impl), expected)


@pytest.mark.parametrize(
    "shape, options, error, message",
    [
        ((2, 3, 4), {}, ValueError, "expected 4D input"),
        ((2, 3, 4, 5), {"up": 3}, ValueError, "up must be one of 1, 2, got 3"),
        ((2, 3, 4, 5), {"down": 0}, ValueError, "down must be one of 1, 2, got 0"),
        ((2, 3, 4, 5), UP | DOWN, ValueError, "up and down must not both be 2"),
        ((2, 3, 1, 5), DOWN, ValueError, r"down=2 needs at least 2x2 pixels, got input of shape \(2, 3, 1, 5\)"),
        ((2, 3, 5, 1), DOWN, ValueError, r"down=2 needs at least 2x2 pixels"),
    ],
    ids=str,
)
def test_bad_input(impl, shape, options, error, message):
    with pytest.raises(error, match=message):
        blur2d(torch.zeros(shape), **options, impl=impl)


def test_integers_are_refused(impl):
    with pytest.raises(TypeError, match="expected floating point input"):
        blur2d(torch.zeros(1, 2, 3, 4, dtype=torch.int64), impl=impl)


@pytest.mark.cpu
@pytest.mark.parametrize("options", [(2, 2), (3, 1), (1, 0)], ids=str)
def test_the_ops_check_their_options(options):
    forward, backward = ops_of("native")
    with pytest.raises(RuntimeError, match="up and down must be 1 or 2"):
        forward(torch.zeros(1, 1, 4, 4), *options)
    with pytest.raises(RuntimeError, match="up and down must be 1 or 2"):
        backward(torch.zeros(1, 1, 4, 4), *options, 4, 4)
    with pytest.raises(RuntimeError, match="grad_y has the wrong shape"):
        backward(torch.zeros(1, 1, 4, 4), 2, 1, 3, 2)


@pytest.mark.cpu
@both_layouts
@all_options
@pytest.mark.parametrize("shape", [(1, 3, 1, 9), (1, 3, 9, 1), (2, 1, 1, 1), (1, 20, 40, 9), (1, 3, 130, 15)], ids=str)
def test_thin_images(kernel, shape, options, layout):
    if options == DOWN and min(shape[2:]) < 2:
        with pytest.raises(ValueError, match="2"):
            blur2d(torch.randn(shape), **options, impl=kernel)
        return
    x = LAYOUTS[layout](torch.randn(shape, dtype=torch.float64))
    torch.testing.assert_close(blur2d(x, **options, impl=kernel), blur2d(x, **options, impl="reference"))


def test_the_result_of_each_option_has_its_traffic():
    """Read x, write y."""
    for options, of_y in (({}, 1), (UP, 4), (DOWN, 0.25)):
        traffic = BLUR.traffic(Case((2, 3, 4, 6), "", options), torch.float32)
        assert traffic.forward == traffic.backward == 2 * 3 * 4 * 6 * 4 * (1 + of_y)
