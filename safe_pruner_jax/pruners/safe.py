"""SAFE-Pruner: forecast what late layers will need, prune the rest, refresh when the subtask changes.

At a keyframe τ all tokens run, and two things are remembered: the unit visual tokens Z̃_τ with the shallow
saliency S_τ^ℓs (the state below), and the saliency of late layers S_τ^ℓ, ℓ ∈ L_d, which the finished step leaves
behind as `Evidence.late`. At every later step t:

    π(v)   = argmax_u Z̃_t[v] · Z̃_τ[u]             which keyframe token is this?               (Algorithm 2)
    Ŝ^ℓ[v] = S_τ^ℓ[π(v)]                           its saliency then is the forecast for now
    κ      = cos(S_t^ℓs, Ŝ^ℓs)                     does the forecast hold where we can check?   (Eq. 6)
    κ < γ  → keyframe: run everything, remember anew                                            (Eq. 7, Algorithm 1)
    else   → keep the top-K of (1-λ) S_t^ℓs + λ mean_ℓ Ŝ^ℓ                                      (Eq. 4-5)

With `pool` above 1 the tokens that stay are the most different among the best, so that not all of them show the same.
With `warm_start` the first steps of an episode all run everything.
"""

import math
from typing import Literal

import jax.numpy as jnp
from flax import struct

from safe_pruner_jax.arrays import Array, Layers
from safe_pruner_jax.pruners import forecast
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
class SafeState:
    """The keyframe cache: unit visual tokens [n, d] and the saliency the keyframe test compares [n].

    `steps` counts the episode's steps so far, int32.
    """

    reference: Array
    shallow: Array
    steps: Array


def safe(
    *,
    keep: float = 0.2,
    cut: int = 3,
    fuse: float | None = None,
    threshold: float = 0.92,
    queries: Literal["action", "text", "last"] = "action",
    late_layers: Layers = (0, -2, -1),
    late_steps: Literal["half", "all", "last"] = "half",
    match: Literal["all", "camera"] = "all",
    pool: float = 1.0,
    warm_start: int = 1,
    every: int | None = None,
    max_age: int | None = None,
    per_camera: int = 0,
    variant: Literal["as_described", "as_released"] = "as_described",
) -> Pruner:
    """SAFE-Pruner on π0.5.

    Args:
      keep: share 1-ρ of the alive visual tokens in (0, 1], or a number of tokens K.
      cut: layer index ℓs before which tokens are dropped, 1 ≤ cut < L; the shallow saliency is layer cut-1's.
      fuse: λ in [0, 1], weight of the forecast; 0 is the paper's "w/o forecast". None: 0.5, or 1 as released.
      threshold: γ in [-1, 1]; κ below it makes a keyframe (paper: 0.92 for OpenVLA-OFT).
      queries: rows of the shallow saliency: action tokens of the expert at flow time 1 (the paper's choice), alive
        prompt rows, or the last prompt row.
      late_layers: L_d, negative counts from the end.
      late_steps: denoise steps averaged for the late saliency: second half, all, or the last one.
      match: candidates of the correspondence: tokens of all cameras or of the same camera only.
      pool: μ ≥ 1; above 1 the best μK tokens by score are candidates, and of them the K that differ most stay (greedy
        max-min cosine distance of Z, as in VLA-Pruner's Algorithm 1; ours). 1 keeps the best K, as the paper does.
      warm_start: w ≥ 1 steps at the start of an episode that run everything, and again when the set of cameras changes
        (VLA-Pruner's warm start). 1 is the paper's first keyframe alone.
      every: a keyframe every so many steps instead of the κ test (the paper's "w/o division"); None: κ decides.
      max_age: at most so many steps between keyframes; None: no limit.
      per_camera: at least so many tokens of every camera are kept.
      variant: "as_released" scores S + λ·mean Ŝ, unnormalised, and tests keyframes on layer 0's last prompt row,
        as the authors' code does.

    Returns:
      The pruner.

    Raises:
      ValueError: a value out of range; says expected, got and what to do.

    References:
      SAFE-Pruner, Algorithms 1 and 2, Eq. 1-7.
    """
    check_layer(cut)
    late_layers = tuple(late_layers)
    released = variant == "as_released"
    weight = (1.0 if released else 0.5) if fuse is None else fuse
    _check(weight, threshold, queries, late_layers, match, pool, warm_start, every, max_age, per_camera, variant)
    capture = (Capture(cut - 1, queries),) + ((Capture(0, "last"),) if released else ())
    products = (("visual", "visual"),) * (1 if pool == 1 else 2)
    plan = Plan(Cut(cut, keep), capture, late_layers, late_steps, compares=products)

    def init(e: Evidence) -> SafeState:
        n, d = e.visual.shape
        return SafeState(jnp.zeros((n, d), jnp.float32), jnp.zeros(n, jnp.float32), jnp.zeros((), jnp.int32))

    def step(state: SafeState, e: Evidence) -> tuple[SafeState, Selection]:
        shallow, tested = e.saliency[0], e.saliency[-1]
        z = forecast.unit(jnp.where(e.alive[:, None], e.visual, 0))
        pi = forecast.correspondence(z, state.reference, e.alive, e.camera if match == "camera" else None)
        k = forecast.kappa(tested, forecast.forecast(state.shallow, pi, e.alive))
        late = forecast.forecast(e.late, pi, e.alive)
        if released:
            score = shallow + weight * late.mean(0)
        else:
            score = forecast.fuse(shallow, late, weight)
        steps = jnp.where(e.since_full == NO_HISTORY, 0, state.steps)
        keyframe = (steps < warm_start) | ~finite(score, tested, z, state.reference, state.shallow)
        keyframe |= ~(k >= threshold) if every is None else e.since_full >= every
        if max_age is not None:
            keyframe |= e.since_full >= max_age
        if pool > 1:
            n = e.alive.shape[0]
            candidates = among_the_best(score, e.alive, _widened(keep, pool, n))
            score = max_min(e.visual, candidates, budget(keep, n), neighbour=2)
        index, alive = top_k(score, e.alive, keep, camera=e.camera, per_camera=per_camera)
        k = jnp.where(e.since_full == NO_HISTORY, jnp.nan, k)
        reference, remembered = jnp.where(keyframe, z, state.reference), jnp.where(keyframe, tested, state.shallow)
        refreshed = SafeState(reference, remembered, steps + 1)
        return refreshed, Selection(index, alive, keyframe, score, k)

    return Pruner("safe", plan, init, step)


