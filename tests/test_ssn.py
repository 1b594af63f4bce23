"""Spatially stochastic networks: the function against plain PyTorch, blocks, distortion, path lengths by hand."""

import pytest
import torch
import torch.nn.functional as tF
from test_style_network import close, nearest, plain_blur

from pixnorm.networks import (
    SSNGenerator,
    StyleGAN2,
    distortion_loss,
    path_length_regularizer,
    path_lengths,
    resample_blocks,
)
from pixnorm.networks.ssn import INTERPOLATIONS, SpatialStyleBlock, interpolate_cells
from pixnorm.networks.style2 import ToRGB
from pixnorm.nn import StyleBlock
from pixnorm.ops.common import HALF
from pixnorm.testing import DENSE_LAYOUTS, LAYOUTS

pytestmark = [pytest.mark.usefixtures("one_thread")]
impls = pytest.mark.parametrize("impl", ["reference", "auto"])
interpolations = pytest.mark.parametrize("interpolation", INTERPOLATIONS)
grids = pytest.mark.parametrize("grid", [4, 8])
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
SMALL = {"latent_dim": 6, "style_dim": 5, "mapping_layers": 2, "channels_base": 64, "channels_max": 8}


def generator(resolution=8, **options):
    """In float64, with noise that matters and biases."""
    torch.manual_seed(0)
    network = SSNGenerator(resolution, **(SMALL | options)).double()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(("strength", "bias")):
                parameter.add_(torch.randn_like(parameter))
    return network


def latents(n=2, grid=4, dim=6):
    return torch.randn(n, dim, grid, grid, dtype=torch.float64)


# ---- the function


@pytest.mark.parametrize("resolution", [16, 256])
def test_as_many_parameters_as_stylegan_2(resolution):
    with torch.device("meta"):
        counts = [sum(p.numel() for p in kind(resolution).parameters()) for kind in (SSNGenerator, StyleGAN2)]
    assert counts[0] == counts[1]


