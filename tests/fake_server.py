"""A server of a backend of plain numpy, and clients for it; shared by tests of the server."""

import http.client
import threading
import time

import numpy as np
import websockets.sync.client

from safe_pruner_jax.policy.reply import NonFinite

DEADLINE_S = 60.0


class Mistake(ValueError):
    """Stands for a request that the policy refuses."""


class FakeSession:
    def __init__(self, backend):
        self.backend, self.step = backend, 0

    def infer(self, request):
        self.backend.threads.add(threading.current_thread().name)
        self.backend.started.set()
        match request.get("do"):
            case "wait":
                assert self.backend.release.wait(DEADLINE_S)
            case "mistake":
                raise Mistake("expected 2 cameras, got 1; send observation/wrist_image \N{SNOWMAN}")
            case "crash":
                raise KeyError("a secret detail")
            case "not finite":
                raise NonFinite
            case "stop iteration":
                raise StopIteration
            case "unpackable":
                return {"actions": object()}
            case "not a dict":
                return None
        self.step += 1
        self.backend.finished += 1
        return {
            "actions": np.full((10, 7), self.step, np.float32),
            "echo": request,
            "policy_timing": {"infer_ms": 1.5},
            "pruning": {"kept": 96, "alive": 512, "keyframe": False, "kappa": None},
        }


class FakeBackend:
    def __init__(self, metadata=None):
        self.metadata = metadata or {"model": "fake", "horizon": 10, "mean": np.arange(3.0)}
        self.sessions, self.finished, self.threads = 0, 0, set()
        self.started, self.release = threading.Event(), threading.Event()

    def warmup(self):
        self.threads.add(threading.current_thread().name)

    def session(self):
        self.sessions += 1
        self.threads.add(threading.current_thread().name)
        return FakeSession(self)


def raw(server):
    return websockets.sync.client.connect(f"ws://127.0.0.1:{server.port}", compression=None, max_size=None)


def get(port, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    return response.status, response.read()


def until(condition):
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "the expected state did not come"
        time.sleep(0.005)
