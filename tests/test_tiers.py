"""What the quick tier may never lose: a law, an oracle, a mutant's tests, a module; judged by the tests of this run."""

import inspect
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import laws
import mutants
import pytest
from pruner_cases import SLOTWISE
from tiers import COLLECTED, at_night, by_day

from safe_pruner_jax.pruners import PRUNERS

pytestmark = pytest.mark.newest

TESTS = Path(__file__).parent
AT_NIGHT_ONLY: dict[str, str] = {}
"""Modules without a quick test, and why."""


@pytest.fixture
def items(pytestconfig) -> list[pytest.Item]:
    """Every test there is, with its marks, before any is left out."""
    collected = pytestconfig.stash[COLLECTED]
    if {item.path for item in collected} != set(TESTS.glob("test_*.py")):
        pytest.skip("only some of the modules were collected: run them all")
    return collected


@pytest.fixture
def quick(items) -> list[pytest.Item]:
    return [item for item in items if item.get_closest_marker("nightly") is None]


def test_every_pruner_is_under_every_law_by_day(quick):
    params = [item.callspec.params for item in quick if item.originalname == "test_law"]
    judged = {(p["law"].__name__, p["case"].name) for p in params}
    exempt = {(laws.permuting_tokens_permutes_scores.__name__, name) for name in SLOTWISE}
    assert judged == {(law.__name__, name) for law in laws.LAWS for name in PRUNERS} - exempt


def test_every_module_has_quick_tests(items, quick):
    without = {item.path.stem for item in items} - {item.path.stem for item in quick}
    assert without == set(AT_NIGHT_ONLY)


def test_every_mutant_is_looked_for_by_quick_tests(quick):
    there = {item.path.relative_to(TESTS.parent).as_posix() for item in quick}
    assert {file for mutant in mutants.MUTANTS for file in mutant.tests.split()} <= there


def names(code) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield from names(constant)


def oracles_of(function, seen: set) -> set[str]:
    """Names of the oracles that a function comes to use, through functions of tests."""
    function = inspect.unwrap(function)
    if function in seen or not inspect.isfunction(function):
        return set()
    seen.add(function)
    used = [function.__globals__[name] for name in names(function.__code__) if name in function.__globals__]
    own = {u.__name__ for u in used if getattr(u, "__module__", "").startswith("oracles.")}
    return own.union(*(oracles_of(u, seen) for u in used if getattr(u, "__module__", "") == function.__module__))


def test_every_oracle_judges_by_day(items, quick):
    users = defaultdict(set)
    for tier, tests in (("all", items), ("quick", quick)):
        for function in {item.function for item in tests if hasattr(item, "function")}:
            users[tier] |= oracles_of(function, set())
    assert users["all"] == users["quick"] and len(users["all"]) >= 15


def test_a_tier_is_a_mark_of_a_case():
    one, two = at_night(1, ("a", 2))
    assert (one.values, two.values) == ((1,), ("a", 2))
    assert all([mark.name for mark in case.marks] == ["nightly"] for case in (one, two))
    assert by_day(lambda n: n < 2, [1, 2]) == [1, *at_night(2)]
