"""Named configs with invented statistics and a toy tokenizer, and requests for them; shared by tests of robots."""

from pathlib import Path

import numpy as np

from safe_pruner_jax.robots.transform import RobotIO
from safe_pruner_jax.robots.transforms import NormStats, Tokenizer

DATA = Path(__file__).parent / "data"


def fake_stats(dim, seed=0):
    rng = np.random.default_rng(seed)
    low = rng.normal(size=dim)
    return NormStats(low, rng.uniform(0.5, 2, dim), low - 1, low + rng.uniform(1, 3, dim))


def robot_io(config, stats=None, **more):
    stats = stats or {
        "state": fake_stats(config.robot.state_dim),
        "actions": fake_stats(config.robot.action_dim, 1),
    }
    return RobotIO(config, stats, Tokenizer(DATA / "toy_sentencepiece.model", config.model.max_token_len), **more)


def request_of(robot, seed=0):
    return robot.example(np.random.default_rng(seed))
