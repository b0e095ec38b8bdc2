"""Joins model and pruner: three compiled programs and the keyframe dispatch between them.

    shallow   images, prompt → layers before the cut → evidence → vmap(pruner.step)      one keyframe bit per robot
    full      the rest of the step with all alive tokens; leaves late saliency behind
    pruned    the rest of the step with the selected tokens

Each is a pure function of (weights, control state, inputs). The host reads the keyframe bits and runs `full` on
the rows that are keyframes and `pruned` on the others, padded to a few batch sizes: under `vmap` a `lax.cond`
would run both for everybody. Nothing else crosses between host and device implicitly.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.model import pi0
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.model.gemma import Segment
from safe_pruner_jax.pruners.base import NO_HISTORY, Evidence, Plan, Pruner, Selection, State
from safe_pruner_jax.rtc import Guide
from safe_pruner_jax.tokens import gather, saliency

BATCH_SIZES = (1, 2, 4, 8)
"""Row counts the second half of a step is compiled for; larger batches take the next power of two."""


@struct.dataclass
class Inputs:
    """What the network reads at one control step, padded to a static layout.

    Args:
      images: [B, C, S, S, 3] uint8.
      camera_mask: [B, C] bool.
      tokens: [B, T] int32, padding 0.
      token_mask: [B, T] bool.
      state: [B, action_dim] float32, normalised and padded; only π0 reads it.
    """

    images: Array
    camera_mask: Array
    tokens: Array
    token_mask: Array
    state: Array


@struct.dataclass
class ControlState:
    """What travels from one control step to the next, every leaf with leading axis B.

    Args:
      pruner: the pruner's own state.
      since_full: [B] int32 steps since the last full pass (0: the last step was one), `NO_HISTORY` before any.
      alive: [B, n] bool visual tokens of the last step; another set makes the history void.
      late: [B, |L_d|, n] float32 late saliency of the last full pass.
      key: [B] PRNG keys.
    """

    pruner: State
    since_full: Array
    alive: Array
    late: Array
    key: Array


@struct.dataclass
class Carry:
    """Everything `shallow` hands to the second half of the step."""

    x: Array
    segments: tuple[Segment, ...]
    mask: Array
    positions: Array
    noise: Array
    state: Array
    selection: Selection
    control: ControlState
    guide: Guide | None = None


@dataclass(frozen=True)
class StepInfo:
    """For people; never carried. Device arrays unless said otherwise.

    Args:
      keyframe: [B] bool on the host: which robots ran the full path.
      selection: what the pruner chose, with score and κ, leading axis B.
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
    wanted = tuple(c.layer for c in plan.capture if c.rows != "action")
    x = jnp.concatenate([z, prompt], axis=1)
    x, segments, logits = pi0.prefix_layers(weights, config, x, pos, mask, before, wanted)

    keys = jax.vmap(jax.random.split)(control.key)
    if noise is None:
        shape = (1, config.action_horizon, config.action_dim)  # openpi draws with a batch axis of one
        noise = jax.vmap(lambda k: jax.random.normal(k, shape)[0])(keys[:, 1])
    count = mask.sum(1, dtype=jnp.int32)
    captured = _capture(config, plan, weights, segments, logits, count, inputs, noise, visual_alive)

    kept_history = (control.since_full != NO_HISTORY) & (control.alive == visual_alive).all(1)
    since = jnp.where(kept_history, control.since_full + 1, NO_HISTORY).astype(jnp.int32)
    camera = jnp.repeat(jnp.arange(inputs.images.shape[1], dtype=jnp.int32), config.tokens_per_camera)
    evidence = Evidence(
        since_full=since,
        visual=z,
        alive=visual_alive,
        camera=jnp.broadcast_to(camera, visual_alive.shape),
        saliency=captured,
        late=jnp.where(kept_history[:, None, None], control.late, 0.0),
        key=jax.vmap(lambda k: jax.random.fold_in(k, 1))(keys[:, 1]),
    )
    state, selection = jax.vmap(pruner.step)(control.pruner, evidence)
    control = ControlState(state, since, visual_alive, control.late, keys[:, 0])
    return Carry(x, segments, mask, pos, noise, inputs.state, selection, control)


def _capture(config, plan: Plan, weights, segments, logits, count, inputs, noise, visual_alive) -> tuple[Array, ...]:
    """One [B, n] saliency per `plan.capture`."""
    n = visual_alive.shape[1]
    actions = tuple(c.layer for c in plan.capture if c.rows == "action")
    if actions:
        first = jax.tree.map(lambda a: a[0], weights.schedule)
        tokens = pi0.suffix_tokens(weights, config, inputs.state, noise, first.mix)
        upto = segments[: max(actions) + 1]
        _, expert = pi0.expert_layers(weights, config, tokens, upto, count, first.mods, actions)
    out = []
    for c in plan.capture:
        if c.rows == "action":
            source = expert[c.layer][:, :, -config.action_horizon :]
            rows = jnp.ones((source.shape[0], config.action_horizon), bool)
        else:
            source, rows = logits[c.layer][:, :, n:], inputs.token_mask
            if c.rows == "last":
                rows = jnp.arange(rows.shape[1]) == rows.sum(1, keepdims=True) - 1
        out.append(jax.vmap(partial(saliency, over=c.over))(source, rows, visual_alive))
    return tuple(out)


