"""Attention logits of the prefix become the arrays a plan asks for, always in slots.

A `Rows` says who runs in a range of layers; `read` turns the logits of one of its layers into one `Capture`, with 0
for visual tokens that do not run.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.model import pi0
from safe_pruner_jax.pruners.base import Capture
from safe_pruner_jax.tokens import gather, saliency, spread, visual_attention


@struct.dataclass
class Rows(pi0.Rows):
    """Prefix rows that run, k visual rows and then the prompt, and where they come from.

    Args:
      slots: [B, k] int32, the visual slot of each of the first k rows.
    """

    slots: Array

    @property
    def alive(self) -> Array:
        """[B, k] bool, visual rows that count."""
        return self.mask[:, : self.slots.shape[1]]

    def in_slots(self, x: Array, n: int) -> Array:
        """x [B, k, ...] of the visual rows → [B, n, ...], 0 where nobody runs."""
        if self.slots.shape[1] == n:  # slots ascend, so that these are all of them, each in its place
            return jnp.where(self.alive.reshape(*self.alive.shape, *[1] * (x.ndim - 2)), x, jnp.zeros((), x.dtype))
        return jax.vmap(partial(spread, n=n))(x, self.slots, self.alive)

    def select(self, index: Array, alive: Array, rows: Array | None, n: int) -> "Rows":
        """The visual slots `index` [B, k'] and the whole prompt; `rows` [B, k', d] replace what the slots held."""
        k = self.slots.shape[1]
        where = self.in_slots(jnp.broadcast_to(jnp.arange(k), self.slots.shape), n)  # slot → row
        row = gather(where, index)
        visual = gather(self.x, row) if rows is None else rows.astype(self.x.dtype)
        runs = gather(self.in_slots(self.alive, n), index)
        keep = lambda a, v: jnp.concatenate([v, a[:, k:]], axis=1)
        return Rows(
            x=keep(self.x, visual),
            positions=keep(self.positions, gather(self.positions, row)),
            mask=keep(self.mask, alive & runs),
            slots=index,
        )


def read(c: Capture, logits: Array, rows: Rows, n: int, keys: Array) -> Array:
    """One capture of one layer.

    Args:
      c: what is wanted; not "action", which is no row of the prefix.
      logits: [B, N, k+T, keys] float32 of the layer. The first keys are the k visual rows, or all n slots where
        tokens are reused; the last T are the prompt.
      rows: who runs.
      n: visual slots.
      keys: [B, visual keys] bool, alive ones.

    Returns:
      float32 with leading axis B, shape as in `Capture`.
    """
    k, T = rows.slots.shape[1], rows.x.shape[1] - rows.slots.shape[1]
    text = rows.mask[:, k:]
    if c.rows == "entropy":
        p = jax.nn.softmax(logits, axis=-1).mean(1)
        entropy = -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0).sum(-1)
        return _mean(entropy, rows.mask)
    if c.rows == "text_entropy":
        p = jax.vmap(partial(visual_attention, over=c.over))(logits[:, :, k:], keys)
        p = p * keys[:, None, :].astype(p.dtype)
        entropy = -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0).sum(-1)
        return _mean(entropy, text)
    if c.rows == "heads_to_text":
        p = _mean(jax.nn.softmax(logits[:, :, :k], axis=-1)[..., -T:], text)
        p = jnp.where(rows.alive[:, None, :], p, 0.0)
        return rows.in_slots(p.swapaxes(1, 2), n).swapaxes(1, 2)
    if c.rows == "to_text":
        p = _mean(jax.nn.softmax(logits[:, :, :k], axis=-1)[..., -T:].mean(1), text)
        return rows.in_slots(jnp.where(rows.alive, p, 0.0), n)
    source, weight = logits[:, :, k:], text
    if c.rows == "last":
        weight = jnp.arange(T)[None] == text.sum(1, keepdims=True) - 1
    elif c.rows == "all":
        source, weight = logits, rows.mask
    if c.rows == "each":
        p = jax.vmap(partial(visual_attention, over=c.over))(source, keys)
        s = jnp.where(text[:, :, None] & keys[:, None, :], p, 0.0).swapaxes(1, 2)
    else:
        s = jax.vmap(partial(saliency, over=c.over))(source, weight, keys)
    s = s if keys.shape[1] == n else rows.in_slots(s, n)
    return s.swapaxes(1, 2) if c.rows == "each" else s


def _mean(x: Array, mask: Array) -> Array:
    """Mean over the last axis of x [B, ..., T] where mask [B, T]; 0 where nothing is."""
    weight = mask.reshape(len(mask), *[1] * (x.ndim - 2), -1).astype(x.dtype)
    return (x * weight).sum(-1) / jnp.maximum(weight.sum(-1), 1)


def everybody(rows: pi0.Rows, n: int) -> Rows:
    """All n visual slots and the prompt."""
    slots = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (rows.x.shape[0], n))
    return Rows(rows.x, rows.positions, rows.mask, slots)


def patches(images: Array, patch: int) -> Array:
    """Pixels of every visual token: images [B, C, S, S, 3] → [B, n, 3·patch²] uint8, row by row over each camera."""
    B, C, S = images.shape[:3]
    g = S // patch
    cells = images.reshape(B, C, g, patch, g, patch, 3).swapaxes(3, 4)
    return cells.reshape(B, C * g * g, 3 * patch * patch)


def captured_shape(c: Capture, n: int, T: int, heads: int) -> tuple[int, ...]:
    """Shape of a capture for one robot."""
    return {"each": (T, n), "heads_to_text": (heads, n), "entropy": (), "text_entropy": ()}.get(c.rows, (n,))
