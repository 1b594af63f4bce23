"""The Triton ops, as far as they can be tested without a GPU. Machine code is tested in test_triton_code.py."""

import builtins
import dis
import functools
import importlib
import importlib.metadata
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition  # Inductor's
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import pixnorm
from pixnorm.functional import blur2d, gconv_mix, label_conv2d, spn
from pixnorm.ops import _dispatch
from pixnorm.ops import blur as blur_module
from pixnorm.ops import class_parameters as class_parameters_module
from pixnorm.ops import gconv as gconv_module
from pixnorm.ops import label_conv as label_conv_module
from pixnorm.ops import modulate as modulate_module
from pixnorm.ops import modulated_conv as modulated_conv_module
from pixnorm.ops import spn as spn_module
from pixnorm.ops import style as style_module
from pixnorm.testing import CONDITIONAL_SPN, GCONV_MIX, MODULATE, MODULATE_MAPS, SPN, Case
from pixnorm.testing.gate import CHANNEL_GATE, SPATIAL_GATE
from pixnorm.testing.style import BARE, ONE_NOISE, STYLE_EPILOGUE, STYLE_NORM

triton = pytest.importorskip("triton", reason="Triton is for Linux")

ROOT = Path(__file__).parents[1]


def versions(*packages):
    """Major and minor version of each."""
    return [tuple(map(int, importlib.metadata.version(package).split(".")[:2])) for package in packages]


