"""Every op and module in the settings of real programs: checkpointing, offloading, dynamic shapes, transforms, tracing,
export, mixed precision. They behave as ``nn.BatchNorm2d`` and ``nn.Conv2d`` do."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import pixnorm
from pixnorm.networks import Generator
from pixnorm.nn import StyleBlock, StyleBlocks
from pixnorm.ops import _dispatch
from pixnorm.testing import DENSE_LAYOUTS, Case, evaluate, in_double

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:pixnorm.*on the reference")]

CLOSE = {"rtol": 1e-8, "atol": 1e-10}


@pytest.fixture(autouse=True)
def nothing_fell_back(monkeypatch):
    monkeypatch.setattr(_dispatch, "fallbacks", {})


def leaves_of(spec, case, dtype=torch.float64, **options):
    tensors = spec.inputs(case, dtype, **options)
    return {name: t.requires_grad_(name in spec.differentiable) for name, t in tensors.items()}


# --- modules, each called with its features only


class Given(nn.Module):
    """A layer with a second input: latent vectors, one-hot classes, classes, or label maps, of that size."""

    def __init__(self, layer, size, one_hot=False, classes=False):
        super().__init__()
        self.layer = layer
        shape = (2, size) if isinstance(size, int) else (2, *size)
        z = torch.randn(shape, generator=torch.Generator().manual_seed(1), device="cpu")
        z = z.argmax(1) if classes else F.one_hot(z.argmax(1), size).float() if one_hot else z
        self.register_buffer("z", z)

    def forward(self, x):
        return self.layer(x, self.z)


class Mapped(nn.Module):
    """A layer with a second input at each pixel: some of the features."""

    def __init__(self, layer, size):
        super().__init__()
        self.layer, self.size = layer, size

    def forward(self, x):
        return self.layer(x, x[:, : self.size])


MODULES = {
    "SPN2d": lambda impl: pixnorm.SPN2d(4, impl=impl),
    "SPN2d, up": lambda impl: pixnorm.SPN2d(4, upsample=2, activation="relu", impl=impl),
    "GConv2d": lambda impl: Given(pixnorm.GConv2d(4, 4, 3, 3, padding=1, impl=impl), 3),
    "LatentBatchNorm2d": lambda impl: Given(pixnorm.nn.LatentBatchNorm2d(4, 3, impl=impl), 3),
    "BatchNorm2d, up": lambda impl: pixnorm.BatchNorm2d(4, upsample=2, activation="relu", impl=impl),
    "ConditionalBatchNorm2d": lambda impl: Given(pixnorm.ConditionalBatchNorm2d(4, 5, impl=impl), 5, one_hot=True),
    "ConditionalSPN2d": lambda impl: Given(pixnorm.ConditionalSPN2d(4, 2, impl=impl), 2, classes=True),
    "ConditionalSPN2d, few": lambda impl: Given(pixnorm.ConditionalSPN2d(4, 5, impl=impl), 5, classes=True),
    "ConditionalConv2d": lambda impl: Given(pixnorm.ConditionalConv2d(4, 4, 3, 5, padding=1), 5, classes=True),
    "AdaIN2d": lambda impl: Given(pixnorm.AdaIN2d(4, 3, impl=impl), 3),
    "StyleBlocks": lambda impl: Given(
        StyleBlocks(StyleBlock(4, 6, 3, 3, noise=False, impl=impl), StyleBlock(6, 4, 3, 3, 2, noise=False, impl=impl)),
        3,
    ),
    "StyleLayer": lambda impl: Given(pixnorm.nn.StyleLayer(4, 4, 3, 3, noise=False, impl=impl), 3),
    "StyleNorm2d": lambda impl: Given(pixnorm.nn.StyleNorm2d(4, 3, noise=False, impl=impl), 3),
    "SpatiallyModulatedConv2d": lambda impl: Mapped(pixnorm.nn.SpatiallyModulatedConv2d(4, 4, 3, 3, impl=impl), 3),
    "UpsampleConv2d": lambda impl: pixnorm.nn.UpsampleConv2d(4, 4, 3, padding=1, impl=impl),
    "ConvAvgPool2d": lambda impl: pixnorm.nn.ConvAvgPool2d(4, 4, 3, padding=1, impl=impl),
    "ChannelGate": lambda impl: pixnorm.ChannelGate(4, 2, impl=impl),
    "SpatialGate": lambda impl: pixnorm.SpatialGate(3, impl=impl),
    "InstanceNorm2d": lambda impl: nn.Sequential(pixnorm.nn.InstanceNorm2d(4, impl=impl), nn.Conv2d(4, 4, 1)),
    "SPADE2d": lambda impl: Given(pixnorm.SPADE2d(4, 3, 6, activation="leaky_relu", impl=impl), (3, 5, 4)),
}
modules = pytest.mark.parametrize("which", MODULES)


def module_and_input(which, impl="auto", *, training=True, dtype=torch.float64):
    torch.manual_seed(0)
    module = MODULES[which](impl).to(torch.get_default_device(), dtype).train(training)
    return module, torch.randn(2, 4, 6, 5, dtype=dtype)


def gradients(module, x, run=None):
    """The output, the gradients of input and parameters, and the buffers."""
    module, x = copy.deepcopy(module), x.detach().clone().requires_grad_()
    y = (run or (lambda module, x: module(x)))(module, x)
    grads = torch.autograd.grad(y.sin().sum(), [x, *module.parameters()])
    return [y, *grads, *module.buffers()]


def assert_all_close(actual, expected, **tolerances):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerances)


# --- saved tensors


@pytest.mark.emulated
def test_saved_tensors_are_unpacked_once(spec, options, impl):
    """Unpacking may be expensive (checkpoints, offloading), or possible only once."""
    packed, unpacked = [], []
    leaves = leaves_of(spec, Case((2, 3, 4, 5), "", options))

    def pack(tensor):
        packed.append(None)
        return tensor

    def unpack(tensor):
        unpacked.append(None)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = spec.function(**leaves, **options, impl=impl)
    torch.autograd.grad(y.sum(), [leaves[name] for name in spec.differentiable])
    # The reference is many operations, some of which save tensors that not every backward needs.
    assert len(unpacked) == len(packed) if impl != "reference" else len(unpacked) <= len(packed)


@modules
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(which, training, reentrant):
    module, x = module_and_input(which, training=training)
    expected = gradients(module, x)

    def run(module, x):
        return checkpoint(module, x, use_reentrant=reentrant)

    if reentrant:  # works with backward() only, not with autograd.grad
        module, x = copy.deepcopy(module), x.requires_grad_()
        run(module, x).sin().sum().backward()
        torch.testing.assert_close(x.grad, expected[1])
    else:  # not the statistics: in training they are updated twice, as batch norm's are
        count = 2 + len(list(module.parameters()))
        assert_all_close(gradients(module, x, run)[:count], expected[:count])


def test_double_backward_under_a_checkpoint(spec, kernel):
    """The second pass runs the reference."""
    leaves = leaves_of(spec, Case((2, 3, 4, 5), ""))
    wanted = [leaves[name] for name in spec.differentiable]

    def second(run):
        y = run()
        grads = torch.autograd.grad(y.sin().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), wanted)

    function = spec.call(kernel)
    names, tensors = list(leaves), list(leaves.values())
    through = second(
        lambda: checkpoint(lambda *t: function(**dict(zip(names, t, strict=True))), *tensors, use_reentrant=False)
    )
    assert_all_close(through, second(lambda: function(**leaves)))


def test_checkpoints_in_a_generator():
    torch.manual_seed(0)
    generator, z = Generator(norm="spn", channels=8, latent_dim=4), torch.randn(2, 4)
    expected = gradients(generator, z)
    for block in (generator.block1, generator.block2, generator.block3):
        block.forward = lambda *args, inner=block.forward: checkpoint(inner, *args, use_reentrant=False)
    y = generator(z.requires_grad_())
    grads = torch.autograd.grad(y.sin().sum(), [z, *generator.parameters()])
    assert_all_close([y, *grads], expected[: 1 + len(grads)], rtol=1e-3, atol=1e-4)


# --- torch.compile with dynamic sizes


@pytest.mark.parametrize("training", [True, False])
def test_dynamic_sizes(spec, impl, training, sizes_equal_by_chance):
    """Batch, height and width; a second and a third size do not recompile."""
    torch.compiler.reset()
    options = {"training": training} if spec.inference else {}
    compiled = torch.compile(spec.call(impl), fullgraph=True, backend="aot_eager", dynamic=True)
    # Divisible by the same powers of two, on which Triton specialises its kernels.
    for number, shape in enumerate([(2, 3, 4, 6), (3, 3, 12, 10), (5, 3, 20, 14)]):
        tensors = spec.inputs(Case(shape, "", options))
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            actual = evaluate(spec, compiled, tensors, options)
        expected = evaluate(spec, spec.call(impl), tensors, options)
        for (name, a), (_, b) in zip(actual.named(), expected.named(), strict=True):
            torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


@modules
@pytest.mark.parametrize("training", [True, False])
def test_modules_with_dynamic_sizes(which, training):
    module, x = module_and_input(which, training=training)
    torch.compiler.reset()
    expected = gradients(module, x)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, expected[0], **CLOSE)
    with torch.compiler.set_stance("fail_on_recompile"):
        for shape in ((2, 4, 8, 10), (2, 4, 12, 7)):
            assert compiled(torch.randn(shape, dtype=x.dtype)).shape[:2] == (2, 4)


# --- torch.func, forward mode


def func_of(spec, impl, options):
    """The op as a function of its differentiable tensors, and those tensors."""
    tensors = spec.inputs(Case((2, 3, 3, 4), "", options), torch.float64)
    rest = spec.constants(tensors)
    if options.get("training") is False:
        rest |= {name: tensors[name] for name in spec.buffers if name in tensors}

    def function(*leaves):
        return spec.function(**dict(zip(spec.differentiable, leaves, strict=True)), **rest, **options, impl=impl)

    return function, [tensors[name] for name in spec.differentiable]


def test_transforms_of_functions(spec, options):
    """``auto`` is the default, so it must work: it runs the reference, and warns."""
    auto, leaves = func_of(spec, "auto", options)
    reference, _ = func_of(spec, "reference", options)
    tangents = [torch.randn_like(leaf) for leaf in leaves]

    def loss_of(function):
        return lambda *leaves: function(*leaves).sin().sum()

    every = tuple(range(len(leaves)))
    transforms = (
        lambda f: torch.func.grad(loss_of(f), argnums=every)(*leaves),
        lambda f: torch.func.vjp(f, *leaves)[1](torch.ones_like(f(*leaves))),
        lambda f: torch.func.jvp(f, tuple(leaves), tuple(tangents)),
        lambda f: [torch.func.jacrev(f)(*leaves)],
        lambda f: [torch.func.vmap(f)(*(torch.stack([leaf, 2 * leaf]) for leaf in leaves))],
        lambda f: forward_mode(f, leaves, tangents),
    )
    for transform in transforms:
        assert_all_close(transform(auto), transform(reference), **CLOSE)
    reason = pixnorm.backends()[f"auto: {spec.name}"]
    assert "a transform of torch.func is active" in reason and "forward-mode" in reason
    assert f"auto: {spec.name}" in pixnorm.backends()


def forward_mode(function, leaves, tangents):
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(*pair) for pair in zip(leaves, tangents, strict=True)]
        return torch.autograd.forward_ad.unpack_dual(function(*duals))


def test_a_named_impl_says_that_it_cannot_be_transformed(spec, kernel):
    function, leaves = func_of(spec, kernel, {})
    with pytest.raises(RuntimeError, match=f"{spec.name}: impl='{kernel}' cannot run here: a transform of torch.func"):
        torch.func.grad(lambda *leaves: function(*leaves).sum())(*leaves)


def test_gradients_of_many_outputs_at_once(spec, kernel):
    """``is_grads_batched``, as in vectorised Jacobians, runs backward under vmap."""
    function, leaves = func_of(spec, kernel, {})
    y = function(*[leaf.requires_grad_() for leaf in leaves])
    many = torch.randn(3, *y.shape, dtype=y.dtype)
    together = torch.autograd.grad(y, leaves, many, is_grads_batched=True, retain_graph=True)
    for i, one in enumerate(many):
        assert_all_close([t[i] for t in together], torch.autograd.grad(y, leaves, one, retain_graph=True), **CLOSE)


@modules
def test_transforms_of_modules(which):
    module, x = module_and_input(which, training=False)
    parameters = dict(module.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(module, parameters, (x,)).sin().sum()

    grads = torch.func.grad(loss)(parameters, x)
    expected = torch.autograd.grad(module(x).sin().sum(), list(parameters.values()))
    assert_all_close(grads.values(), expected, **CLOSE)


# --- tracing and export


@modules
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace(which, tmp_path):
    """With gradients enabled, the default; the result consists of PyTorch's operations and loads without pixnorm."""
    module, x = module_and_input(which, training=False)
    traced = torch.jit.trace(module, x)
    assert "pixnorm::" not in str(traced.inlined_graph)
    torch.jit.save(traced, tmp_path / "traced.pt")
    other = torch.randn_like(x)
    torch.testing.assert_close(torch.jit.load(tmp_path / "traced.pt")(other), module(other))


