"""Simulators on the nodes of a cluster, as the loop of `evaluate.play` sees them.

    with connected("auto"):
        play(jobs, file, source, workers=8, crew=Nodes(load, identity, policies=2))

A simulator says "ready" when it and a policy are. What a dead node took with it is played again elsewhere: Ray tells
that a call failed, and whether the node is still there tells a dead simulator ("lost") from a dead node ("gone").
"""

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError

from safe_pruner_jax.cluster import actors
from safe_pruner_jax.cluster.connect import alive, names, room
from safe_pruner_jax.cluster.line import Place
from safe_pruner_jax.evaluation.crew import PATIENCE_S, STALL_S, EvaluationError, Message
from safe_pruner_jax.evaluation.evaluate import RESTARTS
from safe_pruner_jax.evaluation.workers import Job, MakeEnv, libero_env
from safe_pruner_jax.libero.simulator import provenance
from safe_pruner_jax.policy.identity import differences

logger = logging.getLogger(__name__)

ROOM_S = 300.0
"""Seconds that a cluster may have no room for a policy or a simulator before the run stops."""

NEWS_S = 20.0
"""Seconds after which the death of a node must have been heard of, when a process of it has died: Ray asks five times
within 15 s before it says so. Only then a simulator that has died is an error of its episode."""

YIELD_S = 3.0
"""Seconds that a policy waits for room before a simulator makes some."""

PASSED_ON = ("MUJOCO_GL", "LP_NUM_THREADS")
"""Variables of the driver that decide how simulators draw."""


@dataclass(eq=False)
class _Policy:
    actor: Any
    waits_for: Any  # reference to what it is asked: first where it is, then what it has loaded
    node: str | None = None
    device: str = ""
    place: Place | None = None  # once it is ready


@dataclass(eq=False)
class _Simulator:
    actor: Any
    waits_for: Any  # where it is, then the episode; None while it has nothing to do
    node: str | None = None
    policy: _Policy | None = None  # of the episode
    quiet: Any = None  # reference to how long it has said nothing
    since: float = field(default_factory=time.monotonic)
    died: tuple[float, Exception] | None = None


