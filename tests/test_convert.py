"""convert_batchnorm: the same function afterwards, a mask that can learn, and a report of the skipped layers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import pixnorm
from pixnorm import SPN2d, convert_batchnorm
from pixnorm.nn import convert
from pixnorm.testing import random

backends = pytest.mark.parametrize("backend", ["reference", "auto"])

# Two ways to compute the same in float64 differ by rounding: some 1e-15 per operation, sums of some hundred terms.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
KERNELS = ["gamma_weight", "gamma_weight_inv", "beta_weight", "beta_weight_inv"]


def randomise(model):
    """Give every batch norm scale, shift and running statistics that differ from their initial values."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                if module.affine:
                    module.weight.normal_()
                    module.bias.normal_()
                if module.running_mean is not None:
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 2)
                    module.num_batches_tracked.fill_(7)
    return model


def make():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
    return randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=0.1, momentum=0.3), block).double())


def batch(channels=3, seed=1):
    return random((4, channels, 6, 5), torch.Generator().manual_seed(seed))


def use(model, impl):
    for module in model.modules():
        if isinstance(module, SPN2d):
            module.impl = impl
    return model


@backends
def test_is_the_same_function_without_noise(backend):
    model = make()
    original = copy.deepcopy(model)
    result = convert_batchnorm(model, noise=0)
    assert result.model is model and result.replaced == ["1", "2.1"] and result.skipped == {}
    assert isinstance(model[1], SPN2d) and isinstance(model[2][1], SPN2d)
    use(model, backend)

    x, x_original = batch().requires_grad_(), batch().requires_grad_()
    model.eval(), original.eval()
    torch.testing.assert_close(model(x), original(x), **CLOSE)
    model.train(), original.train()
    for seed in (2, 3):
        torch.testing.assert_close(model(batch(seed=seed)), original(batch(seed=seed)), **CLOSE)
    model(x).square().sum().backward()
    original(x_original).square().sum().backward()
    torch.testing.assert_close(x.grad, x_original.grad, **CLOSE)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(model[2][1].get_buffer(name), original[2][1].get_buffer(name), **CLOSE)
    model.eval(), original.eval()
    torch.testing.assert_close(model(x), original(x), **CLOSE)


@pytest.mark.parametrize("training", [True, False])
def test_noise_lets_the_mask_learn(training):
    def mask_gradient(noise):
        model = randomise(nn.Sequential(nn.BatchNorm2d(6)).double())
        convert_batchnorm(model, noise=noise)
        model.train(training)(batch(6)).sin().sum().backward()
        return model[0].mask_projection.grad.abs().max()

    assert mask_gradient(0) < 1e-12
    assert convert_batchnorm.__defaults__ == (0.02,) and mask_gradient(0.02) > 1e-4


def test_noise_is_relative_to_the_scale_and_independent():
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(300, dtype=torch.float64)
    with torch.no_grad():
        bn.weight.copy_(torch.tensor([0.0, 1.0, -3.0]).repeat_interleave(100))
        bn.bias.fill_(0.7)
    spn = convert_batchnorm(bn, noise=0.1).model
    kernels = torch.stack([getattr(spn, name).detach()[:, 0] for name in KERNELS])
    kernels[:2, :, 1, 1] -= bn.weight.detach()
    kernels[2:, :, 1, 1] -= bn.bias.detach()
    assert (kernels[:, :100] == 0).all()  # a channel of scale 0 stays at 0
    # 900 draws each: the estimates are good to 3 %; allow five times that.
    for channels, expected in ((slice(100, 200), 0.1), (slice(200, 300), 0.3)):
        deviation = kernels[:, channels].flatten(1).std(dim=1)
        torch.testing.assert_close(deviation, torch.full_like(deviation, expected), rtol=0.15, atol=0)
    torch.testing.assert_close(torch.corrcoef(kernels[:, 100:].flatten(1)), torch.eye(4).double(), rtol=0, atol=0.15)