@modules
@pytest.mark.parametrize("training", [True, False])
def test_fx(which, training):
    """Layers are leaves, as PyTorch's are: a graph supports both modes, and updates its statistics."""
    module, x = module_and_input(which, training=training)
    model = nn.Sequential(nn.Conv2d(4, 4, 1, dtype=x.dtype), module).train(training)
    expected = copy.deepcopy(model)
    for layer in (expected[1], model[1]):
        layer.momentum = None  # uses num_batches_tracked
    graph = torch.fx.symbolic_trace(copy.deepcopy(model))
    assert not [node for node in graph.graph.nodes if node.op == "call_function" and "pixnorm" in str(node.target)]
    for mode in (training, not training, training):
        graph.train(mode), expected.train(mode)
        torch.testing.assert_close(graph(x), expected(x))
    buffers = dict(expected.named_buffers())
    assert dict(graph.named_buffers()).keys() == buffers.keys()
    for name, buffer in graph.named_buffers():
        torch.testing.assert_close(buffer, buffers[name])


def test_fx_of_functions():
    """If a layer is itself the traced root, its function is the leaf."""
    layer, x = pixnorm.SPN2d(4).eval(), torch.randn(2, 4, 5, 6)
    graph = torch.fx.symbolic_trace(layer)
    assert [node.target.__name__ for node in graph.graph.nodes if node.op == "call_function"] == ["spn"]
    torch.testing.assert_close(graph(x), layer(x))


