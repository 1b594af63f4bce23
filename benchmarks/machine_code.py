"""Kernels read back from machine code, and the gates they must pass; no GPU is needed.

Gates of every kernel (``Kernel.violations``); the classes of the ops add their own:

- No local memory, which is where registers spill.
- The main loop moves every element once, as many bytes at a time as the design says: 16 where rows are aligned.
- Registers and shared memory leave room for as many warps as the design needs to hide the latency of memory.

A kernel's predicted time is the largest of: its bytes at the speed of a copy, its instructions at one per cycle and
scheduler, its matrix products at the speed of large GEMMs. Instructions are those of the whole main loop, branches for
borders included: an upper bound for a row. Not counted are rows above and below a strip, which are computed twice, and
code outside the loop.
"""

import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import NamedTuple

import networkx as nx  # comes with torch
from torch.utils.cpp_extension import CUDA_HOME

from benchmarks.model import GPU

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "kernels"
TOOLS = {"nvcc": "the CUDA toolkit", "nvdisasm": "Triton", "cuobjdump": "Triton", "c++filt": "binutils"}
# First stage of the batch statistics, shared by several ops; one name in CUDA C++ and in Triton.
STATISTICS = "statistics_kernel"

Moves = Counter[tuple[str, int]]  # LDG, LDGSTS or STG, and bytes


class Function(NamedTuple):
    """A kernel in machine code."""

    signature: str  # in C++
    threads: int  # most per block
    registers: int  # per thread
    local: int  # bytes of local memory per thread
    shared: int  # bytes of static shared memory per block, on sm_90 with the KB that the system reserves
    opcodes: dict[str, int]  # how often each instruction occurs, with its modifiers
    main_loop: list[str]  # opcodes of the last innermost loop that reads global memory

    @property
    def moves(self) -> Moves:
        """Loads and stores of global memory in the main loop."""
        return moves_of(Counter(self.main_loop))

    @property
    def all_moves(self) -> Moves:
        """The same of the whole kernel."""
        return moves_of(self.opcodes)

    @property
    def local_moves(self) -> dict[str, int]:
        """Loads and stores of local memory, anywhere."""
        return {opcode: count for opcode, count in self.opcodes.items() if opcode.startswith(("LDL", "STL"))}


def moves_of(opcodes: Mapping[str, int]) -> Moves:
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    found = Counter()
    for opcode, count in opcodes.items():
        kind, *modifiers = opcode.split(".")
        if kind in ("LDG", "LDGSTS", "STG"):
            found[kind, next((widths[modifier] for modifier in modifiers if modifier in widths), 4)] += count
    return found


