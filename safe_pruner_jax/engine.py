"""Joins model and pruner: three compiled programs and the keyframe dispatch between them.

    shallow   images, prompt → layers before the cut → evidence → vmap(pruner.step)      one keyframe bit per robot
    full      the rest of the step with all alive tokens; leaves late saliency behind
    pruned    the rest of the step with the selected tokens, through the later cuts of the plan if it has any

Each is a pure function of (weights, control state, inputs). The host reads the keyframe bits and runs `full` on
the rows that are keyframes and `pruned` on the others, padded to a few batch sizes: under `vmap` a `lax.cond`
would run both for everybody. Nothing else crosses between host and device implicitly.
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.control import ControlState, Inputs
from safe_pruner_jax.evidence import captured_shape, everybody, patches, read
from safe_pruner_jax.model import pi0
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.model.gemma import Segment
from safe_pruner_jax.pruners.base import NO_HISTORY, Capture, Evidence, Plan, Pruner, Selection, State
from safe_pruner_jax.tokens import saliency

BATCH_SIZES = (1, 2, 4, 8)
"""Row counts the second half of a step is compiled for; larger batches take the next power of two."""


@struct.dataclass
class Carry:
    """Everything `shallow` hands to the second half of the step.

    `past` are the remembered captures of layers before the cut, {place in the plan: array}; `evidence` is there for
    later cuts only.
    """

    x: Array
    segments: tuple[Segment, ...]
    mask: Array
    positions: Array
    noise: Array
    state: Array
    selection: Selection
    control: ControlState
    past: dict[int, Array]
    evidence: Evidence | None


@dataclass(frozen=True)
class StepInfo:
    """For people; never carried. Device arrays unless said otherwise.

    Args:
      keyframe: [B] bool on the host: which robots ran the full path.
      selection: what the pruner chose at the first cut, with score and κ, leading axis B.
      decided_at: `time.perf_counter()` when the keyframe bits were on the host; None without a decision.
    """

    keyframe: np.ndarray
    selection: Selection
    decided_at: float | None


def shallow(
    config: Pi0Config,
    pruner: Pruner,
    weights: pi0.Weights,
    control: ControlState,
    inputs: Inputs,
    noise: Array | None,
) -> Carry:
    """The step up to the cut and the pruner's decision.

    Args:
      config, pruner: static.
      weights: prepared weights.
      control: state of every robot.
      inputs: observation of every robot.
      noise: [B, A, action_dim] float32, or None to draw it from the state's keys.

    Returns:
      The carry; its `control.since_full` counts the steps as evidence does (`NO_HISTORY` or ≥ 1).
    """
    plan = pruner.plan
    z = pi0.embed_images(weights, config, inputs.images)
    prompt = pi0.embed_prompt(weights, config, inputs.tokens)
    visual_alive = jnp.repeat(inputs.camera_mask, config.tokens_per_camera, axis=1)
    mask = jnp.concatenate([visual_alive, inputs.token_mask], axis=1)
    pos = pi0.positions(mask)
    before = range(plan.cut.layer if plan.cut else 0)
    wanted = _layers(plan.capture + plan.remember, before)
    x = jnp.concatenate([z, prompt], axis=1)
    x, segments, logits = pi0.prefix_layers(weights, config, x, pos, mask, before, wanted)
    rows = everybody(x, pos, mask, visual_alive.shape[1])
    see = lambda c: read(c, logits[c.layer], rows, visual_alive.shape[1], visual_alive)

    keys = jax.vmap(jax.random.split)(control.key)
    if noise is None:
        shape = (1, config.action_horizon, config.action_dim)  # openpi draws with a batch axis of one
        noise = jax.vmap(lambda k: jax.random.normal(k, shape)[0])(keys[:, 1])
    count = mask.sum(1, dtype=jnp.int32)
    action = _action_saliency(config, plan, weights, segments, count, inputs.state, noise, visual_alive)
    captured = tuple(action[c.layer](c.over) if c.rows == "action" else see(c) for c in plan.capture)

    kept_history = (control.since_full != NO_HISTORY) & (control.alive == visual_alive).all(1)
    since = jnp.where(kept_history, control.since_full + 1, NO_HISTORY).astype(jnp.int32)
    known = lambda a: jnp.where(kept_history.reshape(-1, *[1] * (a.ndim - 1)), a, 0.0)
    camera = jnp.repeat(jnp.arange(inputs.images.shape[1], dtype=jnp.int32), config.tokens_per_camera)
    evidence = Evidence(
        since_full=since,
        visual=z,
        alive=visual_alive,
        running=visual_alive,
        camera=jnp.broadcast_to(camera, visual_alive.shape),
        saliency=captured,
        late=known(control.late),
        key=jax.vmap(lambda k: jax.random.fold_in(k, 1))(keys[:, 1]),
        text=prompt,
        text_alive=inputs.token_mask,
        hidden=x[:, : visual_alive.shape[1]],
        patches=patches(inputs.images, config.vision.patch),
        past=jax.tree.map(known, control.past),
        actions=known(control.actions),
    )
    state, selection = jax.vmap(pruner.step)(control.pruner, evidence)
    control = control.replace(pruner=state, since_full=since, alive=visual_alive, key=keys[:, 0])
    past = {i: see(c) for i, c in enumerate(plan.remember) if c.layer in before}
    kept = evidence if plan.later else None
    return Carry(x, segments, mask, pos, noise, inputs.state, selection, control, past, kept)


def _layers(captures: tuple[Capture, ...], layers: range) -> tuple[int, ...]:
    """Layers of a range whose prefix logits are wanted."""
    return tuple(c.layer for c in captures if c.rows != "action" and c.layer in layers)


def _action_saliency(config, plan: Plan, weights, segments, count, state, noise, visual_alive) -> dict:
    """{layer: over → [B, n] saliency of the action tokens at flow time 1} for the captures that ask for it."""
    actions = tuple(c.layer for c in plan.capture if c.rows == "action")
    if not actions:
        return {}
    first = jax.tree.map(lambda a: a[0], weights.schedule)
    tokens = pi0.suffix_tokens(weights, config, state, noise, first.mix)
    upto = segments[: max(actions) + 1]
    _, expert = pi0.expert_layers(weights, config, tokens, upto, count, first.mods, actions)
    rows = jnp.ones((noise.shape[0], config.action_horizon), bool)

    def of(layer: int, over: str) -> Array:
        source = expert[layer][:, :, -config.action_horizon :]
        return jax.vmap(partial(saliency, over=over))(source, rows, visual_alive)

    return {layer: partial(of, layer) for layer in actions}


def finish(
    config: Pi0Config, pruner: Pruner, pruned: bool, weights: pi0.Weights, carry: Carry, rows: Array | None
) -> tuple[Array, ControlState]:
    """The step from the cut to the actions, for some rows of the batch.

    Args:
      config, pruner, pruned: static; `pruned` keeps only the selected visual tokens.
      weights: prepared weights.
      carry: from `shallow`.
      rows: [b] int32 rows to run, repeats allowed; None runs all of them.

    Returns:
      actions [b, A, action_dim] float32 and the control state of these rows after the step.
    """
    if rows is not None:
        carry = jax.tree.map(lambda a: a[rows], carry)
    plan, control = pruner.plan, carry.control
    n = control.alive.shape[1]
    deep = _deep(config, pruner, pruned, weights, carry)
    asked = not pruned or plan.late_from == "every"
    actions, late = pi0.sample(
        weights,
        config,
        carry.segments + deep.segments,
        carry.mask.sum(1, dtype=jnp.int32),
        carry.state,
        carry.noise,
        visual_alive=control.alive,
        columns=deep.columns,
        late_layers=plan.late_layers if asked else (),
        late_steps=plan.late_steps,
    )
    control = control.replace(
        pruner=deep.state,
        running=deep.running,
        late=control.late if late is None else late,
        past=tuple(deep.past[i] for i in range(len(plan.remember))),
        actions=actions,
        kv=tuple((s.k[:, :n], s.v[:, :n]) for s in deep.segments) if plan.dropped == "reuse" else (),
    )
    return actions, control if pruned else control.replace(since_full=jnp.zeros_like(control.since_full))


class _Deep(NamedTuple):
    """What the prefix layers from the first cut on leave.

    Args:
      segments: keys and values of these layers.
      past: remembered captures, {place in the plan: array}.
      state: the pruner's, after its last decision.
      columns: for layers that have dropped tokens {layer: (slots, alive) of their first keys}.
      running: [B, n] bool, visual tokens that run in the last layer.
    """

    segments: tuple[Segment, ...]
    past: dict[int, Array]
    state: State
    columns: dict[int, tuple[Array, Array]]
    running: Array


def _deep(config: Pi0Config, pruner: Pruner, pruned: bool, weights: pi0.Weights, carry: Carry) -> _Deep:
    """The prefix layers from the first cut on, cut by cut."""
    plan, control = pruner.plan, carry.control
    n, state, past, columns = control.alive.shape[1], control.pruner, dict(carry.past), {}
    rows = everybody(carry.x, carry.positions, carry.mask, n)
    reused = pruned and plan.dropped == "reuse"
    cuts = plan.cuts if pruned else plan.cuts[:1]
    starts = [c.layer for c in cuts] or [0]
    selection, segments = carry.selection, ()
    for i, (start, stop) in enumerate(zip(starts, [*starts[1:], config.depth], strict=True)):
        if pruned:
            rows = rows.select(selection.index, selection.alive, selection.rows, n)
        layers = range(start, stop)
        captures = plan.later[i].capture if i < len(cuts) - 1 else ()
        reuse = None
        if reused:
            kv = {l: control.kv[l - plan.cut.layer] for l in layers}
            reuse = pi0.Reuse(kv, jnp.where(rows.alive, rows.slots, n), carry.mask)
        wanted = _layers(captures + plan.remember, layers)
        x, more, logits = pi0.prefix_layers(weights, config, rows.x, rows.positions, rows.mask, layers, wanted, reuse)
        rows, segments = rows.replace(x=x), segments + more
        keys = control.alive if reused else rows.alive
        see = lambda c, logits=logits, rows=rows, keys=keys: read(c, logits[c.layer], rows, n, keys)
        past |= {j: see(c) for j, c in enumerate(plan.remember) if c.layer in layers}
        if pruned and not reused:
            columns |= {l: (rows.slots, rows.alive) for l in layers}
        if i < len(cuts) - 1:
            evidence = carry.evidence.replace(
                running=rows.in_slots(rows.alive, n),
                hidden=rows.in_slots(x[:, : rows.slots.shape[1]], n),
                saliency=tuple(map(see, captures)),
            )
            state, selection = jax.vmap(lambda s, e, i=i: pruner.later(s, e, i))(state, evidence)
    return _Deep(segments, past, state, columns, rows.in_slots(rows.alive, n))


def _merge(full, pruned, source: Array):
    """Rows of two pytrees back into robot order: source [B] indexes their concatenation."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b])[source], full, pruned)


