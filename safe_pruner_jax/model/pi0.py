"""π0 and π0.5: prefix (images and prompt), action expert, flow-matching sampler.

    weights = prepare(params, config)                     once per checkpoint: split, fuse, precompute
    rows = embed_prefix(weights, config, ...)             visual tokens and prompt, masks and positions
    x, segments, logits = prefix_layers(..., rows, ...)   keys and values of every layer
    actions, late = sample(..., Prefix(segments, alive))  10 Euler steps of the expert over those keys

The expert reads the prefix's keys and values layer by layer, so the prefix may have another length in every
layer: that is all pruning needs. Time enters through a `Schedule` that depends on the flow times and the
weights only; it is computed once when weights are prepared.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from safe_pruner_jax.arrays import Array, Layers
from safe_pruner_jax.model import gemma, kernels, siglip
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.model.expert import (
    Prefix,
    by_kernels,
    euler,
    expert_layers,
    inside_of,
    padded,
    suffix_mask,
    suffix_tokens,
    velocity,
)
from safe_pruner_jax.model.guidance import Guide, guided
from safe_pruner_jax.model.weights import Schedule, Weights, euler_times, prepare, schedule, time_embedding
from safe_pruner_jax.tokens import saliency, spread

__all__ = [  # of `weights` and `expert`
    "Prefix",
    "Schedule",
    "Weights",
    "euler_times",
    "expert_layers",
    "prepare",
    "schedule",
    "suffix_mask",
    "suffix_tokens",
    "time_embedding",
    "velocity",
]


# --- prefix -------------------------------------------------------------------------------------------------


@struct.dataclass
class Rows:
    """Rows of the prefix that run through its layers: visual tokens, then the prompt.

    Args:
      x: [B, P, d] hidden rows, activation dtype.
      positions: [B, P] int32 RoPE positions; they need not be contiguous.
      mask: [B, P] bool, alive rows.
    """

    x: Array
    positions: Array
    mask: Array

    @property
    def count(self) -> Array:
        """[B] int32 alive rows."""
        return self.mask.sum(1, dtype=jnp.int32)


def embed_prefix(
    weights: Weights, config: Pi0Config, images: Array, camera_mask: Array, tokens: Array, token_mask: Array
) -> Rows:
    """The rows that enter the first layer: visual tokens camera by camera, then the prompt.

    Args:
      weights, config: the model.
      images: [B, C, S, S, 3] uint8, or float32 in [-1, 1] after augmentation.
      camera_mask: [B, C] bool; a camera's tokens are alive together.
      tokens: [B, T] int32.
      token_mask: [B, T] bool.
    """
    x = jnp.concatenate([embed_images(weights, config, images), embed_prompt(weights, config, tokens)], axis=1)
    mask = jnp.concatenate([jnp.repeat(camera_mask, config.tokens_per_camera, axis=1), token_mask], axis=1)
    return Rows(x, positions(mask), mask)


def embed_images(weights: Weights, config: Pi0Config, images: Array) -> Array:
    """Visual tokens Z [B, n, d] of images [B, C, S, S, 3] uint8, camera by camera, activation dtype."""
    B, C = images.shape[:2]
    z = siglip.encode(weights.vision, config, images.reshape(B * C, *images.shape[2:]))
    return z.reshape(B, C * z.shape[1], z.shape[2])


def embed_prompt(weights: Weights, config: Pi0Config, tokens: Array) -> Array:
    """Prompt tokens [B, T] int32 → [B, T, d]: table row times √d, both in the table's dtype."""
    table = weights.embedding
    scale = jnp.asarray(np.sqrt(config.prefix.width), table.dtype)
    return (table[tokens] * scale).astype(config.dtype)


def positions(mask: Array) -> Array:
    """Position of every slot: running count of alive slots minus one; mask [B, P] bool → [B, P] int32."""
    return jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1


@struct.dataclass
class Reuse:
    """Keys and values of the step before, for visual slots that are not computed again.

    Args:
      kv: {layer: (k, v)}, each [B, n, K, H].
      slots: [B, k] int32, slot of each of the first k rows; n where a row counts for nothing.
      mask: [B, n + T] bool alive slots.
    """

    kv: dict[int, tuple[Array, Array]]
    slots: Array
    mask: Array


def _among(reuse: Reuse, kept: tuple[Array, Array], k: Array, v: Array) -> tuple[Array, Array]:
    """New keys and values [B, k+T, K, H] in their slots among the kept ones: [B, n+T, K, H]."""
    count = reuse.slots.shape[1]
    put = jax.vmap(lambda old, slots, new: old.at[slots].set(new, mode="drop"))
    place = lambda old, new: jnp.concatenate([put(old, reuse.slots, new[:, :count]), new[:, count:]], axis=1)
    return place(kept[0], k), place(kept[1], v)


