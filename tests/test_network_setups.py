"""Every network in the setups of its users: both forms, layouts, autocast, compilation, two processes, gradients of
gradients, checkpoints."""

import copy
import io
import os
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from pixnorm.testing.networks import NETWORKS, tensors_of, total

networks = pytest.mark.parametrize("net", NETWORKS.values(), ids=str)

# float64 through a network: a few thousand roundings of 1e-16, amplified by the normalisations.
CLOSE = {"rtol": 1e-8, "atol": 1e-8}
SEED = 2  # of the noise that a network draws


def close(ours, theirs, **tolerance):
    torch.testing.assert_close(ours, theirs, **tolerance or CLOSE)


def twins(net, dtype=torch.float64):
    """The network in both forms, with equal weights that have moved from where they started; and inputs."""
    reference, ours = (net.build(impl).to(dtype) for impl in ("reference", "auto"))
    pairs = list(zip(reference.state_dict().items(), ours.state_dict().items(), strict=True))
    assert all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ours.load_state_dict(reference.state_dict())
    return reference, ours, net.inputs(ours, 4, dtype)


def run(network, inputs):
    torch.manual_seed(SEED)
    return network(*inputs)


def gradients(network, inputs):
    output = run(network, inputs)
    grads = torch.autograd.grad(total(output), list(network.parameters()))
    return tensors_of(output), dict(zip(dict(network.named_parameters()), grads, strict=True))


@networks
def test_forms_agree(net):
    """Outputs, gradients and buffers in training, then outputs in eval mode."""
    reference, ours, inputs = twins(net)
    close(*[gradients(network, inputs) for network in (ours, reference)])
    for name, buffer in reference.named_buffers():
        close(ours.get_buffer(name), buffer)
    before = copy.deepcopy(ours.state_dict())
    close(*[tensors_of(run(network.eval(), inputs)) for network in (ours, reference)])
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


@networks
def test_gradients_reach_every_parameter(net):
    """DistributedDataParallel waits for all of them."""
    _, ours, inputs = twins(net)
    for name, grad in gradients(ours, inputs)[1].items():
        assert grad.isfinite().all() and grad.abs().max() > 0, name


@networks
def test_channels_last(net):
    _, ours, inputs = twins(net)
    expected = gradients(copy.deepcopy(ours), inputs)
    placed = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in inputs]
    close(gradients(ours.to(memory_format=torch.channels_last), placed), expected)


@networks
def test_single_samples_in_eval_mode(net):
    """A sample's output does not depend on the others."""
    _, ours, inputs = twins(net)
    run(ours, inputs)
    if hasattr(ours.eval(), "noise"):
        ours.noise = "const"  # not drawn for each sample
    alone = [tensors_of(run(ours, [t[:1] for t in inputs])) for _ in range(2)]
    close(*alone, rtol=0, atol=0)
    if net.independent:
        close(alone[0], [tensor[:1] for tensor in tensors_of(run(ours, inputs))])


@networks
def test_bfloat16_under_autocast(net):
    """As near to float64 as plain PyTorch, within a factor of two."""
    reference, ours, inputs = twins(net, torch.float32)
    exact = tensors_of(
        run(copy.deepcopy(reference).double(), [t.double() if t.is_floating_point() else t for t in inputs])
    )
    errors = []
    for network in (ours, reference):
        with torch.autocast(inputs[0].device.type, torch.bfloat16):
            outputs = tensors_of(run(network, inputs))
        total([output.float() for output in outputs]).backward()
        assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
        errors.append(sum((a.double() - e).square().mean() for a, e in zip(outputs, exact, strict=True)) ** 0.5)
    assert errors[0] <= 2 * errors[1] + 1e-3


@networks
def test_compiled(net):
    """Without a break in the graph: outputs and gradients."""
    torch.compiler.reset()
    _, ours, inputs = twins(net)
    compiled = torch.compile(copy.deepcopy(ours), fullgraph=True, backend="aot_eager")
    close(gradients(compiled, inputs)[0], gradients(ours, inputs)[0])


@networks
def test_gradients_of_gradients(net):
    """Of the gradient with respect to the input (R1, gradient penalty, path length), in the parameters; where the input
    is labels alone, of that in the parameters."""
    found = []
    reference, ours, inputs = twins(net)
    for network in (ours, reference):
        leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in inputs]
        real = [leaf for leaf in leaves if leaf.is_floating_point()] or list(network.parameters())
        grads = torch.autograd.grad(total(run(network, leaves)), real, create_graph=True)
        penalty = sum(grad.square().sum() for grad in grads)
        found.append((penalty, torch.autograd.grad(penalty, list(network.parameters()), allow_unused=True)))
    (ours, of_ours), (theirs, of_theirs) = found
    close(ours, theirs)
    scale = max(grad.abs().max() for grad in of_theirs if grad is not None)
    assert scale > 0
    for mine, other in zip(of_ours, of_theirs, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            close(mine, other, rtol=1e-7, atol=1e-8 * scale.item())


@networks
def test_samples_through_vmap(net):
    """In eval mode each sample passes alone, as for gradients per sample."""
    _, ours, inputs = twins(net)
    if hasattr(ours.eval(), "noise"):
        ours.noise = "const"

    def alone(*sample):
        return tensors_of(ours(*[t[None] for t in sample]))

    with warnings.catch_warnings(action="ignore"):  # of the way through the reference
        together = torch.func.vmap(alone, randomness="different")(*inputs)
    assert all(tensor.shape[:2] == (4, 1) for tensor in together)
    if net.independent:
        close([tensor[:, 0] for tensor in together], tensors_of(run(ours, inputs)))


@networks
def test_checkpoints(net):
    """A checkpoint of one form is one of the other; loaded as data alone."""
    _, ours, inputs = twins(net)
    run(ours, inputs)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    fresh = {impl: net.build(impl).double() for impl in ("reference", "auto")}
    state = torch.load(file, weights_only=True)
    expected = tensors_of(run(ours.eval(), inputs))
    for network in fresh.values():
        network.load_state_dict(state)
        close(tensors_of(run(network.eval(), inputs)), expected)
    ours.load_state_dict(fresh["reference"].state_dict())


# ---- two processes

WORLD = 2


def step(rank, folder):
    """One training step of every network, its own half of the batch each."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        found = {}
        for net in NETWORKS.values():
            network = net.build("auto").double()
            inputs = [t[rank * 2 :][:2] for t in net.inputs(network, 4, torch.float64)]
            parallel = DistributedDataParallel(network)
            for _ in range(2):  # the second forward fails if a parameter was left out of the first step
                total(run(parallel, inputs)).backward()
            found[net.name] = {name: parameter.grad for name, parameter in network.named_parameters()}
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.cpu
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")
def test_two_processes(tmp_path):
    """Under DistributedDataParallel every parameter gets a gradient, the mean of both processes'."""
    torch.multiprocessing.spawn(step, (tmp_path,), nprocs=WORLD)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD))
    for net in NETWORKS.values():
        expected = None
        for rank in range(WORLD):
            network = net.build("auto").double()
            inputs = [t[rank * 2 :][:2] for t in net.inputs(network, 4, torch.float64)]
            for _ in range(2):
                total(run(network, inputs)).backward()
            own = {name: parameter.grad / WORLD for name, parameter in network.named_parameters()}
            expected = own if expected is None else {name: expected[name] + grad for name, grad in own.items()}
        for name, grad in first[net.name].items():
            assert torch.equal(grad, second[net.name][name]), (net.name, name)
            close(grad, expected[name])
