"""Conditional SPN and conditional convolution: the identities of the paper's section 3.2, and the modules."""

import copy

import pytest
import torch
import torch.nn.functional as tF
from hypothesis import given, settings
from hypothesis import strategies as st

import pixnorm
from pixnorm import functional as F
from pixnorm.nn import self_latent_mask
from pixnorm.nn.spn import KERNELS
from pixnorm.testing import CONDITIONAL_SPN, random

SPECS = (CONDITIONAL_SPN,)
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:pixnorm.*runs on the reference"),
]

# Two ways to compute the same in float64 differ by rounding: some 1e-15 per operation, sums of some hundred terms.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
sizes = {
    "n": st.integers(1, 5),
    "c": st.integers(1, 5),
    "h": st.integers(2, 6),
    "w": st.integers(2, 6),
    "k": st.sampled_from([1, 3, 5]),
    "classes": st.integers(1, 4),
    "seed": st.integers(0, 99),
}
few = settings(max_examples=12)


def make(impl, c, classes=3, latent_dim=0, **options):
    """A layer in float64 with no tensor at its initial value, so that swapped tensors are detected."""
    layer = pixnorm.ConditionalSPN2d(c, classes, latent_dim, impl=impl, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def draw(seed, n, c, h, w, classes, latent_dim=2):
    generator = torch.Generator().manual_seed(seed)
    x, z = 2 * random((n, c, h, w), generator) + 1, random((n, latent_dim), generator)
    y = torch.randint(classes, (n,), generator=generator, device="cpu").to(x.device)
    return x, y, z


def plain_of(layer, chosen):
    """SPN2d with the parameters of one class."""
    options = {"kernel_size": layer.kernel_size, "impl": layer.impl, "dtype": torch.float64}
    plain = pixnorm.SPN2d(layer.num_features, **options)
    with torch.no_grad():
        plain.mask_projection.copy_(layer.mask_projection)
        plain.mask_weight.copy_(layer.mask_weight[chosen])
        plain.mask_bias.copy_(layer.mask_bias[chosen])
        for i, name in enumerate(KERNELS):
            scale, shift = (t[chosen, i, :, None, None, None] for t in (layer.kernel_scale, layer.kernel_shift))
            getattr(plain, name).copy_(scale * getattr(layer, name) + shift)
    return plain


# -- identities


@few
@given(**sizes)
def test_equal_classes_are_plain_spn(impl, n, c, h, w, k, classes, seed):
    x, y, z = draw(seed, n, c, h, w, classes)
    plain = pixnorm.SPN2d(c, k, impl=impl, init="keras", dtype=torch.float64)
    layer = make(impl, c, classes, 2, kernel_size=k)
    layer.load_state_dict(plain.state_dict())
    torch.testing.assert_close(layer(x, y, z), plain(x), **CLOSE)


@few
@given(**sizes)
def test_a_batch_of_one_class_is_plain_spn(impl, n, c, h, w, k, classes, seed):
    x, y, _ = draw(seed, n, c, h, w, classes)
    layer = make(impl, c, classes, kernel_size=k)
    torch.testing.assert_close(layer(x, y[:1].expand(n)), plain_of(layer, int(y[0]))(x), **CLOSE)


@few
@given(**sizes)
def test_each_sample_has_the_parameters_of_its_class(impl, n, c, h, w, k, classes, seed):
    """With given statistics samples are independent."""
    x, y, _ = draw(seed, n, c, h, w, classes)
    layer = make(impl, c, classes, kernel_size=k).eval()
    expected = [plain_of(layer, chosen).eval()(one[None]) for one, chosen in zip(x, y.tolist(), strict=True)]
    torch.testing.assert_close(layer(x, y), torch.cat(expected), **CLOSE)


@few
@given(**sizes)
def test_the_latent_vector_adds_to_scale_and_shift(impl, n, c, h, w, k, classes, seed):
    x, y, z = draw(seed, n, c, h, w, classes)
    layer = make(impl, c, classes, 2, kernel_size=k)
    gamma, beta = ((z @ weight.T)[:, :, None, None] for weight in (layer.gamma_latent, layer.beta_latent))
    x_hat = tF.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(layer(x, y, z) - layer(x, y, 0 * z), gamma * x_hat + beta, **CLOSE)
    with torch.no_grad():
        layer.kernel_scale.zero_()
        layer.kernel_shift.zero_()
    bigbn = pixnorm.nn.LatentBatchNorm2d(c, 2, impl="reference", dtype=torch.float64)
    with torch.no_grad():
        bigbn.gamma.weight.copy_(layer.gamma_latent)
        bigbn.beta.weight.copy_(layer.beta_latent)
    torch.testing.assert_close(layer(x, y, z), bigbn(x, z) - x_hat, **CLOSE)


@pytest.mark.parametrize("k, sums", [(1, (1, 1, 1)), (3, (9, 6, 4)), (5, (25, 15, 9))])
def test_a_shift_adds_its_taps_whatever_the_mask(impl, k, sums):
    x, y, _ = draw(0, 4, 3, 7, 8, 2)
    layer = make(impl, 3, 2, kernel_size=k)
    before = layer(x, y)
    with torch.no_grad():
        layer.kernel_shift[:, 2:] += 0.5
    added = layer(x, y) - before
    for (row, column), taps in zip([(3, 4), (0, 4), (0, 0)], sums, strict=True):
        torch.testing.assert_close(added[:, :, row, column], torch.full_like(added[:, :, 0, 0], 0.5 * taps), **CLOSE)


def test_absent_classes_get_zero_gradients(impl):
    x, _, _ = draw(0, 6, 3, 4, 5, 4)
    layer = make(impl, 3, 4)
    layer(x, torch.tensor([0, 2, 2, 0, 0, 2], device=x.device)).sin().sum().backward()
    for name in ("mask_weight", "mask_bias", "kernel_scale", "kernel_shift"):
        grad = getattr(layer, name).grad
        assert (grad[[1, 3]] == 0).all() and (grad[[0, 2]] != 0).all(), name


@pytest.mark.parametrize("n", [2, 7])
@pytest.mark.parametrize("soft", [False, True])
def test_classes_as_vectors(impl, n, soft):
    """One-hot vectors are their classes; soft ones average parameters. Both for more samples than classes and fewer."""
    x, y, z = draw(0, n, 3, 5, 4, 3)
    layer = make(impl, 3, 3, 2)
    if not soft:
        torch.testing.assert_close(layer(x, tF.one_hot(y, 3).to(x.dtype), z), layer(x, y, z), **CLOSE)
        return
    averaged = make(impl, 3, 1, 2)
    weights = torch.tensor([0.25, 0.75, 0.0], dtype=x.dtype, device=x.device)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            of_class = parameter.shape[0] == 3 and averaged.get_parameter(name).shape[0] == 1
            averaged.get_parameter(name).copy_(torch.tensordot(weights, parameter, 1) if of_class else parameter)
    torch.testing.assert_close(layer(x, weights.expand(n, 3), z), averaged(x, torch.zeros_like(y), z), **CLOSE)


# -- conditional convolution


@few
@given(
    n=st.integers(1, 4),
    groups=st.sampled_from([1, 2, 4]),
    k=st.sampled_from([1, 3]),
    stride=st.sampled_from([1, 2]),
    dilation=st.sampled_from([1, 2]),
    bias=st.booleans(),
    mode=st.sampled_from(["zeros", "reflect"]),
    seed=st.integers(0, 99),
)
def test_conditional_convolution_is_convolution_with_its_kernels(n, groups, k, stride, dilation, bias, mode, seed):
    x, y, _ = draw(seed, n, 4, 7, 6, 3)
    geometry = {"stride": stride, "padding": dilation, "dilation": dilation, "groups": groups}
    layer = pixnorm.ConditionalConv2d(4, 8, k, 3, **geometry, bias=bias, padding_mode=mode, dtype=torch.float64)
    plain = torch.nn.Conv2d(4, 8, k, **geometry, bias=bias, padding_mode=mode, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    expected = []
    for one, chosen in zip(x, y.tolist(), strict=True):
        shift = layer.shift[chosen].view(groups, 1, -1, 1, 1).expand(-1, 8 // groups, -1, k, k).flatten(0, 1)
        with torch.no_grad():
            plain.weight.copy_(layer.scale[chosen, :, None, None, None] * layer.weight + shift)
            if bias:
                plain.bias.copy_(layer.bias)
        expected.append(plain(one[None]).detach())
    torch.testing.assert_close(layer(x, y), torch.cat(expected), **CLOSE)
    one_hot = tF.one_hot(y, 3).to(x.dtype)
    torch.testing.assert_close(layer(x, one_hot), layer(x, y), **CLOSE)


def test_depthwise_kernels_are_those_of_conditional_convolution():
    """With β's kernels alone the layer is the sum of conditional convolutions of the mask and of the inverted one."""
    x, y, _ = draw(0, 4, 3, 5, 6, 2)
    layer = make("reference", 3, 2)
    with torch.no_grad():
        layer.kernel_scale[:, :2] = 0
        layer.kernel_shift[:, :2] = 0
    m = self_latent_mask(layer, x, y)
    expected = 0
    for i, mask in ((2, m), (3, 1 - m)):
        name, tables = KERNELS[i], (layer.kernel_scale[:, i], layer.kernel_shift[:, i])
        expected += F.conditional_conv2d(mask, y, getattr(layer, name), *tables, padding=1, groups=3)
    torch.testing.assert_close(layer(x, y), expected, **CLOSE)


def test_conditional_convolution_as_a_module():
    layer = pixnorm.ConditionalConv2d(4, 8, 3, 5, padding=1)
    plain = torch.nn.Conv2d(4, 8, 3, padding=1)
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 5, 6)
    y = torch.tensor([3, 1], device=x.device)
    torch.testing.assert_close(layer(x, y), plain(x))
    assert layer(x.to(memory_format=torch.channels_last), y).is_contiguous(memory_format=torch.channels_last)
    assert layer(x[:0], y[:0]).shape == (0, 8, 5, 6)
    assert "num_classes=5" in repr(layer)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        assert layer(x, y).dtype == torch.bfloat16
    with torch.no_grad():
        layer.scale.zero_()
        layer.shift.fill_(1)
    layer.reset_parameters()
    assert (layer.scale == 1).all() and (layer.shift == 0).all()
    with pytest.raises(ValueError, match="num_classes must be positive, got 0"):
        pixnorm.ConditionalConv2d(4, 8, 3, 0)
    with pytest.raises(ValueError, match=r"y must be \(2,\) of torch.int64"):
        layer(x, y[:1])
    for name, shape in (("scale", (5, 8)), ("shift", (5, 4))):
        tables = {"scale": torch.ones(5, 8), "shift": torch.zeros(5, 4)} | {name: torch.ones(5, 3)}
        with pytest.raises(ValueError, match=f"{name} must have shape \\({shape[0]}, {shape[1]}\\)"):
            F.conditional_conv2d(x, y, layer.weight, **tables)


def test_gradients_of_conditional_convolution():
    x, y, _ = draw(0, 2, 2, 3, 3, 2)
    generator = torch.Generator().manual_seed(1)
    others = [random(shape, generator) for shape in ((2, 2, 2, 2), (2, 2), (2, 2), (2,))]
    leaves = [t.requires_grad_() for t in (x, *others)]

    def call(x, *others):
        return F.conditional_conv2d(x, y, *others, padding=1)

    assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradgradcheck(call, leaves)


# -- the module


@pytest.mark.parametrize(
    ("classes", "latent_dim", "count"), [(10, 128, 165_888), (10, 0, 100_352), (100, 128, 396_288)]
)
def test_parameter_counts_of_the_paper(classes, latent_dim, count):
    layer = pixnorm.ConditionalSPN2d(256, classes, latent_dim, device="meta")
    assert sum(p.numel() for p in layer.parameters()) == count


def test_starts_as_batch_norm_and_resets():
    layer = make("reference", 3, 4, 2)
    layer.reset_parameters()
    x, y, z = draw(0, 6, 3, 5, 4, 4)
    layer.load_state_dict(torch.nn.BatchNorm2d(3, dtype=torch.float64).state_dict())
    close = (layer(x, y, z) - tF.batch_norm(x, None, None, training=True)).abs().max()
    assert 0 < close < 1  # the noise of the kernels
    layer.reset_parameters()
    assert (layer.mask_weight == 1).all() and (layer.kernel_scale == 1).all()
    assert (layer.mask_bias == 0).all() and (layer.kernel_shift == 0).all()
    assert layer.gamma_latent.abs().max() <= (6 / 5) ** 0.5 and layer.gamma_latent.std() > 0.1


def test_state_dict_of_its_own_loads():
    layer, other = make("reference", 3, 4, 2), make("reference", 3, 4, 2)
    other.load_state_dict(layer.state_dict())
    for name, tensor in layer.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    state = layer.state_dict()
    del state["kernel_scale"]
    with pytest.raises(RuntimeError, match=r"Missing key.*kernel_scale"):
        other.load_state_dict(state)


@pytest.mark.parametrize("mask_channels", [None, 1])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("upsample", [1, 2])
def test_the_mask(impl, mask_channels, training, upsample):
    """By its definition, at the resolution of the input; the layer stays as it is."""
    x, y, _ = draw(0, 4, 3, 5, 6, 2)
    options = {"mask_channels": mask_channels, "upsample": upsample, "activation": "relu"}
    conditional = make(impl, 3, 2, **options).train(training)
    plain = pixnorm.SPN2d(3, impl=impl, dtype=torch.float64, **options).train(training)
    for layer in (conditional, plain):
        with torch.no_grad():
            layer.mask_running_mean.normal_()
            layer.mask_running_var.uniform_(0.5, 2)
        before = copy.deepcopy(layer.state_dict())
        given = () if layer is plain else (y,)
        mask = self_latent_mask(layer, x, *given)
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        running = (None, None) if training else (layer.mask_running_mean, layer.mask_running_var)
        p = tF.batch_norm(tF.conv2d(x, layer.mask_projection), *running, training=training)
        weight, bias = (t[y] if given else t.expand(4, -1) for t in (layer.mask_weight, layer.mask_bias))
        expected = torch.sigmoid(p * weight[:, :, None, None] + bias[:, :, None, None])
        torch.testing.assert_close(mask, expected, **CLOSE)


def test_training_and_eval():
    layer = make("reference", 3, 2, momentum=1.0)
    x, y, _ = draw(0, 4, 3, 5, 6, 2)
    trained = layer(x, y)
    assert layer.num_batches_tracked == 1
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)))
    with torch.no_grad():  # the running variance is unbiased
        layer.running_var *= 119 / 120
        layer.mask_running_var *= 119 / 120
    torch.testing.assert_close(layer.eval()(x, y), trained, **CLOSE)


