"""What the server adds to a control step, and how long robots wait for one another, on the loopback interface.

python benchmarks/serving.py [--requests 200] [--robots 1 4 16] [--out benchmarks/results/serving.json]

The bare step is `session.infer` in this process, before there is a server. Then `openpi serve policy:embedded` runs in
a process of its own, and robots with two pictures of 224 × 224 ask it as fast as they are answered. What the wire costs
is measured by itself, the same requests to servers that compute nothing: one that is the websockets library and no
more, and this package's.
"""

import contextlib
import dataclasses
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
import tyro
import websockets.sync.client
from nothing import server_of_nothing
from record import begin, write

from safe_pruner_jax.policy.embedded import EMBEDDED
from safe_pruner_jax.policy.loading import load_policy
from safe_pruner_jax.pruners import make
from safe_pruner_jax.serving import pack, unpack

EDGES_MS = [round(float(edge), 1) for edge in np.geomspace(1, 10_000, 33)]
"""Borders of the histograms, milliseconds; what is below or above them all falls into the outermost bins."""
WARM = 3
"""Requests of each robot that are not counted: the first is a keyframe."""


def asked(rng: np.random.Generator, robot: int, step: int) -> dict:
    """A request; the picture changes a little from step to step."""
    scene = np.random.default_rng(robot).integers(0, 200, (16, 16, 3), np.uint8)
    image = np.kron(scene, np.ones((14, 14, 1), np.uint8)) + rng.integers(0, 9, (224, 224, 3), np.uint8)
    images = {"observation/image": image, "observation/wrist_image": np.ascontiguousarray(image[::-1])}
    return images | {"observation/state": rng.random(8), "prompt": "pick up the bowl", "reset": step == 0}


def describe(ms: list[float]) -> dict:
    """Quantiles and the histogram of some milliseconds."""
    q = lambda share: round(float(np.quantile(ms, share)), 3)
    counts = np.histogram(np.clip(ms, EDGES_MS[0], EDGES_MS[-1]), EDGES_MS)[0]
    bins = {f"{low:g}-{high:g}": int(n) for (low, high), n in zip(pairwise(EDGES_MS), counts, strict=True) if n}
    return {"count": len(ms), "p50": q(0.5), "p90": q(0.9), "p99": q(0.99), "max": q(1), "histogram": bins}


def bare(pruner: str, requests: int) -> dict[str, list[float]]:
    """Milliseconds of `session.infer` in this process, in turns: plain, and continuing the last chunk (`rtc`).

    "beside the device" is what of a plain one is neither device nor transfer: checking and resizing.
    """
    policy = load_policy(EMBEDDED, pruner=make(pruner), prompt_lengths=(16,))
    kinds = {"plain": {}, "rtc": {"rtc": {"executed": 5, "delay": 4}}}
    sessions, rng = {kind: policy.session() for kind in kinds}, np.random.default_rng(0)
    times: dict[str, list[float]] = {kind: [] for kind in (*kinds, "beside the device")}
    for step in range(requests + WARM):
        for kind, more in kinds.items():
            request, start = asked(rng, 0, step) | more, time.perf_counter()
            reply = sessions[kind].infer(request)
            times[kind].append((time.perf_counter() - start) * 1e3)
            if kind == "plain":
                times["beside the device"].append(times[kind][-1] - reply["policy_timing"]["infer_ms"])
    return {kind: ms[WARM:] for kind, ms in times.items()}


def wire(requests: int) -> dict[str, list[float]]:
    """Milliseconds of a round trip to each server that computes nothing, in turns."""
    kinds = ("websockets", "server")
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    rng = np.random.default_rng(0)
    with contextlib.ExitStack() as stack:
        sockets = {}
        for kind in kinds:
            address = f"ws://127.0.0.1:{stack.enter_context(server_of_nothing(kind))}"
            connection = websockets.sync.client.connect(address, compression=None, max_size=None)
            sockets[kind] = stack.enter_context(connection)
            sockets[kind].recv(60)
        for step in range(requests + WARM):
            message = asked(rng, 0, step)
            for kind, socket in sockets.items():
                start = time.perf_counter()
                socket.send(pack(message))
                unpack(socket.recv(60))
                times[kind].append((time.perf_counter() - start) * 1e3)
    return {kind: ms[WARM:] for kind, ms in times.items()}