@pytest.mark.cpu
@pytest.mark.skipif(
    versions("triton") < [(3, 7)] and versions("numpy") >= [(2, 4)],
    reason="Triton 3.6 cannot interpret beside NumPy 2.4 or newer",
)
@pytest.mark.beside("tests/interpreted", environment=lambda: {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
def test_kernels_under_the_interpreter(beside):
    """In a process of its own: whether kernels are interpreted is decided when they are imported."""
    assert beside.returncode == 0, beside.stdout[-6000:]
    assert " passed" in beside.stdout and "skipped" not in beside.stdout


# --- torch.compile


class PretendedGPU:
    """The part of Triton's driver that PyTorch and Triton use before they compile."""

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Treats CPU tensors as GPU tensors. Kernels can be compiled, but not run."""
    assert _dispatch.find_triton_obstacle("meta", None) is None
    monkeypatch.setattr(_dispatch, "triton_obstacles", {("cpu", None): None})
    monkeypatch.setattr(triton.runtime.driver, "_active", PretendedGPU())


BACKWARD = ["bwd_reduce", "bwd_finish", "bwd_apply"]  # of SPN and of modulated norm
OF_GROUPS = ["bwd_reduce", "bwd_finish", "bwd_finish_rows", "bwd_apply"]
# What each kernel writes. PyTorch copies all that a kernel may write, as far as it can tell from its code.
WRITTEN = {
    "statistics": "partials",
    "merge_statistics": "merged",
    "finish_statistics": "mean var other_mean other_var",
    "spn_projection": "out partials",
    "spn_fwd_modulate": "y",
    "spn_bwd_reduce": "sums dm",
    "spn_bwd_finish": "d_gamma d_gamma_inv d_beta d_beta_inv d_mask_weight d_mask_bias means",
    "spn_bwd_finish_rows": "d_gamma_bias d_beta_bias means",
    "spn_bwd_apply": "dx dp",
    "modulate_fwd": "mean var y",
    "modulate_bwd_reduce": "d_gamma d_beta sums",
    "modulate_bwd_finish": "d_gamma d_beta means",
    "modulate_bwd_apply": "dx",
    "modulate_fwd_resident": "mean var y",
    "modulate_bwd_resident": "d_gamma d_beta dx",
    "gconv_mix_fwd": "y",
    "gconv_mix_bwd_input": "grad_u partials",
    "gconv_mix_bwd_weight": "weights biases",
    "blur2d": "y",
    "gate_pool": "pooled index sums tops places",
    "gate_pool_finish": "pooled index",
    "gate_fwd": "y",
    "gate_reduce": "grad sums",
    "gate_reduce_finish": "grad",
    "gate_bwd": "dx",
    "label_conv_fwd": "y",
    "spatial_scale_fwd": "y sums",
    "spatial_scale_bwd": "dx ds",
    "label_conv_grad": "sums",
    "style_epilogue_fwd": "y",
    "style_epilogue_bwd": "dx sums",
    "style_finish": "first second strength bias",
    "style_norm_statistics": "partials",
    "style_norm_fwd": "y",
    "style_norm_bwd_reduce": "sums",
    "style_norm_bwd_apply": "dx sums",
    "style_norm_fwd_resident": "mean var y",
    "style_norm_bwd_resident": "dx sums",
    "class_parameters_fwd": "to_mask_weight to_mask_bias to_gamma to_gamma_inv to_beta to_beta_inv",
    "class_parameters_tables": "to_mask_weight to_mask_bias to_scale to_shift",
    "class_parameters_kernels": "to_gamma to_gamma_inv to_beta to_beta_inv",
}
STATISTICS = ["statistics", "merge_statistics", "finish_statistics"]


@pytest.mark.cpu
@pytest.mark.parametrize(
    "spec, layout, options, sizes, allow_tf32, dynamic, forward, backward",
    [
        (
            SPN,
            "contiguous",
            {},
            {},
            True,
            False,
            ["projection", "finish_statistics", "modulate"],
            [*BACKWARD, "projection", "conv"],
        ),
        (
            SPN,
            "channels_last",
            {"upsample": 2, "activation": "relu"},
            {},
            False,
            True,
            ["conv", "statistics", "finish_statistics", "modulate"],
            [*BACKWARD, "conv"],
        ),
        (
            SPN,
            "channels_last",
            {"training": False},
            {},
            True,
            False,
            ["conv", "modulate"],
            [*BACKWARD, "projection", "conv"],
        ),
        (
            SPN,
            "contiguous",
            {},
            {"masks": 1},
            True,
            False,
            ["conv", "statistics", "finish_statistics", "statistics", "finish_statistics", "modulate"],
            [*BACKWARD, "conv"],
        ),
        (
            CONDITIONAL_SPN,
            "contiguous",
            {"upsample": 2},
            {},
            True,
            True,
            ["projection", "finish_statistics", "modulate"],
            [*OF_GROUPS, "projection", "conv"],
        ),
        (
            CONDITIONAL_SPN,
            "channels_last",
            {"activation": "relu"},
            {"masks": 1, "rows": 0},
            True,
            False,
            ["conv", "statistics", "finish_statistics", "statistics", "finish_statistics", "modulate"],
            [*OF_GROUPS, "conv"],
        ),
        (GCONV_MIX, "contiguous", {}, {}, True, True, ["mix_fwd"], ["mix_bwd_input", "mix_bwd_weight"]),
        (MODULATE, "contiguous", {}, {}, False, False, ["statistics", "modulate_fwd"], BACKWARD),
        (
            MODULATE,
            "channels_last",
            {"upsample": 2, "activation": "relu"},
            {"affine": 1},
            False,
            True,
            ["statistics", "modulate_fwd"],
            BACKWARD,
        ),
        (MODULATE, "contiguous", {"training": False}, {"affine": 0}, False, False, ["modulate_fwd"], BACKWARD),
        (
            MODULATE_MAPS,
            "contiguous",
            {"statistics": "instance", "activation": "leaky_relu"},
            {},
            False,
            True,
            ["modulate_fwd_resident"],
            ["modulate_bwd_resident"],
        ),
        (
            MODULATE,
            "channels_last",
            {"statistics": "instance"},
            {"affine": 1},
            False,
            False,
            ["modulate_fwd_resident"],
            ["modulate_bwd_resident"],
        ),
        (
            MODULATE,
            "contiguous",
            {"statistics": "instance", "upsample": 2},
            {"affine": 0},
            False,
            False,
            ["statistics", "finish_statistics", "modulate_fwd"],
            BACKWARD,
        ),
        (GCONV_MIX, "channels_last", {}, {"bias": 0}, False, False, ["mix_fwd"], ["mix_bwd_input", "mix_bwd_weight"]),
        (STYLE_EPILOGUE, "contiguous", {"gain": 2**0.5}, {}, False, True, ["fwd"], ["bwd", "finish"]),
        (STYLE_EPILOGUE, "channels_last", {}, ONE_NOISE | {"demod": 0}, False, False, ["fwd"], ["bwd", "finish"]),
        (STYLE_EPILOGUE, "contiguous", {}, BARE | {"demod": 0, "next_styles": 0}, False, False, ["fwd"], ["bwd"]),
        (STYLE_NORM, "contiguous", {}, {}, False, False, ["fwd_resident"], ["bwd_resident", "finish"]),
        (STYLE_NORM, "channels_last", {}, ONE_NOISE, False, True, ["fwd_resident"], ["bwd_resident", "finish"]),
    ],
    ids=str,
)
def test_the_compiler_sees_the_kernels(
    pretended_gpu, monkeypatch, spec, layout, options, sizes, allow_tf32, dynamic, forward, backward
):
    """No graph break. The graphs contain our kernels and PyTorch's convolutions, and no opaque op."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allow_tf32)
    tensors = spec.inputs(Case((2, 8, 4, 8), "", options, sizes=sizes), layout=layout)
    y, graphs = traced(functools.partial(spec.call("triton"), **options), tensors, spec.differentiable, dynamic)
    upsample = options.get("upsample", 1)
    assert y.shape == (2, 8, 4 * upsample, 8 * upsample)
    assert y.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")
    check_graphs(graphs, spec.name, (forward, backward))


@pytest.mark.cpu
@pytest.mark.parametrize("sizes, dynamic, finish", [({}, True, ["finish"]), (BARE, False, [])], ids=str)
def test_the_compiler_sees_the_kernels_of_large_planes(pretended_gpu, monkeypatch, sizes, dynamic, finish):
    """Of StyleGAN 1's epilogue, as if no plane fitted registers."""
    kernels = importlib.import_module("pixnorm.triton_kernels.style")
    for limit in ("RESIDENT", "RESIDENT_BACKWARD"):
        monkeypatch.setattr(kernels, limit, 0)
    tensors = STYLE_NORM.inputs(Case((2, 8, 4, 8), "", sizes=sizes))
    _, graphs = traced(STYLE_NORM.call("triton"), tensors, STYLE_NORM.differentiable, dynamic)
    forward = ["norm_statistics", "finish_statistics", "norm_fwd"]
    check_graphs(graphs, "style_norm", (forward, ["bwd_reduce", "style_finish", "bwd_apply", *finish]))


@pytest.mark.cpu
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_compiler_sees_the_kernels_of_label_convolution(pretended_gpu, dynamic):
    tensors = {"weight": torch.randn(8, 5, 3, 3), "bias": torch.randn(8), "labels": torch.randint(5, (2, 4, 6))}
    function = functools.partial(label_conv2d, activation="relu", impl="triton")
    y, graphs = traced(function, tensors, ("weight", "bias"), dynamic)
    assert y.shape == (2, 8, 4, 6)
    check_graphs(graphs, "label_conv", (["label_conv_fwd"], ["label_conv_grad"]))


@pytest.mark.cpu
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_compiler_sees_the_kernels_of_class_parameters(pretended_gpu, dynamic):
    layer = pixnorm.ConditionalSPN2d(8, 5)
    names = ["mask_weight", "mask_bias", *pixnorm.nn.spn.KERNELS, "kernel_scale", "kernel_shift"]
    tensors = {name: getattr(layer, name).detach() for name in names} | {"classes": torch.tensor([3, 1, 3])}

    def function(classes, **tensors):
        formed = class_parameters_module.class_parameters(classes, *tensors.values(), impl="triton")
        return torch.cat([t.flatten() for t in formed])

    _, graphs = traced(function, tensors, names, dynamic)
    kernels = ["class_parameters_fwd"], ["class_parameters_tables", "class_parameters_kernels"]
    check_graphs(graphs, "class_parameters", kernels)


@pytest.mark.cpu
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("options, size", [({}, (5, 6)), ({"up": 2}, (10, 12)), ({"down": 2}, (2, 3))], ids=str)
def test_the_compiler_sees_the_kernel_of_the_blur(pretended_gpu, options, size, dynamic):
    function = functools.partial(blur2d, **options, impl="triton")
    y, graphs = traced(function, {"x": torch.randn(2, 3, 5, 6)}, ("x",), dynamic)
    assert y.shape == (2, 3, *size)
    check_graphs(graphs, "blur2d_", (["blur2d"], ["blur2d"]))


@pytest.mark.cpu
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "spec, forward, backward",
    [
        (CHANNEL_GATE, ["gate_pool", "gate_fwd"], ["gate_reduce", "gate_bwd"]),
        (
            SPATIAL_GATE,
            ["gate_pool", "convolution", "statistics", "modulate_fwd", "gate_fwd"],
            ["gate_reduce", *(f"modulate_{name}" for name in BACKWARD), "convolution", "convolution", "gate_bwd"],
        ),
    ],
    ids=str,
)
def test_the_compiler_sees_the_kernels_of_gates(pretended_gpu, spec, forward, backward, dynamic):
    tensors = spec.inputs(Case((2, 8, 4, 6), ""))
    _, graphs = traced(spec.call("triton"), tensors, spec.differentiable, dynamic)
    check_graphs(graphs, "gate", (forward, backward))


def traced(function, tensors, differentiable, dynamic):
    """The output, and the graphs of forward and backward."""
    torch.compiler.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv() if dynamic else None) as mode:
        fakes = {name: mode.from_tensor(tensor, static_shapes=not dynamic) for name, tensor in tensors.items()}
        leaves = [fakes[name].requires_grad_() for name in differentiable if name in fakes]
        backend = aot_autograd(fw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
        y = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)(**fakes)
        grads = torch.autograd.grad(y.sum(), leaves)
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]
    return y, graphs


