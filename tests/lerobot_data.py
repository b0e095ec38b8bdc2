"""A LeRobot dataset of two episodes and what is in it; shared by tests of datasets."""

from pathlib import Path

import numpy as np

from safe_pruner_jax.lerobot.write import Writer
from safe_pruner_jax.robots.configs import get_config

MINI = get_config("mini_libero")
BASE, WRIST = "observation.images.base_0_rgb", "observation.images.left_wrist_0_rgb"


def film(length: int, seed: int = 0, side: int = 64) -> list[np.ndarray]:
    y, x = np.mgrid[:side, :side]
    return [np.stack([3 * x, 3 * y, np.full_like(x, 20 * t + seed)], -1).astype(np.uint8) for t in range(length)]


def numbers(length: int, seed: int = 0, state: int = 8, action: int = 7) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "observation.state": rng.normal(size=(length, state)).astype(np.float32),
        "action": rng.normal(size=(length, action)).astype(np.float32),
        "grid": rng.random((length, 2, 3)) > 0.5,
        "kappa": np.array([np.nan, *rng.random(length - 1)], np.float32),
    }


def two_episodes(folder: Path) -> Path:
    """Writes a dataset of two episodes, 5 and 7 rows."""
    with Writer(folder, 20, "LIBERO") as writer:
        for seed, length in enumerate((5, 7)):
            writer.add(f"task {seed}", {BASE: film(length, seed), WRIST: film(length, 50)}, numbers(length, seed))
    return folder
