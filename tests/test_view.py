"""`openpi view`: a recording for rerun, read back with rerun; from a policy here, from a file, from a server."""

import builtins
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from pictures import CAMERAS, KEY, Pictures, scene
from tiny_policy import request

from safe_pruner_jax.analysis import view
from safe_pruner_jax.cli.main import main
from safe_pruner_jax.serving import Access, running

pytestmark = pytest.mark.newest


def entities(path):
    """Entity → rows of its data on the timeline of frames."""
    from rerun.chunk import RrdReader

    rows = {}
    for chunk in RrdReader(str(path)).stream().to_chunks():
        if "frame_index" in chunk.timeline_names:
            rows[chunk.entity_path] = rows.get(chunk.entity_path, 0) + chunk.num_rows
    return rows


def saved(path, frames):
    frames = list(frames)
    stream = view.open_recording("test", frames[0], save=path)
    for frame in frames:
        view.show(stream, frame)
    stream.flush()
    stream.disconnect()
    return frames, entities(path)


def test_a_policy_step_by_step(ten_step_policy, tmp_path):
    policy = ten_step_policy
    requests = [request(0, step) for step in range(3)]
    frames, rows = saved(tmp_path / "run.rrd", view.played(policy, requests, threshold=-1.0))
    session = policy.session()
    for asked, frame in zip(requests, frames, strict=True):
        np.testing.assert_array_equal(frame.reply["actions"], session.infer(asked)["actions"])
    assert [sorted(frame.maps) for frame in frames] == [["forecast", "late", "shallow"]] * 3
    assert frames[0].layers == (32,) * 4 and frames[1].layers == (32, 32, 32, 6)
    for camera in CAMERAS:
        entity = f"/observation.images.{camera}"
        assert rows[entity] == rows[f"{entity}/kept"] == rows[f"{entity}/shallow"] == 3
        assert rows[f"{entity}/forecast"] == rows[f"{entity}/late"] == 3
    once = ("/action", "/state", "/layers", "/prompt", "/tokens/kept", "/pruning/threshold", "/pruning/keyframe")
    assert {rows[name] for name in (*once, "/milliseconds/infer", "/milliseconds/shallow")} == {3}
    assert rows["/pruning/kappa"] == 2, "a first step has no history to agree with"


def test_a_server_live(tmp_path):
    with running(Pictures(), watch=True, access=Access(key=KEY)) as server:
        frames = view.live(f"ws://127.0.0.1:{server.port}", KEY)
        robot = WebsocketClientPolicy("127.0.0.1", server.port, api_key=KEY)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(next, frames)
            while not waiting.done():
                robot.infer(scene(0, robot_id="left arm"))
        frame = waiting.result()
        assert (
            frame.robot == "left arm"
            and list(frame.images) == list(CAMERAS)
            and set(frame.maps) == {"forecast", "late"}
        )
        _, rows = saved(tmp_path / "live.rrd", [frame])
        assert rows[f"/left\\ arm/observation.images.{CAMERAS[0]}/kept"] == 1 and rows["/left\\ arm/tokens/kept"] == 1
        frames.close()


def test_who_may_not_look_on_is_told_why():
    with running(Pictures(), watch=True, access=Access(key=KEY)) as server:
        keyless = view.live(f"http://127.0.0.1:{server.port}/")
        with pytest.raises(ValueError, match="401; it wants an API key: --api-key-file"):
            next(keyless)
    with running(Pictures()) as server, pytest.raises(ValueError, match=r"404; start it with --serving\.watch"):
        next(view.live(f"ws://127.0.0.1:{server.port}"))
    with pytest.raises(ValueError, match="expected a server, got none"):
        next(view.live(f"ws://127.0.0.1:{server.port}"))


def test_without_rerun_one_line_names_the_extra(monkeypatch, capsys):
    real = builtins.__import__

    def absent(name, *rest):
        if name == "rerun":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert main(["view", "example"]) == 2
    assert "pip install 'safe-pruner-jax[rerun]'" in capsys.readouterr().err