def test_random_numbers_come_from_the_global_generator():
    states = []
    for _ in range(2):
        model = make()
        torch.manual_seed(3)
        states.append(convert_batchnorm(model).model.state_dict())
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None, "eps": 0.1}]
)
@pytest.mark.parametrize("training", [True, False])
def test_everything_carries_over(options, training):
    torch.manual_seed(0)
    bn = randomise(nn.BatchNorm2d(6, **options).double()).train(training)
    spn = convert_batchnorm(bn, noise=0).model
    assert isinstance(spn, SPN2d)
    assert (spn.num_features, spn.kernel_size, spn.upsample, spn.activation) == (6, 3, 1, None)
    assert (spn.eps, spn.momentum, spn.training) == (bn.eps, bn.momentum, training)
    assert spn.track_running_stats == bn.track_running_stats
    for name, buffer in bn.named_buffers():
        assert torch.equal(spn.get_buffer(name), buffer) and spn.get_buffer(name) is not buffer
    if bn.track_running_stats:
        assert (spn.mask_running_mean == 0).all() and (spn.mask_running_var == 1).all()
    else:
        assert list(spn.buffers()) == []
    if bn.affine or bn.track_running_stats:
        assert all(t.dtype == torch.float64 for t in spn.state_dict().values() if t.is_floating_point())
        torch.testing.assert_close(spn(batch(6)), bn(batch(6)), **CLOSE)


def test_tracking_switched_off_later_carries_over():
    bn = randomise(nn.BatchNorm2d(6).double())
    bn.track_running_stats = False
    spn = convert_batchnorm(bn, noise=0).model
    torch.testing.assert_close(spn(batch(6)), bn(batch(6)), **CLOSE)
    assert torch.equal(spn.running_mean, bn.running_mean)
    torch.testing.assert_close(spn.eval()(batch(6)), bn.eval()(batch(6)), **CLOSE)


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_requires_grad_carries_over(weight, bias):
    bn = nn.BatchNorm2d(4)
    bn.weight.requires_grad_(weight)
    bn.bias.requires_grad_(bias)
    spn = convert_batchnorm(bn).model
    expected = {"gamma": weight, "beta": bias, "mask": weight or bias}
    for name, parameter in spn.named_parameters():
        assert parameter.is_leaf and parameter.requires_grad == expected[name.split("_")[0]], name


def test_layer_without_bias():
    bn = randomise(nn.BatchNorm2d(4).double())
    bn.register_parameter("bias", None)
    spn = convert_batchnorm(bn, noise=0).model
    torch.testing.assert_close(spn(batch(4)), bn(batch(4)), **CLOSE)


def test_layer_without_tensors_takes_dtype_and_device_of_the_model():
    bare = nn.BatchNorm2d(4, affine=False, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), bare).double()
    original = copy.deepcopy(model)
    convert_batchnorm(model, noise=0)
    torch.testing.assert_close(model(batch()), original(batch()), **CLOSE)
    assert convert_batchnorm(model.append(nn.BatchNorm2d(4)).to("meta")).model[2].mask_projection.is_meta


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_carry_over(dtype):
    model = nn.Sequential(nn.BatchNorm2d(4).to(dtype), nn.BatchNorm2d(4))
    convert_batchnorm(model)
    assert model[0].gamma_weight.dtype == model[0].running_var.dtype == model[0].mask_running_var.dtype == dtype
    assert model[1].gamma_weight.dtype == model[1].running_var.dtype == torch.float32


def test_shared_layer_stays_shared():
    bn = nn.BatchNorm2d(4)
    inner = nn.Sequential(bn)
    model = nn.ModuleDict({"a": bn, "b": nn.Sequential(nn.ReLU(), bn), "c": inner, "d": inner})
    result = convert_batchnorm(model)
    assert result.replaced == ["a", "b.1", "c.0", "d.0"]
    assert isinstance(model["a"], SPN2d) and model["d"] is inner
    assert model["a"] is model["b"][1] is model["c"][0]


def test_second_conversion_finds_nothing():
    model = convert_batchnorm(make()).model
    layers = list(model.modules())
    assert convert_batchnorm(model)[1:3] == ([], {})
    assert all(a is b for a, b in zip(layers, model.modules(), strict=True))


