"""LeRobot datasets repacked for robots: what is trained on, its statistics, and what analyses read."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from lerobot_data import MINI, film, numbers, two_episodes
from tiny_policy import FILES, tiny_config

from safe_pruner_jax.analysis.episodes import episodes
from safe_pruner_jax.cli.main import main
from safe_pruner_jax.lerobot.dataset import Dataset
from safe_pruner_jax.lerobot.libraries import DatasetError
from safe_pruner_jax.lerobot.repack import tracks
from safe_pruner_jax.lerobot.write import Writer
from safe_pruner_jax.model.config import CAMERAS
from safe_pruner_jax.robots.configs import CONFIGS, get_config
from safe_pruner_jax.robots.robots import ALOHA
from safe_pruner_jax.robots.transforms import NormStats, save_norm_stats
from safe_pruner_jax.training.data import chunks_of, make_samples, openpi_stats

pytestmark = pytest.mark.newest


@pytest.fixture
def folder(tmp_path):
    """A dataset of two episodes, 5 and 7 rows."""
    return two_episodes(tmp_path / "data")


def test_libero_rows_are_training_samples(folder):
    small = dataclasses.replace(MINI, model=MINI.model.replace(image_size=28, action_horizon=4))
    demos = list(tracks(Dataset(folder), small))
    assert list(demos[0].images) == list(CAMERAS[:2]) and demos[0].images[CAMERAS[0]].shape == (5, 28, 28, 3)
    stats = openpi_stats(demos, small)
    tokenizer = SimpleNamespace(encode=lambda prompt, state=None: np.array([1, 2, len(prompt)]))
    samples = make_samples(demos, small, stats, tokenizer)
    assert samples.frames.shape == (12, 2, 28, 28, 3) and samples.actions.shape == (12, 4, 8)


@pytest.mark.parametrize("robot", ["DROID", "ALOHA"])
def test_other_robots(tmp_path, robot):
    """Repacked as openpi's configurations do it, to train on and to analyse."""
    length, rng = 4, np.random.default_rng(0)
    if robot == "DROID":
        videos = {"exterior_image_1_left": film(length), "wrist_image_left": film(length, 9)}
        rows = {"joint_position": rng.random((length, 7)), "gripper_position": rng.random((length, 1))}
        rows["actions"] = rng.random((length, 8))
        config, cameras = get_config("pi05_droid"), 2
    else:
        cams = ("cam_high", "cam_left_wrist", "cam_right_wrist")
        videos = {f"observation.images.{cam}": film(length, i) for i, cam in enumerate(cams)}
        rows = {"observation.state": rng.random((length, 14)), "action": rng.random((length, 14))}
        config, cameras = get_config("pi05_aloha"), 3
    with Writer(tmp_path / "d", 50, robot) as writer:
        writer.add("task", videos, rows)
    (track,) = tracks(Dataset(tmp_path / "d"), config)
    assert list(track.images) == list(CAMERAS[:cameras])
    (recording,) = episodes(tmp_path / "d", replan=2, robot=robot)
    first, second = recording.calls()
    raw = config.robot.input(second.request)
    assert raw["prompt"] == "task" and sum(raw["image_mask"].values()) == cameras
    np.testing.assert_allclose(raw["state"], track.state[2])
    closed = (lambda a: 2 * a[7] - 1) if robot == "DROID" else (lambda a: (1 - 2 * a[6]) * (1 - 2 * a[13]))
    assert first.gripper == pytest.approx(closed(rows["actions" if robot == "DROID" else "action"][0]))
    with pytest.raises(ValueError, match=f"expected a LeRobot dataset for {robot}, got example"):
        next(episodes("example", robot=robot))
    with pytest.raises(DatasetError, match="expected a column for observation/image of LIBERO"):
        next(episodes(tmp_path / "d"))
    if robot == "DROID":
        want = np.concatenate([rows["joint_position"], rows["gripper_position"]], axis=1)
        np.testing.assert_array_equal(track.state, want)
        np.testing.assert_array_equal(track.actions, rows["actions"])
    else:
        np.testing.assert_allclose(ALOHA.output(track.actions.copy())["actions"], rows["action"], atol=1e-12)
        assert track.state[0, 1] == -rows["observation.state"][0, 1]


def test_relative_actions_are_to_the_state_of_their_frame():
    config = dataclasses.replace(MINI, delta_mask=(True, False), model=MINI.model.replace(action_horizon=3))
    track = SimpleNamespace(state=np.arange(8.0).reshape(4, 2), actions=np.ones((4, 3)), every=1)
    chunks = chunks_of(track, config)
    assert chunks.shape == (4, 3, 3)
    np.testing.assert_array_equal(chunks[2], [[1 - 4, 1, 1]] * 3)
    plain = chunks_of(
        SimpleNamespace(actions=np.arange(4.0)[:, None], every=1), dataclasses.replace(MINI, delta_mask=None)
    )
    np.testing.assert_array_equal(plain[3, :, 0], [3] * 10)


