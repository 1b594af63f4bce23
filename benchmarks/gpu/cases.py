"""``python -m benchmarks.gpu.cases SECTION --records FILE``: measure one section; each finding is a line of JSON.

A section that is stopped has written what it had found; a contender that fails is told of, and the rest goes on.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.first import check, facts, first
from benchmarks.gpu.processes import CONTEXT_LOST
from benchmarks.gpu.section import COMPILED, EAGER, Call, ContextLostError, Passes, Section
from benchmarks.gpu.timing import Launch, Spread, Timed
from benchmarks.model import kernel_bytes
from benchmarks.test_generator import LATENT_DIM, generator
from benchmarks.test_spn import HEADS, case, label
from pixnorm.ops.gconv import preferred
from pixnorm.testing import DENSE_LAYOUTS, GCONV_MIX, SPN, Case, OpSpec, saved_bytes

# Of the output; torch.compile takes part in the first.
LAYER_SHAPES = ((64, 256, 32, 32), (16, 256, 32, 32), (32, 64, 128, 128))
MIXING_SHAPES = ((64, 256, 32, 32), (64, 256, 8, 8), (16, 256, 16, 16), (32, 64, 128, 128))
KERNEL_SHAPES = ((64, 256, 32, 32), (64, 256, 64, 64))
SMALL_SHAPES = ((64, 256, 4, 4), (64, 256, 8, 8), (16, 256, 4, 4))
BATCHES = (64, 16)
MIXING_PRECISIONS = ("tf32", "fp32", "bf16")


class Pair(NamedTuple):
    """Two generators: with a plain layer, and with ours in its place.

    Attributes:
        plain: the former among contenders.
        plainly, ours: the layers in words.
        spec: of our layer.
        goal: most time of the latter, that of the former being 1.
    """

    plain: str
    plainly: str
    ours: str
    spec: OpSpec
    goal: float


PAIRS = {
    "step": Pair("bn", "batch norm", "SPN", SPN, 1),
    "gconv_step": Pair("conv", "plain convolutions", "GConv", GCONV_MIX, 1.05),
}


def layer(section: Section, head: str, shape: tuple[int, ...], precision: str) -> Call:
    """Of SPN; ``head`` is a key of ``HEADS``, the shape that of the output."""
    return Call(section, SPN, case(head, section.sized(shape)), precision)


def mixings(section: Section, shapes: Iterable[tuple], precisions: Iterable[str]) -> Iterator[tuple[dict, Call]]:
    """Calls of GConv's mixing, each after what its records say of it. As in the generator, there is no bias."""
    for shape in shapes:
        of_shape = Case(section.sized(shape), "", sizes={"bias": 0})
        for precision in precisions:
            yield {"shape": label(shape), "precision": precision}, Call(section, GCONV_MIX, of_shape, precision)


def compiling(section: Section) -> None:
    """Compile the peers under torch.compile beside other work; they are then found in its cache."""
    for what, where, call in peer_calls(section):
        torch._dynamo.reset()
        for name in COMPILED:
            section.attempt(f"compiling {what} {' '.join(where.values())} {name}", call.ready, name)


def peer_calls(section: Section) -> Iterator[tuple[str, dict[str, str], Call]]:
    """Those that torch.compile takes part in; compiling for every shape would take longer than all the rest."""
    shape = LAYER_SHAPES[0]
    for head, precision in product(HEADS, section.some_precisions):
        where = {"head": head, "shape": label(shape), "precision": precision}
        yield "layer", where, layer(section, head, shape, precision)
    for where, call in mixings(section, MIXING_SHAPES[:1], section.some_precisions):
        yield "mixing", where, call


def peers(section: Section) -> None:
    """Forward and backward of plain PyTorch under torch.compile."""
    for what, where, call in peer_calls(section):
        compare(section, what, where, call, COMPILED)


def layers(section: Section) -> None:
    """Forward, and backward alone, of eager mode and of ours in every precision."""
    main, *others = LAYER_SHAPES
    rest = [precision for precision in section.precisions if precision not in section.some_precisions]
    order = [(main, section.precisions), *product(others, [section.some_precisions]), *product(others, [rest])]
    for shape, precisions in order:  # should time run out, what counts least is lost
        for head, precision in product(HEADS, precisions):
            where = {"head": head, "shape": label(shape), "precision": precision}
            call = layer(section, head, shape, precision)
            compare(section, "layer", where, call, (*EAGER, *section.fused(SPN)))


