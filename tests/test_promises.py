"""What a robot may rely on, against live servers in processes of their own, with openpi's client and raw sockets."""

import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgpack
import numpy as np
import pytest
import tiny_openpi
import websockets.sync.client
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from test_fleet import request
from test_loading import tiny_config
from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus

from safe_pruner_jax import cli, configs
from safe_pruner_jax.serving import Access, ServerError, pack, running, unpack
from safe_pruner_jax.serving.access import is_loopback, read_key, tls_context
from safe_pruner_jax.serving.episodes import MAGIC, EpisodeError, EpisodeRecorder, read_episode
from safe_pruner_jax.serving.recorder import Step

# openpi's client connects outside a `with`, which websockets deprecates since 17.1
pytestmark = pytest.mark.filterwarnings(r"ignore:connect\(\) must be used:DeprecationWarning")

DEADLINE_S = 60.0
KEY = "a-key-for-tests-only"
DATA = Path(__file__).parent / "data"
SAFE = ["--pruner=safe", "--pruner.threshold=-1"]


class Live:
    """`openpi serve` of the tiny model in a process of its own."""

    def __init__(self, folder: Path, *argv: str, **environment: str):
        self.folder = folder
        self.process = tiny_openpi.start(*SAFE, *argv, cwd=folder, **environment)
        self.port = int(self.wait_for(r"listening on 127\.0\.0\.1:(\d+)"))

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def wait_for(self, pattern: str) -> str:
        end = time.monotonic() + DEADLINE_S
        while not (found := re.search(pattern, self.log())):
            assert self.process.poll() is None and time.monotonic() < end, self.log()
            time.sleep(0.02)
        return found[found.re.groups]

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read().decode()

    def client(self) -> WebsocketClientPolicy:
        return WebsocketClientPolicy("127.0.0.1", self.port, api_key=KEY)

    def raw(self, key: str | None = KEY):
        headers = {"Authorization": f"Api-Key {key}"} if key else None
        return websockets.sync.client.connect(
            f"ws://127.0.0.1:{self.port}", compression=None, max_size=None, additional_headers=headers
        )

    def metric(self, name: str) -> float:
        text = self.get("/metrics", Authorization=f"Api-Key {KEY}")[1]
        (value,) = re.findall(rf"^safe_pruner_{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(value)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_S)


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A server that joins two robots, asks for a key, remembers three robots and records."""
    serving = ["--serving.max-batch", "2", "--serving.max-robots", "3", "--serving.max-delay-ms", "200", "--record"]
    server = Live(tmp_path_factory.mktemp("live"), *serving, OPENPI_API_KEY=KEY)
    # first of all, while it compiles
    during = [server.get(path) for path in ("/healthz", "/readyz")]
    waits = [time.monotonic()]
    while server.get("/readyz")[0] == 503:
        waits.append(time.monotonic())
        time.sleep(0.02)
    server.during, server.gaps = during, np.diff(waits)
    yield server
    server.process.kill()
    server.process.wait()


# --- health, readiness, information ------------------------------------------------------------------------


def test_health_answers_during_compilation_and_readiness_comes_after_it(live):
    assert live.during == [(200, "OK\n"), (503, "warming up\n")]
    assert live.get("/healthz") == (200, "OK\n") and live.get("/readyz") == (200, "ready\n")
    assert len(live.gaps) > 20, "the server answered only a few times while it compiled"


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


def until(condition):
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "the expected state did not come"
        time.sleep(0.02)


# --- several robots ----------------------------------------------------------------------------------------


def test_robots_share_steps_and_each_is_answered_as_if_alone(live):
    alone = {robot: [live.client()] for robot in (0, 1)}
    want = {robot: [client.infer(request(robot, step)) for step in range(3)] for robot, (client,) in alone.items()}
    got = {0: [], 1: []}
    clients = {robot: live.client() for robot in got}

    def drive(robot):
        for step in range(3):
            got[robot].append(clients[robot].infer(request(robot, step)))

    robots = [threading.Thread(target=drive, args=(robot,)) for robot in got]
    for thread in robots:
        thread.start()
    for thread in robots:
        thread.join(DEADLINE_S)
    assert max(reply["server_timing"]["batch"] for reply in got[0]) == 2
    for robot, replies in got.items():
        for reply, expected in zip(replies, want[robot], strict=True):
            np.testing.assert_allclose(reply["actions"], expected["actions"], atol=1e-5)
            assert reply["pruning"]["keyframe"] == expected["pruning"]["keyframe"]


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
    configs.CONFIGS[tiny_openpi.CONFIG] = tiny_config(False)
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


def test_what_is_no_episode_is_one_line_and_exit_code_2(tmp_path, capsys):
    for name, content, says in (
        ("other", b"PK", "another file"),
        ("version", MAGIC.replace(b"1", b"9"), "another version"),
        ("empty", MAGIC, "nothing was recorded"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(EpisodeError, match=says):
            read_episode(tmp_path / name)
        assert cli.main(["inspect", str(tmp_path / name)]) == 2
        assert says in capsys.readouterr().err.splitlines()[-1]
    assert cli.main(["inspect", str(tmp_path / "absent")]) == 2


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


# --- bad starts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--serving.tls-cert", "/no/such.pem", "--serving.tls-key", "/no/such.pem"], "give PEM files"),
        (["--serving.tls-cert", str(DATA / "tls_cert.pem")], "expected both a certificate and its private key"),
        (["--serving.api-key-file", "/no/such/key"], "API key cannot be read"),
        (["--host", "0.0.0.0"], "expected an API key to listen on 0.0.0.0"),
        (["--serving.max-queue", "0"], "max_queue: expected at least 1"),
        (["policy:checkpoint", "--policy.config=pi05_libro", "--policy.dir=x"], "did you mean pi05_libero"),
        (
            ["policy:checkpoint", "--policy.config=pi05_libero", f"--policy.dir={DATA / 'ckpt_tiny_pi05'}"],
            "does not fit",
        ),
    ],
)
def test_a_bad_start_is_told_and_ends_with_exit_code_2(argv, says, capsys, monkeypatch):
    monkeypatch.delenv("OPENPI_API_KEY", raising=False)
    assert cli.main(["serve", *argv]) == 2
    told = capsys.readouterr().err
    assert says in told and "Traceback" not in told and "openpi serve: " in told


def test_a_port_in_use_ends_the_process_with_exit_code_2(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [sys.executable, tiny_openpi.__file__, "serve", *tiny_openpi.POLICY, *tiny_openpi.MODEL]
        command += ["--port", str(taken.getsockname()[1])]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
    assert result.returncode == 2
    assert re.search(r"openpi serve: cannot bind .*try another port", result.stderr.splitlines()[-1])


# --- access ------------------------------------------------------------------------------------------------


class Echo:
    """Serves without a model."""

    def __init__(self):
        self.metadata = {}

    def warmup(self): ...

    def session(self):
        return self

    def infer(self, request):
        return {"echo": request}


def test_tls_with_openpis_client(tmp_path, monkeypatch):
    context = tls_context(DATA / "tls_cert.pem", DATA / "tls_key.pem")
    with running(Echo(), access=Access(key=KEY, tls=context)) as server:
        monkeypatch.setenv("SSL_CERT_FILE", str(DATA / "tls_cert.pem"))
        client = WebsocketClientPolicy(f"wss://localhost:{server.port}", api_key=KEY)
        assert client.infer({"i": 1})["echo"] == {"i": 1}
        client._ws.close()
        with pytest.raises((OSError, InvalidMessage)):
            websockets.sync.client.connect(f"ws://localhost:{server.port}", open_timeout=2)
        checking = ssl.create_default_context()
        checking.load_verify_locations(DATA / "tls_cert.pem")
        plain = socket.create_connection(("127.0.0.1", server.port))
        with checking.wrap_socket(plain, server_hostname="localhost") as secure:
            assert secure.version() in ("TLSv1.2", "TLSv1.3")


def test_connections_of_one_address_are_limited():
    with running(Echo(), access=Access(per_address=2)) as server:
        address = f"ws://127.0.0.1:{server.port}"
        with websockets.sync.client.connect(address) as one, websockets.sync.client.connect(address):
            with pytest.raises(InvalidStatus) as refused:
                websockets.sync.client.connect(address)
            assert refused.value.response.status_code == 429
            one.recv()
        until(lambda: server._open.total() == 0)
        with websockets.sync.client.connect(address) as again:
            again.recv()


def test_a_client_that_takes_no_replies_is_cut_off_and_nobody_else_notices():
    with running(Echo(), send_s=0.3) as server, socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        key = b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
        slow.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" + key + b"\r\n")
        message = pack({"x": np.zeros(2**22, np.uint8)})
        frame = b"\x82\xff" + len(message).to_bytes(8, "big") + b"\0\0\0\0" + message
        slow.settimeout(DEADLINE_S)
        slow.sendall(frame * 2)
        other = WebsocketClientPolicy("127.0.0.1", server.port)
        until(lambda: server.metrics.errors.labels("slow_reader")._value.get() == 1)
        assert other.infer({"i": 1})["echo"] == {"i": 1}
        other._ws.close()


def test_a_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENPI_API_KEY", "from-the-environment")
    assert read_key(None) == "from-the-environment"
    (tmp_path / "key").write_text("from-the-file\n")
    assert read_key(tmp_path / "key") == "from-the-file"
    for bad in ("", "short", "has a space", "ключ-ключ-ключ"):
        (tmp_path / "key").write_text(bad)
        with pytest.raises(ServerError, match="at least 8 printable ASCII"):
            read_key(tmp_path / "key")
    monkeypatch.delenv("OPENPI_API_KEY")
    assert read_key(None) is None


def test_beyond_this_machine_a_key_is_needed():
    for host in ("0.0.0.0", "::", "192.168.1.2", "robot.lan", ""):
        assert not is_loopback(host)
        with pytest.raises(ServerError, match="expected an API key"):
            Access().check(host)
        Access(key=KEY).check(host)
        Access(insecure=True).check(host)
    Access().check("127.0.0.1")


def test_only_the_exact_key_is_admitted():
    access = Access(key=KEY)
    assert access.admits(f"Api-Key {KEY}")
    for wrong in (None, "", KEY, f"Bearer {KEY}", f"Api-Key {KEY} ", f"api-key {KEY}", "Api-Key ", "Api-Key \udcff"):
        assert not access.admits(wrong)
