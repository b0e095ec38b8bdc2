"""VLA-Pruner: what the prompt pass looks at, and what the actions looked at lately (Liu et al., 2025).

    S_vl    attention of all prefix rows in the layer before the cut                     semantic level
    Ŝ_act   Σ_{i=1..w} γ^i S_act^{t-i}, S_act from the expert's latter half of layers     action level   (Eq. 7)
    C_dual  Top-K(S_vl) ∪ Top-K(Ŝ_act)                                                   max relevance  (Algorithm 2)
    kept    greedy max-min cosine distance of the visual tokens within C_dual, to K      min redundancy (Algorithm 1)

The first w steps run everything, to fill the window.
"""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import struct

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.pruners.base import (
    NO_HISTORY,
    Capture,
    Cut,
    Evidence,
    Plan,
    Pruner,
    Selection,
    check_layer,
    finite,
    whole,
)
from safe_pruner_jax.pruners.diversity import max_min
from safe_pruner_jax.tokens import among_the_best, budget, top_k


@struct.dataclass
class Window:
    """Action saliency of the last w steps [w, n], the latest first, and how many of them are filled (int32)."""

    action: Array
    filled: Array


def vla_pruner(
    *,
    keep: float = 0.2,
    cut: int = 3,
    window: int = 3,
    decay: float = 0.8,
    variant: Literal["as_described", "as_released"] = "as_described",
) -> Pruner:
    """VLA-Pruner on π0.5: combine two relevances, then filter redundancy.

    Deviations from the paper: S_act is normalised over the visual tokens that ran (each step weighs the same); tokens
    dropped at a step have S_act = 0 in it, as in the authors' code. Positions are kept.

    Args:
      keep: share of the alive visual tokens in (0, 1], or a number of tokens.
      cut: layer index before which tokens are dropped, 1 ≤ cut < L.
      window: w, steps of action saliency that are remembered and the length of the warm start.
      decay: γ in [0, 1].
      variant: "as_released" gives the oldest step of the window the largest weight, as the authors' code does
        (weights γ^(w-1), …, γ, 1 from the latest to the oldest), and first picks the token whose nearest neighbour is
        furthest, not its second-nearest.

    References:
      "VLA-Pruner: Temporal-Aware Dual-Level Visual Token Pruning for Efficient Vision-Language-Action Inference",
      Eq. 2, 3, 7, Algorithms 1 and 2.
    """
    if not whole(window, 1):
        raise ValueError(f"window: expected a whole number of steps >= 1, got {window!r}")
    if not 0 <= decay <= 1:
        raise ValueError(f"decay: expected γ in [0, 1], got {decay!r}")
    if variant not in ("as_described", "as_released"):
        raise ValueError(f'variant: expected "as_described" or "as_released", got {variant!r}')
    plan = Plan(
        Cut(check_layer(cut), keep),
        capture=(Capture(cut - 1, "all", over="all"),),
        late_layers="upper",
        late_from="every",
        compares=(("visual", "visual"),),
    )
    ages = np.arange(1, window + 1)
    weight = decay**ages if variant == "as_described" else decay ** (window - ages.astype(float))
    weight = jnp.asarray(weight, jnp.float32)

    def init(e: Evidence) -> Window:
        return Window(jnp.zeros((window, e.alive.shape[0]), jnp.float32), jnp.zeros((), jnp.int32))

    def step(state: Window, e: Evidence) -> tuple[Window, Selection]:
        # what the previous step left behind; without it, or when it is sick, the window starts anew
        known = (e.since_full != NO_HISTORY) & finite(e.late)
        action = jnp.concatenate([e.late.mean(0)[None], state.action[:-1]])
        action = jnp.where(known, action, 0.0)
        filled = jnp.where(known, jnp.minimum(state.filled + 1, window), 0)

        (semantic,) = e.saliency
        forecast = jnp.where(filled > 0, weight @ action, semantic)
        k = budget(keep, e.alive.shape[0])
        pool = among_the_best(semantic, e.alive, keep) | among_the_best(forecast, e.alive, keep)
        score = max_min(e.visual, pool, k, neighbour=2 if variant == "as_described" else 1)
        index, alive = top_k(score, e.alive, keep)
        keyframe = (filled < window) | ~finite(semantic, e.visual)
        return Window(action, filled), Selection(index, alive, keyframe, score, jnp.array(jnp.nan))

    return Pruner("vla_pruner", plan, init, step)