def plain_cells(w, size, mode):
    """Styles at a resolution: interpolated, or means of cells."""
    if w.shape[2] > size:
        return tF.avg_pool2d(w, w.shape[2] // size)
    return tF.interpolate(w, size, mode=mode, **({"align_corners": False} if mode == "bilinear" else {}))


def plain_affine(conv, w):
    """At each pixel, after the interpolation."""
    return tF.conv2d(w, conv.affine.weight / 5**0.5, conv.affine.bias)


def plain_layer(layer, x, w, noise, large):
    conv = layer.conv
    s = plain_affine(conv, plain_cells(w, x.shape[2], layer.interpolation))
    weight = conv.weight / conv.weight[0].numel() ** 0.5
    scaled, squares = s * x, s**2
    if large:
        scaled, squares = nearest(scaled), nearest(squares)
    variance = tF.conv2d(squares, weight**2, padding=1).mean((2, 3), keepdim=True)
    y = tF.conv2d(scaled, weight, padding=1) / (variance + 1e-8).sqrt()
    y = plain_blur(y) if large else y
    return tF.leaky_relu(y + layer.noise.strength * noise + layer.bias[:, None, None], 0.2) * 2**0.5


def plain_generator(g, z):
    x = z / (z.square().mean(1, keepdim=True) + 1e-8).sqrt()
    for layer in g.mapping.layers:  # 1x1 convolutions
        weight = layer.weight[..., None, None] * (2**0.5 * 0.01 / layer.weight.shape[1] ** 0.5)
        x = tF.leaky_relu(tF.conv2d(x, weight, layer.bias * 0.01), 0.2)
    w, images = x, None
    x = g.constant.expand(len(z), -1, -1, -1)
    for i, layer in enumerate(g.layers):
        x = plain_layer(layer, x, w, getattr(g, f"noise{i}"), large=i % 2 == 1)
        if i % 2 == 0:
            to_rgb = g.to_rgb[i // 2]
            s = plain_affine(to_rgb.conv, plain_cells(w, x.shape[2], g.interpolation))
            weight = to_rgb.conv.weight / to_rgb.conv.weight.shape[1] ** 0.5
            colours = tF.conv2d(s * x, weight, to_rgb.bias)
            images = colours if images is None else plain_blur(nearest(images)) + colours
    return images


@impls
@interpolations
@grids
@pytest.mark.parametrize("n", [1, 3])
def test_generator_in_plain_pytorch(impl, interpolation, grid, n):
    g = generator(16, grid=grid, interpolation=interpolation, noise="const", impl=impl)
    z = latents(n, grid)
    expected = plain_generator(g, z)
    assert expected.std() > 0.1
    close(g(z), expected)


@grids
def test_native_as_the_reference(grid):
    """Images and all gradients, those of gradients, too; same weights from the same seed."""
    found = {}
    for impl in ("reference", "auto"):
        g = generator(grid=grid, impl=impl)
        torch.manual_seed(1)
        z = latents(grid=grid).requires_grad_()
        images, w = g(z, return_w=True)
        loss = images.square().sum() + (path_lengths(images, w) - 1).square().sum()
        found[impl] = {"images": images, "z": torch.autograd.grad(loss, z, retain_graph=True)[0]}
        loss.backward()
        found[impl] |= {name: p.grad for name, p in g.named_parameters()}
    for name, expected in found["reference"].items():
        assert expected is not None, name
        torch.testing.assert_close(found["auto"][name], expected, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")


@impls
@interpolations
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("cells, size", [((4, 4), (16, 16)), ((4, 4), (4, 4)), ((8, 4), (4, 2)), ((2, 4), (2, 8))])
def test_interpolation(impl, interpolation, layout, cells, size):
    x = LAYOUTS[layout](torch.randn(2, 5, *cells, dtype=torch.float64)).requires_grad_()
    y = interpolate_cells(x, size, interpolation, impl)
    fewer = size[0] < cells[0]
    expected = tF.avg_pool2d(x, 2) if fewer else tF.interpolate(x, size, mode=interpolation)
    close(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")
    grad = torch.randn_like(expected)
    close(torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(expected, x, grad)[0])


@impls
@interpolations
@pytest.mark.parametrize("upsample", [1, 2])
def test_a_constant_grid_is_a_style(impl, interpolation, upsample):
    """But for σ: taps that see zeros lower it, and by how much depends on the kernels alone. Without noise and bias all
    pixels have the ratio of both σ; of equal kernels it is 1 / (1 - 2/(3 n)) for n x n outputs."""
    torch.manual_seed(0)
    n, options = 8 // upsample, {"upsample": upsample, "impl": impl}
    spatial = SpatialStyleBlock(4, 6, 5, interpolation=interpolation, **options).double()
    block = StyleBlock(4, 6, 3, 5, **options).double()
    state = block.state_dict()
    state["conv.affine.weight"] = state["conv.affine.weight"][..., None, None]
    spatial.load_state_dict(state)
    x, w = torch.randn(2, 4, n, n, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    grid = w[..., None, None].expand(-1, -1, 4, 4)
    ratio = spatial(x, grid) / block(x, w)
    close(ratio, ratio[:, :, :1, :1].expand_as(ratio))
    inside = 1 - torch.tensor([1.0, 0.0, 1.0], dtype=x.dtype) / 8
    squares = block.conv.styles(w).square()
    variances = [
        torch.einsum("ni,oiab,ab->no", squares, block.conv.weight**2, share)
        for share in (torch.ones(3, 3).double(), inside[:, None] * inside)
    ]
    torch.testing.assert_close(ratio[:, :, 0, 0], (variances[0] / variances[1]).sqrt(), rtol=1e-6, atol=0)  # eps
    with torch.no_grad():
        for layer in (spatial, block):
            layer.conv.weight.fill_(1.0)
    ratio = spatial(x, grid) / block(x, w)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1 / (1 - 2 / (3 * 8))), rtol=1e-6, atol=0)


def test_a_constant_grid_gives_what_cells_do():
    """However fine the grid and whatever the interpolation."""
    z = latents(grid=1)
    images = [
        generator(16, grid=grid, interpolation=interpolation, noise="const")(z.expand(-1, -1, grid, grid))
        for grid in (1, 4, 16)
        for interpolation in INTERPOLATIONS
    ]
    for other in images[1:]:
        close(other, images[0])


# ---- styles


def test_psi():
    g = generator(noise="const")
    g(latents(8))
    g.eval()
    z = latents()
    w = g.styles(z)
    close(g(z), g(w=w))
    close(g(z, psi=1.0), g(w=w))
    close(g(z, psi=0.0), g(w=g.mapping.w_avg[:, None, None].expand_as(w)))
    close(g(z, psi=0.5), g(w=w.lerp(g.mapping.w_avg[:, None, None].expand_as(w), 0.5)))


def test_cells_are_mapped_by_themselves():
    g = generator().eval()
    z = latents()
    w = g.styles(z)
    for row, column in ((0, 0), (1, 3)):
        close(w[:, :, row, column], g.mapping(z[:, :, row, column]))


# ---- blocks


def test_resampled_cells():
    z = latents(3)
    mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    mask[0, 1, 2] = mask[2, 3] = True
    drawn = resample_blocks(z, mask)
    assert torch.equal((drawn != z).all(1), mask) and torch.equal((drawn != z).any(1), mask)
    g = generator().eval()
    assert torch.equal((g.styles(drawn) - g.styles(z)).abs().amax(1) > 1e-9, mask)
    of_all = resample_blocks(z, mask[:1])
    assert torch.equal((of_all != z).any(1), mask[:1].expand(3, -1, -1))
    again = [resample_blocks(z, mask, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*again) and not torch.equal(again[0], drawn)
    assert torch.equal(resample_blocks(z, torch.zeros_like(mask)), z)
    assert abs(resample_blocks(torch.zeros(1, 512, 4, 4), torch.ones(1, 4, 4).bool()).std().item() - 1) < 0.05


def test_cells_are_drawn_for_any_batch():
    """Compiled with a symbol for the number of samples."""
    torch.compiler.reset()
    compiled = torch.compile(resample_blocks, fullgraph=True, dynamic=True, backend="eager")
    mask = torch.eye(4, dtype=torch.bool)[None]
    for n in (4, 3):
        z, found = latents(n), []
        for draw in (compiled, resample_blocks):
            torch.manual_seed(1)
            found.append(draw(z, mask))
        close(*found)


def test_distortion_by_hand():
    """Two blocks per side, of two pixels; the difference is 1, 2, 3, 4 in the blocks."""
    change = nearest(torch.tensor([[[[1.0, 2.0], [3.0, -4.0]]]], dtype=torch.float64))
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    mask = torch.zeros(2, 2, 2, dtype=torch.bool)
    mask[0, 1, 1] = True  # of the first sample: the mean of 1, 2, 3
    mask[1, 0] = True  # of the second: of 3 and 4
    close(distortion_loss(images, images + change, mask), torch.tensor(100 * (2 + 3.5) / 2).double())
    close(distortion_loss(images, images + change, mask[:1], weight=1.0), torch.tensor(2.0).double())
    everything = torch.ones(1, 2, 2, dtype=torch.bool)
    assert distortion_loss(images, images + change, everything) == 0
    inside = images + change * mask[:1].double().repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    assert distortion_loss(images, inside, mask[:1]) == 0


@pytest.mark.parametrize("dtype", HALF)
def test_distortion_in_half_precision(dtype):
    """256x256 pixels are more than float16 can count."""
    images, mask = torch.full((2, 3, 256, 256), 0.3, dtype=dtype), torch.zeros(1, 3, 3, dtype=torch.bool)
    images, mask = images[..., :255, :255].requires_grad_(), mask.index_fill(1, torch.tensor([1]), True)
    loss = distortion_loss(images, -images.detach(), mask, weight=1.0)
    torch.testing.assert_close(loss, 2 * images[0, 0, 0, 0].float())
    (grad,) = torch.autograd.grad(loss * 2**16, images)
    assert grad.isfinite().all() and (grad[:, :, 0] > 0).all() and (grad[:, :, 100] == 0).all()


def test_gradient_of_the_distortion():
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    resampled = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 4, 4) < 0.5
    (grad,) = torch.autograd.grad(distortion_loss(images, resampled, mask), resampled)
    kept = (~mask)[:, None].repeat_interleave(2, 2).repeat_interleave(2, 3).double()
    pixels = kept.sum((1, 2, 3), keepdim=True) * 3
    close(grad, 100 * (resampled - images).sign() * kept / pixels / 2)


# ---- eq. 15


@pytest.mark.parametrize("near, far", [(1.0, 0.1), (1.0, 1.0), (0.5, 0.0)])
def test_path_lengths_by_hand(near, far):
    """Images that are linear in z, 2x2 cells of a number each, images of 4x4: gradients are entries of the map."""
    z = torch.randn(3, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    a = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    images = (z.flatten(1) @ a).view(3, 1, 4, 4)
    penalty, lengths = path_length_regularizer(images, z, 0.5, near=near, far=far, noise=noise)
    block = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3])  # of each pixel
    gamma = torch.where(block == torch.arange(4)[:, None], near, far).double()
    expected = torch.einsum("cp,np->nc", gamma * a, noise.flatten(1)).norm(dim=1) / 4
    close(lengths, expected)
    close(penalty, (expected - 0.5).square().mean())
    (found,) = torch.autograd.grad(penalty, a)
    close(found, torch.autograd.grad((expected - 0.5).square().mean(), a)[0])
    if near == far:
        close(lengths, path_lengths(images, z, noise))


@impls
def test_path_regularisation_of_the_network(impl):
    """Equal weights scale StyleGAN 2's lengths; the penalty reaches all parameters but the last biases."""
    g = generator(impl=impl)
    z = latents().requires_grad_()
    images = g(z, noise="const")
    noise = torch.randn_like(images)
    _, lengths = path_length_regularizer(images, z, 0.0, near=0.3, far=0.3, noise=noise)
    close(lengths, 0.3 * path_lengths(images, z, noise))
    penalty, _ = path_length_regularizer(images, z, torch.tensor(0.5).double(), noise=noise)
    penalty.backward()
    without = {name for name, p in g.named_parameters() if p.grad is None}
    assert without == {f"to_rgb.{i}.bias" for i in range(2)}


# ---- setups


@impls
def test_empty_batch(impl):
    assert generator(impl=impl)(latents(0)).shape == (0, 3, 8, 8)


def test_channels_last():
    g = generator(16).eval()
    z = latents()
    images = g(z, noise="const")
    close(g.to(memory_format=torch.channels_last)(z, noise="const"), images)


def test_images_have_the_parameters_dtype():
    g = generator().float()
    with torch.autocast("cpu", torch.bfloat16):
        images = g(latents().float())
    assert images.dtype == torch.float32 and images.isfinite().all()
    assert g.bfloat16()(latents().bfloat16()).dtype == torch.bfloat16


def test_layers_are_leaves_of_fx():
    """A graph of them is their function at other sizes, too."""

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            g = generator()
            self.layer, self.to_rgb, self.plain = g.layers[1], g.to_rgb[1], ToRGB(8, 3, 5).double()

        def forward(self, x, w, noise):
            x = self.layer(x, w, noise)
            return self.to_rgb(x, w) + self.plain(x, w.mean((2, 3)))

    network = Both()
    traced = torch.fx.symbolic_trace(network)
    for size in (4, 8):
        x, noise = torch.randn(2, 8, size, size).double(), torch.randn(2, 1, 2 * size, 2 * size).double()
        w = latents(dim=5)
        close(traced(x, w, noise), network(x, w, noise))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda g: SSNGenerator(8, grid=3), "grid must be a power of 2 up to the resolution, 8, got 3"),
        (lambda g: SSNGenerator(8, grid=16), "grid must be a power of 2 up to the resolution, 8, got 16"),
        (lambda g: SSNGenerator(8, interpolation="cubic"), "interpolation must be one of 'bilinear', 'nearest'"),
        (lambda g: SSNGenerator(10), "resolution must be a power of 2"),
        (lambda g: g(), "expected either z or w, got neither"),
        (lambda g: g(latents(), w=latents(dim=5)), "expected either z or w, got both"),
        (lambda g: g(latents(grid=8)), r"z must have shape \(N, 6, 4, 4\), got \(2, 6, 8, 8\)"),
        (lambda g: g(w=latents()), r"w must have shape \(N, 5, 4, 4\), got \(2, 6, 4, 4\)"),
        (lambda g: g(w=latents(dim=5), psi=0.5), "psi is for styles of z"),
        (lambda g: g(latents(), noise=[None]), "expected noise for 3 layers, got 1"),
    ],
)
def test_errors_change_nothing(call, words):
    g = generator()
    before = g.mapping.w_avg.clone()
    with pytest.raises(ValueError, match=words):
        call(g)
    assert torch.equal(g.mapping.w_avg, before)


