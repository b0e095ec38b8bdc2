"""Many robots on one device: whoever waits is served in one `Engine.step`, each with its own control state and noise.

robots = Robots(policy)
robots.start("left", seed=1); robots.start("right", seed=2)
replies = robots.step({"left": request, "right": request})           robot → reply
"""

import logging
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from safe_pruner_jax.engine import ControlState, batch_size
from safe_pruner_jax.evaluation.workers import PolicyFailed
from safe_pruner_jax.observation import Example
from safe_pruner_jax.policy import Policy, layout_of, pack
from safe_pruner_jax.tokens import PrefixLayout

logger = logging.getLogger(__name__)


@dataclass
class _Robot:
    """One episode on the device; as in `policy.Session`, another prompt or set of cameras starts afresh."""

    seed: int
    control: ControlState | None = None
    prompt: Any = None
    cameras: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Asked:
    """A robot's request, ready for the network, and what `finish` needs."""

    robot: _Robot
    name: Hashable
    example: Example
    context: Any
    prompt: Any


class Robots:
    """Many robots on one device, each with its own control state; the batched counterpart of `policy.Session`.

    Args:
      policy: shared by all.
      limit: robots per device step. With 1 a robot's replies are bit for bit those of a session of its own; in a
        larger batch they equal them up to rounding.
    """

    def __init__(self, policy: Policy, limit: int = 8):
        if limit < 1:
            raise ValueError(f"batch: expected at least 1, got {limit}")
        self.policy, self.limit = policy, limit
        self._robots: dict[Hashable, _Robot] = {}
        self._compiled: set[tuple] = set()

    def start(self, name: Hashable, seed: int) -> None:
        """A new episode of a robot, with the noise of a seed."""
        self._robots[name] = _Robot(seed)

    def step(self, requests: Mapping[Hashable, dict[str, Any]]) -> dict[Hashable, dict[str, Any] | PolicyFailed]:
        """One control step of the robots that ask; robots of one layout share device steps.

        Args:
          requests: robot → request.

        Returns:
          robot → reply as `Session.infer` gives it, or what went wrong for this robot. "policy_timing" also has
          `batch`, the robots of the device step, and `compiled`, whether it had to compile; "pruning" has no `index`,
          but the layout: `views` and `text` slots.
        """
        replies: dict[Hashable, dict[str, Any] | PolicyFailed] = {}
        groups: dict[PrefixLayout, list[_Asked]] = {}
        config = self.policy.engine.config
        for name, request in requests.items():
            try:
                example, context = self.policy.transform.prepare(request)
                layout = layout_of(example, config, self.policy.prompt_lengths)
            except Exception as error:  # this robot's episode, and no other's
                replies[name] = _failed(error)
                continue
            asked = _Asked(self._robots[name], name, example, context, request.get("prompt"))
            groups.setdefault(layout, []).append(asked)
        for layout, group in groups.items():
            for first in range(0, len(group), self.limit):
                part = group[first : first + self.limit]
                try:
                    replies |= self._together(layout, part)
                except Exception as error:  # the device refuses: an outcome of these episodes
                    replies |= {asked.name: _failed(error) for asked in part}
        return replies

    def _together(self, layout: PrefixLayout, part: Sequence[_Asked]) -> dict[Hashable, dict[str, Any] | PolicyFailed]:
        """One device step of robots with one layout, padded by repeating them."""
        engine = self.policy.engine
        rows = np.resize(np.arange(len(part)), batch_size(len(part)))
        controls = [self._control(asked, layout) for asked in part]
        control = _stack(tuple(controls[row] for row in rows))
        inputs = pack([part[row].example for row in rows], layout)

        start = time.perf_counter()
        actions, control, info = engine.step(control, jax.device_put(inputs), None)
        actions, selection = jax.device_get((actions, info.selection))
        timing = {"infer_ms": (time.perf_counter() - start) * 1000, "batch": len(part)}
        full = int(info.keyframe.sum())
        programs = (layout, len(rows), *(batch_size(n) if n else 0 for n in (full, len(rows) - full)))
        timing["compiled"] = programs not in self._compiled
        self._compiled.add(programs)

        replies: dict[Hashable, dict[str, Any] | PolicyFailed] = {}
        for row, asked in enumerate(part):
            if not np.isfinite(actions[row]).all():
                asked.robot.control = None
                replies[asked.name] = _failed(FloatingPointError("the model returned non-finite actions"))
                continue
            asked.robot.control = _row(control, jax.device_put(np.int32(row)))
            asked.robot.prompt, asked.robot.cameras = asked.prompt, layout.cameras
            alive, keyframe = int(inputs.camera_mask[row].sum()) * layout.tokens_per_camera, bool(info.keyframe[row])
            pruning = {
                "kept": alive if keyframe else int(selection.alive[row].sum()),
                "alive": alive,
                "keyframe": keyframe,
                "kappa": None if np.isnan(selection.kappa[row]) else float(selection.kappa[row]),
                "views": list(layout.cameras),
                "text": layout.text,
            }
            reply = self.policy.transform.finish(actions[row], asked.context)
            replies[asked.name] = reply | {"policy_timing": timing, "pruning": pruning}
        return replies

    def _control(self, asked: _Asked, layout: PrefixLayout) -> ControlState:
        robot = asked.robot
        if robot.control is None or robot.prompt != asked.prompt or robot.cameras != layout.cameras:
            return self.policy.engine.init((robot.seed,), len(layout.cameras))
        return robot.control


@jax.jit
def _stack(controls: tuple[ControlState, ...]) -> ControlState:
    """Control states of single robots → of a batch."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *controls)


@jax.jit
def _row(control: ControlState, row: jax.Array) -> ControlState:
    """One robot's control state out of a batch, still with its batch axis."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, row, 1), control)


def _failed(error: Exception) -> PolicyFailed:
    logger.error("the policy failed", exc_info=error)
    return PolicyFailed(f"{type(error).__name__}: {error}")