def check_graphs(graphs, op, kernels):
    """Their kernels and convolutions, parts of names; none of them may look as if it wrote what it reads."""
    assert f"pixnorm.{op}" not in graphs[0].code + graphs[1].code
    for graph, wanted in zip(graphs, kernels, strict=True):
        nodes = [node for node in graph.graph.nodes if name_of_kernel(node)]
        found = [name_of_kernel(node) for node in nodes]
        assert len(found) == len(wanted), found
        assert all(part in name for part, name in zip(wanted, found, strict=True)), found
        for node in nodes:
            # Written arguments are cloned one by one; if two were the same tensor, only one clone would be written.
            arguments = node.kwargs.get("kwargs", {})
            names = node.kwargs.get("tensors_to_clone", ())
            if arguments:
                kernel = name_of_kernel(node).removesuffix("_kernel")
                assert {*names} <= {f"{name}_ptr" for name in WRITTEN[kernel].split()}, kernel
            written = [arguments[name] for name in names]
            assert all(list(arguments.values()).count(tensor) == 1 for tensor in written), node


def name_of_kernel(node):
    """The name of a graph node, if it is a kernel or a convolution."""
    if "kernel_idx" in node.kwargs:
        return kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).fn.__name__
    return "convolution" if node.op == "call_function" and "convolution" in str(node.target) else None


