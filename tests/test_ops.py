"""Every OpSpec x every check. Mathematical properties of single ops are in test_properties.py and test_<op>.py."""

import importlib
from functools import partial
from itertools import combinations

import pytest
import torch
from torch import nn

from pixnorm.testing import (
    DENSE_LAYOUTS,
    DTYPES,
    LAYOUTS,
    Case,
    available_impls,
    check_against_eager,
    evaluate,
    in_double,
    random,
    without_kink,
)

# One test checks that the number of threads does not change the bits, so the others run with one.
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.emulated]

HALF = (torch.bfloat16, torch.float16)


def name_of(value):
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return str(value)


def assert_same_bits(first, second):
    for (name, a), (_, b) in zip(first.named(), second.named(), strict=True):
        assert torch.equal(a, b), f"{name} differs by {(a.double() - b.double()).abs().max().item():.3g}"


def layout_of(tensor):
    """The strides that matter: those of dimensions larger than 1."""
    return [(dim, stride) for dim, stride in enumerate(tensor.stride()) if tensor.shape[dim] > 1]


# --- values


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("dtype, parameter_dtype", DTYPES, ids=name_of)
def test_forward_and_gradients(spec, case, kernel, dtype, parameter_dtype, layout):
    check_against_eager(spec, kernel, case, dtype, parameter_dtype, layout)


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_every_remainder(spec, variant, kernel, layout):
    """Each size modulo each vector width: columns in NCHW, channels in channels_last."""
    for size in range(2, 36):
        shape = (2, 2, 3, size) if layout == "contiguous" else (2, size, 2, 3)
        check_against_eager(spec, kernel, Case(shape, "sweep", variant), layout=layout)


@pytest.mark.emulated(runs=False)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_more_than_the_cache_holds(spec, variant, kernel, dtype):
    """Tensors above 1 MB are processed a few samples at a time: here four, and a remainder of one."""
    case = Case((5, 16, 60, 64), "1.2 MB in float32", variant)
    for layout in DENSE_LAYOUTS:
        # Plain PyTorch takes seconds for this in channels_last.
        check_against_eager(spec, kernel, case, dtype, layout=layout, eager_layouts=("contiguous",))


