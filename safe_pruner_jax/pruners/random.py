"""Keeps uniformly random tokens: the floor of every table."""

import jax
import jax.numpy as jnp

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.pruners.base import NO_HISTORY, Cut, Evidence, Plan, Pruner, Selection, check_layer, finite, whole
from safe_pruner_jax.tokens import top_k


def random(*, keep: float = 0.2, cut: int = 3, warm_start: int | None = None) -> Pruner:
    """Random tokens, drawn anew at every step from the robot's own seeded key.

    Args:
      keep: share of the alive visual tokens in (0, 1], or a number of tokens.
      cut: layer index before which tokens are dropped, 1 ≤ cut < L.
      warm_start: w ≥ 1 steps at the start of an episode that run everything, as those of `safe` and `vla_pruner` do, so
        that what these gain by choosing can be told from what they gain by their first steps. None: no such steps.
    """
    if warm_start is not None and not whole(warm_start, 1):
        raise ValueError(f"warm_start: expected a whole number of steps >= 1 or None, got {warm_start!r}")
    plan = Plan(Cut(check_layer(cut), keep))

    def init(e: Evidence) -> Array:
        return jnp.zeros((), jnp.int32)  # steps since the episode's first one, if that ran in full

    def step(steps: Array, e: Evidence) -> tuple[Array, Selection]:
        score = jnp.where(e.alive, jax.random.uniform(e.key, e.alive.shape), 0.0)
        index, alive = top_k(score, e.alive, keep)
        steps = jnp.where(e.since_full == NO_HISTORY, 0, steps)
        keyframe = (steps < (warm_start or 0)) | ~finite(e.visual)
        return steps + 1, Selection(index, alive, keyframe, score, jnp.array(jnp.nan))

    return Pruner("random", plan, init, step)
