"""Exports as LeRobot datasets: of recordings, demonstrations and episodes that are played."""

from types import SimpleNamespace

import numpy as np
import pytest
from demonstrations import demo
from lerobot_data import MINI
from tiny_policy import request

from safe_pruner_jax.cli import export
from safe_pruner_jax.cli.export import Export, run_export
from safe_pruner_jax.cli.films import decisions, films
from safe_pruner_jax.lerobot.dataset import Dataset
from safe_pruner_jax.libero.demonstrations import write_demos
from safe_pruner_jax.model.config import CAMERAS
from safe_pruner_jax.policy.spec import Embedded, Method
from safe_pruner_jax.serving.episodes import EpisodeRecorder
from safe_pruner_jax.serving.recorder import Recorder, Step

pytestmark = pytest.mark.newest


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
