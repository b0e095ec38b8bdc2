"""`openpi serve` of the tiny model, live, with a client and raw sockets to reach it; shared by tests of promises."""

import http.client
import re
import signal
import time
from pathlib import Path

import tiny_openpi
import websockets.sync.client
from openpi_client.websocket_client_policy import WebsocketClientPolicy

DEADLINE_S = 300.0
KEY = "a-key-for-tests-only"
SAFE = ["--pruner=safe", "--pruner.threshold=-1"]


class Live:
    """`openpi serve` of the tiny model in a process of its own."""

    def __init__(self, folder: Path, *argv: str, **environment: str):
        self.folder, self.answers = folder, 0
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


def until(condition):
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "the expected state did not come"
        time.sleep(0.02)