def prefix_layers(
    weights: Weights,
    config: Pi0Config,
    rows: Rows,
    layers: range,
    logits_of: Layers = (),
    reuse: Reuse | None = None,
) -> tuple[Array, tuple[gemma.Segment, ...], dict[int, Array]]:
    """Runs a range of prefix layers; of the model's last layer only keys and values are computed.

    Args:
      weights, config: the model.
      rows: entering the first layer of the range.
      layers: contiguous layer indices.
      logits_of: layers whose attention logits are returned.
      reuse: keys and values for the slots that are not among these rows; None: the rows are all there is.

    Returns:
      x after the range, one `Segment` per layer with mask [B, 1, keys], and {layer: logits [B, N, P, keys]}; keys are
      the P rows, or with `reuse` all slots.
    """
    c, x, mask = config.prefix, rows.x, rows.mask
    rotation = gemma.rope(rows.positions, c.head_dim)
    keys = mask if reuse is None else reuse.mask
    visible = mask[:, :, None] & keys[:, None, :]
    segments, kept = [], {}
    for i in layers:
        place = None if reuse is None else partial(_among, reuse, reuse.kv[i])
        if i == config.depth - 1:
            k, v = gemma.keys_and_values(c, weights.prefix[i], x, rotation)
            k, v = place(k, v) if place else (k, v)
        else:
            x, (k, v), logits = gemma.layer(c, weights.prefix[i], x, rotation, visible, place=place)
            if i in logits_of:
                kept[i] = logits
        segments.append(gemma.Segment(k, v, keys[:, None, :]))
    return x, tuple(segments), kept


# --- sampler ----------------------------------------------------------------------------------------------


def action_saliency(config: Pi0Config, logits: Array, visual_alive: Array, over: str = "visual") -> Array:
    """S^ℓ [B, n] float32 with action tokens as queries (Eq. 1): logits [B, N, R, P+R], visual_alive [B, n]."""
    rows = jnp.ones(config.action_horizon, bool)
    mean = lambda x, a: saliency(x[..., -config.action_horizon :, :], rows, a, over=over)
    return jax.vmap(mean)(logits, visual_alive)


def _late(
    config: Pi0Config, logits: Array, visual_alive: Array, columns: tuple[Array, Array] | None, over: str
) -> Array:
    """`action_saliency` in slots, [B, n]."""
    if columns is None:
        return action_saliency(config, logits, visual_alive, over)
    s = action_saliency(config, logits, columns[1], over)
    return jax.vmap(partial(spread, n=visual_alive.shape[1]))(s, *columns)


def sample(
    weights: Weights,
    config: Pi0Config,
    prefix: Prefix,
    state: Array,
    noise: Array,
    *,
    visual_alive: Array | None = None,
    columns: Mapping[int, tuple[Array, Array]] | None = None,
    late_layers: Layers = (),
    late_steps: str = "half",
    late_over: str = "visual",
    guide: Guide | None = None,
) -> tuple[Array, Array | None]:
    """Euler integration of the flow from noise (t=1) to actions (t=0).

    Args:
      weights, config: the model; the schedule in `weights` fixes the number of steps.
      prefix: one segment per layer.
      state: [B, action_dim] float32 (only π0 reads it).
      noise: [B, A, action_dim] float32.
      visual_alive: [B, n] bool, needed with `late_layers`.
      columns: {late layer: (slots, alive) [B, k] of its first k keys}, for layers that have dropped tokens.
      late_layers: layers L_d whose saliency is wanted, action tokens as queries.
      late_steps: which denoise steps are averaged: "half" (the second half), "all", "last".
      late_over: keys that it is normalised over, as in `tokens.saliency`.
      guide: chunks that the new ones shall agree with (`rtc`).

    Returns:
      actions [B, A, action_dim] float32, and late saliency [B, |L_d|, n] float32 (None without layers).
    """
    s = weights.schedule.times.shape[0]
    first = {"half": s // 2, "all": 0, "last": s - 1}[late_steps]
    share = jnp.asarray(np.where(np.arange(s) >= first, 1.0 / (s - first), 0.0), jnp.float32)
    late = jnp.zeros((noise.shape[0], len(late_layers), visual_alive.shape[1])) if late_layers else None
    use = config.kernels if guide is None else ()  # a guided step is differentiated
    rows = kernels.ROWS if by_kernels(weights, config, weights.schedule.mods, use) else None
    inside = inside_of(config, prefix, config.savings if guide is None else (), rows)
    if kernels.ATTENTION in use:
        prefix = prefix.replace(segments=tuple(map(padded, prefix.segments)))

    def step(carry: tuple[Array, Array | None, tuple], inputs: tuple[Schedule, Array]) -> tuple[tuple, None]:
        x, late, rooms = carry
        at, share = inputs
        if isinstance(at.mods, gemma.Stacked):  # one row of the schedule, read once: XLA would slice it in every layer
            # computed and not copied: XLA leaves a loop whose copies depend on its counter out of CUDA graphs
            computed = lambda a: jnp.where(at.times >= 0, a, 0.0) if "graph" in config.savings else a
            at = at.replace(mods=jax.lax.optimization_barrier(jax.tree.map(computed, at.mods)))

        how = {"logits_of": late_layers, "use": use, "inside": inside.replace(rooms=rooms)}

        def flow(x: Array) -> tuple[Array, tuple]:
            v, *more = velocity(weights, config, prefix, state, x, at, **how)
            return v, tuple(more)

        if guide is None:
            x, logits, rooms = euler(weights, config, prefix, state, x, at, dt=-1.0 / s, **how)
        else:
            v, (logits, rooms) = guided(flow, x, at.times, guide)
            x = x + (-1.0 / s) * v
        if late_layers:
            now = [_late(config, logits[i], visual_alive, (columns or {}).get(i), late_over) for i in late_layers]
            # a step without weight may not bring in its NaN either
            late = late + jnp.where(share > 0, share * jnp.stack(now, axis=1), 0.0)
        return (x, late, rooms), None

    (actions, late, _), _ = jax.lax.scan(step, (noise, late, inside.rooms), (weights.schedule, share))
    return actions, late