def moves(kind: str, size: int, width: int = 16, count: int = 1) -> Moves:
    """``count`` times ``size`` bytes, moved by up to ``width`` bytes at a time."""
    width = min(width, size)
    return Counter({(kind, width): count * (size // width)} if size else {})


def listed(found: Moves) -> str:
    return ", ".join(f"{count} {kind} of {width} bytes" for (kind, width), count in sorted(found.items()))


@dataclass(frozen=True)
class Kernel:
    """A kernel compiled for one GPU, and its design, which subclasses state.

    They have ``name``, ``dtype``, ``itemsize``, ``columns`` (of x that a thread owns), ``upsample``, ``channels_last``,
    ``options`` (other specialisations, in words), ``shared`` (bytes per block), ``warps_needed``, ``may_spill``, and
    ``modelled`` (whether there are predictions).
    """

    gpu: GPU
    code: Function

    parked = 0  # bytes of local memory that are allowed outside the main loop
    copies_x = True  # whether passes in NCHW may be others than in channels_last

    @property
    def design(self) -> Moves:
        """Loads and stores of one round of the main loop; empty where the loop is not checked."""
        return Counter()

    def counts_rounds(self, kind: str, width: int) -> bool:
        """Whether such moves are all of the design, so that their number tells how far the loop is unrolled."""
        return True

    def may_move(self, beyond: Moves) -> bool:
        """Whether the main loop may have these moves beside the design."""
        return not beyond

    @property
    def elements(self) -> float:
        """Of y, per thread and round."""
        return self.columns * self.upsample**2

    def work(self, x: tuple[int, ...], reads: int) -> float:
        """The same in all, for an input of shape x that is read so many times."""
        return prod(x) * self.upsample**2

    @property
    def moves(self) -> Moves:
        """What is compared with the design."""
        return self.code.moves

    # ---- what follows ----

    @property
    def warps(self) -> int:
        """The warps that an SM has room for."""
        return self.gpu.occupancy(self.code.threads, self.code.registers, self.shared)

    @property
    def rounds(self) -> int:
        """How often the main loop repeats the design."""
        found, designed = (
            sum(n for move, n in of.items() if self.counts_rounds(*move)) for of in (self.moves, self.design)
        )
        return max(1, found // designed) if designed else 1

    @property
    def instructions(self) -> float:
        """Of the main loop, per element; a halo is not counted."""
        return len(self.code.main_loop) / (self.rounds * self.elements)

    def violations(self) -> list[str]:
        """The gates that it fails, and how."""
        found, local = [], self.code.local_moves
        searched = self.code.main_loop if self.parked else self.code.opcodes
        if (self.code.local > self.parked or not local.keys().isdisjoint(searched)) and not self.may_spill:
            found.append(f"{self.code.local} bytes of local memory: {local}")
        wanted = Counter({move: self.rounds * count for move, count in self.design.items()})
        if self.design and (wanted - self.moves or not self.may_move(self.moves - wanted)):
            found.append(f"moves in the main loop: {listed(self.moves)}, not {listed(self.design)}")
        if self.warps < self.warps_needed:
            found.append(f"room for {self.warps} warps, not {self.warps_needed}")
        return found

    def seconds(self, x: tuple[int, ...], passes: Callable) -> tuple[float, ...] | None:
        """Predictions by bytes and by instructions; of kernels that multiply matrices also by products.

        None where there is no model. ``x`` is the shape of the input, ``passes`` the op's ``kernel_passes``.
        """
        reads, writes = passes(self.upsample, self.channels_last or not self.copies_x).get(self.name, (0, 0))
        if not reads or not self.modelled:
            return None
        moved = (reads + writes) * self.itemsize * prod(x)
        return moved / self.gpu.copy, self.work(x, reads) * self.instructions / self.gpu.issue


def missing(tools: Iterable[str] = TOOLS) -> str | None:
    """Which of the tools this machine lacks."""
    lacking = [f"{tool} (comes with {TOOLS[tool]})" for tool in tools if not _find(tool)]
    return f"not found: {', '.join(lacking)}" if lacking else None


def _find(tool: str) -> str | None:
    triton = find_spec("triton")
    folders = [os.environ["PATH"], f"{CUDA_HOME}/bin"]
    folders += [f"{folder}/backends/nvidia/bin" for folder in (triton.submodule_search_locations if triton else [])]
    return shutil.which(tool, path=os.pathsep.join(folders))


def run(tool: str, *arguments: str | Path) -> str:
    """Its output. Raises RuntimeError with its errors."""
    command = [_find(tool), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout.strip()


def read(cubin: Path) -> list[Function]:
    """The kernels of a cubin; the result is cached beside it."""
    listing = cubin.with_suffix(".listing")  # Triton has a .json of its own there
    if not listing.exists() or listing.stat().st_mtime < Path(__file__).stat().st_mtime:
        part = listing.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(_read(cubin)))
        part.rename(listing)
    return [Function(*entry) for entry in json.loads(listing.read_text())]


def _read(cubin: Path) -> list[Function]:
    resources = run("cuobjdump", "-res-usage", cubin)
    elf = run("cuobjdump", "-elf", cubin)
    listed = json.loads(run("nvdisasm", "-json", "-ndf", cubin))[1]
    code = {function["function-name"]: function["sass-instructions"] for function in listed}
    symbols, lines = zip(*re.findall(r"Function (\S+):\s+(REG.*)", resources), strict=True)
    found = []
    for symbol, signature, line in zip(symbols, run("c++filt", *symbols).splitlines(), lines, strict=True):
        used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        attributes = elf.partition(f"\n.nv.info.{symbol}\n")[2].partition("\n.nv.")[0]
        bound = re.search(r"EIATTR_(?:MAX_THREADS|REQNTID)\s+Format:.*\s+Value:\s+(\w+)", attributes)
        threads, local = int(bound[1], 16) if bound else 1024, used["STACK"] + used["LOCAL"]
        opcodes, loop = Counter(instruction["opcode"] for instruction in code[symbol]), _main_loop(code[symbol])
        found.append(Function(signature, threads, used["REG"], local, used["SHARED"], dict(opcodes), loop))
    return found


def _main_loop(code: list[dict]) -> list[str]:
    """``Function.main_loop``; empty if no loop reads global memory."""
    loops = sorted(_innermost_loops(_flow(code)), key=max)
    bodies = [[code[i]["opcode"] for block in sorted(loop) for i in range(*block)] for loop in loops]
    return next((body for body in reversed(bodies) if any(opcode.startswith("LDG") for opcode in body)), [])


def _flow(code: list[dict]) -> nx.DiGraph:
    """The control-flow graph of reachable basic blocks, each (first instruction, one past the last).

    BRA.DIV leads to code for diverged warps only and is ignored; a CALL to an address is a jump, to a symbol it is not.
    """
    leaves = {}  # instruction that ends a block -> its targets
    for i, instruction in enumerate(code):
        opcode, (*conditions, to) = instruction["opcode"], instruction.get("operands", "").split(",")
        jumps = opcode.startswith(("BRA", "CALL")) and opcode != "BRA.DIV" and to.startswith("0x")
        if jumps or opcode.startswith(("EXIT", "RET")):
            leaves[i] = [int(to, 16) // 16] if jumps else []
            if conditions or "predicate" in instruction:
                leaves[i].append(i + 1)
    starts = {0, len(code), *(i + 1 for i in leaves), *(to for targets in leaves.values() for to in targets)}
    blocks = {block[0]: block for block in pairwise(sorted(starts))}
    flow = nx.DiGraph()
    for block in blocks.values():
        flow.add_edges_from((block, blocks[to]) for to in leaves.get(block[1] - 1, [block[1]]) if to in blocks)
    return flow.subgraph({blocks[0]} | nx.descendants(flow, blocks[0]))


def _innermost_loops(flow: nx.DiGraph) -> Iterator[set[tuple[int, int]]]:
    """Strongly connected components; nested loops survive the removal of the edges back to the outer header."""
    for part in nx.strongly_connected_components(flow):
        if len(part) == 1 and not any(flow.has_edge(block, block) for block in part):
            continue
        tops = {to for of, to in flow.in_edges(part) if of not in part}
        inside = nx.DiGraph(flow.subgraph(part))
        inside.remove_edges_from(list(inside.in_edges(tops)))
        nested = list(_innermost_loops(inside))
        yield from nested or [part]
