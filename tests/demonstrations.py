"""Demonstrations of smooth pictures and random numbers; shared by tests."""

import numpy as np

from safe_pruner_jax.libero.demonstrations import Demo

STEPS, SIDE = 5, 32


def demo(seed=0, steps=STEPS, side=SIDE, every=1) -> Demo:
    """Smooth moving pictures, different in every corner, and random numbers."""
    generator = np.random.default_rng(seed)
    y, x, t = np.meshgrid(np.arange(side), np.arange(side), np.arange(steps), indexing="ij")
    picture = np.stack([255 * x / side, 255 * y / side, 128 + 10 * t], -1).transpose(2, 0, 1, 3).astype(np.uint8)
    extra = {
        "states": generator.normal(size=(steps, 20)),
        "robot_states": generator.normal(size=(steps, 9)),
        "joint_states": generator.normal(size=(steps, 7)),
    }
    return Demo(
        {"observation/image": picture[::every], "observation/wrist_image": picture[::every, :, ::-1].copy()},
        generator.normal(size=(steps, 8)).astype(np.float32),
        generator.normal(size=(steps, 7)).astype(np.float32),
        "pick up the butter",
        suite="libero_object",
        task=6,
        name="pick_up_the_butter",
        seed=seed,
        every=every,
        extra=extra,
    )
