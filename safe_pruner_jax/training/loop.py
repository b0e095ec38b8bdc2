"""The training loop: AdamW, EMA, checkpoints that resume, curves written as they come.

    fit(config, samples, params, Settings(...), out)  →  out/metrics.jsonl, out/state/<step>/, and the EMA parameters

One step is one compiled function of (train state, batch), sharded over all devices: the batch is split along its first
axis, parameters are replicated or, with `fsdp`, split along their largest axis. A run may be stopped at any time and
goes on from its last checkpoint with the same batches.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.engine import xla
from safe_pruner_jax.model import flow
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.model.params import Params
from safe_pruner_jax.training.augment import augment
from safe_pruner_jax.training.data import WAYPOINT, Samples, batches, split

MOVING = (False, True)
"""Whether each camera of a sample moves with the robot: outside, wrist."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train.

    Args:
      steps: optimiser steps of the whole run; the learning rate is scheduled over them.
      batch: samples per step, over all devices.
      draws: (time, noise) draws per sample; the prefix runs once for all of them.
      learning_rate: peak, after `warmup` steps.
      warmup: steps of linear warm-up.
      decay: the last steps, over which the rate falls to a tenth on a cosine; None decays over the whole run, as openpi
        does. With a number, a run may be lengthened by resuming it with more `steps`.
      weight_decay: AdamW's.
      clip: global gradient norm.
      ema: decay of the averaged parameters, which are the result.
      validation: share of the demonstrations held out.
      augment: openpi's image augmentations.
      waypoint: weight of the auxiliary loss `flow.waypoint_loss`; 0, as in openpi, leaves it out.
      seed: of shuffling, augmentation, times and noise.
      log_every, validate_every, save_every: in steps.
      max_seconds: stop (with a checkpoint) after so long; the next run goes on.
      fsdp: split parameters over the devices instead of replicating them.
    """

    steps: int = 20_000
    batch: int = 32
    draws: int = 8
    learning_rate: float = 1e-3
    warmup: int = 500
    decay: int | None = None
    weight_decay: float = 1e-4
    clip: float = 1.0
    ema: float = 0.999
    validation: float = 0.05
    augment: bool = True
    waypoint: float = 0.0
    seed: int = 0
    log_every: int = 20
    validate_every: int = 500
    save_every: int = 1000
    max_seconds: float | None = None
    fsdp: bool = False


HEAD = "waypoint_head"
"""Entry of the parameters while they train with `Settings.waypoint`; it is not part of the model."""


@struct.dataclass
class TrainState:
    """What a run carries: step, parameters, their running average, and the optimiser's moments."""

    step: Array
    params: Params
    ema: Params
    moments: Any


@struct.dataclass
class Batch:
    """Samples of one step, leading axis B; see `data.Samples`."""

    images: Array
    state: Array
    actions: Array
    tokens: Array
    token_mask: Array
    waypoints: Array


def learning_rate(s: Settings) -> optax.Schedule:
    """Linear warm-up, the peak, and a cosine down to a tenth over the last `decay` steps."""
    decay = max(s.steps - s.warmup, 1) if s.decay is None else min(s.decay, max(s.steps - s.warmup, 1))
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, s.learning_rate, s.warmup),
            optax.constant_schedule(s.learning_rate),
            optax.cosine_decay_schedule(s.learning_rate, decay, 0.1),
        ],
        [s.warmup, max(s.steps - decay, s.warmup)],
    )


def optimiser(s: Settings) -> optax.GradientTransformation:
    """Clipped AdamW with openpi's betas on the schedule of `learning_rate`."""
    return optax.chain(
        optax.clip_by_global_norm(s.clip),
        optax.adamw(learning_rate(s), b1=0.9, b2=0.95, weight_decay=s.weight_decay),
    )


def init_state(params: Params, config: Pi0Config, s: Settings) -> TrainState:
    """The state before the first step; the average starts at the parameters."""
    if s.waypoint:
        params = {**params, HEAD: waypoint_head(config)}
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimiser(s).init(params))


def waypoint_head(config: Pi0Config) -> Params:
    """A linear head that says zero."""
    width = config.depth * config.prefix.num_kv_heads * config.prefix.head_dim
    return {"kernel": jnp.zeros((width, WAYPOINT), jnp.float32), "bias": jnp.zeros(WAYPOINT, jnp.float32)}


def losses_of(
    params: Params, config: Pi0Config, batch: Batch, key: Array, draws: int, augmented: bool
) -> dict[str, Array]:
    """Mean losses of a batch, float32 scalars: "loss", of flow matching, and "waypoint_loss" where there is its head.

    Every draw of augmentation, time and noise is from `key`.
    """
    B = batch.actions.shape[0]
    images, for_times, for_noise = jax.random.split(key, 3)
    x = augment(images, batch.images, moving=MOVING) if augmented else batch.images
    times = flow.draw_times(for_times, (B, draws))
    noise = jax.random.normal(for_noise, (B, draws, *batch.actions.shape[1:]))
    cameras = jnp.ones(batch.images.shape[:2], bool)
    prefix = flow.prefix(params, config, x, cameras, batch.tokens, batch.token_mask)
    losses = {"loss": flow.flow_loss(params, config, prefix, batch.state, batch.actions, times, noise).mean()}
    if HEAD in params:
        losses["waypoint_loss"] = flow.waypoint_loss(params[HEAD], prefix, batch.token_mask, batch.waypoints).mean()
    return losses


