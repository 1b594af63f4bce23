"""``python -m benchmarks.gpu.cases SECTION --records FILE``: measure one section; each finding is a line of JSON.

A section that is stopped has written what it had found; a contender that fails is told of, and the rest goes on.
"""

import argparse
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.contenders import PEERS, implementation, saved_bytes
from benchmarks.gpu.timing import Launch, Spread, Stopwatch, Timed
from benchmarks.model import kernel_bytes
from benchmarks.test_generator import generator
from benchmarks.test_spn import HEADS, case, label
from pixnorm.testing import DENSE_LAYOUTS, LAYOUTS, SPN, Case, available_impls

PRECISIONS = {  # dtype of x (parameters are float32), whether convolutions may round to TF32
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
    "bf16": (torch.bfloat16, True),
    "fp16": (torch.float16, True),
}
# Of the output.
LAYER_SHAPES = ((64, 256, 32, 32), (16, 256, 32, 32), (32, 64, 128, 128))  # torch.compile takes part in the first
KERNEL_SHAPES = ((64, 256, 32, 32), (64, 256, 64, 64))
SMALL_SHAPES = ((64, 256, 4, 4), (64, 256, 8, 8), (16, 256, 4, 4))
BATCHES = (64, 16)
FUSED = {impl: tuple(f"{impl}-{layout}" for layout in DENSE_LAYOUTS) for impl in ("native", "triton")}
EAGER = tuple(name for name in PEERS if name.startswith("eager"))
COMPILED = tuple(name for name in PEERS if name not in EAGER)


class Section:
    """Where a section writes what it finds, and with what it measures.

    Args:
        device: to measure on. On the CPU all sizes shrink: that is a trial of this code.
        records: the file to write, one JSON object a line.

    Attributes:
        impls: the fused ones that can run here. With none, ask for native all the same: it says how to get it.
        fused: their contenders.
    """

    def __init__(self, device: str, records: Path):
        self.device, self.records = torch.device(device), records
        self.stopwatch = Stopwatch(self.device)
        self.failed = False
        self.impls = [impl for impl in FUSED if impl in available_impls(self.device.type)] or ["native"]
        self.fused = [name for impl in self.impls for name in FUSED[impl]]

    def add(self, what: str, **record) -> None:
        record = {"what": what, **record}
        with self.records.open("a") as file:
            file.write(json.dumps(record) + "\n")
        shown = {key: value for key, value in record.items() if key != "kernels"}
        print(" ".join(str(value) for value in shown.values()), flush=True)

    @contextmanager
    def attempt(self, where: str) -> Iterator[None]:
        """What fails inside is told of, and does not stop the section."""
        try:
            yield
        except Exception as error:
            self.failed = True
            traceback.print_exc()
            self.add("failure", where=where, error=f"{type(error).__name__}: {error}".strip().splitlines()[0][:300])
            self.stopwatch.synchronize()  # after a lost context nothing more can be found: this raises

    @property
    def precisions(self) -> tuple[str, ...]:
        return tuple(PRECISIONS) if self.stopwatch.on_gpu else ("tf32",)

    @property
    def some_precisions(self) -> tuple[str, ...]:
        return tuple(precision for precision in self.precisions if precision in ("tf32", "bf16"))

    def sized(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape if self.stopwatch.on_gpu else (2, 8, min(shape[2], 8), min(shape[3], 8))


class Passes(NamedTuple):
    """Of one contender: its forward, which keeps what backward needs; the backward of a result; the tensors given."""

    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], object]
    tensors: dict[str, Tensor]

    def both(self) -> object:
        return self.backward(self.forward())


@lru_cache(maxsize=1)  # drawing takes longer than measuring; the precisions of one case follow each other
def draw(case: Case, device: torch.device) -> dict[str, Tensor]:
    return SPN.inputs(case, device=device)