@pytest.mark.cpu
def test_pytorch_finds_the_kernels_of_the_ops():
    """Their source is part of the key of cached graphs, so an upgrade of pixnorm invalidates those."""
    assert _dispatch.find_triton_obstacle("meta", None) is None
    from torch._library.triton import get_triton_kernels_for_op

    for op, names in {
        "spn_fwd_triton": ["spn_projection", "spn_fwd_modulate", *STATISTICS],
        "spn_bwd_triton": ["spn_projection", "spn_bwd_finish_rows", *(f"spn_{name}" for name in BACKWARD)],
        "modulate_fwd_triton": ["modulate_fwd", "modulate_fwd_resident", *STATISTICS],
        "modulate_bwd_triton": [f"modulate_{name}" for name in (*BACKWARD, "bwd_resident")],
        "gconv_mix_fwd_triton": ["gconv_mix_fwd"],
        "gconv_mix_bwd_triton": ["gconv_mix_bwd_input", "gconv_mix_bwd_weight"],
        "blur2d_fwd_triton": ["blur2d"],
        "blur2d_bwd_triton": ["blur2d"],
        "gate_pool_triton": ["gate_pool", "gate_pool_finish"],
        "gate_fwd_triton": ["gate_fwd"],
        "gate_reduce_triton": ["gate_reduce", "gate_reduce_finish"],
        "gate_bwd_triton": ["gate_bwd"],
        "spatial_scale_fwd_triton": ["spatial_scale_fwd"],
        "spatial_scale_bwd_triton": ["spatial_scale_bwd"],
        "label_conv_fwd_triton": ["label_conv_fwd"],
        "label_conv_grad_triton": ["label_conv_grad"],
        "style_epilogue_fwd_triton": ["style_epilogue_fwd"],
        "style_epilogue_bwd_triton": ["style_epilogue_bwd", "style_finish"],
        "style_norm_fwd_triton": [f"style_norm_{name}" for name in ("statistics", "fwd", "fwd_resident")]
        + ["merge_statistics", "finish_statistics"],
        "style_norm_bwd_triton": [f"style_norm_bwd_{name}" for name in ("reduce", "apply", "resident")]
        + ["style_finish"],
        "class_parameters_fwd_triton": ["class_parameters_fwd"],
        "class_parameters_grad_triton": ["class_parameters_tables", "class_parameters_kernels"],
    }.items():
        found = {kernel.fn.__name__ for kernel in get_triton_kernels_for_op(f"pixnorm::{op}")}
        assert found == {f"{name}_kernel" for name in names}


