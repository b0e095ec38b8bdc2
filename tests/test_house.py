"""Rules of the house that a reader feels: short functions, calls whose arguments are named, short help."""

import ast
from collections.abc import Iterator
from pathlib import Path

import mutants
import pytest

pytestmark = pytest.mark.newest

ROOT = Path(__file__).parents[1]
ROOMS = ("safe_pruner_jax", "openpi_patch", "scripts", "benchmarks")
CODE = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
LONGEST = 40
"""Lines of a function, its docstring and the functions inside it not counted."""

LONGEST_FILE = 400

BY_PLACE = {"reshape", "transpose", "mjv_updateScene"}
"""Functions of others that take more than six arguments by place: axes, and a C function without names."""


TREES = {path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8")) for path in CODE}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def inside(node: ast.AST) -> Iterator[ast.AST]:
    """The outermost functions inside one."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        else:
            yield from inside(child)


def lines(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1


def length(function: ast.FunctionDef) -> int:
    docstring = lines(function.body[0]) if ast.get_docstring(function) is not None else 0
    return lines(function) - docstring - sum(map(lines, inside(function)))


def test_the_counter_counts():
    source = (
        'def outer(a):\n    """Two\n    lines."""\n    b = a\n\n    def inner():\n        return b\n\n    return inner'
    )
    outer, inner = functions(ast.parse(source))
    assert (length(outer), length(inner)) == (9 - 2 - 2, 2)


def test_functions_are_short():
    long = {
        f"{path}:{function.lineno} {function.name}: {length(function)} lines"
        for path, tree in TREES.items()
        for function in functions(tree)
        if length(function) > LONGEST
    }
    assert not long


def test_calls_with_many_arguments_name_them():
    unnamed = {
        f"{path}:{call.lineno} {ast.unparse(call.func)[:60]}"
        for path, tree in TREES.items()
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and len(call.args) > 6
        and not isinstance(call.func, ast.Call)
        and getattr(call.func, "attr", None) not in BY_PLACE
    }
    assert not unnamed


def test_files_are_short():
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in CODE}
    assert not {name for name, count in lengths.items() if count > LONGEST_FILE}


def test_every_mutant_breaks_one_line_that_is_there():
    assert len({mutant.what for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS) >= 10
    for mutant in mutants.MUTANTS:
        assert (ROOT / mutants.PACKAGE / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1, mutant.what
        assert all((ROOT / file).is_file() for file in mutant.tests.split())
