"""The server against openpi's own client: its contract, start and stop, records; a backend of plain numpy."""

import gc
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
import websockets.sync.client
from fake_server import DEADLINE_S, FakeBackend, get, raw, until
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from websockets.exceptions import ConnectionClosed

from safe_pruner_jax.serving import Recorder, ServerError, Step, WireError, pack, running, unpack


def health(port):
    return get(port, "/healthz")


# --- openpi's contract -----------------------------------------------------------------------------------


def test_metadata_comes_first(connect):
    metadata = connect().get_server_metadata()
    assert metadata["model"] == "fake" and metadata["horizon"] == 10
    np.testing.assert_array_equal(metadata["mean"], [0, 1, 2])


def test_a_request_reaches_the_session_and_the_reply_the_client(connect):
    request = {
        "observation/image": np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8),
        "observation/state": np.linspace(-1, 1, 8),
        "prompt": "lift the \N{GREEK SMALL LETTER PI}",
        "reset": True,
    }
    reply = connect().infer(request)
    assert reply["actions"].shape == (10, 7) and reply["actions"].dtype == np.float32
    assert reply["pruning"] == {"kept": 96, "alive": 512, "keyframe": False, "kappa": None}
    assert reply["policy_timing"] == {"infer_ms": 1.5}
    for key, value in request.items():
        np.testing.assert_array_equal(reply["echo"][key], value)


def test_server_timing(connect, backend):
    client = connect()
    first, second = client.infer({})["server_timing"], client.infer({})["server_timing"]
    assert list(first) == ["infer_ms", "queue_ms", "batch"]
    assert list(second) == ["infer_ms", "prev_total_ms", "queue_ms", "batch"] and second["batch"] == 1
    assert 0 <= first["infer_ms"] <= second["prev_total_ms"] < 1e3 * DEADLINE_S
    backend.started.clear()

    def release_later():
        assert backend.started.wait(DEADLINE_S)
        time.sleep(0.05)
        backend.release.set()

    threading.Thread(target=release_later).start()
    assert client.infer({"do": "wait"})["server_timing"]["infer_ms"] >= 50


def test_each_connection_has_its_session(connect, backend):
    one, two = connect(), connect()
    assert [c.infer({})["actions"][0, 0] for c in (one, two, one, one, two)] == [1, 1, 2, 3, 2]
    assert backend.sessions == 2


def test_a_new_connection_starts_afresh(connect, backend):
    client = connect()
    client.infer({})
    client._ws.close()
    assert connect().infer({})["actions"][0, 0] == 1
    assert backend.sessions == 2


def test_one_thread_does_all_device_work(connect, backend):
    connect().infer({})
    connect().infer({})
    assert len(backend.threads) == 1


def test_healthz_while_a_call_runs(connect, backend, server):
    assert health(server.port) == (200, b"OK\n")
    client = connect()
    call = threading.Thread(target=client.infer, args=({"do": "wait"},))
    call.start()
    assert backend.started.wait(DEADLINE_S)
    for _ in range(3):
        assert health(server.port) == (200, b"OK\n")
    assert call.is_alive()
    backend.release.set()
    call.join(DEADLINE_S)


# --- start and stop --------------------------------------------------------------------------------------


def test_who_comes_during_warm_up_waits_and_is_served_afterwards(caplog):
    backend = FakeBackend()
    warm = threading.Event()
    backend.warmup = lambda: warm.wait(DEADLINE_S)
    seen = {}

    def use():
        with running(backend, port=port) as server:
            done.wait(DEADLINE_S)
            seen["after"] = [get(server.port, path)[0] for path in ("/healthz", "/readyz")]

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done, user = threading.Event(), threading.Thread(target=use)
    user.start()
    until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
    assert [get(port, path)[0] for path in ("/healthz", "/readyz")] == [200, 503]
    with websockets.sync.client.connect(f"ws://127.0.0.1:{port}") as early:
        with pytest.raises(TimeoutError):
            early.recv(0.1)
        early.send(pack({"i": 1}))
        warm.set()
        assert unpack(early.recv(DEADLINE_S))["model"] == "fake"
        assert unpack(early.recv(DEADLINE_S))["echo"] == {"i": 1}
    done.set()
    user.join(DEADLINE_S)
    assert seen["after"] == [200, 200]


def test_a_failing_warmup_is_raised():
    backend = FakeBackend()
    backend.warmup = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError), running(backend):
        pytest.fail("served without warm-up")


def test_metadata_that_cannot_be_sent():
    with pytest.raises(WireError, match=r"message\['model'\]: cannot send object"):
        running(FakeBackend({"model": object()})).__enter__()


@pytest.mark.parametrize("port", [None, 70_000])
def test_a_port_that_cannot_be_bound(server, port):
    backend = FakeBackend()
    with pytest.raises(ServerError, match=r"cannot bind 127\.0\.0\.1:.*another port"):
        running(backend, port=port or server.port).__enter__()
    assert not backend.threads, "warmed up in vain"


