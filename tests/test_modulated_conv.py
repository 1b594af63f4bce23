"""Modulated convolutions: the identities of their equations, numbers by hand, errors, and what stands between two."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import pixnorm
from pixnorm.functional import modulated_conv2d, spatially_modulated_conv2d, style_epilogue
from pixnorm.nn import (
    EqualizedConv2d,
    EqualizedLinear,
    MappingNetwork,
    ModulatedConv2d,
    NoiseInjection,
    SpatiallyModulatedConv2d,
    StyleBlock,
    StyleBlocks,
    StyleLayer,
    pixel_norm,
    style_mixing,
    truncate,
)
from pixnorm.ops import convolution
from pixnorm.ops import modulated_conv as ops
from pixnorm.ops._dispatch import has_kernels
from pixnorm.testing import DENSE_LAYOUTS, LAYOUTS, assert_close_as_eager, available_impls, in_double

pytestmark = [pytest.mark.usefixtures("one_thread")]
DEVICE = torch.get_default_device()
# In Triton on a GPU; on the CPU those have their own tests, in interpreted/.
KERNELS = [
    impl
    for impl in available_impls()[1:]
    if has_kernels("spatial_scale", impl, DEVICE.type) and (impl, DEVICE.type) != ("triton", "cpu")
]
impls = pytest.mark.parametrize("impl", ["reference", *KERNELS])
kernels = pytest.mark.parametrize("impl", KERNELS)
PADDINGS = [("same", "zeros"), ("valid", "zeros"), ("same", "circular"), ("same", "replicate"), ((2, 1), "reflect")]


def drawn(n=3, i=4, o=5, h=6, w=7, k=3, dtype=torch.float64):
    x, weight, styles = torch.randn(n, i, h, w), torch.randn(o, i, k, k), torch.randn(n, i) + 1
    return [t.to(dtype) for t in (x, weight, styles)]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


# ---- modulated


@impls
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("padding", ["same", "valid", 1, (0, 2)])
@pytest.mark.parametrize("k", [1, 3])  # few 1x1 kernels are a case of their own, where nothing is padded or upsampled
def test_each_sample_is_convolved_with_kernels_of_its_own(impl, n, upsample, padding, k):
    """w s / sigma, by one convolution for each sample, and by a grouped one."""
    x, weight, styles = drawn(n, k=k)
    y = modulated_conv2d(x, weight, styles, upsample=upsample, padding=padding, impl=impl)
    large = F.interpolate(x, scale_factor=2) if upsample == 2 else x
    own = weight * styles[:, None, :, None, None]
    own = own / (own.square().sum((2, 3, 4), keepdim=True) + 1e-8).sqrt()
    each = [F.conv2d(sample[None], kernels, padding=padding) for sample, kernels in zip(large, own, strict=True)]
    close(y, torch.cat(each))
    grouped = F.conv2d(large.flatten(0, 1)[None], own.flatten(0, 1), padding=padding, groups=n)
    close(y, grouped.view_as(y))


@impls
@pytest.mark.parametrize("n", [1, 2])
def test_scales_cancel(impl, n):
    """Those of the styles, and of each output's kernels; eps aside."""
    x, weight, styles = drawn(n)
    y = modulated_conv2d(x, weight, styles, eps=0.0, impl=impl)
    close(modulated_conv2d(x, weight, 7 * styles, eps=0.0, impl=impl), y)
    per_output = torch.rand(5, 1, 1, 1, dtype=x.dtype) + 0.5
    close(modulated_conv2d(x, weight * per_output, styles, eps=0.0, impl=impl), y)
    close(modulated_conv2d(3 * x, weight, styles, impl=impl), 3 * modulated_conv2d(x, weight, styles, impl=impl))


