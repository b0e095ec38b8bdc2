"""Robots without a model, for simulators without a simulator, and the file of their records."""

import numpy as np

from safe_pruner_jax.evaluation.workers import PolicyFailed

SUITE = "libero_object"


class FakeRobots:
    """Actions without a model; `failing` are the calls that raise instead."""

    def __init__(self, failing=()):
        self.started, self.calls, self.failing, self.together = [], 0, failing, []

    def start(self, name, seed):
        self.started.append(seed)

    def step(self, requests):
        self.together.append(len(requests))
        replies = {}
        for name in requests:
            self.calls += 1
            pruning = {"keyframe": True, "kept": 512, "alive": 512, "views": ["a", "b"], "text": 16}
            timing = {"infer_ms": 1.0, "batch": len(requests)}
            reply = {"actions": np.zeros((10, 7)), "pruning": pruning, "policy_timing": timing}
            replies[name] = PolicyFailed("OSError: no") if self.calls in self.failing else reply
        return replies