def test_a_process_of_its_own_leaves_what_is_there_out_of_its_collections():
    with running(FakeBackend()):
        assert gc.get_freeze_count() == 0  # the process belongs to somebody else
    rare = gc.get_threshold()
    gc.set_threshold(700, 10, 10)  # as Python has it, and no test run
    try:
        with running(FakeBackend(), dedicated=True):
            assert gc.get_freeze_count() > 10_000
            connection = Cycle()
            left = weakref.ref(connection)
            gc.collect(1)  # it has lived for a while
            del connection
            for _ in range(100_000):  # what requests leave behind
                Cycle()
            assert left() is None, "connections that have ended stay until as much is new as jax has objects"
    finally:
        gc.unfreeze()
        gc.set_threshold(*rare)


class Cycle:
    """Only a garbage collection frees it, like a websocket connection."""

    def __init__(self):
        self.me = self


def test_stop_closes_idle_clients():
    with running(FakeBackend()) as server:
        client = raw(server)
        client.recv(DEADLINE_S)
    with pytest.raises(ConnectionClosed) as closed:
        client.recv(DEADLINE_S)
    assert closed.value.rcvd.code == 1001
    server.stop()  # once more does no harm


PROGRAM = """
import logging, sys, time
from safe_pruner_jax.serving import serve

class Backend:
    metadata = {}
    def warmup(self): print("warming", flush=True); time.sleep(float(sys.argv[1]))
    def session(self): return self
    def infer(self, request): print("called", flush=True); time.sleep(0.3); return {"done": True}

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
serve(Backend(), port=0)
print("returned", flush=True)
"""


@pytest.fixture
def program():
    started = []

    def start(warmup_s):
        root = str(pathlib.Path(__file__).parent.parent)
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(warmup_s)],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": root},
            )
        )
        watchdog = threading.Timer(3 * DEADLINE_S, started[-1].kill)  # a hang ends the reading of its output
        watchdog.daemon = True
        watchdog.start()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def read_until(process, text):
    for line in process.stdout:
        if text in line:
            return line
    pytest.fail(f"the server ended without saying {text!r}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_running_call_finish(program, number):
    process = program(0)
    port = int(read_until(process, "ready").rsplit(":", 1)[1])
    client, idle = (websockets.sync.client.connect(f"ws://127.0.0.1:{port}") for _ in range(2))
    client.recv(DEADLINE_S)
    client.send(pack({}))
    read_until(process, "called")
    process.send_signal(number)
    assert unpack(client.recv(DEADLINE_S))["done"] is True
    for connection in (client, idle):
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                connection.recv(DEADLINE_S)
        assert closed.value.rcvd.code == 1001
    assert "returned" in process.communicate(timeout=DEADLINE_S)[0]
    assert process.returncode == 0


def test_a_second_signal_ends_a_long_warmup(program):
    process = program(60)
    read_until(process, "warming")
    process.send_signal(signal.SIGINT)
    read_until(process, "a second signal stops at once")
    process.send_signal(signal.SIGINT)
    assert process.wait(DEADLINE_S) == -signal.SIGINT


# --- recorder --------------------------------------------------------------------------------------------


def step(request):
    return Step("robot", request, {}, False, 1)


def load(path):
    return np.load(path, allow_pickle=True).item()


def test_records_are_openpi_s(tmp_path):
    request = {"observation/state": np.arange(8.0), "nested": {"a": 1, "empty": {}}, "prompt": "lift"}
    with running(FakeBackend(), recorder=Recorder(tmp_path / "policy_records")) as server:
        client = WebsocketClientPolicy("127.0.0.1", server.port)
        client.infer(request)
        client.infer(request)
        client._ws.close()
    assert sorted(p.name for p in (tmp_path / "policy_records").iterdir()) == ["step_0.npy", "step_1.npy"]
    step = load(tmp_path / "policy_records" / "step_1.npy")
    assert step["inputs/nested/a"] == 1 and step["inputs/prompt"] == "lift"
    assert step["outputs/actions"][0, 0] == 2 and step["outputs/policy_timing/infer_ms"] == 1.5
    np.testing.assert_array_equal(step["inputs/observation/state"], np.arange(8.0))
    assert not any("server_timing" in key or "empty" in key for key in step)


def test_a_recorder_goes_on_after_existing_steps(tmp_path):
    Recorder(tmp_path)(step({"a": 0}))
    (tmp_path / "step_x.npy").touch()
    (tmp_path / "step_7.partial").touch()
    Recorder(tmp_path)(step({"a": 1}))
    assert [load(tmp_path / f"step_{i}.npy")["inputs/a"] for i in range(2)] == [0, 1]


def test_a_recorder_shared_by_threads_loses_nothing(tmp_path):
    recorder = Recorder(tmp_path)
    threads = [
        threading.Thread(target=lambda i=i: [recorder(step({"i": i, "j": j})) for j in range(20)]) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    steps = {(s["inputs/i"], s["inputs/j"]) for s in map(load, tmp_path.glob("step_*.npy"))}
    assert len(steps) == 80


def test_a_failing_recorder_does_not_stop_the_robot(caplog):
    def full_disk(step):
        raise OSError("no space left on device")

    with running(FakeBackend(), recorder=full_disk) as server:
        client = WebsocketClientPolicy("127.0.0.1", server.port)
        assert [client.infer({})["actions"][0, 0] for _ in range(2)] == [1, 2]
        client._ws.close()
    assert "no space left" in caplog.text
