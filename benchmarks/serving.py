"""What the server adds to a control step, and how long robots wait for one another, on the loopback interface.

python benchmarks/serving.py [--requests 200] [--robots 1 4 16] [--out benchmarks/results/serving.json]

The bare step is `session.infer` in this process, before there is a server. Then `openpi serve policy:embedded` runs in
a process of its own, and robots with two pictures of 224 × 224 ask it as fast as they are answered.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np
import websockets.sync.client

from safe_pruner_jax.loading import EMBEDDED, load_policy
from safe_pruner_jax.pruners import make
from safe_pruner_jax.serving import pack, unpack

EDGES_MS = [round(float(edge), 1) for edge in np.geomspace(10, 10_000, 25)]
"""Borders of the histograms, milliseconds; the first and the last bin are open."""
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
    counts = np.histogram(ms, [0.0, *EDGES_MS, np.inf])[0]
    return {"count": len(ms), "p50": q(0.5), "p90": q(0.9), "p99": q(0.99), "max": q(1), "histogram": counts.tolist()}


def bare(pruner: str, requests: int) -> list[float]:
    """Milliseconds of `session.infer` in this process."""
    session = load_policy(EMBEDDED, pruner=make(pruner), prompt_lengths=(16,)).session()
    rng, times = np.random.default_rng(0), []
    for step in range(requests + WARM):
        request, start = asked(rng, 0, step), time.perf_counter()
        session.infer(request)
        times.append((time.perf_counter() - start) * 1e3)
    return times[WARM:]


class Server:
    """`openpi serve policy:embedded` in a process of its own."""

    def __init__(self, pruner: str, folder: Path, max_batch: int):
        command = [sys.executable, "-c", "import sys; from safe_pruner_jax.cli import main; sys.exit(main())", "serve"]
        command += ["policy:embedded", "--prompt-lengths", "16", f"--pruner={pruner}", "--port", "0"]
        command += ["--serving.max-batch", str(max_batch)]
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        while (found := re.search(r"127\.0\.0\.1:(\d+)", self.log.read_text())) is None:
            if self.process.poll() is not None:
                raise SystemExit(f"serving: the server does not start:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.1)
        self.port = int(found[1])

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
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        middle = lambda values: round(statistics.median(values), 3)
        return {
            "robots": robots,
            "replies_per_s": round(robots * (requests + WARM) / (time.perf_counter() - start), 2),
            "round_trip_ms": describe([r["ms"] for r in rounds]),
            "queue_ms": describe([r["queue_ms"] for r in rounds]),
            "device_ms": middle([r["device_ms"] for r in rounds]),
            "server_step_ms": middle([r["infer_ms"] for r in rounds]),
            "beside_device_and_queue_ms": middle([r["ms"] - r["device_ms"] - r["queue_ms"] for r in rounds]),
            "robots_per_step": round(statistics.mean(r["batch"] for r in rounds), 2),
        }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pruner", default="safe")
    parser.add_argument("--requests", type=int, default=200, help="altogether, for each number of robots")
    parser.add_argument("--robots", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--max-batch", type=int, default=1)
    parser.add_argument("--note", default="", help="about the machine, for the result file")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    alone = bare(args.pruner, min(args.requests, 100))
    with tempfile.TemporaryDirectory() as folder:
        server = Server(args.pruner, Path(folder), args.max_batch)
        try:
            driven = [server.drive(robots, -(-args.requests // robots)) for robots in args.robots]
        finally:
            server.process.terminate()
            server.process.wait(60)
    result = {
        "command": " ".join(["python", "benchmarks/serving.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "note": args.note,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "model": EMBEDDED,
        "bare_step_ms": describe(alone),
        "histogram_edges_ms": EDGES_MS,
        "served": driven,
    }
    text = json.dumps(result, indent=2)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
