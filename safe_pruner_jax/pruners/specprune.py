"""SpecPrune-VLA: three sets of tokens to keep, then a little less every few layers (Wang et al., 2025).

    global    what attended to the prompt in a middle and the last layer of the previous step     (Section 4.1.1)
    dynamic   patches whose pixels changed most against the frame T steps back                    (Eq. 3-4)
    local     what attends to the prompt in the first and in the second layer now                 (Section 4.1.3)
    kept      their union

    S_i^l = (1-β) S_i^{l-1} + β · rank weight · layer confidence, of which the lowest 10 % leave at later cuts (Eq. 5-9)

A controller reads the velocity from the actions of the previous step: slow and downwards means fine work, which keeps
more tokens, more of them local and fewer dynamic (Section 6). Shapes are static: K slots, as many of them alive as the
union has tokens.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.pruners import checks
from safe_pruner_jax.pruners.base import NO_HISTORY, Capture, Cut, Evidence, Later, Plan, Pruner, Selection, finite
from safe_pruner_jax.pruners.checks import require, whole
from safe_pruner_jax.pruners.frames import camera_count, patch_similarity, rank_in_camera
from safe_pruner_jax.tokens import best, budget, table

GLOBAL, DYNAMIC, LOCAL = 30, (20, 10), (24, 40)
"""Base sizes of the sets per camera of 256 tokens, (coarse, fine) where the modes differ (Appendix A.6.2)."""

FINE = GLOBAL + DYNAMIC[1] + 2 * LOCAL[1]
"""Tokens per camera of 256 that fine work keeps if its four sets do not overlap; coarse work keeps 98."""

WITHOUT_REUSE = GLOBAL + LOCAL[0]
"""Base size of the local sets where there is no global one (Section 7.5.2)."""


@dataclass(frozen=True)
class Parts:
    """What the method is made of; `ablations` leave some out.

    Args:
      static: the sets at the first cut (Section 4); without them everything stays there.
      dynamic: the later cuts (Section 5).
      controller: fine and coarse work (Section 6); without it all work is coarse.
      reuse: the global set (Section 4.1.1).
      confidence: entropy weighs the layers (Eq. 7-8); without it all weigh the same.
      heads: ranks per head (Eq. 6), or of the head mean.
    """

    static: bool = True
    dynamic: bool = True
    controller: bool = True
    reuse: bool = True
    confidence: bool = True
    heads: bool = True


@struct.dataclass
class SpecState:
    """Pixels of the last frames [frames, n, p] uint8 (latest first), how many there are, mode, importance [n], and the
    entropy of every layer's attention at the first step [L-1], 0 before it is known."""

    frames: Array
    filled: Array
    fine: Array
    importance: Array
    entropy: Array


def specprune(
    *,
    keep: float = 0.3,
    alpha: float | None = None,
    layers: tuple[int, ...] | None = None,
    drop: float | None = None,
    smoothing: float = 0.2,
    slope: float = 0.05,
    threshold: float | None = None,
    slow: float | None = None,
    still: float = 0.2,
    executed: int = 5,
    translation: tuple[int, int, int] = (0, 1, 2),
    rotation: tuple[int, int, int] = (3, 4, 5),
    variant: Literal["as_described", "as_released"] = "as_described",
) -> Pruner:
    """SpecPrune-VLA on π0.5.

    Deviations from the paper: at most K tokens are kept, since shapes are static; π0.5's last prefix layer has no
    attention, the one before stands for it; frames are seen once per policy call, so T becomes T / executed calls.

    Args:
      keep: share of the alive visual tokens in (0, 1], or a number of tokens K, that may stay after the first cut; 1
        drops none.
      alpha: α scales the base sizes of the sets; None: such that those of fine work together have K tokens.
      layers: later cuts, layers of a 32-layer model. None: 10, 15, 20, 25 (Appendix A.3), or 5 as well as released.
      drop: share of the tokens left that leave at each of them, in [0, 1). None: 0.1, or 0.2 as released.
      smoothing: β in [0, 1].
      slope: k > 0 of the rank weight σ(-k · rank); the paper does not give it.
      threshold: τ in [-1, 1], below which a patch has changed. None: 0.95, or 0.986 as released.
      slow: v_t threshold of fine work, normalised actions. None: 0.5, or 0.4 as released.
      still: v_r threshold of fine work.
      executed: actions the robot executes per policy call; an evaluation says it.
      translation: places of Δx, Δy, Δz in an action.
      rotation: places of the three rotations.
      variant: "as_released" looks the other way round, at what the prompt attends to (all rows beside the images), has
        an empty global set, and updates the importance in layers 0, 1 and 12 only, by ranks of the head mean.

    References:
      "SpecPrune-VLA: Accelerating Vision-Language-Action Models via Action-Aware Self-Speculative Pruning",
      Eq. 2-11, Algorithm 1, Appendices A.3 and A.6.2.

    Example:
      >>> [cut.layer for cut in specprune().plan.for_depth(18).cuts]
      [2, 6, 8, 11, 14]
    """
    return build(Parts(), **locals())


