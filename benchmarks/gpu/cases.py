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

from benchmarks.contenders import PEERS
from benchmarks.gpu.section import COMPILED, EAGER, Call, Section
from benchmarks.gpu.timing import Launch, Spread, Timed
from benchmarks.model import kernel_bytes
from benchmarks.test_generator import LATENT_DIM, generator
from benchmarks.test_spn import HEADS, case, label
from pixnorm.ops.gconv import _preferred
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


def rivals(section: Section, spec: OpSpec, with_compiled: bool) -> list[str]:
    """Of a comparison; compiling for every shape would take longer than all the rest."""
    return [*(PEERS if with_compiled else EAGER), *section.fused(spec)]


def of_triton(section: Section, spec: OpSpec) -> list[str]:
    return [name for name in section.fused(spec) if name.startswith("triton")]


def compiling(section: Section) -> None:
    """Compile what torch.compile and Triton will be asked for, beside other work; it is then found in their caches."""
    for shape in dict.fromkeys((*LAYER_SHAPES, *KERNEL_SHAPES, *SMALL_SHAPES)):
        for head in HEADS:
            for precision in section.precisions if shape in LAYER_SHAPES else section.some_precisions:
                # The code that torch.compile writes for strict float32 is that for TF32.
                theirs = COMPILED if shape == LAYER_SHAPES[0] and precision != "fp32" else ()
                if names := (*of_triton(section, SPN), *theirs):
                    call = layer(section, head, shape, precision)
                    compile_call(section, f"{head} {label(shape)} {precision}", call, names)
    compile_steps(section, "step")


def compiling_gconv(section: Section) -> None:
    """The same for GConv."""
    for where, call in mixings(section, MIXING_SHAPES, section.among(MIXING_PRECISIONS)):
        main = where["shape"] == label(MIXING_SHAPES[0])
        theirs = COMPILED if main and where["precision"] != "fp32" else ()
        compile_call(section, " ".join(where.values()), call, (*of_triton(section, GCONV_MIX), *theirs))
    compile_steps(section, "gconv_step")


def compile_call(section: Section, where: str, call: Call, names: Iterable[str]) -> None:
    torch._dynamo.reset()
    for name in names:
        with section.attempt(f"{name} {where}"):
            call.passes(name).both()
            print("compiled", name, where, flush=True)


def compile_steps(section: Section, of: str) -> None:
    for batch, precision, name in product(BATCHES, section.some_precisions, of_triton(section, PAIRS[of].spec)):
        with section.attempt(f"{of} {batch} {precision} {name}"):
            generator_step(section, of, batch, precision, name)()


def layers(section: Section) -> None:
    """Forward, and backward alone, of every contender in every precision."""
    main, *others = LAYER_SHAPES
    rest = [precision for precision in section.precisions if precision not in section.some_precisions]
    order = [(main, section.precisions), *product(others, [section.some_precisions]), *product(others, [rest])]
    for shape, precisions in order:  # should time run out, what counts least is lost
        for head, precision in product(HEADS, precisions):
            where = {"head": head, "shape": label(shape), "precision": precision}
            contenders = rivals(section, SPN, with_compiled=shape == main)
            compare(section, "layer", where, layer(section, head, shape, precision), contenders)


def mixing(section: Section) -> None:
    """The same of GConv's mixing; and which impl ``auto`` would take."""
    for where, call in mixings(section, MIXING_SHAPES, section.among(MIXING_PRECISIONS)):
        main = where["shape"] == label(MIXING_SHAPES[0])
        compare(section, "mixing", where, call, rivals(section, GCONV_MIX, with_compiled=main))
        u = call.inputs(DENSE_LAYOUTS[0])["u"]
        section.add("auto", **where, impl=_preferred(u, torch.backends.cudnn.allow_tf32))


def compare(section: Section, what: str, where: dict[str, str], call: Call, names: Iterable[str]) -> None:
    """Forward, and backward alone, of several contenders."""
    if where["precision"] != "fp32":  # its code is that of TF32
        torch._dynamo.reset()
    forwards, backwards = {}, {}
    for name in names:
        with section.attempt(" ".join((what, *where.values(), name))):
            passes = call.passes(name)
            passes.both()
            forwards[name] = Timed(lambda _, passes=passes: passes.forward())
            backwards[name] = Timed(passes.backward, passes.forward)
    for mode, contenders in (("forward", forwards), ("backward", backwards)):
        for name, spread in section.stopwatch.device_times(contenders).items():
            section.add(what, **where, mode=mode, contender=name, **spread._asdict())


