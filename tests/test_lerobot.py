"""LeRobot datasets: written, read in both versions, repacked for robots, exported from what there is."""

import dataclasses
import json
import shutil
import sys
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from demonstrations import demo
from tiny_policy import FILES, request, tiny_config

from safe_pruner_jax.analysis.episodes import episodes
from safe_pruner_jax.cli import export
from safe_pruner_jax.cli.export import Export, run_export
from safe_pruner_jax.cli.films import decisions, films
from safe_pruner_jax.cli.main import main
from safe_pruner_jax.lerobot import repack
from safe_pruner_jax.lerobot.dataset import Dataset
from safe_pruner_jax.lerobot.libraries import DatasetError
from safe_pruner_jax.lerobot.repack import columns, tracks
from safe_pruner_jax.lerobot.write import Writer
from safe_pruner_jax.libero.demonstrations import write_demos
from safe_pruner_jax.model.config import CAMERAS
from safe_pruner_jax.policy.spec import Embedded, Method
from safe_pruner_jax.robots.configs import CONFIGS, get_config
from safe_pruner_jax.robots.robots import ALOHA
from safe_pruner_jax.robots.transforms import NormStats, save_norm_stats
from safe_pruner_jax.serving.episodes import EpisodeRecorder
from safe_pruner_jax.serving.recorder import Recorder, Step
from safe_pruner_jax.training.data import chunks_of, make_samples, openpi_stats

pytestmark = pytest.mark.newest

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


@pytest.fixture
def folder(tmp_path):
    """A dataset of two episodes, 5 and 7 rows."""
    with Writer(tmp_path / "data", 20, "LIBERO") as writer:
        for seed, length in enumerate((5, 7)):
            writer.add(f"task {seed}", {BASE: film(length, seed), WRIST: film(length, 50)}, numbers(length, seed))
    return tmp_path / "data"


