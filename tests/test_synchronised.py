"""Norms whose statistics are exchanged: two and three processes equal one that has the whole batch.

The processes, started by torchrun, run every case of synchronised_worker.py once; the tests compare.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import synchronised_worker as worker
import torch
import torch.distributed as dist
from torch import nn

import pixnorm

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo"),
]

ROOT = Path(__file__).parents[1]
PARTS = {2: "cases,compiled,order", 3: "cases,layers,errors,generators"}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process has found, by the number of processes: part, then case."""
    folders, launches = {}, {}
    for processes, parts in PARTS.items():
        folders[processes] = tmp_path_factory.mktemp("ranks")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        launches[processes] = subprocess.Popen(
            [*torchrun, worker.__file__, str(folders[processes]), parts],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
            stderr=subprocess.PIPE,
            text=True,
        )
    errors = {processes: launch.communicate(timeout=300)[1] for processes, launch in launches.items()}
    for processes, launch in launches.items():
        assert launch.returncode == 0, errors[processes][-5000:]
    return {
        processes: [torch.load(folders[processes] / f"{rank}.pt") for rank in range(processes)] for processes in PARTS
    }


def together(ranks):
    """The results of all processes as those of one: samples joined, gradients of parameters added."""
    joined = {name: torch.cat([rank["samples"][name] for rank in ranks]) for name in ranks[0]["samples"]}
    return joined | {name: sum(rank["sums"][name] for rank in ranks) for name in ranks[0]["sums"]}


def errors_of(result, exact):
    """The largest error of each tensor, relative to its largest number."""
    assert result.keys() == exact.keys()
    sizes = {name: value.double().abs().max() for name, value in exact.items()}
    return {
        name: ((result[name].double() - value).abs().max() / sizes[name].clamp(min=1e-6)).item()
        for name, value in exact.items()
    }


def check_buffers(ranks, one, rtol):
    for rank in ranks:
        assert rank["buffers"].keys() == one["buffers"].keys()
        for name, value in one["buffers"].items():
            assert torch.equal(rank["buffers"][name], ranks[0]["buffers"][name]), name
            torch.testing.assert_close(rank["buffers"][name], value, rtol=rtol, atol=rtol, msg=name)


def batch_norm(x, mean, var, weight, bias, training, momentum, eps):
    """``F.batch_norm`` in single operations: PyTorch's has wrong third derivatives (torch 2.13)."""
    assert training
    batch_var, batch_mean = torch.var_mean(x, (0, 2, 3), correction=0)
    if mean is not None:
        count = x.numel() // x.shape[1]
        mean.lerp_(batch_mean.detach(), momentum)
        var.lerp_(batch_var.detach() * count / (count - 1), momentum)
    x_hat = (x - batch_mean[:, None, None]) * (batch_var + eps).rsqrt()[:, None, None]
    return x_hat if weight is None else x_hat * weight[:, None, None] + bias[:, None, None]


ORDERS = [(processes, penalties) for processes, orders in worker.PENALTIES.items() for penalties in orders]


@pytest.mark.parametrize(("processes", "penalties"), ORDERS)
@pytest.mark.parametrize("impl", worker.IMPLS)
@pytest.mark.parametrize("name", worker.CASES)
def test_equals_one_process(name, impl, penalties, processes, found, monkeypatch):
    """Values, gradients, gradients of gradients (and of these) and running statistics, in float64."""
    case = worker.CASES[name]
    ranks = [rank["cases"][f"{name}/{impl}/{penalties}"] for rank in found[processes]]
    if penalties > 1:
        monkeypatch.setattr(torch.nn.functional, "batch_norm", batch_norm)
    one = worker.step(case.network(impl), case.inputs(), penalties)
    for error in (errors := errors_of(together(ranks), together([one]))).values():
        assert error < 1e-12, errors
    check_buffers(ranks, one, 1e-12)
    assert one["collectives"] == (0, 0)
    if not penalties and not case.checkpointed:
        assert {rank["collectives"] for rank in ranks} == {(2, 2)}  # two layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", worker.HALVES)
