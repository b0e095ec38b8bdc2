"""Robots, faults and restarts against one policy server for some minutes; everything they are told is checked.

    python scripts/soak.py --tiny --minutes 2 --frames 2000 --out benchmarks/results/soak_tiny_cpu.json
    python scripts/soak.py --minutes 10 --frames 10000 --robots 8 --out soak.json          # the embedded policy

Robots play scripted episodes whose replies are known from a run alone: a still scene, a frozen and a black camera, a
scene cut, another prompt, chunks that continue one another. Meanwhile they disconnect, die in mid-call, send NaN and
bursts; others send malformed and oversized messages or take no replies; the server is stopped (SIGTERM) and killed
(SIGKILL) and started again. Loopback only, seeded. Exit code 0 if no answer was wrong, none was another robot's, memory
stayed flat and the server came back.
"""

import contextlib
import dataclasses
import json
import os
import platform
import random
import signal
import socket
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import tyro
from soak_faults import episode, mutate
from soak_server import MESSAGE_MIB, WAIT_S, Server
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from safe_pruner_jax.serving import pack, unpack

TOLERANCE = 1e-4
"""Largest difference to the run alone, relative to the range of the actions; a shared device step rounds otherwise."""
GROWTH = 0.05
"""Largest growth of the server's memory between the middle and the last third of a life, as a share."""
SENDERS = 4
"""Clients that send malformed frames at the same time."""
Broken = (ConnectionClosed, InvalidHandshake, OSError, EOFError, TimeoutError)


class Tally:
    """What was seen, shared by all threads."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.latencies: list[float] = []
        self.problems: list[str] = []
        self._lock = threading.Lock()

    def count(self, name: str) -> None:
        """One more of something."""
        with self._lock:
            self.counts[name] += 1

    def problem(self, kind: str, text: str) -> None:
        """Something that must not be."""
        with self._lock:
            self.counts[kind] += 1
            self.problems.append(f"{kind}: {text}"[:300])


def matches(actions: np.ndarray, want: np.ndarray) -> bool:
    """Whether two replies are the same up to rounding."""
    return actions.shape == want.shape and np.abs(actions - want).max() <= TOLERANCE * max(np.ptp(want), 1.0)


class Robot(threading.Thread):
    """Plays its episode again and again, with faults of its own."""

    def __init__(self, number: int, soak: "Soak"):
        super().__init__(daemon=True)
        self.number, self.soak, self.random = number, soak, random.Random(f"{soak.seed}/{number}")
        self.id = f"robot-{number}" if number % 2 else None  # every other one is known by name
        self.requests, self.connection, self.last_ok = soak.episodes[number], None, 0.0

    def run(self) -> None:
        """Until the soak ends."""
        step, life = 0, 0
        while not self.soak.over.is_set():
            try:
                if self.connection is None:
                    self.connection = self.soak.server.connect()
                    step = step if self.id and life == self.soak.server.lives else 0  # its memory is gone
                life = self.soak.server.lives
                step = self.turn(step)
            except Broken:
                self.soak.tally.count("connections lost")
                self.hang_up()
                step = 0
                time.sleep(0.05)
        self.hang_up()

    def turn(self, step: int) -> int:
        """One request with or without a fault; the step that comes next."""
        request = dict(self.requests[step]) | ({"robot_id": self.id} if self.id else {})
        fault = self.random.random()
        if fault < 0.03:  # dies in mid-call: nobody knows whether the step was run
            self.soak.tally.count("killed in mid-call")
            self.connection.send(pack(request))
            linger = struct.pack("ii", 1, 0)
            self.connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close_socket()
            self.connection = None
            return self.wait_out()
        if fault < 0.06:
            self.soak.tally.count("disconnects")
            self.hang_up()
            return step
        if fault < 0.09:
            self.ask_nan(request)
            return step
        if fault < 0.12:
            request["deadline_ms"] = 0.01
        return self.ask(request, step, 3 if step == len(self.requests) - 1 and fault > 0.9 else 1)

    def ask_nan(self, request: dict) -> None:
        """A request with a state of NaN, which must be refused."""
        self.soak.tally.count("not finite")
        self.connection.send(pack(request | {"observation/state": np.full(8, np.nan)}))
        answer = self.connection.recv(WAIT_S)
        if not (isinstance(answer, str) and "expected finite" in answer):
            self.soak.tally.problem("wrong answers", f"a state of NaN was answered with {answer!r:.80}")
        self.hang_up()

    def ask(self, request: dict, step: int, times: int) -> int:
        """The same request several times at once, of which one is answered; the step that comes next."""
        started = time.monotonic()
        for _ in range(times):
            self.connection.send(pack(request))
        answers = [self.connection.recv(WAIT_S) for _ in range(times)]
        replies = [unpack(answer) for answer in answers if isinstance(answer, bytes)]
        for text in (answer for answer in answers if isinstance(answer, str)):
            kind = text.partition(":")[0]
            if kind not in ("superseded", "expired", "rejected"):
                self.soak.tally.problem("wrong answers", f"robot {self.number} was told {text}")
            self.soak.tally.count(kind)
        if not replies:
            return step  # it was not run: the same again
        self.soak.tally.latencies.append(time.monotonic() - started)
        self.judge(step, replies[0])
        return (step + 1) % len(self.requests)

    def wait_out(self) -> int:
        """Lets a request that may still run finish, then starts over."""
        time.sleep(0.3)
        return 0

    def judge(self, step: int, reply: dict) -> None:
        """Compares a reply with the run alone."""
        self.last_ok = time.monotonic()
        self.soak.tally.count("replies")
        self.soak.tally.count(f"replies in steps of {reply['server_timing']['batch']}")
        self.soak.tally.count("replies on the full path" if reply["pruning"]["keyframe"] else "pruned replies")
        want, keyframe = self.soak.alone[self.number][step]
        if matches(reply["actions"], want) and reply["pruning"]["keyframe"] == keyframe:
            return
        others = [n for n, known in self.soak.alone.items() if any(matches(reply["actions"], w) for w, _ in known)]
        kind = "answers of another robot" if others and self.number not in others else "wrong answers"
        self.soak.tally.problem(kind, f"robot {self.number}, step {step}, life {self.soak.server.lives}, {others}")

    def hang_up(self) -> None:
        """Closes the connection."""
        with contextlib.suppress(*Broken):
            if self.connection is not None:
                self.connection.close()
        self.connection = None


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What is soaked, and for how long.

    Args:
      tiny: the tests' tiny model instead of the embedded policy.
      minutes: of play.
      robots: that play at once.
      frames: malformed frames to send.
      seed: of observations and faults.
      restarts: signals in between.
      note: about the machine, for the result file.
      out: result file, JSON.
    """

    tiny: bool = False
    minutes: float = 10.0
    robots: int = 6
    frames: int = 10_000
    seed: int = 0
    restarts: bool = True
    note: str = ""
    out: Path | None = None


