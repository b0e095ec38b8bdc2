"""What runs on the nodes: `Policy`, one per accelerator, and `Simulator`, one per simulator. Nothing here imports jax.

    simulator                                     policy
      (name, request, seed) ─────────────────────> waits until the device is free
      <──────────────────── reply, or PolicyFailed ─ one step of everybody who waits (`batched.Robots`)

Ray carries an episode to a simulator and its record back; the control steps in it go over a `line`.
"""

import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from typing import Any

import ray

from safe_pruner_jax.cluster.line import Place, call, listen
from safe_pruner_jax.evaluation.workers import Job, MakeEnv, Player
from safe_pruner_jax.libero.simulator import LiberoUnavailable

Load = Callable[[], tuple[Mapping[str, Any], Any]]
"""Loads a policy: what identifies it (a part of a `Configuration`, as JSON) and the `sources.Source` that it is."""


class Policy:
    """A policy on one accelerator, for many simulators; each of their lines is a thread of this process.

    Args:
      load: called once, in the actor's process.
    """

    def __init__(self, load: Load):
        self._make, self._waiting, self._replies = load, {}, {}
        self._source: Any = None
        self._turn, self._busy = threading.Condition(), False

    def node(self) -> str:
        """Id of the node it runs on."""
        return ray.get_runtime_context().get_node_id()

    def load(self) -> tuple[Mapping[str, Any], str, Place]:
        """Loads and listens: what identifies the policy, its device, and its place. Raises what loading raises."""
        about, self._source = self._make()
        return about, self._source.device, listen(ray.util.get_node_ip_address(), self.answer)

    def answer(self, question: tuple[str, dict[str, Any], int | None]) -> Any:
        """The reply to (robot, request, seed), or a PolicyFailed; with a seed this is the first one of an episode.

        The first thread that finds the device free makes the step of everybody who waits.
        """
        robot, request, seed = question
        with self._turn:
            self._waiting[robot] = request, seed
            self._turn.wait_for(lambda: robot in self._replies or not self._busy)
            if robot in self._replies:
                return self._replies.pop(robot)
            self._busy, together, self._waiting = True, self._waiting, {}
        try:
            replies = self._step(together)
        except Exception as error:  # of everybody in the step
            replies = dict.fromkeys(together, error)
        with self._turn:
            self._busy = False
            self._replies |= replies
            self._turn.notify_all()
            return self._replies.pop(robot)

    def _step(self, together: Mapping[str, tuple]) -> Mapping[str, Any]:
        for robot, (_, seed) in together.items():
            if seed is not None:
                self._source.robots.start(robot, seed)
        return self._source.robots.step({robot: request for robot, (request, _) in together.items()})


class Simulator:
    """One simulator; plays one episode at a time.

    Args:
      make_env: makes the environments.
      about: what the pictures depend on, `libero.simulator.provenance`.
    """

    def __init__(self, make_env: MakeEnv, about: Callable[[], Mapping[str, str]]):
        self._name = ray.get_runtime_context().get_actor_id()
        self._about, self._player = about, Player(make_env, self._ask)
        self._place: Place | None = None
        self._line: Connection | None = None
        self._seed: int | None = None
        self._policy_lost = ""
        self._since: float | None = None

    def look(self) -> tuple[str, Mapping[str, str] | str]:
        """Id of the node, and what its simulator is; text where it has none."""
        node = ray.get_runtime_context().get_node_id()
        try:
            return node, self._about()
        except LiberoUnavailable as error:
            return node, str(error)

    def play(self, job: Job, policy: Place) -> tuple[str, Any]:
        """Plays an episode with a policy: the kind of message and its content, see `evaluation.crew`."""
        if policy != self._place:
            self._hang_up()
        self._place, self._policy_lost, self._seed = policy, "", job.seed
        self._since = time.monotonic()
        try:
            kind, content = self._player.play(job)
        finally:
            self._since = None
        return ("again", self._policy_lost) if self._policy_lost else (kind, content)

    def quiet_s(self) -> float:
        """Seconds since the simulator was last heard of; 0 while it waits for its policy, or plays nothing."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def _ask(self, request: dict[str, Any]) -> Mapping[str, Any]:
        self._since = None
        try:
            if self._line is None:
                self._line = call(self._place)
            self._line.send((self._name, request, self._seed))
            reply = self._line.recv()
        except (
            OSError,
            EOFError,
            AuthenticationError,
        ) as error:  # it has died, or is out of reach
            self._hang_up()
            where = f"{self._place.host}:{self._place.port}"
            self._policy_lost = f"the policy at {where} was lost ({type(error).__name__}: {error})"
            raise
        finally:
            self._since = time.monotonic()
        self._seed = None
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _hang_up(self) -> None:
        if self._line is not None:
            self._line.close()
        self._line = None
