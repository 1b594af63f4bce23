"""SPADE's maps from the distinct neighbourhoods of a label map: equal to two convolutions of its one-hot map."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import pixnorm
from pixnorm.nn import _label_patches
from pixnorm.nn._label_patches import LabelPatches

pytestmark = [pytest.mark.usefixtures("one_thread")]
HIDDEN, C = 6, 3


def segments(shape, classes, cell, seed=0):
    """Cells of one label each, of that height and width."""
    generator = torch.Generator().manual_seed(seed)
    n, h, w = shape
    cells = torch.randint(classes, (n, -(-h // cell[0]), -(-w // cell[1])), generator=generator)
    return cells.repeat_interleave(cell[0], 1).repeat_interleave(cell[1], 2)[:, :h, :w]


MAPS = {
    "segments": (segments((2, 40, 48), 5, (9, 7)), 5),
    "rows": (segments((1, 40, 40), 4, (10, 40)), 4),
    "uniform": (torch.full((2, 20, 24), 2), 3),
    "one label": (torch.zeros((1, 20, 24), dtype=torch.int64), 1),
    "flat": (segments((2, 8, 200), 3, (8, 50)), 3),
    # Too many labels for 9 of them in one int64.
    "many labels": (segments((1, 60, 60), 200, (15, 15)), 200),
    "transposed": (segments((2, 40, 48), 5, (9, 7)).transpose(1, 2), 5),
}
maps = pytest.mark.parametrize("which", MAPS)


def neighbours(numbers, outside, size=3):
    """The numbers around each pixel (N, H, W, size²)."""
    padded = F.pad(numbers, (size // 2,) * 4, value=outside)
    return padded.unfold(1, size, 1).unfold(2, size, 1).flatten(3)


@maps
def test_patches_are_those_of_the_map(which):
    labels, classes = MAPS[which]
    found = LabelPatches.of(labels, classes)
    patches, neighbourhoods, index = found.patches, found.neighbourhoods, found.index
    around = patches[neighbourhoods[index].clamp(max=len(patches) - 1)]  # (N, H, W, 9, 9)
    inside = neighbourhoods[index] < len(patches)
    assert torch.equal(inside, neighbours(torch.ones_like(labels), 0) > 0)
    expected = neighbours(labels, classes, 5).unflatten(3, (5, 5)).unfold(3, 3, 1).unfold(4, 3, 1).reshape(around.shape)
    assert torch.equal(around[inside], expected[inside])
    assert torch.equal(patches[:classes], torch.arange(classes)[:, None].expand(-1, 9))
    assert len(torch.unique(patches, dim=0)) == len(patches)
    # As many as there are; those of one label in each stretch of pixels.
    uniform = (neighbourhoods < classes).all(1) & (neighbourhoods == neighbourhoods[:, :1]).all(1)
    distinct = torch.unique(neighbours(labels, classes, 5).flatten(0, 2), dim=0)
    assert (~uniform).sum() == ((distinct != distinct[:, :1]).any(1)).sum()
    assert torch.equal(torch.unique(index), torch.arange(len(neighbourhoods)))
    for row in uniform.nonzero()[:, 0]:
        pixels = (index.flatten() == row).nonzero()
        assert len(torch.unique(pixels // _label_patches.STRETCH)) == 1


def test_large_maps(monkeypatch):
    """Numbers of more patches than fit in an int64 together are replaced by their ranks: once, twice, or given up."""
    labels, classes = segments((1, 64, 64), 5, (6, 6)), 5
    expected = LabelPatches.of(labels, classes)
    rows = (len(expected.patches) + 1) ** 3
    for limit in (rows**3, rows**2, rows + 1):
        monkeypatch.setattr(_label_patches, "LIMIT", limit)
        for actual, wanted in zip(_rows(LabelPatches.of(labels, classes)), _rows(expected), strict=True):
            assert torch.equal(actual, wanted)
    monkeypatch.setattr(_label_patches, "LIMIT", rows)
    assert not LabelPatches.of(labels, classes)


def _rows(found):
    """The patches around each pixel, whatever their order."""
    around = found.patches[found.neighbourhoods.clamp(max=len(found.patches) - 1)][found.index]
    return around, len(found.patches) == found.neighbourhoods[found.index]


def layers(classes):
    torch.manual_seed(0)
    layer = pixnorm.SPADE2d(C, classes, HIDDEN, impl="auto").double()
    plain = pixnorm.SPADE2d(C, classes, HIDDEN, impl="reference").double()
    plain.load_state_dict(layer.state_dict())
    return layer, plain


@maps
def test_layers_agree(which):
    """Output, gradients, and gradients of these, against PyTorch's convolutions of the one-hot map."""
    labels, classes = MAPS[which]
    shape = labels.shape[0], C, *labels.shape[1:]
    x, direction = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    found = []
    for layer in layers(classes):
        parameters, given = list(layer.parameters()), x.clone().requires_grad_()
        y = layer(given, labels)
        grads = torch.autograd.grad((y * direction).sum(), [given, *parameters], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), [given, *parameters])
        found.append([y, *grads, *second])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize("kernel_size", [1, 5])
