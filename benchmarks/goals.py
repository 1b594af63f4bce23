"""The goals, and how far they are met."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import geometric_mean, median

from benchmarks.networks import MEASURED, figures
from benchmarks.ops import OPS
from benchmarks.records import Records, layouts_of, names_of
from benchmarks.registry import LAYOUTS, LIBRARIES, MAIN_PRECISIONS, MODES, PRECISIONS, Op, SpeedUp, in_layouts, label

BATCHES = {True: (16,), False: (64, 16)}  # of a step, on the CPU and on a GPU
MODES_OF = {True: ("forward", "forward_backward"), False: ("forward", "backward")}


@dataclass(frozen=True)
class Target:
    """A goal, and what was measured.

    Attributes:
        what: is measured.
        goal: the bound, a lower one if ``at_least``.
        median, shortest: by the medians and by the shortest rounds; None: not measured.
        floor: what a call that does only what it must would reach.
        remark: other figures.
    """

    what: str
    goal: float
    at_least: bool
    median: float | None
    shortest: float | None = None
    floor: float | None = None
    remark: str = ""

    @property
    def shortfall(self) -> float:
        """How far the goal is missed, as a fraction of it; 0 or less if it is met."""
        if not self.goal:
            return self.median
        return 1 - self.median / self.goal if self.at_least else self.median / self.goal - 1

    @property
    def cells(self) -> tuple[str, ...]:
        """A row of the table: goal, measured, verdict, floor, remark."""
        bound = f"{'≥' if self.at_least else '≤'} {self.goal:g}"
        if self.median is None:
            return self.what, bound, "", "**not measured**", "", self.remark
        measured = f"{self.median:.2f}" + (f" ({self.shortest:.2f})" if self.shortest else "")
        verdict = "met" if self.shortfall <= 0 else f"**missed by {self.shortfall:.0%}**"
        return self.what, bound, measured, verdict, f"{self.floor:.2f}" if self.floor else "", self.remark


def targets(records: Records) -> dict[str, list[Target]]:
    """All goals, by op."""
    kinds = (_steps, _speed_ups, _wholes, _over_copy, _shares, _launches, _small, _saved)
    found = {op.title: [target for kind in kinds for target in kind(records, op)] for op in OPS.values()}
    return found | {"Networks": list(_networks(records))}


def _networks(records: Records) -> Iterator[Target]:
    """A training step; beside it torch.compile, where it took part."""
    for group in records.groups("network", "network", "batch", "precision", "clock"):
        name, where = group["network"], {key: value for key, value in group.items() if key != "network"}
        (median, compiled), (shortest, _) = (figures(records, name, s, **where) for s in ("median", "shortest"))
        what = f"{name}, batch {group['batch']}, {PRECISIONS[group['precision']].title}, {group['clock']} time: "
        remark = f"over torch.compile {compiled:.2f}" if compiled else ""
        yield Target(f"{what}training step over eager", MEASURED[name].goal, True, median, shortest, remark=remark)


def _steps(records: Records, op: Op) -> Iterator[Target]:
    """Of the best impl; beside it eager mode's ratio, and that of each impl where there are several."""
    cpu, impls = records.on_cpu, records.impls("step", op=str(op))
    clocks, precisions = (("wall",), ("fp32",)) if cpu else (("device", "wall"), MAIN_PRECISIONS)
    for batch, precision, clock in product(BATCHES[cpu], precisions, clocks):
        ratio = partial(records.step_ratio, op, batch=batch, precision=precision, clock=clock)
        others = {impl: ratio([impl]) for impl in ("eager", *(impls if impls[1:] else ()))}
        products = ratio(LIBRARIES)
        title = f"generator step, batch {batch}, {PRECISIONS[precision].title}, {clock} time, over"
        yield Target(
            f"{title} {op.step.plain_title}",
            op.step.goal["cpu" if cpu else "cuda"],
            False,
            ratio(impls),
            ratio(impls, "shortest"),
            1 + products if products else None,
            ", ".join(f"{impl} {value:.2f}" for impl, value in others.items() if value),
        )
        if cpu:
            over_eager = [
                records.ratio(in_layouts(*impls), in_layouts("eager"), "step", statistic, op=str(op), clock=clock)
                for statistic in ("median", "shortest")
            ]
            yield Target(f"{title} {op.step.title}, eager", 1, False, *over_eager)


def _speed_ups(records: Records, op: Op) -> Iterator[Target]:
    """On the CPU geometric means over all shapes; on a GPU of the main shape, the first, with the others beside it."""
    precisions = ["fp32"] if records.on_cpu else op.precisions
    for speed_up, head, mode in product(op.goals.speed_ups, op.heads, MODES_OF[records.on_cpu]):
        for precision, layouts in product(precisions, layouts_of(op)):
            where = {"op": str(op), "head": head, "mode": mode, "precision": precision}
            yield from _speed_up(records, op, speed_up, layouts, where)


