"""The server that `soak.py` tries: its process, its lives, its memory."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import websockets.sync.client

ROOT = Path(__file__).parents[1]
MESSAGE_MIB = 2
WAIT_S = 60.0


class Server:
    """The server process and its next lives; counts how long it takes to come back, and watches its memory."""

    def __init__(self, tiny: bool, folder: Path):
        program = ROOT / "tests" / "tiny_openpi.py"
        if tiny:
            sys.path.insert(0, str(program.parent))
            import tiny_openpi

            model = [*tiny_openpi.POLICY, *tiny_openpi.MODEL]
            self._command = [sys.executable, str(program)]
        else:
            model = ["policy:embedded", "--prompt-lengths", "16"]
            self._command = [sys.executable, "-m", "safe_pruner_jax"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        serving = [
            "--serving.max-batch",
            "2",
            "--serving.max-message-mib",
            str(MESSAGE_MIB),
            "--serving.max-robots",
            "64",
            "--serving.real-time",
        ]
        self._command += ["serve", *model, "--pruner=safe", "--port", str(self.port), *serving]
        self.log, self.lives, self.exit_codes = folder / "log", 0, []
        self.memory: list[list[float]] = []
        self.process: subprocess.Popen | None = None

    def start(self) -> float:
        """Starts it; returns seconds until it was ready."""
        started = time.monotonic()
        with self.log.open("ab") as log:
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            self.process = subprocess.Popen(self._command, cwd=self.log.parent, stdout=log, stderr=log, env=environment)
        self.lives += 1
        self.memory.append([])
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() - started > 600:
                raise SystemExit(f"soak: the server does not start:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.05)
        return time.monotonic() - started

    def ready(self) -> bool:
        """Whether /readyz says so."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 5) as probe:
            probe.sendall(b"GET /readyz HTTP/1.1\r\nHost: soak\r\n\r\n")
            return b" 200 " in probe.recv(64)
        return False

    def end(self, number: int) -> None:
        """Ends it by a signal."""
        self.process.send_signal(number)
        self.exit_codes.append(self.process.wait(WAIT_S))

    def sample(self) -> None:
        """Notes its resident memory, MB."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            status = Path(f"/proc/{self.process.pid}/status").read_text()
            self.memory[-1].append(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1e3)

    def connect(self) -> websockets.sync.client.ClientConnection:
        """A websocket connection that has had its metadata."""
        connection = websockets.sync.client.connect(
            f"ws://127.0.0.1:{self.port}", compression=None, max_size=None, open_timeout=WAIT_S, close_timeout=2
        )
        connection.recv(WAIT_S)
        return connection