def test_statistics_are_openpis():
    """Mean, deviation and binned quantiles over all chunks, relative actions included."""
    rng = np.random.default_rng(0)
    config = dataclasses.replace(MINI, delta_mask=(True,), model=MINI.model.replace(action_horizon=5))
    demos = [SimpleNamespace(state=rng.normal(size=(300, 2)), actions=rng.normal(size=(300, 2)), every=1)]
    found = openpi_stats(demos, config)["actions"]
    chunks = chunks_of(demos[0], config).reshape(-1, 2)
    np.testing.assert_allclose(found.mean, chunks.mean(0))
    np.testing.assert_allclose(found.std, chunks.std(0))
    for q, got in ((0.01, found.q01), (0.99, found.q99)):
        np.testing.assert_allclose(got, [openpi_quantile(column, q) for column in chunks.T], rtol=0, atol=1e-12)
    halves = [SimpleNamespace(state=d[0], actions=d[1], every=1) for d in zip(*halved(demos[0]), strict=True)]
    together = openpi_stats(halves, dataclasses.replace(config, model=MINI.model.replace(action_horizon=1)))["actions"]
    alone = openpi_stats(demos, dataclasses.replace(config, model=MINI.model.replace(action_horizon=1)))["actions"]
    for name in ("mean", "std", "q01", "q99"):
        np.testing.assert_allclose(getattr(together, name), getattr(alone, name), rtol=1e-9, atol=1e-12)


def openpi_quantile(values: np.ndarray, q: float) -> float:
    """The lower edge of the bin, of 5000, in which the q-th of the sorted values is; by sorting, not by counting."""
    low, high = values.min() - 1e-10, values.max() + 1e-10
    at = np.sort(values)[int(np.ceil(q * len(values))) - 1]
    width = (high - low) / 5000
    return low + width * np.floor((at - low) / width)


def halved(demo):
    """States and actions of a demonstration in two parts."""
    return (demo.state[:100], demo.state[100:]), (demo.actions[:100], demo.actions[100:])


def test_analyses_read_a_dataset(folder):
    first, second = episodes(folder, replan=3)
    assert (first.name, second.name) == ("data#0", "data#1")
    calls = list(second.calls())
    assert len(calls) == 3 and calls[1].request["prompt"] == "task 1"
    assert calls[1].gripper == pytest.approx(numbers(7, 1)["action"][3, 6])
    assert calls[0].request["observation/image"].shape == (64, 64, 3)


@pytest.mark.nightly
def test_a_policy_of_droid_is_analysed_on_its_own_data(tmp_path, monkeypatch, capsys):
    """From the command line, with a tiny π0.5 and statistics of DROID's width."""
    ones = NormStats(*(np.full(8, value) for value in (0.0, 1.0, -1.0, 1.0)))
    shutil.copytree(FILES["checkpoint"], tmp_path / "ckpt")
    save_norm_stats(tmp_path / "ckpt", "droid", {"state": ones, "actions": ones})
    monkeypatch.setitem(
        CONFIGS, "pi05_droid", dataclasses.replace(get_config("pi05_droid"), model=tiny_config(False).model)
    )
    rng = np.random.default_rng(0)
    rows = {"joint_position": rng.random((6, 7)), "gripper_position": rng.random((6, 1)), "actions": rng.random((6, 8))}
    rows["actions"][:, 7] = [0, 0, 0, 1, 1, 1]
    with Writer(tmp_path / "d", 15, "DROID") as writer:
        writer.add("task", {"exterior_image_1_left": film(6), "wrist_image_left": film(6, 9)}, rows)
    given = ["--data", str(tmp_path / "d"), "--out", str(tmp_path / "out"), "--replan", "2"]
    policy = ["policy:checkpoint", "--policy.config", "pi05_droid", "--policy.dir", str(tmp_path / "ckpt")]
    tokenizer = ["--tokenizer", str(FILES["tokenizer"])]
    assert main(["analyze", "kappa", *given, *tokenizer, *policy]) == 0, capsys.readouterr().err
    about, part = (json.loads(line) for line in (tmp_path / "out/kappa.jsonl").read_text().splitlines())
    assert about["conditions"]["policy"] == "pi05_droid" and part["part"] == "d#0"
    of_text = [row for row in part["rows"] if row["queries"] == "text"]
    assert [row["boundary"] for row in of_text] == [False, False, True], "the gripper closes before the third call"
    assert all(0 < row["kappa"] <= 1 for row in of_text[1:])
    assert main(["analyze", "actions", *given, *tokenizer, *policy]) == 2
    assert "actions: expected a policy of LIBERO's robot, got one of DROID" in capsys.readouterr().err