def test_gradients_of_the_module(impl):
    layer = make(impl, 2, 2, 2)
    x, y, z = draw(0, 3, 2, 3, 2, 2)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def call(x, z, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x, y, z))

    leaves = [t.detach().requires_grad_() for t in (x, z, *parameters)]
    assert torch.autograd.gradcheck(call, leaves, atol=1e-6)
    assert torch.autograd.gradgradcheck(call, leaves, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input(impl, dtype):
    layer = make(impl, 3, 2, 2).float()
    x, y, z = draw(0, 4, 3, 5, 6, 2)
    exact = copy.deepcopy(layer).double()(x.to(dtype).double(), y, z)
    output = layer(x.to(dtype), y, z.float())
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), exact, rtol=0.1, atol=0.3)


@pytest.mark.parametrize("vectors", [False, True])
def test_autocast(vectors):
    layer = make("reference", 3, 2, 2).float()
    x, y, z = (t.float() if t.is_floating_point() else t for t in draw(0, 4, 3, 5, 6, 2))
    y = tF.one_hot(y, 2).float() if vectors else y
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        assert layer(x, y, z).dtype == torch.float32


def test_errors_and_repr():
    x, y, z = draw(0, 2, 3, 5, 6, 2)
    layer = make("reference", 3, 2, 2)
    assert repr(layer).endswith("num_classes=2, latent_dim=2)")
    assert repr(pixnorm.SPN2d(3, depthwise=False)).endswith("depthwise=False)")
    for wrong, message in (
        ((x, y[:1], z), r"y must be \(2,\) of torch.int64"),
        ((x, y.float(), z), r"y must be \(2,\) of torch.int64"),
        ((x, y), r"z is needed, of shape \(2, 2\)"),
        ((x, y, z[:, :1]), r"z must have shape \(2, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(*wrong)
    for options, message in (
        ({"num_classes": 0}, "num_classes must be positive, got 0"),
        ({"num_classes": 2, "latent_dim": -1}, "latent_dim must not be negative, got -1"),
        ({"num_classes": 2, "kernel_size": 2}, "kernel_size must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            pixnorm.ConditionalSPN2d(3, **options)


def test_a_copy_computes_the_same():
    x, y, z = draw(0, 4, 3, 5, 6, 2)
    layer = make("reference", 3, 2, 2)
    torch.testing.assert_close(copy.deepcopy(layer)(x, y, z), layer(x, y, z), rtol=0, atol=0)


# -- standard convolutions


def test_standard_convolutions():
    """The last row of Table 7: its size; it starts near batch norm; diagonal kernels are depthwise ones."""
    layer = pixnorm.SPN2d(256, depthwise=False, device="meta")
    assert sum(p.numel() for p in layer.parameters()) == 2_425_344
    x = draw(0, 4, 16, 5, 6, 2)[0]
    options = {"impl": "reference", "dtype": torch.float64}
    layer, depthwise = pixnorm.SPN2d(16, depthwise=False, **options), pixnorm.SPN2d(16, **options)
    difference = layer(x) - tF.batch_norm(x, None, None, training=True)
    assert 0.005 < difference.std() < 0.2
    with torch.no_grad():
        for name in ("mask_projection", "mask_weight", "mask_bias"):
            getattr(layer, name).copy_(getattr(depthwise, name))
        for name in KERNELS:
            getattr(layer, name).copy_(torch.eye(16, dtype=x.dtype)[:, :, None, None] * getattr(depthwise, name))
    torch.testing.assert_close(layer(x), depthwise(x), **CLOSE)


def test_exported_for_any_batch():
    """Of fewer and of more samples than classes."""
    layer = make("auto", 4).eval()
    x, y = torch.randn(2, 4, 6, 5, dtype=torch.float64), torch.tensor([2, 0])
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(layer, (x, y), dynamic_shapes=({0: batch}, {0: batch})).module()
    for n in (2, 7):
        x, y = torch.randn(n, 4, 6, 5, dtype=torch.float64), torch.arange(n) % 3
        torch.testing.assert_close(exported(x, y), layer(x, y))
