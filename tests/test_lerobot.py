"""LeRobot datasets: written, read in both versions, refused with a reason."""

import dataclasses
import json
import shutil
import sys
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from lerobot_data import BASE, MINI, WRIST, film, numbers, two_episodes

from safe_pruner_jax.cli.main import main
from safe_pruner_jax.lerobot import repack
from safe_pruner_jax.lerobot.dataset import Dataset
from safe_pruner_jax.lerobot.libraries import DatasetError
from safe_pruner_jax.lerobot.repack import columns, tracks
from safe_pruner_jax.lerobot.write import Writer
from safe_pruner_jax.training.data import make_samples, openpi_stats

pytestmark = pytest.mark.newest


@pytest.fixture
def folder(tmp_path):
    """A dataset of two episodes, 5 and 7 rows."""
    return two_episodes(tmp_path / "data")


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


@pytest.mark.nightly
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

    peak(tmp_path / "first")  # what is imported and compiled once is no memory of the dataset's
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
