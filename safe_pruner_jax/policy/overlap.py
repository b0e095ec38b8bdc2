"""Real-time chunking: the next action chunk continues the one that the robot executes while it is computed.

    step of the old chunk   0 … n-1        n … n+d-1              n+d … A-1
    step of the new chunk                  0 … d-1                d … A-n-1              A-n … A-1
                            executed       executed meanwhile     overlap                beyond the old chunk
    weight                                 1                      falls to 0             0

Every denoise step estimates the finished chunk, and the flow is pulled towards the old one by the gradient of the
weighted difference, through the expert (pseudo-inverse guidance). Nothing is trained, and the prefix is not touched, so
it is the same with every pruner.

Source: Black, Galliker, Levine 2025, Real-Time Execution of Action Chunking Flow Policies (arXiv 2506.07339), Eqs. 2–5;
its time τ is 1 - t here, as in openpi t = 1 is noise. Departure: n, the number of steps between the two observations,
is also the paper's execution horizon s, since what is left of the old chunk is A - n actions whatever comes later.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from safe_pruner_jax.arrays import Array

MAX_GUIDANCE = 5.0
"""β: the guidance is clipped here, where its weight grows without bound (the paper's value, for few denoise steps)."""

SMALLEST_SCALE = 1e-5
"""Robot units per normalised unit below which a value of an action is a constant."""


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


@dataclass(frozen=True)
class Overlap:
    """How a new chunk lies on the old one.

    Args:
      executed: control steps between the observation of the old chunk and that of the new one, n.
      delay: further steps that will have been executed when the new chunk arrives, d.

    Raises:
      ValueError: other than whole numbers of at least 0.
    """

    executed: int
    delay: int

    def __post_init__(self):
        for name in ("executed", "delay"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
                raise ValueError(f"{name}: expected a whole number of control steps, at least 0, got {value!r:.50}")

    def left(self, horizon: int) -> int:
        """Steps of the old chunk that the new one covers."""
        return max(horizon - int(self.executed), 0)

    def frozen(self, horizon: int) -> int:
        """Steps of the new chunk that are executed from the old one."""
        return min(int(self.delay), self.left(horizon))


def soft_mask(horizon: int, overlap: Overlap) -> np.ndarray:
    """Weights [horizon] float32 of Eq. 5: 1 while frozen, falling exponentially over the overlap, 0 beyond.

    >>> [round(float(w), 3) for w in soft_mask(6, Overlap(executed=2, delay=1))]
    [1.0, 0.488, 0.189, 0.041, 0.0, 0.0]
    """
    left, frozen = overlap.left(horizon), overlap.frozen(horizon)
    steps = np.arange(horizon)
    share = np.clip((left - steps) / (left - frozen + 1), 0.0, 1.0)
    weight = share * np.expm1(share) / (np.e - 1)
    return np.where(steps < frozen, 1.0, weight).astype(np.float32)


def remaining(chunk: np.ndarray, overlap: Overlap) -> np.ndarray:
    """The old chunk [A, D] as seen from the new one's first step; zeros where it has ended."""
    out = np.zeros_like(chunk)
    left = overlap.left(len(chunk))
    out[:left] = chunk[len(chunk) - left :]
    return out


def rebase(chunk: np.ndarray, sent: np.ndarray, finish: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """A chunk as the network would give it at another observation, for the same motion of the robot.

    Actions may be relative to the observed state, so the same normalised numbers mean another motion one observation
    later. `finish` must be affine in every value, as all of openpi's output transforms are.

    Args:
      chunk: [A, action_dim] float32, normalised, at the old observation.
      sent: [A, W] what the robot was told for it, W ≤ action_dim; value by value.
      finish: normalised [A, action_dim] → what the robot is told [A, W], at the new observation.

    Returns:
      [A, action_dim] float32; values that the robot is not told, and constants, stay as they are.
    """
    zero = finish(np.zeros_like(chunk))
    scale = finish(np.ones_like(chunk)) - zero
    known = np.abs(scale) > SMALLEST_SCALE
    width = sent.shape[1]
    out = chunk.copy()
    out[:, :width] = np.where(known, (sent - zero) / np.where(known, scale, 1.0), chunk[:, :width])
    return out


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
