"""Joins model and pruner: three compiled programs and the keyframe dispatch between them.

    shallow   images, prompt → layers before the cut → evidence → vmap(pruner.step)      one keyframe bit per robot
    full      the rest of the step with all alive tokens; leaves late saliency behind
    pruned    the rest of the step with the selected tokens, through the later cuts of the plan if it has any

Each is a pure function of (weights, control state, inputs), see `programs`. The host reads the keyframe bits and runs
`full` on the rows that are keyframes and `pruned` on the others, padded to a few batch sizes: under `vmap` a
`lax.cond` would run both for everybody. Nothing else crosses between host and device implicitly.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.engine.capture import captured_shape
from safe_pruner_jax.engine.programs import Carry, finish, shallow
from safe_pruner_jax.engine.state import ControlState, Inputs
from safe_pruner_jax.engine.xla import Step
from safe_pruner_jax.model import pi0
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.model.guidance import Guide
from safe_pruner_jax.pruners.base import NO_HISTORY, Evidence, Pruner, Selection

BATCH_SIZES = (1, 2, 4, 8)
"""Row counts the second half of a step is compiled for; larger batches take the next power of two."""


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


def _take(carry: Carry, rows: Array) -> Carry:
    """Some rows of a batch: rows [b] int32, repeats allowed."""
    return jax.tree.map(lambda a: a[rows], carry)


def _merge(full: Any, pruned: Any, source: Array) -> Any:
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
        self.shallow = Step(partial(shallow, config, self.pruner), config.savings)
        self._take, self._merge = jax.jit(_take), jax.jit(_merge)
        second = lambda pruned: Step(partial(finish, config, self.pruner, pruned), config.savings)
        self.second = {pruned: second(pruned) for pruned in (False, True)}
        self.full, self.pruned = self._second_half(False), self._second_half(True)
        self._blank = cache(self._make_blank)  # one per number of cameras

    def _second_half(self, pruned: bool) -> Callable[[pi0.Weights, Carry, Array | None], tuple[Array, ControlState]]:
        """`finish` for rows [b] of a carry, None for all; compiled per number of rows, whatever the batch was."""
        program = self.second[pruned]
        return lambda weights, carry, rows: program(weights, carry if rows is None else self._take(carry, rows))

    def init(self, seeds: tuple[int, ...], cameras: int) -> ControlState:
        """State of fresh robots, one per seed, for a layout of `cameras` encoded cameras.

        Raises:
          ValueError: the pruner's `keep` is a count above the number of visual tokens.
        """
        blank, B = self._blank(cameras), len(seeds)
        batched = jax.tree.map(lambda a: jnp.broadcast_to(a, (B, *a.shape)), blank)
        return batched.replace(key=jnp.stack([jax.random.key(s) for s in seeds]))

    def _make_blank(self, cameras: int) -> ControlState:
        """What `init` gives every robot, without axis B and without a key."""
        config, plan = self.config, self.plan
        n, shape = cameras * config.tokens_per_camera, jax.ShapeDtypeStruct
        if (keep := max((c.keep for c in plan.cuts), default=1)) > n:
            most = f"{n} visual tokens ({cameras} cameras × {config.tokens_per_camera})"
            raise ValueError(f"keep: expected at most {most}, got {keep}; lower keep or give a share in (0, 1]")
        T, heads = config.max_token_len, config.prefix.num_heads  # the longest prompt; no state may depend on it
        captured = lambda c: shape(captured_shape(c, n, T, heads), jnp.float32)
        memory = {  # of the step before, of which there is none
            "late": shape((len(plan.late_layers), n), jnp.float32),
            "past": tuple(map(captured, plan.remember)),
            "actions": shape((config.action_horizon, config.action_dim), jnp.float32),
        }
        rows = shape((n, config.prefix.width), config.dtype)
        evidence = Evidence(
            since_full=shape((), jnp.int32),
            visual=rows,
            alive=shape((n,), bool),
            running=shape((n,), bool),
            camera=shape((n,), jnp.int32),
            saliency=tuple(map(captured, plan.capture)),
            key=jax.eval_shape(lambda: jax.random.key(0)),
            text=shape((T, config.prefix.width), config.dtype),
            text_alive=shape((T,), bool),
            hidden=rows,
            patches=shape((n, 3 * config.vision.patch**2), jnp.uint8),
            **memory,
        )
        kv = jnp.zeros((n, config.prefix.num_kv_heads, config.prefix.head_dim), config.dtype)
        return ControlState(
            pruner=self.pruner.init(evidence),
            since_full=jnp.full((), NO_HISTORY, jnp.int32),
            alive=jnp.zeros(n, bool),
            running=jnp.zeros(n, bool),
            key=(),
            kv=((kv, kv),) * (config.depth - plan.cut.layer) if plan.dropped == "reuse" else (),
            **jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), memory),
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