def finish(
    config: Pi0Config, plan: Plan, pruned: bool, weights: pi0.Weights, carry: Carry
) -> tuple[Array, ControlState]:
    """The step from the cut to the actions.

    Args:
      config, plan, pruned: static; `pruned` keeps only the selected visual tokens.
      weights: prepared weights.
      carry: from `shallow`.

    Returns:
      actions [B, A, action_dim] float32 and the control state after the step.
    """
    control, mask, pos, x = carry.control, carry.mask, carry.positions, carry.x
    n = control.alive.shape[1]
    count = mask.sum(1, dtype=jnp.int32)
    if pruned:
        chosen = carry.selection
        keep = lambda a, v: jnp.concatenate([v, a[:, n:]], axis=1)
        x = keep(x, gather(x, chosen.index))
        pos = keep(pos, gather(pos, chosen.index))
        mask = keep(mask, chosen.alive)
    after = range(plan.cut.layer if plan.cut else 0, config.depth)
    _, segments, _ = pi0.prefix_layers(weights, config, x, pos, mask, after)
    actions, late = pi0.sample(
        weights,
        config,
        carry.segments + segments,
        count,
        carry.state,
        carry.noise,
        visual_alive=control.alive,
        late_layers=() if pruned else plan.late_layers,
        late_steps=plan.late_steps,
        guide=carry.guide,
    )
    if pruned:
        return actions, control
    late = control.late if late is None else late
    return actions, control.replace(since_full=jnp.zeros_like(control.since_full), late=late)


def _take(carry: Carry, rows: Array) -> Carry:
    """Some rows of a batch: rows [b] int32, repeats allowed."""
    return jax.tree.map(lambda a: a[rows], carry)


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
        self.pruner = Pruner(pruner.name, self.plan, pruner.init, pruner.step)
        self.shallow = jax.jit(partial(shallow, config, self.pruner))
        self._take, self._merge = jax.jit(_take), jax.jit(_merge)
        self.second = {pruned: jax.jit(partial(finish, config, self.plan, pruned)) for pruned in (False, True)}
        self.full, self.pruned = self._second_half(False), self._second_half(True)

    def _second_half(self, pruned: bool) -> Callable[[pi0.Weights, Carry, Array | None], tuple[Array, ControlState]]:
        """`finish` for rows [b] of a carry, None for all; compiled per number of rows, whatever the batch was."""
        program = self.second[pruned]
        return lambda weights, carry, rows: program(weights, carry if rows is None else self._take(carry, rows))

    def init(self, seeds: tuple[int, ...], cameras: int) -> ControlState:
        """State of fresh robots, one per seed, for a layout of `cameras` encoded cameras.

        Raises:
          ValueError: the pruner's `keep` is a count above the number of visual tokens.
        """
        n, B = cameras * self.config.tokens_per_camera, len(seeds)
        keep = self.plan.cut.keep if self.plan.cut else 1
        if keep > n:
            raise ValueError(
                f"keep: expected at most {n} visual tokens ({cameras} cameras × {self.config.tokens_per_camera}), "
                f"got {keep}; lower keep or give a share in (0, 1]"
            )
        late = jnp.zeros((len(self.plan.late_layers), n), jnp.float32)
        shape = jax.ShapeDtypeStruct
        evidence = Evidence(
            since_full=shape((), jnp.int32),
            visual=shape((n, self.config.prefix.width), self.config.dtype),
            alive=shape((n,), bool),
            camera=shape((n,), jnp.int32),
            saliency=tuple(shape((n,), jnp.float32) for _ in self.plan.capture),
            late=late,
            key=jax.eval_shape(lambda: jax.random.key(0)),
        )
        batched = lambda a: jnp.broadcast_to(a, (B, *a.shape))
        return ControlState(
            pruner=jax.tree.map(batched, self.pruner.init(evidence)),
            since_full=jnp.full(B, NO_HISTORY, jnp.int32),
            alive=jnp.zeros((B, n), bool),
            late=batched(late),
            key=jnp.stack([jax.random.key(s) for s in seeds]),
        )

    def step(
        self,
        control: ControlState,
        inputs: Inputs,
        noise: Array | None = None,
        *,
        full: bool = False,
        guide: Guide | None = None,
    ) -> tuple[Array, ControlState, StepInfo]:
        """One control step of a batch of robots, each with its own keyframe decision.

        Args:
          control: state of every robot, from `init` or the step before.
          inputs: observations on the device.
          noise: [B, A, action_dim] float32 on the device; None draws it from each robot's key.
          full: run the full path whatever the pruner decides.
          guide: chunks that the new ones shall agree with, on the device; the second half of the step is then another
            program.

        Returns:
          actions [B, A, action_dim] float32 (not yet ready), the next control state, and what happened.
        """
        carry = self.shallow(self.weights, control, inputs, noise).replace(guide=guide)
        if self.plan.cut is None:
            keyframe, decided = np.ones(inputs.tokens.shape[0], bool), None
        else:
            keyframe, decided = jax.device_get(carry.selection.keyframe) | full, time.perf_counter()
        if keyframe.all():
            actions, control = self.full(self.weights, carry, None)
        elif not keyframe.any():
            actions, control = self.pruned(self.weights, carry, None)
        else:
            actions, control = self._mixed(carry, keyframe)
        return actions, control, StepInfo(keyframe, carry.selection, decided)

    def warmup(self, control: ControlState, inputs: Inputs, guide: Guide | None = None) -> None:
        """Compiles every program a batch of this shape needs, its robots agreeing or not, and waits for it."""
        carry = self.shallow(self.weights, control, inputs, None).replace(guide=guide)
        programs = (self.full,) if self.plan.cut is None else (self.full, self.pruned)
        jax.block_until_ready([program(self.weights, carry, None) for program in programs])
        B, splits = inputs.tokens.shape[0], {}
        for keyframes in range(1, B if self.plan.cut else 1):
            splits[batch_size(keyframes), batch_size(B - keyframes)] = keyframes
        for keyframes in splits.values():
            jax.block_until_ready(self._mixed(carry, np.arange(B) < keyframes))

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