def test_precision(name, dtype, found):
    """The error is at most twice that of one process, of plain PyTorch or the kernels."""
    case = worker.CASES[name]
    ranks = [rank["cases"][f"{name}/{dtype}"] for rank in found[3]]
    models = [case.network(impl, dtype) for impl in worker.IMPLS]
    exact, inputs = case.network("reference"), case.inputs(dtype)
    exact.load_state_dict(models[0].state_dict())
    wide = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    exact = together([worker.step(exact, wide)])
    alone = [errors_of(together([worker.step(model, inputs)]), exact) for model in models]
    for name, error in errors_of(together(ranks), exact).items():
        bound = 2 * max(errors[name] for errors in alone) + 4 * torch.finfo(dtype).eps
        assert error < bound, name
    for rank in ranks:
        for value in rank["buffers"].values():
            assert value.dtype in (torch.float32, torch.int64)


def test_compiled(found):
    ranks = [rank["compiled"] for rank in found[2]]
    one = worker.step(worker.mixed_network(), worker.mixed_inputs())
    for error in (errors := errors_of(together(ranks), together([one]))).values():
        assert error < 1e-12, errors
    check_buffers(ranks, one, 1e-12)
    assert {rank["collectives"] for rank in ranks} == {(3, 3)}
    assert all("torch.export is active; use eval mode" in rank["export"] for rank in ranks)


@pytest.mark.parametrize("norm", [worker.bn, worker.spn, worker.gate])
def test_order_does_not_depend_on_what_was_differentiated_before(norm, found):
    """Exchanges of one backward pass that do not wait for each other."""
    ranks = [rank["order"][norm.__name__] for rank in found[2]]
    one = worker.step(worker.ordered_network(norm), worker.mixed_inputs(), 1)
    for error in (errors := errors_of(together(ranks), together([one]))).values():
        assert error < 1e-12, errors


@pytest.mark.parametrize("name", ["bn", "gate"])
def test_some_processes(name, found):
    case = worker.CASES[name]
    ranks = [rank["layers"][f"{name}, some processes"] for rank in found[3][1:]]
    one = worker.step(case.network("auto"), case.inputs(), penalties=1)
    for error in (errors := errors_of(together(ranks), together([one]))).values():
        assert error < 1e-12, errors
    check_buffers(ranks, one, 1e-12)


@pytest.mark.parametrize("norm", worker.GENERATORS)
def test_generator(norm, found):
    """Converted networks under DDP, whose buffers stay equal in all processes."""
    ranks = [rank["generators"][norm] for rank in found[3]]
    one = worker.generator_step(worker.make_generator(norm), norm, slice(None))
    exact = together([one])
    largest = max(value.abs().max() for value in exact.values())
    for name, value in together(ranks).items():  # of a bias before a norm the gradient is rounding
        assert (value - exact[name]).abs().max() < 1e-12 * (largest + exact[name].abs().max()), name
    check_buffers(ranks, one, 1e-12)


@pytest.mark.parametrize("layer", [worker.bn, worker.spn, worker.gate])
@pytest.mark.parametrize("kind", worker.KINDS)
def test_single_layer(kind, layer, found):
    """Input without a gradient (images), parameters without one (a step of the other network), or means of 300 standard
    deviations, where sums of squares would cancel."""
    ranks = [rank["layers"][f"{layer.__name__}, {kind}"] for rank in found[3]]
    torch.manual_seed(0)
    one = worker.layer_step(layer(), kind, slice(None))
    for error in (errors := errors_of(together(ranks), together([one]))).values():
        assert error < 1e-12, errors