def train_step(config: Pi0Config, s: Settings, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
    """One update: loss, gradient, AdamW, average."""
    key = jax.random.fold_in(jax.random.key(s.seed), state.step)

    def total(params: Params) -> tuple[Array, dict[str, Array]]:
        losses = losses_of(params, config, batch, key, s.draws, s.augment)
        return losses["loss"] + s.waypoint * losses.get("waypoint_loss", 0.0), losses

    (_, losses), grads = jax.value_and_grad(total, has_aux=True)(state.params)
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
    updates, moments = optimiser(s).update(grads, state.moments, state.params)
    params = optax.apply_updates(state.params, updates)
    # early on the average is shorter than the decay says, so that it forgets the start
    decay = jnp.minimum(s.ema, (1.0 + state.step) / (10.0 + state.step))
    ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, params)
    return TrainState(state.step + 1, params, ema, moments), losses | {"grad_norm": norm}


def shardings(mesh: Mesh, tree: Any, fsdp: bool) -> Any:
    """Where every leaf lives: replicated, or split along its largest divisible axis over the mesh."""
    devices = mesh.size

    def place(leaf: Array) -> NamedSharding:
        axes = [i for i, n in enumerate(leaf.shape) if n % devices == 0 and n >= devices] if fsdp else []
        if not axes or leaf.size < 2**16:
            return NamedSharding(mesh, PartitionSpec())
        largest = max(axes, key=lambda i: leaf.shape[i])
        return NamedSharding(mesh, PartitionSpec(*(None,) * largest, "data"))

    return jax.tree.map(place, tree)


def gather(samples: Samples, steps: np.ndarray) -> Batch:
    """The batch of some steps, on the host."""
    prompt = samples.prompt[steps]
    return Batch(
        samples.frames[steps],
        samples.state[steps],
        samples.actions[steps],
        samples.tokens[prompt],
        samples.token_mask[prompt],
        samples.waypoints[steps],
    )


def fit(
    config: Pi0Config,
    samples: Samples,
    params: Params,
    s: Settings,
    out: Path,
    *,
    on_log: Callable[[dict], None] = lambda row: None,
) -> tuple[Params, int]:
    """Trains, or goes on training.

    Args:
      config: model; `image_size` must be the samples'.
      samples: demonstrations.
      params: initial parameters; ignored when `out` holds a checkpoint of this run.
      s: settings.
      out: folder of the run: `metrics.jsonl` (one line per log, with step, loss, samples per second; validation lines
        have `validation`) and `state/`.
      on_log: called with every row that is written.

    Returns:
      The averaged parameters (NumPy, float32) and the number of steps they have seen.

    Raises:
      ValueError: the batch does not divide over the devices.
      FloatingPointError: the loss is not finite; the last checkpoint is intact.
    """
    mesh = Mesh(np.array(jax.devices()), ("data",))
    if s.batch % mesh.size:
        raise ValueError(f"batch: expected a multiple of the {mesh.size} devices, got {s.batch}")
    out.mkdir(parents=True, exist_ok=True)
    state = init_state(params, config, s)
    placed = shardings(mesh, state, s.fsdp)
    spread = NamedSharding(mesh, PartitionSpec("data"))
    manager = ocp.CheckpointManager((out / "state").absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2))
    if manager.latest_step() is not None:
        state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
    state = jax.device_put(state, placed)
    update = xla.jit(
        partial(train_step, config, s), in_shardings=(placed, spread), out_shardings=(placed, None), donate_argnums=0
    )
    evaluate = jax.jit(lambda p, b, k: losses_of(p, config, b, k, s.draws, False))

    training, held = split(samples, s.validation, s.seed)
    check = next(batches(held, min(len(held), 4 * s.batch) // mesh.size * mesh.size or mesh.size, s.seed + 1))
    check = jax.device_put(gather(samples, check), spread)
    step = start = int(state.step)
    began = last = time.perf_counter()
    with (out / "metrics.jsonl").open("a") as file:

        def log(row: dict) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()
            on_log(row)

        def save() -> None:
            if manager.latest_step() != step:
                manager.save(step, args=ocp.args.StandardSave(state))
                manager.wait_until_finished()

        losses = []
        for indices in batches(training, s.batch, s.seed, start):
            if step >= s.steps or (s.max_seconds and time.perf_counter() - began > s.max_seconds):
                break
            state, metrics = update(state, jax.device_put(gather(samples, indices), spread))
            losses.append(metrics["loss"])
            step += 1
            if step % s.log_every == 0 or step == s.steps:
                loss = float(np.mean(jax.device_get(losses)))
                if not np.isfinite(loss):
                    raise FloatingPointError(f"the loss is {loss} at step {step}; lower the learning rate and resume")
                now = time.perf_counter()
                rate = len(losses) * s.batch / (now - last)
                last_step = {name: float(value) for name, value in metrics.items()}
                log({"step": step, **last_step, "loss": loss, "samples_per_s": rate})
                losses, last = [], now
            if step % s.validate_every == 0 or step == s.steps:
                found = jax.device_get(evaluate(state.ema, check, jax.random.key(s.seed)))
                log({"step": step} | {name.replace("loss", "validation"): float(v) for name, v in found.items()})
            if step % s.save_every == 0:
                save()
        if step > start:
            save()
    manager.close()
    result = {name: leaf for name, leaf in state.ema.items() if name != HEAD}
    return jax.tree.map(np.asarray, jax.device_get(result)), step
