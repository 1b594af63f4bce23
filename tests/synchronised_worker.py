"""Cases of tests/test_synchronised.py, and the program that torchrun starts: each process runs all on its samples.

``python -m torch.distributed.run --standalone --nproc-per-node N tests/synchronised_worker.py FOLDER PARTS``
"""

import contextlib
import copy
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from itertools import accumulate, chain, pairwise
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import pixnorm
from pixnorm.networks import Generator

CLASSES, LATENT, LABELS, CHANNELS = 3, 4, 5, 4
BATCH = 4
# Samples of each process, by the number of processes; the last process of three has none.
PARTS = {2: (1, 3), 3: (3, 1, 0)}

PARTS_OF_SOME = (0, 1, 3)


class Network(nn.Module):
    """Two norms with convolutions around: each sees the gradients of the other's statistics."""

    def __init__(self, layer: Callable[..., nn.Module], takes: str, kernel: int, checkpointed: bool = False):
        super().__init__()
        self.first = nn.Conv2d(2, CHANNELS, kernel, padding=kernel // 2, bias=False)
        self.norm1 = layer()
        self.second = nn.Conv2d(CHANNELS, CHANNELS, kernel, padding=kernel // 2, bias=False)
        self.norm2 = layer()
        self.takes, self.checkpointed = takes, checkpointed

    def block(self, x: Tensor, conv: nn.Module, norm: nn.Module, conditions: list[Tensor]) -> Tensor:
        return norm(conv(x), *conditions)

    def forward(self, x: Tensor, **conditions: Tensor) -> Tensor:
        taken = [conditions[name] for name in self.takes]
        for conv, norm in ((self.first, self.norm1), (self.second, self.norm2)):
            if self.checkpointed:
                x = checkpoint(self.block, x, conv, norm, taken, use_reentrant=False)
            else:
                x = self.block(x, conv, norm, taken)
        return x.sin()


class Case(NamedTuple):
    """One network; ``takes`` names the conditions of its layers: classes y, latent vectors z, a label map l."""

    layer: Callable[..., nn.Module]
    options: Mapping[str, object] = MappingProxyType({})
    takes: str = ""
    size: tuple[int, int] = (4, 5)
    kernel: int = 3
    channels_last: bool = False
    checkpointed: bool = False

    def network(self, impl: str, dtype: torch.dtype = torch.float64) -> nn.Module:
        torch.manual_seed(0)
        model = Network(lambda: self.layer(impl=impl, **self.options), self.takes, self.kernel, self.checkpointed)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():  # no symmetric start
            parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape, generator=generator)
        model.to(dtype)
        if dtype == torch.bfloat16:  # as FSDP has it
            for layer in (model.norm1, model.norm2):
                layer._buffers.update({name: b if b is None else b.float() for name, b in layer._buffers.items()})
                layer.num_batches_tracked = layer.num_batches_tracked.long()
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def inputs(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(BATCH, 2, *self.size, generator=generator, dtype=torch.float64) + 0.5
        return {
            "x": (x.to(memory_format=torch.channels_last) if self.channels_last else x).to(dtype),
            "y": torch.randint(CLASSES, (BATCH,), generator=generator),
            "z": torch.randn(BATCH, LATENT, generator=generator, dtype=torch.float64).to(dtype),
            "l": torch.randint(LABELS, (BATCH, 8, 10), generator=generator),
            "weight": torch.rand(BATCH, 1, 1, 1, generator=generator, dtype=torch.float64).to(dtype),
        }


def bn(**options) -> nn.Module:
    return pixnorm.BatchNorm2d(CHANNELS, **options)


def cbn(**options) -> nn.Module:
    return pixnorm.ConditionalBatchNorm2d(CHANNELS, CLASSES, LATENT, **options)


def bigbn(**options) -> nn.Module:
    return pixnorm.nn.LatentBatchNorm2d(CHANNELS, LATENT, **options)


def spade(**options) -> nn.Module:
    return pixnorm.SPADE2d(CHANNELS, LABELS, 3, **options)


def spn(**options) -> nn.Module:
    return pixnorm.SPN2d(CHANNELS, **options)


def cspn(latent_dim=LATENT, **options) -> nn.Module:
    return pixnorm.ConditionalSPN2d(CHANNELS, CLASSES, latent_dim, **options)


def gate(**options) -> nn.Module:
    return pixnorm.SpatialGate(3, **options)


UP = {"upsample": 2, "activation": "leaky_relu"}
CASES = {
    "bn": Case(bn),
    "bn, up, leaky": Case(bn, UP, channels_last=True),
    "bn, not affine, average": Case(bn, {"affine": False, "momentum": None}),
    "bn, one pixel": Case(bn, {"activation": "leaky_relu"}, size=(1, 1), kernel=1),
    "bn, checkpoints": Case(bn, checkpointed=True),
    "cbn": Case(cbn, UP, "yz"),
    "bigbn": Case(bigbn, {"track_running_stats": False}, "z", channels_last=True),
    "spade": Case(spade, {"activation": "relu"}, "l", channels_last=True),
    "spade, up": Case(spade, UP, "l", size=(2, 3)),
    "spn": Case(spn),
    "spn, one mask, up": Case(spn, {"mask_channels": 1, **UP}),
    "spn, relu": Case(spn, {"kernel_size": 5, "activation": "relu"}, channels_last=True),
    "spn, one pixel": Case(spn, size=(1, 1), kernel=1),
    "spn, checkpoints": Case(spn, UP, checkpointed=True),
    "cspn": Case(cspn, UP, "yz", channels_last=True),
    "cspn, one mask": Case(cspn, {"mask_channels": 1, "latent_dim": 0, "momentum": None}, "y"),
    "gate": Case(gate),
    "gate, channels last": Case(gate, {"momentum": None}, channels_last=True),
}
HALVES = ("bn", "cbn", "spade", "spn", "cspn", "gate")  # the cases that run in float32 and bfloat16, too
IMPLS = ("auto", "reference")
# By the number of processes. A convolution of PyTorch's, differentiated thrice, has no gradient for an empty batch,
# whose process would then leave others waiting.
PENALTIES = {2: (0, 2), 3: (0, 1)}
KINDS = ("frozen input", "frozen parameters", "far from zero")  # of steps of single layers
GENERATORS = {"bn": {}, "spn": {}, "cspn": {"num_classes": CLASSES}, "cbn": {"num_classes": CLASSES}}


@contextlib.contextmanager
def counted():
    """A list that gets the name of each collective."""
    calls, originals = [], {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def recording(name: str) -> Callable[..., object]:
        def call(*args, **kwargs):
            calls.append(name)
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, recording(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def step(model: nn.Module, inputs: dict[str, Tensor], penalties: int = 0, call=None, run=None) -> dict:
    """A training step on some samples: outputs, gradients, buffers, and how often processes talked.

    Args:
        penalties: 1 adds a penalty of the gradient of x to the loss, 2 another one of the gradient of that sum.
        call: the model in another form.
        run: calls what differentiates.
    """
    inputs = dict(inputs)
    x, weight = inputs.pop("x").clone().requires_grad_(), inputs.pop("weight")
    run = run or (lambda function: function())
    with counted() as calls:
        y = (model if call is None else call)(x, **inputs)
        forward = len(calls)
        loss = (y * weight).sum()
        for _ in range(penalties):
            (of_x,) = run(partial(torch.autograd.grad, loss, x, create_graph=True))
            loss = loss + (of_x.square() * weight).sum()
        run(loss.backward)
    return {
        "samples": {"y": y.detach(), "x": x.grad, **({"penalised": of_x.detach()} if penalties else {})},
        "sums": {name: p.grad for name, p in model.named_parameters()},
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
        "collectives": (forward, len(calls) - forward),
    }


def layer_step(layer: nn.Module, kind: str, samples: slice) -> dict:
    """A step of one layer in which its input or its parameters need no gradient, or means are large."""
    layer.double().requires_grad_(kind != "frozen parameters")
    x = torch.randn(BATCH, CHANNELS, 3, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)[samples]
    weight = x.exp()
    x = x + 300 if kind == "far from zero" else x
    y = layer(x.requires_grad_(kind != "frozen input"))
    (y.sin() * weight).sum().backward()
    return {
        "samples": {"y": y.detach(), **({} if x.grad is None else {"x": x.grad})},
        "sums": {name: p.grad for name, p in layer.named_parameters() if p.grad is not None},
    }


def generator_step(model: nn.Module, norm: str, samples: slice) -> dict:
    """Two forwards before one backward, then a batch in eval mode."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(2, BATCH, 8, generator=generator, dtype=torch.float64)[:, samples]
    y = torch.randint(CLASSES, (2, BATCH), generator=generator)[:, samples]
    conditions = [(z[i], y[i]) if "num_classes" in GENERATORS[norm] else (z[i],) for i in range(2)]
    images = [model(*of_call) for of_call in conditions]
    (images[0].sin().sum() - images[1].square().sum()).backward()
    inner = getattr(model, "module", model)
    with torch.no_grad():
        shown = inner.eval()(*conditions[0])
    return {
        "samples": {"first": images[0].detach(), "second": images[1].detach(), "eval": shown},
        "sums": {name: p.grad for name, p in inner.named_parameters()},
        "buffers": {name: b.clone() for name, b in inner.named_buffers()},
    }


def make_generator(norm: str) -> nn.Module:
    torch.manual_seed(0)
    return Generator(norm=norm, channels=16, latent_dim=8, **GENERATORS[norm]).double()


def samples_of(rank: int, parts: tuple[int, ...]) -> slice:
    ends = list(accumulate(parts))
    return slice(ends[rank] - parts[rank], ends[rank])


def run_cases(rank: int, parts: tuple[int, ...]) -> dict[str, dict]:
    """Every case in float64, with and without gradients of gradients."""
    samples, results = samples_of(rank, parts), {}
    for name, case in CASES.items():
        mine = {key: value[samples] for key, value in case.inputs().items()}
        for impl in IMPLS:
            for penalties in PENALTIES[len(parts)]:
                model = case.network(impl)
                synchronised = pixnorm.convert_sync(model)
                assert synchronised.synchronised == ("norm1", "norm2") and not synchronised.replaced
                results[f"{name}/{impl}/{penalties}"] = step(model, mine, penalties)
    for name in HALVES:
        for dtype in (torch.float32, torch.bfloat16):
            mine = {key: value[samples] for key, value in CASES[name].inputs(dtype).items()}
            model = CASES[name].network("auto", dtype)
            pixnorm.convert_sync(model)
            results[f"{name}/{dtype}"] = step(model, mine)
    return results


def run_layers(rank: int, parts: tuple[int, ...]) -> dict[str, dict]:
    """The depthwise layer's alternative, single layers, groups of one, and copies."""
    case, samples = Case(spn, {"depthwise": False}), samples_of(rank, parts)
    mine = {key: value[samples] for key, value in case.inputs().items()}
    model = case.network("reference")
    pixnorm.convert_sync(model)
    results = {"standard convolutions": step(copy.deepcopy(model), mine, penalties=1)}

    for layer in (bn, spn, gate):
        for kind in KINDS:
            torch.manual_seed(0)
            synchronised = pixnorm.convert_sync(layer()).model
            results[f"{layer.__name__}, {kind}"] = layer_step(synchronised, kind, samples)

    some = dist.new_group([1, 2])  # whose ranks are others than the processes'
    if rank > 0:
        for name in ("bn", "gate"):
            model = CASES[name].network("auto")
            pixnorm.convert_sync(model, some)
            mine = {key: value[samples_of(rank, PARTS_OF_SOME)] for key, value in CASES[name].inputs().items()}
            results[f"{name}, some processes"] = step(model, mine, penalties=1)

    alone = [dist.new_group([other]) for other in range(len(parts))]
    group = alone[rank]
    others = [other for other in alone if other is not group]
    model = CASES["bn"].network("auto")
    mine = {key: value[samples] for key, value in CASES["bn"].inputs().items()}
    pixnorm.convert_sync(model, group)
    results["alone"] = step(model, mine, penalties=1)
    try:
        pixnorm.convert_sync(model, others[0])
    except TypeError as error:
        results["outsider"] = str(error)
    results["repr"] = repr(pixnorm.convert_sync(model).model.norm1)
    with torch.no_grad(), counted() as calls:
        model(mine["x"])
    assert len(calls) == 2
    copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert copied.norm1.process_group is dist.group.WORLD and loaded.norm1.process_group is None
    with torch.no_grad(), counted() as calls:
        loaded(mine["x"]), model.eval()(mine["x"]), copied.eval()(mine["x"])
    assert not calls
    return results


def ordered_network(norm: Callable[..., nn.Module]) -> nn.Module:
    """Ends with a norm, whose backward does not wait for the gradient's graph."""
    torch.manual_seed(0)
    sizes = 2, CHANNELS, CHANNELS, CHANNELS
    blocks = [[nn.Conv2d(a, b, 3, padding=1, bias=False), norm(), nn.Tanh()] for a, b in pairwise(sizes)]
    return nn.Sequential(*chain.from_iterable(blocks))[:-1].double()


def differentiate_often() -> None:
    """As a process does that alone draws samples."""
    x = torch.ones((), requires_grad=True)
    for _ in range(5000):
        x * x


def run_order(rank: int, parts: tuple[int, ...]) -> dict[str, dict]:
    """Backward in a thread of its own, as on GPUs, in processes that have differentiated other things before."""
    results = {}
    with ThreadPoolExecutor(1) as thread:
        if rank == 0:
            differentiate_often()
        else:
            thread.submit(differentiate_often).result()
        for norm in (bn, spn, gate):
            model = pixnorm.convert_sync(ordered_network(norm)).model
            results[norm.__name__] = step(
                model, mixed_inputs(samples_of(rank, parts)), 1, run=lambda f: thread.submit(f).result()
            )
    return results


def run_errors(rank: int, parts: tuple[int, ...]) -> dict[str, str]:
    """One value in all processes together; a transform."""
    found = {}
    for layer in (bn(), spn(), gate()):
        pixnorm.convert_sync(layer)
        before = copy.deepcopy(layer.state_dict())
        try:
            layer(torch.ones(1 if rank == 0 else 0, CHANNELS, 1, 1))
        except ValueError as error:
            found[type(layer).__name__] = str(error)
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    try:
        torch.func.grad(lambda x: layer(x).sum())(torch.ones(2, CHANNELS, 2, 2))
    except RuntimeError as error:
        found["transform"] = str(error)
    layer = pixnorm.convert_sync(bn()).model
    assert layer(torch.ones(0, CHANNELS, 2, 2)).shape == (0, CHANNELS, 2, 2)  # everywhere
    assert layer.running_var.equal(torch.ones(CHANNELS))
    return found


def run_generators(rank: int, parts: tuple[int, ...]) -> dict[str, dict]:
    """Whole networks under DistributedDataParallel, whose gradients are means over processes."""
    results = {}
    for norm in GENERATORS:
        model = make_generator(norm)
        pixnorm.convert_sync(model)
        result = generator_step(DistributedDataParallel(model), norm, samples_of(rank, parts))
        result["sums"] = {name: grad if rank == 0 else grad * 0 for name, grad in result["sums"].items()}
        result["sums"] = {name: grad * len(parts) for name, grad in result["sums"].items()}
        results[norm] = result
    return results


def mixed_network() -> nn.Module:
    torch.manual_seed(0)
    convs = [nn.Conv2d(channels, CHANNELS, 3, padding=1, bias=False) for channels in (2, CHANNELS)]
    return nn.Sequential(convs[0], bn(**UP), convs[1], spn(), gate(), nn.Tanh()).double()


def mixed_inputs(samples: slice = slice(None)) -> dict[str, Tensor]:
    inputs = Case(bn).inputs()
    return {name: inputs[name][samples] for name in ("x", "weight")}


def run_compiled(rank: int, parts: tuple[int, ...]) -> dict:
    """The compiler's graphs break at synchronised layers; what is exported has no processes."""
    model = pixnorm.convert_sync(mixed_network()).model
    refused = ""
    try:
        torch.export.export(pixnorm.convert_sync(bn()).model, (torch.ones(2, CHANNELS, 2, 2),), strict=False)
    except RuntimeError as error:
        refused = str(error)
    return {"export": refused} | step(
        model, mixed_inputs(samples_of(rank, parts)), call=torch.compile(model, backend="aot_eager")
    )


def main(folder: str, wanted: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, parts = dist.get_rank(), PARTS[dist.get_world_size()]
    try:
        found = {part: globals()[f"run_{part}"](rank, parts) for part in wanted.split(",")}
        torch.save(found, os.path.join(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