def test_standard_convolutions(found):
    case = worker.Case(worker.spn, {"depthwise": False})
    ranks = [rank["layers"]["standard convolutions"] for rank in found[3]]
    one = worker.step(case.network("reference"), case.inputs(), penalties=1)
    for error in (errors := errors_of(together(ranks), together([one]))).values():
        assert error < 1e-12, errors


def test_group_of_one_is_not_synchronised(found):
    """The same operations, so the same bits; other processes are not asked."""
    case = worker.CASES["bn"]
    for rank, results in enumerate(found[3][:2]):
        samples = worker.samples_of(rank, worker.PARTS[3])
        one = worker.step(
            case.network("auto"), {key: value[samples] for key, value in case.inputs().items()}, penalties=1
        )
        alone = results["layers"]["alone"]
        assert alone["collectives"] == (0, 0)
        for kind in ("samples", "sums", "buffers"):
            for name, value in one[kind].items():
                torch.testing.assert_close(alone[kind][name], value, rtol=1e-14, atol=1e-14)


def test_group_is_shown_and_checked(found):
    for results in found[3]:
        assert "process_group=<gloo of 3>" in results["layers"]["repr"]
        assert "expected a process group that this process is in, got" in results["layers"]["outsider"]


def test_errors_in_all_processes(found):
    for results in found[3]:
        for layer in ("BatchNorm2d", "SPN2d", "SpatialGate"):
            assert "more than 1 value per channel when training, got 1 in all processes" in results["errors"][layer]
        assert "torch.func is active; use eval mode" in results["errors"]["transform"]


# --- one process


