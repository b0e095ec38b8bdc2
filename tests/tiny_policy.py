"""openpi's tiny checkpoint as a policy of this package, requests for it and a scene that moves; shared by tests.

Fixtures of `conftest.py` hold the policies that several modules share, so that each program is compiled once.
"""

import dataclasses
from pathlib import Path

import numpy as np

from safe_pruner_jax.analysis.episodes import Call
from safe_pruner_jax.model.config import GemmaConfig, SiglipConfig
from safe_pruner_jax.policy.loading import load_policy
from safe_pruner_jax.pruners import safe
from safe_pruner_jax.robots.configs import get_config

DATA = Path(__file__).parent / "data"
FILES = {"checkpoint": DATA / "ckpt_tiny_pi05", "tokenizer": DATA / "toy_sentencepiece.model"}

GEMMA = GemmaConfig(width=64, depth=4, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=16)


def tiny_config(discrete: bool):
    """openpi's pi05_libero on the tiny model the reference was made with."""
    config = get_config("pi05_libero")
    model = config.model.replace(
        prefix=GEMMA,
        expert=GEMMA,
        vision=SiglipConfig(width=32, depth=2, mlp_dim=128, num_heads=2),
        vocab_size=512,
        dtype="float32",
        discrete_state_input=discrete,
    )
    return dataclasses.replace(config, model=model)


def load_tiny(discrete: bool, pruner=None, checkpoint="ckpt_tiny_pi05"):
    return load_policy(
        tiny_config(discrete),
        DATA / checkpoint,
        pruner=pruner,
        tokenizer=DATA / "toy_sentencepiece.model",
        param_dtype="bfloat16",  # as openpi's loader does, whatever the activations
    )


def request(robot: int, step: int = 0, **changes) -> dict:
    rng = np.random.default_rng([robot, step])
    scene = np.random.default_rng(robot).integers(0, 200, (16, 16, 3), np.uint8) + rng.integers(
        0, 9, (16, 16, 3), np.uint8
    )
    image = np.kron(scene, np.ones((14, 14, 1), np.uint8))
    return {
        "observation/image": image,
        "observation/wrist_image": image[::-1],
        "observation/state": rng.random(8),
        "prompt": "pick up the bowl",
    } | changes


def pruned_after_the_first(num_steps: int, prompt_lengths: tuple[int, ...]):
    """The tiny policy with SAFE; its first step is a keyframe and no other."""
    choices = {"pruner": safe(keep=0.2, threshold=-1.0), "num_steps": num_steps, "prompt_lengths": prompt_lengths}
    return load_policy(tiny_config(False), **FILES, **choices)


def moving_scene(steps: int = 8, cut_at: int = 5) -> list[Call]:
    """A bright square that wanders over a gradient; at `cut_at` the scene turns over and the gripper closes."""
    y, x = np.mgrid[:224, :224]
    calls = []
    for t in range(steps):
        image = np.stack([x, y, (x + y) // 2], -1).astype(np.uint8)
        image[20 * t : 20 * t + 40, 60:130] = 240
        if t >= cut_at:
            image = 255 - image.transpose(1, 0, 2)
        images = {"observation/image": image, "observation/wrist_image": image[::-1].copy()}
        request = {**images, "observation/state": np.zeros(8), "prompt": "pick up the cheese"}
        calls.append(Call(request, 1.0 if t >= cut_at else -1.0))
    return calls
