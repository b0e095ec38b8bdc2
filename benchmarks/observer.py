"""What somebody who looks on costs a robot: requests with an observer and without, in turns.

python benchmarks/observer.py [--turns 15] [--requests 20] [--out benchmarks/results/observer_mini_cpu.json]

`openpi serve policy:embedded --serving.watch` runs in a process of its own, the observer in another, which reads
messages as `openpi view` does and throws them away. The robot pauses between requests, as one that executes its
actions does.
"""

import dataclasses
import select
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tyro
import websockets.sync.client
from record import begin, write
from serving import WARM, Server, asked

from safe_pruner_jax.analysis.view import live
from safe_pruner_jax.serving import pack, unpack

LOOK_ON = "look-on"
"""First argument of the process that is the observer of a port."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What is measured.

    Args:
      pruner: of the server.
      turns: pairs of blocks, one with an observer and one without; which is first alternates.
      requests: in a block.
      pause_s: between two requests.
      note: about the machine, for the result file.
      out: result file, JSON.
    """

    pruner: str = "safe"
    turns: int = 15
    requests: int = 20
    pause_s: float = 0.05
    note: str = ""
    out: Path | None = None


def look_on(port: int) -> None:
    """Reads until the server stops; prints a line for each step."""
    for frame in live(f"ws://127.0.0.1:{port}"):
        print(frame.number, flush=True)


def block(socket: websockets.sync.client.ClientConnection, args: Arguments, begin: int) -> list[float]:
    """Milliseconds of a robot's round trips."""
    times, rng = [], np.random.default_rng(begin)
    for step in range(begin, begin + args.requests):
        message, start = pack(asked(rng, 0, step)), time.perf_counter()
        socket.send(message)
        unpack(socket.recv(600))
        times.append((time.perf_counter() - start) * 1e3)
        time.sleep(args.pause_s)
    return times


def measure(args: Arguments, port: int) -> list[dict[str, float]]:
    """Medians of each turn, milliseconds."""
    turns, command = [], [sys.executable, __file__, LOOK_ON, str(port)]
    with websockets.sync.client.connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None) as robot:
        robot.recv(600)
        step = WARM
        block(robot, dataclasses.replace(args, requests=WARM), 0)
        for turn in range(args.turns):
            medians = {}
            for watched in (True, False) if turn % 2 else (False, True):
                observer = None
                if watched:
                    observer = subprocess.Popen(command, stdout=subprocess.PIPE)
                    while not select.select([observer.stdout], [], [], 0)[0]:  # until it has seen a step
                        block(robot, dataclasses.replace(args, requests=1), step)
                    if observer.poll() is not None:
                        raise SystemExit("observer: it ended before it had seen a step")
                medians["with" if watched else "without"] = statistics.median(block(robot, args, step))
                if observer is not None:
                    observer.kill()
                    observer.wait()
            step += args.requests  # both blocks of a turn ask the same
            turns.append({name: round(medians[name], 3) for name in ("with", "without")})
            print(turn, turns[-1], file=sys.stderr, flush=True)
    return turns


def main() -> None:
    """The command."""
    if sys.argv[1:2] == [LOOK_ON]:
        look_on(int(sys.argv[2]))
        return
    args = tyro.cli(Arguments, description=__doc__)
    record = begin("observer.py", args.note)
    with tempfile.TemporaryDirectory() as folder:
        server = Server(args.pruner, Path(folder), 1, ("--serving.watch",))
        try:
            turns = measure(args, server.port)
        finally:
            server.process.terminate()
            server.process.wait(60)
    ratios = [turn["with"] / turn["without"] for turn in turns]
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    measured = {
        "ratio": {"median": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]},
        "without_ms": round(statistics.median(turn["without"] for turn in turns), 3),
        "turns": turns,
    }
    write(record | measured, args.out)


if __name__ == "__main__":
    main()
