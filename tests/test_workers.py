"""Tests that share what is dear run in one worker."""

import pytest
from workers import LONGEST, Groups, group, rank

pytestmark = pytest.mark.newest


def test_a_module_is_a_group_and_some_are_one():
    assert group("tests/test_wire.py::test_a") == group("tests/test_wire.py::test_b[x0]") == "test_wire"
    assert group("tests/test_engine.py::test_a") == group("tests/test_control.py::test_b") != "test_engine"
    assert group("tests/test_parity.py::test_a[x]") != group("tests/test_parity.py::test_a[y]")


def test_the_laws_of_a_case_are_a_group():
    names = (
        "test_law[a_law-safe,threshold=-1.0]",
        "test_law[another-safe,threshold=-1.0]",
        "test_safe_is_algorithm_1[safe,threshold=-1.0]",
    )
    assert {group(f"tests/test_pruners.py::{name}") for name in names} == {"laws of safe,threshold=-1.0"}
    assert group("tests/test_pruners.py::test_law[a_law-fastv]") == "laws of fastv"
    assert group("tests/test_pruners.py::test_safe_defaults_are_the_papers") == "test_pruners"


def test_the_run_is_scheduled_by_groups(pytestconfig):
    assert Groups._split_scope(None, "tests/test_wire.py::test_it[1@2]") == "test_wire"
    made = pytestconfig.hook.pytest_xdist_make_scheduler
    assert any(impl.plugin_name.endswith("conftest.py") for impl in made.get_hookimpls())


def test_long_modules_begin_first():
    assert rank(f"tests/{LONGEST[0]}.py::test_a") == 0 < rank("tests/test_wire.py::test_a") == len(LONGEST)