def test_other_kernels_are_convolutions(kernel_size):
    labels, classes = MAPS["segments"]
    assert LabelPatches.of(labels, classes)
    layer = pixnorm.SPADE2d(C, classes, HIDDEN, kernel_size, dtype=torch.float64)
    x, one_hot = torch.randn(2, C, *labels.shape[1:]).double(), F.one_hot(labels, classes).movedim(3, 1).double()
    torch.testing.assert_close(layer(x, labels), layer(x, one_hot))


def test_gradients_in_float32():
    """A label on most pixels, and gradients of one sign: sums of many numbers, whose errors would add up."""
    labels = torch.zeros((4, 128, 128), dtype=torch.int64)
    labels[:, 40:60, 30:90] = 1
    errors = []
    grad = torch.rand((4, C, 128, 128), generator=torch.Generator().manual_seed(0))
    for impl in ("auto", "reference"):
        torch.manual_seed(0)
        layer = pixnorm.SPADE2d(C, 2, HIDDEN, impl=impl)
        exact = pixnorm.SPADE2d(C, 2, HIDDEN, impl="reference").double()
        exact.load_state_dict(layer.state_dict())
        found = [
            torch.autograd.grad(each._maps(grad.to(each.weight.dtype), labels, None), list(each.parameters()), [g, g])
            for each, g in ((layer, grad), (exact, grad.double()))
        ]
        errors.append([((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*found, strict=True)])
    for actual, eager in zip(*errors, strict=True):
        assert actual <= min(2 * eager, 8 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_no_convolutions(layout, upsample, monkeypatch):
    """Where there are few neighbourhoods the convolutions do not run; given ones are the same as found ones."""
    labels, classes = MAPS["segments"]
    layer = layers(classes)[0].eval()
    layer.upsample = upsample
    x = torch.randn(2, C, 40 // upsample, 48 // upsample, dtype=torch.float64).contiguous(memory_format=layout)
    expected = F.interpolate(x, scale_factor=upsample) / (1 + layer.eps) ** 0.5  # statistics at first: 0 and 1
    hidden = F.conv2d(F.one_hot(labels).movedim(3, 1).double(), layer.shared_weight, layer.shared_bias, padding=1)
    gamma, beta = F.conv2d(F.relu(hidden), layer.weight, layer.bias, padding=1).chunk(2, 1)
    monkeypatch.setattr(F, "conv2d", None)
    y = layer(x, labels)
    torch.testing.assert_close(y, (1 + gamma) * expected + beta)
    assert y.is_contiguous(memory_format=layout)
    assert torch.equal(layer(x, labels, LabelPatches.of(labels, classes)), y)


def test_where_convolutions_are_used():
    noise = torch.randint(5, (2, 32, 32), generator=torch.Generator().manual_seed(0))
    assert not LabelPatches.of(noise, 5)  # nearly every patch is different
    # Few pixels with uniform patches are not enough, if the others all differ.
    some = torch.cat([noise[:, :, :16], torch.zeros_like(noise)], 2)
    places = (neighbours(some, 5) != some[..., None]).any(3).double().mean()
    assert places < _label_patches.MOST_PLACES and not LabelPatches.of(some, 5)
    labels, classes = MAPS["segments"]
    assert LabelPatches.of(labels, classes)
    # A row is computed for each label, too, whether it occurs or not.
    assert not LabelPatches.of(labels, int(_label_patches.MOST_PATCHES * labels.numel()))
    assert not LabelPatches.of(labels, classes, "reference")
    assert not LabelPatches.of(F.one_hot(labels, classes).movedim(3, 1).float(), classes)
    assert not LabelPatches.of(labels[:0], classes)
    assert torch.func.vmap(lambda _: torch.tensor(not LabelPatches.of(labels, classes)))(torch.ones(1)).all()


def test_compiled_layers_are_one_graph():
    """The number of neighbourhoods depends on the data, so there the convolutions run."""
    labels, classes = MAPS["segments"]
    layer, plain = layers(classes)
    x = torch.randn(2, C, 40, 48, dtype=torch.float64)
    actual = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, labels)
    torch.testing.assert_close(actual, plain(x, labels))


def test_checkpointing_and_autocast():
    labels, classes = MAPS["segments"]
    layer, plain = layers(classes)
    x = torch.randn(2, C, 40, 48, dtype=torch.float64)
    grads = [
        torch.autograd.grad(run(x, labels).square().sum(), list(of.parameters()))
        for of, run in ((layer, lambda *args: checkpoint(layer, *args, use_reentrant=False)), (plain, plain))
    ]
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected)
    exact = plain(x, labels)
    results = []
    for each in (layer, plain):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(each.float()(x.bfloat16(), labels))
    assert results[0].dtype == results[1].dtype == torch.bfloat16
    errors = [(y.double() - exact).abs().max().item() for y in results]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize(
    "rows, more, given", [(39, 0, r"5 labels in a map of shape \(2, 39, 48\)"), (40, 1, "6 labels in a map")]
)
def test_patches_of_another_map(rows, more, given):
    labels, classes = MAPS["segments"]
    layer, x = layers(classes)[0], torch.ones(2, C, 40, 48, dtype=torch.float64)
    patches = LabelPatches.of(labels[:, :rows], classes + more)
    with pytest.raises(ValueError, match=rf"of {given}.*, for 5 in one of shape \(2, 40, 48\)"):
        layer(x, labels, patches)
    assert layer.num_batches_tracked == 0
