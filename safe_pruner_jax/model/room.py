"""Keys and values of prefix and chunk in one array per layer, so that no denoise step concatenates them.

    rooms = [make(segment, own) for segment in prefix.segments]     once per chunk
    k, v, room = rooms[i].put(k, v)                                 in every layer and step: the chunk's own, in place

A room holds the prefix's keys, behind them places for the chunk's own, and behind these nothing, up to a number of
keys that products need not pad. One mask says, for all steps, who sees what. The rooms travel through the denoise
loop, which lets XLA write into them instead of copying them.
"""

import jax
import jax.numpy as jnp
from flax import struct

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.model.gemma import Segment

KEYS = 32
"""A room holds a multiple of this many keys."""


@struct.dataclass
class Room:
    """One layer's keys and values.

    Args:
      kv: [2, B, Y, K, H], keys and values.
      mask: [B, R, Y] bool, which of them each of the chunk's rows sees.
      start: where the chunk's own begin.
    """

    kv: Array
    mask: Array
    start: int = struct.field(pytree_node=False)

    def put(self, k: Array, v: Array) -> tuple[Array, Array, "Room"]:
        """All keys and all values [B, Y, K, H] with the chunk's own [B, R, K, H] in their places, and the new room."""
        chunk = jnp.stack([k, v])
        kv = jax.lax.dynamic_update_slice(self.kv, chunk, (0, 0, self.start, 0, 0))
        return kv[0], kv[1], self.replace(kv=kv)


def make(segment: Segment, own: Array) -> Room:
    """The room of a layer.

    Args:
      segment: the prefix's keys and values, mask [B, 1, S].
      own: [1, R, R] bool, which of its own rows a row sees.
    """
    B, S = segment.k.shape[:2]
    R = own.shape[1]
    behind = -(S + R) % KEYS
    pad = lambda a: jnp.pad(a, ((0, 0), (0, R + behind), (0, 0), (0, 0)))
    seen = jnp.broadcast_to(segment.mask, (B, R, S)), jnp.broadcast_to(own, (B, R, R))
    mask = jnp.concatenate([*seen, jnp.zeros((B, R, behind), bool)], axis=-1)
    return Room(jnp.stack([pad(segment.k), pad(segment.v)]), mask, S)
