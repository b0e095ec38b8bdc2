"""Rounds of corrections: episodes that the policy plays itself, in workers, as files with labels."""

import numpy as np
import pytest

from safe_pruner_jax.cli.stages import action_stats, embedded_weights
from safe_pruner_jax.libero.scenes import read, write
from safe_pruner_jax.policy.embedded import embedded_folder
from safe_pruner_jax.robots.configs import get_config
from safe_pruner_jax.training.rounds import Rounds, export, play_round, targets

played = lambda test: pytest.mark.libero(pytest.mark.nightly(test))
"""A test that plays."""


def test_a_round_asks_more_often_for_what_the_round_before_missed(tmp_path):
    r = Rounds(tasks=(0,), episodes=4, insist=5.0, first=10)
    frames = {"image": np.zeros((1, 2, 8, 8, 3), np.uint8), "segmentation": np.zeros((1, 2, 8, 8), np.uint8)}
    frames["target"] = np.zeros(1, np.int32)
    for seed, (kind, success) in enumerate([("milk", True), ("milk", True), ("ketchup", False), ("ketchup", True)]):
        about = {"instructions": [f"fetch the {kind}"], "success": success}
        write(tmp_path / f"libero_object_0_correct_{10 + seed}.npz", frames, about)
    assert targets(r, 0, tmp_path) == {}
    assert targets(r, 1, tmp_path) == {"fetch the milk": 1.0, "fetch the ketchup": 3.5}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config, out = get_config("mini_libero"), tmp_path_factory.mktemp("checkpoint")
    return export(out, embedded_weights(), config, action_stats(config), embedded_folder() / "tokenizer.model")


@pytest.fixture(scope="module")
def rounds(checkpoint, tmp_path_factory):
    """The same episode with an evaluation's pictures and with quick ones: (summary, folder) by `coarse`."""
    result = {}
    for coarse in (False, True):
        out = tmp_path_factory.mktemp("data")
        r = Rounds(tasks=(7,), episodes=1, workers=1, usual=1.0, mix=0.0, coarse=coarse)
        result[coarse] = play_round(r, 0, "mini_libero", checkpoint, out, 112), out
    return result


@played
def test_a_round_leaves_a_file_per_episode_with_a_label_for_every_call(rounds):
    row, out = rounds[False]
    (path,) = out.iterdir()
    frames, about = read(path)
    calls = -(-about["steps"] // 10)
    assert (row["episodes"], row["frames"], row["steps"]) == (1, calls, about["steps"])
    assert row["successes"] == about["success"]
    assert frames["actions"].shape == (calls, 10, 7) and frames["acts"].all()
    assert "milk" in about["instructions"][frames["target"][0]]  # near usual places the task's own object is the target


@played
def test_quick_pictures_show_the_same_scene_with_other_details(rounds):
    first = {coarse: read(next(out.iterdir()))[0] for coarse, (_, out) in rounds.items()}
    np.testing.assert_allclose(first[True]["position"][0], first[False]["position"][0], atol=1e-4)
    difference = first[True]["image"][0].astype(float) - first[False]["image"][0]
    assert 0.5 < np.abs(difference).mean() < 10


@played
def test_a_round_that_is_there_is_not_played_again(rounds, checkpoint):
    row, out = rounds[False]
    before = next(out.iterdir()).stat().st_mtime_ns
    r = Rounds(tasks=(7,), episodes=1, workers=1, usual=1.0, mix=0.0)
    assert play_round(r, 0, "mini_libero", checkpoint, out, 112) == row
    assert next(out.iterdir()).stat().st_mtime_ns == before
