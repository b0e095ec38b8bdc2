"""Who plays: simulators as the loop of `evaluate.play` sees them, and those that are processes of this machine.

    crew.hire()                                      one more simulator, which says "ready" when it can play
    crew.start(simulator, job)                       it plays an episode
    for simulator, kind, content in crew.listen():   what has happened meanwhile

kind        content            meaning
"ready"     None               it can play
"episode"   Episode            played to its end, whatever the outcome
"lost"      text               the simulator has died, and its episode is an error
"gone"      text               its machine has died: the episode is played again by another one
"again"     text               its policy has died: the episode is played again; it says "ready" once there is another
"fatal"     text               nothing would come of another try
"""

import time
from collections.abc import Hashable, Iterator
from multiprocessing.connection import wait
from typing import Any, Protocol

from safe_pruner_jax.evaluation.workers import Job, MakeEnv, Worker, libero_env

PATIENCE_S = 5
"""Seconds between two looks at whether somebody stalls."""

STALL_S = 600
"""Seconds without a word from a simulator that is not waiting for us, after which it is killed."""

Message = tuple[Hashable, str, Any]
"""A simulator, the kind of its message and the content, see above."""


class EvaluationError(RuntimeError):
    """A run that cannot go on; the finished episodes are in the file, and the message says what to do."""


class Crew(Protocol):
    """Simulators, and the policy that each of them asks."""

    def hire(self) -> None:
        """Asks for one more simulator."""

    def start(self, simulator: Hashable, job: Job) -> None:
        """Gives an episode to a simulator that is ready."""

    def dismiss(self, simulator: Hashable) -> None:
        """Ends a simulator; also one that has died."""

    def listen(self) -> Iterator[Message]:
        """What has happened since the last call; waits at most `PATIENCE_S`. Raises EvaluationError."""
        ...

    def device(self, simulator: Hashable) -> str:
        """What its policy runs on."""
        ...

    def close(self) -> None:
        """Ends all simulators."""


class Processes:
    """Simulators in processes of this machine; whoever waits for a reply when the device is free shares its step.

    Args:
      source: of the replies (`sources.Source`).
      make_env: makes the environments.
    """

    def __init__(self, source: Any, make_env: MakeEnv = libero_env):
        self._source, self._make_env = source, make_env
        self._new: list[Worker] = []
        self._pool: dict[Any, Worker] = {}

    def hire(self) -> None:
        """Starts a process."""
        worker = Worker(self._make_env, self._source.server)
        self._pool[worker.connection] = worker
        self._new.append(worker)

    def start(self, simulator: Worker, job: Job) -> None:
        """Sends the job, and begins the noise of its episode."""
        if self._source.robots:
            self._source.robots.start(simulator, job.seed)
        simulator.send(job)

    def dismiss(self, simulator: Worker) -> None:
        """Ends the process."""
        self._pool.pop(simulator.connection, None)
        simulator.stop()

    def listen(self) -> Iterator[Message]:
        """Messages first; then those that wait for a reply get one."""
        while self._new:
            yield self._new.pop(), "ready", None
        requests = {}
        for connection in wait(list(self._pool), timeout=PATIENCE_S):
            worker = self._pool[connection]
            kind, content = worker.receive()
            if kind == "request":
                requests[worker] = content
            else:
                yield worker, kind, content
        for worker in self._pool.values():
            if worker not in requests and time.monotonic() - worker.since > STALL_S:
                worker.give_up(f"after {STALL_S} s without a word")
        if requests:
            for worker, reply in self._source.robots.step(requests).items():
                worker.send(reply)

    def device(self, simulator: Worker) -> str:
        """The device of the only policy."""
        return self._source.device

    def close(self) -> None:
        """Ends all processes."""
        for worker in self._pool.values():
            worker.process.terminate()
        for worker in self._pool.values():
            worker.stop()
