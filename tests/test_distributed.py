"""SPN2d under DistributedDataParallel: two processes on the CPU."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import pixnorm

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo"),
]

WORLD = 2
BACKENDS = ["reference", "auto"]


def discriminator(impl):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), pixnorm.SPN2d(6, impl=impl), nn.ReLU(), nn.Conv2d(6, 6, 3), pixnorm.SPN2d(6, impl=impl)
    ).double()


def images(rank, kind):
    generator = torch.Generator().manual_seed(10 * rank + kind)
    return torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=generator)


def loss(model, rank):
    """Two forwards before one backward, as in every discriminator step."""
    real, fake = model(images(rank, 0)), model(images(rank, 1))
    return real.sin().mean() - fake.cos().mean()


def step(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        for backend in BACKENDS:
            model = DistributedDataParallel(discriminator(backend))
            loss(model, rank).backward()
            grads = {name: parameter.grad for name, parameter in model.module.named_parameters()}
            model.eval()(images(rank, 2))  # takes over the buffers of rank 0
            torch.save((grads, model.module.state_dict()), f"{folder}/{backend}{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(step, (folder,), nprocs=WORLD)
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_forwards_before_one_backward(backend, folder):
    (grads, state), (grads_1, state_1) = (torch.load(folder / f"{backend}{rank}.pt") for rank in range(WORLD))

    alone = discriminator(backend)
    replicas = [copy.deepcopy(alone) for _ in range(WORLD)]
    for rank, replica in enumerate(replicas):
        loss(replica, rank).backward()
    # The same sums in float64, by another number of threads.
    close = {"rtol": 1e-10, "atol": 1e-12}
    for name, grad in grads.items():
        assert torch.equal(grad, grads_1[name]), name
        expected = sum(replica.get_parameter(name).grad for replica in replicas) / WORLD
        torch.testing.assert_close(grad, expected, **close)
    assert grads["1.mask_projection"].abs().max() > 1e-6
    for name, buffer in alone.named_buffers():
        assert torch.equal(state[name], state_1[name]), name
        torch.testing.assert_close(state[name], replicas[0].get_buffer(name), **close)
        assert not torch.equal(state[name], buffer), name