def mixing(section: Section) -> None:
    """The same of GConv's mixing; and which impl ``auto`` would take."""
    for where, call in mixings(section, MIXING_SHAPES, section.among(MIXING_PRECISIONS)):
        compare(section, "mixing", where, call, (*EAGER, *section.fused(GCONV_MIX)))
        u = call.inputs(DENSE_LAYOUTS[0])["u"]
        section.add("auto", **where, impl=preferred(u, torch.backends.cudnn.allow_tf32))


def compare(section: Section, what: str, where: dict[str, str], call: Call, names: Iterable[str]) -> None:
    """Forward, and backward alone, of several contenders."""
    torch._dynamo.reset()
    titled = " ".join((what, *where.values()))
    contenders: dict[str, dict[str, Timed]] = {"forward": {}, "backward": {}}
    for name in names:
        if not section.has(what, **where, mode="backward", contender=name):
            passes = section.attempt(f"{titled} {name}", call.ready, name)
            for mode, timed in (passes.timed() if passes else {}).items():
                contenders[mode][name] = timed
    for mode, rivals in contenders.items():
        times = section.attempt(f"{titled} {mode}", section.stopwatch.device_times, rivals)
        for name, spread in (times or {}).items():
            section.add(what, **where, mode=mode, contender=name, **spread._asdict())


def memory(section: Section) -> None:
    """What forward and backward hold at once beyond their inputs, and what is kept in between."""
    shape = LAYER_SHAPES[0]
    for head, precision in product(HEADS, section.some_precisions):
        call = layer(section, head, shape, precision)
        for name in (*EAGER, *section.fused(SPN)):
            where = {"head": head, "shape": label(shape), "precision": precision, "contender": name}
            if not section.has("memory", **where):
                section.attempt(" ".join(("memory", *where.values())), add_memory, section, call, where)


def add_memory(section: Section, call: Call, where: dict[str, str]) -> None:
    passes = call.ready(where["contender"])
    peak = section.stopwatch.peak_bytes(passes.both)
    saved = saved_bytes(passes.forward, passes.tensors.values())
    section.add("memory", **where, peak=peak, saved=saved, output=passes.forward().nbytes)


def kernels(section: Section) -> None:
    """The time of each kernel of the fused layers, from a profile, and the bytes that it must move."""
    for shape, head, precision in product(KERNEL_SHAPES, HEADS, section.some_precisions):
        where = {"head": head, "shape": label(shape), "precision": precision}
        profile(section, where, layer(section, head, shape, precision))
    for where, call in mixings(section, MIXING_SHAPES[:1], section.some_precisions):
        profile(section, {"head": "mixing"} | where, call)
    memory(section)


def profile(section: Section, where: dict[str, str], call: Call) -> None:
    for name in section.fused(call.spec):
        of_name = where | {"contender": name}
        if not section.has("kernel", **of_name):
            section.attempt(" ".join(("kernels", *of_name.values())), add_kernels, section, call, of_name)


def add_kernels(section: Section, call: Call, where: dict) -> None:
    calls = section.stopwatch.launches(call.passes(where["contender"]).both, rounds=11)
    if not calls:
        section.add("no kernels", **where)
        return
    upsample = call.case.options.get("upsample", 1)
    # The Triton kernels move in both layouts what the CUDA kernels move in channels_last.
    like_channels_last = where["contender"] != "native-contiguous"
    moved = kernel_bytes(call.case.shape, call.dtype.itemsize, upsample, like_channels_last)
    grouped: dict[str, list[list[Launch]]] = {}
    for position, launches in enumerate(calls):
        mode = "forward"
        for launch in launches:
            ours = re.search(r"(spn|gconv)_\w*kernel|\w*statistics_kernel", launch.name)
            key = ours[0] if ours else launch.name[:120]
            if key.startswith("spn_bwd"):
                mode = "backward"
            if key == "spn_projection_kernel":  # one kernel, two uses
                key += f", {mode}"
            grouped.setdefault(key, [[] for _ in calls])[position].append(launch)
    for key, per_call in grouped.items():
        details = next(launch.details for launches in per_call for launch in launches)
        section.add(
            "kernel",
            **where,
            kernel=key,
            times_per_call=median(map(len, per_call)),
            **Spread.of([sum(launch.seconds for launch in launches) for launches in per_call])._asdict(),
            bytes=moved.get(key),
            copy=section.stopwatch.copy_seconds(moved[key]) if key in moved else None,
            **{key.replace(" ", "_"): details.get(key) for key in ("registers per thread", "grid", "block")},
        )