def leaf(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def statistics_of(channels):
    return leaf(channels), (leaf(channels, seed=1).detach().abs() + 0.5).requires_grad_()


MODULATIONS = {"none": None, "vector": (3,), "rows": (2, 3), "maps": (2, 3, 4, 6)}


@pytest.mark.parametrize("impl", worker.IMPLS)
@pytest.mark.parametrize("kind", MODULATIONS)
def test_modulated_norm_differentiates_given_statistics(kind, impl):
    shape = MODULATIONS[kind]
    learnt = [] if shape is None else [leaf(*shape), leaf(*shape, seed=1)]
    options = {"training": False, "gamma_offset": 1.0, "upsample": 2, "activation": "leaky_relu", "impl": impl}

    def norm(x, mean, var, *learnt):
        return pixnorm.functional.modulated_norm(x, *(learnt or (None, None)), mean, var, **options)

    inputs = leaf(2, 3, 2, 3), *statistics_of(3), *learnt
    torch.testing.assert_close(norm(*inputs), norm(*(t.detach() for t in inputs)), rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(norm, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(norm, inputs, fast_mode=True)


@pytest.mark.parametrize("impl", worker.IMPLS)
@pytest.mark.parametrize("masks", [1, 2])
@pytest.mark.parametrize("kind", ["plain", "groups", "groups, rows", "groups, scales"])
def test_spn_differentiates_given_statistics(kind, masks, impl):
    options = {"training": False, "upsample": 2, "activation": "leaky_relu", "impl": impl}
    groups = (3,) if "groups" in kind else ()
    learnt = [leaf(masks, 2, 1, 1), leaf(*groups, masks), leaf(*groups, masks, seed=1)]
    learnt += [leaf(*groups, 2, 1, 3, 3, seed=i) for i in range(4)]
    rows = {"groups, rows": [leaf(2, 2), leaf(2, 2, seed=1)], "groups, scales": [leaf(2, 2)]}.get(kind, [])

    def norm(x, *others):
        learnt, others = others[:7], others[7:]
        if not groups:
            return pixnorm.functional.spn(x, *learnt, *others, **options)
        rows = [*others[4:], None, None][:2]
        index = torch.tensor([2, 0])
        return pixnorm.functional.conditional_spn(x, index, *learnt, *rows, *others[:4], **options)

    inputs = leaf(2, 2, 2, 3), *learnt, *statistics_of(2), *statistics_of(masks), *rows
    assert torch.autograd.gradcheck(norm, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(norm, inputs, fast_mode=True)


@pytest.fixture
def lone_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_convert_needs_processes():
    model = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.raises(RuntimeError, match="there are no processes yet"):
        pixnorm.convert_sync(model)
    assert type(model[0]) is nn.BatchNorm2d


def test_convert(lone_process):
    """Layers of ours get the group, plain batch norms are replaced, others are listed."""
    own = nn.BatchNorm2d(3).requires_grad_(False)
    model = nn.Sequential(own, pixnorm.SPN2d(3), nn.SyncBatchNorm(3), pixnorm.nn.InstanceNorm2d(3), nn.BatchNorm1d(3))
    model.append(pixnorm.SPADE2d(3, 2, statistics="instance")).append(pixnorm.SpatialGate())
    result = pixnorm.convert_sync(model, lone_process)
    assert result.model is model and result.replaced == ["0"] and result.layer == "BatchNorm2d"
    assert result.synchronised == ("0", "1", "6")
    assert type(model[0]) is pixnorm.BatchNorm2d and model[0].weight is own.weight
    assert result.skipped["2"].startswith("SyncBatchNorm cannot be differentiated twice")
    assert result.skipped["4"] == "BatchNorm1d is not nn.BatchNorm2d"
    assert "3 synchronised\n  0\n  1\n  6" in repr(result)
    assert [getattr(layer, "process_group", None) is lone_process for layer in model] == [
        name in result.synchronised for name, _ in model.named_children()
    ]
    traced = torch.fx.symbolic_trace(copy.deepcopy(model[:2]))
    assert traced.get_submodule("1").process_group is lone_process
    layer = pixnorm.convert_sync(nn.BatchNorm2d(3)).model
    assert layer.process_group is lone_process
    layer.process_group = None
    assert "process_group" not in repr(layer) and "process_group=<gloo of 1>" in repr(model[1])


@pytest.mark.parametrize(
    "layer", [worker.bn, worker.cbn, worker.bigbn, worker.spade, worker.spn, worker.cspn, worker.gate]
)
def test_every_layer_takes_a_group(layer, lone_process):
    assert layer(process_group=lone_process).process_group is lone_process
    assert layer().process_group is None
    with pytest.raises(TypeError, match="expected a process group that this process is in, got -100"):
        layer(process_group=dist.GroupMember.NON_GROUP_MEMBER)


def test_function_needs_a_group_that_the_process_is_in(lone_process):
    x = torch.ones(2, 3, 4, 4)
    with pytest.raises(RuntimeError, match="this process is not in the process_group"):
        pixnorm.functional.modulated_norm(x, process_group=dist.GroupMember.NON_GROUP_MEMBER)
    kept = pixnorm.functional.modulated_norm(
        x, statistics="instance", process_group=dist.GroupMember.NON_GROUP_MEMBER
    )  # has nothing to exchange
    assert torch.equal(kept, torch.zeros_like(x))


def test_convert_of_another_thing_changes_nothing(lone_process):
    model = nn.Sequential(nn.BatchNorm2d(3), pixnorm.SPN2d(3))
    with pytest.raises(TypeError, match="expected a process group"):
        pixnorm.convert_sync(model, "world")
    assert type(model[0]) is nn.BatchNorm2d and model[1].process_group is None


@pytest.mark.parametrize("impl", worker.IMPLS)
@pytest.mark.parametrize("layer", [worker.bn, worker.spn, worker.gate])
def test_running_statistics_may_change_before_backward(layer, impl):
    """They are not what is saved, also as the statistics that a Function is given."""
    layer, x = layer(impl=impl).double().eval(), torch.randn(2, worker.CHANNELS, 3, 4, dtype=torch.float64)
    gradients = []
    for change in (0, 1):
        y = layer(x.requires_grad_())
        for name, buffer in layer.named_buffers():
            if name != "num_batches_tracked":
                buffer.add_(change)
        gradients.append(torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()]))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
