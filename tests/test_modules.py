"""SPN2d as a module: state, modes, initialisation, and use with the rest of PyTorch."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as tF
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pixnorm
from pixnorm.nn.spn import start_as_batchnorm_
from pixnorm.testing import random

# Standard convolutions, which only the reference has; and on GPUs other sizes of kernels, and one mask.
pytestmark = pytest.mark.filterwarnings("ignore:pixnorm.spn runs on the reference. the (CUDA )?kernels")
backends = pytest.mark.parametrize("backend", ["reference", "auto"])

# Two ways to compute the same in float64 differ by rounding: some 1e-15 per operation, sums of some hundred terms.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}

PARAMETERS = [
    "mask_projection",
    "mask_weight",
    "mask_bias",
    "gamma_weight",
    "gamma_weight_inv",
    "beta_weight",
    "beta_weight_inv",
]
BUFFERS = ["running_mean", "running_var", "mask_running_mean", "mask_running_var", "num_batches_tracked"]


def make(channels=6, **options):
    """A layer in float64 with no tensor at its initial value, so that swapped tensors are detected."""
    torch.manual_seed(0)
    layer = pixnorm.SPN2d(channels, **{"dtype": torch.float64, **options})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        for name, buffer in layer.named_buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 2) if name.endswith("var") else buffer.normal_()
    return layer


def batch(channels=6, seed=1, dtype=torch.float64, shape=(3, 5, 4)):
    generator = torch.Generator().manual_seed(seed)
    n, h, w = shape
    return (2 * random((n, channels, h, w), generator) + 1).to(dtype)


def buffers_of(layer):
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def pickled(layer):
    return pickle.loads(pickle.dumps(layer))


# -- parameters, buffers, initialisation -------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_channels", [None, 1])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_state(k, mask_channels):
    layer = pixnorm.SPN2d(4, k, mask_channels)
    mc = mask_channels or 4
    shapes = [(mc, 4, 1, 1), (mc,), (mc,), *[(4, 1, k, k)] * 4, (4,), (4,), (mc,), (mc,), ()]
    expected = dict(zip(PARAMETERS + BUFFERS, shapes, strict=True))
    assert {name: tuple(t.shape) for name, t in layer.state_dict().items()} == expected
    assert [name for name, _ in layer.named_parameters()] == PARAMETERS
    assert layer.num_batches_tracked.dtype == torch.long
    assert not isinstance(layer, nn.modules.batchnorm._BatchNorm)


@pytest.mark.parametrize(
    ("k", "mask_channels", "count"), [(1, None, 67_072), (3, None, 75_264), (5, None, 91_648), (3, 1, 9_474)]
)
def test_parameter_counts_of_the_paper(k, mask_channels, count):
    layer = pixnorm.SPN2d(256, k, mask_channels, device="meta")
    assert sum(p.numel() for p in layer.parameters()) == count


def test_init_is_batch_norm_with_noise():
    torch.manual_seed(0)
    layer = pixnorm.SPN2d(256)
    delta = torch.zeros(3, 3)
    delta[1, 1] = 1
    noise = [layer.gamma_weight - delta, layer.gamma_weight_inv - delta, layer.beta_weight, layer.beta_weight_inv]
    noise = torch.stack([kernel.flatten() for kernel in noise]).detach()
    # 2304 draws per kernel: the estimates of mean, deviation and correlation are good to 2 %; allow five times that.
    torch.testing.assert_close(noise.std(dim=1), torch.full((4,), 0.02), rtol=0.1, atol=0)
    assert noise.mean(dim=1).abs().max() < 0.1 * 0.02
    torch.testing.assert_close(torch.corrcoef(noise), torch.eye(4), rtol=0, atol=0.1)
    # Glorot uniform: limit sqrt(6 / (fan_in + fan_out)).
    limit = (6 / 512) ** 0.5
    assert 0.99 * limit < layer.mask_projection.abs().max() <= limit
    assert (layer.mask_weight == 1).all() and (layer.mask_bias == 0).all()


def test_keras_init():
    torch.manual_seed(0)
    layer = pixnorm.SPN2d(256, init="keras")
    for kernel in (layer.gamma_weight, layer.gamma_weight_inv, layer.beta_weight, layer.beta_weight_inv):
        assert 0.99 * 0.0509 < kernel.abs().max() < 0.05094  # sqrt(6 / (9 * 256 + 9))
        torch.testing.assert_close(kernel.std().item(), 0.05093 / 3**0.5, rtol=0.1, atol=0)


@backends
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("mask_channels", [None, 1])
def test_without_noise_is_batch_norm(backend, k, mask_channels):
    """Including borders, for any mask: in training, in the running statistics, and in eval."""
    layer = make(kernel_size=k, mask_channels=mask_channels, impl=backend)
    layer.reset_running_stats()
    bn = nn.BatchNorm2d(6, dtype=torch.float64)
    with torch.no_grad():
        bn.weight.normal_()
        bn.bias.normal_()
    start_as_batchnorm_(layer, bn.weight, bn.bias, noise=0)
    for seed in (1, 2):
        torch.testing.assert_close(layer(batch(seed=seed)), bn(batch(seed=seed)), **CLOSE)
    layer.eval(), bn.eval()
    torch.testing.assert_close(layer(batch(seed=3)), bn(batch(seed=3)), **CLOSE)


def test_reset_draws_anew():
    layer = make()
    layer(batch())
    torch.manual_seed(5)
    layer.reset_parameters()
    torch.manual_seed(5)
    fresh = pixnorm.SPN2d(6, dtype=torch.float64)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(layer.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_features": 0}, "num_features must be positive, got 0"),
        ({"kernel_size": 2}, "kernel_size must be one of 1, 3, 5, got 2"),
        ({"kernel_size": (3, 3)}, "kernel_size"),
        ({"mask_channels": 2}, "mask_channels must be one of 1, 4, got 2"),
        ({"mask_channels": 0}, "mask_channels"),
        ({"upsample": 3}, "upsample must be one of 1, 2, got 3"),
        ({"activation": "gelu"}, "activation must be one of None, 'relu', 'leaky_relu', got 'gelu'"),
        ({"impl": "fast"}, "impl must be one of 'auto', .*, got 'fast'"),
        ({"init": "zeros"}, "init must be one of 'bn', 'keras', got 'zeros'"),
    ],
)
def test_argument_errors(options, message):
    with pytest.raises(ValueError, match=message):
        pixnorm.SPN2d(**{"num_features": 4, **options})


def test_repr():
    text = repr(pixnorm.SPN2d(4, upsample=2, activation="relu"))
    assert text.startswith("SPN2d(4, kernel_size=3, mask_channels=4, eps=1e-05, momentum=0.1")
    assert "upsample=2, activation='relu', impl='auto'" in text


# -- modes and running statistics --------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize(
    "options",
    [{}, {"upsample": 2, "activation": "relu"}, {"kernel_size": 5, "mask_channels": 1, "eps": 0.1, "momentum": 0.3}],
)
@pytest.mark.parametrize("training", [True, False])
def test_calls_the_function(backend, options, training):
    layer = make(impl=backend, **options).train(training)
    state = buffers_of(layer)
    y = layer(batch())
    expected = pixnorm.functional.spn(
        batch(),
        *(getattr(layer, name) for name in PARAMETERS),
        *(state[name] for name in BUFFERS[:4]),
        training=training,
        momentum=options.get("momentum", 0.1),
        eps=options.get("eps", 1e-5),
        upsample=options.get("upsample", 1),
        activation=options.get("activation"),
        impl=backend,
    )
    assert torch.equal(y, expected)
    state["num_batches_tracked"] += training
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, state[name]), name


def test_named_impl_does_not_fall_back():
    with pytest.raises(RuntimeError, match="impl='native' cannot run here"):
        make(depthwise=False, impl="native")(batch())


@backends
@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_running_statistics_are_those_of_batch_norm(backend, momentum, upsample):
    layer = make(impl=backend, momentum=momentum, upsample=upsample)
    layer.reset_running_stats()
    of_x = nn.BatchNorm2d(6, momentum=momentum, dtype=torch.float64)
    of_mask = nn.BatchNorm2d(6, momentum=momentum, dtype=torch.float64)
    for seed in range(3):
        x = batch(seed=seed)
        layer(x)
        x = tF.interpolate(x, scale_factor=upsample, mode="nearest")
        of_x(x)
        of_mask(tF.conv2d(x, layer.mask_projection))
    assert layer.num_batches_tracked == 3
    torch.testing.assert_close(layer.running_mean, of_x.running_mean, **CLOSE)
    torch.testing.assert_close(layer.running_var, of_x.running_var, **CLOSE)
    torch.testing.assert_close(layer.mask_running_mean, of_mask.running_mean, **CLOSE)
    torch.testing.assert_close(layer.mask_running_var, of_mask.running_var, **CLOSE)


@backends
def test_eval_with_the_statistics_of_the_batch_equals_training(backend):
    layer = make(impl=backend, momentum=1.0)
    x = batch()
    expected = layer(x)
    count = x.numel() // x.shape[1]
    for name in ("running_var", "mask_running_var"):
        getattr(layer, name).mul_((count - 1) / count)  # unbiased to biased
    layer.eval()
    torch.testing.assert_close(layer(x), expected, **CLOSE)
    assert layer.num_batches_tracked == 1


@backends
def test_without_running_statistics(backend):
    layer = make(impl=backend, track_running_stats=False)
    assert list(layer.buffers()) == [] and list(layer.state_dict()) == PARAMETERS
    layer.reset_running_stats()
    expected = layer(batch())
    assert torch.equal(layer.eval()(batch()), expected)


@backends
def test_tracking_switched_off_later(backend):
    """As in batch norm: training leaves the buffers alone, eval still uses them."""
    layer, same = make(impl=backend), make(impl=backend)
    layer.track_running_stats = False
    before = buffers_of(layer)
    assert torch.equal(layer(batch()), same(batch()))
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
    assert torch.equal(layer.eval()(batch()), make(impl=backend).eval()(batch()))


@backends
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(6, 5, 4, dtype=torch.float64), ValueError, r"expected 4D input \(got 3D input\)"),
        (torch.ones(2, 5, 4, 4, dtype=torch.float64), ValueError, r"\(2, 5, 4, 4\)"),
        (torch.ones(2, 6, 4, 4, dtype=torch.long), TypeError, "floating point"),
        (torch.ones(2, 6, 4, 4), TypeError, "dtype"),
        (torch.ones(1, 6, 1, 1, dtype=torch.float64), ValueError, "more than 1 value per channel when training"),
    ],
)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_refused_input_leaves_no_trace(backend, momentum, x, error, message):
    layer = make(impl=backend, momentum=momentum)
    before = buffers_of(layer)
    with pytest.raises(error, match=message):
        layer(x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())


# -- use with the rest of PyTorch --------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize(
    ("normalise", "raw"),
    [
        (nn.utils.spectral_norm, "mask_projection_orig"),
        (parametrizations.spectral_norm, "parametrizations.mask_projection.original"),
    ],
    ids=["hook", "parametrization"],
)
def test_spectral_norm(backend, normalise, raw):
    layer = make(impl=backend)
    plain = copy.deepcopy(layer)
    normalise(layer, "mask_projection", n_power_iterations=50)
    y = layer(batch())
    with torch.no_grad():
        plain.mask_projection /= torch.linalg.matrix_norm(plain.mask_projection[:, :, 0, 0], ord=2)
    # The power iteration ends at the largest singular value up to (s2 / s1)^200.
    torch.testing.assert_close(y, plain(batch()), rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    assert layer.get_parameter(raw).grad.abs().max() > 0
    if normalise is parametrizations.spectral_norm:
        parametrize.remove_parametrizations(layer, "mask_projection")
        assert torch.equal(layer.eval()(batch()), layer(batch()))


@backends
@pytest.mark.parametrize("clone", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_copies(backend, clone):
    layer = make(impl=backend, upsample=2, activation="relu", momentum=None)
    layer(batch())
    twin = clone(layer)
    assert repr(twin) == repr(layer)
    assert torch.equal(twin(batch(seed=2)), layer(batch(seed=2)))
    twin(batch(seed=3))
    assert twin.num_batches_tracked == 3 and layer.num_batches_tracked == 2


@backends
def test_state_dict_round_trip(backend):
    layer, other = make(impl=backend), pixnorm.SPN2d(6, impl=backend, dtype=torch.float64)
    layer(batch())
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.eval()(batch()), layer.eval()(batch()))
    with pytest.raises(RuntimeError, match="size mismatch for gamma_weight"):
        pixnorm.SPN2d(6, 5).load_state_dict(layer.state_dict())
    state = layer.state_dict()
    del state["mask_running_var"]
    with pytest.raises(RuntimeError, match=r"Missing key.*mask_running_var"):
        other.load_state_dict(state)


@backends
def test_functional_call(backend):
    layer, other = make(impl=backend), make(impl=backend)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.5)
    mine, theirs = buffers_of(layer), buffers_of(other)
    y = functional_call(layer, {**dict(other.named_parameters()), **theirs}, (batch(),))
    assert torch.equal(y, other(batch()))
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, mine[name]), name
        assert torch.equal(other.get_buffer(name), theirs[name]), name
    y.square().sum().backward()
    assert layer.mask_projection.grad is None and other.mask_projection.grad is not None


@pytest.mark.filterwarnings("ignore:pixnorm.spn runs on the reference. .*'meta'")
def test_meta_device():
    layer = pixnorm.SPN2d(6, device="meta", dtype=torch.float64)
    assert all(t.is_meta for t in layer.state_dict().values())
    torch.manual_seed(0)
    layer.to_empty(device=torch.get_default_device()).reset_parameters()
    torch.manual_seed(0)
    fresh = pixnorm.SPN2d(6, dtype=torch.float64)
    assert all(torch.equal(layer.state_dict()[name], t) for name, t in fresh.state_dict().items())
    assert pixnorm.SPN2d(6, upsample=2, device="meta")(torch.empty(2, 6, 3, 4, device="meta")).shape == (2, 6, 6, 8)


@backends
def test_ema_copy(backend):
    layer = make(impl=backend)
    ema = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=True)
    ema.update_parameters(layer)  # the first update copies
    start = {name: t.clone() for name, t in layer.state_dict().items()}
    layer(batch()).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.01).step()
    ema.update_parameters(layer)
    for name, value in layer.state_dict().items():
        average = ema.module.state_dict()[name]
        if value.is_floating_point():
            assert not torch.equal(value, start[name]), name
            torch.testing.assert_close(average, 0.75 * start[name] + 0.25 * value, **CLOSE)
    assert ema.eval()(batch()).isfinite().all()


@backends
@pytest.mark.parametrize("training", [True, False])
def test_compile(backend, training):
    # aot_eager traces everything and runs the ops themselves; Inductor is for the tests of the ops.
    torch.compiler.reset()
    eager = make(impl=backend, upsample=2, activation="relu").train(training)
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        x, x_eager = (batch(seed=seed).requires_grad_() for _ in range(2))
        y, y_eager = compiled(x), eager(x_eager)
        torch.testing.assert_close(y, y_eager, **CLOSE)
        y.sin().sum().backward()
        y_eager.sin().sum().backward()
        torch.testing.assert_close(x.grad, x_eager.grad, **CLOSE)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, eager.get_parameter(name).grad, **CLOSE)
    for name, buffer in layer.named_buffers():
        torch.testing.assert_close(buffer, eager.get_buffer(name), **CLOSE)


@backends
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("whole", [True, False], ids=["half parameters", "float32 parameters"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(backend, dtype, whole, training):
    layer = make(impl=backend, dtype=torch.float32).train(training)
    half = copy.deepcopy(layer)
    half = half.to(dtype) if whole else half
    x = batch(dtype=dtype)
    y, expected = half(x), layer(x.float())
    assert y.dtype == dtype and expected.abs().max() < 64
    # About twenty roundings of values as large as the result, or as the sums in it.
    atol = 20 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=atol)
    y.float().square().sum().backward()
    for name, parameter in half.named_parameters():
        assert parameter.grad.dtype == parameter.dtype == (dtype if whole else torch.float32), name
        assert parameter.grad.isfinite().all(), name
    if training:
        for name in ("running_mean", "mask_running_var"):
            torch.testing.assert_close(half.get_buffer(name).float(), layer.get_buffer(name), rtol=0.05, atol=0.05)


@backends
def test_autocast(backend):
    model = nn.Sequential(nn.Conv2d(6, 6, 1), make(impl=backend, dtype=torch.float32))
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        y = model(batch(dtype=torch.float32))
        assert y.dtype == torch.bfloat16
        # As in batch norm, the input decides: float32 stays float32.
        x = batch(dtype=torch.float32)
        inside = model[1].eval()(x)
    assert torch.equal(inside, model[1](x))
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@backends
@pytest.mark.parametrize("options", [{}, {"upsample": 2}, {"kernel_size": 5}, {"mask_channels": 1}])
def test_channels_last_model(backend, options):
    """The 4D parameters take the model's memory format."""
    plain = make(impl=backend, **options)
    layer = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    x = batch().to(memory_format=torch.channels_last)
    y, expected = layer(x), plain(batch())
    # On a GPU the float64 depthwise convolutions of the reference are NCHW only.
    if y.device.type == "cpu" or backend == "auto":
        assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected, **CLOSE)
    y.sin().sum().backward()
    expected.sin().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad, **CLOSE)
    torch.optim.Adam(layer.parameters()).step()


def test_sync_batchnorm_conversion_leaves_it_alone():
    model = nn.Sequential(nn.BatchNorm2d(4), pixnorm.SPN2d(4))
    layer = model[1]
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(converted[0], nn.SyncBatchNorm) and converted[1] is layer


@backends
def test_two_forwards_with_buffers_rewritten_in_between(backend):
    """As DistributedDataParallel does before a discriminator's second batch; with gloo autograd does not detect it."""
    layer, plain = make(impl=backend), make(impl=backend)
    first = layer(batch(seed=1))
    with torch.no_grad():
        for buffer in layer.buffers():
            buffer.zero_()
    (first.sin().sum() + layer(batch(seed=2)).sin().sum()).backward()
    for seed in (1, 2):
        plain(batch(seed=seed)).sin().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad, **CLOSE)
