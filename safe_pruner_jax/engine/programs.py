"""The two halves of a control step, as pure functions of (weights, control state, inputs).

    shallow   images, prompt → layers before the first cut → evidence → vmap(pruner.step)
    finish    the remaining layers, cut by cut, then the denoise steps; with all alive tokens or with the selected ones

`engine` compiles them. No method is known by name: a plan says what is captured, cut, reused and remembered.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.engine.capture import everybody, patches, read
from safe_pruner_jax.engine.state import ControlState, Inputs, visual_slots
from safe_pruner_jax.model import expert, kernels, pi0
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.model.gemma import Segment
from safe_pruner_jax.model.guidance import Guide
from safe_pruner_jax.pruners.base import NO_HISTORY, Capture, Evidence, Plan, Pruner, Selection, State
from safe_pruner_jax.tokens import counting, saliency


@struct.dataclass
class Carry:
    """Everything `shallow` hands to the second half of the step.

    `rows` and `kv`, one (k, v) per layer, are of the layers before the cut; `past` are the remembered captures of these
    layers, {place in the plan: array}; `evidence` is there for later cuts only.
    """

    rows: pi0.Rows
    kv: tuple[tuple[Array, Array], ...]
    noise: Array
    state: Array
    selection: Selection
    control: ControlState
    past: dict[int, Array]
    evidence: Evidence | None
    guide: Guide | None = None

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Keys and values with their mask, which is that of the rows: a program need not write it out per layer."""
        return tuple(Segment(k, v, self.rows.mask[:, None]) for k, v in self.kv)


def embed(weights: pi0.Weights, config: Pi0Config, inputs: Inputs) -> pi0.Rows:
    """`pi0.embed_prefix` of inputs."""
    seen = (inputs.images, inputs.camera_mask, inputs.tokens, inputs.token_mask)
    return pi0.embed_prefix(weights, config, *seen)


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
    plan, n = pruner.plan, visual_slots(config, inputs)
    embedded = embed(weights, config, inputs)
    before = range(plan.cut.layer if plan.cut else 0)
    looked_at = _layers(plan.capture + plan.remember, before)
    x, segments, logits = pi0.prefix_layers(weights, config, embedded, before, looked_at)
    rows = everybody(embedded.replace(x=x), n)
    see = lambda c: read(c, logits[c.layer], rows, n, rows.alive)

    keys = jax.vmap(jax.random.split)(control.key)
    if noise is None:
        noise = jax.vmap(partial(draw_noise, config))(keys[:, 1])
    prefix = pi0.Prefix(segments, rows.count)
    action = _action_saliency(config, plan, weights, prefix, inputs.state, noise=noise, alive=rows.alive)
    captured = tuple(action[c.layer](c.over) if c.rows == "action" else see(c) for c in plan.capture)

    evidence = _evidence(config, control, inputs, embedded, x[:, :n], key=keys[:, 1]).replace(saliency=captured)
    with counting("counting" in config.savings):
        state, selection = jax.vmap(pruner.step)(control.pruner, evidence)
    control = control.replace(pruner=state, since_full=evidence.since_full, alive=rows.alive, key=keys[:, 0])
    return Carry(
        rows=embedded.replace(x=x),
        kv=tuple((s.k, s.v) for s in segments),
        noise=noise,
        state=inputs.state,
        selection=selection,
        control=control,
        past={i: see(c) for i, c in enumerate(plan.remember) if c.layer in before},
        evidence=evidence if plan.later else None,
    )


def _evidence(
    config: Pi0Config, control: ControlState, inputs: Inputs, embedded: pi0.Rows, hidden: Array, *, key: Array
) -> Evidence:
    """What a pruner may look at but for the saliency, leading axis B; the history is void where other tokens live.

    Args:
      config, control, inputs: of the step.
      embedded: rows before the first layer.
      hidden: [B, n, d] visual rows before the cut.
      key: [B] PRNG keys of this step.
    """
    n = hidden.shape[1]
    alive = embedded.mask[:, :n]
    known = (control.since_full != NO_HISTORY)[:, None] & (control.alive == alive)
    since = jnp.where(known, control.since_full[:, None] + 1, NO_HISTORY).min(1)  # a step with a history counts from 1
    kept_history = since != NO_HISTORY
    past_only = lambda a: jnp.where(kept_history.reshape(-1, *[1] * (a.ndim - 1)), a, 0.0)
    camera = jnp.repeat(jnp.arange(inputs.images.shape[1], dtype=jnp.int32), config.tokens_per_camera)
    return Evidence(
        since_full=since,
        visual=embedded.x[:, :n],
        alive=alive,
        running=alive,
        camera=jnp.broadcast_to(camera, alive.shape),
        saliency=(),
        late=past_only(control.late),
        key=jax.vmap(lambda k: jax.random.fold_in(k, 1))(key),
        text=embedded.x[:, n:],
        text_alive=inputs.token_mask,
        hidden=hidden,
        patches=patches(inputs.images, config.vision.patch),
        past=jax.tree.map(past_only, control.past),
        actions=past_only(control.actions),
    )