@pytest.mark.cpu
@modules
def test_onnx(which, tmp_path):
    """Standard operators, with the default impl."""
    onnx = pytest.importorskip("onnx", reason="onnx is an extra of the tests")
    pytest.importorskip("onnxscript", reason="onnxscript is an extra of the tests")
    module, x = module_and_input(which, training=False, dtype=torch.float32)
    file = tmp_path / "model.onnx"
    torch.onnx.export(module, (x,), file, dynamo=True)
    model = onnx.load(file)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"} and not model.functions
    (actual,) = onnx.reference.ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(actual), module(x), rtol=1e-4, atol=1e-5)


# --- precision, strides, counts


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_parameters_with_float32_statistics(spec, impl, dtype, training):
    """FSDP's mixed precision, Apex O2."""
    options = {"training": training} if spec.inference else {}
    tensors = spec.inputs(Case((4, 8, 6, 6), "", options), dtype)
    tensors |= {name: tensors[name].float() for name in spec.buffers}
    result = evaluate(spec, spec.call(impl), tensors, options)
    exact = evaluate(spec, spec.reference, in_double(tensors), options)
    assert result.y.dtype == dtype and all(buffer.dtype == torch.float32 for buffer in result.buffers.values())
    for name, buffer in result.buffers.items():
        torch.testing.assert_close(buffer.double(), exact.buffers[name], rtol=0.05, atol=0.05)
    torch.testing.assert_close(result.y.double(), exact.y, rtol=0.1, atol=0.2)
    assert all(grad.dtype == dtype for grad in result.grads.values())


