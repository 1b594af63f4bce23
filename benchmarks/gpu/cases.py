"""``python -m benchmarks.gpu.cases SECTION --records FILE``: measure one section; each finding is a line of JSON.

A section that is stopped has written what it had found; a contender that fails is recorded, and the rest goes on.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from statistics import median

import torch

from benchmarks.contenders import Call, Passes, training_step
from benchmarks.goals import BATCHES
from benchmarks.gpu.first import check, facts, first
from benchmarks.gpu.processes import CONTEXT_LOST
from benchmarks.gpu.section import ContextLostError, Section
from benchmarks.networks import MEASURED, OURS, network_step
from benchmarks.ops import OPS
from benchmarks.registry import MAIN_PRECISIONS, Op, Shape, in_layouts, label
from benchmarks.stopwatch import Launch, Spread, Timed
from pixnorm.testing import saved_bytes

EAGER, COMPILED = in_layouts("eager"), in_layouts("compile", "cooperative")


def named(op: Op, head: str, shape: Shape, precision: str) -> dict[str, str]:
    """What the records of a call say of it."""
    return {"op": str(op), "head": head, "shape": label(shape), "precision": precision}


def titled(what: str, where: dict) -> str:
    return " ".join((what, *map(str, where.values())))


def main_calls(section: Section) -> Iterator[tuple[Op, dict[str, str], Callable[[], Call]]]:
    """Each op's heads at its main shape, in the main precisions."""
    for op in OPS.values():
        for head, precision in product(op.heads, section.precisions(MAIN_PRECISIONS)):
            call = op, head, op.shapes.gpu[0], precision
            yield op, named(*call), lambda call=call: section.call(*call)


def compiling(section: Section) -> None:
    """Compile the peers under torch.compile beside other work; they are then found in its cache."""
    for _, where, call in main_calls(section):
        of_call = call()
        for name in COMPILED:
            section.attempt(f"{titled('compiling', where)} {name}", of_call.ready, name)


def peers(section: Section) -> None:
    """Forward and backward of plain PyTorch under torch.compile; for every shape, compiling would take too long."""
    for _, where, call in main_calls(section):
        compare(section, where, call(), COMPILED)


def layers(section: Section) -> None:
    """Forward, and backward alone, of eager mode and of ours; and which impl ``auto`` takes. What counts least is last,
    should time run out."""
    jobs = []
    for op in OPS.values():
        rank = {shape: i for i, shape in enumerate(op.shapes.gpu)}
        for shape, precision, head in product(rank, section.precisions(op.precisions), op.heads):
            jobs.append((rank[shape] > 0 and precision not in MAIN_PRECISIONS, op, head, shape, precision))
    for _, op, *call in sorted(jobs, key=lambda job: job[0]):
        where, of_call = named(op, *call), section.call(op, *call)
        compare(section, where, of_call, (*EAGER, *section.fused(op.spec)))
        for layout in ("contiguous", "channels_last") if op.auto else ():
            x = of_call.inputs(layout)[op.spec.first]
            impl = op.auto(x, of_call.case.options, torch.backends.cudnn.allow_tf32)
            section.add("auto", **where, layout=layout, impl=impl)


def compare(section: Section, where: dict[str, str], call: Call, names: Iterable[str]) -> None:
    """Forward, and backward alone, of several contenders."""
    contenders: dict[str, dict[str, Timed]] = {"forward": {}, "backward": {}}
    for name in names:
        if not section.has("layer", **where, mode="backward", contender=name):
            passes = section.attempt(f"{titled('layer', where)} {name}", call.ready, name)
            for mode, timed in (passes.timed() if passes else {}).items():
                contenders[mode][name] = timed
    for mode, rivals in contenders.items():
        times = section.attempt(f"{titled('layer', where)} {mode}", section.stopwatch.device_times, rivals)
        for name, spread in (times or {}).items():
            section.add("layer", **where, mode=mode, contender=name, **spread._asdict())


def kernels(section: Section) -> None:
    """The time of each kernel of the fused ops from a profile, beside a copy of its bytes; and a call's memory."""
    for op in OPS.values():
        for shape, head, precision in product(op.shapes.kernels, op.heads, section.precisions(MAIN_PRECISIONS)):
            each(section, "kernel", op, (head, shape, precision), section.fused(op.spec), add_kernels)
    for op in OPS.values():
        for head, precision in product(op.heads, section.precisions(MAIN_PRECISIONS)):
            names = (*EAGER, *section.fused(op.spec))
            each(section, "memory", op, (head, op.shapes.gpu[0], precision), names, add_memory)


def each(section: Section, what: str, op: Op, call: tuple, names: Iterable[str], add: Callable) -> None:
    """``add`` the records of each contender that have not been found yet."""
    of_call = section.call(op, *call)
    for name in names:
        where = named(op, *call) | {"contender": name}
        if not section.has(what, **where):
            section.attempt(titled(what, where), add, section, of_call, where)


def add_memory(section: Section, call: Call, where: dict[str, str]) -> None:
    """The most memory held at once beyond the inputs, and what is kept for backward."""
    passes = call.ready(where["contender"])
    peak = section.stopwatch.peak_bytes(passes.both)
    saved = saved_bytes(passes.forward, passes.tensors.values())
    section.add("memory", **where, peak=peak, saved=saved, output=passes.forward().nbytes)


