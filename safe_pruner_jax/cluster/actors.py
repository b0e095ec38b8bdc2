"""What runs on the nodes: `Policy`, one per accelerator, and `Simulator`, one per simulator. Nothing here imports jax.

    simulator                                     policy
      infer(name, request, seed) ────────────────> waits until the device is free
      <──────────────────── reply, or PolicyFailed ─ one step of everybody who waits (`batched.Robots`)

Pictures lie in the object store: written once by the simulator, read there by the policy without a copy on one node,
sent once between two.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from safe_pruner_jax.evaluation.workers import Job, MakeEnv, Player
from safe_pruner_jax.libero.simulator import LiberoUnavailable

Load = Callable[[], tuple[Mapping[str, Any], Any]]
"""Loads a policy: what identifies it (a part of a `Configuration`, as JSON) and the `sources.Source` that it is."""


class Policy:
    """A policy on one accelerator, for many simulators.

    Args:
      load: called once, in the actor's process.
    """

    def __init__(self, load: Load):
        self._make, self._waiting, self._free = load, {}, asyncio.Event()
        self._source: Any = None
        self._serving: asyncio.Task | None = None

    def node(self) -> str:
        """Id of the node it runs on."""
        return ray.get_runtime_context().get_node_id()

    async def load(self) -> tuple[Mapping[str, Any], str]:
        """Loads; what identifies the policy, and its device. Raises what loading raises."""
        about, self._source = await asyncio.to_thread(self._make)
        self._serving = asyncio.ensure_future(self._serve())
        return about, self._source.device

    async def infer(self, robot: str, request: dict[str, Any], seed: int | None = None) -> Any:
        """The reply to a robot's request, or a PolicyFailed; with a seed this is the first one of an episode."""
        answer = asyncio.get_running_loop().create_future()
        self._waiting[robot] = (request, seed, answer)
        self._free.set()
        return await answer

    async def _serve(self) -> None:
        """Whoever waits when the device is free is served in one step."""
        while True:
            await self._free.wait()
            self._free.clear()
            waiting, self._waiting = self._waiting, {}
            try:
                replies = await asyncio.to_thread(self._step, waiting)
            except Exception as error:  # of everybody in the step
                replies = dict.fromkeys(waiting, error)
            for robot, (_, _, answer) in waiting.items():
                if not answer.done():
                    answer.set_result(replies[robot])

    def _step(self, waiting: Mapping[str, tuple]) -> Mapping[str, Any]:
        for robot, (_, seed, _) in waiting.items():
            if seed is not None:
                self._source.robots.start(robot, seed)
        return self._source.robots.step({robot: request for robot, (request, _, _) in waiting.items()})


class Simulator:
    """One simulator; plays one episode at a time.

    Args:
      make_env: makes the environments.
      about: what the pictures depend on, `libero.simulator.provenance`.
    """

    def __init__(self, make_env: MakeEnv, about: Callable[[], Mapping[str, str]]):
        self._name = ray.get_runtime_context().get_actor_id()
        self._about, self._player = about, Player(make_env, self._ask)
        self._policy: Any = None
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

    def play(self, job: Job, policy: Any) -> tuple[str, Any]:
        """Plays an episode with a policy: the kind of message and its content, see `evaluation.crew`."""
        self._policy, self._policy_lost, self._seed = policy, "", job.seed
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
            reply: Any = ray.get(self._policy.infer.remote(self._name, request, self._seed))
        except RayTaskError:
            raise
        except RayError as error:  # its process or its node has died, or cannot be reached
            self._policy_lost = f"the policy was lost ({type(error).__name__})"
            raise
        finally:
            self._since = time.monotonic()
        self._seed = None
        if isinstance(reply, Exception):
            raise reply
        return reply