def _layers(captures: tuple[Capture, ...], layers: range) -> tuple[int, ...]:
    """Layers of a range whose prefix logits are wanted."""
    return tuple(c.layer for c in captures if c.rows != "action" and c.layer is not None and c.layer in layers)


def draw_noise(config: Pi0Config, key: Array) -> Array:
    """[A, action_dim] float32, where a step's flow starts: openpi's draw times the configuration's temperature."""
    shape = (1, config.action_horizon, config.action_dim)  # openpi draws with a batch axis of one
    return config.temperature * jax.random.normal(key, shape)[0]


def _action_saliency(
    config: Pi0Config, plan: Plan, weights: pi0.Weights, prefix: pi0.Prefix, state: Array, *, noise: Array, alive: Array
) -> dict[int, Callable[[str], Array]]:
    """{layer: over → [B, n] saliency of the action tokens at flow time 1} for the captures that ask for it."""
    actions = tuple(c.layer for c in plan.capture if c.rows == "action" and c.layer is not None)
    if not actions:
        return {}
    upto = prefix.replace(segments=prefix.segments[: max(actions) + 1])
    use = tuple(name for name in config.kernels if name != kernels.ATTENTION)  # which wants other keys
    if {(c.layer, c.over) for c in plan.capture if c.rows == "action"} == {(max(actions), "visual")}:
        at_once = expert.action_saliency(weights, config, noise, upto, alive, use)
        if at_once is not None:
            return {max(actions): lambda over: at_once}
    mods, mix = weights.schedule.first_mods, weights.schedule.mix
    tokens = pi0.suffix_tokens(weights, config, state, noise, None if mix is None else mix[0])
    _, seen, _ = pi0.expert_layers(weights, config, tokens, upto, mods, actions, use=use)
    rows = jnp.ones((noise.shape[0], config.action_horizon), bool)

    def of(layer: int, over: str) -> Array:
        source = seen[layer][:, :, -config.action_horizon :]
        return jax.vmap(partial(saliency, over=over))(source, rows, alive)

    return {layer: partial(of, layer) for layer in actions}


def finish(
    config: Pi0Config, pruner: Pruner, pruned: bool, weights: pi0.Weights, carry: Carry
) -> tuple[Array, ControlState]:
    """The step from the cut to the actions.

    Args:
      config, pruner, pruned: static; `pruned` keeps only the selected visual tokens.
      weights: prepared weights.
      carry: from `shallow`.

    Returns:
      actions [B, A, action_dim] float32 and the control state after the step.
    """
    plan, control = pruner.plan, carry.control
    n = control.alive.shape[1]
    deep = _deep(config, pruner, pruned, weights, carry)
    wants_late = not pruned or plan.late_from == "every"
    actions, late = pi0.sample(
        weights,
        config,
        pi0.Prefix(carry.segments + deep.segments, carry.rows.count),
        carry.state,
        carry.noise,
        visual_alive=control.alive,
        columns=deep.columns,
        late_layers=plan.late_layers if wants_late else (),
        late_steps=plan.late_steps,
        late_over=plan.late_over,
        guide=carry.guide,
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
    rows = everybody(carry.rows, n)
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
            reuse = pi0.Reuse(kv, jnp.where(rows.alive, rows.slots, n), carry.rows.mask)
        looked_at = _layers(captures + plan.remember, layers)
        x, more, logits = pi0.prefix_layers(weights, config, rows, layers, looked_at, reuse)
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
            with counting("counting" in config.savings):
                state, selection = jax.vmap(lambda s, e, i=i: pruner.later(s, e, i))(state, evidence)
    return _Deep(segments, past, state, columns, rows.in_slots(rows.alive, n))
