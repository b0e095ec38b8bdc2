"""Control steps to be timed: whole ones, and the same cut into phases.

    mode = step_mode(weights, config, layout, safe(keep=0.2))          a pruned step behind its keyframe
    mode.step(); mode.marks["vision"](); …                             each runs to the end

A step is timed from the packed observation on the host to the actions on the host. Phases are differences between
prefixes of that step, each a program of its own, so they add up to the whole by construction:

    vision    images → visual tokens
    shallow   + the layers before the cut
    decision  + saliency, the pruner, and its bit on the host
    denoise   the expert over keys and values of the lengths it finds there
    rest      the second half of the step without `denoise`: the layers behind the cut, late saliency
    host      packing, copies and dispatch: the whole step without all of the above
"""

import dataclasses
import functools
import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from safe_pruner_jax.bench.machine import Limits
from safe_pruner_jax.engine import xla
from safe_pruner_jax.engine.engine import Engine
from safe_pruner_jax.engine.flops import exact_flops, keys_per_layer, tokens_per_layer
from safe_pruner_jax.engine.programs import embed
from safe_pruner_jax.engine.state import Inputs
from safe_pruner_jax.model import pi0
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.model.gemma import Segment
from safe_pruner_jax.model.params import param_shapes
from safe_pruner_jax.policy.policy import pack
from safe_pruner_jax.pruners import Pruner, factory
from safe_pruner_jax.robots.transforms import Example
from safe_pruner_jax.timing import Step
from safe_pruner_jax.tokens import PrefixLayout

PHASES = ("vision", "shallow", "decision", "rest", "denoise", "host")
"""In the order in which they run."""


