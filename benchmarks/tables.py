"""The results as Markdown."""

from collections.abc import Iterable, Sequence

from benchmarks.contenders import COPIES, FUSED, MODES, PEERS
from benchmarks.results import LAYOUTS, Results, layers, mixings, targets
from benchmarks.test_generator import BATCH, STEPS
from benchmarks.test_spn import SHAPES, SWEEP, label
from pixnorm.testing import DENSE_LAYOUTS


def markdown(results: Results, picture: str) -> str:
    """The page: what ran, the goals, the measurements."""
    agreement = [
        f"- {impl}, {what}: {distance['float64']:.0e} in float64; {distance['float32']:.0e} in float32, where "
        f"the reference itself is off by {distance['float32, reference']:.0e}"
        for impl, found in results.agreement.items()
        for what, distance in found.items()
    ]
    parts = [
        f"# Benchmarks on {results.facts['machine']}",
        table(("", ""), results.facts.items(), "left"),
        "In float32. Medians over all rounds, and in brackets ratios of minima; contenders took turns. Peers are eager "
        "PyTorch and `torch.compile`. Peers and pixnorm run in NCHW and in channels_last, and the fastest is shown.",
        _compiled(results),
        f"![plots]({picture})",
        "## Goals",
        _goals(results),
        '"At the floor": the figure of a layer that takes the time of its GEMMs and of one copy of the bytes that it '
        "must move besides; for the generator, that of batch norm plus SPN's GEMMs.",
    ]
    for head, title in (("plain", "SPN"), ("up", "up → SPN → ReLU")):
        parts += [f"## {title}", _layers(results, head)]
    parts += [
        'Times in ms. "Rest" is that of pixnorm less that of its GEMMs. "Copy" moves the bytes that the rest must '
        'move, in memory that was used before; "fresh copy" writes as much to fresh memory as the layer allocates.',
        f"## Generator step, batch {BATCH}",
        _steps(results, "step"),
        "## GConv's mixing",
        _mixings(results),
        "What follows GConv's convolution. Times in ms. At n = 256 channels the products take most of it in eager mode "
        'too; "floor" is the speed-up of a mixing that takes the time of its products alone.',
        f"## Generator step with GConv, batch {BATCH}",
        _steps(results, "gconv_step"),
        "With GConv the generator does 1.11 times the operations.",
        "## Saved for backward beyond the input, in tensors of the output's size",
        _memory(results),
        "## Growth, forward + backward",
        _growth(results),
        "Powers of N, C and H·W with which time (of the minima) and memory grow.",
        "## Agreement of the generators, relative to the reference in float64",
        "\n".join(agreement),
    ]
    return "\n\n".join(parts) + "\n"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], align: str = "right") -> str:
    """Markdown that can be read as text too; the first column is flush left."""
    rows = [headers, *rows]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust, *[str.rjust if align == "right" else str.ljust] * (len(headers) - 1)]
    lines = [
        "| " + " | ".join(side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|".join(
        "-" * (width + 1) + (":" if side is str.rjust else "-") for side, width in zip(sides, widths, strict=True)
    )
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def ms(seconds: float) -> str:
    return f"{1000 * seconds:.{0 if seconds >= 0.1 else 1 if seconds >= 0.01 else 2}f}"


def _named(contender: str) -> str:
    impl, layout = contender.split("-")
    return f"{impl} {LAYOUTS[layout]}"


def _compiled(results: Results) -> str:
    comparisons = layers("plain", "forward_backward")
    eager, compiled = "eager-channels_last", "compile-channels_last"
    ratios = [results.time(comparison, compiled) / results.time(comparison, eager) for comparison in comparisons]
    return (
        "`torch.compile` takes minutes to compile all this, so it sits out where it is far from the fastest: in NCHW, "
        "except in SPN, forward; and in up → SPN → ReLU, forward + backward. In SPN, forward + backward, it takes "
        f"{min(ratios):.1f} to {max(ratios):.1f} times as long as eager PyTorch."
    )


def _goals(results: Results) -> str:
    rows = []
    for target in targets(results):
        floor = f"{target.floor:.2f}" if target.floor else ""
        rows.append((target.what, target.bound, f"{target.median:.2f} ({target.minimum:.2f})", target.verdict, floor))
    return table(("", "goal", "measured", "", "at the floor"), rows)


def _layers(results: Results, head: str) -> str:
    rows = []
    for mode in ("forward", "forward_backward"):
        for shape, comparison in zip(SHAPES, layers(head, mode), strict=True):
            peer, fused = results.best(comparison, PEERS), results.best(comparison, FUSED)
            gemm = "gemm-" + fused.split("-")[1]
            rows.append(
                (
                    f"{mode.replace('_', ' + ')} {label(shape)}",
                    _named(peer),
                    ms(results.time(comparison, peer)),
                    _named(fused),
                    ms(results.time(comparison, fused)),
                    f"{results.speed_up(comparison):.1f} ({results.speed_up(comparison, min):.1f})",
                    ms(results.time(comparison, gemm)),
                    ms(results.outside(comparison)),
                    *(f"{results.over_copy(comparison, copy):.2f}" for copy in COPIES),
                )
            )
    headers = ("output", "best peer", "ms", "pixnorm", "ms", "speed-up", "GEMMs", "rest", "/ copy", "/ fresh copy")
    return table(headers, rows)


def _steps(results: Results, of: str) -> str:
    rows = []
    for model, title in STEPS[of].items():
        times = [ms(results.time(of, f"{model}-{layout}")) for layout in DENSE_LAYOUTS]
        rows.append((title, *times, f"{results.step(of, [model]):.2f} ({results.step(of, [model], min):.2f})"))
    plain = next(iter(STEPS[of].values()))
    return table(("", *(LAYOUTS[layout] for layout in DENSE_LAYOUTS), f"best, over {plain}"), rows)


def _mixings(results: Results) -> str:
    rows = []
    for mode in MODES:
        for shape, comparison in zip(SHAPES, mixings(mode), strict=True):
            for layout, name in LAYOUTS.items():
                fused = results.best(comparison, [name for name in FUSED if name.endswith(layout)])
                compiled = [name for name in (f"compile-{layout}",) if results.has(comparison, name)]
                rows.append(
                    (
                        f"{mode.replace('_', ' + ')} {label(shape)} {name}",
                        ms(results.time(comparison, f"eager-{layout}")),
                        ms(results.time(comparison, compiled)) if compiled else "",
                        ms(results.time(comparison, fused)),
                        f"{results.mixing(comparison, layout):.2f} ({results.mixing(comparison, layout, min):.2f})",
                        ms(results.time(comparison, f"gemm-{layout}")),
                        f"{results.mixing_at_floor(comparison, layout):.2f}",
                    )
                )
    return table(("", "eager", "compile", "pixnorm", "speed-up", "products", "floor"), rows)


def _memory(results: Results) -> str:
    rows = [
        (title, *(f"{results.saved(head, contender):.2f}" for contender in (PEERS[0], FUSED[0])))
        for head, title in (("plain", "SPN"), ("up", "up → SPN → ReLU"))
    ]
    return table(("", "eager", "pixnorm"), rows)


def _growth(results: Results) -> str:
    figures = {
        "pixnorm": lambda comparison: results.time(comparison, FUSED, min),
        "pixnorm outside the GEMMs": lambda comparison: results.outside(comparison, min),
        "eager": lambda comparison: results.time(comparison, "eager-channels_last", min),
        "saved by pixnorm": lambda comparison: results.bytes(comparison, FUSED[0]),
        "saved by eager": lambda comparison: results.bytes(comparison, "eager-channels_last"),
    }
    rows = []
    for size, shapes in SWEEP.items():
        ends = f"{size}: {label(shapes[0])} to {label(shapes[-1])}"
        rows.append((ends, *(f"{results.growth(size, figure):.2f}" for figure in figures.values())))
    return table(("", *figures), rows)
