"""`openpi export` of a running server and of an evaluation; what is exported opens in rerun's own importer."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fake_server import DEADLINE_S
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from pictures import CAMERAS, KEY, Pictures, scene
from toy_records import CONFIGURATION, record

from safe_pruner_jax.cli import export, films
from safe_pruner_jax.cli.export import Export, run_export
from safe_pruner_jax.cli.films import Film
from safe_pruner_jax.evaluation.records import RecordFile
from safe_pruner_jax.lerobot.dataset import Dataset
from safe_pruner_jax.policy.spec import Embedded, Method
from safe_pruner_jax.serving import Access, running

pytestmark = [
    pytest.mark.newest,
    pytest.mark.filterwarnings(r"ignore:connect\(\) must be used:DeprecationWarning"),
]


class Episodes(Pictures):
    """A backend that starts anew when a robot says so."""

    def prepare(self, robot, request):
        if request.get("reset"):
            self.forget(robot)
        return super().prepare(robot, request)


def film(length: int, seed: int, success: bool) -> Film:
    rng = np.random.default_rng(seed)
    images = {f"observation.images.{CAMERAS[0]}": [rng.integers(0, 255, (32, 32, 3), np.uint8)] * length}
    done = np.arange(length) == length - 1
    columns = {"action": rng.random((length, 7), np.float32), "observation.state": rng.random((length, 8), np.float32)}
    columns |= {"pruning.attention.base_0_rgb": rng.random((length, 1, 4, 4), np.float32)}
    columns |= {"pruning.kappa": np.array([np.nan, *rng.random(length - 1)], np.float32)}
    columns |= {"pruning.kept.base_0_rgb": rng.random((length, 4, 4)) > 0.5, "pruning.keyframe": done}
    return Film("pick up the bowl", images, columns | {"next.success": done & success})


def test_a_running_server_is_followed_episode_by_episode(tmp_path, monkeypatch):
    (tmp_path / "key").write_text(KEY)
    args = {"api_key_file": str(tmp_path / "key"), "policy": Embedded()}
    with running(Episodes(), watch=True, access=Access(key=KEY)) as server, ThreadPoolExecutor(1) as pool:
        url = f"ws://127.0.0.1:{server.port}"
        export_of = lambda: run_export(Export(data=(url,), out=tmp_path / "live", limit=2, **args), Method("full", {}))
        waiting = pool.submit(export_of)
        robot = WebsocketClientPolicy("127.0.0.1", server.port, api_key=KEY)
        step = 0
        while not waiting.done() and step < 5000:  # episodes of three calls, until two of them are written
            robot.infer(scene(step, robot_id="left", reset=step % 3 == 0))
            step += 1
        waiting.result(DEADLINE_S)
    data = Dataset(tmp_path / "live")
    assert len(data) == 2 and set(data.cameras) == {f"observation.images.{camera}" for camera in CAMERAS}
    for episode in data.episodes():
        steps = episode.column("policy.step").ravel()
        assert steps[0] == 0 or episode.index == 0, "only the first may have begun before"
        assert 0 < len(episode) <= 3 and (np.diff(steps) > 0).all()
        assert episode.column("pruning.kept.base_0_rgb").shape == (len(episode), 16, 16)
        assert len(list(episode.frames(data.cameras[0]))) == len(episode)


def test_a_server_that_lets_nobody_look_on_is_one_line(tmp_path):
    with running(Pictures()) as server, pytest.raises(ValueError, match=r"404; start it with --serving\.watch"):
        url = f"ws://127.0.0.1:{server.port}"
        run_export(Export(data=(url,), out=tmp_path / "live", policy=Embedded()), Method("full", {}))


def test_the_episodes_of_an_evaluation_are_played_again(tmp_path, monkeypatch, caplog):
    with RecordFile(tmp_path / "safe.jsonl", CONFIGURATION) as file:
        for trial, outcome in enumerate(("success", "error", "failure")):
            file.append(record(trial, outcome))
    played = []

    def plays(source, config, replan, infer):
        assert replan == CONFIGURATION.replan, "that of the evaluation, not the policy's own"
        played.append(source)
        return film(3, len(played), success=True)

    monkeypatch.setattr(films, "_played", plays)
    monkeypatch.setattr(Export, "load", lambda *_: type("Policy", (), {"session": lambda self: self, "infer": None})())
    monkeypatch.setattr(Export, "fit", lambda self, environment, method, executed: method)
    monkeypatch.setattr(Export, "describe", lambda *_: CONFIGURATION)
    args = {"data": (str(tmp_path / "safe.jsonl"),), "policy": Embedded()}
    run_export(Export(out=tmp_path / "out", **args), Method("full", {}))
    assert played == ["libero:libero_object/0/0", "libero:libero_object/0/2"]
    assert "libero_object/0/2: a success here, a failure in the evaluation" in caplog.text
    assert [e.column("next.success")[-1] for e in Dataset(tmp_path / "out").episodes()] == [True, True]
    with pytest.raises(ValueError, match=r"expected the policy and method of its evaluation, got replan: 5 → 10"):
        run_export(Export(out=tmp_path / "other", replan=10, **args), Method("full", {}))
    assert export.RECORDS == ".jsonl"


def test_rerun_opens_the_dataset_itself(tmp_path):
    """The importer that `rerun FOLDER` runs, not this package: entities, rows, and a video per camera."""
    import rerun as rr
    from rerun.chunk import RrdReader

    from safe_pruner_jax.lerobot.write import Writer

    with Writer(tmp_path / "data", 20, "LIBERO") as writer:
        for seed in range(2):
            each = film(6, seed, True)
            writer.add(each.task, each.images, each.columns)
    stream = rr.RecordingStream("test")
    stream.save(str(tmp_path / "data.rrd"))
    stream.log_file_from_path(tmp_path / "data")
    stream.flush()
    stream.disconnect()
    reader, opened = RrdReader(str(tmp_path / "data.rrd")), {}
    for store in reader.recordings():
        rows = opened[store.recording_id] = {}
        for chunk in reader.stream(store=store).to_chunks():
            if "frame_index" in chunk.timeline_names:
                rows[chunk.entity_path] = rows.get(chunk.entity_path, 0) + chunk.num_rows
    for number in range(2):  # booleans it does not show yet, and says so
        rows = opened[f"episode_{number}"]
        assert rows["/action"] == rows["/observation.state"] == rows["/pruning.kappa"] == 6
        assert rows[f"/observation.images.{CAMERAS[0]}"] >= 6, "the video's frames; no ffmpeg is needed"
