"""The action expert: suffix rows over the keys and values of a prefix, and the velocity of the flow.

tokens = suffix_tokens(...)                        action rows, π0's state row before them
h, logits, rooms = expert_layers(...)              layer by layer, over keys that may differ from layer to layer
v, logits, rooms = velocity(...)                   both, and the projection to actions
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from safe_pruner_jax.arrays import Array, Layers, beside
from safe_pruner_jax.model import action_kernels, expert_kernels, gemma, kernels, room, siglip
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.model.weights import Schedule, Weights


@struct.dataclass
class Prefix:
    """What the expert reads of an observation.

    Args:
      segments: keys and values of layers 0, 1, …; they may have another length in every layer.
      alive: [B] int32, alive slots of the *unpruned* prefix: the position of the first suffix row.
    """

    segments: tuple[gemma.Segment, ...]
    alive: Array


def suffix_tokens(weights: Weights, config: Pi0Config, state: Array, x_t: Array, mix: Array | None) -> Array:
    """Expert input [B, R, W] float32: action tokens; π0 mixes the time in and puts one state token first."""

    def affine(x: Array, a: siglip.Affine) -> Array:
        y = x @ a.w.astype(jnp.float32)
        return y + beside(a.b, y)

    tokens = affine(x_t, weights.action_in)
    if config.pi05:
        return tokens
    first, second = weights.mixer  # pyright: ignore[reportGeneralTypeIssues]  π0 has one
    mixed = tokens @ first.astype(jnp.float32)
    tokens = affine(jax.nn.swish(mixed + beside(mix, mixed)), second)
    return jnp.concatenate([affine(state, weights.state)[:, None], tokens], axis=1)


def suffix_mask(config: Pi0Config) -> np.ndarray:
    """[1, R, R] bool: action rows see all suffix rows, π0's state row only itself."""
    rows = config.action_horizon + (not config.pi05)
    mask = np.ones((1, rows, rows), bool)
    if not config.pi05:
        mask[:, 0, 1:] = False
    return mask


def expert_layers(
    weights: Weights,
    config: Pi0Config,
    tokens: Array,
    prefix: Prefix,
    mods: tuple[gemma.Modulation, ...] | gemma.Stacked | None,
    logits_of: Layers = (),
    use: tuple[str, ...] = (),
    inside: "Inside | None" = None,
) -> tuple[Array, dict[int, Array], tuple[room.Room, ...]]:
    """Runs the expert over as many layers as `prefix` has segments.

    Args:
      weights, config: the model.
      tokens: [B, R, W] from `suffix_tokens`.
      prefix: keys and values of layers 0, 1, ….
      mods: adaptive norms per layer for this flow time; None for π0.
      logits_of: layers whose attention logits are returned.
      use: kernels; with the one for attention, `prefix` is padded (`padded`).
      inside: what the denoise loop has made once; the rooms then stand in for the prefix's segments.

    Returns:
      hidden rows [B, R, W] in the activation dtype; {layer: logits [B, N, R, keys]}, the prefix's keys first, then the
      chunk's own (in a room, masked ones behind them); the rooms with the own keys and values.
    """
    c = config.expert
    h = tokens.astype(config.dtype)
    if by_kernels(weights, config, mods, use):
        return _by_kernels(weights, config, h, prefix, mods=mods, logits_of=logits_of, inside=inside)
    rotation = inside.rotation if inside and inside.rotation else suffix_rotation(config, prefix.alive)
    mask = jnp.asarray(suffix_mask(config))
    kept, rooms = {}, []
    for i, segment in enumerate(prefix.segments):
        mod, how = mods.of(i) if isinstance(mods, gemma.Stacked) else None if mods is None else mods[i], {}
        if kernels.ATTENTION in use and i not in logits_of:
            how["attend"] = _fused_attention
        if kernels.GATED_MLP in use:
            how["gate_and_up"] = kernels.gated_mlp
        seen, cache = mask, (segment,)
        if inside and inside.rooms:
            seen, cache = inside.rooms[i].mask, ()
            how["place"] = partial(_in_room, inside.rooms[i], rooms)
        h, _, logits = gemma.layer(c, weights.expert[i], h, rotation, seen, cache=cache, mod=mod, **how)
        if i in logits_of:
            kept[i] = logits
    return h, kept, tuple(rooms)