def memory(section: Section) -> None:
    """What forward and backward hold at once beyond their inputs, and what is kept in between."""
    shape = LAYER_SHAPES[0]
    for head in HEADS:
        for precision in section.some_precisions:
            call = layer(section, head, shape, precision)
            for name in (*EAGER, *section.fused(SPN)):
                with section.attempt(f"memory {name} {head} {precision}"):
                    passes = call.passes(name)
                    passes.both()
                    peak = section.stopwatch.peak_bytes(passes.both)
                    saved = saved_bytes(passes.forward, passes.tensors.values())
                    output = passes.forward().nbytes
                    where = {"head": head, "shape": label(shape), "precision": precision, "contender": name}
                    section.add("memory", **where, peak=peak, saved=saved, output=output)


def kernels(section: Section) -> None:
    """The time of each kernel of the fused layers, from a profile, and the bytes that it must move."""
    section.add("copy", bandwidth=section.stopwatch.copy_bandwidth())
    memory(section)
    for shape, head, precision in product(KERNEL_SHAPES, HEADS, section.some_precisions):
        where = {"head": head, "shape": label(shape), "precision": precision}
        profile(section, where, layer(section, head, shape, precision))
    for where, call in mixings(section, MIXING_SHAPES[:1], section.some_precisions):
        profile(section, {"head": "mixing"} | where, call)


def profile(section: Section, where: dict[str, str], call: Call) -> None:
    for name in section.fused(call.spec):
        with section.attempt(" ".join(("kernels", *where.values(), name))):
            calls = section.stopwatch.launches(call.passes(name).both, rounds=11)
            add_kernels(section, call, where | {"contender": name}, calls)


def add_kernels(section: Section, call: Call, where: dict, calls: list[list[Launch]]) -> None:
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
            ours = re.search(r"(spn|gconv)_\w*kernel", launch.name)
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
            **{key.replace(" ", "_"): details.get(key) for key in ("registers per thread", "grid", "block")},
        )


def small(section: Section) -> None:
    """Wall time where launches are all that takes time, also replayed from a CUDA graph; and how many there are."""
    for shape in SMALL_SHAPES:
        for head in HEADS:
            call = layer(section, head, shape, "tf32")
            where = {"head": head, "shape": label(shape)}
            contenders: dict[str, dict[str, Callable[[], object]]] = {"forward": {}, "forward + backward": {}}
            for name in (*EAGER, *section.fused(SPN)):
                with section.attempt(f"small {head} {label(shape)} {name}"):
                    passes = call.passes(name)
                    runs = (passes.forward, passes.both)
                    for mode, run in zip(contenders, runs, strict=True):
                        run()
                        contenders[mode][name] = run
                    if shape == SMALL_SHAPES[0] and name in section.fused(SPN):
                        add_launches(section, where | {"contender": name}, *runs)
            for mode, runs in contenders.items():
                replays = {}
                for name, run in runs.items():
                    with section.attempt(f"graph {head} {label(shape)} {name} {mode}"):
                        replay = section.stopwatch.graph(run)
                        if replay:
                            replays[name] = replay
                for graph, contestants in ((False, runs), (True, replays)):
                    for name, spread in section.stopwatch.wall_times(contestants).items():
                        section.add("small", **where, mode=mode, graph=graph, contender=name, **spread._asdict())


def add_launches(section: Section, where: dict, forward: Callable[[], object], both: Callable[[], object]) -> None:
    """Launches of forward and of backward: what a call with both has more than a call with the first."""
    found = [section.stopwatch.launches(run, rounds=3) for run in (forward, both)]
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
        contenders = {}
        for impl, layout in product((pair.plain, *section.impls(pair.spec), "eager"), DENSE_LAYOUTS):
            name = f"{impl}-{layout}"
            with section.attempt(f"{of} {batch} {precision} {name}"):
                contenders[name] = generator_step(section, of, batch, precision, name)
                contenders[name]()
                peak = section.stopwatch.peak_bytes(contenders[name])
                section.add("step memory", **where, contender=name, peak=peak)
        timed = {name: Timed(lambda _, run=run: run()) for name, run in contenders.items()}
        for clock, found in (
            ("device", section.stopwatch.device_times(timed)),
            ("wall", section.stopwatch.wall_times(contenders)),
        ):
            for name, spread in found.items():
                section.add("step", **where, clock=clock, contender=name, **spread._asdict())


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


SECTIONS = {section.__name__: section for section in (compiling, compiling_gconv, kernels, layers, mixing, step, small)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a trial")
    parser.add_argument("--records", type=Path, required=True, metavar="FILE")
    arguments = parser.parse_args()
    section = Section(arguments.device, arguments.records)
    torch.manual_seed(0)
    SECTIONS[arguments.section](section)
    sys.exit(section.failed)


if __name__ == "__main__":
    main()
