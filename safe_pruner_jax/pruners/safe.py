"""SAFE-Pruner: forecast what late layers will need, prune the rest, refresh when the subtask changes.

A full pass at a keyframe τ leaves three things: the unit visual tokens Z̃_τ, the shallow saliency S_τ^ℓs, and the
saliency of late layers S_τ^ℓ, ℓ ∈ L_d. At every later step t:

    π(v)   = argmax_u Z̃_t[v] · Z̃_τ[u]             which keyframe token is this?               (Algorithm 2)
    Ŝ^ℓ[v] = S_τ^ℓ[π(v)]                           its saliency then is the forecast for now
    κ      = cos(S_t^ℓs, Ŝ^ℓs)                     does the forecast hold where we can check?   (Eq. 6)
    κ < γ  → keyframe: run everything, remember anew                                            (Eq. 7, Algorithm 1)
    else   → keep the top-K of (1-λ) S_t^ℓs + λ mean_ℓ Ŝ^ℓ                                      (Eq. 4-5)

With `soft` above 0 the forecast is a mean over all keyframe tokens, the most similar ones weighing most; with `pool`
above 1 the tokens that stay are the most different among the best, so that not all of them show the same.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from safe_pruner_jax.arrays import Array, Layers
from safe_pruner_jax.pruners import checks, forecast
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
from safe_pruner_jax.pruners.checks import require
from safe_pruner_jax.pruners.diversity import max_min
from safe_pruner_jax.tokens import among_the_best, budget, top_k


@struct.dataclass
class SafeState:
    """The keyframe cache: unit tokens [n, d], the saliency that κ compares [n], late saliency of the prefix [|L_d|, n].

    `latest` is (unit tokens, saliency) of the last step: if that ran in full on another's word, it is the keyframe.
    """

    reference: Array
    shallow: Array
    late: Array
    latest: tuple[Array, Array]


def safe(
    *,
    keep: float = 0.2,
    cut: int = 3,
    fuse: float | None = None,
    threshold: float = 0.92,
    queries: Literal["action", "text", "last", "all"] = "action",
    over: Literal["visual", "all"] | None = None,
    late: Literal["expert", "prefix"] = "expert",
    late_layers: Layers | None = None,
    late_steps: Literal["half", "all", "last"] = "half",
    features: Literal["Z", "hidden"] = "Z",
    match: Literal["all", "camera"] = "all",
    soft: float = 0.0,
    pool: float = 1.0,
    every: int | None = None,
    max_age: int | None = None,
    per_camera: int = 0,
    variant: Literal["as_described", "as_released"] = "as_described",
) -> Pruner:
    """SAFE-Pruner on π0.5.

    Args:
      keep: share 1-ρ of the alive visual tokens in (0, 1], or a number of tokens K.
      cut: layer index ℓs before which tokens are dropped, 0 ≤ cut < L; the shallow saliency is layer cut-1's. Before
        layer 0 (ours) there is none: the forecast alone decides, κ is `forecast.likeness`, `queries` are not looked at.
      fuse: λ in [0, 1], weight of the forecast; 0 is the paper's "w/o forecast". None: 0.5, or 1 as released.
      threshold: γ in [-1, 1]; κ below it makes a keyframe (paper: 0.92 for OpenVLA-OFT).
      queries: rows of the shallow saliency: action tokens of the expert at flow time 1, alive prompt rows, the last
        prompt row, or all alive rows of the prefix.
      over: keys that a saliency is normalised over: alive visual tokens, so that every layer weighs the same (Eq. 1),
        or all, so that a layer which hardly looks at images weighs little. None: "visual", or "all" as released.
      late: whose late saliency: action tokens in the expert (Appendix A), or the prefix's rows of `queries` ("text"
        for "action").
      late_layers: L_d, negative counts from the end; the prefix's last layer has no attention, so there -1 is the one
        before. None: 0, L-2 and L-1 (Appendix A), or 0 and L-1 as released.
      late_steps: denoise steps averaged for the expert's: second half, all, or the last one.
      features: what is matched: visual tokens Z as they enter the language model, or their hidden rows at the cut.
      match: candidates of the correspondence: tokens of all cameras or of the same camera only.
      soft: temperature T ≥ 0 of the correspondence, in units of cosine similarity; above 0 a token inherits from all
        keyframe tokens, weighed by softmax(Z̃_t·Z̃_τ / T) (ours). 0 takes the most similar one's, as the paper does.
      pool: μ ≥ 1; above 1 the best μK tokens by score are candidates, and of them the K that differ most stay (greedy
        max-min cosine distance of Z, as in VLA-Pruner's Algorithm 1; ours). 1 keeps the best K, as the paper does.
      every: a keyframe every so many steps instead of the κ test (the paper's "w/o division"); None: κ decides.
      max_age: at most so many steps between keyframes; None: no limit.
      per_camera: at least so many tokens of every camera are kept.
      variant: "as_released" scores S + λ·mean Ŝ over all keys, takes layer 0 of L_d by its last prompt row, and tests
        keyframes on that row, as the authors' code does.

    Returns:
      The pruner.

    Raises:
      ValueError: a value out of range; says expected, got and what to do.

    References:
      SAFE-Pruner, Algorithms 1 and 2, Eq. 1-7, Appendix A.

    Example:
      >>> plan = safe(keep=0.2).plan
      >>> plan.cut, plan.late_layers
      (Cut(layer=3, keep=0.2), (0, -2, -1))
    """
    check_layer(cut, 0)
    released = variant == "as_released"
    weight = (1.0 if released else 0.5) if fuse is None else fuse
    keys = ("all" if released else "visual") if over is None else over
    layers = ((0, -1) if released else (0, -2, -1)) if late_layers is None else tuple(late_layers)
    _check_scores(cut=cut, fuse=weight, threshold=threshold, queries=queries, over=keys, late=late, layers=layers)
    require(cut > 0 or not released, "cut", "at least 1 with the released code, which looks at layer 0", cut)
    _check_matching(features=features, match=match, soft=soft)
    _check_choices(pool=pool, every=every, max_age=max_age, per_camera=per_camera, variant=variant)
    first = released and 0 in layers  # of L_d, layer 0 is the tested saliency itself
    deep = tuple(l for l in layers if l != 0) if first else layers
    plan = _plan(Cut(cut, keep), queries, keys, deep, released=released, late=late, late_steps=late_steps, pool=pool)

    def init(e: Evidence) -> SafeState:
        n, d = e.visual.shape
        z, s = jnp.zeros((n, d), jnp.float32), jnp.zeros(n, jnp.float32)
        return SafeState(z, s, jnp.zeros((len(plan.remember), n), jnp.float32), (z, s))

    def step(state: SafeState, e: Evidence) -> tuple[SafeState, Selection]:
        saliency = e.saliency or (jnp.zeros(e.alive.shape, jnp.float32),)
        shallow, tested = saliency[0], saliency[-1]
        state = _after_a_full_pass(state, e)
        tokens = e.visual if features == "Z" else e.hidden
        z = forecast.unit(jnp.where(e.alive[:, None], tokens, 0))
        pi, similar = forecast.partners(z, state.reference, e.alive, e.camera if match == "camera" else None, soft)
        remembered = jnp.concatenate([state.shallow[None]] * first + [state.late if plan.remember else e.late])
        late, expected = forecast.forecast(remembered, pi, e.alive), forecast.forecast(state.shallow, pi, e.alive)
        if cut > 0:
            k = forecast.kappa(tested, expected)
        else:
            k = forecast.likeness(z, state.reference, remembered.mean(0), e.alive)
        score = shallow + weight * late.mean(0) if released else forecast.fuse(shallow, late, weight)
        # a token that is not finite, now or at the keyframe, shows in the similarities: they alone are looked at
        seen = (score, tested, state.shallow, jnp.where(jnp.isnan(similar), similar, 0.0))
        unseen = () if features == "Z" and pool == 1 else (e.visual,)
        keyframe = (e.since_full == NO_HISTORY) | ~finite(*seen, *unseen)
        keyframe |= ~(k >= threshold) if every is None else e.since_full >= every
        if max_age is not None:
            keyframe |= e.since_full >= max_age
        if pool > 1:
            n = e.alive.shape[0]
            candidates = among_the_best(score, e.alive, _widened(keep, pool, n))
            score = max_min(e.visual, candidates, budget(keep, n), neighbour=2)
        index, alive = top_k(score, e.alive, keep, camera=e.camera, per_camera=per_camera)
        reference, remembered = jnp.where(keyframe, z, state.reference), jnp.where(keyframe, tested, state.shallow)
        late = jnp.where(jnp.isfinite(state.late), state.late, 0.0) if plan.remember else state.late
        return SafeState(reference, remembered, late, (z, tested)), Selection(index, alive, keyframe, score, k)

    return Pruner("safe", plan, init, step)


def _plan(
    cut: Cut, queries: str, over: str, deep: Layers, *, released: bool, late: str, late_steps: str, pool: float
) -> Plan:
    """What is looked at and what a step leaves behind; `deep` are the layers whose late saliency is remembered."""
    rows = "text" if queries == "action" else queries
    tested = (Capture(0, "last", over),) if released else ()
    return Plan(
        cut,
        (Capture(cut.layer - 1, queries, over), *tested) if cut.layer > 0 else (),
        late_layers=deep if late == "expert" else (),
        late_steps=late_steps,
        late_over=over,
        remember=tuple(Capture(l if l >= 0 else l - 1, rows, over) for l in deep) if late == "prefix" else (),
        compares=(("visual", "visual"),) * (1 + (pool > 1) + (cut.layer == 0)),
    )


def _after_a_full_pass(state: SafeState, e: Evidence) -> SafeState:
    """The state with what the last step left behind, if that ran in full; without history saliency is 0, and κ NaN."""
    full = e.since_full == 1
    reference, shallow = jax.tree.map(
        lambda new, old: jnp.where(full, new, old), state.latest, (state.reference, state.shallow)
    )
    history = e.since_full != NO_HISTORY
    shallow = jnp.where(history, shallow, 0.0)
    late = state.late
    if e.past:
        late = jnp.where(full, jnp.stack(e.past), jnp.where(history, late, 0.0))
    return state.replace(reference=reference, shallow=shallow, late=late)


def _widened(keep: float, pool: float, n: int) -> float:
    """The budget of the candidates, as `keep` is given: a share at most 1, or a number of tokens at most n."""
    return min(keep * pool, 1.0) if keep <= 1 else min(round(keep * pool), n)


def _check_scores(*, cut: int, fuse: Any, threshold: Any, queries: Any, over: Any, late: Any, layers: Any):
    checks.within(0, 1, "fuse", "λ", fuse)
    require(cut > 0 or fuse > 0, "fuse", "λ above 0 with cut=0, where the forecast alone decides", fuse)
    checks.within(-1, 1, "threshold", "γ", threshold)
    checks.one_of(("action", "text", "last", "all"), "queries", queries)
    checks.one_of(("visual", "all"), "over", over)
    checks.one_of(("expert", "prefix"), "late", late)
    some = len(layers) > 0 and all(isinstance(l, int) for l in layers)
    require(some, "late_layers", "at least one whole layer index", layers)


def _check_matching(*, features: Any, match: Any, soft: Any):
    checks.one_of(("Z", "hidden"), "features", features)
    checks.one_of(("all", "camera"), "match", match)
    checks.at_least(0, "soft", "a temperature of at least 0", soft)


def _check_choices(*, pool: Any, every: Any, max_age: Any, per_camera: Any, variant: Any):
    checks.variant(variant)
    checks.at_least(1, "pool", "μ of at least 1", pool)
    require(pool == 1 or per_camera == 0, "pool", "1 together with per_camera, which counts by score", pool)
    require(every is None or whole(every, 1), "every", "a whole number of steps >= 1 or None", every)
    require(max_age is None or whole(max_age, 1), "max_age", "a whole number of steps >= 1 or None", max_age)
    require(whole(per_camera, 0), "per_camera", "a whole number of tokens >= 0", per_camera)