def small(section: Section) -> None:
    """Wall time where launches are all that takes time, also replayed from a CUDA graph; and how many there are."""
    for shape, head in product(SMALL_SHAPES, HEADS):
        if not section.has("small", head=head, shape=label(shape)):
            small_layer(section, head, shape)


def small_layer(section: Section, head: str, shape: tuple[int, ...]) -> None:
    call = layer(section, head, shape, "tf32")
    where, titled = {"head": head, "shape": label(shape)}, f"small {head} {label(shape)}"
    contenders: dict[str, dict[str, Callable[[], object]]] = {"forward": {}, "forward + backward": {}}
    for name in (*EAGER, *section.fused(SPN)):
        if passes := section.attempt(f"{titled} {name}", call.ready, name):
            contenders["forward"][name], contenders["forward + backward"][name] = passes.forward, passes.both
            if shape == SMALL_SHAPES[0] and name in section.fused(SPN):
                of_name = where | {"contender": name}
                section.attempt(f"launches {titled} {name}", add_launches, section, of_name, passes)
    for mode, runs in contenders.items():
        graphs = {
            name: section.attempt(f"graph {titled} {name} {mode}", section.stopwatch.graph, run)
            for name, run in runs.items()
        }
        for graph, contestants in ((False, runs), (True, {name: run for name, run in graphs.items() if run})):
            clocked = f"{titled} {mode}{' graph' if graph else ''}"
            times = section.attempt(clocked, section.stopwatch.wall_times, contestants)
            for name, spread in (times or {}).items():
                section.add("small", **where, mode=mode, graph=graph, contender=name, **spread._asdict())


def add_launches(section: Section, where: dict, passes: Passes) -> None:
    """Launches of forward and of backward: what a call with both has more than a call with the first."""
    found = [section.stopwatch.launches(run, rounds=3) for run in (passes.forward, passes.both)]
    if not all(found):
        section.add("no kernels", **where)
        return
    names = [[launch.name[:120] for launch in calls[-1]] for calls in found]
    for mode, launched in (("forward", names[0]), ("backward", names[1][len(names[0]) :])):
        section.add("launches", **where, mode=mode, count=len(launched), kernels=launched)


def step(section: Section) -> None:
    """Forward and backward of whole generators, each with a plain layer and with ours."""
    batches = BATCHES if section.stopwatch.on_gpu else (2,)
    for (of, pair), batch, precision in product(PAIRS.items(), batches, section.some_precisions):
        where = {"of": of, "batch": batch, "precision": precision}
        titled = f"{of} {batch} {precision}"
        if section.has("step", **where):
            continue
        contenders = {}
        for impl, layout in product((pair.plain, *section.impls(pair.spec), "eager"), DENSE_LAYOUTS):
            name = f"{impl}-{layout}"
            if run := section.attempt(f"{titled} {name}", ready_step, section, where, name):
                contenders[name] = run
        timed = {name: Timed(lambda _, run=run: run()) for name, run in contenders.items()}
        stopwatch = section.stopwatch
        for clock, measure, rivals in (
            ("device", stopwatch.device_times, timed),
            ("wall", stopwatch.wall_times, contenders),
        ):
            for name, spread in (section.attempt(f"{titled} {clock}", measure, rivals) or {}).items():
                section.add("step", **where, clock=clock, contender=name, **spread._asdict())


def ready_step(section: Section, where: dict, name: str) -> Callable[[], object]:
    """One that has run, and what it holds at once."""
    run = generator_step(section, **where, name=name)
    run()
    section.add("step memory", **where, contender=name, peak=section.stopwatch.peak_bytes(run))
    return run


def generator_step(section: Section, of: str, batch: int, precision: str, name: str) -> Callable[[], object]:
    """In bf16 under autocast, with weights in float32."""
    torch.backends.cudnn.allow_tf32 = True
    impl, layout = name.split("-")
    model = generator("reference" if impl == "eager" else impl, layout, of).to(section.device)
    z, weights = torch.randn(batch, LATENT_DIM[of], device=section.device), list(model.parameters())

    def forward() -> Tensor:
        with torch.autocast(section.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return model(z)

    grad = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), weights, grad)


SECTIONS = {
    section.__name__: section
    for section in (facts, check, first, kernels, layers, step, mixing, small, compiling, peers)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a trial")
    parser.add_argument("--records", type=Path, required=True, metavar="FILE")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    section = Section(arguments.device, arguments.records)
    try:
        SECTIONS[arguments.section](section)
    except ContextLostError:
        sys.exit(CONTEXT_LOST)
    sys.exit(section.failed)


if __name__ == "__main__":
    main()
