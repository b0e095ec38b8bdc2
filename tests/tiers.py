"""Two tiers of tests: what every change runs, and what is run at night.

A nightly test is a second, broader or slower check of what a quick test checks as well. `test_tiers.py` says what the
quick tier may never lose.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

COLLECTED = pytest.StashKey[list]()
"""Every test of a run, nightly or not; kept by `conftest.py` for `test_tiers.py`."""


def at_night(*cases: Any) -> list:
    """The cases for `parametrize`, run at night only; a tuple is the values of several arguments."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.nightly) for case in cases]


def by_day(quick: Callable[[Any], bool], cases: Iterable[Any]) -> list:
    """All the cases for `parametrize`, in their order; those that are not quick are run at night only."""
    return [case if quick(case) else at_night(case)[0] for case in cases]
