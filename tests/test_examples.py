"""Examples in docstrings are executed: those of every module that has some, and one of every pruner's factory."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

from safe_pruner_jax.pruners import PRUNERS

ROOT = Path(__file__).parents[1]


def modules() -> list[str]:
    """Names of the modules that have examples."""
    files = [path for room in ("safe_pruner_jax", "openpi_patch") for path in sorted((ROOT / room).rglob("*.py"))]
    files = [path for path in files if ">>> " in path.read_text(encoding="utf-8")]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]


@pytest.mark.parametrize("name", modules())
def test_examples_are_true(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("name", PRUNERS)
def test_every_factory_has_an_example(name):
    assert re.search(rf">>> .*\b{name}\(", PRUNERS[name].__doc__)
