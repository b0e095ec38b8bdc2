"""Comparing the pixels of a token with those it had in an earlier frame, and ranking tokens within their camera."""

import jax.numpy as jnp

from safe_pruner_jax.arrays import Array


def patch_similarity(patches: Array, earlier: Array) -> Array:
    """Cosine of the pixels of each token now and then: uint8 [n, p] twice → [n] float32 in [0, 1].

    A token that was black and still is has 1, one that became or was black 0.
    """
    a, b = patches.astype(jnp.float32), earlier.astype(jnp.float32)
    dot, norm = (a * b).sum(-1), jnp.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    both_black = (a.max(-1) == 0) & (b.max(-1) == 0)
    return jnp.where(norm > 0, dot / jnp.where(norm > 0, norm, 1.0), both_black.astype(jnp.float32))


def rank_in_camera(score: Array, candidate: Array, camera: Array) -> Array:
    """How many candidates of the same camera are better: [n] int32, n for who is no candidate.

    Args:
      score: [n] float32, higher is better; of equal scores the lower index is better.
      candidate: [n] bool.
      camera: [n] int32.
    """
    n = score.shape[0]
    before = jnp.arange(n)[None, :] < jnp.arange(n)[:, None]
    better = (score[None, :] > score[:, None]) | ((score[None, :] == score[:, None]) & before)
    ahead = (better & candidate[None, :] & (camera[None, :] == camera[:, None])).sum(1, dtype=jnp.int32)
    return jnp.where(candidate, ahead, n)


def camera_count(alive: Array, camera: Array) -> Array:
    """[n] int32, alive tokens of each token's camera."""
    return (alive[None, :] & (camera[None, :] == camera[:, None])).sum(1, dtype=jnp.int32)