class Nodes:
    """A crew (`evaluation.crew.Crew`) of Ray actors.

    Args:
      load: loads a policy, on its node.
      identity: what the policy must be: a part of a configuration as JSON.
      simulator: what the simulators must be, as `libero.simulator.provenance` tells it.
      policies: how many; None: one per accelerator, without any one per node.
      cores: CPU cores of each.
      make_env: makes the environments.
      look: tells what a node's simulator is.
      room_s, news_s: see `ROOM_S`, `NEWS_S`.

    Attributes: `cores`, those of the policies.

    Raises:
      ValueError: no policies.
    """

    def __init__(
        self,
        load: actors.Load,
        identity: Mapping[str, Any],
        simulator: Mapping[str, Any],
        *,
        policies: int | None = None,
        cores: int = 1,
        make_env: MakeEnv = libero_env,
        look: Callable[[], Mapping[str, str]] = provenance,
        room_s: float = ROOM_S,
        news_s: float = NEWS_S,
    ):
        if policies is not None and policies < 1:
            raise ValueError(f"policies: expected at least 1, got {policies}")
        most, need = room("policy", cores, accelerators=True)
        nodes = sum(n["Alive"] and n["Resources"].get("CPU", 0) >= cores for n in ray.nodes())
        number = policies or max(1, most if "num_gpus" in need or "resources" in need else min(most, nodes))
        self.cores = number * cores
        self._identity, self._simulator, self._room_s, self._news_s = identity, simulator, room_s, news_s
        spread = {"scheduling_strategy": "SPREAD"}
        self._make_policy = lambda: ray.remote(actors.Policy).options(**need, **spread).remote(load)
        _, need_one = room("simulator")
        variables = {"LP_NUM_THREADS": "1"} | {k: os.environ[k] for k in PASSED_ON if k in os.environ}
        decorate: Any = ray.remote
        two_threads = decorate(concurrency_groups={"word": 1})  # one plays, the other tells that it lives
        simulator_class = two_threads(actors.Simulator)
        remote = simulator_class.options(**need_one, **spread, runtime_env={"env_vars": variables})
        self._make_simulator = lambda: remote.remote(make_env, look)
        self._simulators: list[_Simulator] = []
        self._policies: list[_Policy] = []
        self._crashes = self._made_room = self._wanted = 0
        self._room_since = self._began = time.monotonic()
        self._names: dict[str, str] = {}
        self._played: Counter[str] = Counter()
        for _ in range(number):
            self._add_policy()

    # --- what the loop asks for --------------------------------------------------------------------------------

    def hire(self) -> None:
        """Asks for one more simulator; it is placed when there is a policy, and room."""
        self._wanted += 1

    def start(self, simulator: _Simulator, job: Job) -> None:
        """Plays, with the policy that has the fewest simulators, on the same node where there is a choice."""
        load = Counter(s.policy for s in self._simulators if s.policy is not None)
        rank = lambda policy: (load[policy], policy.node != simulator.node)
        simulator.policy = min((p for p in self._policies if p.place), key=rank)
        simulator.since = time.monotonic()
        simulator.waits_for = simulator.actor.play.remote(job, simulator.policy.place)

    def dismiss(self, simulator: _Simulator) -> None:
        """Ends the actor."""
        if simulator in self._simulators:
            self._simulators.remove(simulator)
        ray.kill(simulator.actor)

    def device(self, simulator: _Simulator) -> str:
        """The device of its last policy."""
        return simulator.policy.device if simulator.policy else ""

    def close(self) -> None:
        """Ends all actors."""
        for actor in (*self._simulators, *self._policies):
            ray.kill(actor.actor)

    def rates(self) -> str:
        """Episodes per minute, node by node."""
        minutes = (time.monotonic() - self._began) / 60
        return ", ".join(f"{self._name(n)} {count / minutes:.1f}/min" for n, count in sorted(self._played.items()))

    # --- what has happened -------------------------------------------------------------------------------------

    def listen(self) -> Iterator[Message]:
        """See `evaluation.crew.Crew`."""
        self._hire()
        dying = [s for s in self._simulators if s.died]
        asked = {a.waits_for: a for a in (*self._simulators, *self._policies) if a.waits_for is not None}
        waiting = {reference: actor for reference, actor in asked.items() if actor not in dying}
        for reference in self._done(list(waiting), 0.1 if dying else PATIENCE_S):
            actor = waiting[reference]
            if isinstance(actor, _Policy):
                self._of_policy(actor, reference)
            else:
                yield from self._of_simulator(actor, reference)
        for simulator in dying:
            yield from self._verdict(simulator)
        self._check_words()
        self._check_room()
        yield from self._make_room()
        for simulator in self._idle():
            if any(policy.place for policy in self._policies):
                yield simulator, "ready", None

    def _hire(self) -> None:
        """Starts simulators behind the first policy, whose room they would take: Ray promises no order."""
        if any(policy.node for policy in self._policies):
            for _ in range(self._wanted):
                actor = self._make_simulator()
                self._simulators.append(_Simulator(actor, actor.look.remote()))
            self._wanted = 0

    def _idle(self) -> list[_Simulator]:
        return [s for s in self._simulators if s.node and s.waits_for is None and not s.died]

    def _done(self, references: list, timeout: float) -> list:
        """Those that are done, at least one unless the time is over."""
        if not references:
            time.sleep(timeout)
            return []
        if not ray.wait(references, timeout=timeout)[0]:
            return []
        return ray.wait(references, num_returns=len(references), timeout=0)[0]

    def _of_policy(self, policy: _Policy, reference: Any) -> None:
        """It has been placed, has loaded, or has died on the way."""
        try:
            result = ray.get(reference)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            where = self._name(policy.node)
            raise EvaluationError(f"node {where}: the policy does not load: {type(cause).__name__}: {cause}") from error
        except RayActorError as error:
            _check_start(error, "policy")
            self._replace(policy, f"it died before it was ready ({type(error).__name__})")
            return
        if policy.node is None:
            policy.node, policy.waits_for = result, policy.actor.load.remote()
            return
        about, device, place = result
        if found := differences(self._identity, {key: about[key] for key in self._identity}):
            where = self._name(policy.node)
            raise EvaluationError(
                f"node {where} has another policy ({'; '.join(found)}); put the same one on every node"
            )
        policy.device, policy.place, policy.waits_for = device, place, None
        logger.info("policy ready on %s, %s", self._name(policy.node), policy.device)

    def _of_simulator(self, simulator: _Simulator, reference: Any) -> Iterator[Message]:
        try:
            result = ray.get(reference)
        except RayTaskError as error:  # in our own code: the policy and the simulator are caught there
            raise EvaluationError(f"a simulator failed: {error.cause or error}") from error
        except RayError as error:
            _check_start(error, "simulator")
            simulator.died = time.monotonic(), error
            return
        simulator.waits_for = None
        if simulator.node is None:
            simulator.node, about = result
            self._check_simulator(simulator.node, about)
            return
        kind, content = result
        if kind == "again" and simulator.policy in self._policies:
            self._replace(simulator.policy, content)
        if kind == "episode":
            self._played[simulator.node] += 1
        yield simulator, kind, content

    def _verdict(self, simulator: _Simulator) -> Iterator[Message]:
        """Whether the simulator has died or its node has."""
        assert simulator.died is not None, "asked of those that have died"
        when, error = simulator.died
        sure = isinstance(error, ActorDiedError)
        if simulator.node is None or not alive(simulator.node) or not sure:
            yield simulator, "gone", f"the node was lost ({type(error).__name__})"
        elif time.monotonic() - when > self._news_s:
            text = " ".join(str(error).split())
            yield simulator, "lost", f"WorkerLost: the simulator process ended on {self._name(simulator.node)}: {text}"

    def _check_simulator(self, node: str, about: Mapping[str, str] | str) -> None:
        where = self._name(node)
        if isinstance(about, str):
            raise EvaluationError(
                f"node {where} has no simulator: {about}; or name the nodes that have one: ray start --resources "
                "'{\"simulator\": 8}'"
            )
        if found := differences(self._simulator, about):
            raise EvaluationError(
                f"node {where} has another simulator ({'; '.join(found)}); install the same everywhere"
            )

    def _check_words(self) -> None:
        """Kills a simulator that has hung; its death is an error of its episode."""
        now = time.monotonic()
        for simulator in self._simulators:
            if simulator.node is None or simulator.waits_for is None or simulator.died:
                continue
            if simulator.quiet is None:
                simulator.quiet = simulator.actor.quiet_s.options(concurrency_group="word").remote()
            elif ray.wait([simulator.quiet], timeout=0)[0]:
                try:
                    quiet_s: Any = ray.get(simulator.quiet)
                    simulator.since = now - quiet_s
                except RayError:  # its episode tells more
                    continue
                finally:
                    simulator.quiet = None
            if now - simulator.since > STALL_S:
                ray.kill(simulator.actor)
                simulator.since = now

    def _check_room(self) -> None:
        """Raises EvaluationError if nothing could be placed for too long."""
        now = time.monotonic()
        placed = {kind: any(a.node for a in some) for kind, some in self._kinds().items()}
        if all(placed.values()):
            self._room_since, self._made_room = now, 0
        elif now - self._room_since > self._room_s:
            short = "simulator" if placed["policy"] else "policy"
            raise EvaluationError(
                f"for {self._room_s:.0f} s no node of the cluster has had room for a {short}; finished episodes are "
                "kept, add nodes and run the same command again"
            )

    def _make_room(self) -> Iterator[Message]:
        """Without any policy simulators are of no use: one after the other makes room, and comes again behind it."""
        now = time.monotonic()
        if any(policy.node for policy in self._policies) or now - self._room_since < YIELD_S * (1 + self._made_room):
            return
        if idle := self._idle():
            self._made_room += 1
            yield idle[0], "gone", "its node has no room for a policy"

    def _kinds(self) -> dict[str, list]:
        return {"policy": self._policies, "simulator": self._simulators}

    def _replace(self, policy: _Policy, why: str) -> None:
        """Another one for a policy that has died; its simulators notice it themselves."""
        self._policies.remove(policy)
        ray.kill(policy.actor)
        self._crashes += policy.node is not None and alive(policy.node)
        if self._crashes > RESTARTS:
            raise EvaluationError(
                f"{self._crashes} policies were lost on nodes that live, the last one: {why}; see ray's logs, and "
                "whether nodes reach one another at any port"
            )
        logger.warning("the policy on %s is lost; another one is started: %s", self._name(policy.node), why)
        self._add_policy()

    def _add_policy(self) -> None:
        actor: Any = self._make_policy()
        self._policies.append(_Policy(actor, actor.node.remote()))

    def _name(self, node: str | None) -> str:
        if node is not None and node not in self._names:
            self._names |= names()
        return self._names.get(node or "", "unknown")


def _check_start(error: RayError, kind: str) -> None:
    """Raises EvaluationError if an actor could not even start, as on a node without this package."""
    if isinstance(error, RayActorError) and error.actor_init_failed:
        last = str(error).strip().splitlines()[-1]
        raise EvaluationError(f"a {kind} does not start: {last}; install the same packages on every node") from error