def as_second(folder, out):
    """The same dataset as version 2.1 has it: one file per episode, tables of text."""
    info = json.loads((folder / "meta/info.json").read_text())
    info |= {
        "codebase_version": "v2.1",
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    (out / "meta").mkdir(parents=True)
    (out / "meta/info.json").write_text(json.dumps(info))
    lines = {"tasks": [], "episodes": []}
    for number in range(2):
        lines["tasks"].append({"task_index": number, "task": f"task {number}"})
        lines["episodes"].append({"episode_index": number, "tasks": [f"task {number}"], "length": 5 + 2 * number})
        place = {"chunk_index": 0, "file_index": number, "episode_chunk": 0, "episode_index": number}
        for source, target in ((info_path(folder, "data_path"), info["data_path"]),):
            (out / target.format(**place)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / source.format(**place), out / target.format(**place))
        for key in (BASE, WRIST):
            target = out / info["video_path"].format(video_key=key, **place)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / info_path(folder, "video_path").format(video_key=key, **place), target)
    for name, rows in lines.items():
        (out / f"meta/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def info_path(folder, name):
    return json.loads((folder / "meta/info.json").read_text())[name]


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_what_is_written_is_read(folder, tmp_path, version):
    data = Dataset(folder if version == "v3.0" else as_second(folder, tmp_path / "second"))
    assert (data.info["codebase_version"], len(data), data.fps, data.cameras) == (version, 2, 20, [BASE, WRIST])
    for seed, (episode, length) in enumerate(zip(data.episodes(), (5, 7), strict=True)):
        assert (episode.task, len(episode)) == (f"task {seed}", length)
        for key, want in numbers(length, seed).items():
            got = episode.column(key)
            assert got.shape == want.shape
            np.testing.assert_array_equal(got.astype(want.dtype), want)
        got = np.stack(list(episode.frames(BASE))).astype(int)
        assert np.abs(got - np.stack(film(length, seed))).mean() < 4  # H.264


def test_several_episodes_in_a_file(folder):
    """Version 3.0 as LeRobot itself writes it: rows and frames of all episodes one after the other."""
    import pyarrow as pa

    from safe_pruner_jax.lerobot.video import write_frames

    tables = [pq.read_table(file) for file in sorted((folder / "data").glob("*/*.parquet"))]
    shutil.rmtree(folder / "data")
    (folder / "data/chunk-000").mkdir(parents=True)
    pq.write_table(pa.concat_tables(tables), folder / "data/chunk-000/file-000.parquet")
    write_frames(folder / f"videos/{BASE}/chunk-000/file-000.mp4", [*film(5, 0), *film(7, 1)], 20)
    about = folder / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(about).to_pylist()
    for row in rows:
        row |= {"data/file_index": 0, f"videos/{BASE}/file_index": 0}
    rows[1][f"videos/{BASE}/from_timestamp"] = 5 / 20
    pq.write_table(pa.Table.from_pylist(rows), about)
    first, second = Dataset(folder).episodes()
    np.testing.assert_allclose(second.column("action"), numbers(7, 1)["action"])
    for episode, seed in ((first, 0), (second, 1)):
        got = np.stack(list(episode.frames(BASE))).astype(int)
        assert np.abs(got - np.stack(film(len(episode), seed))).mean() < 4


def test_nothing_is_read_before_it_is_asked_for(folder):
    shutil.rmtree(folder / "data")
    first, second = Dataset(folder).episodes()
    assert (len(first), len(second)) == (5, 7)
    with pytest.raises(DatasetError, match="got no such file"):
        second.column("action")


def test_memory_does_not_grow_with_the_dataset(tmp_path):
    """Frames of 30 episodes at 112² are 18 MB; reading them and gathering a batch holds a tenth of that."""
    small = dataclasses.replace(MINI, model=MINI.model.replace(image_size=112, action_horizon=2))
    with Writer(tmp_path / "data", 20, "LIBERO") as writer:
        for seed in range(30):
            writer.add(f"task {seed}", {BASE: film(8, seed), WRIST: film(8, 50)}, numbers(8, seed))
    whole = 30 * 8 * 2 * 112 * 112 * 3
    tokenizer = SimpleNamespace(encode=lambda prompt, state=None: np.array([1, 2, len(prompt)]))

    def peak(scratch):
        tracemalloc.start()
        demos = list(tracks(Dataset(tmp_path / "data"), small, scratch=scratch))
        samples = make_samples(demos, small, openpi_stats(demos, small), tokenizer)
        got = samples.frames[np.array([0, 8, 239])]
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most, got

    (most, got), (all_in_memory, want) = peak(tmp_path / "run"), peak(None)
    assert most < whole / 10 and all_in_memory > whole
    np.testing.assert_array_equal(got, want)
    assert got[1, 0, 60, 60, 2] == pytest.approx(1, abs=4), "the first frame of the second episode"
    assert list((tmp_path / "run").iterdir()) == [], "the file has no name, so nothing is left behind"


def test_a_disk_that_is_too_small_is_told_before_anything_is_decoded(folder, monkeypatch):
    monkeypatch.setattr(repack.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(DatasetError, match=r"GB of disk for 12 rows of frames, got 0 GB free .* smaller --image-size"):
        next(tracks(Dataset(folder), MINI, scratch=folder.parent))


@pytest.mark.parametrize("name", ["hf://datasets/lerobot/pusht", "hf://lerobot/pusht", "lerobot/pusht"])
@pytest.mark.parametrize("command", ["train", "export", "analyze recall", "diagnose", "view"])
def test_a_dataset_of_the_hub_is_one_line(name, command, tmp_path, capsys):
    given = [name] if command in ("diagnose", "view") else ["--data", name]
    given += [] if command == "view" else ["--out", str(tmp_path / "out")]
    policy = [] if command == "train" else ["policy:embedded"]
    assert main([*command.split(), *given, *policy]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"openpi {command}: data: expected a file or folder that is here, got ")
    assert "`hf download lerobot/pusht --repo-type dataset --local-dir FOLDER`" in said


def test_statistics_are_those_of_the_rows(folder):
    stats = json.loads((folder / "meta/stats.json").read_text())
    rows = np.concatenate([numbers(length, seed)["action"] for seed, length in enumerate((5, 7))])
    for name in ("min", "max", "mean", "std"):
        np.testing.assert_allclose(stats["action"][name], getattr(rows, name)(0), rtol=1e-5)
    assert stats["action"]["count"] == [12] and np.shape(stats[BASE]["mean"]) == (3, 1, 1)
    assert 0 < stats[BASE]["mean"][0][0][0] < 1 and np.isfinite(stats["kappa"]["mean"]).all()


def test_an_unfinished_export_is_no_dataset(tmp_path):
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "d", 20, "LIBERO") as writer:
        writer.add("task", {BASE: film(3)}, numbers(3))
        raise KeyboardInterrupt
    with pytest.raises(DatasetError, match=r"got no meta/info\.json"):
        Dataset(tmp_path / "d")
    with pytest.raises(DatasetError, match="new or empty"):
        Writer(tmp_path / "d", 20, "LIBERO")


def test_what_cannot_be_written_says_so(tmp_path):
    with pytest.raises(DatasetError, match="at least one episode"), Writer(tmp_path / "a", 20, "LIBERO"):
        pass
    writer = Writer(tmp_path / "b", 20, "LIBERO")
    writer.add("task", {BASE: film(3)}, numbers(3))
    with pytest.raises(DatasetError, match=r"'action': \[7\].* got .*'action': \[6\]"):
        writer.add("task", {BASE: film(3)}, numbers(3, action=6))
    with pytest.raises(DatasetError, match="as many rows"):
        writer.add("task", {BASE: film(4)}, numbers(3))


def test_what_cannot_be_read_says_so(folder, monkeypatch):
    video = folder / f"videos/{BASE}/chunk-000/file-000.mp4"
    kept = video.read_bytes()
    video.unlink()
    with pytest.raises(DatasetError, match="got no such file"):
        next(tracks(Dataset(folder), MINI))
    video.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(DatasetError, match=r"cannot be decoded|expected 5 frames"):
        next(tracks(Dataset(folder), MINI))
    with pytest.raises(DatasetError, match="expected a column for observation/joint_position of DROID"):
        columns(Dataset(folder), "DROID")
    (folder / "meta/episodes/chunk-000/file-000.parquet").write_bytes(b"PAR1")
    with pytest.raises(DatasetError, match="cannot be read"):
        list(Dataset(folder).episodes())
    info = json.loads((folder / "meta/info.json").read_text())
    for change, text in (({"codebase_version": "v9.0"}, "expected version"), ({"features": None}, "")):
        (folder / "meta/info.json").write_text(json.dumps(info | change) if text else "{")
        with pytest.raises(DatasetError, match=text or "is corrupt"):
            Dataset(folder)
    for change in ({"total_frames": None}, {"data_path": None}, {"features": {"action": {}}}):
        (folder / "meta/info.json").write_text(json.dumps({k: v for k, v in (info | change).items() if v is not None}))
        with pytest.raises(DatasetError, match="is corrupt"):
            Dataset(folder)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DatasetError, match=r'pip install "safe-pruner-jax\[lerobot\]"'):
        Writer(folder.parent / "new", 20, "LIBERO")