class Server:
    """`openpi serve policy:embedded` in a process of its own, `more` are further arguments of it."""

    def __init__(self, pruner: str, folder: Path, max_batch: int, more: Sequence[str] = ()):
        command = [
            sys.executable,
            "-m",
            "safe_pruner_jax",
            "serve",
        ]
        command += ["policy:embedded", "--prompt-lengths", "16", f"--pruner={pruner}", "--port", "0"]
        command += ["--serving.max-batch", str(max_batch), *more]
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        while (match := re.search(r"127\.0\.0\.1:(\d+)", self.log.read_text())) is None:
            if self.process.poll() is not None:
                raise SystemExit(f"serving: the server does not start:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.1)
        self.port = int(match[1])

    def robot(self, number: int, requests: int, rounds: list[dict]) -> None:
        """One robot asks as fast as it is answered."""
        rng, address = np.random.default_rng(number), f"ws://127.0.0.1:{self.port}"
        with websockets.sync.client.connect(address, compression=None, max_size=None, open_timeout=600) as socket:
            socket.recv(600)
            for step in range(requests + WARM):
                message, start = asked(rng, number, step), time.perf_counter()
                socket.send(pack(message))
                reply = unpack(socket.recv(600))
                ms = (time.perf_counter() - start) * 1e3
                if step >= WARM:
                    rounds.append(
                        {"ms": ms} | reply["server_timing"] | {"device_ms": reply["policy_timing"]["infer_ms"]}
                    )

    def drive(self, robots: int, requests: int) -> dict:
        """Several robots at the same time."""
        rounds: list[dict] = []
        threads = [threading.Thread(target=self.robot, args=(n, requests, rounds)) for n in range(robots)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        middle = lambda values: round(statistics.median(values), 3)
        return {
            "robots": robots,
            "round_trip_ms": describe([r["ms"] for r in rounds]),
            "queue_ms": middle([r["queue_ms"] for r in rounds]),
            "device_ms": middle([r["device_ms"] for r in rounds]),
            "server_step_ms": middle([r["infer_ms"] for r in rounds]),
            "beside_device_and_queue_ms": middle([r["ms"] - r["device_ms"] - r["queue_ms"] for r in rounds]),
            "robots_per_step": round(statistics.mean(r["batch"] for r in rounds), 2),
        }


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What is driven.

    Args:
      pruner: of the server.
      requests: altogether, for each number of robots.
      robots: how many at once; none: the bare step alone.
      max_batch: robots per device step.
      note: about the machine, for the result file.
      out: result file, JSON.
    """

    pruner: str = "safe"
    requests: int = 200
    robots: tuple[int, ...] = (1, 4, 16)
    max_batch: int = 1
    note: str = ""
    out: Path | None = None


def main() -> None:
    """The command."""
    args = tyro.cli(Arguments, description=__doc__)
    record = begin("serving.py", args.note)
    empty = wire(args.requests)
    alone = bare(args.pruner, min(args.requests, 100))
    driven = []
    if args.robots:
        with tempfile.TemporaryDirectory() as folder:
            server = Server(args.pruner, Path(folder), args.max_batch)
            try:
                driven = [server.drive(robots, -(-args.requests // robots)) for robots in args.robots]
            finally:
                server.process.terminate()
                server.process.wait(60)
    measured = {
        "device": jax.devices()[0].device_kind,
        "model": EMBEDDED,
        "wire_ms": {kind: describe(ms) for kind, ms in empty.items()},
        "bare_step_ms": describe(alone["plain"]),
        "bare_beside_device_ms": describe(alone["beside the device"]),
        "bare_rtc_step_ms": describe(alone["rtc"]),
        "served": driven,
    }
    write(record | measured, args.out)


if __name__ == "__main__":
    main()