KERNELS = sorted(path.stem for path in (ROOT / "triton_kernels").glob("[!_]*.py"))


@pytest.mark.cpu
@pytest.mark.parametrize("module", KERNELS)
def test_inductor_copies_all_that_a_kernel_needs(module, tmp_path):
    """Inductor copies the source of a kernel. Of its globals it copies only functions of Triton and constants."""
    from torch._inductor.codegen.wrapper import user_defined_triton_kernel_transitive_closure_source_code as copied

    assert _dispatch.find_triton_obstacle("meta", None) is None
    functions = vars(importlib.import_module(f"pixnorm.triton_kernels.{module}")).items()
    kernels = [value for name, value in functions if isinstance(value, triton.JITFunction) and name.endswith("_kernel")]
    for kernel in kernels:
        code = compile(copied(kernel), "copied", "exec")
        functions = [part for part in code.co_consts if isinstance(part, types.CodeType)]
        known = {"tl", *code.co_names, *vars(builtins)}
        assert functions
        for function in functions:
            names = {i.argval for i in dis.get_instructions(function) if i.opname == "LOAD_GLOBAL"}
            assert names <= known, (kernel.__name__, function.co_name, names - known)


OPS_OF = {
    "spn": spn_module.ops_of,
    "gconv": gconv_module.ops_of,
    "modulate": modulate_module.ops_of,
    "label_conv": label_conv_module.ops_of,
    "class_parameters": class_parameters_module.ops_of,
    "blur2d": blur_module.ops_of,
    "spatial_scale": modulated_conv_module.ops_of,
    "style_epilogue": style_module.epilogue_ops_of,
    "style_norm": style_module.norm_ops_of,
}


@pytest.mark.parametrize("op", OPS_OF)
def test_the_ops_have_the_schemas_of_the_native_ones(op):
    assert _dispatch.find_triton_obstacle("meta", None) is None
    for native, ours in zip(OPS_OF[op]("native"), OPS_OF[op]("triton"), strict=True):
        for of in ("arguments", "returns"):
            types_of = [[str(value.type) for value in getattr(op._schema, of)] for op in (native, ours)]
            assert types_of[0] == types_of[1]
        assert [a.name for a in native._schema.arguments] == [a.name for a in ours._schema.arguments]


# --- the choice


@pytest.mark.cpu
def test_kernels_are_imported_only_when_needed():
    """torch._dynamo, the slowest import, is also not imported before something is compiled."""
    code = "import sys, torch, pixnorm\n"
    code += "assert not {'torch._dynamo', 'triton'} & sys.modules.keys()\n"
    code += "pixnorm.SPN2d(4)(torch.randn(2, 4, 3, 3)).sum().backward()\n"
    code += "assert 'pixnorm.ops.spn' in sys.modules\n"
    code += "assert not [name for name in sys.modules if name.startswith('pixnorm.triton_kernels.')]"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.cpu