def test_the_specification_is_reachable(spec, impl):
    """The public function passes all arguments to each impl: in float64 the results agree closely."""
    for case in spec.cases:
        tensors = spec.inputs(case, torch.float64)
        actual, exact = (evaluate(spec, f, tensors, case.options) for f in (spec.call(impl), spec.reference))
        for (name, a), (_, b) in zip(actual.named(), exact.named(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


# --- layouts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(spec, kernel, layout, dtype):
    for shape in [(2, 3, 5, 7), (3, 16, 4, 8)]:
        for options in spec.variants:
            check_against_eager(spec, kernel, Case(shape, "strides", options), dtype, layout=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_are_not_modified(spec, impl, layout):
    for options in [{}, spec.variants[-1] | spec.inference]:
        tensors = spec.inputs(Case((2, 3, 4, 5), "", options), layout=layout)
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        evaluate(spec, spec.call(impl), tensors, options)
        assert all(torch.equal(tensors[name], before[name]) for name in tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_strides(spec, variant, kernel, layout):
    """channels_last in, channels_last out; everything else, contiguous. So for the gradients of activations."""
    for shape in [(2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1)]:
        few = variant.get("statistics", spec.statistics) == "instance" or variant.get("down") == 2
        if few and shape[2:] == (1, 1):
            continue  # one value has no statistics, and no mean of four
        tensors = spec.inputs(Case(shape, "strides", variant), layout=layout)
        x = tensors[spec.first]
        channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        result = evaluate(spec, spec.call(kernel), tensors, variant)
        for tensor in (result.y, *(result.grads[name] for name in spec.activations if name in result.grads)):
            expected = LAYOUTS["channels_last" if channels_last else "contiguous"](tensor)
            assert tensor.stride() == expected.stride()


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_reference_keeps_the_layout(spec, layout):
    tensors = spec.inputs(Case((2, 3, 4, 5), "strides"), layout=layout)
    assert layout_of(spec.reference(**tensors)) == layout_of(tensors[spec.first])


def test_other_strides_are_the_same_call(spec, kernel):
    """An input of any strides is made contiguous first: the same bits as for its contiguous copy."""
    for layout in ("sliced", "padded_rows", "padded_pixels", "transposed", "expanded"):
        tensors = spec.inputs(Case((2, 8, 6, 9), "strides"), layout=layout)
        dense = tensors | {name: tensors[name].contiguous() for name in spec.activations}
        assert_same_bits(*(evaluate(spec, spec.call(kernel), t, {}) for t in (tensors, dense)))


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_the_first_activation_decides_the_layout(spec, kernel, layout):
    """The others may have any layout; only their values matter."""
    dense = spec.inputs(Case((2, 8, 6, 9), "strides"), layout=layout)
    expected = evaluate(spec, spec.call(kernel), dense, {})
    for name in spec.activations[1:]:
        for other in LAYOUTS.keys() - {"expanded"}:
            actual = evaluate(spec, spec.call(kernel), dense | {name: LAYOUTS[other](dense[name])}, {})
            assert_same_bits(actual, expected)
            assert layout_of(actual.y) == layout_of(expected.y)


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_layout_of_the_incoming_gradient(spec, variant, kernel, layout):
    """Only the values of the gradient matter, not its strides; .sum() gives one of stride 0."""
    tensors = spec.inputs(Case((2, 16, 4, 6), "strides"), layout=layout)
    leaves = spec.leaves(tensors)
    y = spec.function(**leaves, **spec.constants(tensors), **variant, impl=kernel)

    def grads(grad_y):
        return torch.autograd.grad(y, list(leaves.values()), grad_y, retain_graph=True)

    ones = grads(torch.ones_like(y))
    for grad, expected in zip(grads(y.new_ones(()).expand_as(y)), ones, strict=True):
        assert torch.equal(grad, expected)
    grad_y = torch.randn_like(y)
    expected = grads(grad_y)
    for name in LAYOUTS.keys() - {"expanded"}:
        for grad, other in zip(grads(LAYOUTS[name](grad_y)), expected, strict=True):
            assert torch.equal(grad, other), name


def test_layout_of_the_parameters(spec, kernel):
    """Weights in channels_last, and slices of larger tensors, give the same bits."""

    def strided(tensor):
        if tensor.dim() == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        between = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min
        return torch.stack([tensor, torch.full_like(tensor, between)], -1)[..., 0]

    for options in [{}, spec.inference]:
        tensors = spec.inputs(Case((2, 5, 4, 6), "strides"))
        other = {name: t if name in spec.activations else strided(t) for name, t in tensors.items()}
        assert_same_bits(*(evaluate(spec, spec.call(kernel), t, options) for t in (tensors, other)))


# --- autograd


def test_gradcheck(spec, options, kernel):
    """The kernel's backward against numerical derivatives of its forward, in float64; and double backward."""
    case = Case((2, 2, 3, 2), "small enough for finite differences", options)
    for seed in range(100):
        tensors = spec.inputs(case, torch.float64, layout=DENSE_LAYOUTS[seed % 2], seed=seed)
        without = spec.reference(**in_double(tensors), **without_kink(options))
        if without.abs().min() > 1e-3:  # no kink within a finite difference
            break
    else:
        pytest.fail("every seed has an output next to the kink")
    leaves, constants = spec.leaves(tensors), spec.constants(tensors)
    buffers = {name: tensors[name] for name in spec.buffers if name in tensors}

    def function(*values):
        copies = {name: buffer.clone() for name, buffer in buffers.items()}
        differentiable = dict(zip(leaves, values, strict=True))
        return spec.function(**differentiable, **copies, **constants, **options, impl=kernel)

    assert torch.autograd.gradcheck(function, list(leaves.values()))
    # Through the reference, whose derivatives are PyTorch's own: random directions are enough.
    assert torch.autograd.gradgradcheck(function, list(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("dtype, parameter_dtype", DTYPES, ids=name_of)
def test_double_backward_sees_the_same_gradients(spec, variant, kernel, dtype, parameter_dtype):
    """Gradients computed for double backward (another code path) equal the plain ones."""
    for options in [variant, variant | spec.inference] if spec.inference else [variant]:
        check_double_backward(spec, kernel, Case((3, 4, 5, 6), "", options), dtype, parameter_dtype)


def check_double_backward(spec, kernel, case, dtype, parameter_dtype):
    tensors = spec.inputs(case, dtype, parameter_dtype=parameter_dtype)
    leaves = spec.leaves(tensors)
    y = spec.function(**(tensors | leaves), **case.options, impl=kernel)
    # Requires a gradient: that of a shift may depend on nothing else. Not the seed of the inputs: normalisation removes
    # from the gradient what is proportional to x, and only rounding errors would be left.
    grad_y = random(y.shape, torch.Generator().manual_seed(1)).to(dtype)
    if case.options.get("activation"):  # near the kink, rounding decides the derivative
        before = spec.reference(**in_double(tensors), **without_kink(case.options))
        grad_y[before.abs() <= 0.1 * before.std()] = 0
    grad_y.requires_grad_()
    plain, differentiable = (
        torch.autograd.grad(y, list(leaves.values()), grad_y, retain_graph=True, create_graph=create)
        for create in (False, True)
    )
    tolerance = 100 * torch.finfo(dtype).eps
    for name, a, b in zip(leaves, plain, differentiable, strict=True):
        assert a.dtype == b.dtype and b.requires_grad, name
        assert (a - b).abs().max() <= tolerance * a.abs().max(), name


def test_any_subset_of_the_inputs_may_need_a_gradient(spec, impl):
    tensors = spec.inputs(Case((2, 3, 4, 5), ""), torch.float64)
    expected = evaluate(spec, spec.call(impl), tensors, {}).grads
    grad_y = random((2, 3, 4, 5), torch.Generator().manual_seed(1))
    for create_graph in (False, True):
        for name in spec.differentiable:
            leaf = tensors[name].detach().requires_grad_()
            y = spec.function(**(tensors | {name: leaf}), impl=impl)
            (grad,) = torch.autograd.grad(y, leaf, grad_y, create_graph=create_graph)
            torch.testing.assert_close(grad, expected[name])


def test_one_tensor_in_two_places(spec, impl):
    """A tensor passed as two arguments gets the sum of their gradients, once."""
    tensors = spec.inputs(Case((3, 3, 4, 5), ""), torch.float64)
    pairs = combinations(reversed(spec.differentiable), 2)
    first, second = next((pair for pair in pairs if len({tensors[name].shape for name in pair}) == 1), (None, None))
    if first is None:
        return  # no two arguments have the same shape
    tensors[second] = tensors[first]
    expected = evaluate(spec, spec.call("reference"), tensors, {}).grads
    shared = tensors[first].detach().requires_grad_()
    grad_y = random((3, 3, 4, 5), torch.Generator().manual_seed(1))
    for create_graph in (False, True):
        y = spec.function(**(tensors | {first: shared, second: shared}), impl=impl)
        (grad,) = torch.autograd.grad(y, shared, grad_y, create_graph=create_graph)
        torch.testing.assert_close(grad, expected[first] + expected[second])


def test_no_grad_is_the_same_forward(spec, kernel):
    tensors = spec.inputs(Case((3, 5, 6, 7), ""))
    given = spec.leaves(tensors) | spec.constants(tensors)
    with_grad = spec.function(**given, impl=kernel)
    with torch.no_grad():
        without = spec.function(**given, impl=kernel)
    assert with_grad.requires_grad and not without.requires_grad
    assert torch.equal(with_grad, without)


# --- torch.compile, export, autocast


def kernel_arguments(spec, kernel):
    for layout in DENSE_LAYOUTS:
        for options in [*spec.variants, spec.inference]:
            case = Case((2, 3, 4, 5), "", options)
            yield from spec.kernel_calls(kernel, spec.inputs(case, layout=layout), options)
    # Only the statistics have another dtype than the other outputs.
    case = Case((2, 3, 4, 5), "", spec.variants[-1])
    tensors = spec.inputs(case, torch.bfloat16, parameter_dtype=torch.float32, layout="sliced")
    yield from spec.kernel_calls(kernel, tensors, case.options)
    yield from spec.kernel_calls(kernel, spec.inputs(Case((0, 3, 4, 5), "")), {})


def test_opcheck(spec, kernel):
    """The kernels match their schemas, and the shapes, dtypes and strides of their fakes."""
    for op, args in kernel_arguments(spec, kernel):
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_compile(spec, impl, layout, sizes_equal_by_chance):
    """One graph, forward and backward, buffers updated, for all shapes."""
    torch.compiler.reset()
    options = spec.variants[-1]
    compiled = torch.compile(spec.call(impl), fullgraph=True, backend="aot_eager", dynamic=True)
    check_compiled(spec, impl, compiled, spec.inputs(Case((2, 3, 4, 5), "", options), layout=layout), options)
    with torch.compiler.set_stance("fail_on_recompile"):
        # Divisible by the same powers of two, on which Triton specialises its kernels.
        tensors = spec.inputs(Case((3, 3, 12, 7), "", options), layout=layout)
        check_compiled(spec, impl, compiled, tensors, options)


@pytest.fixture
def convolution_precision():
    """``torch.backends.cudnn.conv``, restored afterwards."""
    before = torch.backends.cudnn.conv.fp32_precision
    yield torch.backends.cudnn.conv
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.products
@pytest.mark.emulated(runs=False)
def test_compile_sees_the_tf32_flag(spec, kernel, monkeypatch, convolution_precision):
    """The flag of convolutions, by its older name (a change recompiles) and by its newer one."""
    torch.compiler.reset()
    tensors, allowed = spec.inputs(Case((2, 3, 4, 5), "")), []

    def backend(graph, _):
        allowed.extend(node.args[-1] for node in graph.graph.nodes if f"{spec.name}_fwd" in str(node.target))
        return graph.forward

    compiled = torch.compile(spec.call(kernel), fullgraph=True, backend=backend)
    for flag in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", flag)
        compiled(**tensors)
    assert allowed == [False, True]
    monkeypatch.undo()

    torch.compiler.reset()
    convolution_precision.fp32_precision = "tf32"
    torch.compile(spec.call(kernel), fullgraph=True, backend=backend)(**tensors)
    assert allowed[2:] == [True]


@pytest.mark.emulated(runs=False)
def test_compile_to_machine_code(spec, kernel):
    """Inductor's code for the op and its surroundings, in training and in inference."""
    torch.compiler.reset()
    compiled = torch.compile(spec.call(kernel), fullgraph=True)
    for options, layout in [({}, "contiguous"), (spec.variants[-1] | spec.inference, "channels_last")]:
        tensors = spec.inputs(Case((2, 3, 4, 5), "", options), layout=layout)
        check_compiled(spec, kernel, compiled, tensors, options)


def check_compiled(spec, impl, compiled, tensors, options):
    result, expected = (evaluate(spec, f, tensors, options) for f in (compiled, spec.call(impl)))
    for (name, a), (_, b) in zip(result.named(), expected.named(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
    assert layout_of(result.y) == layout_of(expected.y)


class Wrapped(nn.Module):
    """The op as a module would call it."""

    def __init__(self, spec, tensors, options, impl):
        super().__init__()
        self.function, self.options, self.names = spec.call(impl), options, spec.batched
        for name, tensor in tensors.items():
            if name not in spec.batched:
                self.register_buffer(name, tensor)

    def forward(self, *samples):
        arguments = dict(zip(self.names, samples, strict=True)) | dict(self.named_buffers())
        return self.function(**arguments, **self.options)


@pytest.mark.emulated(runs=False)
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_export(spec, variant, impl, layout):
    options = variant | spec.inference
    batch = torch.export.Dim("batch", min=1)

    def samples(n, seed):
        tensors = spec.inputs(Case((n, 3, 4, 5), "", options), layout=layout, seed=seed)
        return tuple(tensors[name] for name in spec.batched)

    module = Wrapped(spec, spec.inputs(Case((2, 3, 4, 5), "", options)), options, impl).eval()
    dynamic = ({0: batch},) * len(spec.batched)
    exported = torch.export.export(module, samples(2, 0), dynamic_shapes=(dynamic,))
    if impl == "native":
        assert f"pixnorm.{spec.name}_fwd" in exported.graph_module.code
    for n in (2, 5):
        arguments = samples(n, 1)
        torch.testing.assert_close(exported.module()(*arguments), module(*arguments))


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_autocast(spec, impl, dtype):
    """After a convolution under autocast, with float32 parameters: half-precision output, as for batch norm."""
    tensors = spec.inputs(Case((2, 4, 5, 6), ""))
    conv = nn.Conv2d(3, 4, 3, padding=1)
    leaves = spec.leaves(tensors)
    del leaves[spec.first]
    with torch.autocast(conv.weight.device.type, dtype=dtype):
        activations = {spec.first: conv(torch.randn(2, 3, 5, 6))}
        assert activations[spec.first].dtype == dtype
        activations |= {name: leaves.get(name, tensors[name]).to(dtype) for name in spec.activations[1:]}
        y = spec.function(**(leaves | spec.constants(tensors) | activations), impl=impl)
    y.float().square().mean().backward()
    assert y.dtype == dtype
    assert all(leaf.grad.dtype == torch.float32 and leaf.grad.isfinite().all() for leaf in leaves.values())
    assert conv.weight.grad.isfinite().all()


# --- the same bits


@pytest.mark.emulated(runs=False)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 64, 16, 16), (16, 33, 4, 4), (1, 3, 150, 131)], ids=str)
def test_two_runs_are_bit_identical(spec, kernel, shape, layout, dtype, threads):
    threads(2)
    for options in spec.variants:
        tensors = spec.inputs(Case(shape, "", options), dtype, layout=layout)
        first = evaluate(spec, spec.call(kernel), tensors, options)
        for _ in range(3):
            copies = {name: tensor.clone() for name, tensor in tensors.items()}
            assert_same_bits(evaluate(spec, spec.call(kernel), copies, options), first)


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 64, 16, 16), (7, 33, 4, 4), (1, 3, 150, 131), (3, 5, 33, 40)], ids=str)
def test_any_number_of_threads_gives_the_same_bits(spec, kernel, shape, layout, dtype, threads):
    for options in spec.variants:
        tensors = spec.inputs(Case(shape, "", options), dtype, layout=layout)
        threads(1)
        one = evaluate(spec, spec.call(kernel), tensors, options)
        for number in (2, 3):
            threads(number)
            assert_same_bits(one, evaluate(spec, spec.call(kernel), tensors, options))


# --- special inputs


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_empty_batch(spec, variant, impl, layout):
    """Empty output, zero gradients, unchanged buffers."""
    for options in [variant, variant | spec.inference]:
        tensors = spec.inputs(Case((0, 3, 5, 7), "", options), layout=layout)
        result = evaluate(spec, spec.call(impl), tensors, options)
        one = spec.inputs(Case((1, 3, 5, 7), "", options), layout=layout)
        assert result.y.shape == (0, *spec.reference(**one, **options).shape[1:])
        assert all(grad.shape == tensors[name].shape and not grad.any() for name, grad in result.grads.items())
        assert all(torch.equal(buffer, tensors[name]) for name, buffer in result.buffers.items())


# --- vector code for older CPUs


def lesser_capabilities():
    """The capabilities below this machine's own."""
    if "native" not in available_impls("cpu"):
        return ()
    names = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
    return names[: names.index(importlib.import_module("pixnorm._C").cpu_capability())]


CORE = "(test_forward_and_gradients and not float16) or test_every_remainder or test_two_runs or test_statistics.py"
# From AVX-512 on, instruction sets differ in products of bfloat16 only.
PRODUCTS = "(spn or gconv) and ((test_forward_and_gradients and bfloat16) or test_two_runs)"


@pytest.mark.cpu
@pytest.mark.parametrize(
    "capability",
    [
        pytest.param(
            capability,
            marks=pytest.mark.beside(
                "tests/test_ops.py",
                "tests/test_statistics.py",
                "-x",
                "-k",
                f"({PRODUCTS if 'avx512' in capability else f'{CORE} or {PRODUCTS}'}) and not native-cuda-emulated",
                environment=partial(dict, PIXNORM_CPU_CAPABILITY=capability),
            ),
        )
        for capability in lesser_capabilities()
    ],
)
def test_cpu_capability(capability, beside):
    """The core checks with the vector code of an older CPU."""
    assert beside.returncode == 0 and " passed" in beside.stdout, beside.stdout[-4000:]
