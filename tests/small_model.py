"""A model of a few rows and columns with random parameters, and observations for it; shared by tests of the model."""

import jax
import numpy as np
from flax import traverse_util

from safe_pruner_jax.model import pi0
from safe_pruner_jax.model.config import GemmaConfig, Pi0Config, SiglipConfig
from safe_pruner_jax.model.params import param_shapes


def small(pi05=True, **changes):
    """4 tokens per camera, 3 layers, 2 kv heads."""
    config = Pi0Config(
        pi05,
        prefix=GemmaConfig(12, 3, 20, 4, 2, 6),
        expert=GemmaConfig(8, 3, 16, 4, 2, 6),
        vision=SiglipConfig(10, 1, 14, 2),
        vocab_size=31,
        action_dim=5,
        action_horizon=4,
        max_token_len=6,
        image_size=28,
        dtype="float32",
    )
    return config.replace(**changes)


def random_tree(config, seed=0):
    """Parameters without a zero or one among them: initial norms and biases would hide mistakes."""
    rng = np.random.default_rng(seed)

    def leaf(path, a):
        mean = float("img" in path and path.endswith("scale"))
        return (mean + 0.3 * rng.standard_normal(a.shape)).astype(np.float32)

    flat = traverse_util.flatten_dict(param_shapes(config), sep="/")
    return traverse_util.unflatten_dict({path: leaf(path, a) for path, a in flat.items()}, sep="/")


def observation(config, B=2, seed=0):
    """images, camera_mask, tokens, token_mask, state, noise; the last robot has all cameras and a full prompt."""
    rng, C, T = np.random.default_rng(seed), len(config.cameras), config.max_token_len
    camera_mask = np.ones((B, C), bool)
    camera_mask[:-1, -1] = False
    lengths = np.linspace(2, T, B).astype(int)
    return (
        rng.integers(0, 256, (B, C, config.image_size, config.image_size, 3), np.uint8),
        camera_mask,
        rng.integers(0, config.vocab_size, (B, T)).astype(np.int32),
        np.arange(T) < lengths[:, None],
        rng.standard_normal((B, config.action_dim)).astype(np.float32),
        rng.standard_normal((B, config.action_horizon, config.action_dim)).astype(np.float32),
    )


prepare = jax.jit(pi0.prepare, static_argnums=1)
