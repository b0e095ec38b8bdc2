"""A simulator without a simulator, for worker processes: no jax here. Task and trial decide what happens."""

import os
import signal
import time
from pathlib import Path

import numpy as np

from safe_pruner_jax.libero.env import StepResult, Task
from safe_pruner_jax.libero.simulator import LiberoUnavailable

SOLVED_AFTER, LIMIT, TRIALS = 7, 12, 20
PROMPTS = ("push the plate", "push the bowl")


class FakeEnv:
    """Even trials are solved after SOLVED_AFTER steps, odd ones never; requests are pictures of task, trial, step."""

    num_init_states, max_steps = TRIALS, LIMIT

    def __init__(self, suite, task):
        self.task = Task(suite, task, f"task_{task}", PROMPTS[task % 2], Path("scene.bddl"))
        self.trial, self.steps = None, 0

    def reset(self, init_state):
        self.trial, self.steps = init_state, 0
        return self.observe()

    def observe(self):
        rng = np.random.default_rng((self.task.index, self.trial, self.steps))
        image = lambda: rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)
        images = {"observation/image": image(), "observation/wrist_image": image()}
        return {**images, "observation/state": rng.uniform(-1, 1, 8), "prompt": self.task.language}

    def step(self, action):
        assert action.shape == (7,)
        self.steps += 1
        success = self.trial % 2 == 0 and self.steps == SOLVED_AFTER
        return StepResult(success, success or self.steps == LIMIT)

    def close(self):
        pass


class Killed(FakeEnv):
    """Trial 1 kills its process in mid-episode."""

    def step(self, action):
        if self.trial == 1 and self.steps == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


class AlwaysKilled(FakeEnv):
    """Every trial does."""

    def step(self, action):
        os.kill(os.getpid(), signal.SIGKILL)


class Stuck(FakeEnv):
    """Trial 1 never comes back."""

    def step(self, action):
        if self.trial == 1:
            time.sleep(600)
        return super().step(action)


class Broken(FakeEnv):
    """A simulator that fails at every step."""

    def step(self, action):
        raise RuntimeError("contact buffer full")


class Slow(FakeEnv):
    """Gives a test the time to interrupt."""

    def step(self, action):
        time.sleep(0.3)
        return super().step(action)


def missing(suite, task):
    raise LiberoUnavailable("LIBERO is not installed: run this")


class Scripted:
    """The part of LiberoEnv that a rollout uses; solved after `solved_after` steps."""

    task = Task("libero_goal", 3, "name", "push the plate", Path("scene.bddl"))
    max_steps = 23

    def __init__(self, solved_after=None):
        self.solved_after, self.actions, self.observed = solved_after, [], 0

    def reset(self, init_state):
        self.actions, self.init_state = [], init_state
        return self.observe()

    def observe(self):
        self.observed += 1
        return {"prompt": "push the plate", "step": len(self.actions)}

    def step(self, action):
        assert len(self.actions) < self.max_steps
        self.actions.append(action)
        success = len(self.actions) == self.solved_after
        return StepResult(success, success or len(self.actions) == self.max_steps)


def chunk(request):
    """Actions that carry the step at which they are meant to be executed."""
    return {"actions": np.tile(request["step"] + np.arange(10)[:, None], (1, 7))}