def by_kernels(weights: Weights, config: Pi0Config, mods: object, use: tuple[str, ...]) -> bool:
    """Whether the expert's layers run by `expert_kernels`; who pads rows to `kernels.ROWS` before, saves launches."""
    rows = config.action_horizon + (not config.pi05)
    return kernels.LAYER in use and expert_kernels.supports(config.expert, weights.expert[0], mods, rows)


def _by_kernels(
    weights: Weights,
    config: Pi0Config,
    h: Array,
    prefix: Prefix,
    *,
    mods: gemma.Stacked,
    logits_of: Layers,
    inside: "Inside | None",
) -> tuple[Array, dict[int, Array], tuple]:
    """`expert_layers` by `expert_kernels`; h [B, R, W] may be padded already, and comes back as it was."""
    inside = inside or inside_of(config, prefix, ("rotation",), kernels.ROWS)
    rotation = inside.rotation or suffix_rotation(config, prefix.alive, kernels.ROWS)
    seen = suffix_mask(config)[0]
    own = np.eye(kernels.ROWS, dtype=np.int32)  # a row that is not there sees itself, so that its sum is not empty
    own[: len(seen), : len(seen)] = seen
    rows, kept = kernels.padded(h, 1, kernels.ROWS), {}
    for i, segment in enumerate(prefix.segments):
        c, w = config.expert, weights.expert[i]
        if i in logits_of:  # without the padding, which costs XLA eight launches more
            few, turned = rows[:, : len(seen)], tuple(a[:, : len(seen)] for a in rotation)
            mask, norms = jnp.asarray(seen[None]), mods.of(i)
            few, _, kept[i] = gemma.layer(c, w, few, turned, mask, cache=(segment,), mod=norms)
            rows = kernels.padded(few, 1, kernels.ROWS)
            continue
        segment = padded(segment) if segment.k.shape[1] < kernels.KEYS else segment
        rows = expert_kernels.layer(c, w, rows, rotation, jnp.asarray(own), segment, mods=mods, index=i)
    return rows[:, : h.shape[1]], kept, ()


@struct.dataclass
class Inside:
    """What the denoise steps of a chunk have in common beside the prefix: rotation of the rows, rooms; or None, ()."""

    rotation: tuple[Array, Array] | None
    rooms: tuple[room.Room, ...]


def suffix_rotation(config: Pi0Config, alive: Array, rows: int | None = None) -> tuple[Array, Array]:
    """cos and sin of the suffix rows (or so many), which begin behind the `alive` [B] slots of the prefix."""
    rows = config.action_horizon + (not config.pi05) if rows is None else rows
    return gemma.rope(alive[:, None] + jnp.arange(rows)[None], config.expert.head_dim)


def _in_room(there: room.Room, rooms: list[room.Room], k: Array, v: Array) -> tuple[Array, Array]:
    """Own keys and values put into a room, which is added to `rooms`."""
    k, v, filled = there.put(k, v)
    rooms.append(filled)
    return k, v


def _fused_attention(q: Array, segments: tuple[gemma.Segment, ...]) -> tuple[Array, None]:
    prefix, own = segments
    return kernels.attention(
        q, prefix.k, prefix.v, prefix.mask[:, 0], own_k=own.k, own_v=own.v, own_seen=own.mask
    ), None


def padded(s: gemma.Segment) -> gemma.Segment:
    """A prefix segment with as many keys as the kernel takes at a time; the new ones are masked."""
    k, v = (kernels.padded(a, 1, kernels.KEYS) for a in (s.k, s.v))
    return gemma.Segment(k, v, kernels.padded(s.mask, 2, kernels.KEYS))


