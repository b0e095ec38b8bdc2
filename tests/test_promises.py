"""What a robot may rely on, against live servers in processes of their own, with openpi's client and raw sockets."""

import contextlib
import io
import json
import signal
import socket
import threading
import time
from pathlib import Path

import msgpack
import numpy as np
import pytest
import tiny_openpi
import websockets.sync.client
from live_server import DEADLINE_S, KEY, Live, until
from tiny_policy import request, small_config
from websockets.exceptions import ConnectionClosed, InvalidStatus

from safe_pruner_jax.cli import main as cli
from safe_pruner_jax.robots import configs
from safe_pruner_jax.serving import pack, unpack
from safe_pruner_jax.serving.episodes import MAGIC, EpisodeRecorder, Recorded, read_episode
from safe_pruner_jax.serving.recorder import Step
from safe_pruner_jax.serving.replay import header, load

pytestmark = pytest.mark.newest


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A server that joins two robots, asks for a key, remembers three robots and records."""
    serving = ["--serving.max-batch", "2", "--serving.max-robots", "3", "--serving.max-delay-ms", "200", "--record"]
    serving += ["--serving.drain-s", "300"]  # a busy machine may need it
    server = Live(tmp_path_factory.mktemp("live"), *serving, OPENPI_API_KEY=KEY)
    # first of all, while it compiles
    during = [server.get(path) for path in ("/healthz", "/readyz")]
    while server.get("/readyz")[0] == 503:
        server.answers += server.get("/healthz")[0] == 200
        time.sleep(0.02)
    server.during = during
    yield server
    server.process.kill()
    server.process.wait()


# --- health, readiness, information ------------------------------------------------------------------------


def test_health_answers_during_compilation_and_readiness_comes_after_it(live):
    assert live.during == [(200, "OK\n"), (503, "warming up\n")]
    assert live.get("/healthz") == (200, "OK\n") and live.get("/readyz") == (200, "ready\n")
    assert live.answers > 1  # while it compiled


def test_health_answers_during_inference(live):
    done = threading.Event()

    def drive():
        client = live.client()
        while not done.is_set():
            client.infer(request(0))

    robot = threading.Thread(target=drive)
    robot.start()
    try:
        assert [live.get("/healthz") for _ in range(50)] == [(200, "OK\n")] * 50
    finally:
        done.set()
        robot.join(DEADLINE_S)


def test_info_tells_version_and_configuration(live):
    status, text = live.get("/info", Authorization=f"Api-Key {KEY}")
    info = json.loads(text)
    assert status == 200 and info["version"] and info["ready"] and info["max_batch"] == 2 and info["authentication"]
    assert info["real_time"] is False
    assert info["metadata"]["safe_pruner"]["configuration"]["pruner"] == "safe"
    assert KEY not in text


def test_metrics_count_what_happens(live):
    names = ['requests_total{outcome="ok"}', "kept_tokens_count", "queue_seconds_count", "request_seconds_count"]
    before = [live.metric(name) for name in names]
    client = live.client()
    client.infer(request(0)), client.infer(request(0, 1))
    until(lambda: [live.metric(name) for name in names] == [b + 2 for b in before])
    assert 0 < live.metric("keyframe_share") < 1 and live.metric("ready") == 1
    assert live.metric("device_seconds_sum") > 0 and live.metric("fallbacks_total") == 0


# --- several robots ----------------------------------------------------------------------------------------


def test_robots_share_steps_and_each_is_answered_as_if_alone(live):
    alone = {robot: [live.client()] for robot in (0, 1)}
    want = {robot: [client.infer(request(robot, step)) for step in range(3)] for robot, (client,) in alone.items()}
    for _ in range(20):  # on a busy machine the two may miss one another
        got = together(live, want)
        for robot, replies in got.items():
            for reply, expected in zip(replies, want[robot], strict=True):
                np.testing.assert_allclose(reply["actions"], expected["actions"], atol=1e-5)
                assert reply["pruning"]["keyframe"] == expected["pruning"]["keyframe"]
        if max(reply["server_timing"]["batch"] for reply in got[0]) == 2:
            return
    pytest.fail("no step was shared in 20 episodes")


def together(live, robots):
    """The replies to three steps of robots that begin at the same time."""
    got = {robot: [] for robot in robots}
    clients = {robot: live.client() for robot in robots}
    begin = threading.Barrier(len(got))

    def drive(robot):
        begin.wait(DEADLINE_S)
        for step in range(3):
            got[robot].append(clients[robot].infer(request(robot, step)))

    threads = [threading.Thread(target=drive, args=(robot,)) for robot in robots]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    for client in clients.values():
        client._ws.close()
    return got


def test_a_robot_id_keeps_the_memory_over_connections_until_it_is_evicted(live):
    def step(name):
        client = live.client()
        try:
            return client.infer(request(0, robot_id=name))["pruning"]["keyframe"]
        finally:
            client._ws.close()

    evicted = live.metric("evictions_total")
    assert [step(name) for name in ("a", "a", "b", "a")] == [True, False, True, False]
    assert [step(name) for name in ("c", "d", "e")] == [True] * 3  # three are remembered
    assert step("a") and live.metric("evictions_total") > evicted


def test_without_a_robot_id_a_new_connection_starts_afresh(live):
    first, second = live.client(), live.client()
    assert first.infer(request(0))["pruning"]["keyframe"] and not first.infer(request(0))["pruning"]["keyframe"]
    assert second.infer(request(0))["pruning"]["keyframe"]


def test_a_burst_of_one_robot_gets_an_explicit_reply_each_and_the_newest_is_run(live):
    with live.raw() as robot, live.raw() as other:  # two connected: requests wait a little, and can be superseded
        robot.recv(), other.recv()
        for step in range(6):
            robot.send(pack(request(0, step)))
        replies = [robot.recv(DEADLINE_S) for _ in range(6)]
        assert isinstance(replies[-1], bytes)
        refused = [reply for reply in replies if isinstance(reply, str)]
        assert refused and all(reply.startswith("superseded: ") for reply in refused)
        robot.send(pack(request(0)))  # the connection goes on
        assert isinstance(robot.recv(DEADLINE_S), bytes)


def test_a_request_that_waited_too_long_is_told_so_and_the_connection_goes_on(live):
    with live.raw() as robot, live.raw() as other:
        robot.recv(), other.recv()
        robot.send(pack(request(0, deadline_ms=1e-3)))  # two are connected: it waits for the other
        assert robot.recv(DEADLINE_S).startswith("expired: ")
        robot.send(pack(request(0, deadline_ms=1e6)))
        assert unpack(robot.recv(DEADLINE_S))["pruning"]["keyframe"]


# --- hostile clients ---------------------------------------------------------------------------------------


def state(**changes):
    """A message whose state is an array with some fields as told."""
    fields = {"data": b"\0" * 8, "dtype": "<f8", "shape": [1]} | changes
    encoded = {b"__ndarray__": True} | {key.encode(): value for key, value in fields.items()}
    return msgpack.packb({"prompt": "x", "observation/state": encoded})


HOSTILE = {
    "nesting": (b"\x91" * 100_000, "nested"),
    "announced size": (b"\x81\xa1a\xc6\xff\xff\xff\xff", "ends early"),
    "object dtype": (state(dtype="|O"), "like '<f4'"),
    "record dtype": (state(dtype="|V8"), "like '<f4'"),
    "huge shape": (state(shape=[2**40, 2**20]), "needs"),
    "not finite": (pack(request(0) | {"observation/state": np.full(8, np.inf)}), "expected finite"),
    "state shape": (pack(request(0) | {"observation/state": np.zeros((8, 8))}), "observation/state"),
    "robot id": (pack(request(0) | {"robot_id": "x" * 65}), "robot_id: expected"),
    "deadline": (pack(request(0) | {"deadline_ms": -1}), "deadline_ms: expected"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_used_is_explained_and_harms_nobody(live, name):
    message, says = HOSTILE[name]
    bystander = live.client()
    bystander.infer(request(0))
    errors = live.metric('requests_total{outcome="error"}')
    with live.raw() as robot:
        robot.recv()
        robot.send(message)
        answer = robot.recv(DEADLINE_S)
        assert isinstance(answer, str) and says in answer and "Traceback" not in answer and "File " not in answer
        with pytest.raises(ConnectionClosed) as closed:
            robot.recv(DEADLINE_S)
        assert closed.value.rcvd.code == 1011
    assert live.metric('requests_total{outcome="error"}') == errors + 1
    assert not bystander.infer(request(0, 1))["pruning"]["keyframe"]


def test_compression_is_never_agreed_to(live):
    with websockets.sync.client.connect(
        f"ws://127.0.0.1:{live.port}", compression="deflate", additional_headers={"Authorization": f"Api-Key {KEY}"}
    ) as robot:
        assert robot.response.headers.get("Sec-WebSocket-Extensions") is None
        assert robot.protocol.extensions == []


@pytest.mark.parametrize("key", [None, "wrong", KEY + "x", KEY[:-1]])
def test_a_wrong_key_is_refused_before_anything_is_said(live, key):
    with pytest.raises(InvalidStatus) as refused:
        live.raw(key)
    assert refused.value.response.status_code == 401
    headers = {"Authorization": f"Api-Key {key}"} if key else {}
    assert [live.get(path, **headers)[0] for path in ("/info", "/metrics")] == [401, 401]
    assert [live.get(path, **headers)[0] for path in ("/healthz", "/readyz")] == [200, 200]


def test_half_a_handshake_and_plain_garbage_do_no_harm(live):
    for start in (b"", b"GET / HTTP/1.1\r\nHost: x\r\n", b"\x16\x03\x01\x00\xa5garbage", b"POST / HTTP/1.1\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", live.port), DEADLINE_S) as client:
            client.sendall(start)
    assert live.client().infer(request(0))["actions"].shape == (10, 7)


# --- records, determinism, the end -------------------------------------------------------------------------


def play(server, folder_steps=3):
    client = server.client()
    replies = [client.infer(request(5, step)) for step in range(folder_steps)]
    client._ws.close()
    return [pack({k: v for k, v in reply.items() if not k.endswith("timing")}) for reply in replies]


def inspect(path: Path, *argv: str) -> tuple[int, str]:
    """`openpi inspect` of a tiny episode, in this process."""
    configs.CONFIGS[tiny_openpi.CONFIG] = small_config()
    try:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            return cli.main(["inspect", str(path), *argv]), out.getvalue()
    finally:
        del configs.CONFIGS[tiny_openpi.CONFIG]


def test_another_process_gives_the_same_bytes_and_a_killed_one_leaves_records_that_replay(live, tmp_path):
    server = Live(tmp_path, "--record", OPENPI_API_KEY=KEY)
    server.wait_for("ready for clients")
    bytes_there = play(server)
    assert bytes_there == play(server) == play(live)
    with server.raw() as robot:
        robot.recv()
        for step in range(20):
            robot.send(pack(request(6, step)))  # killed in mid-call
        server.process.kill()
    server.process.wait()
    first, second, *_ = sorted((tmp_path / "policy_records").iterdir())
    episode = read_episode(first)
    assert len(episode.steps) == 3 and episode.torn == 0 and episode.header["pruner"] == "safe"
    assert [
        pack({k: v for k, v in s["reply"].items() if not k.endswith("timing")}) for s in episode.steps
    ] == bytes_there

    code, text = inspect(first)
    assert code == 0 and text.count("  same\n") == 3 and "keyframe" in text

    torn = tmp_path / "torn.episode"
    torn.write_bytes(first.read_bytes() + second.read_bytes()[len(MAGIC) : len(MAGIC) + 40])
    assert len(read_episode(torn).steps) == 3 and read_episode(torn).torn == 40

    other = EpisodeRecorder(tmp_path / "changed", episode.header)
    for number, step in enumerate(episode.steps):
        reply = step["reply"] | {"actions": step["reply"]["actions"] + (number == 2) * 1e-3}
        other(Step("robot", step["request"], reply, number == 0, 1))
    (changed,) = (tmp_path / "changed").iterdir()
    code, text = inspect(changed)
    assert code == 1 and text.count("  same\n") == 2 and "1 of 3 steps differ" in text
    assert inspect(changed, "--show")[0] == 0


def test_an_episode_from_before_the_temperature_is_replayed_at_1(monkeypatch):
    asked = {}
    monkeypatch.setattr("safe_pruner_jax.serving.replay.load_policy", lambda *_, **options: asked.update(options))
    options = {"prompt_lengths": [16], "kernels": [], "num_steps": 10}
    told = header("mini_libero", None, "safe", {}, options=options)
    load(Path("old.episode"), Recorded(told, (), 0))
    assert asked["temperature"] == 1.0 and asked["num_steps"] == 10
    load(Path("new.episode"), Recorded(told | {"options": options | {"temperature": None}}, (), 0))
    assert asked["temperature"] is None


def test_sigterm_answers_what_waits_and_exits_0(live):
    """The last test of this server."""
    robots = [live.raw() for _ in range(12)]
    messages = [pack(request(number)) for number in range(12)]
    done = live.metric("batch_robots_sum")
    for robot, message in zip(robots, messages, strict=True):
        robot.recv()
        robot.send(message)
    # all are received, two of them run, and most wait
    until(lambda: live.metric("waiting_requests") + live.metric("batch_robots_sum") - done >= 10)
    live.process.send_signal(signal.SIGTERM)
    for robot in robots:
        assert unpack(robot.recv(DEADLINE_S))["actions"].shape == (10, 7)
        with pytest.raises(ConnectionClosed) as closed:
            robot.recv(DEADLINE_S)
        assert closed.value.rcvd.code == 1001
    assert live.process.wait(DEADLINE_S) == 0
    assert "Traceback" not in live.log()