@pytest.mark.emulated
def test_gradients_have_their_parameters_strides(spec, impl):
    """DDP and fused optimisers expect it after ``.to(memory_format=torch.channels_last)``."""
    tensors = spec.inputs(Case((2, 4, 5, 6), ""))
    for name, tensor in tensors.items():
        if tensor.dim() == 4 and name not in spec.batched:
            tensors[name] = tensor.to(memory_format=torch.channels_last)
    leaves = {name: t.requires_grad_(name in spec.differentiable) for name, t in tensors.items()}
    wanted = [name for name in spec.differentiable if name not in spec.batched]
    y = spec.function(**leaves, impl=impl)
    if not wanted:
        return
    for name, grad in zip(wanted, torch.autograd.grad(y.sum(), [leaves[name] for name in wanted]), strict=True):
        assert grad.stride() == leaves[name].stride() or impl == "reference", name


def test_flops_are_those_of_the_reference(spec, kernel):
    """In forward, as the papers count. Backward is twice that, or without weights the same; PyTorch counts depthwise
    gradients differently."""
    for options in spec.variants:
        leaves = leaves_of(spec, Case((2, 3, 4, 5), "", options))
        counts = []
        for impl in (kernel, "reference"):
            with FlopCounterMode(display=False) as counter:
                y = spec.function(**leaves, **options, impl=impl)
            counts.append(counter.get_total_flops())
        if spec.composite:
            assert 0 < counts[0] <= counts[1]
            continue
        assert counts[0] == counts[1] and (counts[0] > 0 or not spec.product_weight)
        y = spec.function(**leaves, **options, impl=kernel)
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        assert counter.get_total_flops() == min(2, len(spec.differentiable)) * counts[0]


