"""The goals, and how far they are met."""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from statistics import median

from benchmarks.gpu.cases import BATCHES, LAYER_SHAPES, MIXING_SHAPES, PAIRS, SMALL_SHAPES
from benchmarks.gpu.records import MODES, TITLES, WORDS, Records
from benchmarks.gpu.section import EAGER, FUSED
from benchmarks.results import LAYOUTS, Target
from benchmarks.test_spn import HEADS, label

Goals = list[tuple[Target, str]]  # each goal, its ``median`` None where nothing was measured, and a remark
# Least share of a measured copy's bandwidth: float32, bfloat16.
SHARES = {
    "statistics_kernel": (0.90, 0.90),
    "spn_fwd_modulate_kernel": (0.88, 0.85),
    "spn_bwd_reduce_kernel": (0.85, 0.75),
    "spn_bwd_apply_kernel": (0.88, 0.82),
}
# Its bandwidth outruns its instructions in bfloat16.
SHARES_H200 = SHARES | {
    "spn_fwd_modulate_kernel": (0.88, 0.70),
    "spn_bwd_reduce_kernel": (0.70, 0.45),
    "spn_bwd_apply_kernel": (0.85, 0.60),
}


def targets(records: Records) -> dict[str, Goals]:
    """Those of SPN by impl, and those of GConv."""
    of_gconv = [*_step_targets(records, "gconv_step", list(FUSED)), *_mixing_targets(records)]
    return {"SPN, native": _native_targets(records), "SPN, triton": _triton_targets(records), "GConv": of_gconv}


def _native_targets(records: Records) -> Goals:
    found: Goals = []
    native = FUSED["native"]

    def add(what: str, goal: float, at_least: bool, measured: float | None, remark: str = "") -> None:
        found.append((Target(what, goal, at_least, measured), remark))

    on_h200 = is_h200(records)
    for head, mode, precision in product(HEADS, MODES, WORDS):
        goal = 8 if head == "up" else 3 if on_h200 and (mode, precision) == ("backward", "bf16") else 4
        where = {"head": head, "mode": mode, "precision": precision}
        found.append(_by_shape(f"{_named_case(**where)}: speed-up", goal, partial(records.speed_up, "native", **where)))
    for kernel, goals in share_goals(records).items():
        for precision, goal in zip(("tf32", "bf16"), goals, strict=True):
            shares = [share for _, share in records.shares("native", kernel, precision, head="plain")]
            remark = f"median {median(shares):.2f}, best {max(shares):.2f}" if shares else ""
            what = f"{kernel}, {precision.replace('tf32', 'fp32')}: bandwidth over a copy's, worst"
            add(what, goal, True, min(shares, default=None), remark)
    found += _step_targets(records, "step", ["native"])
    for mode, goal in (("forward", 4), ("backward", 6)):
        counts = [e["count"] for e in records.all("launches", mode=mode) if e["contender"] in native]
        add(f"small shapes, {mode}: launches, most", goal, False, max(counts, default=None))
    for mode in ("forward", "forward + backward"):
        ratios = [
            records.ratio(EAGER, native, "small", head="plain", shape=label(shape), mode=mode, graph=False)
            for shape in SMALL_SHAPES
        ]
        ratios = [ratio for ratio in ratios if ratio]
        remark = "each shape: " + ", ".join(f"{ratio:.1f}" for ratio in ratios)
        add(f"small shapes, {mode}: wall time, speed-up over eager, worst", 4, True, min(ratios, default=None), remark)
    for head, goal in (("plain", 1), ("up", 0.25)):
        kept = [e["saved"] / e["output"] for e in records.all("memory", head=head) if e["contender"] in native]
        measured = round(max(kept), 2) if kept else None  # beside the tensor there are four vectors
        add(f"{TITLES[head]}: saved for backward, in tensors of the output's size", goal, False, measured)
    return found


def _triton_targets(records: Records) -> Goals:
    found = []
    for head, mode in product(HEADS, MODES):
        where = {"head": head, "mode": mode, "precision": "tf32"}
        found.append(_by_shape(f"{_named_case(**where)}: speed-up", 3, partial(records.speed_up, "triton", **where)))
    for head, mode, precision in product(HEADS, MODES, ("tf32", "bf16")):
        where = {"head": head, "mode": mode, "precision": precision}
        speed = partial(records.ratio, FUSED["native"], FUSED["triton"], "layer", **where)
        found.append(_by_shape(f"{_named_case(**where)}: speed over native's", 0.8, speed))
    return found


def _step_targets(records: Records, of: str, impls: list[str]) -> Goals:
    """Of the best of some impls; beside it eager's ratio and, where there are several impls, those of each."""
    found = []
    for batch, precision, clock in product(BATCHES, ("tf32", "bf16"), ("device", "wall")):
        where = {"batch": batch, "precision": precision, "clock": clock}
        what = f"generator step, batch {batch}, {WORDS[precision]}: {clock} time over {PAIRS[of].plainly}"
        others = {name: records.step_ratio(of, [name], **where) for name in ("eager", *(impls if impls[1:] else ()))}
        remark = ", ".join(f"{name} {ratio:.2f}" for name, ratio in others.items() if ratio)
        found.append((Target(what, PAIRS[of].goal, False, records.step_ratio(of, impls, **where)), remark))
    return found


def _mixing_targets(records: Records) -> Goals:
    """Strict float32 has none: there, its operations bind both."""
    found = []
    for mode, precision, layout in product(MODES, ("tf32", "bf16"), LAYOUTS):
        eager, *ours = (f"{impl}-{layout}" for impl in ("eager", *FUSED))
        speed_up = partial(records.ratio, [eager], ours, "mixing", mode=mode, precision=precision)
        what = f"mixing, {mode}, {WORDS[precision]}, {LAYOUTS[layout]}: speed-up over eager"
        found.append(_by_shape(what, 2, speed_up, MIXING_SHAPES))
    return found


def _named_case(head: str, mode: str, precision: str) -> str:
    return f"{TITLES[head]}, {mode}, {WORDS[precision]}"


def _by_shape(
    what: str, goal: float, figure: Callable[..., float | None], shapes: Iterable[tuple[int, ...]] = LAYER_SHAPES
) -> tuple[Target, str]:
    """A goal for a figure of the main shape, the first, and beside it the other shapes'."""
    (_, main), *others = ((shape, figure(shape=shape)) for shape in map(label, shapes))
    remark = ", ".join(f"{value:.2f} at {shape}" for shape, value in others if value)
    return Target(what, goal, True, main), remark


def is_h200(records: Records) -> bool:
    return "H200" in records.gpu


def share_goals(records: Records) -> dict[str, tuple[float, float]]:
    return SHARES_H200 if is_h200(records) else SHARES
