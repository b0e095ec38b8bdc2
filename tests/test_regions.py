"""Attention by region and matching by class: on traces whose answers are known, and from labelled files to a figure."""

import dataclasses
from functools import cache

import numpy as np
import pytest
from toy_traces import synthetic

from safe_pruner_jax.analysis import attention, regions
from safe_pruner_jax.analysis.episodes import Seen, episodes
from safe_pruner_jax.analysis.rows import read_rows
from safe_pruner_jax.analysis.trace import Trace, Watch
from safe_pruner_jax.cli.attention import Attention, run_attention
from safe_pruner_jax.libero.labels import CLASSES
from safe_pruner_jax.libero.scenes import write

pytestmark = pytest.mark.newest

KINDS = ("basket", "butter", "milk")
SAID = {
    "instructions": tuple(f"pick up the {kind} and place it in the basket" for kind in KINDS[1:]),
    "receptacle": "basket",
}
BASKET, BUTTER, MILK = (len(CLASSES) + k for k in range(3))
GRIPPER = CLASSES.index("gripper")


@cache
def moving() -> Trace:
    """Tokens that move by one slot per call; each shows one class, and takes it along."""
    trace = synthetic(8, n=32, still=True, shift=1)
    shown = np.random.default_rng(0).choice([0, 1, GRIPPER, BASKET, BUTTER, MILK], 32).astype(np.uint8)
    pictures = [np.roll(shown, t, -1).reshape(2, 4, 4) for t in range(8)]
    return dataclasses.replace(trace, seen=[Seen(picture, MILK, BASKET) for picture in pictures])


def test_a_token_has_its_pixels_shares():
    picture = np.zeros((1, 4, 4), np.uint8)
    picture[0, :2, :2] = [[BASKET, BASKET], [MILK, GRIPPER]]
    seen = Seen(picture, MILK, BASKET)
    own = regions.shares(seen, 4)
    np.testing.assert_allclose(own[0, [BASKET, MILK, GRIPPER]], [0.5, 0.25, 0.25])
    np.testing.assert_allclose(own.sum(1), 1)
    np.testing.assert_allclose(regions.by_region(seen, 4)[0], [0.25, 0.5, 0.25, 0])
    with pytest.raises(ValueError, match="3 tokens divide, got 4 pixels"):
        regions.shares(seen, 9)


def test_masses_are_shares_of_the_attention():
    trace = moving()
    first = trace.seen[0].classes.ravel()
    rows = {(row["queries"], row["layer"]): row for row in regions.masses(trace)}
    for name, number in (("target", MILK), ("basket", BASKET), ("gripper", GRIPPER), ("other things", BUTTER)):
        there = first == number
        assert rows["uniform", None][name] == pytest.approx([there.mean()] * 8, abs=1e-6)
        layer = trace.text[0, 2] / trace.text[0, 2].sum()
        assert rows["prompt", 2][name][0] == pytest.approx(layer[there].sum(), abs=1e-5)


def test_matching_follows_what_moves_and_the_same_slot_does_not():
    rows = regions.carried(moving(), moving().text[:, 2].mean(0), cut=3, every=4)
    assert len(rows) == 7 and sum(not row["within"] for row in rows) == 1  # the gripper closes once
    assert all(row["matched"] == pytest.approx(1, abs=1e-5) for row in rows)
    assert all(row["same slot"] < 0.99 for row in rows)
    assert regions.median(rows, "right") == 1.0 and regions.median(rows, "right, same slot") < 0.6
    assert regions.median(rows, "right", within=False) == 1.0
    unlabelled = regions.carried(dataclasses.replace(moving(), seen=()), moving().text[0, 2])
    assert regions.median(unlabelled, "right") is None


@pytest.mark.nightly
def test_labelled_files_become_rows_a_table_and_a_figure(plain_policy, tmp_path):
    size, rng = plain_policy.engine.config.image_size, np.random.default_rng(0)
    for seed in (1, 2):
        frames = {
            "image": rng.integers(0, 255, (5, 2, size, size, 3), np.uint8),
            "segmentation": rng.integers(0, 6, (5, 2, size, size), np.uint8),
            "named": np.tile(np.int32([1, 2]), (5, 1)),
            "target": np.ones(5, np.int32),
            "actions": np.where(np.arange(5)[:, None, None] < 3, -1.0, 1.0) * np.ones((5, 10, 7), np.float32),
        }
        write(tmp_path / f"toy_0_demo_{seed}.npz", frames, {"what": "demo", "kinds": KINDS} | SAID)
    calls = list(next(episodes(tmp_path / "toy_0_demo_1.npz")).calls())
    assert calls[0].request["prompt"] == "pick up the milk and place it in the basket"
    assert (calls[0].seen.target, calls[0].seen.receptacle) == (MILK, BASKET)
    assert [call.gripper for call in calls] == [-1, -1, -1, 1, 1]
    args = Attention(data=tuple(map(str, sorted(tmp_path.glob("*.npz")))), out=tmp_path / "out", cut=2)
    run_attention(args, lambda: plain_policy, {"policy": "tiny"})
    text = (tmp_path / "out" / "attention.md").read_text()
    assert "prompt rows: on the target" in text and "κ across a boundary" in text and "Of the tokens: target" in text
    assert (tmp_path / "out" / "attention.png").stat().st_size > 5000
    own = str(tmp_path / "out" / "attention.jsonl")
    run_attention(dataclasses.replace(args, beside=(f"twin={own}",)), lambda: plain_policy, {"policy": "tiny"})
    assert (tmp_path / "out" / "attention_beside.png").stat().st_size > 5000
    of_twins = attention.beside({"one": read_rows(own), "twin": read_rows(own)}).axes[0].get_lines()
    np.testing.assert_array_equal(*(line.get_ydata() for line in of_twins))
    with pytest.raises(ValueError, match="expected NAME=FILE"):
        run_attention(dataclasses.replace(args, beside=(own,)), lambda: plain_policy, {"policy": "tiny"})
    trace = Watch(plain_policy)(calls)
    mean = attention.measure(trace, cut=2)[-1]["map"]
    rows = [row | {"part": part} for part in "ab" for row in attention.measure(trace, cut=2)]
    np.testing.assert_allclose(attention.prior(rows, without="a"), mean, atol=1e-7)


def test_single_scenes_are_no_episode(tmp_path):
    frames = {"image": np.zeros((1, 2, 8, 8, 3), np.uint8), "segmentation": np.zeros((1, 2, 8, 8), np.uint8)}
    write(tmp_path / "scenes.npz", frames, {"what": "scenes", "kinds": KINDS})
    with pytest.raises(ValueError, match="expected an episode, got single scenes"):
        list(next(episodes(tmp_path / "scenes.npz")).calls())
