"""Keeps every alive token: the lossless baseline every other method is compared with."""

import jax.numpy as jnp

from safe_pruner_jax.pruners.base import Evidence, Plan, Pruner, Selection, State, stateless


def full() -> Pruner:
    """No pruning; dead tokens are still left out by the layout.

    Example:
      >>> full().plan.cuts
      ()
    """
    return Pruner("full", Plan(), stateless, _step)


def _step(state: State, e: Evidence) -> tuple[State, Selection]:
    n = e.alive.shape[0]
    index = jnp.arange(n, dtype=jnp.int32)
    score = jnp.where(e.alive, 1.0, 0.0)
    return state, Selection(index, e.alive, jnp.array(True), score, jnp.array(jnp.nan))
