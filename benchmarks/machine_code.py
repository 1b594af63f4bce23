"""Kernels as machine code, read back; those of CUDA C++ are compiled here, for a GPU that need not be there."""

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import networkx as nx  # comes with torch
import torch
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, CUDA_HOME, include_paths

from setup import NVCC_FLAGS, STABLE_ABI

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "kernels"
FLAGS = ["-cubin", "-std=c++20", *COMMON_NVCC_FLAGS, *NVCC_FLAGS, "-DUSE_CUDA", f"-D{'='.join(STABLE_ABI)}"]
TOOLS = {"nvcc": "the CUDA toolkit", "nvdisasm": "Triton", "cuobjdump": "Triton", "c++filt": "binutils"}


class Function(NamedTuple):
    """A kernel, as the machine code has it.

    Attributes:
        signature: in C++.
        threads: of a block, at most.
        registers: of a thread.
        local: bytes of local memory of a thread.
        shared: bytes of static shared memory of a block; on sm_90 with the KB that the system takes.
        opcodes: how often the code has each instruction, with its modifiers.
        main_loop: the instructions of the last innermost loop that reads global memory.
    """

    signature: str
    threads: int
    registers: int
    local: int
    shared: int
    opcodes: dict[str, int]
    main_loop: list[str]

    @property
    def moves(self) -> Counter[tuple[str, int]]:
        """The loads and stores of global memory in the main loop, and of how many bytes they are."""
        widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
        found = Counter()
        for opcode in self.main_loop:
            kind, *modifiers = opcode.split(".")
            if kind in ("LDG", "LDGSTS", "STG"):
                found[kind, next((widths[modifier] for modifier in modifiers if modifier in widths), 4)] += 1
        return found

    @property
    def local_moves(self) -> dict[str, int]:
        """The loads and stores of local memory."""
        return {opcode: count for opcode, count in self.opcodes.items() if opcode.startswith(("LDL", "STL"))}


def listed(moves: Counter[tuple[str, int]]) -> str:
    """``Function.moves``, in words."""
    return ", ".join(f"{count} {kind} of {width} bytes" for (kind, width), count in sorted(moves.items()))


def missing(tools: Iterable[str] = TOOLS) -> str | None:
    """What this machine lacks of them. A GPU is not needed."""
    lacking = [f"{tool} (comes with {TOOLS[tool]})" for tool in tools if not _find(tool)]
    return f"not found: {', '.join(lacking)}" if lacking else None


def _find(tool: str) -> str | None:
    triton = find_spec("triton")
    folders = [os.environ["PATH"], f"{CUDA_HOME}/bin"]
    folders += [f"{folder}/backends/nvidia/bin" for folder in (triton.submodule_search_locations if triton else [])]
    return shutil.which(tool, path=os.pathsep.join(folders))


def functions(source: Path, arch: str) -> list[Function]:
    """The kernels of a source; compiles it if it has changed. Raises RuntimeError with the compiler's errors."""
    return read(_compile(source, arch))


def read(cubin: Path) -> list[Function]:
    """The kernels of a file of machine code; what is found is kept beside it."""
    listing = cubin.with_suffix(".listing")  # Triton has a .json of its own there
    if not listing.exists() or listing.stat().st_mtime < Path(__file__).stat().st_mtime:
        part = listing.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(_read(cubin)))
        part.rename(listing)
    return [Function(*entry) for entry in json.loads(listing.read_text())]


def _compile(source: Path, arch: str) -> Path:
    """The machine code, in a file named after a hash of what it was made of."""
    command = ["nvcc", f"-arch={arch}", *FLAGS, *(f"-I{path}" for path in (ROOT / "csrc", *include_paths())), source]
    headers = sorted([*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.cuh")])
    made_of = [*map(str, command), torch.__version__, _run("nvcc", "--version")]
    made_of += [path.read_text() for path in (source, *headers)]
    key = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    cubin = BUILD / f"{source.stem}.{arch}.{key}.cubin"
    if not cubin.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        part = cubin.with_suffix(f".{os.getpid()}")
        _run(*command, "-o", part)
        part.rename(cubin)
        for old in BUILD.glob(f"{source.stem}.{arch}.*"):
            if key not in old.name:
                old.unlink(missing_ok=True)
    return cubin


def _read(cubin: Path) -> list[Function]:
    resources = _run("cuobjdump", "-res-usage", cubin)
    elf = _run("cuobjdump", "-elf", cubin)
    listed = json.loads(_run("nvdisasm", "-json", "-ndf", cubin))[1]
    code = {function["function-name"]: function["sass-instructions"] for function in listed}
    symbols, lines = zip(*re.findall(r"Function (\S+):\s+(REG.*)", resources), strict=True)
    found = []
    for symbol, signature, line in zip(symbols, _run("c++filt", *symbols).splitlines(), lines, strict=True):
        used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        attributes = elf.partition(f"\n.nv.info.{symbol}\n")[2].partition("\n.nv.")[0]
        bound = re.search(r"EIATTR_(?:MAX_THREADS|REQNTID)\s+Format:.*\s+Value:\s+(\w+)", attributes)
        threads, local = int(bound[1], 16) if bound else 1024, used["STACK"] + used["LOCAL"]
        opcodes, loop = Counter(instruction["opcode"] for instruction in code[symbol]), _main_loop(code[symbol])
        found.append(Function(signature, threads, used["REG"], local, used["SHARED"], dict(opcodes), loop))
    return found


def _main_loop(code: list[dict]) -> list[str]:
    """The opcodes of the last innermost loop that reads global memory; none if there is no such loop."""
    loops = sorted(_innermost_loops(_flow(code)), key=max)
    bodies = [[code[i]["opcode"] for block in sorted(loop) for i in range(*block)] for loop in loops]
    return next((body for body in reversed(bodies) if any(opcode.startswith("LDG") for opcode in body)), [])


def _flow(code: list[dict]) -> nx.DiGraph:
    """Which block (its first instruction and the one after it) may follow which, of those that are reached.

    BRA.DIV leads to what only a diverged warp runs, and is taken for an instruction that does nothing; a CALL to an
    address within the function is a jump, one to a name is not.
    """
    leaves = {}  # of the instructions that end a block: where they lead to
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
    """Strongly connected parts. Those nested in one stay connected without the edges that lead to its top."""
    for part in nx.strongly_connected_components(flow):
        if len(part) == 1 and not any(flow.has_edge(block, block) for block in part):
            continue
        tops = {to for of, to in flow.in_edges(part) if of not in part}
        inside = nx.DiGraph(flow.subgraph(part))
        inside.remove_edges_from(list(inside.in_edges(tops)))
        nested = list(_innermost_loops(inside))
        yield from nested or [part]


def _run(tool: str, *arguments: str | Path) -> str:
    command = [_find(tool), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout.strip()
