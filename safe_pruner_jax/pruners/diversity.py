"""Max-min diversity: pick tokens one after the other, each as far as possible from those picked before."""

import jax
import jax.numpy as jnp

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.pruners import forecast


def max_min(z: Array, candidate: Array, k: int, *, neighbour: int = 1) -> Array:
    """Greedy max-min selection by cosine distance, as a score whose top k are the picks in order.

        first    argmax_v  distance of v to its `neighbour`-th nearest candidate
        then     argmax_v  min over picked u of 1 - cos(v, u)

    Args:
      z: [n, d] tokens, any length.
      candidate: [n] bool, who may be picked.
      k: how many picks.
      neighbour: 1 is DivPrune's first pick, 2 VLA-Pruner's (Algorithm 1, line 10).

    Returns:
      [n] float32: k for the first pick, k - 1 for the second, …, 0 for tokens that are not picked. Equal distances:
      the lower index.
    """
    n = candidate.shape[0]
    u = forecast.unit(jnp.where(candidate[:, None], z, 0))
    cosine = jnp.matmul(u, u.T, precision=jax.lax.Precision.HIGHEST)
    # symmetric to the last bit: of two mutual nearest neighbours the first is picked, and not the one rounding favours
    distance = 1.0 - jnp.maximum(cosine, cosine.T)
    others = jnp.where(candidate[None, :] & ~jnp.eye(n, dtype=bool), distance, jnp.inf)
    nearest = -jax.lax.top_k(-others, neighbour)[0][:, -1]

    def pick(i: Array, carry: tuple[Array, Array]):
        far, score = carry
        open_ = candidate & (score == 0)
        v = jnp.argmax(jnp.where(open_, far, -1.0))  # a distance is at least 0, but for rounding
        far = jnp.where(i == 0, distance[v], jnp.minimum(far, distance[v]))
        return far, jnp.where(open_ & (jnp.arange(n) == v), (k - i).astype(jnp.float32), score)

    return jax.lax.fori_loop(0, k, pick, (nearest, jnp.zeros(n, jnp.float32)))[1]