class Layer:
    """One call of SPN in one precision, run by several contenders.

    Args:
        head: a key of ``HEADS``.
        shape: that of the output.
        precision: a key of ``PRECISIONS``; sets the flag that allows TF32.
    """

    def __init__(self, section: Section, head: str, shape: tuple[int, ...], precision: str):
        self.dtype, torch.backends.cudnn.allow_tf32 = PRECISIONS[precision]
        self.case = case(head, section.sized(shape))
        self.tensors = draw(self.case, section.device)
        self.functions: dict[str, Callable[..., Tensor]] = {}

    def inputs(self, layout: str) -> dict[str, Tensor]:
        """The tensors, those that get a gradient as leaves."""
        tensors = self.tensors | {"x": LAYOUTS[layout](self.tensors["x"].to(self.dtype))}
        return {
            name: tensor.detach().requires_grad_() if name in SPN.differentiable else tensor
            for name, tensor in tensors.items()
        }

    def passes(self, name: str) -> "Passes":
        impl, layout = name.split("-")
        tensors = self.inputs(layout)
        leaves = [tensors[leaf] for leaf in SPN.differentiable]
        function = implementation(SPN, impl)

        def forward() -> Tensor:
            return function(**tensors, **self.case.options)

        grad = torch.randn_like(forward())
        return Passes(forward, lambda y: torch.autograd.grad(y, leaves, grad), tensors)


def compiling(section: Section) -> None:
    """Compile what torch.compile and Triton will be asked for, beside other work; it is then found in their caches."""
    ours = [name for name in section.fused if name.startswith("triton")]
    for shape in dict.fromkeys((*LAYER_SHAPES, *KERNEL_SHAPES, *SMALL_SHAPES)):
        for head in HEADS:
            for precision in section.precisions if shape in LAYER_SHAPES else section.some_precisions:
                # The code that torch.compile writes for strict float32 is that for TF32.
                theirs = COMPILED if shape == LAYER_SHAPES[0] and precision != "fp32" else ()
                if not ours and not theirs:
                    continue
                torch._dynamo.reset()
                layer = Layer(section, head, shape, precision)
                for name in (*ours, *theirs):
                    where = f"{name} {head} {label(shape)} {precision}"
                    with section.attempt(where):
                        layer.passes(name).both()
                        print("compiled", where, flush=True)
    for batch, precision, name in product(BATCHES, section.some_precisions, ours):
        with section.attempt(f"step {batch} {precision} {name}"):
            generator_step(section, batch, precision, name)()


def layers(section: Section) -> None:
    """Forward, and backward alone, of every contender in every precision."""
    main, *others = LAYER_SHAPES
    rest = [precision for precision in section.precisions if precision not in section.some_precisions]
    order = [(main, section.precisions), *product(others, [section.some_precisions]), *product(others, [rest])]
    for shape, precisions in order:  # should time run out, what counts least is lost
        # Elsewhere, compiling would take longer than all the rest.
        rivals = (*(PEERS if shape == main else EAGER), *section.fused)
        for head in HEADS:
            for precision in precisions:
                if precision != "fp32":  # its code is that of TF32
                    torch._dynamo.reset()
                layer = Layer(section, head, shape, precision)
                forwards, backwards = {}, {}
                for name in rivals:
                    with section.attempt(f"{name} {head} {label(shape)} {precision}"):
                        passes = layer.passes(name)
                        passes.both()
                        forwards[name] = Timed(lambda _, passes=passes: passes.forward())
                        backwards[name] = Timed(passes.backward, passes.forward)
                for mode, contenders in (("forward", forwards), ("backward", backwards)):
                    found = section.stopwatch.device_times(contenders)
                    for name, spread in found.items():
                        add_layer(section, head, shape, precision, mode, name, spread)


def add_layer(section: Section, head, shape, precision, mode, contender, spread: Spread) -> None:
    section.add(
        "layer", head=head, shape=label(shape), precision=precision, mode=mode, contender=contender, **spread._asdict()
    )


