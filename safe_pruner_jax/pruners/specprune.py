"""SpecPrune-VLA: three sets of tokens to keep, then a little less every few layers (Wang et al., 2025).

    global    what attended to the prompt in a middle and the last layer of the previous step     (Section 4.1.1)
    dynamic   patches whose pixels changed most against the frame T steps back                    (Eq. 3-4)
    local     what attends to the prompt in the first and in the second layer now                 (Section 4.1.3)
    kept      their union, filled up to K with the next best of local

    S_i^l = (1-β) S_i^{l-1} + β · rank weight · layer confidence, of which the lowest 10 % leave at later cuts (Eq. 5-9)

A controller reads the velocity from the actions of the previous step: slow and downwards means fine work, where the
local set weighs more and the dynamic one less (Section 6).
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.pruners.base import NO_HISTORY, Capture, Cut, Evidence, Later, Plan, Pruner, Selection, finite
from safe_pruner_jax.pruners.frames import camera_count, patch_similarity, rank_in_camera
from safe_pruner_jax.tokens import best, budget, table, top_k

GLOBAL, DYNAMIC, LOCAL = 30, (20, 10), (24, 40)
"""Base sizes of the sets per camera of 256 tokens, (coarse, fine) where the modes differ (Appendix A.6.2)."""


@struct.dataclass
class SpecState:
    """Pixels of the last frames [frames, n, p] uint8 (latest first), how many there are, mode, and importance [n]."""

    frames: Array
    filled: Array
    fine: Array
    importance: Array


def specprune(
    *,
    keep: float = 0.3,
    alpha: float | None = None,
    layers: tuple[int, ...] = (10, 15, 20, 25),
    drop: float = 0.1,
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

    Deviations from the paper: exactly K tokens are kept, since shapes are static, so the mode changes what they are and
    not how many; π0.5's last prefix layer has no attention, the one before stands for it; ranks are of head-mean
    attention; the layer confidence is measured at every step; frames are seen once per policy call, so T becomes
    T / executed calls.

    Args:
      keep: share of the alive visual tokens in (0, 1], or a number of tokens K, after the first cut; 1 drops none.
      alpha: α scales the base sizes of the sets; None: such that the four of them together have K tokens.
      layers: later cuts, layers of a 32-layer model, scaled to the model's depth.
      drop: share of the tokens left that leave at each of them, in [0, 1).
      smoothing: β in [0, 1].
      slope: k > 0 of the rank weight σ(-k · rank); the paper does not give it.
      threshold: τ in [-1, 1], below which a patch has changed. None: 0.95, or 0.986 as released.
      slow: v_t threshold of fine work, normalised actions. None: 0.5, or 0.4 as released.
      still: v_r threshold of fine work.
      executed: actions the robot executes per policy call.
      translation: places of Δx, Δy, Δz in an action.
      rotation: places of the three rotations.
      variant: "as_released" has an empty global set, as the authors' code returns one.

    References:
      "SpecPrune-VLA: Accelerating Vision-Language-Action Models via Action-Aware Self-Speculative Pruning",
      Eq. 2-11, Algorithm 1, Appendix A.6.2.
    """
    released = variant == "as_released"
    tau = (0.986 if released else 0.95) if threshold is None else threshold
    v_t = (0.4 if released else 0.5) if slow is None else slow
    layers, translation, rotation = tuple(layers), tuple(translation), tuple(rotation)
    _check(alpha, layers, drop, smoothing, slope, tau, v_t, still, executed, translation, rotation, variant)
    cut = Cut(2, keep)
    later = []
    for i, layer in enumerate(layers):
        left = keep * (1 - drop) ** (i + 1)
        left = keep if keep == 1 else left if keep < 1 else max(2, round(left))
        later.append(Later(layer, left, (Capture(None, "to_text"), Capture(None, "each", over="all"))))
    plan = Plan(
        cut,
        capture=(
            Capture(0, "to_text"),
            Capture(1, "to_text"),
            Capture(0, "each", over="all"),
            Capture(1, "each", over="all"),
        ),
        later=tuple(later),
        remember=() if released else (Capture(14, "to_text"), Capture(31, "to_text")),
        depth=32,
    )
    remembered = max(1, round(11 / executed))  # T is at most 11 frames

    def init(e: Evidence) -> SpecState:
        n, p = e.patches.shape
        return SpecState(
            jnp.zeros((remembered, n, p), jnp.uint8),
            jnp.zeros((), jnp.int32),
            jnp.zeros((), bool),
            jnp.zeros(n, jnp.float32),
        )

    def step(state: SpecState, e: Evidence) -> tuple[SpecState, Selection]:
        known = e.since_full != NO_HISTORY
        filled = jnp.where(known, state.filled, 0)
        speed, fine = controller(e.actions[:executed], known & state.fine, v_t, still, translation, rotation)
        fine = known & fine
        # T = floor(7 - v) + 4 frames back (Section 4.1.2), as far as there are any
        back = jnp.round((jnp.floor(7.0 - speed) + 4.0) / executed).astype(jnp.int32)
        back = jnp.clip(back, 1, jnp.maximum(filled, 1))
        similarity = jnp.where(filled > 0, patch_similarity(e.patches, state.frames[back - 1]), 1.0)

        first, second = e.saliency[:2]
        size = jnp.where(fine, jnp.asarray([GLOBAL, DYNAMIC[1], LOCAL[1]]), jnp.asarray([GLOBAL, DYNAMIC[0], LOCAL[0]]))
        k, n = budget(keep, e.alive.shape[0]), e.alive.shape[0]
        scale = k / n / (size[0] + size[1] + 2 * size[2]) if alpha is None else alpha / 256
        counts = jnp.round(scale * size[:, None] * camera_count(e.alive, e.camera)[None, :])
        among = lambda score, candidate, count: candidate & (rank_in_camera(score, candidate, e.camera) < count)
        kept = among(-similarity, e.alive & (similarity < tau), counts[1])
        kept |= among(first, e.alive, counts[2]) | among(second, e.alive, counts[2])
        if e.past:
            kept |= known & among((e.past[0] + e.past[1]) / 2, e.alive, counts[0])
        score = kept + (first + second) / 2  # attention is below 1
        index, alive = top_k(score, e.alive, keep)

        keyframe = ~known | ~finite(e.visual, *e.saliency, *e.past, e.actions)
        frames = jnp.concatenate([e.patches[None], state.frames[:-1]])
        frames = jnp.where(known, frames, jnp.where(jnp.arange(remembered)[:, None, None] == 0, e.patches, 0))
        importance = jnp.zeros_like(state.importance)
        for l in range(2):
            importance = updated(importance, e.saliency[l], e.saliency[2 + l], e, smoothing, slope)
        importance = jnp.where(jnp.isfinite(importance), importance, 0.0)
        state = SpecState(frames, jnp.minimum(filled + 1, remembered), fine, importance)
        return state, Selection(index, alive, keyframe, score, jnp.array(jnp.nan))

    def decide(state: SpecState, e: Evidence, i: int) -> tuple[SpecState, Selection]:
        importance, half = state.importance, len(e.saliency) // 2
        for l in range(half):
            importance = updated(importance, e.saliency[l], e.saliency[half + l], e, smoothing, slope)
        n, left = e.alive.shape[0], later[i].keep
        count = table(lambda m: budget(left, m), n)[e.alive.sum()]
        index, alive = best(importance, e.running, budget(left, n), count)
        nan = jnp.array(jnp.nan)
        return state.replace(importance=importance), Selection(index, alive, jnp.array(False), importance, nan)

    return Pruner("specprune", plan, init, step, decide)