def build(
    parts: Parts,
    *,
    keep: float,
    alpha: float | None,
    layers: tuple[int, ...] | None,
    drop: float | None,
    smoothing: float,
    slope: float,
    threshold: float | None,
    slow: float | None,
    still: float,
    executed: int,
    translation: tuple[int, int, int],
    rotation: tuple[int, int, int],
    variant: str,
) -> Pruner:
    """The method from some of its parts; the other arguments are those of `specprune`, all given."""
    released = variant == "as_released"
    sizes = {"keep": keep, "alpha": alpha, "smoothing": smoothing, "slope": slope}
    sizes["layers"] = ((5,) * released + (10, 15, 20, 25)) if layers is None else tuple(layers)
    sizes["drop"] = (0.2 if released else 0.1) if drop is None else drop
    sizes["tau"] = (0.986 if released else 0.95) if threshold is None else threshold
    speeds = {"slow": (0.4 if released else 0.5) if slow is None else slow, "still": still, "executed": executed}
    places = {"translation": tuple(translation), "rotation": tuple(rotation)}
    _check_sizes(**sizes)
    _check_motion(**speeds, **places, variant=variant)
    parts = replace(parts, reuse=False, heads=False) if released else parts
    return _assembled(parts, released=released, **sizes, **speeds, **places)


