"""A model that trains in seconds, demonstrations for it and settings of a few steps; shared by tests of training.

python tiny_training.py FOLDER         two steps on all devices; the last layer's weights as FOLDER/w.npy
"""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np

from safe_pruner_jax.model import config as sizes
from safe_pruner_jax.model.config import GemmaConfig, SiglipConfig
from safe_pruner_jax.model.params import draw_params
from safe_pruner_jax.robots.configs import get_config
from safe_pruner_jax.robots.transforms import Tokenizer
from safe_pruner_jax.training import data, imitation, loop

DATA = Path(__file__).parent / "data"


def tiny(depth: int = 1, **changes) -> sizes.Pi0Config:
    """Small enough to compile in seconds; the loop does not care about depth."""
    gemma = GemmaConfig(width=32, depth=depth, mlp_dim=64, num_heads=4, num_kv_heads=1, head_dim=8)
    model = sizes.mini(
        prefix=gemma, expert=gemma, vision=SiglipConfig(16, 1, 32, 2), image_size=28, action_horizon=4, vocab_size=512
    )
    return model.replace(**changes)


def demo(length: int, seed: int, size: int = 28, prompt: str = "pick up the bowl"):
    rng = np.random.default_rng(seed)
    return SimpleNamespace(
        images={k: rng.integers(0, 255, (length, size, size, 3), np.uint8) for k in data.CAMERA_KEYS},
        state=rng.normal(size=(length, 8)),
        actions=rng.uniform(-1, 1, (length, 7)),
        prompt=prompt,
        every=1,
    )


SETTINGS = loop.Settings(
    steps=6, batch=4, draws=2, warmup=1, learning_rate=3e-3, log_every=2, validate_every=3, save_every=2
)


def equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def two_steps(folder: Path):
    """What two steps on all devices make of the last layer's weights."""
    config = dataclasses.replace(get_config("mini_libero"), model=tiny())
    demos = [demo(9, 0), demo(6, 1)]
    made = data.make_samples(demos, config, data.norm_stats(demos), Tokenizer(DATA / "toy_sentencepiece.model", 200))
    settings = dataclasses.replace(SETTINGS, steps=2, augment=False, fsdp=True)
    params, _ = imitation.imitate(tiny(), made, draw_params(tiny()), settings, folder)
    return params["action_out_proj"]["kernel"]


if __name__ == "__main__":
    np.save(Path(sys.argv[1]) / "w.npy", two_steps(Path(sys.argv[1])))
    print(len(jax.devices()))