@dataclass(frozen=True, eq=False)
class Mode:
    """One kind of control step.

    Args:
      name: in tables.
      robots: per step.
      step: the whole step.
      marks: programs whose times `phases` takes differences of; empty where phases are not asked for.
      facts: tokens per layer, counts of FLOPs and bytes, seconds of the first steps
        (compilation), and whether the method has keyframes
        ("refreshes"): plain numbers.
    """

    name: str
    robots: int
    step: Step
    marks: dict[str, Step]
    facts: dict[str, Any]

    def phases(self, times: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Times of the phases [rounds], from those of the whole step ("step") and of the marks."""
        if not self.marks:
            return {}
        t = times
        return {
            "vision": t["vision"],
            "shallow": t["before"] - t["vision"],
            "decision": t["decided"] - t["before"],
            "rest": t["second"] - t["denoise"],
            "denoise": t["denoise"],
            "host": t["step"] - t["decided"] - t["second"],
        }


def random_weights(config: Pi0Config, num_steps: int = 10, *, upright: bool | None = None) -> pi0.Weights:
    """Prepared weights of a model's sizes with random content, made in place: no checkpoint, no second copy.

    Time and memory of a step depend on shapes and dtypes alone.
    """
    block = np.random.default_rng(0).standard_normal(2**20).astype(np.float32)

    def leaf(s: jax.ShapeDtypeStruct) -> jax.Array:
        if len(s.shape) < 2:
            return jnp.full(s.shape, 0.5, s.dtype)
        return jnp.asarray(np.resize(block * s.shape[-2] ** -0.5, s.shape), s.dtype)

    return jax.tree.map(leaf, shapes_of(config, num_steps, upright=upright))


def shapes_of(config: Pi0Config, num_steps: int = 10, *, upright: bool | None = None) -> pi0.Weights:
    """Prepared weights as `jax.ShapeDtypeStruct` leaves, from parameters of the activation dtype.

    Args:
      config: the model.
      num_steps: denoise steps.
      upright: see `pi0.prepare`; None: as on this machine policies are loaded.
    """
    upright = xla.upright(config.dtype) if upright is None else upright
    stored = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, config.dtype), param_shapes(config))
    return jax.eval_shape(partial(pi0.prepare, config=config, num_steps=num_steps, upright=upright), stored)


def example_of(config: Pi0Config, views: int, prompt: int) -> Example:
    """An observation with `views` real cameras and `prompt` alive tokens, random pixels."""
    rng, size = np.random.default_rng(0), config.image_size
    if not 1 <= views <= len(config.cameras):
        raise ValueError(f"views: expected 1 to {len(config.cameras)}, got {views}")
    return Example(
        images={c: rng.integers(0, 255, (size, size, 3), np.uint8) for c in config.cameras},
        image_mask={c: i < views for i, c in enumerate(config.cameras)},
        state=np.zeros(config.action_dim, np.float32),
        tokens=rng.integers(1, config.vocab_size, prompt).astype(np.int32),
    )


def make(name: str, keep: float, **choices: Any) -> Pruner:
    """A pruner at a share kept; one with a keyframe threshold never refreshes by itself, so that its steps repeat."""
    made = factory(name)
    known = inspect.signature(made).parameters
    choices = {"keep": keep, "threshold": -1.0} | choices
    return made(**{key: value for key, value in choices.items() if key in known})


def step_mode(
    name: str,
    weights: pi0.Weights,
    config: Pi0Config,
    layout: PrefixLayout,
    example: Example,
    pruner: Pruner,
    *,
    robots: int = 1,
    keyframes: int | None = None,
    phases: bool = True,
) -> Mode:
    """Compiles a control step and what is needed to time its phases.

    Args:
      name: of the mode.
      weights, config: the model.
      layout: cameras and prompt slots.
      example: what every robot sees.
      pruner: what decides.
      robots: per step.
      keyframes: how many of them run the full path; None: all with a plan without a cut, none otherwise.
      phases: whether to prepare the marks; only robots that agree have phases.

    Raises:
      ValueError: the pruner never takes a pruned step on a still scene.
    """
    engine = Engine(weights, config, pruner)
    plan, B = engine.plan, robots
    keyframes = (B if plan.cut is None else 0) if keyframes is None else keyframes
    host = pack([example] * B, layout)
    fresh = engine.init(tuple(range(B)), len(layout.cameras))
    start = time.perf_counter()
    settled = fresh if plan.cut is None else _settled(engine, fresh, host)
    refreshes = plan.cut is not None and settled is not fresh
    control = _mix(fresh, settled, keyframes)
    inputs = jax.device_put(host)
    _, _, info = engine.step(control, inputs)
    if int(info.keyframe.sum()) != keyframes:
        raise ValueError(f"{name}: expected {keyframes} of {B} robots on the full path, got {int(info.keyframe.sum())}")
    facts: dict[str, Any] = {"first_steps_s": time.perf_counter() - start, "robots": B, "keyframes": keyframes}
    facts["refreshes"] = refreshes

    def step() -> None:
        actions, _, _ = engine.step(control, jax.device_put(host))
        jax.device_get(actions)

    marks: dict[str, Step] = {}
    if keyframes in (0, B):
        pruned = keyframes == 0
        layers = tokens_per_layer(plan, layout, config.depth, pruned=pruned)
        counted = exact_flops(config, plan, layout, pruned=pruned, num_steps=len(weights.schedule.times))
        facts |= {"tokens_per_layer": list(layers), "macs": dataclasses.asdict(counted) | {"total": counted.total}}
        facts["weight_bytes"] = weight_bytes(weights)
        if phases:
            keys = keys_per_layer(plan, layout, config.depth, pruned=pruned)
            marks = _marks(engine, control, inputs, keys, pruned, facts)
    return Mode(name, B, step, marks, facts)


def _settled(engine: Engine, control: Any, host: Inputs, tries: int = 4) -> Any:
    """The state before the first step without a keyframe on a scene that stands still."""
    for _ in range(tries):
        before = control
        _, control, info = engine.step(control, jax.device_put(host))
        if not info.keyframe.any():
            return before
    raise ValueError(f"{engine.pruner.name}: expected a pruned step on a still scene, got {tries} keyframes")


def _mix(fresh: Any, settled: Any, keyframes: int) -> Any:
    """The first robots fresh, the others settled."""
    if not keyframes or fresh is settled:
        return settled
    return jax.tree.map(lambda a, b: jnp.concatenate([a[:keyframes], b[keyframes:]]), fresh, settled)


def _marks(engine: Engine, control: Any, inputs: Inputs, keys: Sequence[int], pruned: bool, facts: dict) -> dict:
    """Programs for the phases, compiled; XLA's own counts go into `facts`."""
    config, weights = engine.config, engine.weights
    carry = engine.shallow(weights, control, inputs, None)
    B, c = inputs.tokens.shape[0], config.prefix
    ones = lambda n: jnp.ones((B, n, c.num_kv_heads, c.head_dim), config.dtype)
    segments = tuple(Segment(ones(n), ones(n), jnp.ones((B, 1, n), bool)) for n in keys)
    prefix = pi0.Prefix(segments, jnp.full(B, max(keys), jnp.int32))
    noise = jnp.ones((B, config.action_horizon, config.action_dim))
    programs: dict[str, tuple[Any, tuple]] = {
        "vision": (_vision(config), (weights, inputs)),
        "before": (_before(config, engine.plan.cut.layer if engine.plan.cut else 0), (weights, inputs)),
        "decided": (engine.shallow, (weights, control, inputs, None)),
        "second": (engine.second[pruned], (weights, carry)),
        "denoise": (_denoise(config), (weights, prefix, inputs.state, noise)),
    }
    facts["xla_flops"], facts["xla_bytes"], marks = {}, {}, {}
    for name, (program, arguments) in programs.items():
        # of the program as it is written, before XLA's own simplifications
        cost = program.lower(*arguments).cost_analysis() or {}
        facts["xla_flops"][name], facts["xla_bytes"][name] = cost.get("flops"), cost.get("bytes accessed")
        marks[name] = partial(_wait, program, arguments)
    return marks


@functools.cache
def _vision(config: Pi0Config) -> Callable:
    return xla.jit(lambda weights, inputs: pi0.embed_images(weights, config, inputs.images))


@functools.cache
def _before(config: Pi0Config, cut: int) -> Callable:
    def run(weights: pi0.Weights, inputs: Inputs) -> Any:
        return pi0.prefix_layers(weights, config, embed(weights, config, inputs), range(cut))[:2]

    return xla.jit(run)


@functools.cache
def _denoise(config: Pi0Config) -> Callable:
    return xla.jit(lambda weights, *rest: pi0.sample(weights, config, *rest)[0])


def _wait(program: Callable, arguments: tuple) -> None:
    jax.block_until_ready(program(*arguments))


def weight_bytes(weights: pi0.Weights) -> dict[str, int]:
    """Bytes of weights (or of their shapes) that a step reads, part by part.

    The expert's once per denoise step; of the last prefix layer only what keys and values need.
    """
    size = lambda tree: sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))
    last = weights.prefix[-1]
    queries = last.out.shape[0] * last.qkv.shape[0] * last.qkv.dtype.itemsize
    return {
        "vision": size(weights.vision),
        "prefix": size(weights.prefix) - size((last.out, last.gate_up, last.down)) - queries,
        "expert": len(weights.schedule.times) * size(weights.expert),
    }


def roofline_s(macs: dict[str, int], weight_bytes: dict[str, int], limits: Limits) -> float:
    """Least time of a step: part by part the larger of its products and of reading its weights once per use."""
    parts = {
        "vision": macs["vision"],
        "prefix": macs["prefix"] + macs["matching"],
        "expert": macs["capture"] + macs["expert"],
    }
    return sum(limits.seconds(count, weight_bytes[part]) for part, count in parts.items())