def controller(actions, fine, slow, still, translation, rotation) -> tuple[Array, Array]:
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


def updated(importance: Array, attention: Array, text: Array, e: Evidence, beta: float, slope: float) -> Array:
    """S^l = (1-β) S^{l-1} + β ω_rank ω_conf of one layer (Eq. 5-9).

    Args:
      importance: [n] S^{l-1}.
      attention: [n] of visual tokens to the prompt (Eq. 2).
      text: [T, n] attention of prompt rows to visual tokens, for the entropy (Eq. 7).
      e: who is alive and who still runs.
      beta, slope: β and k.
    """
    rank = rank_in_camera(attention, e.running, jnp.zeros_like(e.camera))  # over all cameras
    weight = jnp.where(e.running, jax.nn.sigmoid(-slope * rank.astype(jnp.float32)), 0.0)
    weight = weight / jnp.maximum(weight.sum(), 1e-30)
    entropy = -jnp.where(text > 0, text * jnp.log(jnp.where(text > 0, text, 1.0)), 0.0).sum(-1)
    entropy = jnp.where(e.text_alive, entropy, 0.0).sum() / jnp.maximum(e.text_alive.sum(), 1)
    return (1 - beta) * importance + beta * weight / (entropy + 1e-6)


def _check(alpha, layers, drop, smoothing, slope, tau, slow, still, executed, translation, rotation, variant):
    def require(ok: bool, name: str, expected: str, got) -> None:
        if not ok:
            raise ValueError(f"{name}: expected {expected}, got {got!r}")

    places = lambda p: len(p) == 3 and all(isinstance(i, int) and i >= 0 for i in p)
    require(alpha is None or alpha > 0, "alpha", "α > 0 or None", alpha)
    ascending = all(a < b for a, b in zip((2, *layers), layers, strict=False))
    require(len(layers) > 0 and ascending and layers[-1] < 32, "layers", "ascending layers of 3 to 31", layers)
    require(0 <= drop < 1, "drop", "a share in [0, 1)", drop)
    require(0 <= smoothing <= 1, "smoothing", "β in [0, 1]", smoothing)
    require(slope > 0, "slope", "k > 0", slope)
    require(-1 <= tau <= 1, "threshold", "τ in [-1, 1]", tau)
    require(slow >= 0, "slow", "a speed >= 0", slow)
    require(still >= 0, "still", "a speed >= 0", still)
    require(isinstance(executed, int) and executed >= 1, "executed", "a whole number of actions >= 1", executed)
    require(places(translation), "translation", "three places in an action", translation)
    require(places(rotation), "rotation", "three places in an action", rotation)
    require(variant in ("as_described", "as_released"), "variant", '"as_described" or "as_released"', variant)