def add_kernels(section: Section, call: Call, where: dict[str, str]) -> None:
    calls = section.stopwatch.launches(call.passes(where["contender"]).both, rounds=11)
    if not calls:
        section.add("no kernels", **where)
        return
    # The Triton kernels move in both layouts what the CUDA kernels move in channels_last.
    like_channels_last = where["contender"] != "native-contiguous"
    upsample = call.op.upsample(where["head"])
    moved = call.op.kernel_bytes(call.case.shape, call.dtype.itemsize, upsample, like_channels_last)
    grouped: dict[str, list[list[Launch]]] = {}
    for position, launches in enumerate(calls):
        mode = "forward"
        for launch in launches:
            key = kernel_name(launch.name)
            mode = "backward" if "_bwd" in key else mode
            if f"{key}, {mode}" in moved:  # one kernel, two uses
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


def kernel_name(launched: str) -> str:
    """Ours without namespaces and template arguments, those of libraries cut."""
    ours = re.search(r"pixnorm::[\w:]*?(\w+_kernel)\b|^(\w+_kernel)$", launched)
    return (ours[1] or ours[2]) if ours else launched[:120]


def small(section: Section) -> None:
    """Wall time of launch-bound calls, also replayed from a CUDA graph; and the number of launches."""
    for op in OPS.values():
        for shape, head in product(op.shapes.small, op.heads):
            small_call(section, op, named(op, head, shape, "tf32"), section.call(op, head, shape, "tf32"))


def small_call(section: Section, op: Op, where: dict[str, str], call: Call) -> None:
    title = titled("small", where)
    if section.has("small", **where):
        return
    contenders: dict[str, dict[str, Callable[[], object]]] = {"forward": {}, "forward_backward": {}}
    for name in (*EAGER, *section.fused(op.spec)):
        if passes := section.attempt(f"{title} {name}", call.ready, name):
            contenders["forward"][name], contenders["forward_backward"][name] = passes.forward, passes.both
            if where["shape"] == label(op.shapes.small[0]) and name not in EAGER:
                of_name = where | {"contender": name}
                section.attempt(f"launches {title} {name}", add_launches, section, of_name, passes)
    for mode, runs in contenders.items():
        graphs = {
            name: section.attempt(f"graph {title} {name} {mode}", section.stopwatch.graph, run)
            for name, run in runs.items()
        }
        for graph, contestants in ((False, runs), (True, {name: run for name, run in graphs.items() if run})):
            clocked = f"{title} {mode}{' graph' if graph else ''}"
            times = section.attempt(clocked, section.stopwatch.wall_times, contestants)
            for name, spread in (times or {}).items():
                section.add("small", **where, mode=mode, graph=graph, contender=name, **spread._asdict())


def add_launches(section: Section, where: dict[str, str], passes: Passes) -> None:
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
    stopwatch = section.stopwatch
    batches = BATCHES[False] if stopwatch.on_gpu else (2,)
    for op, batch, precision in product(OPS.values(), batches, section.precisions(MAIN_PRECISIONS)):
        where = {"op": str(op), "batch": batch, "precision": precision}
        if section.has("step", **where):
            continue
        contenders = {}
        for name in in_layouts(op.step.plain, *section.impls(op.spec), "eager"):
            if run := section.attempt(f"{titled('step', where)} {name}", ready_step, section, op, where, name):
                contenders[name] = run
        timed = {name: Timed(lambda _, run=run: run()) for name, run in contenders.items()}
        clocks = {"device": (stopwatch.device_times, timed), "wall": (stopwatch.wall_times, contenders)}
        for clock, measured in clocks.items():
            for name, spread in (section.attempt(f"{titled('step', where)} {clock}", *measured) or {}).items():
                section.add("step", **where, clock=clock, contender=name, **spread._asdict())


def ready_step(section: Section, op: Op, where: dict, name: str) -> Callable[[], object]:
    """One that has run, and the memory that it holds at once."""
    run = training_step(op, name, where["batch"], where["precision"], section.device)
    run()
    section.add("step memory", **where, contender=name, peak=section.stopwatch.peak_bytes(run))
    return run


def networks(section: Section) -> None:
    """A training step of each of the papers' networks, and the memory that it keeps."""
    stopwatch = section.stopwatch
    for name, precision in product(MEASURED, section.precisions(MAIN_PRECISIONS)):
        batch = MEASURED[name].gpu_batch if stopwatch.on_gpu else 2
        where = {"network": name, "batch": batch, "precision": precision}
        if section.has("network", **where):
            continue
        runs = {}
        for contender in (*EAGER, *OURS):
            of = titled("network", where), contender
            if run := section.attempt(" ".join(of), ready_network, section, where, contender):
                runs[contender] = run
        timed = {contender: Timed(lambda _, run=run: run()) for contender, run in runs.items()}
        for clock, measured in {
            "device": (stopwatch.device_times, timed),
            "wall": (stopwatch.wall_times, runs),
        }.items():
            for contender, spread in (section.attempt(f"{titled('network', where)} {clock}", *measured) or {}).items():
                section.add("network", **where, clock=clock, contender=contender, **spread._asdict())


def ready_network(section: Section, where: dict, contender: str) -> Callable[[], object]:
    """A step that has run, and the memory that it keeps."""
    run, kept = network_step(where["network"], contender, where["batch"], where["precision"], section.device)
    run()
    section.add("network memory", **where, contender=contender, saved=kept(), peak=section.stopwatch.peak_bytes(run))
    return run


SECTIONS = {
    section.__name__: section
    for section in (facts, check, first, kernels, layers, step, networks, small, compiling, peers)
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
