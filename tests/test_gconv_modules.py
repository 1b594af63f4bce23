"""GConv2d, GLinear and LatentBatchNorm2d; latent vectors from the context."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from test_ops import HALF, name_of
from torch.utils.checkpoint import checkpoint

import pixnorm
from pixnorm.functional import gconv2d, glinear

pytestmark = pytest.mark.usefixtures("one_thread")

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.mark.parametrize("bias", [True, False])
def test_modules_call_the_functions(impl, bias):
    torch.manual_seed(0)
    options = {"stride": 2, "padding": (1, 0), "dilation": 2}
    conv = pixnorm.GConv2d(3, 4, (3, 2), 5, **options, bias=bias, impl=impl, dtype=torch.float64)
    x, z = torch.randn(2, 3, 7, 8, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    weights = dict(conv.named_parameters())
    assert {name: tuple(w.shape) for name, w in weights.items()} == {
        "weight": (4, 3, 3, 2),
        "scale_weight": (4, 8),
        "mix_weight": (4, 4),
    } | ({"bias": (4,)} if bias else {})
    torch.testing.assert_close(conv(x, z), gconv2d(x, z, **weights, **options, impl="reference"), **CLOSE)
    linear = pixnorm.GLinear(5, 6, 5, bias=bias, impl=impl, dtype=torch.float64)
    expected = glinear(z, z, **dict(linear.named_parameters()), impl="reference")
    torch.testing.assert_close(linear(z, z), expected, **CLOSE)
    assert len(conv.state_dict()) == len(linear.state_dict()) == 3 + bias


@pytest.mark.parametrize("init", ["glorot", "zero"])
def test_initial_weights(init):
    torch.manual_seed(0)
    for module, fan in ((pixnorm.GConv2d(60, 100, 3, 40, bias=True, init=init), 9), (pixnorm.GLinear(60, 100, 40), 1)):
        expected = {"weight": fan * 160, "scale_weight": 200, "mix_weight": 200}
        for name, size in expected.items():
            weight, limit = getattr(module, name), (6 / size) ** 0.5
            if name == "mix_weight" and fan == 9 and init == "zero":
                assert not weight.any()
            else:
                assert 0.98 * limit < weight.abs().max() <= limit, name
        assert module.bias is None or not module.bias.any()


def test_latent_vectors_for_layers_that_are_given_none():
    model = torch.nn.Sequential(pixnorm.GConv2d(3, 4, 3, 5), torch.nn.ReLU(), pixnorm.GConv2d(4, 2, 1, 5))
    x, z, other = torch.randn(2, 3, 6, 6), torch.randn(2, 5), torch.randn(2, 5)
    expected = model[2](model[1](model[0](x, z)), z)
    with pixnorm.nn.latent(z):
        torch.testing.assert_close(model(x), expected)
        with pixnorm.nn.latent(other):
            assert not torch.allclose(model(x), expected)
            torch.testing.assert_close(model[0](x, z), model[0](x, z=z))
        torch.testing.assert_close(model(x), expected)
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
    with pixnorm.nn.latent(other):
        torch.testing.assert_close(compiled(x), model(x))
    with pytest.raises(RuntimeError, match=r"GConv2d needs latent vectors: call it with \(x, z\).*pixnorm.nn.latent"):
        model(x)


def test_an_error_inside_does_not_leave_the_latent_vectors():
    with pytest.raises(KeyError), pixnorm.nn.latent(torch.ones(1, 1)):
        raise KeyError
    with pytest.raises(RuntimeError, match="GLinear needs latent vectors"):
        pixnorm.GLinear(1, 1, 1)(torch.ones(1, 1))


def test_latent_vectors_and_checkpoints():
    """Backward runs the layer again, on a GPU in another thread."""
    layer, x, z = pixnorm.GConv2d(3, 4, 3, 5), torch.randn(2, 3, 6, 6, requires_grad=True), torch.randn(2, 5)
    layer(x, z).sin().sum().backward()
    expected, x.grad = x.grad, None

    def contexts():
        return contextlib.nullcontext(), pixnorm.nn.latent(z)

    with pixnorm.nn.latent(z):
        y = checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: y.sin().sum().backward()).result()
    torch.testing.assert_close(x.grad, expected)


def test_export_wants_the_latent_vectors():
    layer, x, z = pixnorm.GConv2d(3, 4, 3, 5), torch.randn(2, 3, 6, 6), torch.randn(2, 5)
    with pixnorm.nn.latent(z), pytest.raises(Exception, match=r"make the latent vectors of GConv2d a constant"):
        torch.export.export(layer, (x,))
    exported = torch.export.export(layer, (x, z)).module()
    other = torch.randn(2, 5)
    torch.testing.assert_close(exported(x, other), layer(x, other))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 4, 3, 2), "in_channels and out_channels must be positive, got 0 and 4"),
        ((3, 4, 0, 2), r"kernel_size must be one or two positive numbers, got \(0, 0\)"),
        ((3, 4, (3, 3, 3), 2), r"kernel_size must be one or two positive numbers, got \(3, 3, 3\)"),
        ((3, 4, 3, 2, 0), r"stride must be one or two positive numbers, got \(0, 0\)"),
        ((3, 4, 3, 0), "latent_dim must be positive, got 0"),
        ((3, 4, 3, 2, 1, "full"), "padding must be numbers, 'same' or 'valid', got 'full'"),
        ((3, 4, 3, 2, 2, "same"), "padding='same' is for stride 1"),
        ((3, 4, 3, 2, 1, 0, 1, False, "fast"), "impl must be one of"),
    ],
)
def test_module_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        pixnorm.GConv2d(*arguments)
    with pytest.raises(ValueError, match="init must be one of 'glorot', 'zero', got 'ones'"):
        pixnorm.GLinear(3, 4, 2, init="ones")
    with pytest.raises(ValueError, match="in_features and out_features must be positive"):
        pixnorm.GLinear(3, -1, 2)
    with pytest.raises(ValueError, match=r"groups must be 1, got 3: kernels are mixed"):
        pixnorm.GConv2d(3, 6, 3, 2, groups=3)
    with pytest.raises(ValueError, match="padding_mode must be one of"):
        pixnorm.GConv2d(3, 6, 3, 2, padding_mode="wrap")


def test_repr():
    assert repr(pixnorm.GConv2d(3, 4, 3, 2, padding=1)) == (
        "GConv2d(3, 4, kernel_size=(3, 3), latent_dim=2, stride=(1, 1), padding=(1, 1), dilation=(1, 1), bias=False, "
        "impl='auto')"
    )
    assert repr(pixnorm.GLinear(3, 4, 2, bias=True)) == "GLinear(3, 4, latent_dim=2, bias=True, impl='auto')"


def test_spectral_norm(impl):
    """Weights are read again in each forward."""
    conv = pixnorm.GConv2d(3, 4, 3, 2, impl=impl)
    for name in ("weight", "scale_weight", "mix_weight"):
        torch.nn.utils.parametrizations.spectral_norm(conv, name)
    conv.eval()
    x, z = torch.randn(2, 3, 6, 6), torch.randn(2, 2)
    expected = gconv2d(x, z, conv.weight, conv.scale_weight, conv.mix_weight, impl="reference")
    torch.testing.assert_close(conv(x, z), expected)
    for name in ("scale_weight", "mix_weight"):
        assert torch.linalg.matrix_norm(getattr(conv, name), 2).item() == pytest.approx(1, rel=0.1)
    conv(x, z).sum().backward()
    assert conv.parametrizations.mix_weight.original.grad.abs().max() > 0


# --- the batch norm that goes with it


@pytest.mark.parametrize("training", [True, False])
def test_latent_batchnorm_by_its_definition(training):
    torch.manual_seed(0)
    norm = pixnorm.nn.LatentBatchNorm2d(4, 3, dtype=torch.float64).train(training)
    plain = torch.nn.BatchNorm2d(4, affine=False, dtype=torch.float64).train(training)
    x, z = 2 * torch.randn(5, 4, 3, 2, dtype=torch.float64) + 1, torch.randn(5, 3, dtype=torch.float64)
    gamma, beta = 1 + z @ norm.gamma.weight.T, z @ norm.beta.weight.T
    expected = gamma[:, :, None, None] * plain(x) + beta[:, :, None, None]
    torch.testing.assert_close(norm(x, z), expected, **CLOSE)
    torch.testing.assert_close(norm.running_var, plain.running_var)
    assert sum(p.numel() for p in norm.parameters()) == 2 * 3 * 4
    torch.testing.assert_close(norm(x, torch.zeros_like(z)), plain(x), **CLOSE)


def test_a_class_is_a_row_of_a_table():
    """With [z, onehot]: the same as a table of scales, one row per class, plus a linear map of z."""
    torch.manual_seed(0)
    norm = pixnorm.nn.LatentBatchNorm2d(4, 3 + 2)
    x, z, y = torch.randn(5, 4, 3, 2), torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    actual = norm(x, torch.cat([z, F.one_hot(y, 2)], 1))
    x_hat = F.batch_norm(x, None, None, training=True)
    gamma = 1 + norm.gamma.weight[:, 3:].T[y] + z @ norm.gamma.weight[:, :3].T
    beta = norm.beta.weight[:, 3:].T[y] + z @ norm.beta.weight[:, :3].T
    torch.testing.assert_close(actual, gamma[:, :, None, None] * x_hat + beta[:, :, None, None])


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_latent_batchnorm_of_half_features(dtype):
    norm = pixnorm.nn.LatentBatchNorm2d(4, 3)
    y = norm(torch.randn(5, 4, 3, 2).to(dtype), torch.randn(5, 3))
    assert y.dtype == dtype and y.isfinite().all()


def test_latent_batchnorm_refuses():
    norm = pixnorm.nn.LatentBatchNorm2d(4, 3)
    before = norm.num_batches_tracked.item()
    with pytest.raises(ValueError, match=r"z must have shape \(5, 3\) for x of shape \(5, 4, 2, 2\), got \(4, 3\)"):
        norm(torch.randn(5, 4, 2, 2), torch.randn(4, 3))
    assert norm.num_batches_tracked.item() == before
    with pytest.raises(ValueError, match="latent_dim must be positive, got 0"):
        pixnorm.nn.LatentBatchNorm2d(4, 0)