def memory(section: Section) -> None:
    """What forward and backward hold at once beyond their inputs, and what is kept in between."""
    shape = LAYER_SHAPES[0]
    for head in HEADS:
        for precision in section.some_precisions:
            layer = Layer(section, head, shape, precision)
            for name in (*EAGER, *section.fused):
                with section.attempt(f"memory {name} {head} {precision}"):
                    passes = layer.passes(name)
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
    for shape in KERNEL_SHAPES:
        for head in HEADS:
            for precision in section.some_precisions:
                layer = Layer(section, head, shape, precision)
                for name in section.fused:
                    with section.attempt(f"kernels {head} {label(shape)} {precision} {name}"):
                        calls = section.stopwatch.launches(layer.passes(name).both, rounds=11)
                        where = {"head": head, "shape": label(shape), "precision": precision, "contender": name}
                        add_kernels(section, layer, where, calls)


def add_kernels(section: Section, layer: Layer, where: dict, calls: list[list[Launch]]) -> None:
    if not calls:
        section.add("no kernels", **where)
        return
    upsample = layer.case.options.get("upsample", 1)
    # The Triton kernels move in both layouts what the CUDA kernels move in channels_last.
    like_channels_last = where["contender"] != "native-contiguous"
    moved = kernel_bytes(layer.case.shape, layer.dtype.itemsize, upsample, like_channels_last)
    grouped: dict[str, list[list[Launch]]] = {}
    for position, call in enumerate(calls):
        mode = "forward"
        for launch in call:
            ours = re.search(r"spn_\w*kernel", launch.name)
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
            layer = Layer(section, head, shape, "tf32")
            where = {"head": head, "shape": label(shape)}
            contenders: dict[str, dict[str, Callable[[], object]]] = {"forward": {}, "forward + backward": {}}
            for name in (*EAGER, *section.fused):
                with section.attempt(f"small {head} {label(shape)} {name}"):
                    passes = layer.passes(name)
                    runs = (passes.forward, passes.both)
                    for mode, run in zip(contenders, runs, strict=True):
                        run()
                        contenders[mode][name] = run
                    if shape == SMALL_SHAPES[0] and name in section.fused:
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
    """Forward and backward of the whole generator, with batch norm and with SPN."""
    for batch in BATCHES if section.stopwatch.on_gpu else (2,):
        for precision in section.some_precisions:
            contenders = {}
            for name in (f"{norm}-{layout}" for norm in ("bn", *section.impls, "eager") for layout in DENSE_LAYOUTS):
                with section.attempt(f"step {batch} {precision} {name}"):
                    contenders[name] = generator_step(section, batch, precision, name)
                    contenders[name]()
                    peak = section.stopwatch.peak_bytes(contenders[name])
                    section.add("step memory", batch=batch, precision=precision, contender=name, peak=peak)
            timed = {name: Timed(lambda _, run=run: run()) for name, run in contenders.items()}
            for clock, found in (
                ("device", section.stopwatch.device_times(timed)),
                ("wall", section.stopwatch.wall_times(contenders)),
            ):
                for name, spread in found.items():
                    where = {"batch": batch, "precision": precision, "clock": clock, "contender": name}
                    section.add("step", **where, **spread._asdict())


def generator_step(section: Section, batch: int, precision: str, name: str) -> Callable[[], object]:
    """In bf16 under autocast, with weights in float32."""
    torch.backends.cudnn.allow_tf32 = True
    norm, layout = name.split("-")
    model = generator("reference" if norm == "eager" else norm, layout).to(section.device)
    z, weights = torch.randn(batch, 128, device=section.device), list(model.parameters())

    def forward() -> Tensor:
        with torch.autocast(section.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return model(z)

    grad = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), weights, grad)


SECTIONS = {section.__name__: section for section in (compiling, kernels, layers, step, small)}


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