class Engine:
    """A model and a pruner, compiled. Holds programs and weights, no state of any robot.

    Args:
      weights: prepared weights, on the device.
      config: sizes of the model.
      pruner: what decides.

    Raises:
      ValueError: the plan does not fit the model's depth.
    """

    def __init__(self, weights: pi0.Weights, config: Pi0Config, pruner: Pruner):
        self.weights, self.config = weights, config
        self.plan = pruner.plan.for_depth(config.depth)
        self.pruner = replace(pruner, plan=self.plan)
        self.shallow = jax.jit(partial(shallow, config, self.pruner))
        self.full = jax.jit(partial(finish, config, self.pruner, False))
        self.pruned = jax.jit(partial(finish, config, self.pruner, True))
        self._merge = jax.jit(_merge)

    def init(self, seeds: tuple[int, ...], cameras: int) -> ControlState:
        """State of fresh robots, one per seed, for a layout of `cameras` encoded cameras.

        Raises:
          ValueError: the pruner's `keep` is a count above the number of visual tokens.
        """
        config, pruner = self.config, self.pruner
        plan = pruner.plan
        n, B, shape = cameras * config.tokens_per_camera, len(seeds), jax.ShapeDtypeStruct
        keep = max((c.keep for c in plan.cuts), default=1)
        if keep > n:
            raise ValueError(
                f"keep: expected at most {n} visual tokens ({cameras} cameras × {config.tokens_per_camera}), "
                f"got {keep}; lower keep or give a share in (0, 1]"
            )
        late = jnp.zeros((len(plan.late_layers), n), jnp.float32)
        past = tuple(jnp.zeros(() if c.rows == "entropy" else n, jnp.float32) for c in plan.remember)
        actions = jnp.zeros((config.action_horizon, config.action_dim), jnp.float32)
        kept = jnp.zeros((n, config.prefix.num_kv_heads, config.prefix.head_dim), config.dtype)
        kv = tuple((kept, kept) for _ in range(plan.cut.layer, config.depth)) if plan.dropped == "reuse" else ()
        rows = shape((n, config.prefix.width), config.dtype)
        T = config.max_token_len  # the longest prompt; no state may depend on it
        evidence = Evidence(
            since_full=shape((), jnp.int32),
            visual=rows,
            alive=shape((n,), bool),
            running=shape((n,), bool),
            camera=shape((n,), jnp.int32),
            saliency=tuple(shape(captured_shape(c, n, T), jnp.float32) for c in plan.capture),
            late=late,
            key=jax.eval_shape(lambda: jax.random.key(0)),
            text=shape((T, config.prefix.width), config.dtype),
            text_alive=shape((T,), bool),
            hidden=rows,
            patches=shape((n, 3 * config.vision.patch**2), jnp.uint8),
            past=past,
            actions=actions,
        )
        batched = lambda a: jnp.broadcast_to(a, (B, *a.shape))
        return ControlState(
            pruner=jax.tree.map(batched, pruner.init(evidence)),
            since_full=jnp.full(B, NO_HISTORY, jnp.int32),
            alive=jnp.zeros((B, n), bool),
            running=jnp.zeros((B, n), bool),
            late=batched(late),
            key=jnp.stack([jax.random.key(s) for s in seeds]),
            past=jax.tree.map(batched, past),
            actions=batched(actions),
            kv=jax.tree.map(batched, kv),
        )

    def step(
        self, control: ControlState, inputs: Inputs, noise: Array | None = None
    ) -> tuple[Array, ControlState, StepInfo]:
        """One control step of a batch of robots, each with its own keyframe decision.

        Args:
          control: state of every robot, from `init` or the step before.
          inputs: observations on the device.
          noise: [B, A, action_dim] float32 on the device; None draws it from each robot's key.

        Returns:
          actions [B, A, action_dim] float32 (not yet ready), the next control state, and what happened.
        """
        carry = self.shallow(self.weights, control, inputs, noise)
        if self.plan.cut is None:
            keyframe, decided = np.ones(inputs.tokens.shape[0], bool), None
        else:
            keyframe, decided = jax.device_get(carry.selection.keyframe), time.perf_counter()
        if keyframe.all():
            actions, control = self.full(self.weights, carry, None)
        elif not keyframe.any():
            actions, control = self.pruned(self.weights, carry, None)
        else:
            actions, control = self._mixed(carry, keyframe)
        return actions, control, StepInfo(keyframe, carry.selection, decided)

    def warmup(self, control: ControlState, inputs: Inputs) -> None:
        """Compiles every program a batch of this shape needs when its robots agree, and waits for it."""
        carry = self.shallow(self.weights, control, inputs, None)
        programs = (self.full,) if self.plan.cut is None else (self.full, self.pruned)
        jax.block_until_ready([program(self.weights, carry, None) for program in programs])

    def _mixed(self, carry: Carry, keyframe: np.ndarray) -> tuple[Array, ControlState]:
        source = np.empty(len(keyframe), np.int32)
        outputs, start = [], 0
        for program, rows in (
            (self.full, np.flatnonzero(keyframe)),
            (self.pruned, np.flatnonzero(~keyframe)),
        ):
            padded = np.resize(rows, batch_size(len(rows))).astype(np.int32)
            outputs.append(program(self.weights, carry, jax.device_put(padded)))
            source[rows] = start + np.arange(len(rows))
            start += len(padded)
        return self._merge(*outputs, jax.device_put(source))


def batch_size(rows: int) -> int:
    """The compiled batch size that holds so many rows.

    >>> [batch_size(r) for r in (1, 3, 8, 9)]
    [1, 4, 8, 16]
    """
    return next((b for b in BATCH_SIZES if b >= rows), 1 << (rows - 1).bit_length())
