"""Keeps uniformly random tokens: the floor of every table."""

import jax
import jax.numpy as jnp

from safe_pruner_jax.pruners.base import Cut, Evidence, Plan, Pruner, Selection, State, check_layer, finite, stateless
from safe_pruner_jax.tokens import top_k


def random(*, keep: float = 0.2, cut: int = 3) -> Pruner:
    """Random tokens, drawn anew at every step from the robot's own seeded key.

    Args:
      keep: share of the alive visual tokens in (0, 1], or a number of tokens.
      cut: layer index before which tokens are dropped, 1 ≤ cut < L.

    Example:
      >>> random(keep=0.3, cut=2).plan.cut
      Cut(layer=2, keep=0.3)
    """
    plan = Plan(Cut(check_layer(cut), keep))

    def step(state: State, e: Evidence) -> tuple[State, Selection]:
        score = jnp.where(e.alive, jax.random.uniform(e.key, e.alive.shape), 0.0)
        index, alive = top_k(score, e.alive, keep)
        return state, Selection(index, alive, ~finite(e.visual), score, jnp.array(jnp.nan))

    return Pruner("random", plan, stateless, step)
