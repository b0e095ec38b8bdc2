"""What a compiled GPU program launches, in order, read from XLA's dump of its thunks.

    sequence = read(folder)                     of the one program dumped there
    sequence.outside, sequence.loop             launches outside the denoise loop, and of one turn of it
    sequence.graphs                             CUDA graphs, and how many launches each holds
    sequence.starts                             what the host starts: graphs, and what is in none

A thunk is what the host, or a CUDA graph, starts: a kernel, a product of a library, a copy. Names, grids and nesting
come from the dump of the thunks, bytes and products from the instruction that each was made of (`hlo`).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from safe_pruner_jax.bench.hlo import Cost, Program, parse

THUNKS = ("*thunk_sequence_after_thunk_passes.txt", "*thunk_sequence.txt")
"""The first is not written for a program so small that no pass changed it."""
METADATA = "*thunk_metadata.txt"
PROGRAM = "*gpu_after_optimizations.txt"

CONTAINERS = {"kWhile", "kConditional", "kCommandBuffer", "kSequential"}
"""Thunks that hold others and start nothing themselves."""

_THUNK = re.compile(r"^(\s*)(\d+): (k\w+)\s+\[.*?\]\s*(.*)$")
_GRID = re.compile(r"^(.*?) ?grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+), (\d+), (\d+)\]")
_INFO = re.compile(r'profile_annotation: "([^"]*)"\s+thunk_id: (\d+)')


class DumpError(RuntimeError):
    """A dump that is not there or cannot be read: another XLA writes it another way."""


@dataclass(frozen=True)
class Launch:
    """One thing that is started.

    Args:
      kind: XLA's, for example kCustomKernel or kCopy.
      name: of the kernel; of the instruction where there is none.
      blocks: of its grid, None where a library chooses it.
      cost: bytes and multiply-adds.
      times: how often it runs, in loops other than the denoise loop.
    """

    kind: str
    name: str
    blocks: int | None
    cost: Cost
    times: int = 1


@dataclass
class Sequence:
    """A program's launches.

    Args:
      outside: before and after the denoise loop.
      loop: of one turn of the denoise loop, its condition included; empty without one.
      turns: of the denoise loop.
      graphs: CUDA graphs: launches in each, a loop's counted once.
      loop_in_graph: whether the denoise loop as a whole is in a graph, so that the host starts it once.
      starts: what the host starts in a run of the program: graphs, and launches that are in none. The condition of a
        loop is not among them: XLA knows how often it turns.
    """

    outside: list[Launch] = field(default_factory=list)
    loop: list[Launch] = field(default_factory=list)
    turns: int = 0
    graphs: list[int] = field(default_factory=list)
    loop_in_graph: bool = False
    starts: int = 0

    @property
    def total(self) -> int:
        """Launches of a run of the program."""
        return sum(launch.times for launch in self.outside) + self.turns * sum(launch.times for launch in self.loop)


@dataclass
class _Node:
    kind: str
    text: str
    number: int
    indent: int
    condition: bool = False
    children: list["_Node"] = field(default_factory=list)


def read(folder: Path) -> Sequence:
    """The launches of the program that was dumped into a folder, the largest if there are several.

    Raises:
      DumpError: no such dump.
    """
    pattern = next((p for p in THUNKS if any(folder.glob(p))), None)
    if pattern is None:
        raise DumpError("expected XLA's list of thunks, got none; this jax does not write it, use another version")
    lists = sorted(folder.glob(pattern), key=lambda path: path.stat().st_size)
    prefix = lists[-1].name.split(pattern.strip("*"))[0]
    one = lambda pattern: next(folder.glob(prefix + pattern)).read_text(encoding="utf-8")
    names = {int(number): name for name, number in _INFO.findall(one(METADATA))}
    return sequence(lists[-1].read_text(encoding="utf-8"), names, parse(one(PROGRAM)))


def sequence(thunks: str, names: dict[int, str], program: Program) -> Sequence:
    """The launches of a list of thunks.

    Args:
      thunks: the dump's text.
      names: thunk number → instruction.
      program: of these instructions.
    """
    out = Sequence()
    roots = _tree(thunks)
    _visit(roots, out, names, program, main=_longest_loop(roots, names, program))
    return out


def _tree(text: str) -> list[_Node]:
    """Thunks by indentation; what stands under "condition:" or "body:" belongs to the loop above."""
    top = _Node("", "", -1, -1)
    stack, offset, condition = [top], 0, False
    for line in text.splitlines():
        found = _THUNK.match(line)
        if not found:
            condition = line.strip() == "condition:"
            continue
        indent = len(found.group(1)) + offset
        while stack[-1].indent >= indent:
            stack.pop()
        node = _Node(found.group(3), found.group(4).strip(), int(found.group(2)), indent, condition)
        stack[-1].children.append(node)
        stack.append(node)
    return top.children


def _trips(node: _Node, names: dict[int, str], program: Program) -> int:
    instruction = program.find(names.get(node.number, ""))
    return (instruction.trips if instruction is not None else None) or 1


def _longest_loop(roots: list[_Node], names: dict[int, str], program: Program) -> int | None:
    """Number of the loop that launches most: the denoise loop; None without loops."""
    loops = [n for n in _walk(roots) if n.kind == "kWhile"]

    def count(node: _Node) -> int:
        times = _trips(node, names, program) if node.kind == "kWhile" else 1
        return (node.kind not in CONTAINERS) + times * sum(map(count, node.children))

    return max(loops, key=count).number if loops else None


def _walk(nodes: list[_Node]) -> Iterator[_Node]:
    for node in nodes:
        yield node
        yield from _walk(node.children)


def _visit(
    nodes: list[_Node],
    out: Sequence,
    names: dict[int, str],
    program: Program,
    *,
    main: int | None,
    inside: bool = False,
    times: int = 1,
    graph: bool = False,
) -> None:
    """Adds the launches of some thunks; `inside` the denoise loop, run `times` over, in a `graph`."""
    for node in nodes:
        how = {"main": main, "inside": inside, "times": times, "graph": graph}
        if node.kind == "kCommandBuffer":
            how["graph"] = True
            if not graph:
                out.starts += times * (out.turns if inside else 1)
                out.graphs.append(sum(c.kind not in CONTAINERS for c in _walk(node.children)))
        elif node.kind == "kWhile":
            trips = _trips(node, names, program)
            if node.number == main:
                how["inside"], out.turns, out.loop_in_graph = True, trips, graph
            else:
                how["times"] = times * trips
        if node.kind in CONTAINERS:
            _visit(node.children, out, names, program, **how)
        else:
            out.starts += 0 if graph or node.condition else times * (out.turns if inside else 1)
            (out.loop if inside else out.outside).append(_launch(node, names, program, times))


def _launch(node: _Node, names: dict[int, str], program: Program, times: int) -> Launch:
    grid, name = _GRID.match(node.text), names.get(node.number, "")
    blocks = int(grid.group(2)) * int(grid.group(3)) * int(grid.group(4)) if grid else None
    return Launch(node.kind, grid.group(1) if grid else name, blocks, program.cost(name), times)