# repacking


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


# export


def reply(step: int, grid: int = 8) -> dict:
    tokens = grid * grid
    return {
        "actions": np.full((10, 7), step, np.float64),
        "policy_timing": {"infer_ms": 10.0 + step},
        "pruning": {
            "keyframe": step == 0,
            "kappa": None if step == 0 else 0.9,
            "kept": 2,
            "alive": 2 * tokens,
            "index": np.array([3, tokens + step], np.int32),
            "views": list(CAMERAS[:2]),
        },
        "attention": {"grids": {camera: np.full((1, grid, grid), step, np.float16) for camera in CAMERAS[:2]}},
    }


def check(folder, rows: int):
    data = Dataset(folder)
    (episode,) = data.episodes()
    assert len(episode) == rows
    assert data.info["features"]["pruning.kept.left_wrist_0_rgb"] == {"dtype": "bool", "shape": [8, 8], "names": None}
    kept = episode.column("pruning.kept.left_wrist_0_rgb")
    assert kept[1].sum() == 1 and episode.column("pruning.kept.base_0_rgb")[0, 0, 3]
    assert episode.column("pruning.attention.base_0_rgb").shape == (rows, 1, 8, 8)
    assert list(episode.column("pruning.keyframe"))[:2] == [True, rows == 5]
    return episode


