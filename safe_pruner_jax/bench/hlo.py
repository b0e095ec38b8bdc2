"""XLA's optimised program as text, read for what each instruction moves and multiplies.

    program = parse(text)
    program.cost("fusion.12")        Cost(bytes, macs)

Only what a launch is made of is understood: fusions, products of libraries, copies and custom calls. Bytes are of the
arrays an instruction reads and writes, where a fusion that only takes slices of an array reads these slices.
"""

import functools
import math
import re
from dataclasses import dataclass
from typing import NamedTuple

BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "token": 0, "opaque": 0}
"""Bytes of an element, where they are not in the type's name as in s32 or f8e4m3fn."""

SLICES = ("slice", "dynamic-slice", "gather")

_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_CALL = re.compile(r"^([\w\-]+)\(")
_CONTRACTED = re.compile(r'"?lhs_contracting_dim(?:ension)?s"?[=:][{\[]"?([\d",]*)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Cost(NamedTuple):
    """Bytes read and written, and multiply-adds of matrix products."""

    bytes: int
    macs: int


class Shape(NamedTuple):
    """One array."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Of the array; four-bit types count as whole bytes."""
        width = BYTES.get(self.dtype) if self.dtype in BYTES else int(re.sub(r"^[a-z]+(\d+).*", r"\1", self.dtype)) // 8
        return self.size * max(1, width or 0) if self.dtype not in ("token", "opaque") else 0


@dataclass(frozen=True)
class Instruction:
    """A line of a computation; `rest` are its attributes."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def bytes(self) -> int:
        """Of all its results."""
        return sum(s.bytes for s in self.shapes)

    def named(self, attribute: str) -> str | None:
        """The computation that an attribute such as `calls` names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found.group(1) if found else None

    @property
    def trips(self) -> int | None:
        """How often a loop runs, where the compiler knows."""
        found = _TRIPS.search(self.rest)
        return int(found.group(1)) if found else None


class Program:
    """Computations of a module: {name: {instruction: Instruction}}."""

    def __init__(self, computations: dict[str, dict[str, Instruction]]):
        self.computations = computations
        self._home = {name: body for body in computations.values() for name in body}

    def find(self, name: str) -> Instruction | None:
        """The instruction of a name, in whatever computation."""
        return self._home[name][name] if name in self._home else None

    @functools.cache  # noqa: B019  one program lives as long as the reading of it
    def cost(self, name: str) -> Cost:
        """What one instruction moves and multiplies; nothing for an unknown name."""
        found = self.find(name)
        if found is None:
            return Cost(0, 0)
        body = self._home[name]
        sizes = [body[o].bytes if o in body else 0 for o in found.operands]
        once = sum(body[o].bytes for o in dict.fromkeys(found.operands) if o in body)
        inside = self.computations.get(found.named("calls") or "")
        if found.opcode == "fusion" and inside is not None:
            return Cost(self._moved(found, sizes, inside), self._products(inside))
        return Cost(once + found.bytes, self._product(found, body))

    def _moved(self, fusion: Instruction, sizes: list[int], inside: dict[str, Instruction]) -> int:
        read = 0
        for parameter in (i for i in inside.values() if i.opcode == "parameter"):
            users = [i for i in inside.values() if parameter.name in i.operands]
            whole = sizes[int(parameter.rest.split(")")[0])]
            sliced = users and all(u.opcode in SLICES and u.operands[0] == parameter.name for u in users)
            updated = users and all(
                u.opcode == "dynamic-update-slice" and u.operands[0] == parameter.name for u in users
            )
            read += min(whole, sum(u.bytes for u in users)) if sliced else 0 if updated else whole
        root = next(i for i in inside.values() if i.root)
        if root.opcode == "dynamic-update-slice":
            return read + inside[root.operands[1]].bytes
        return read + fusion.bytes

    def _products(self, body: dict[str, Instruction]) -> int:
        total = 0
        for i in body.values():
            nested = self.computations.get(i.named("calls") or "") if i.opcode == "fusion" else None
            total += self._products(nested) if nested else self._product(i, body)
        return total

    @staticmethod
    def _product(i: Instruction, body: dict[str, Instruction]) -> int:
        """Multiply-adds of a product: its result's elements times the contracted sizes of its left side."""
        contracted = _CONTRACTED.search(i.rest)
        if not contracted or not (i.opcode == "dot" or "gemm" in i.rest or "matmul" in i.rest):
            return 0
        left = body[i.operands[0]].shapes[0].dims
        axes = [int(d) for d in re.findall(r"\d+", contracted.group(1))]
        return i.shapes[0].size * math.prod(left[a] for a in axes)


def parse(text: str) -> Program:
    """A module's text, as XLA dumps it after all its passes."""
    computations: dict[str, dict[str, Instruction]] = {}
    body: dict[str, Instruction] | None = None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            body = computations.setdefault(head.group(2), {})
        elif body is not None and (found := _LINE.match(line)):
            instruction = _instruction(found.group(2), found.group(3), bool(found.group(1)))
            if instruction is not None:
                body[instruction.name] = instruction
    return Program(computations)


def _instruction(name: str, text: str, root: bool) -> Instruction | None:
    shape, text = _balanced(text) if text.startswith("(") else text.split(" ", 1)
    call = _CALL.match(text.lstrip())
    if call is None:
        return None
    inside, rest = _balanced(text.lstrip()[call.end() - 1 :])
    shapes = tuple(Shape(t, tuple(int(d) for d in dims.split(",") if d)) for t, dims in _SHAPE.findall(shape))
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    rest = inside[1:] + rest if call.group(1) == "parameter" else rest
    return Instruction(name, shapes, call.group(1), operands, rest, root)


def _balanced(text: str) -> tuple[str, str]:
    """A text that begins with a parenthesis, behind whose partner it is cut."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[: i + 1], text[i + 1 :]
    return text, ""
