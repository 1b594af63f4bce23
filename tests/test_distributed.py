"""Layers under DistributedDataParallel and fully_shard: two processes on the CPU."""

import copy
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import pixnorm
from pixnorm.networks import Generator

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
    # The same sums in float64, with another number of threads.
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


# --- sharded, with parameters in half precision


class Norms(nn.Module):
    """A layer of each kind, as in a generator of images of faces, styles and classes."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 3, 1)
        self.plain = pixnorm.BatchNorm2d(16, upsample=2, activation="relu")
        self.conditional = pixnorm.ConditionalBatchNorm2d(16, num_classes=3, latent_dim=8)
        self.latent = pixnorm.nn.LatentBatchNorm2d(16, 8)
        self.style = pixnorm.AdaIN2d(16, 8, activation="leaky_relu")
        self.spade = pixnorm.SPADE2d(16, label_channels=4, hidden_channels=8)
        self.mixing = pixnorm.GConv2d(16, 16, 3, latent_dim=8, padding=1)

    def forward(self, z):
        x = self.plain(self.first(z[:, :, None, None] * torch.linspace(-1, 1, 16).reshape(4, 4).to(z.dtype)))
        labels = torch.arange(4 * 16, device=z.device).reshape(1, 8, 8).expand(len(z), 8, 8) % 4
        x = self.latent(self.conditional(x, torch.arange(len(z)) % 3, z), z)
        return self.last(self.mixing(self.spade(self.style(x, z), labels), z))


def generator(kind):
    torch.manual_seed(0)
    if kind == "norms":
        return Norms()
    return Generator(norm="spn", channels=16, latent_dim=8)


def parts_of(model):
    """What is sharded by itself; the rest is sharded as one, in float32."""
    if isinstance(model, Norms):
        return [module for module in model.children()]
    return [model.block1, model.block2, model.block3]  # nn.BatchNorm2d takes no half parameters with float32 buffers


def train_sharded(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        mesh = init_device_mesh("cpu", (WORLD,))
        for kind, (name, dtype) in product(KINDS, PRECISIONS.items()):
            model = generator(kind)
            policy = MixedPrecisionPolicy(param_dtype=dtype, output_dtype=torch.float32)
            for part in parts_of(model):
                fully_shard(part, mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh)
            z = torch.randn(4, 8, generator=torch.Generator().manual_seed(rank))
            y = model(z)
            y.float().sin().mean().backward()
            grads = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
            buffers = dict(model.named_buffers())
            torch.save((y.detach(), grads, buffers), f"{folder}/{kind}-{name}{rank}.pt")
    finally:
        dist.destroy_process_group()


PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
KINDS = ("spn", "norms")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    torch.multiprocessing.spawn(train_sharded, (folder,), nprocs=WORLD)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_fully_sharded(precision, kind, sharded):
    """Buffers stay float32, whatever the compute dtype of the parameters; gradients are means over ranks."""
    found = [torch.load(sharded / f"{kind}-{precision}{rank}.pt") for rank in range(WORLD)]
    expected = []
    for rank in range(WORLD):
        alone = generator(kind)
        z = torch.randn(4, 8, generator=torch.Generator().manual_seed(rank))
        y = alone(z)
        expected.append((y, torch.autograd.grad(y.sin().mean(), list(alone.parameters())), alone))
        close = {"rtol": 1e-3, "atol": 1e-4} if precision == "float32" else {"rtol": 0.1, "atol": 0.1}
        distance = (found[rank][0].float() - y).norm() / y.norm()  # of half precision, five norms after each other
        assert distance < (1e-4 if precision == "float32" else 0.15), distance
        for name, buffer in alone.named_buffers():
            assert found[rank][2][name].dtype == buffer.dtype, name
            torch.testing.assert_close(found[rank][2][name], buffer, **close)
    # A norm takes out what a bias or a scale before it adds: gradients that are nothing but rounding.
    rounding = 1e-4 * max(grad.abs().max().item() for grad in found[0][1].values())
    for (name, grad), *others in zip(found[0][1].items(), *(grads for _, grads, _ in expected), strict=True):
        mean = sum(others) / WORLD
        assert grad.isfinite().all() and grad.dtype == torch.float32, name
        if precision == "float32":
            torch.testing.assert_close(grad, mean, rtol=1e-2, atol=1e-3 * mean.abs().max().item() + rounding)
