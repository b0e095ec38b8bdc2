"""A policy and a simulator without either, for actors of a cluster; what runs on its nodes imports no jax."""

import os
import signal
import time
from types import SimpleNamespace

import fake_libero
import numpy as np

from safe_pruner_jax.evaluation.workers import PolicyFailed
from safe_pruner_jax.libero.env import StepResult
from safe_pruner_jax.libero.simulator import LiberoUnavailable

IDENTITY = {"policy": "toy", "checkpoint": "0123456789ab"}
SIMULATOR = {"libero": "toy 1"}


class Robots:
    """Actions that depend on a robot's seed and its requests since then, and on nobody else's."""

    def __init__(self):
        self._states = {}

    def start(self, name, seed):
        self._states[name] = seed

    def step(self, requests):
        return {name: self._reply(name, request, len(requests)) for name, request in requests.items()}

    def _reply(self, name, request, together):
        if name not in self._states:
            return PolicyFailed(f"KeyError: {name} was never started")
        self._states[name] = (self._states[name] * 31 + int(request["observation/image"].sum())) % 2**31
        rng = np.random.default_rng(self._states[name])
        pruning = {"keyframe": bool(rng.random() < 0.5), "kept": int(rng.integers(512)), "alive": 512}
        timing = {"infer_ms": 1.0, "batch": together}
        return {"actions": rng.normal(size=(10, 7)), "pruning": pruning, "policy_timing": timing}


class Env(fake_libero.FakeEnv):
    """Solved when the actions have added up to enough; 50 ms per step."""

    max_steps, pause_s = 20, 0.05

    def reset(self, init_state):
        self.sum = 0.0
        return super().reset(init_state)

    def step(self, action):
        time.sleep(self.pause_s)
        self.steps += 1
        self.sum += float(action.sum())
        success = self.sum > 12
        return StepResult(success, success or self.steps == self.max_steps)


class Killed(Env):
    """Trial 1 kills its process in mid-episode."""

    def step(self, action):
        if self.trial == 1 and self.steps == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


def load():
    """A policy as `actors.Policy` loads it."""
    return IDENTITY, SimpleNamespace(robots=Robots(), device="toy")


def load_another():
    """The same policy with another checkpoint."""
    return IDENTITY | {"checkpoint": "ffffffffffff"}, SimpleNamespace(robots=Robots(), device="toy")


def load_nothing():
    """A node without the checkpoint."""
    raise FileNotFoundError("no checkpoint at /data/pi05")


def look():
    """What the simulator of a node is."""
    return SIMULATOR


def look_another():
    """A node with another one."""
    return {"libero": "toy 2"}


def look_in_vain():
    """A node without a simulator."""
    raise LiberoUnavailable("LIBERO is not installed: run this")
