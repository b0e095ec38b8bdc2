"""DivPrune: keep tokens that differ from one another, whatever the task (Alvar et al., CVPR 2025)."""

import jax.numpy as jnp

from safe_pruner_jax.pruners.base import Cut, Evidence, Plan, Pruner, Selection, State, finite, stateless
from safe_pruner_jax.pruners.diversity import max_min
from safe_pruner_jax.tokens import budget, top_k


def divprune(*, keep: float = 0.2) -> Pruner:
    """K tokens by greedy max-min cosine distance of the visual tokens, before the first layer.

    Deviations from the paper: one choice over all cameras; dead tokens are no candidates. Positions are kept.

    Args:
      keep: share of the alive visual tokens in (0, 1], or a number of tokens.

    References:
      "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", Algorithm 1.

    Example:
      >>> divprune(keep=0.1).plan.cut
      Cut(layer=0, keep=0.1)
    """
    plan = Plan(Cut(0, keep), compares=(("visual", "visual"),))

    def step(state: State, e: Evidence) -> tuple[State, Selection]:
        score = max_min(e.visual, e.alive, budget(keep, e.alive.shape[0]))
        index, alive = top_k(score, e.alive, keep)
        return state, Selection(index, alive, ~finite(e.visual), score, jnp.array(jnp.nan))

    return Pruner("divprune", plan, stateless, step)