@impls
def test_variance_is_one(impl):
    """The mean of y² over samples and pixels, for independent x of unit variance: other paddings repeat pixels."""
    torch.manual_seed(0)
    x, weight, styles = torch.randn(4000, 3, 6, 6), torch.randn(4, 3, 3, 3), torch.rand(1, 3) + 0.5
    y = modulated_conv2d(x, weight, styles.expand(4000, 3), padding="valid", impl=impl)
    torch.testing.assert_close(y.square().mean((0, 2, 3)), torch.ones(4), rtol=0.03, atol=0)
    style_map = torch.rand(1, 3, 6, 6) + 0.1
    for padding, mode in PADDINGS[:3]:
        options = {"padding": padding, "padding_mode": mode, "impl": impl}
        y = spatially_modulated_conv2d(x, weight, style_map.expand_as(x), **options)
        torch.testing.assert_close(y.square().mean((0, 2, 3)), torch.ones(4), rtol=0.03, atol=0)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("n, upsample", [(1, 1), (2, 1), (2, 2)])
def test_accuracy(impl, dtype, layout, n, upsample):
    def draw(seed):
        torch.manual_seed(seed)
        x, weight, styles = drawn(n, 8, 6, 5, 9, dtype=dtype)
        given = {"x": LAYOUTS[layout](x), "weight": weight * 0.1, "styles": styles}
        size = (n, 6, 5 * upsample, 9 * upsample)
        grad_y = torch.randn(size, dtype=dtype)

        def run(function, given, **options):
            leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
            y = function(**leaves, upsample=upsample, **options)
            return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), grad_y.to(y.dtype))]

        found = run(modulated_conv2d, given, impl=impl)
        eager = run(ops.modulated_conv2d_reference, given)
        exact = run(ops.modulated_conv2d_reference, in_double(given))
        for name, a, b, c in zip(("y", "x", "weight", "styles"), found, eager, exact, strict=True):
            yield name, a, [b], c

    assert_close_as_eager(draw, dtype)


@pytest.mark.parametrize("n", [1, 2])
def test_large_numbers_in_half_precision(n):
    """Squares of 300 are infinite in float16."""
    x, weight, styles = drawn(n, dtype=torch.float16)
    y = modulated_conv2d(x, weight, 300 * styles.abs() + 100)
    assert y.isfinite().all() and y.abs().max() > 0.1
    y = spatially_modulated_conv2d(x, weight, torch.full_like(x, 300))
    assert y.isfinite().all() and y.abs().max() > 0.1


# ---- spatially modulated


@impls
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at", [(2, 3), (0, 3)], ids=["inside", "border"])
def test_not_a_number_in_a_map(impl, layout, value, at):
    """It is in the variance of its sample, and of no other."""
    x, weight, _ = drawn()
    style_map = torch.randn_like(x)
    style_map[1, 2, at[0], at[1]] = value
    y = spatially_modulated_conv2d(LAYOUTS[layout](x), weight, LAYOUTS[layout](style_map), impl=impl)
    expected = spatially_modulated_conv2d(x, weight, style_map, impl="reference")
    assert torch.equal(y.isnan(), expected.isnan()) and y[1].isnan().any() and y[::2].isfinite().all()


@kernels
def test_inference_then_training(impl):
    """What the first leaves behind is of no harm to the second."""
    x, weight, _ = drawn(h=9, w=11)
    with torch.inference_mode():
        spatially_modulated_conv2d(x, weight, x, impl=impl)
    x.requires_grad_()
    spatially_modulated_conv2d(x, weight, x, impl=impl).sum().backward()
    assert x.grad.isfinite().all()


@kernels
def test_sums_of_squares_under_autocast(impl):
    """The reference, too, keeps them in float32."""
    x, weight, _ = drawn(dtype=torch.float32)
    style_map = torch.full_like(x, 300).requires_grad_()
    with torch.autocast(DEVICE.type, torch.float16 if DEVICE.type == "cuda" else torch.bfloat16):
        y = spatially_modulated_conv2d(x, weight, style_map, impl=impl)
        (grad,) = torch.autograd.grad(y.float().square().sum(), style_map, create_graph=True)
        sums = ops.spatial_scale_reference(x, style_map, *ops.tap_counts(x, weight, "same", "zeros"))[1]
    assert sums.dtype == torch.float32 and grad.isfinite().all()