class OtherDefault(nn.BatchNorm2d):
    """Another default init, the same function."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-3)


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Frozen(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(False)


def with_hook():
    bn = nn.BatchNorm2d(4)
    bn.register_forward_hook(lambda module, args, output: 2 * output)
    return bn


def with_parametrization():
    return parametrizations.weight_norm(nn.BatchNorm2d(4), "weight")


def with_own_forward():
    bn = nn.BatchNorm2d(4)
    bn.forward = lambda x: x
    return bn


def with_buffer():
    bn = nn.BatchNorm2d(4)
    bn.register_buffer("mask", torch.ones(4))
    return bn


def with_hook_on_a_parameter():
    bn = nn.BatchNorm2d(4)
    bn.weight.register_hook(lambda grad: 2 * grad)
    return bn


def with_hook_after_accumulation():
    bn = nn.BatchNorm2d(4)
    bn.bias.register_post_accumulate_grad_hook(lambda parameter: None)
    return bn


def with_no_count():
    bn = nn.BatchNorm2d(4)
    bn.num_batches_tracked = None
    return bn


def test_two_parameters_over_one_storage_are_tied():
    """As views of a flat buffer are."""
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    flat = torch.randn(4)
    for layer in model[:2]:
        layer.weight = nn.Parameter(flat)
    result = convert_batchnorm(model)
    assert result.replaced == ["2"]
    assert result.skipped == dict.fromkeys("01", "shares parameters or buffers with another module")


def test_subclass_that_only_sets_defaults_is_replaced():
    model = nn.Sequential(OtherDefault(4))
    assert convert_batchnorm(model).replaced == ["0"] and model[0].eps == 1e-3


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (with_hook_on_a_parameter(), "has parameters with hooks"),
        (with_hook_after_accumulation(), "has parameters with hooks"),
        (with_no_count(), "has some of the buffers of running statistics, and not all"),
        (nn.BatchNorm1d(4), "BatchNorm1d is not nn.BatchNorm2d"),
        (nn.BatchNorm3d(4), "BatchNorm3d is not nn.BatchNorm2d"),
        (nn.SyncBatchNorm(4), "SyncBatchNorm is not nn.BatchNorm2d"),
        (nn.LazyBatchNorm2d(), "LazyBatchNorm2d does not know its channels before its first batch"),
        (Doubled(4), "Doubled has its own forward"),
        (Frozen(4), "Frozen has its own train"),
        (with_own_forward(), "BatchNorm2d has its own forward"),
        (with_hook(), "has hooks"),
        (with_parametrization(), "has parametrizations"),
        (with_buffer(), "has more than nn.BatchNorm2d: mask"),
    ],
)
def test_what_may_compute_something_else_stays(module, reason):
    model = nn.Sequential(module, nn.BatchNorm2d(4))
    result = convert_batchnorm(model)
    assert model[0] is module
    assert result.skipped == {"0": reason} and result.replaced == ["1"]
    alone = convert_batchnorm(module)
    assert alone.model is module and alone.skipped == {"": reason} and alone.replaced == []


def test_tied_parameters_stay():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model[1].weight = model[0].weight
    result = convert_batchnorm(model)
    assert result.skipped == dict.fromkeys("01", "shares parameters or buffers with another module")
    assert result.replaced == ["2"]


def test_lazy_layer_is_replaced_after_its_first_batch():
    model = nn.Sequential(nn.LazyBatchNorm2d())
    model(torch.randn(2, 4, 3, 3))
    assert convert_batchnorm(model).replaced == ["0"] and model[0].num_features == 4


@pytest.mark.parametrize("noise", [-0.1, float("nan")])
def test_bad_noise(noise):
    model = make()
    with pytest.raises(ValueError, match="noise must not be negative"):
        convert_batchnorm(model, noise)
    assert isinstance(model[1], nn.BatchNorm2d)


def test_an_error_leaves_the_model_untouched(monkeypatch):
    model = make()
    layers, state = list(model.modules()), copy.deepcopy(model.state_dict())
    start, calls = convert.start_as_batchnorm_, []

    def fail_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        start(*args)

    monkeypatch.setattr(convert, "start_as_batchnorm_", fail_at_the_second)
    with pytest.raises(MemoryError):
        convert_batchnorm(model)
    assert all(a is b for a, b in zip(layers, model.modules(), strict=True))
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_report_is_readable():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.SyncBatchNorm(4))
    assert repr(convert_batchnorm(model)) == (
        "Conversion of Sequential: 1 replaced by SPN2d\n  1\n1 not replaced\n  2: SyncBatchNorm is not nn.BatchNorm2d"
    )
    assert "(the model itself)" in repr(pixnorm.convert_batchnorm(nn.BatchNorm2d(4)))