GENERATORS = {  # multiply-adds: Table 6 of the SPN paper; 4.2 of the GConv paper's count
    "bn": ({"norm": "bn"}, 1_593_049_088),
    "spn": ({"norm": "spn"}, 1_793_982_464),
    "gconv": ({"norm": "bigbn", "conv": "gconv", "latent_dim": 32, "bias": False}, 1_769_357_312),
}
SAVED = {"gconv": 27 * 256**2 * (8**2 + 16**2 + 32**2) // 4}  # 3/4 of the convolutions of upsampled features


@pytest.mark.parametrize("which", GENERATORS)
def test_flops_of_the_papers_generators(which, impl):
    options, count = GENERATORS[which]
    generator = Generator(**options, impl=impl)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        generator(torch.randn(1, generator.fc.in_features))
    assert counter.get_total_flops() == 2 * (count - (0 if impl == "reference" else SAVED.get(which, 0)))


# --- replacements for PyTorch's functions


def test_statistics_of_a_whole_model():
    """Like swa_utils.update_bn, which finds PyTorch's norms only."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), pixnorm.SPN2d(4, momentum=0.3), nn.BatchNorm2d(4)).eval()
    model[2].requires_grad_(False)
    batches = [torch.randn(8, 3, 4, 4) for _ in range(3)]
    weights = copy.deepcopy(dict(model.named_parameters()))
    pixnorm.update_statistics([batches[0], (batches[1], None), {"input": batches[2]}], model)
    features = torch.cat([model[0](batch) for batch in batches])
    torch.testing.assert_close(model[1].running_mean, features.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    each = torch.stack([model[0](batch).var((0, 2, 3)) for batch in batches]).mean(0)
    torch.testing.assert_close(model[1].running_var, each, rtol=1e-4, atol=1e-5)
    assert not model.training and model[1].momentum == 0.3 and model[1].num_batches_tracked == 3
    plain = nn.BatchNorm2d(4, momentum=None)
    model[1].train()
    for batch in batches:
        plain(model[1](model[0](batch)))
    torch.testing.assert_close(model[2].running_var, plain.running_var, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())


def test_statistics_are_restored_after_an_error():
    model = nn.Sequential(pixnorm.SPN2d(4, momentum=0.3)).eval()
    with pytest.raises(ValueError, match="expected input of 4 channels, got 3"):
        pixnorm.update_statistics([torch.randn(2, 3, 4, 4)], model)
    assert not model.training and model[0].momentum == 0.3
    pixnorm.update_statistics([], nn.Identity())


def test_norms_are_found_by_their_classes():
    layers = [pixnorm.SPN2d(2), pixnorm.nn.LatentBatchNorm2d(2, 3), nn.BatchNorm2d(2), nn.SyncBatchNorm(2)]
    assert all(isinstance(layer, pixnorm.NORMS) for layer in layers)
    assert not isinstance(nn.Conv2d(1, 1, 1), pixnorm.NORMS)
    assert not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in layers[:2])


# --- checkpoints of models before conversion


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_a_batch_norm_checkpoint_loads_into_spn(strict, affine):
    torch.manual_seed(0)
    trained = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=affine))
    if affine:
        nn.init.normal_(trained[1].weight), nn.init.normal_(trained[1].bias)
    trained(torch.randn(8, 3, 4, 4))
    model = copy.deepcopy(trained)
    pixnorm.convert_batchnorm(model)
    model[1].gamma_weight.data.normal_()
    model.load_state_dict(trained.state_dict(), strict=strict)
    x = torch.randn(4, 3, 6, 6)
    difference = (model.eval()(x) - trained.eval()(x)).abs().max() / trained(x).abs().max()
    assert 0 < difference < 0.2  # the noise
    assert torch.equal(model[1].running_var, trained[1].running_var)
    own = copy.deepcopy(model)
    own[1].gamma_weight.data.zero_()
    own.load_state_dict(model.state_dict(), strict=strict)
    assert torch.equal(own(x), model(x))


def test_checkpoints_without_a_count_of_batches():
    """Like old checkpoints of PyTorch's batch norms, which load."""
    plain = nn.Sequential(nn.BatchNorm2d(4))
    state = {name: value for name, value in plain.state_dict().items() if "tracked" not in name}
    plain.load_state_dict(state)
    pixnorm.convert_batchnorm(plain).model.load_state_dict(state)
    norm = pixnorm.nn.LatentBatchNorm2d(4, 3)
    norm.load_state_dict({name: value for name, value in norm.state_dict().items() if "tracked" not in name})


def test_what_a_meta_layer_does_not_have_is_missing():
    with torch.device("meta"):
        spn, gconv = pixnorm.SPN2d(4), pixnorm.GConv2d(4, 4, 3, 2)
    with pytest.raises(RuntimeError, match="mask_projection"):
        spn.load_state_dict(nn.BatchNorm2d(4).state_dict(), assign=True)
    with pytest.raises(RuntimeError, match="scale_weight"):
        gconv.load_state_dict(nn.Conv2d(4, 4, 3, bias=False).state_dict(), assign=True)


def test_wrapped_layers_of_a_generator_get_their_latent_vectors():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    torch.manual_seed(0)
    generator = Generator(channels=8, latent_dim=4, norm="bigbn", conv="gconv", bias=False).eval()
    z = torch.randn(2, 4)
    expected = generator(z)
    wrapped = (pixnorm.GConv2d, pixnorm.nn.LatentBatchNorm2d)
    apply_activation_checkpointing(generator, check_fn=lambda module: isinstance(module, wrapped))
    torch.testing.assert_close(generator(z), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_latent_vectors_from_around_have_the_inputs_dtype(dtype):
    """FSDP casts a model's input but not these, so they are cast; a z that is passed is not."""
    layer, x, z = pixnorm.GConv2d(4, 4, 3, 3, dtype=dtype), torch.randn(2, 4, 6, 5, dtype=dtype), torch.randn(2, 3)
    with pixnorm.nn.latent(z):
        assert torch.equal(layer(x), layer(x, z.to(dtype)))
    with pytest.raises(TypeError, match="expected tensors of one dtype"):
        layer(x, z)


def test_a_pruned_layer_can_be_exported_and_compiled():
    """The NaN check of a weight that starts at zero runs in eager mode only."""
    layer = pixnorm.GConv2d(4, 4, 3, 3, init="zero").eval()
    prune.l1_unstructured(layer, "mix_weight", 0.3)
    x, z = torch.randn(2, 4, 6, 5), torch.randn(2, 3)
    exported = torch.export.export(layer, (x, z))
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(exported.module()(x, z), layer(x, z))
    torch.testing.assert_close(compiled(x, z), layer(x, z))


def test_layers_take_their_input_by_its_name():
    """The name is that of nn.BatchNorm2d and nn.Conv2d."""
    x, z = torch.randn(2, 4, 6, 5), torch.randn(2, 3)
    pixnorm.SPN2d(4)(input=x)
    pixnorm.GConv2d(4, 4, 3, 3)(input=x, z=z)
    pixnorm.nn.LatentBatchNorm2d(4, 3)(input=x, z=z)
    pixnorm.GLinear(3, 4, 3)(input=z, z=z)


def test_a_part_of_a_checkpoint_is_still_missing():
    with pytest.raises(RuntimeError, match="running_mean"):
        pixnorm.SPN2d(4).load_state_dict({"weight": torch.ones(4), "bias": torch.zeros(4)})
    with pytest.raises(RuntimeError, match="gamma_weight"):
        pixnorm.SPN2d(4).load_state_dict(nn.BatchNorm2d(3).state_dict())


@pytest.mark.parametrize("strict", [True, False])
def test_a_plain_convolutions_checkpoint_loads_into_gconv(strict):
    torch.manual_seed(0)
    trained = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model = copy.deepcopy(trained)
    pixnorm.convert_conv(model, latent_dim=5)
    model[0].mix_weight.data.normal_()
    model.load_state_dict(trained.state_dict(), strict=strict)
    x = torch.randn(2, 3, 6, 6)
    with pixnorm.nn.latent(torch.randn(2, 5)):
        torch.testing.assert_close(model(x), trained(x))


def test_older_checkpoints_of_the_latent_batch_norm_load():
    norm = pixnorm.nn.LatentBatchNorm2d(4, 3)
    norm(torch.randn(5, 4, 3, 2), torch.randn(5, 3))
    state = norm.state_dict()
    old = {f"norm.{name}" if "running" in name or "tracked" in name else name: value for name, value in state.items()}
    other = pixnorm.nn.LatentBatchNorm2d(4, 3)
    other.load_state_dict(old)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


# --- padding and inputs as in nn.Conv2d


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(1, 2), "same", "valid"], ids=str)
def test_padding_modes(impl, padding_mode, padding):
    conv = nn.Conv2d(3, 4, (3, 2), padding=padding, dilation=(1, 2), padding_mode=padding_mode, dtype=torch.float64)
    model = nn.Sequential(conv)
    result = pixnorm.convert_conv(model, latent_dim=2)
    assert result.replaced == ["0"]
    model[0].impl = impl
    x, z = torch.randn(2, 3, 6, 7, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    torch.testing.assert_close(model[0](x, z), conv(x), **CLOSE)
    nn.init.normal_(model[0].mix_weight)  # the scales come from the unpadded input
    s = torch.sigmoid(torch.cat([x.mean((2, 3)), z], 1) @ model[0].scale_weight.T)
    u = F.conv2d(*padded(conv, x), dilation=conv.dilation)
    expected = u + torch.einsum("ji,bi,bihw->bjhw", model[0].mix_weight, s, u) + conv.bias[:, None, None]
    torch.testing.assert_close(model[0](x, z), expected, **CLOSE)


def padded(conv, x):
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, conv._reversed_padding_repeated_twice, mode), conv.weight