def _widened(keep: float, pool: float, n: int) -> float:
    """The budget of the candidates, as `keep` is given: a share at most 1, or a number of tokens at most n."""
    return min(keep * pool, 1.0) if keep <= 1 else min(round(keep * pool), n)


def _check(weight, threshold, queries, late_layers, match, pool, warm_start, every, max_age, per_camera, variant):
    def require(ok: bool, name: str, expected: str, got) -> None:
        if not ok:
            raise ValueError(f"{name}: expected {expected}, got {got!r}")

    require(0 <= weight <= 1, "fuse", "λ in [0, 1]", weight)
    require(-1 <= threshold <= 1, "threshold", "γ in [-1, 1]", threshold)
    require(queries in ("action", "text", "last"), "queries", '"action", "text" or "last"', queries)
    require(
        len(late_layers) > 0 and all(isinstance(l, int) for l in late_layers),
        "late_layers",
        "at least one whole layer index",
        late_layers,
    )
    require(match in ("all", "camera"), "match", '"all" or "camera"', match)
    require(isinstance(pool, int | float) and 1 <= pool < math.inf, "pool", "μ of at least 1", pool)
    require(pool == 1 or per_camera == 0, "pool", "1 together with per_camera, which counts by score", pool)
    require(whole(warm_start, 1), "warm_start", "a whole number of steps >= 1", warm_start)
    require(every is None or whole(every, 1), "every", "a whole number of steps >= 1 or None", every)
    require(max_age is None or whole(max_age, 1), "max_age", "a whole number of steps >= 1 or None", max_age)
    require(whole(per_camera, 0), "per_camera", "a whole number of tokens >= 0", per_camera)
    require(variant in ("as_described", "as_released"), "variant", '"as_described" or "as_released"', variant)
