"""Simulators in parallel on one device: `fleet` for whole rounds of requests, with what an evaluation records.

robots = Robots(policy)
robots.start("left", seed=1); robots.start("right", seed=2)
replies = robots.step({"left": request, "right": request})           robot → reply
"""

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from safe_pruner_jax.engine.engine import batch_size
from safe_pruner_jax.evaluation.workers import PolicyFailed
from safe_pruner_jax.policy.episode import Prepared
from safe_pruner_jax.policy.fleet import Fleet
from safe_pruner_jax.policy.policy import Policy
from safe_pruner_jax.policy.reply import Result

logger = logging.getLogger(__name__)

Part = Sequence[tuple[Hashable, Prepared]]
"""Robots that share a device step, and what they ask."""

Replies = dict[Hashable, dict[str, Any] | PolicyFailed]


class Robots:
    """Many robots on one device, each with its own control state and noise.

    Args:
      policy: shared by all.
      limit: robots per device step. With 1 a robot's replies are bit for bit those of a session of its own; in a
        larger batch they equal them up to rounding.
    """

    def __init__(self, policy: Policy, limit: int = 8):
        self.policy, self.limit = policy, limit
        self._fleet = Fleet(policy, limit, real_time=True)
        self._compiled: set[tuple] = set()

    def start(self, name: Hashable, seed: int) -> None:
        """A new episode of a robot, with the noise of a seed."""
        self._fleet.start(name, seed)

    def step(self, requests: Mapping[Hashable, dict[str, Any]]) -> Replies:
        """One control step of the robots that ask; those of one `Prepared.group` share device steps.

        Args:
          requests: robot → request.

        Returns:
          robot → reply as `Session.infer` gives it, or what went wrong for this robot. "policy_timing" also has
          `batch`, the robots of the device step, and `compiled`, whether it had to compile; "pruning" has no `index`,
          but the layout: `views` and `text` slots.
        """
        replies: Replies = {}
        groups: dict[Hashable, list[tuple[Hashable, Prepared]]] = {}
        for name, request in requests.items():
            try:
                prepared = self._fleet.prepare(name, request)
            except Exception as error:  # this robot's episode, and no other's
                replies[name] = _failed(error)
                continue
            groups.setdefault(prepared.group, []).append((name, prepared))
        for group in groups.values():
            for first in range(0, len(group), self.limit):
                part = group[first : first + self.limit]
                try:
                    replies |= self._together(part)
                except Exception as error:  # the device refuses: an outcome of these episodes
                    replies |= {name: _failed(error) for name, _ in part}
        return replies

    def _together(self, part: Part) -> Replies:
        """One device step of robots of one group."""
        results = self._fleet.step(part)
        compiled = self._compiles(part[0][1].group, results)
        replies: Replies = {}
        for (name, _), result in zip(part, results, strict=True):
            if result.error is not None:
                replies[name] = _failed(result.error)
                continue
            timing = {"infer_ms": result.reply["policy_timing"]["infer_ms"], "batch": len(part), "compiled": compiled}
            pruning = {k: v for k, v in result.pruning.items() if k != "index"}
            replies[name] = result.reply | {"policy_timing": timing, "pruning": pruning}
        return replies

    def _compiles(self, group: Hashable, results: Sequence[Result]) -> bool:
        """Whether this step was the first of its shapes."""
        rows = np.resize([result.pruning["keyframe"] for result in results], batch_size(len(results)))
        full = int(rows.sum())
        programs = (group, len(rows), *(batch_size(n) if n else 0 for n in (full, len(rows) - full)))
        first = programs not in self._compiled
        self._compiled.add(programs)
        return first


def _failed(error: Exception) -> PolicyFailed:
    logger.error("the policy failed", exc_info=error)
    return PolicyFailed(f"{type(error).__name__}: {error}")
