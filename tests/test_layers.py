"""Imports only go down, and the parts that should not know one another do not."""

import ast
import functools
from pathlib import Path

import pytest

pytestmark = pytest.mark.newest

PACKAGE = "safe_pruner_jax"
ROOT = Path(__file__).parents[1] / PACKAGE

FLOORS = (
    ("arrays", "timing", "client", "figures"),
    ("tokens",),
    ("model", "pruners"),
    ("engine", "robots"),
    ("policy", "libero", "lerobot", "testing"),
    ("serving", "evaluation", "training"),
    ("analysis", "cluster"),
    ("bench",),
    ("cli",),
    ("__main__",),
)
"""From the bottom up; a name is a room (a folder) or a single file. Rooms of one floor do not import one another."""


def modules() -> dict[str, Path]:
    """Dotted name below the package → file."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found.pop("", None)  # the package itself names everything
    return found


MODULES = modules()


@functools.cache
def imports(name: str) -> frozenset[str]:
    """Dotted names below the package that a module imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            # `from package import module` is an import of the module; every other name comes from what is named
            full = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {path if path.removeprefix(f"{PACKAGE}.") in MODULES else node.module for path in full.values()}
    inside = {full.removeprefix(f"{PACKAGE}.") for full in found if full.startswith(f"{PACKAGE}.")}
    return frozenset(inside & set(MODULES) - {name})


def part(name: str) -> str:
    return name.split(".")[0]


def floor(name: str) -> int:
    level = next((i for i, names in enumerate(FLOORS) if part(name) in names), None)
    assert level is not None, f"{name} has no floor: put it into FLOORS, as low as its imports allow"
    return level


def test_the_reader_sees_what_is_there():
    assert {"arrays", "model.pi0", "pruners.safe", "engine.engine", "policy.policy"} <= set(MODULES)
    assert {"model.pi0", "model.config", "pruners.base", "tokens"} <= imports("engine.programs")
    assert {"model.gemma", "model.siglip", "tokens"} <= imports("model.pi0")
    assert "pruners.forecast" in imports("pruners.safe")


def test_there_are_at_most_ten_floors_and_every_room_is_there():
    rooms = [room for rooms in FLOORS for room in rooms]
    assert len(FLOORS) <= 10 and len(rooms) == len(set(rooms))
    assert set(rooms) == {part(name) for name in MODULES}


def test_imports_only_go_down():
    for name in MODULES:
        for target in imports(name):
            assert part(target) == part(name) or floor(target) < floor(name), f"{name} imports {target}"


def test_there_is_no_circle():
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, " → ".join([*open_[open_.index(name) :], name])
        if name in done:
            return
        open_.append(name)
        for target in imports(name):
            visit(target)
        open_.pop()
        done.add(name)

    for name in MODULES:
        visit(name)


def rooms_of(name: str) -> set[str]:
    """Rooms that a module imports from."""
    return {part(target) for target in imports(name)}


def test_the_engine_alone_joins_model_and_pruners():
    joins = {name for name in MODULES if {"model", "pruners"} <= rooms_of(name)}
    assert "engine.programs" in joins
    assert all(floor(name) >= floor("engine") for name in joins)
    for name in MODULES:
        if part(name) == "pruners":
            assert rooms_of(name) <= {"pruners", "arrays", "tokens"}
        if part(name) == "model":
            assert rooms_of(name) <= {"model", "arrays", "tokens"}


def test_robots_know_the_sizes_of_a_model_and_nothing_else_of_it():
    for name in MODULES:
        if part(name) == "robots":
            assert imports(name) <= {"model.config"} | {m for m in MODULES if part(m) == "robots"}, name


def test_serving_sees_no_simulator():
    served, open_ = set(), ["cli.serve"] + [name for name in MODULES if part(name) == "serving"]
    while open_:
        name = open_.pop()
        if name not in served:
            served.add(name)
            open_ += imports(name)
    assert not {part(name) for name in served} & {"evaluation", "libero", "analysis", "training"}


def test_sizes_and_names_are_at_the_bottom_of_the_model():
    assert not imports("model.config")
    assert imports("model.params") == {"model.config"}


def test_the_host_side_does_not_load_jax():
    for name in ("robots.transforms", "robots.robots", "policy.reply", "policy.overlap"):
        tree = ast.parse(MODULES[name].read_text())
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not any(n.split(".")[0] in ("jax", "flax") for n in names)


def test_no_test_imports_another():
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            named += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0].startswith("test_") for name in named), path.name
