"""Pruners by name: those of this package, and those that installed packages announce.

`make(name, **choices)` makes one; the protocol is in `base`. Every factory of the table takes the choices of
`full_steps` beside its own. Another package announces its factories in its own pyproject.toml; they are then known to
`make`, to the command line and to records like those of this one:

    [project.entry-points."safe_pruner_jax.pruners"]
    mine = "my_package.pruner:mine"
"""

import difflib
from collections.abc import Callable
from importlib import metadata
from typing import Any

from safe_pruner_jax.pruners.ablations import ABLATIONS
from safe_pruner_jax.pruners.base import Capture, Cut, Evidence, Later, Plan, Pruner, Selection
from safe_pruner_jax.pruners.baselines import BASELINES
from safe_pruner_jax.pruners.divprune import divprune
from safe_pruner_jax.pruners.fastv import fastv
from safe_pruner_jax.pruners.full import full
from safe_pruner_jax.pruners.full_steps import after_grasp, warm, with_full_steps
from safe_pruner_jax.pruners.random import random
from safe_pruner_jax.pruners.safe import safe
from safe_pruner_jax.pruners.sparsevlm import sparsevlm
from safe_pruner_jax.pruners.specprune import specprune
from safe_pruner_jax.pruners.vla_cache import vla_cache
from safe_pruner_jax.pruners.vla_pruner import vla_pruner

__all__ = [
    "GROUP",
    "PRUNERS",
    "Capture",
    "Cut",
    "Evidence",
    "Later",
    "Plan",
    "Pruner",
    "Selection",
    "after_grasp",
    "factory",
    "make",
    "names",
    "warm",
]

vla_pruner = with_full_steps(vla_pruner, follows="window")
safe, fastv, specprune, vla_cache = (with_full_steps(f) for f in (safe, fastv, specprune, vla_cache))
sparsevlm, divprune, random = (with_full_steps(f) for f in (sparsevlm, divprune, random))

PRUNERS: dict[str, Callable[..., Pruner]] = {
    "full": full,
    "safe": safe,
    "fastv": fastv,
    "vla_pruner": vla_pruner,
    "specprune": specprune,
    "vla_cache": vla_cache,
    "sparsevlm": sparsevlm,
    "divprune": divprune,
    "random": random,
}
"""Every pruner of the package: name → keyword factory."""

GROUP = "safe_pruner_jax.pruners"
"""Entry point group in which other packages announce factories."""


def names() -> tuple[str, ...]:
    """All names there are, this package's first. Nothing of other packages is imported."""
    return (*PRUNERS, *sorted({e.name for e in metadata.entry_points(group=GROUP)} - set(PRUNERS)))


def factory(name: str) -> Callable[..., Pruner]:
    """The factory of a pruner by name, an ablation and a baseline too; for names of this package always its own.

    Raises:
      ValueError: no such pruner, with the names there are; or what another package announces is not a factory.
      ImportError: another package's factory cannot be imported.
    """
    if build := PRUNERS.get(name) or ABLATIONS.get(name) or BASELINES.get(name):
        return build
    announced = {e.name: e for e in metadata.entry_points(group=GROUP)}
    if name not in announced:
        listed = names()
        close = difflib.get_close_matches(name, listed, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"pruner: expected one of {', '.join(listed)}, got {name!r}{hint}")
    build = announced[name].load()
    if not callable(build):
        raise ValueError(
            f"pruner: expected a factory behind the entry point {name!r}, got {type(build).__name__}; "
            f"name a function in {announced[name].value!r}"
        )
    return with_full_steps(build)


def make(name: str, **choices: Any) -> Pruner:
    """A pruner by name.

    Raises:
      ValueError: no such pruner, or a choice out of range.
      TypeError: the factory has no such choice.
    """
    return factory(name)(**choices)