def test_one_sample_without_a_batch(impl):
    conv = pixnorm.GConv2d(3, 4, 3, 2, impl=impl)
    x, z = torch.randn(3, 6, 7), torch.randn(2)
    expected = conv(x[None], z[None])[0]
    torch.testing.assert_close(conv(x, z), expected)
    torch.testing.assert_close(conv(x, z[None]), expected)
    with pixnorm.nn.latent(z[None]):
        torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize("spectral_norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_spectral_norm_of_nothing_is_an_error(spectral_norm):
    """Spectral norm divides by the norm of a weight that starts at zero."""
    x, z = torch.randn(2, 3, 5, 5), torch.randn(2, 2)
    conv = pixnorm.GConv2d(3, 4, 3, 2, init="zero")
    assert conv(x, z).isfinite().all()
    spectral_norm(conv, "mix_weight")
    with pytest.raises(RuntimeError, match=r"mix_weight is NaN: it starts at 0.*init='glorot'"):
        conv(x, z)
    other = spectral_norm(pixnorm.GConv2d(3, 4, 3, 2, init="zero"), "weight")
    assert other(x, z).isfinite().all()


@pytest.mark.cpu
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_a_channels_last_model_under_ddp_hears_no_complaint(layout, tmp_path):
    """Gradients have the strides of DDP's buckets."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        generator = Generator(norm="spn", channels=8, latent_dim=4)
        if layout == "channels_last":
            generator = generator.to(memory_format=torch.channels_last)
        model = nn.parallel.DistributedDataParallel(generator)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(2):
                model(torch.randn(2, 4)).sum().backward()
    finally:
        dist.destroy_process_group()