def _speed_up(records: Records, op: Op, speed_up: SpeedUp, layouts: tuple, where: dict) -> Iterator[Target]:
    over, ours = names_of(speed_up.over, layouts), names_of(speed_up.ours, layouts)
    on_cpu = op.heads[where["head"]].cpu or op.shapes.cpu
    shapes = [label(shape) for shape in (on_cpu if records.on_cpu else op.shapes.gpu)]

    def over_all(figure: Callable[[str], float | None]) -> float | None:
        values = [figure(shape) for shape in (shapes if records.on_cpu else shapes[:1])]
        return geometric_mean(values) if all(values) else None

    def ratio(shape: str, statistic: str = "median") -> float | None:
        return records.ratio(over, ours, "layer", statistic, shape=shape, **where)

    by_layout = f", {LAYOUTS[layouts[0]]}" if op.same_layout else ""
    named = (
        f"{op.heads[where['head']].title}, {MODES[where['mode']]}, {PRECISIONS[where['precision']].title}{by_layout}"
    )
    peers = "peers" if speed_up.over[1:] else speed_up.over[0]
    others = {shape: ratio(shape) for shape in (shapes if records.on_cpu else shapes[1:])}
    what, of = f"{named}: {' or '.join(speed_up.ours)} over {peers}", (*where.values(),)[1:]
    if (goal := speed_up.goal(*of, records.gpu)) is not None:
        yield Target(
            f"{what}{', geometric mean' if records.on_cpu else ''}",
            goal,
            True,
            over_all(ratio),
            over_all(partial(ratio, statistic="shortest")),
            over_all(lambda shape: records.at_floor(over, ours, shape=shape, **where)),
            ", ".join(f"{value:.2f} at {shape}" for shape, value in others.items() if value),
        )
    if records.on_cpu and (least := speed_up.never_below(*of, records.gpu)) is not None:
        worst = [
            min(found) if all(found := [ratio(shape, statistic) for shape in shapes]) else None
            for statistic in ("median", "shortest")
        ]
        yield Target(f"{what}, worst shape", least, True, *worst)


def _wholes(records: Records, op: Op) -> Iterator[Target]:
    for (name, whole), mode in product(op.wholes.items() if records.on_cpu else (), MODES_OF[True]):
        if mode not in whole.goal:
            continue
        where = {"op": str(op), "whole": name, "mode": mode}
        names = in_layouts("eager"), in_layouts(*records.impls("whole", op=str(op)))
        ratios = {
            label(shape): [
                records.ratio(*names, "whole", s, shape=label(shape), **where) for s in ("median", "shortest")
            ]
            for shape in whole.shapes
        }
        worst = [min(found) if all(found) else None for found in zip(*ratios.values(), strict=True)]
        remark = ", ".join(f"{value:.2f} at {shape}" for shape, (value, _) in ratios.items() if value)
        what = f"{whole.title}, {MODES[mode]}: over {whole.over}, worst shape"
        yield Target(what, whole.goal[mode], True, *worst, remark=remark)


def _over_copy(records: Records, op: Op) -> Iterator[Target]:
    for head, mode in product(op.heads, MODES_OF[True]) if records.on_cpu and op.goals.over_copy else ():
        worst = []
        for statistic in ("median", "shortest"):
            found = []
            for group in records.groups("layer", "shape", op=str(op), head=head, mode=mode):
                where = {"op": str(op), "head": head, "mode": mode, **group}
                rest = records.outside(in_layouts(*records.impls("layer")), "layer", statistic, **where)
                copied = records.time(["copy-used"], "layer", statistic, **where)
                found += [rest / copied] if rest and copied else []
            worst.append(max(found, default=None))
        what = f"{op.heads[head].title}, {MODES[mode]}: outside the matrix products, over a copy, worst shape"
        # No copies: everything is in the processor's cache.
        if records.all("layer", op=str(op), head=head, mode=mode, contender="copy-used"):
            yield Target(what, op.goals.over_copy, False, *worst)


def _shares(records: Records, op: Op) -> Iterator[Target]:
    goals, head = ({} if records.on_cpu else op.goals.share(records.gpu)), next(iter(op.heads))
    for (kernel, of_kernel), i in product(goals.items(), range(2)):
        found = records.shares("native", kernel, MAIN_PRECISIONS[i], op=str(op), head=head)
        shares = [share for _, share in found]
        remark = f"median {median(shares):.2f}, best {max(shares):.2f}" if shares else ""
        what = f"{kernel}, {('fp32', 'bf16')[i]}: bandwidth over a copy's, worst"
        yield Target(what, of_kernel[i], True, min(shares, default=None), remark=remark)


def _launches(records: Records, op: Op) -> Iterator[Target]:
    for mode, goal in {} if records.on_cpu else op.goals.launches.items():
        found = records.all("launches", op=str(op), mode=mode)
        counts = [entry["count"] for entry in found if entry["contender"] in in_layouts("native")]
        yield Target(f"small shapes, {MODES[mode]}: launches, most", goal, False, max(counts, default=None))


def _small(records: Records, op: Op) -> Iterator[Target]:
    for mode in () if records.on_cpu or not op.goals.small else MODES_OF[True]:
        where = {"op": str(op), "head": next(iter(op.heads)), "mode": mode, "graph": False}
        of_shapes = [
            records.ratio(in_layouts("eager"), in_layouts("native"), "small", shape=label(shape), **where)
            for shape in op.shapes.small
        ]
        ratios = [ratio for ratio in of_shapes if ratio]
        remark = "each shape: " + ", ".join(f"{ratio:.1f}" for ratio in ratios)
        what = f"small shapes, {MODES[mode]}: wall time, speed-up over eager, worst"
        yield Target(what, op.goals.small, True, min(ratios, default=None), remark=remark)


def _saved(records: Records, op: Op) -> Iterator[Target]:
    for head, goal in op.goals.saved.items():
        found = records.all("memory", op=str(op), head=head)
        kept = [entry["saved"] / entry["output"] for entry in found if entry["contender"] in in_layouts("native")]
        # Rounded: a few vectors are saved beside the tensor.
        measured = round(max(kept), 2) if kept else None
        yield Target(
            f"{op.heads[head].title}: saved for backward, in tensors of the output's size", goal, False, measured
        )
