"""A simulator and a policy that take a known time and nothing else, for `cluster.py`.

They sleep instead of computing, so on few cores the machinery around them is measured and not the cores.
"""

import dataclasses
import time
from collections.abc import Hashable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from safe_pruner_jax.libero.env import StepResult, Task

IDENTITY = {"policy": "toy"}
SIMULATOR = {"libero": "toy"}


class Robots:
    """Replies of zeros, `seconds` after they were asked for, for all who ask together."""

    def __init__(self, seconds: float):
        self._seconds = seconds

    def start(self, name: Hashable, seed: int | None) -> None:
        """Every episode is the same."""

    def step(self, requests: Mapping[Any, dict]) -> dict[Any, dict]:
        """One device step."""
        time.sleep(self._seconds)
        timing = {"infer_ms": self._seconds * 1e3, "batch": len(requests)}
        return {name: {"actions": np.zeros((10, 7)), "policy_timing": timing} for name in requests}


@dataclasses.dataclass(frozen=True)
class Load:
    """Loads `Robots` on a node."""

    seconds: float

    def __call__(self) -> tuple[dict[str, Any], Any]:
        """What it is, and the source."""
        return IDENTITY, SimpleNamespace(robots=Robots(self.seconds), device="toy")


def look() -> dict[str, str]:
    """What the simulator of a node is."""
    return SIMULATOR


class Env:
    """Two pictures of 224 × 224 per observation, `seconds` per step, an end after `max_steps`."""

    num_init_states = 1000

    def __init__(self, suite: str, task: int, seconds: float, max_steps: int):
        self.task = Task(suite, task, "toy", "push the plate", Path("scene.bddl"))
        self.max_steps, self._seconds, self._steps = max_steps, seconds, 0

    def reset(self, init_state: int) -> dict[str, Any]:
        """The first observation."""
        self._steps, self._rng = 0, np.random.default_rng(init_state)
        return self.observe()

    def observe(self) -> dict[str, Any]:
        """Noise."""
        image = lambda: self._rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)
        images = {"observation/image": image(), "observation/wrist_image": image()}
        return {**images, "observation/state": np.zeros(8), "prompt": self.task.language}

    def step(self, action: np.ndarray) -> StepResult:
        """Sleeps."""
        time.sleep(self._seconds)
        self._steps += 1
        return StepResult(False, self._steps == self.max_steps)

    def close(self) -> None:
        """Nothing is open."""


@dataclasses.dataclass(frozen=True)
class MakeEnv:
    """Makes an `Env` in a simulator's process."""

    seconds: float
    max_steps: int

    def __call__(self, suite: str, task: int) -> Env:
        """The environment of any task."""
        return Env(suite, task, self.seconds, self.max_steps)
