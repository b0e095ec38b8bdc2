"""Guidance of the flow towards an old chunk of actions: the device's half of real-time chunking.

Every denoise step estimates the finished chunk, and the flow is pulled towards the old one by the gradient of the
weighted difference, through the expert (pseudo-inverse guidance). `policy.overlap` makes the target and its weights.

Source: Black, Galliker, Levine 2025, Real-Time Execution of Action Chunking Flow Policies (arXiv 2506.07339), Eqs. 2–4;
its time τ is 1 - t here, as in openpi t = 1 is noise.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from safe_pruner_jax.arrays import Array

MAX_GUIDANCE = 5.0


"""β: the guidance is clipped here, where its weight grows without bound (the paper's value, for few denoise steps)."""


@struct.dataclass
class Guide:
    """What a batch of chunks shall agree with.

    Args:
      target: [B, A, action_dim] float32, normalised; step 0 is the first step of the new chunk.
      weight: [B, A] float32 in [0, 1]; 0 leaves a step to the flow.
      limit: [B] float32, β.
    """

    target: Array
    weight: Array
    limit: Array


def strength(t: Array, limit: Array) -> Array:
    """Factor of the correction at flow time t (1 is noise): min(β, (1-τ) / (τ r²)), r² = (1-τ)² / (τ² + (1-τ)²)."""
    return jnp.minimum(limit, (jnp.square(t) + jnp.square(1 - t)) / (t * (1 - t)))


def guided(velocity: Callable[[Array], tuple[Array, Any]], x: Array, t: Array, guide: Guide) -> tuple[Array, Any]:
    """The velocity at x, pulled towards the guide's target (Eq. 2).

    Args:
      velocity: x [B, A, action_dim] → (v of the same shape, anything); v points from data to noise.
      x: where the flow is.
      t: flow time, a scalar in (0, 1].
      guide: of the batch.

    Returns:
      v as corrected, and the other result of `velocity`.
    """

    def finished(x: Array) -> tuple[Array, tuple[Array, Any]]:
        v, more = velocity(x)
        return x - t * v, (v, more)

    estimate, pull, (v, more) = jax.vjp(finished, x, has_aux=True)
    (correction,) = pull(guide.weight[..., None] * (guide.target - estimate))
    return v - strength(t, guide.limit)[:, None, None] * correction, more
