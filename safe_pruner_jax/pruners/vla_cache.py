"""VLA-Cache: nothing is dropped; tokens that did not change keep their keys and values (Xu et al., NeurIPS 2025).

    static     pixels like those of the frame before (cosine ≥ 0.996), the most similar ones per camera
    relevant   what the prompt looked at most in a middle layer of the previous step, per camera
    reusable   static minus relevant: their rows need not be computed
    r_l        share of them that layer l reuses: 1 - normalised attention entropy of the previous step, increases from
               layer to layer damped by 0.55; applied before layers 2, 6, 9 and 11 of 32

Rows are static shapes: of the n - K rows to be saved a quarter goes at each of the four cuts. Where r_l asks for more,
the surplus rows are there but count for nothing. Where fewer tokens may be reused than rows are missing, the step runs
everything.
"""

from typing import Literal

import jax.numpy as jnp
from flax import struct

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.pruners import checks
from safe_pruner_jax.pruners.base import NO_HISTORY, Capture, Cut, Evidence, Later, Plan, Pruner, Selection, finite
from safe_pruner_jax.pruners.frames import camera_count, patch_similarity, rank_in_camera
from safe_pruner_jax.tokens import best, budget, table


@struct.dataclass
class CacheState:
    """Pixels of the last frame [n, p] uint8; priority of being computed [n] and tokens reused at each cut [4] int32."""

    patches: Array
    priority: Array
    reused: Array


def vla_cache(
    *,
    keep: float = 0.8,
    threshold: float = 0.996,
    static: float | None = None,
    relevant: float | None = None,
    growth: float = 0.55,
    layers: tuple[int, ...] = (2, 6, 9, 11),
    variant: Literal["as_described", "as_released"] = "as_described",
) -> Pruner:
    """VLA-Cache on π0.5.

    Deviations from the paper: static row counts and their keyframes, see the module's docstring; the expert reads the
    same keys and values as the prefix, the reused ones among them.

    Args:
      keep: share of the alive visual tokens computed after the last cut, in (0, 1]. The default is what the authors'
        limits leave; with a camera that moves, a much smaller share makes every step a keyframe.
      threshold: cosine of pixels above which a token is static.
      static: at most this share of a camera's tokens is static (authors' code: 150/256). None: 1 - keep/2.
      relevant: share of a camera's tokens that is relevant (authors' code: 100/256). None: keep/2, so that both
        limits together leave K tokens to compute.
      growth: factor in [0, 1] on increases of r_l.
      layers: cuts, ascending layers of a 32-layer model, scaled to the model's depth.
      variant: "as_released" reuses the reusable tokens in the order of their slots, as the authors' code does; as
        described here the most similar ones come first, of equals the least relevant.

    References:
      "VLA-Cache: Efficient Vision-Language-Action Manipulation via Adaptive Token Caching", Section 4.

    Example:
      >>> [round(cut.keep, 2) for cut in vla_cache(keep=0.8).plan.cuts]
      [0.95, 0.9, 0.85, 0.8]
    """
    layers = tuple(layers)
    static = 1 - keep / 2 if static is None else static
    relevant = keep / 2 if relevant is None else relevant
    checks.share(keep)
    checks.within(-1, 1, "threshold", "a cosine", threshold)
    for name, value in (("static", static), ("relevant", relevant)):
        checks.within(0, 1, name, "a share", value)
    checks.within(0, 1, "growth", "a factor", growth)
    checks.ascending(layers, 1, 31)
    checks.variant(variant)
    shares = tuple(1 - (i + 1) / len(layers) * (1 - keep) for i in range(len(layers)))
    first, *later = zip(layers, shares, strict=True)
    plan = Plan(
        Cut(*first),
        later=tuple(Later(*l) for l in later),
        dropped="reuse",
        remember=(Capture(15, "text", over="all"), Capture(None, "entropy")),
        depth=32,
    )

    def init(e: Evidence) -> CacheState:
        n = e.alive.shape[0]
        return CacheState(jnp.zeros(e.patches.shape, jnp.uint8), jnp.zeros(n), jnp.zeros(len(layers), jnp.int32))

    def step(state: CacheState, e: Evidence) -> tuple[CacheState, Selection]:
        history, n, count = e.since_full != NO_HISTORY, e.alive.shape[0], e.alive.sum()
        attention, entropy = e.past[0], jnp.stack(e.past[1:])
        similarity = jnp.where(history, patch_similarity(e.patches, state.patches), 0.0)
        limit, slot = camera_count(e.alive, e.camera).astype(jnp.float32), jnp.arange(n)
        ties = attention if variant == "as_described" else slot
        still = e.alive & (similarity >= threshold)
        calm = -_place(jnp.lexsort((ties, -similarity))).astype(jnp.float32)  # the last key counts most
        most = lambda share: jnp.round(share * limit).astype(jnp.int32)
        still &= rank_in_camera(calm, still, e.camera) < most(static)
        needed = rank_in_camera(attention, e.alive, e.camera) < most(relevant)
        reusable = history & still & ~needed

        rank = _place(jnp.lexsort((-calm if variant == "as_described" else slot, ~reusable)))
        priority = jnp.where(reusable, rank / n, 1.0 + attention)

        saved = jnp.stack([count - table(lambda m, s=s: budget(s, m), n)[count] for s in shares])
        depth = entropy.shape[0] + 1  # the last layer has no attention
        at = [min(c.layer, depth - 2) for c in plan.for_depth(depth).cuts]
        at += [depth - 2] * (len(layers) - len(at))
        number = reusable.sum(dtype=jnp.float32)
        reuse = (reuse_shares(entropy, growth)[jnp.asarray(at)] * number).astype(jnp.int32)
        reused = jnp.clip(reuse, saved, saved[-1])
        keyframe = ~history | (reusable.sum() < saved[-1]) | ~finite(e.visual, attention, entropy)
        priority = jnp.where(jnp.isfinite(priority), priority, 0.0)
        state = CacheState(e.patches, priority, reused)
        return state, _compute(state, e, 0, keyframe)

    def decide(state: CacheState, e: Evidence, i: int) -> tuple[CacheState, Selection]:
        return state, _compute(state, e, i + 1, jnp.array(False))

    def _compute(state: CacheState, e: Evidence, i: int, keyframe: Array) -> Selection:
        count = e.alive.sum() - state.reused[i]
        index, alive = best(state.priority, e.running, budget(shares[i], e.alive.shape[0]), count)
        return Selection(index, alive, keyframe, state.priority, jnp.array(jnp.nan))

    return Pruner("vla_cache", plan, init, step, decide)


def reuse_shares(entropy: Array, growth: float) -> Array:
    """r_l of every layer from the attention entropies [L-1] of the previous step: [L-1] float32 in [0, 1]."""
    low, high = entropy.min(), entropy.max()
    share = 1.0 - (entropy - low) / (high - low + 1e-10)
    out = [share[0]]
    for l in range(1, share.shape[0]):
        delta = share[l] - out[-1]
        out.append(out[-1] + jnp.where(delta > 0, growth * delta, delta))
    return jnp.stack(out)


def _place(order: Array) -> Array:
    """The place [n] int32 of every token in an order [n] of tokens."""
    return jnp.zeros(order.shape, jnp.int32).at[order].set(jnp.arange(order.shape[0], dtype=jnp.int32))