def _assembled(
    parts: Parts,
    *,
    released: bool,
    keep: float,
    alpha: float | None,
    layers: tuple[int, ...],
    drop: float,
    smoothing: float,
    slope: float,
    tau: float,
    slow: float,
    still: float,
    executed: int,
    translation: tuple[int, int, int],
    rotation: tuple[int, int, int],
) -> Pruner:
    plan = _plan(parts, released, keep if parts.static else 1.0, layers, drop if keep != 1 else 0.0)
    remembered = max(1, round(11 / executed))  # T is at most 11 frames
    past = 2 if parts.reuse else 0  # the first of `Evidence.past`; entropies follow
    decide = lambda importance, e, attention, entropy: updated(importance, attention, entropy, e, smoothing, slope)

    def init(e: Evidence) -> SpecState:
        n, p = e.patches.shape
        frames, none = jnp.zeros((remembered, n, p), jnp.uint8), jnp.zeros((), jnp.int32)
        entropy = jnp.zeros(len(e.past) - past, jnp.float32)
        return SpecState(frames, none, jnp.zeros((), bool), jnp.zeros(n, jnp.float32), entropy)

    def step(state: SpecState, e: Evidence) -> tuple[SpecState, Selection]:
        history = e.since_full != NO_HISTORY
        filled = jnp.where(history, state.filled, 0)
        speed, fine = controller(e.actions[:executed], history & state.fine, slow, still, translation, rotation)
        fine = history & fine & parts.controller
        # T = floor(7 - v) + 4 frames back (Section 4.1.2), as far as there are any
        back = jnp.round((jnp.floor(7.0 - speed) + 4.0) / executed).astype(jnp.int32)
        back = jnp.clip(back, 1, jnp.maximum(filled, 1))
        similarity = jnp.where(filled > 0, patch_similarity(e.patches, state.frames[back - 1]), 1.0)
        k, n = budget(keep, e.alive.shape[0]), e.alive.shape[0]
        scale = k / n / FINE if alpha is None else alpha / 256
        kept = union(e, similarity, fine, scale, tau, e.past[:past] if parts.reuse else None)
        first, second = e.saliency
        score = kept.astype(jnp.float32) + (first + second) / 2  # attention is below 1
        keyframe = ~history | ~finite(e.visual, *e.saliency, *e.past, e.actions)
        most = table(lambda m: budget(plan.cut.keep, m), n)[e.alive.sum()]
        whole_budget = keyframe | (plan.cut.keep == 1)
        count = jnp.where(whole_budget, most, jnp.clip(kept.sum(), 1, most))
        index, alive = best(score, e.alive, budget(plan.cut.keep, n), count)

        entropy = jnp.stack(e.past[past:])
        measured = jnp.where((e.since_full == 1) & finite(entropy), entropy, 0.0)
        entropy = jnp.where(history, jnp.where(state.entropy.sum() > 0, state.entropy, measured), 0.0)
        frames = jnp.concatenate([e.patches[None], state.frames[:-1]])
        frames = jnp.where(history, frames, jnp.where(jnp.arange(remembered)[:, None, None] == 0, e.patches, 0))
        importance = jnp.zeros_like(state.importance)
        for l in range(2 * released):
            importance = decide(importance, e, e.saliency[l][None], entropy[l] if parts.confidence else None)
        importance = jnp.where(jnp.isfinite(importance), importance, 0.0)
        state = SpecState(frames, jnp.minimum(filled + 1, remembered), fine, importance, entropy)
        return state, Selection(index, alive, keyframe, score, jnp.array(jnp.nan))

    def later(state: SpecState, e: Evidence, i: int) -> tuple[SpecState, Selection]:
        importance, n = state.importance, e.alive.shape[0]
        captures = plan.for_depth(state.entropy.shape[0] + 1).later[i].capture
        for c, attention in zip(captures, e.saliency, strict=True):
            heads = attention.reshape(-1, n)
            importance = decide(importance, e, heads, state.entropy[c.layer] if parts.confidence else None)
        k = budget(plan.later[i].keep, n)
        share = 1.0 if plan.later[i].keep == 1 else 1.0 - drop
        count = jnp.clip(jnp.round(share * e.running.sum(dtype=jnp.float32)).astype(jnp.int32), 1, k)
        index, alive = best(importance, e.running, k, count)
        nan = jnp.array(jnp.nan)
        return state.replace(importance=importance), Selection(index, alive, jnp.array(False), importance, nan)

    return Pruner("specprune", plan, init, step, later if plan.later else None)


def _plan(parts: Parts, released: bool, keep: float, layers: tuple[int, ...], drop: float) -> Plan:
    """Where tokens leave and what is looked at; `keep` is 1 without the static sets."""
    now = Capture(None, "heads_to_text" if parts.heads else "text" if released else "to_text", over="all")
    later, before = [], 2
    for i, layer in enumerate(layers if parts.dynamic else ()):
        share = keep * (1 - drop) ** (i + 1)
        share = share if keep <= 1 else max(2, round(share))
        seen = (now,) if not released else (Capture(12, "text", over="all"),) if before <= 12 < layer else ()
        later.append(Later(layer, share, seen))
        before = layer
    rows = "text" if released else "to_text"
    back = (Capture(14, "to_text"), Capture(31, "to_text")) if parts.reuse else ()
    return Plan(
        Cut(2, keep),
        capture=(Capture(0, rows, over="all"), Capture(1, rows, over="all")),
        later=tuple(later),
        remember=(*back, Capture(None, "text_entropy", over="all")),
        depth=32,
    )


