"""openpi's checkpoints of a tiny model, and how trees of parameters are compared; shared by tests of checkpoints."""

import pathlib

import numpy as np
from flax import traverse_util

from safe_pruner_jax.model.config import GemmaConfig, Pi0Config, SiglipConfig

DATA = pathlib.Path(__file__).parent / "data"
GOLDEN = {"value": DATA / "ckpt_tiny_pi05", "pure": DATA / "ckpt_tiny_pi05_purekeys"}
TINY = Pi0Config(
    True,
    prefix=GemmaConfig(64, 4, 128, 8, 1, 16),
    expert=GemmaConfig(64, 4, 128, 8, 1, 16),
    vision=SiglipConfig(32, 2, 128, 2),
    vocab_size=512,
    action_horizon=10,
)


def flat(params) -> dict[str, np.ndarray]:
    return traverse_util.flatten_dict(params, sep="/")


def unflat(leaves: dict[str, np.ndarray]):
    return traverse_util.unflatten_dict(leaves, sep="/")


def assert_equal_trees(got, want) -> None:
    got, want = flat(got), flat(want)
    assert got.keys() == want.keys()
    for k in want:
        assert got[k].dtype == want[k].dtype, k
        np.testing.assert_array_equal(got[k], want[k], err_msg=k)