def velocity(
    weights: Weights,
    config: Pi0Config,
    prefix: Prefix,
    state: Array,
    x_t: Array,
    at: Schedule,
    logits_of: Layers = (),
    use: tuple[str, ...] = (),
    inside: Inside | None = None,
) -> tuple[Array, dict[int, Array], tuple[room.Room, ...]]:
    """v(x_t, t) [B, A, action_dim] at one time of a schedule, attention logits of some layers, and the rooms."""
    tokens = suffix_tokens(weights, config, state, x_t, at.mix)
    h, logits, rooms = expert_layers(weights, config, tokens, prefix, at.mods, logits_of, use=use, inside=inside)
    h, _ = gemma.rms_norm(h, weights.final_gain, at.last)
    h = h[:, int(not config.pi05) :]  # without the state row
    w = weights.action_out.w
    wider = max(h.dtype, w.dtype, key=lambda dtype: dtype.itemsize)  # float32, unless all is in bfloat16
    v = h.astype(wider) @ w.astype(wider)
    return v + beside(weights.action_out.b, v), logits, rooms


def euler(
    weights: Weights,
    config: Pi0Config,
    prefix: Prefix,
    state: Array,
    x_t: Array,
    at: Schedule,
    dt: float,
    logits_of: Layers = (),
    use: tuple[str, ...] = (),
    inside: Inside | None = None,
) -> tuple[Array, dict[int, Array], tuple[room.Room, ...]]:
    """x_t + dt · `velocity`, and its other results; where kernels run the layers, they take the actions in and out."""
    if not (by_kernels(weights, config, at.mods, use) and action_kernels.takes(config.action_dim)):
        v, logits, rooms = velocity(
            weights, config, prefix, state, x_t, at, logits_of=logits_of, use=use, inside=inside
        )
        return x_t + dt * v, logits, rooms
    rows = action_kernels.enter(x_t, weights.action_in.w, weights.action_in.b, config.dtype)
    h, logits, rooms = expert_layers(weights, config, rows, prefix, at.mods, logits_of, use=use, inside=inside)
    out = weights.action_out
    return action_kernels.leave(h, at.mods, config.depth, out.w, out.b, x_t, by=dt), logits, rooms


def action_saliency(
    weights: Weights,
    config: Pi0Config,
    x: Array,
    prefix: Prefix,
    alive: Array,
    use: tuple[str, ...],
) -> Array | None:
    """Saliency [B, n] of the action rows at the first flow time in the last layer that `prefix` has, by kernels.

    Args:
      weights, config: the model.
      x: [B, A, action_dim] float32, the noise.
      prefix: keys and values up to this layer, the visual ones first.
      alive: [B, n] bool.
      use: kernels.

    Returns:
      `tokens.saliency` over visual keys; None where the kernels are not made for this model or are not in use.
    """
    mods, n, last = weights.schedule.first_mods, alive.shape[1], len(prefix.segments) - 1
    ready = by_kernels(weights, config, mods, use) and action_kernels.takes(config.action_dim)
    if not ready or n % kernels.KEYS:
        return None
    rows = action_kernels.enter(x, weights.action_in.w, weights.action_in.b, config.dtype)
    inside = inside_of(config, prefix, ("rotation",), kernels.ROWS)
    before = prefix.replace(segments=prefix.segments[:-1])
    rows, *_ = expert_layers(weights, config, rows, before, mods, use=use, inside=inside)
    keys = {"k": prefix.segments[-1].k, "alive": alive, "rows": config.action_horizon}
    return action_kernels.saliency(config.expert, weights.expert[last].qkv, rows, inside.rotation, mods, last, **keys)


def inside_of(config: Pi0Config, prefix: Prefix, savings: tuple[str, ...], rows: int | None = None) -> Inside:
    """What is made once per chunk: with "rotation" its rows' angles, with "room" keys and values of all layers."""
    own, rooms = jnp.asarray(suffix_mask(config)), ()
    if "room" in savings and not {kernels.ATTENTION, kernels.LAYER} & set(config.kernels):
        rooms = tuple(room.make(segment, own) for segment in prefix.segments)
    return Inside(suffix_rotation(config, prefix.alive, rows) if "rotation" in savings else None, rooms)
