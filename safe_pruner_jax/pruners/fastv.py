"""FastV: keep what the last prompt token looks at in an early layer (Chen et al., ECCV 2024)."""

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
from safe_pruner_jax.tokens import top_k


def fastv(*, keep: float = 0.2, cut: int = 3) -> Pruner:
    """The K tokens with the highest head-mean attention of the last prefix row at layer `cut - 1`.

    Deviations from the paper: the cut is before layer 3 as for every other method here (paper: 2); the last row of
    π0.5's bidirectional prefix is the last prompt token, not a token about to be generated. Positions are kept.

    Args:
      keep: share of the alive visual tokens in (0, 1], or a number of tokens.
      cut: layer index before which tokens are dropped, 1 ≤ cut < L.

    References:
      "An Image is Worth 1/2 Tokens After Layer 2", Section 4.1.
    """
    plan = Plan(Cut(check_layer(cut), keep), capture=(Capture(cut - 1, "last", over="all"),))

    def step(state: State, e: Evidence) -> tuple[State, Selection]:
        (score,) = e.saliency
        index, alive = top_k(score, e.alive, keep)
        return state, Selection(index, alive, ~finite(score, e.visual), score, jnp.array(jnp.nan))

    return Pruner("fastv", plan, stateless, step)