@impls
@pytest.mark.parametrize("padding, mode", PADDINGS)
@pytest.mark.parametrize("k", [1, 3, 4])
def test_sigma_by_a_second_convolution(impl, padding, mode, k):
    """sigma² is the mean of w² * s² with the same padding."""
    x, weight, _ = drawn(k=k)
    style_map = torch.randn_like(x)
    y = spatially_modulated_conv2d(x, weight, style_map, padding=padding, padding_mode=mode, impl=impl)
    plain = convolution.convolution(x * style_map, weight, padding, mode)
    variance = convolution.convolution(style_map**2, weight**2, padding, mode).mean((2, 3), keepdim=True)
    close(y, plain / (variance + 1e-8).sqrt())


@impls
@pytest.mark.parametrize("padding, mode", PADDINGS)
@pytest.mark.parametrize("k", [1, 3])
def test_upsampling_of_a_map(impl, padding, mode, k):
    """The scaled input and the squares are both upsampled."""
    x, weight, _ = drawn(k=k)
    style_map = torch.randn_like(x)
    options = {"padding": padding, "padding_mode": mode, "impl": impl}
    y = spatially_modulated_conv2d(x, weight, style_map, upsample=2, **options)
    large = [F.interpolate(t, scale_factor=2) for t in (x, style_map)]
    close(y, spatially_modulated_conv2d(large[0], weight, large[1], **options))
    y = spatially_modulated_conv2d(x, weight, style_map, upsample=2, demodulate=False, **options)
    close(y, convolution.convolution(large[0] * large[1], weight, padding, mode))


@impls
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("n", [1, 3])
def test_colours(impl, layout, n):
    """Few 1x1 kernels, which are of each sample; all gradients."""
    x, weight, styles = (t.requires_grad_() for t in drawn(n, o=3, k=1))
    y = modulated_conv2d(LAYOUTS[layout](x), weight, styles, demodulate=False, impl=impl)
    expected = F.conv2d(x * styles[..., None, None], weight)
    close(y, expected)
    grad = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad(of, (x, weight, styles), grad) for of in (y, expected))
    for actual, of_plain in zip(found, wanted, strict=True):
        close(actual, of_plain)


@impls
def test_scales_of_a_map_cancel(impl):
    x, weight, _ = drawn()
    style_map = torch.randn_like(x)
    y = spatially_modulated_conv2d(x, weight, style_map, eps=0.0, impl=impl)
    close(spatially_modulated_conv2d(x, weight, 5 * style_map, eps=0.0, impl=impl), y)
    per_output = torch.rand(5, 1, 1, 1, dtype=x.dtype) + 0.5
    close(spatially_modulated_conv2d(x, weight * per_output, style_map, eps=0.0, impl=impl), y)
    close(spatially_modulated_conv2d(-2 * x, weight, style_map, eps=0.0, impl=impl), -2 * y)


@impls
@pytest.mark.parametrize(
    "padding, mode, k", [("valid", "zeros", 3), ("same", "circular", 3), ("same", "replicate", 3), ("same", "zeros", 1)]
)
def test_a_constant_map_is_a_style(impl, padding, mode, k):
    x, weight, styles = drawn(k=k)
    constant = styles[..., None, None].expand_as(x)
    y = spatially_modulated_conv2d(x, weight, constant, padding=padding, padding_mode=mode, impl=impl)
    if mode == "zeros":
        expected = modulated_conv2d(x, weight, styles, padding=padding, impl=impl)
    else:
        padded = F.pad(x, convolution.paddings(weight, padding), mode=mode)
        expected = modulated_conv2d(padded, weight, styles, padding="valid", impl=impl)
    close(y, expected)