def union(e: Evidence, similarity: Array, fine: Array, scale: float, tau: float, past: tuple | None) -> Array:
    """V_global ∪ V_dynamic ∪ V_local of every camera (Section 4): [n] bool.

    Args:
      e: evidence at the first cut, with the attention of layers 0 and 1.
      similarity: [n] of each token's pixels to the reference frame.
      fine: bool scalar, the mode.
      scale: of the base sizes, per token of a camera.
      tau: τ.
      past: two attentions [n] of the previous step, zeros without history; None: no global set.
    """
    local = LOCAL if past is not None else (WITHOUT_REUSE, WITHOUT_REUSE + LOCAL[1] - LOCAL[0])
    coarse, careful = jnp.asarray([GLOBAL, DYNAMIC[0], local[0]]), jnp.asarray([GLOBAL, DYNAMIC[1], local[1]])
    size = jnp.where(fine, careful, coarse)
    alive = camera_count(e.alive, e.camera).astype(jnp.float32)
    counts = jnp.round(scale * size[:, None].astype(jnp.float32) * alive[None, :]).astype(jnp.int32)
    among = lambda score, candidate, count: candidate & (rank_in_camera(score, candidate, e.camera) < count)
    kept = among(-similarity, e.alive & (similarity < tau), counts[1])
    kept |= among(e.saliency[0], e.alive, counts[2]) | among(e.saliency[1], e.alive, counts[2])
    if past is None:
        return kept
    return kept | (e.since_full != NO_HISTORY) & among((past[0] + past[1]) / 2, e.alive, counts[0])


def controller(
    actions: Array, fine: Array, slow: float, still: float, translation: Any, rotation: Any
) -> tuple[Array, Array]:
    """The action-aware controller (Section 6.2, Eq. 10-11).

    Args:
      actions: [executed, action_dim] float32, what the robot has just done.
      fine: bool scalar, the mode so far.
      slow, still: thresholds of v_t and v_r.
      translation, rotation: places in an action.

    Returns:
      v_t, the mean translation per action, and the mode: fine work starts when v_t and v_r are below their thresholds
      and Δz ≤ 0, and ends when one of the velocities exceeds its threshold.
    """
    move = actions.mean(0)
    norm = lambda places: jnp.sqrt((move[jnp.asarray(places)] ** 2).sum())
    v_t, v_r = norm(translation), norm(rotation)
    calm = (v_t < slow) & (v_r < still)
    return v_t, calm & (fine | (move[translation[2]] <= 0))


def updated(
    importance: Array, attention: Array, entropy: Array | None, e: Evidence, beta: float, slope: float
) -> Array:
    """S^l = (1-β) S^{l-1} + β ω_rank ω_conf of one layer (Eq. 5-9), ω_rank the mean over heads.

    Args:
      importance: [n] S^{l-1}.
      attention: [heads, n] of visual tokens to the prompt (Eq. 2).
      entropy: of the prompt's attention to visual tokens (Eq. 7), scalar; None: every layer has confidence 1.
      e: who still runs.
      beta, slope: β and k.
    """
    everywhere = jnp.zeros_like(e.camera)
    rank = jax.vmap(lambda a: rank_in_camera(a, e.running, everywhere))(attention)  # over all cameras
    weight = jnp.where(e.running, jax.nn.sigmoid(-slope * rank.astype(jnp.float32)), 0.0)
    weight = (weight / jnp.maximum(weight.sum(-1, keepdims=True), 1e-30)).mean(0)
    confidence = 1.0 if entropy is None else 1.0 / (entropy + 1e-6)
    return (1 - beta) * importance + beta * weight * confidence


def _check_sizes(*, keep: Any, alpha: Any, layers: Any, drop: Any, smoothing: Any, slope: Any, tau: Any):
    Cut(2, keep)
    require(alpha is None or alpha > 0, "alpha", "α > 0 or None", alpha)
    checks.ascending(layers, 3, 31)
    require(0 <= drop < 1, "drop", "a share in [0, 1)", drop)
    checks.within(0, 1, "smoothing", "β", smoothing)
    require(slope > 0, "slope", "k > 0", slope)
    checks.within(-1, 1, "threshold", "τ", tau)


def _check_motion(*, slow: Any, still: Any, executed: Any, translation: Any, rotation: Any, variant: Any):
    for name, speed in (("slow", slow), ("still", still)):
        checks.at_least(0, name, "a speed >= 0", speed)
    require(whole(executed, 1), "executed", "a whole number of actions >= 1", executed)
    for name, places in (("translation", translation), ("rotation", rotation)):
        require(len(places) == 3 and all(whole(i, 0) for i in places), name, "three places in an action", places)
    checks.variant(variant)
