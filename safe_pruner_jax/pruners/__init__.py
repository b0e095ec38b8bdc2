"""Pruners by name. `PRUNERS[name](**choices)` makes one; the protocol is in `base`."""

import difflib
from collections.abc import Callable

from safe_pruner_jax.pruners.base import Capture, Cut, Evidence, Later, Plan, Pruner, Selection
from safe_pruner_jax.pruners.divprune import divprune
from safe_pruner_jax.pruners.fastv import fastv
from safe_pruner_jax.pruners.full import full
from safe_pruner_jax.pruners.random import random
from safe_pruner_jax.pruners.safe import safe
from safe_pruner_jax.pruners.sparsevlm import sparsevlm
from safe_pruner_jax.pruners.specprune import specprune
from safe_pruner_jax.pruners.vla_cache import vla_cache
from safe_pruner_jax.pruners.vla_pruner import vla_pruner

__all__ = ["PRUNERS", "Capture", "Cut", "Evidence", "Later", "Plan", "Pruner", "Selection", "factory", "make"]

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


def factory(name: str) -> Callable[..., Pruner]:
    """The factory of a pruner by name; raises ValueError with the names there are."""
    if name not in PRUNERS:
        close = difflib.get_close_matches(name, PRUNERS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"pruner: expected one of {', '.join(PRUNERS)}, got {name!r}{hint}")
    return PRUNERS[name]


def make(name: str, **choices) -> Pruner:
    """A pruner by name.

    Raises:
      ValueError: no such pruner, or a choice out of range.
      TypeError: the factory has no such choice.
    """
    return factory(name)(**choices)