def test_without_triton_pixnorm_runs():
    code = "import sys; sys.modules['triton'] = None\nimport torch, pixnorm\n"
    code += "pixnorm.SPN2d(4)(torch.randn(2, 4, 3, 3)).sum().backward()\n"
    code += "print(pixnorm.backends()['triton'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("unavailable: Triton is not there") and "pip install triton" in done.stdout
    assert done.stderr == ""


@pytest.fixture
def nothing_known(monkeypatch):
    monkeypatch.setattr(_dispatch, "triton_obstacles", {})
    monkeypatch.setattr(_dispatch, "fallbacks", {})


def with_triton(monkeypatch, version):
    if version is None:
        real_import = builtins.__import__

        def without_triton(name, *args, **options):
            if name.partition(".")[0] == "triton":
                raise ImportError("No module named 'triton'")
            return real_import(name, *args, **options)

        monkeypatch.delitem(sys.modules, "triton")
        monkeypatch.setattr(builtins, "__import__", without_triton)
    else:
        monkeypatch.setattr(triton, "__version__", version)


REFUSALS = {
    "missing": (None, "cpu", ["No module named 'triton'", "pip install triton"]),
    "too old": ("3.5.1", "cpu", ["3.5.1 is too old", "triton>=3.6"]),
    "no GPU": (triton.__version__, "cpu", ["need a GPU", "TRITON_INTERPRET=1"]),
}


@pytest.mark.cpu
@pytest.mark.parametrize("which", REFUSALS)
def test_a_named_impl_says_what_is_missing_and_auto_goes_on(monkeypatch, nothing_known, which):
    version, _, words = REFUSALS[which]
    tensors = SPN.inputs(Case((2, 3, 4, 5), ""))
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with_triton(monkeypatch, version)
    with pytest.raises(RuntimeError, match=r"spn: impl='triton' cannot run here: .*" + ".*".join(words)):
        spn(**tensors, impl="triton")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before.items())
    report = pixnorm.backends()["triton"]
    assert report.startswith("unavailable: ") and all(word in report for word in words)
    spn(**tensors)


@pytest.mark.parametrize("version, enough", [("3.5.1", False), ("3.6.0", True), ("3.7.1+git1", True), ("4.0", True)])
def test_versions(monkeypatch, version, enough):
    monkeypatch.setattr(triton, "__version__", version)
    assert (_dispatch.find_triton_obstacle("meta", None) is None) == enough


def test_gpus_that_triton_does_not_reach(monkeypatch):
    assert "device type 'mps'" in _dispatch.find_triton_obstacle("mps", None)
    assert "does not start" in _dispatch.find_triton_obstacle("cuda", 0) or torch.cuda.is_available()
    monkeypatch.setattr(triton.runtime.driver, "_active", PretendedGPU())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, reached in [((7, 5), False), ((8, 0), True)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, found=capability: found)
        assert (_dispatch.find_triton_obstacle("cuda", 0) is None) == reached


@pytest.mark.parametrize(
    "native, refusal, on_triton, preferred, chosen",
    [
        (None, None, None, "native", "native"),
        (None, None, None, "triton", "triton"),
        (None, None, "too old", "triton", "native"),
        ("not built", None, None, "native", "triton"),
        (None, "kernel size 5", None, "native", "triton"),
        ("not built", None, "not installed", "native", "reference"),
    ],
)
def test_auto_on_a_gpu(monkeypatch, nothing_known, native, refusal, on_triton, preferred, chosen):
    """The preferred of the backends that can run, without a warning; the reference, with one, if none can."""
    monkeypatch.setattr(_dispatch, "missing", {"cuda": native} if native else {})
    monkeypatch.setattr(_dispatch, "gpu_obstacles", {0: None})
    monkeypatch.setattr(_dispatch, "triton_obstacles", {("cuda", 0): on_triton})
    arguments = "spn", "auto", torch.device("cuda", 0), {"native": refusal, "triton": None}, preferred
    if chosen == "reference":
        with pytest.warns(UserWarning, match="runs on the reference: not built; not installed"):
            assert _dispatch.choose(*arguments) == chosen
    else:
        assert _dispatch.choose(*arguments) == chosen