@impls
@pytest.mark.parametrize("n", [4, 8, 16])
def test_a_constant_map_beside_zeros(impl, n):
    """Taps outside the image lower sigma²: sum of w² s² (1 - |a|/H) (1 - |b|/W); of equal kernels by (1 - 2/(3n))²."""
    x, weight, styles = drawn(h=n, w=n)
    constant = styles[..., None, None].expand_as(x)
    inside = 1 - torch.tensor([1.0, 0.0, 1.0], dtype=x.dtype) / n
    share = inside[:, None] * inside
    variance = torch.einsum("ni,oiab,ab->no", styles**2, weight**2, share)[..., None, None]
    plain = F.conv2d(x * styles[..., None, None], weight, padding=1)
    close(spatially_modulated_conv2d(x, weight, constant, eps=0.0, impl=impl), plain / variance.sqrt())
    equal = torch.ones_like(weight)
    ratio = spatially_modulated_conv2d(x, equal, constant, eps=0.0, impl=impl) / modulated_conv2d(
        x, equal, styles, eps=0.0, impl=impl
    )
    close(ratio, torch.full_like(ratio, 1 / (1 - 2 / (3 * n))))


@impls
@pytest.mark.parametrize("function", [modulated_conv2d, spatially_modulated_conv2d])
def test_gradients_of_gradients(impl, function):
    x, weight, styles = drawn(2, 2, 2, 3, 4)
    if function is spatially_modulated_conv2d:
        styles = torch.randn_like(x)
    leaves = [t.requires_grad_() for t in (x, weight, styles)]
    call = lambda *leaves: function(*leaves, impl=impl)  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"x": torch.randn(3, 4, 6)}, ValueError, "4D"),
        ({"weight": torch.randn(5, 3, 3, 3)}, ValueError, r"weight must have shape \(out_channels, 4, kh, kw\)"),
        ({"styles": torch.randn(3, 5)}, ValueError, r"must have shape \(3, 4"),
        ({"eps": -1.0}, ValueError, "eps must be non-negative"),
        ({"x": torch.randn(3, 4, 6, 7).int()}, TypeError, "floating point"),
    ],
)
@pytest.mark.parametrize("spatially", [False, True])
def test_errors(change, error, words, spatially):
    x, weight, styles = drawn(dtype=torch.float32)
    given = {"x": x, "weight": weight, "styles": styles} | change
    if spatially:
        styles = given.pop("styles")
        given["style_map"] = styles if "styles" in change else torch.randn(3, 4, 6, 7)
    with pytest.raises(error, match=words):
        (spatially_modulated_conv2d if spatially else modulated_conv2d)(**given)


def test_errors_of_options():
    x, weight, styles = drawn(dtype=torch.float32)
    with pytest.raises(ValueError, match="upsample must be one of 1, 2, got 3"):
        modulated_conv2d(x, weight, styles, upsample=3)
    with pytest.raises(ValueError, match="impl must be one of"):
        modulated_conv2d(x, weight, styles, impl="c")
    with pytest.raises(ValueError, match="padding must be one of 'same', 'valid', got 'full'"):
        spatially_modulated_conv2d(x, weight, x, padding="full")
    with pytest.raises(ValueError, match=r"kernels of size .* are larger than the input"):
        spatially_modulated_conv2d(x[..., :2, :], weight, x[..., :2, :], padding="valid")
    with pytest.raises(ValueError, match="padding_mode must be one of"):
        spatially_modulated_conv2d(x, weight, x, padding_mode="mirror")
    with pytest.raises(TypeError, match=r"expected a style_map of dtype torch\.float32"):
        spatially_modulated_conv2d(x, weight, x.double())


# ---- modules


class Calls(TorchDispatchMode):
    """The operations on whole feature maps."""

    def __init__(self, size):
        super().__init__()
        self.size, self.names = size, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple | list) else [result]
        if any(isinstance(t, torch.Tensor) and t.numel() == self.size for t in outputs):
            self.names.append(function.name().partition("::")[2].partition(".")[0])
        return result


VIEWS = {"detach", "alias", "view", "empty_like", "t", "transpose"}


