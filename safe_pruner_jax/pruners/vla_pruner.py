"""VLA-Pruner: what the prompt pass looks at, and what the actions looked at lately (Liu et al., 2025).

    S_vl    attention of all prefix rows in the layer before the cut                     semantic level
    Ŝ_act   Σ_{i=1..w} γ^i S_act^{t-i}, S_act from the expert's latter half of layers     action level   (Eq. 7)
    C_dual  Top-K(S_vl) ∪ Top-K(Ŝ_act)                                                   max relevance  (Algorithm 2)
    kept    greedy max-min cosine distance of the visual tokens within C_dual, to K      min redundancy (Algorithm 1)

The first w steps of an episode fill the window: `PRUNERS` gives the method a warm start of w steps (`warm`).
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import struct

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.pruners import checks
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


@dataclass(frozen=True)
class Parts:
    """What the method is made of; `ablations` change it (Section 5.4).

    Args:
      levels: which relevance chooses. "prefill", "action": the best K by one of them. "fusion": the best K by
        `weight` · S_vl + (1 - `weight`) · Ŝ_act, both normalised to sum 1.
      weight: of the fusion, in [0, 1].
      ema: α of Eq. 6, Ŝ^t = (1-α) Ŝ^{t-1} + α S^{t-1}; None: the decaying window of Eq. 7.
    """

    levels: Literal["both", "prefill", "action", "fusion"] = "both"
    weight: float = 0.5
    ema: float | None = None


@struct.dataclass
class Window:
    """Action saliency of the last w steps [w, n], the latest first, and how many of them are filled (int32).

    With Eq. 6 the first row is the smoothed saliency, and no other is looked at.
    """

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
      window: w ≥ 1, steps of action saliency that are remembered.
      decay: γ in [0, 1].
      variant: "as_released" gives the oldest step of the window the largest weight, as the authors' code does
        (weights γ^(w-1), …, γ, 1 from the latest to the oldest), and first picks the token whose nearest neighbour is
        furthest, not its second-nearest.

    References:
      "VLA-Pruner: Temporal-Aware Dual-Level Visual Token Pruning for Efficient Vision-Language-Action Inference",
      Eq. 2, 3, 7, Algorithms 1 and 2.

    Example:
      >>> plan = vla_pruner(keep=0.2).plan
      >>> plan.late_layers, plan.late_from
      ('upper', 'every')
    """
    return build(Parts(), **locals())


def build(parts: Parts, *, keep: float, cut: int, window: int, decay: float, variant: str) -> Pruner:
    """The method from some of its parts; the other arguments are those of `vla_pruner`, all given."""
    checks.require(whole(window, 1), "window", "a whole number of steps >= 1", window)
    checks.within(0, 1, "decay", "γ", decay)
    checks.variant(variant)
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

    def relevance(semantic: Array, forecast: Array, e: Evidence) -> Array:
        if parts.levels in ("prefill", "action"):
            return semantic if parts.levels == "prefill" else forecast
        if parts.levels == "fusion":
            share = lambda s: s / jnp.maximum(jnp.where(e.alive, s, 0.0).sum(), 1e-30)
            return parts.weight * share(semantic) + (1 - parts.weight) * share(forecast)
        pool = among_the_best(semantic, e.alive, keep) | among_the_best(forecast, e.alive, keep)
        return max_min(e.visual, pool, budget(keep, e.alive.shape[0]), neighbour=2 if variant == "as_described" else 1)

    def step(state: Window, e: Evidence) -> tuple[Window, Selection]:
        # what the previous step left behind; without it, or when it is sick, the window starts anew
        history, well = e.since_full != NO_HISTORY, finite(e.late)
        remembered = history & well
        latest = e.late.mean(0)
        if parts.ema is not None:
            latest = jnp.where(state.filled > 0, (1 - parts.ema) * state.action[0] + parts.ema * latest, latest)
        action = jnp.concatenate([latest[None], state.action[:-1]])
        action = jnp.where(remembered, action, 0.0)
        filled = jnp.where(remembered, jnp.minimum(state.filled + 1, window), 0)

        (semantic,) = e.saliency
        smoothed = action[0] if parts.ema is not None else weight @ action
        forecast = jnp.where(filled > 0, smoothed, semantic)
        score = relevance(semantic, forecast, e)
        index, alive = top_k(score, e.alive, keep)
        keyframe = (history & ~well) | ~finite(semantic, e.visual)
        return Window(action, filled), Selection(index, alive, keyframe, score, jnp.array(jnp.nan))

    return Pruner("vla_pruner", plan, init, step)