def test_the_table_of_what_is_faster(monkeypatch):
    """Looked up by GPU, dtype, layout and upsampling; native if there is no entry."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    x = types.SimpleNamespace(
        device=torch.device("cuda"), dtype=torch.bfloat16, is_contiguous=lambda **options: bool(options)
    )
    assert spn_module.preferred(x, 2) == "native"
    monkeypatch.setattr(spn_module, "TRITON_IS_FASTER", {("a GPU", torch.bfloat16, True, 2)})
    assert spn_module.preferred(x, 2) == "triton"
    assert spn_module.preferred(x, 1) == "native"
    assert spn_module.preferred(torch.zeros(1, 1, 1, 1), 2) == "native"


@pytest.mark.parametrize("sizes", [{}, {"kernel_size": 1}, {"kernel_size": 5}, {"masks": 1}], ids=str)
def test_triton_is_preferred_where_the_cuda_kernels_are_not_tuned(monkeypatch, sizes):
    on_gpu, on_cpu = types.SimpleNamespace(device=torch.device("cuda")), torch.zeros(1, 1, 1, 1)
    assert [spn_module.preferred(x, 1, tuned=False) for x in (on_gpu, on_cpu)] == ["triton", "native"]
    asked = []
    monkeypatch.setattr(spn_module, "preferred", lambda x, upsample, tuned: asked.append(tuned) or "native")
    SPN.function(**SPN.inputs(Case((2, 3, 4, 5), "", sizes=sizes)), impl="reference")
    assert asked == [not sizes]


@pytest.mark.parametrize(
    "shape, upsample", [((1, 128, 4100, 4100), 1), ((1, 128, 2050, 2050), 2), ((2**21, 1, 32, 32), 1)]
)
def test_what_32_bits_cannot_count_is_refused(shape, upsample):
    tensors = SPN.inputs(Case((1, shape[1], 2, 2), ""), device="meta") | {"x": torch.empty(shape, device="meta")}
    with pytest.raises(RuntimeError, match=r"impl='triton' cannot run here: .* 32 bits"):
        spn(**tensors, upsample=upsample, impl="triton")
    with torch.device("meta"):
        assert spn(**tensors, upsample=upsample).shape[2] == shape[2] * upsample
        with pytest.raises(RuntimeError, match=r"impl='triton' cannot run here: .* 32 bits"):
            scales, weight = torch.empty(shape[:2]), torch.empty(shape[1], shape[1])
            gconv_mix(torch.empty(shape[0], shape[1], 4100, 4100), scales, weight, impl="triton")


@pytest.mark.parametrize("native", [None, "not built"])
@pytest.mark.parametrize("on_triton", [None, "too old"])
def test_a_composite_op_needs_no_extension_on_a_gpu(monkeypatch, nothing_known, native, on_triton):
    """Its native backend there is PyTorch's matrix products."""
    monkeypatch.setattr(_dispatch, "missing", {"cuda": native, "cpu": native} if native else {})
    monkeypatch.setattr(_dispatch, "triton_obstacles", {("cuda", 0): on_triton})
    for preferred in ("native", "triton"):
        arguments = "gconv_mix", "auto", torch.device("cuda", 0), {"native": None, "triton": None}, preferred
        assert _dispatch.choose(*arguments) == ("native" if on_triton else preferred)
    if native:
        with pytest.raises(RuntimeError, match="impl='native' cannot run here: not built"):
            _dispatch.choose("gconv_mix", "native", torch.device("cpu"), {"native": None})


def test_meta_tensors_have_the_shape_of_the_result():
    tensors = {name: tensor.to("meta") for name, tensor in SPN.inputs(Case((2, 3, 4, 5), "")).items()}
    y = spn(**tensors, upsample=2, impl="triton")
    assert y.device.type == "meta" and y.shape == (2, 3, 8, 10)
