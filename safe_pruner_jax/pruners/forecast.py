"""Carrying saliency from the last keyframe to now (SAFE-Pruner, Algorithm 2), and noticing when it fails.

All functions are for one robot and in float32. Z are the visual tokens as they enter the language model.
"""

import jax
import jax.numpy as jnp

from safe_pruner_jax.arrays import Array


def unit(z: Array) -> Array:
    """Z̃: rows of z [n, d] in float32 with L2 norm 1; a zero row stays zero."""
    z = z.astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(z * z, axis=-1, keepdims=True))
    return z / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)  # the least root of a square is far above it


def correspondence(z: Array, reference: Array, alive: Array, camera: Array | None = None) -> Array:
    """π(v) = argmax_u Z̃_t[v] · Z̃_τ[u] over the alive reference tokens u (Algorithm 2, line 3).

    Args:
      z: [n, d] unit rows of the current frame.
      reference: [n, d] unit rows of the keyframe.
      alive: [n] bool, alive reference tokens.
      camera: [n] int32; when given, only tokens of the same camera are candidates.

    Returns:
      [n] int32; of equal similarities the lowest index. Without any candidate: 0.
    """
    return nearest(z, reference, alive, camera)[0]


def nearest(z: Array, reference: Array, alive: Array, camera: Array | None = None) -> tuple[Array, Array]:
    """`correspondence`, and how similar [n] float32: -inf without a candidate, NaN where z or a candidate holds one."""
    similarity = _similarity(z, reference, alive, camera)
    return jnp.argmax(similarity, axis=-1).astype(jnp.int32), similarity.max(-1)


def soft_correspondence(
    z: Array, reference: Array, alive: Array, camera: Array | None = None, *, temperature: float
) -> tuple[Array, Array]:
    """Every token's partners, weighed (ours): P[v, u] = softmax_u(Z̃_t[v] · Z̃_τ[u] / T) over the alive reference tokens.

    Args:
      z, reference, alive, camera: as in `correspondence`.
      temperature: T > 0, in units of cosine similarity; towards 0 it is `correspondence`.

    Returns:
      [n, n] float32, rows that sum to 1, or to 0 without a candidate; and the greatest similarity as in `nearest`.
    """
    similarity = _similarity(z, reference, alive, camera)
    most = similarity.max(-1)
    weights = jnp.exp((similarity - jnp.where(jnp.isneginf(most), 0.0, most)[:, None]) / temperature)
    return weights / jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny), most


def partners(
    z: Array, reference: Array, alive: Array, camera: Array | None = None, temperature: float = 0.0
) -> tuple[Array, Array]:
    """`nearest` at temperature 0, else `soft_correspondence`: what `forecast` takes, and the greatest similarity."""
    if temperature == 0:
        return nearest(z, reference, alive, camera)
    return soft_correspondence(z, reference, alive, camera, temperature=temperature)


def _similarity(z: Array, reference: Array, alive: Array, camera: Array | None) -> Array:
    """[n, n] cosine of each token with each reference token; -inf for one that is no candidate."""
    similarity = jnp.matmul(z, reference.T, precision=jax.lax.Precision.HIGHEST)
    candidate = jnp.broadcast_to(alive[None, :], similarity.shape)
    if camera is not None:
        candidate &= camera[:, None] == camera[None, :]
    return jnp.where(candidate, similarity, -jnp.inf)


def forecast(s: Array, match: Array, alive: Array) -> Array:
    """Ŝ[v] = S_τ[π(v)] (Algorithm 2, line 4), or Σ_u P[v, u] S_τ[u]: s [..., n] → [..., n]; dead tokens 0.

    Args:
      s: [..., n] saliency of the keyframe.
      match: [n] int32, π of `correspondence`; or [n, n] float32, P of `soft_correspondence`.
      alive: [n] bool.
    """
    if match.ndim == 1:
        carried = jnp.take(s, match, axis=-1, mode="clip")
    else:
        carried = jnp.matmul(s, match.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(alive, carried, 0.0)


def kappa(s: Array, forecast_s: Array) -> Array:
    """κ = cos(S_t, Ŝ_t) (Eq. 6): two [n] vectors, dead entries 0 → scalar; NaN if one of them is all zero."""
    return jnp.sum(s * forecast_s) / (jnp.sqrt(jnp.sum(s * s)) * jnp.sqrt(jnp.sum(forecast_s * forecast_s)))


def likeness(z: Array, reference: Array, weight: Array, alive: Array) -> Array:
    """κ where no layer runs before the decision (ours): Σ_u w[u] max_v Z̃_τ[u] · Z̃_t[v] / Σ_u w[u], alive tokens only.

    How much of what late layers looked at in the keyframe still has its like in the current frame.

    Args:
      z: [n, d] unit rows of the current frame.
      reference: [n, d] unit rows of the keyframe.
      weight: [n] late saliency of the keyframe's tokens.
      alive: [n] bool, of both frames.

    Returns:
      Scalar in [-1, 1]; NaN if the weights are all zero.
    """
    similar = jnp.where(alive, nearest(reference, z, alive)[1], 0.0)
    weight = jnp.where(alive, weight, 0.0)
    return jnp.sum(weight * similar) / jnp.sum(weight)


def fuse(s: Array, late: Array, weight: float) -> Array:
    """s = (1-λ) S^ℓs + λ mean over L_d of Ŝ^ℓ (Eq. 4-5): s [n], late [|L_d|, n], weight λ → [n]."""
    if weight == 0:  # the paper's "without forecast": late may not even be known
        return s
    return (1.0 - weight) * s + weight * late.mean(0)