MASK = torch.zeros(2, 4, 4, dtype=torch.bool)
IMAGES = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: resample_blocks(latents()[0], MASK), r"z must have shape \(N, latent_dim, h, w\), got \(6, 4, 4\)"),
        (lambda: resample_blocks(latents(), MASK.int()), r"mask must be bool.*got \(2, 4, 4\) of torch.int32"),
        (lambda: resample_blocks(latents(3), MASK), r"mask must be bool of shape \(3, h, w\) or \(1, h, w\)"),
        (lambda: resample_blocks(latents(grid=8), MASK), r"mask must have shape \(2, 8, 8\) for z of shape"),
        (lambda: distortion_loss(IMAGES[0], IMAGES[0], MASK), r"images must have shape \(N, C, H, W\)"),
        (lambda: distortion_loss(IMAGES, IMAGES[:1], MASK), r"resampled must have shape \(2, 3, 8, 8\) for images"),
        (lambda: distortion_loss(IMAGES, IMAGES, MASK[:, :3]), r"mask \(2, 3, 4\) does not divide images"),
        (lambda: path_length_regularizer(IMAGES, MASK.float(), 1.0), r"z must have shape.*got \(2, 4, 4\)"),
        (lambda: path_length_regularizer(IMAGES, latents(grid=3), 1.0), r"sizes that divide.*got \(2, 6, 3, 3\)"),
    ],
)
def test_errors_of_blocks(call, words):
    with pytest.raises(ValueError, match=words):
        call()