class Soak:
    """The whole of it."""

    def __init__(self, args: Arguments, folder: Path):
        self.args, self.seed, self.tally, self.over = args, args.seed, Tally(), threading.Event()
        self.server = Server(args.tiny, folder)
        self.episodes = {robot: episode(robot, args.seed) for robot in range(args.robots)}
        self.alone: dict[int, list[tuple[np.ndarray, bool]]] = {}
        self.recovery: list[dict] = []
        self.signals = [signal.SIGTERM, signal.SIGKILL] if args.restarts else []

    def play_alone(self) -> None:
        """What every robot is answered when nobody else is there."""
        for robot, requests in self.episodes.items():
            connection = self.server.connect()
            replies = []
            for request in requests:
                connection.send(pack(request))
                reply = unpack(connection.recv(WAIT_S))
                replies.append((reply["actions"], reply["pruning"]["keyframe"]))
            connection.close()
            self.alone[robot] = replies

    def send_malformed(self, sender: int, count: int) -> None:
        """Malformed frames, one connection each: an explanation or a reply, and never silence."""
        rng = random.Random(f"{self.seed}/malformed/{sender}")
        while self.tally.counts["malformed frames"] < count and not self.over.is_set():
            try:
                connection = self.server.connect()
            except Broken:
                time.sleep(0.1)  # the server is being started again
                continue
            try:
                with contextlib.closing(connection):
                    connection.send(mutate(self.episodes[0][0], rng))
                    answer = connection.recv(WAIT_S)
                    self.tally.count("malformed frames")
                    if isinstance(answer, bytes):
                        self.tally.count("malformed frames that were harmless")
                    elif "Traceback" in answer or "internal error" in answer:
                        self.tally.problem("malformed frames badly answered", answer)
            except TimeoutError:
                self.tally.problem("malformed frames badly answered", "not at all")
            except Broken:
                continue  # the server was stopped meanwhile

    def send_oversized(self) -> None:
        """Messages over the limit, and clients that take no replies."""
        while not self.over.wait(3.0):
            with contextlib.suppress(*Broken):
                slow = self.server.connect()
                for request in self.episodes[0][:4]:
                    slow.send(pack(request))
                self.tally.count("slow readers")
                connection = self.server.connect()
                with contextlib.closing(slow), contextlib.closing(connection):
                    try:
                        connection.send(bytes(MESSAGE_MIB * 2**20 + 1))
                        connection.recv(WAIT_S)
                        self.tally.problem("oversized messages accepted", "")
                    except ConnectionClosed as closed:
                        code = closed.rcvd.code if closed.rcvd else None
                        self.tally.count(f"oversized messages closed with {code}")
                    time.sleep(1.0)

    def restart(self, number: int, robots: list[Robot]) -> None:
        """Ends the server by a signal and starts it again."""
        ended = time.monotonic()
        self.server.end(number)
        start_s = self.server.start()
        while not (late := [r.last_ok - ended for r in robots if r.last_ok > ended + start_s - 0.5]):
            if time.monotonic() - ended > start_s + WAIT_S:
                self.tally.problem("no recovery", signal.Signals(number).name)
                return
            time.sleep(0.02)
        code = self.server.exit_codes[-1]
        recovered = {
            "signal": signal.Signals(number).name,
            "exit_code": code,
            "start_s": start_s,
            "first_reply_s": min(late),
        }
        self.recovery.append(recovered)
        if number == signal.SIGTERM and code != 0:
            self.tally.problem("bad exit", f"SIGTERM ended with {code}")

    def run(self) -> dict:
        """Everything; the result."""
        start_s = self.server.start()
        self.play_alone()
        robots = [Robot(number, self) for number in self.episodes]
        workers = [
            threading.Thread(target=self.send_malformed, args=(sender, self.args.frames), daemon=True)
            for sender in range(SENDERS)
        ]
        workers.append(threading.Thread(target=self.send_oversized, daemon=True))
        begun, seconds = time.monotonic(), self.args.minutes * 60
        for thread in (*robots, *workers):
            thread.start()
        parts = [*self.signals, None]
        for part, number in enumerate(parts, 1):
            while time.monotonic() - begun < seconds * part / len(parts):
                time.sleep(0.5)
                self.server.sample()
            if number is not None:
                self.restart(number, robots)
        while self.tally.counts["malformed frames"] < self.args.frames and time.monotonic() - begun < 3 * seconds:
            time.sleep(0.5)
            self.server.sample()
        self.over.set()
        for thread in (*robots, *workers):
            thread.join(WAIT_S)
        self.server.end(signal.SIGTERM)
        return self.result(start_s, time.monotonic() - begun)

    def result(self, start_s: float, seconds: float) -> dict:
        """Figures and verdicts."""
        memory = []
        for life in (life for life in self.server.memory if len(life) >= 6):
            third = len(life) // 3  # in the first one allocators take what they will need
            thirds = [statistics.median(part) for part in (life[:third], life[third:-third], life[-third:])]
            series = [round(mb) for mb in life[:: max(1, len(life) // 30)]]
            memory.append({"median_of_thirds_mb": thirds, "growth": thirds[2] / thirds[1] - 1, "series_mb": series})
        counts, latencies = self.tally.counts, sorted(self.tally.latencies)
        quantile = lambda q: latencies[min(int(q * len(latencies)), len(latencies) - 1)] * 1e3 if latencies else None
        checks = {
            "no wrong answer": not counts["wrong answers"],
            "no answer of another robot": not counts["answers of another robot"],
            "replies were checked": counts["replies"] > 0,
            "all malformed frames answered": counts["malformed frames"] >= self.args.frames
            and not counts["malformed frames badly answered"],
            "no oversized message accepted": not counts["oversized messages accepted"],
            "memory flat": bool(memory) and all(life["growth"] <= GROWTH for life in memory),
            "came back after each signal": len(self.recovery) == len(self.signals),
            "stopped with exit code 0": self.server.exit_codes[-1] == 0 and not counts["bad exit"],
        }
        return {
            "command": " ".join(["python", "scripts/soak.py", *sys.argv[1:]]),
            "model": "tiny (tests)" if self.args.tiny else "embedded",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
            "note": self.args.note,
            "seconds": seconds,
            "robots": self.args.robots,
            "first_start_s": start_s,
            "counts": dict(sorted(counts.items())),
            "latency_ms": {"median": quantile(0.5), "p95": quantile(0.95), "max": quantile(1.0)},
            "recovery": self.recovery,
            "memory": memory,
            "checks": checks,
            "problems": self.tally.problems[:50],
        }


def main() -> int:
    args = tyro.cli(Arguments, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(args, Path(folder))
        try:
            result = soak.run()
        finally:
            soak.over.set()
            if soak.server.process is not None:
                soak.server.process.kill()
    text = json.dumps(result, indent=2)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0 if all(result["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
