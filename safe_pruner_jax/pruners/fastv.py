"""FastV: keep what all tokens look at in an early layer (Chen et al., ECCV 2024)."""

from typing import Literal

import jax.numpy as jnp

from safe_pruner_jax.pruners.base import (
    Capture,
    Cut,
    Evidence,
    Plan,
    Pruner,
    Selection,
    State,
    check_layer,
    finite,
    stateless,
)
from safe_pruner_jax.pruners.checks import one_of
from safe_pruner_jax.tokens import top_k


def fastv(*, keep: float = 0.2, cut: int = 3, queries: Literal["all", "last"] = "all") -> Pruner:
    """The K tokens with the highest head-mean attention at layer `cut - 1`, over all keys.

    Deviation from the paper: the cut is before layer 3 as for every other method here (paper: 2). Positions are kept.

    Args:
      keep: share of the alive visual tokens in (0, 1], or a number of tokens.
      cut: layer index before which tokens are dropped, 1 ≤ cut < L.
      queries: whose attention: the mean over all rows of the prefix, as described; or "last", the last prompt row, as
        in the authors' code, which a causal model is made for.

    References:
      "An Image is Worth 1/2 Tokens After Layer 2", Section 4.1.

    Example:
      >>> fastv(keep=64).plan.capture
      (Capture(layer=2, rows='all', over='all'),)
    """
    one_of(("all", "last"), "queries", queries)
    plan = Plan(Cut(check_layer(cut), keep), capture=(Capture(cut - 1, queries, over="all"),))

    def step(state: State, e: Evidence) -> tuple[State, Selection]:
        (score,) = e.saliency
        index, alive = top_k(score, e.alive, keep)
        return state, Selection(index, alive, ~finite(score, e.visual), score, jnp.array(jnp.nan))

    return Pruner("fastv", plan, stateless, step)