def test_recordings_become_rows_of_calls(tmp_path):
    steps = [Step("a", request(0, t), reply(t), t == 0, 1) for t in range(3)]
    record = EpisodeRecorder(tmp_path / "records", {"config": "mini_libero"})
    for step in steps:
        record(step)
    out = tmp_path / "out"
    run_export(Export(data=(str(tmp_path / "records"),), out=out, policy=Embedded()), Method("full", {}))
    episode = check(out, 3)
    assert episode.fps == 2 and episode.task == "pick up the bowl"
    assert list(episode.column("policy.latency_ms")) == [10, 11, 12]
    assert np.isnan(episode.column("pruning.kappa")[0]) and episode.column("action")[2, 0] == 2
    assert episode.column("action_chunk").shape == (3, 10, 7)
    own = Recorder(tmp_path / "flat")
    for step in steps:
        own(step)
    (flat,) = films(str(tmp_path / "flat"), MINI, 5, None)
    want = {key: rows.shape for key, rows in flat.columns.items()}
    assert want["pruning.kept.base_0_rgb"] == (3, 8, 8) and flat.task == episode.task
    with pytest.raises(ValueError, match="got neither"):
        list(films(str(out), MINI, 5, None))


def test_masks_are_of_the_cameras_that_were_seen():
    """ALOHA without its left wrist: patches are numbered over the cameras of `views`, one of which drops out here."""
    told = reply(0) | {"pruning": reply(0)["pruning"] | {"views": [CAMERAS[0], CAMERAS[2]]}}
    alone = reply(1) | {"pruning": reply(1)["pruning"] | {"views": [CAMERAS[0]], "alive": 64, "index": np.array([5])}}
    masks = decisions([told, alone])
    assert {key for key in masks if "kept" in key} == {"pruning.kept.base_0_rgb", "pruning.kept.right_wrist_0_rgb"}
    np.testing.assert_array_equal(np.argwhere(masks["pruning.kept.right_wrist_0_rgb"]), [[0, 0, 0]])
    np.testing.assert_array_equal(np.argwhere(masks["pruning.kept.base_0_rgb"]), [[0, 0, 3], [1, 0, 5]])


def test_demonstrations_become_rows_of_actions(tmp_path, monkeypatch):
    write_demos(tmp_path / "butter_demo.hdf5", [demo(0, steps=5, side=64)])
    out, source = tmp_path / "plain", str(tmp_path / "butter_demo.hdf5")
    run_export(Export(data=(source,), out=out, policy=Embedded()), Method("full", {}))
    (episode,) = Dataset(out).episodes()
    assert episode.fps == 20 and episode.task == "pick up the butter"
    np.testing.assert_allclose(episode.column("action"), demo(0, steps=5, side=64).actions, rtol=1e-6)

    asked = []
    session = SimpleNamespace(infer=lambda request: asked.append(request) or reply(len(asked) - 1))
    monkeypatch.setattr(Export, "load", lambda *_: SimpleNamespace(session=lambda: session))
    watched = Export(data=(source,), out=tmp_path / "watched", policy=Embedded(), watch=True, replan=3, attention=(-1,))
    run_export(watched, Method("full", {}))
    episode = check(tmp_path / "watched", 5)
    assert [r["attention"] for r in asked] == [{"layers": [-1], "of": "action"}] * 2
    assert list(episode.column("policy.call")) == [True, False, False, True, False]
    assert list(episode.column("policy.latency_ms")) == [10, 10, 10, 11, 11]


def test_exports_that_cannot_be_are_refused(tmp_path):
    base, damaged = {"out": tmp_path / "o", "policy": Embedded()}, tmp_path / "flat"
    damaged.mkdir()
    (damaged / "step_0.npy").write_bytes(b"nothing")
    for data, more, text in (
        (("libero:x",), {"attention": ()}, "libero:SUITE/TASK/TRIAL"),
        (("a.hdf5", str(tmp_path)), {}, "got both"),
        (("a.hdf5",), {"attention": (0,)}, "expected --watch"),
        (("a.hdf5",), {"fps": 0}, "fps: expected at least 1, got 0"),
        (("a.hdf5",), {"limit": -1}, "limit: expected at least 1, got -1"),
        ((str(damaged),), {}, r"step_0\.npy: expected a record of openpi's server, got another file"),
    ):
        with pytest.raises(ValueError, match=text):
            run_export(Export(data=data, **base, **more), Method("full", {}))
    with pytest.raises(ValueError, match="add --watch"):
        list(films("libero:a/0/0", MINI, 5, None))
    assert export.RATE == 20 and decisions([{"actions": 0}]) == {}
