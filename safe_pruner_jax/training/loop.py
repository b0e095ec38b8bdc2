"""The training loop: AdamW, EMA, checkpoints that resume, curves written as they come.

    fit(objective, source, params, Settings(...), out)
        →  out/metrics.jsonl, out/state/<step>/, and the EMA parameters

What is learned is an `Objective`, what it is learned from a `Source`; the loop knows neither.

One step is one compiled function of (train state, batch), sharded over all devices: the batch is split along its first
axis, parameters are replicated or, with `fsdp`, split along their largest axis. The devices may belong to several
`hosts`. A run may be stopped at any time and goes on from its last checkpoint with the same batches.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.engine import xla
from safe_pruner_jax.model.params import Params
from safe_pruner_jax.training import hosts


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
    seed: int = 0
    log_every: int = 20
    validate_every: int = 500
    save_every: int = 1000
    max_seconds: float | None = None
    fsdp: bool = False


@struct.dataclass
class TrainState:
    """What a run carries: step, parameters, their running average, and the optimiser's moments."""

    step: Array
    params: Params
    ema: Params
    moments: Any


class Objective(NamedTuple):
    """What a run minimises: Σ weights[k] · losses(…)[k].

    Args:
      losses: (params, batch, key) → {name: scalar}.
      measures: (params, batch, key) → {name: scalar}, on held-out batches, without augmentation.
      weights: of the losses, by name.
    """

    losses: Callable[[Params, Any, Array], dict[str, Array]]
    measures: Callable[[Params, Any, Array], dict[str, Array]]
    weights: Mapping[str, float]


class Source(Protocol):
    """Where batches come from, pytrees with a leading axis B."""

    def batches(self, seed: int, start: int) -> Iterator[Any]:
        """Endless training batches from number `start` on, the same for the same seed."""
        ...

    def checks(self) -> list[Any]:
        """Fixed held-out batches."""
        ...


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


def init_state(params: Params, s: Settings) -> TrainState:
    """The state before the first step; the average starts at the parameters."""
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimiser(s).init(params))


def train_step(objective: Objective, s: Settings, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
    """One update: losses, gradient, AdamW, average."""
    key = jax.random.fold_in(jax.random.key(s.seed), state.step)

    def total(params: Params) -> tuple[Array, dict[str, Array]]:
        losses = objective.losses(params, batch, key)
        weighted = [objective.weights[name] * value for name, value in losses.items()]
        return jnp.stack(weighted).sum(), losses

    (loss, losses), grads = jax.value_and_grad(total, has_aux=True)(state.params)
    losses = losses | {"total": loss}
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


def fit(
    objective: Objective,
    source: Source,
    params: Params,
    s: Settings,
    out: Path,
    *,
    on_log: Callable[[dict], None] = lambda row: None,
) -> tuple[Params, int]:
    """Trains, or goes on training.

    Args:
      objective: what is minimised.
      source: of batches.
      params: initial parameters; ignored when `out` holds a checkpoint of this run.
      s: settings.
      out: folder of the run: `metrics.jsonl` (one line per log, with step, losses, samples per second; held-out lines
        have `validation`, the objective's measures) and `state/`.
      on_log: called with every row that is written.

    Returns:
      The averaged parameters (NumPy, float32) and the number of steps they have seen.

    Raises:
      ValueError: the batch does not divide over the devices.
      FloatingPointError: the loss is not finite; the last checkpoint is intact.
    """
    state, mesh = init_state(params, s), _mesh(s)
    placed, spread = shardings(mesh, state, s.fsdp), NamedSharding(mesh, PartitionSpec("data"))
    checkpoints = hosts.Checkpoints(out / "state")
    state = hosts.spread(checkpoints.latest(state), placed)
    update, measure = _programs(objective, s, placed, spread)
    checks, key = [hosts.spread(batch, spread) for batch in source.checks()], jax.random.key(s.seed)
    step = start = int(state.step)
    began = last = time.perf_counter()
    late = lambda: s.max_seconds and hosts.agree(time.perf_counter() - began > s.max_seconds)
    with _log(out, on_log) as log:
        recent: list[dict[str, Array]] = []
        for batch in source.batches(s.seed, start):
            if step >= s.steps or late():
                break
            state, metrics = update(state, hosts.spread(batch, spread))
            recent.append(metrics)
            step += 1
            if step % s.log_every == 0 or step == s.steps:
                means = _means(recent)
                _check_finite(means["total"], step)
                seconds, last = time.perf_counter() - last, time.perf_counter()
                log({"step": step, **means, "samples_per_s": len(recent) * s.batch / seconds})
                recent = []
            if step % s.validate_every == 0 or step == s.steps:
                log({"step": step, "validation": _means([measure(state.ema, batch, key) for batch in checks])})
            if step % s.save_every == 0:
                checkpoints.save(step, state)
        if step > start:
            checkpoints.save(step, state)
    checkpoints.close()
    return hosts.gather(state.ema), step


@contextlib.contextmanager
def _log(out: Path, on_log: Callable[[dict], None]) -> Iterator[Callable[[dict], None]]:
    """Writes rows to out/metrics.jsonl and tells them; on the first host only."""
    if not hosts.first():
        yield lambda row: None
        return
    out.mkdir(parents=True, exist_ok=True)
    with (out / "metrics.jsonl").open("a") as file:

        def log(row: dict) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()
            on_log(row)

        yield log


def _mesh(s: Settings) -> Mesh:
    """All devices of all hosts, over which batches are spread."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    if s.batch % mesh.size:
        raise ValueError(f"batch: expected a multiple of the {mesh.size} devices, got {s.batch}")
    return mesh


def _programs(objective: Objective, s: Settings, placed: Any, spread: NamedSharding) -> tuple[Callable, Callable]:
    """The step of training, and what is measured on held-out batches."""
    everywhere = NamedSharding(spread.mesh, PartitionSpec())
    shards = {"in_shardings": (placed, spread), "out_shardings": (placed, everywhere)}
    update = xla.jit(partial(train_step, objective, s), **shards, donate_argnums=0)
    return update, xla.jit(objective.measures, out_shardings=everywhere)


def _check_finite(loss: float, step: int) -> None:
    if not np.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss} at step {step}; lower the learning rate and resume")


def _means(rows: list[dict[str, Array]]) -> dict[str, float]:
    rows = jax.device_get(rows)
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