@kernels
def test_one_pass_between_two_convolutions(impl):
    """Forward and backward: one op of ours, nothing else that gives a feature map."""
    blocks = StyleBlocks(*[StyleBlock(8, 8, 3, 6, impl=impl) for _ in range(3)])
    x, w = torch.randn(2, 8, 4, 4, requires_grad=True), torch.randn(2, 6)
    noise = [torch.randn(2, 1, 4, 4) for _ in range(3)]
    with Calls(x.numel()) as forward:
        y = blocks(x, w, noise)
    suffix = "_triton" if impl == "triton" else ""
    epilogue, gradient = f"style_epilogue_fwd{suffix}", f"style_epilogue_bwd{suffix}"
    assert [n for n in forward.names if n not in VIEWS] == [epilogue, *["convolution", epilogue] * 3]
    grad = torch.ones_like(y)
    with Calls(x.numel()) as backward:
        y.backward(grad)
    assert [n for n in backward.names if n not in VIEWS] == [gradient, *["convolution_backward", gradient] * 3]


@impls
def test_blocks_are_the_layers(impl):
    """In a chain, and each by itself."""
    torch.manual_seed(0)
    sizes = (4, 6, 3, 1), (6, 3, 3, 2), (3, 2, 1, 1)
    layers = [StyleBlock(i, o, k, 5, upsample, impl=impl) for i, o, k, upsample in sizes]
    blocks = StyleBlocks(*layers).double()
    for block in layers:
        torch.nn.init.constant_(block.noise.strength, 0.5)
    x, w = torch.randn(2, 4, 5, 6, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    noises = [torch.randn(2, 1, 5 * s, 6 * s, dtype=torch.float64) for s in (1, 2, 2)]
    y = x
    for block, of_layer, noise in zip(layers, w.unbind(1), noises, strict=True):
        y = block(y, of_layer, noise)
    close(blocks(x, w, noises), y)
    close(blocks(x, w[:, 0], noises), blocks(x, w[:, :1].expand(-1, 3, -1), noises))


@impls
def test_hooks_of_blocks_and_convolutions_run(impl):
    """Checkpoint wrappers, sharding and hook-based weight norms depend on it."""
    blocks = StyleBlocks(StyleBlock(4, 6, 3, 5, impl=impl), StyleBlock(6, 3, 3, 5, impl=impl))
    seen = []
    for module in blocks.modules():
        module.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    blocks(torch.randn(2, 4, 5, 6), torch.randn(2, 5))
    assert [seen.count(name) for name in ("StyleBlock", "ModulatedConv2d", "EqualizedLinear")] == [2, 2, 2]


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_trace_of_one_sample_is_right_for_more(impl):
    """Kernels of its own would bake the first sample's styles in."""
    for layer in (ModulatedConv2d(4, 6, 3, 8, upsample=2, impl=impl), StyleBlock(4, 6, 3, 8, noise=False, impl=impl)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(layer, (torch.randn(1, 4, 32, 32), torch.randn(1, 8)))
        x, w = torch.randn(2, 4, 32, 32), torch.randn(2, 8)
        torch.testing.assert_close(traced(x, w), layer(x, w), rtol=1e-3, atol=1e-4)


@impls
def test_block_by_hand(impl):
    block = StyleBlock(4, 6, 3, 5, impl=impl).double()
    x, w = torch.randn(2, 4, 5, 6, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    noise = torch.randn(1, 1, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        block.noise.strength.fill_(0.3)
        block.bias.normal_()
        styles = F.linear(w, block.conv.affine.weight / math.sqrt(5), block.conv.affine.bias)
        y = modulated_conv2d(x, block.conv.weight / math.sqrt(4 * 9), styles, impl="reference")
        y = F.leaky_relu(y + 0.3 * noise + block.bias[:, None, None], 0.2) * math.sqrt(2)
        close(block(x, w, noise), y)


@impls
@pytest.mark.parametrize("upsample", [1, 2])
def test_style_layer_by_hand(impl, upsample):
    layer = StyleLayer(4, 6, 3, 5, upsample=upsample, impl=impl).double()
    x, w = torch.randn(2, 4, 5, 6, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    noise = torch.randn(2, 1, 5 * upsample, 6 * upsample, dtype=torch.float64)
    with torch.no_grad():
        layer.noise.strength.normal_()
        layer.bias.normal_()
        large = F.interpolate(x, scale_factor=upsample)
        y = F.conv2d(large, layer.conv.weight * math.sqrt(2 / 36), padding=1)
        if upsample == 2:
            taps = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype) / 4
            y = F.conv2d(y, (taps[:, None] * taps).expand(6, 1, 3, 3), padding=1, groups=6)
        y = F.leaky_relu(y + layer.noise.strength[:, None, None] * noise + layer.bias[:, None, None], 0.2)
        y = F.instance_norm(y, eps=1e-8)
        scale, shift = F.linear(w, layer.affine.weight / math.sqrt(5), layer.affine.bias).chunk(2, 1)
        close(layer(x, w, noise), (1 + scale)[..., None, None] * y + shift[..., None, None])


@impls
def test_noise(impl):
    """At strength 0 it has no effect; else it changes pixels, all channels by their strengths; styles do not differ
    between pixels."""
    layer = StyleLayer(4, 6, 3, 5, impl=impl)
    x, w = torch.randn(2, 4, 8, 8), torch.randn(2, 5)
    assert torch.equal(layer(x, w), layer(x, w))
    torch.nn.init.constant_(layer.noise.strength, 1.0)
    assert not torch.equal(layer(x, w), layer(x, w))
    injection = NoiseInjection(4, impl=impl)
    assert torch.equal(injection(x), x)
    torch.nn.init.constant_(injection.strength, 2.0)
    added = injection(torch.zeros_like(x))
    assert added.std() > 1 and torch.equal(added, added[:, :1].expand_as(added))
    # With a constant input, all pixels far from the border are equal: the style is the same everywhere.
    block = StyleBlock(4, 6, 3, 5, noise=False, impl=impl)
    inside = block(torch.ones(2, 4, 8, 8), w)[..., 1:-1, 1:-1]
    torch.testing.assert_close(inside, inside[..., :1, :1].expand_as(inside))


@impls
def test_path_length_penalty(impl):
    """StyleGAN 2's regularisation differentiates a gradient with respect to w; equal to the reference in float64."""

    def penalty(impl):
        torch.manual_seed(0)
        blocks = StyleBlocks(*[StyleBlock(3, 3, 3, 4, upsample=u, impl=impl) for u in (1, 2)]).double()
        for block in blocks.blocks:
            torch.nn.init.constant_(block.noise.strength, 0.5)
        x, w = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 4).double().requires_grad_()
        y = blocks(x, w, [torch.randn(1, 1, s, s).double() for s in (4, 8)])
        direction = torch.randn_like(y) / math.sqrt(y.shape[2] * y.shape[3])
        (grad,) = torch.autograd.grad((y * direction).sum(), w, create_graph=True)
        loss = (grad.square().sum(1).sqrt() - 1).square().mean()
        return [loss, *torch.autograd.grad(loss, list(blocks.parameters()), materialize_grads=True)]

    close(penalty(impl), penalty("reference"))


def test_mapping_network():
    mapping = MappingNetwork()
    assert sum(p.numel() for p in mapping.parameters()) == 2_101_248
    z = 3 * torch.randn(256, 512)
    w = mapping(z)
    torch.testing.assert_close(mapping(7 * z), w, rtol=1e-4, atol=1e-4)  # only the direction counts
    assert 0.5 < w.square().mean().item() < 2  # the gains keep the variance
    torch.testing.assert_close(pixel_norm(z).square().mean(1), torch.ones(256))
    small = MappingNetwork(4, 3, layers=2, hidden_dim=8, lr_multiplier=0.1)
    by_hand = pixel_norm(z[:, :4])
    for layer in small.layers:
        weight = layer.weight * math.sqrt(2) * 0.1 / math.sqrt(layer.in_features)
        by_hand = F.leaky_relu(F.linear(by_hand, weight, 0.1 * layer.bias), 0.2)
    torch.testing.assert_close(small(z[:, :4]), by_hand)


def test_mean_of_styles():
    mapping = MappingNetwork(4, 3, layers=2)
    w = mapping(torch.randn(16, 4))
    torch.testing.assert_close(mapping.w_avg, 0.005 * w.detach().mean(0))
    before = mapping.w_avg.clone()
    mapping.eval()(torch.randn(16, 4))
    assert torch.equal(mapping.w_avg, before)
    assert "w_avg" in mapping.state_dict()
    torch.testing.assert_close(truncate(w, before, 0.0), before.expand_as(w))
    assert torch.equal(truncate(w, before, 1.0), w)
    of_layers = w[:, None].expand(-1, 10, -1)
    truncated = truncate(of_layers, before, 0.7)
    torch.testing.assert_close(truncated[:, :8], (before + 0.7 * (of_layers - before))[:, :8])
    assert torch.equal(truncated[:, 8:], of_layers[:, 8:])
    with pytest.raises(ValueError, match="expected w"):
        truncate(w, before[:2])


def test_style_mixing():
    w1, w2 = torch.zeros(2, 4, 3), torch.ones(2, 4, 3)
    assert style_mixing(w1, w2, 1)[:, :, 0].tolist() == [[0, 1, 1, 1]] * 2
    assert style_mixing(w1, w2, torch.tensor([0, 3]))[:, :, 0].tolist() == [[1, 1, 1, 1], [0, 0, 0, 1]]
    with pytest.raises(ValueError, match=r"must both be \(N, L, D\)"):
        style_mixing(w1[0], w2[0], 1)
    with pytest.raises(ValueError, match="cut must be"):
        style_mixing(w1, w2, torch.tensor([0, 3, 1]))


def test_equalized():
    torch.manual_seed(0)
    linear = EqualizedLinear(400, 300, lr_multiplier=0.01, bias_init=2.0)
    x = torch.randn(500, 400)
    y = linear(x)
    assert abs(linear.weight.std().item() - 100) < 1
    assert abs(y.mean().item() - 2) < 0.05 and abs(y.std().item() - math.sqrt(2)) < 0.05
    conv = EqualizedConv2d(30, 20, 3, stride=2, padding=1, gain=1.0)
    expected = F.conv2d(torch.ones(1, 30, 5, 5), conv.weight / math.sqrt(270), conv.bias, stride=2, padding=1)
    torch.testing.assert_close(conv(torch.ones(1, 30, 5, 5)), expected)
    with pytest.raises(ValueError, match="lr_multiplier must be positive"):
        EqualizedLinear(2, 2, lr_multiplier=0.0)


@impls
def test_modulated_modules(impl):
    x, w = torch.randn(2, 4, 5, 6), torch.randn(2, 3)
    layer = ModulatedConv2d(4, 6, 3, 3, demodulate=False, upsample=2, impl=impl)
    styles = F.linear(w, layer.affine.weight / math.sqrt(3), layer.affine.bias)
    expected = modulated_conv2d(x, layer.weight / 6, styles, demodulate=False, upsample=2, impl="reference")
    torch.testing.assert_close(layer(x, w), expected, rtol=1e-4, atol=1e-5)
    assert layer(x, w).shape == (2, 6, 10, 12)
    spatial = SpatiallyModulatedConv2d(4, 6, 3, 3, padding_mode="circular", impl=impl)
    w_map = torch.randn(2, 3, 5, 6)
    styles = F.conv2d(w_map, spatial.affine.weight / math.sqrt(3), spatial.affine.bias)
    options = {"padding_mode": "circular", "impl": "reference"}
    expected = spatially_modulated_conv2d(x, spatial.weight / 6, styles, **options)
    torch.testing.assert_close(spatial(x, w_map), expected, rtol=1e-4, atol=1e-5)
    assert styles.mean() > 0.5  # styles start around 1


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: ModulatedConv2d(4, 0, 3, 3), "out_channels must be positive"),
        (lambda: ModulatedConv2d(4, 4, 3, 3, upsample=4), "upsample must be one of"),
        (lambda: ModulatedConv2d(4, 4, 3, 3, padding="full"), "padding must be one of"),
        (lambda: ModulatedConv2d(4, 4, 3, 3, impl="c"), "impl must be one of"),
        (lambda: StyleBlocks(), "at least one"),
        (lambda: StyleBlocks(StyleBlock(2, 3, 3, 4), StyleBlock(2, 3, 3, 4)), "a block of 2 channels follows"),
        (lambda: StyleBlocks(StyleBlock(2, 2, 3, 4), StyleBlock(2, 3, 3, 5)), "blocks of different style_dim"),
        (lambda: StyleBlock(2, 3, 3, 4)(torch.randn(1, 2, 4, 4), torch.randn(2, 4)), r"w must have shape \(1, 4\)"),
        (lambda: StyleLayer(2, 3, 3, 4)(torch.randn(1, 2, 4, 4), torch.randn(1, 5)), r"w must have shape \(1, 4\)"),
        (lambda: StyleBlock(2, 3, 3, 4, noise=False)(*[torch.ones(1, 2, 4, 4)], torch.ones(1, 4), 1), "without noise"),
        (lambda: StyleBlock(2, 3, 3, 4)(torch.randn(1, 5, 4, 4), torch.randn(1, 4)), "expected input of 2 channels"),
        (lambda: StyleLayer(2, 3, 3, 4)(torch.randn(2, 4, 4), torch.randn(1, 4)), "expected 4D input"),
        (lambda: truncate(torch.ones(1, 4), torch.ones(4), layers=-1), "layers must not be negative"),
        (lambda: NoiseInjection(0), "num_features must be positive"),
        (lambda: MappingNetwork(layers=0), "layers must be positive"),
        (lambda: MappingNetwork(4, 4)(torch.randn(2, 3)), r"z must have shape \(N, 4\)"),
    ],
)
def test_errors_of_modules(build, words):
    with pytest.raises(ValueError, match=words):
        build()


@kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_autocast(impl, dtype):
    """As with PyTorch's layers, convolutions and linear layers run in half precision; the rest follows."""
    x, w = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(2, 5)
    w_map = torch.randn(2, 5, 6, 6)
    for layer in (
        StyleBlock(4, 6, 3, 5, impl=impl),
        StyleLayer(4, 6, 3, 5, impl=impl),
        ModulatedConv2d(4, 6, 3, 5, impl=impl),
        SpatiallyModulatedConv2d(4, 6, 3, 5, impl=impl),
        StyleBlocks(StyleBlock(4, 6, 3, 5, impl=impl), StyleBlock(6, 6, 3, 5, upsample=2, impl=impl)),
    ):
        given = (x, w_map if isinstance(layer, SpatiallyModulatedConv2d) else w)
        with torch.autocast(DEVICE.type, dtype):
            y = layer(*given)
        assert y.dtype == dtype
        y.float().square().sum().backward()
        torch.testing.assert_close(y.float(), layer(*given), rtol=0.1, atol=0.15)
        assert all(p.grad is not None and p.grad.dtype == p.dtype for p in layer.parameters())


@pytest.mark.parametrize(
    "build",
    [
        lambda **where: StyleBlock(4, 6, 3, 5, **where),
        lambda **where: StyleLayer(4, 6, 3, 5, **where),
        lambda **where: SpatiallyModulatedConv2d(4, 6, 3, 5, **where),
        lambda **where: MappingNetwork(4, 6, layers=2, **where),
    ],
)
def test_materialised_from_the_meta_device(build):
    """As FSDP does: to_empty, then reset_parameters of all modules that have some."""
    layer = build(device="meta").to_empty(device=DEVICE)
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(t.isfinite().all() for t in layer.state_dict().values())
    zero = {name for name, t in layer.state_dict().items() if not t.any()}
    assert zero == {name for name, t in build().state_dict().items() if not t.any()}


def test_names_are_exported():
    assert pixnorm.nn.StyleBlock is StyleBlock and pixnorm.functional.style_epilogue is style_epilogue
