"""openpi's tiny checkpoint as a policy of this package, requests for it and a scene that moves; shared by tests.

Fixtures of `conftest.py` hold the policies that several modules share, so that each program is compiled once.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from safe_pruner_jax.analysis.episodes import Call
from safe_pruner_jax.engine import xla
from safe_pruner_jax.engine.engine import Engine
from safe_pruner_jax.model import pi0
from safe_pruner_jax.model.checkpoint import load_params
from safe_pruner_jax.model.config import GemmaConfig, SiglipConfig
from safe_pruner_jax.policy.loading import load_policy
from safe_pruner_jax.policy.policy import Policy
from safe_pruner_jax.pruners import full, safe
from safe_pruner_jax.robots.configs import get_config
from safe_pruner_jax.robots.transform import RobotIO
from safe_pruner_jax.robots.transforms import Tokenizer, load_norm_stats
from safe_pruner_jax.tokens import PROMPT_LENGTHS

DATA = Path(__file__).parent / "data"
TOKENS = 16
"""Tokens per camera of the small policy."""
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


def small_config():
    """The tiny model on pictures of 56 pixels."""
    config = tiny_config(discrete=False)
    return dataclasses.replace(config, model=config.model.replace(image_size=56))


def small_params(dtype: str = "bfloat16") -> dict:
    """The tiny checkpoint with every fourth row and column of its positions."""
    model = tiny_config(discrete=False).model
    params = load_params(FILES["checkpoint"], model, dtype=dtype)
    image = params["PaliGemma"]["img"]
    table = image["pos_embedding"].reshape(1, model.grid, model.grid, -1)
    image["pos_embedding"] = table[:, 2::4, 2::4].reshape(1, TOKENS, -1)
    return params


def load_small(pruner=None, *, num_steps: int = 10, prompt_lengths: tuple[int, ...] = PROMPT_LENGTHS) -> Policy:
    """The tiny policy on pictures of 56 pixels.

    It has 16 tokens per camera, not 256: programs that are compiled without optimisation take a third of a second for a
    step on 512.
    """
    config = small_config()
    prepare = jax.jit(pi0.prepare, static_argnums=1, static_argnames=("num_steps", "upright"))
    weights = prepare(small_params(), config.model, num_steps=num_steps, upright=xla.upright(config.model.dtype))
    stats = load_norm_stats(FILES["checkpoint"], config.asset_id)
    io = RobotIO(config, stats, Tokenizer(FILES["tokenizer"], config.model.max_token_len))
    return Policy(Engine(weights, config.model, pruner or full()), io, prompt_lengths=prompt_lengths)


def pruned_after_the_first(num_steps: int, prompt_lengths: tuple[int, ...]) -> Policy:
    """The small policy with SAFE; its first step is a keyframe and no other."""
    return load_small(safe(keep=0.2, threshold=-1.0), num_steps=num_steps, prompt_lengths=prompt_lengths)


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
