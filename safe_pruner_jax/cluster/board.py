"""What the replicas of a service tell one another: which policy they serve, their metrics, where a robot was last, and
who has to leave.

The board is an actor beside Serve's controller. No reply waits for it but the first one of a named robot, and that one
at most `PATIENCE_S`; it may die, is started again by Ray, and is then told by the replicas which robots they have.
"""

import asyncio
import re
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import prometheus_client as prometheus
import ray
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

ROBOTS = 100_000
"""Robots whose last replica is remembered."""

PATIENCE_S = 1.0
"""Longest time that a robot's first reply waits for the board."""

EVERY_S = 1.0
"""Seconds between two words of a replica to the board."""

SILENT_S = 30.0
"""A replica that has said nothing for so long is not counted any more, whatever Serve says of it."""


class Board:
    """See above.

    Args:
      application: name of the service.
    """

    def __init__(self, application: str):
        self._application = application
        self._life = uuid.uuid4().hex
        self._texts: dict[str, tuple[float, str]] = {}
        self._robots: OrderedDict[str, str] = OrderedDict()
        self._forget: dict[str, list[str]] = {}
        self._leaving: set[str] = set()
        self._there: set[str] = set()
        self._looked = -EVERY_S
        self._identity: Mapping[str, Any] | None = None
        self._failures: list[str] = []

    async def agree(self, identity: Mapping[str, Any]) -> Mapping[str, Any]:
        """What identifies the policy of the first replica that has asked."""
        if self._identity is None:
            self._identity = identity
        return self._identity

    async def fail(self, why: str) -> None:
        """A replica does not start."""
        self._failures.append(why)

    async def failures(self) -> list[str]:
        """Why replicas have not started, since this was last asked."""
        failures, self._failures = self._failures, []
        return failures

    async def tell(self, replica: str, text: str) -> tuple[bool, list[str], str]:
        """A replica's metrics; whether it has to leave, robots that are elsewhere now, and which life this is."""
        now = asyncio.get_running_loop().time()
        self._texts[replica] = now, text
        await self._look(now)
        return replica in self._leaving, self._forget.pop(replica, []), self._life

    async def recall(self, replica: str, robots: Iterable[str]) -> None:
        """A replica's robots, for a board that has died; what has happened since counts more."""
        for robot in robots:
            self._robots.setdefault(robot, replica)

    async def arrive(self, robot: str, replica: str) -> str | None:
        """A robot has its first reply from a replica; the one that it was at before, if it was another."""
        before = self._robots.pop(robot, None)
        self._robots[robot] = replica
        if len(self._robots) > ROBOTS:
            self._robots.popitem(last=False)
        if before in (None, replica):
            return None
        self._forget.setdefault(before, []).append(robot)
        return before

    async def metrics(self) -> dict[str, str]:
        """Replica → its metrics."""
        now = asyncio.get_running_loop().time()
        self._texts = {name: (when, text) for name, (when, text) in self._texts.items() if now - when < SILENT_S}
        return {name: text for name, (_, text) in self._texts.items()}

    async def _look(self, now: float) -> None:
        """Asks Serve, once in a while, which replicas it is stopping."""
        if now - self._looked < EVERY_S:
            return
        self._looked = now
        controller: Any = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        details = await controller.get_serve_instance_details.remote()
        application = details["applications"].get(self._application, {})
        replicas = [r for deployment in application.get("deployments", {}).values() for r in deployment["replicas"]]
        there = {replica["replica_id"] for replica in replicas}
        gone = self._there - there  # Serve says nothing more of the replicas of a service that it ends
        self._leaving |= gone | {replica["replica_id"] for replica in replicas if replica["state"] == "STOPPING"}
        if application.get("status") == "DELETING":
            self._leaving |= there
        for replica in gone:
            self._texts.pop(replica, None)
        self._there = there


class _Merged:
    """A collector of metrics that are there already."""

    def __init__(self, metrics: Iterable[Metric]):
        self._metrics = list(metrics)

    def collect(self) -> list[Metric]:
        return self._metrics


def merge(texts: Mapping[str, str], *, each: bool) -> bytes:
    """The metrics of all replicas in Prometheus' text format.

    Args:
      texts: replica → its own, as `Metrics.text` writes it.
      each: every sample with its replica as a label; without, summed, and `keyframe_share` over all steps.
    """
    merged: dict[str, Metric] = {}
    values: dict[tuple, float] = {}
    for replica, text in sorted(texts.items()):
        for family in text_string_to_metric_families(text):
            if family.name.endswith("_created"):
                continue
            merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                labels = sample.labels | ({"replica": replica} if each else {})
                key = family.name, sample.name, tuple(sorted(labels.items()))
                values[key] = values.get(key, 0.0) + sample.value
    if not each:
        _share(values)
    for (family, name, labels), value in values.items():
        merged[family].add_sample(name, dict(labels), value)
    registry: Any = _Merged(merged.values())
    return prometheus.generate_latest(registry)


def _share(values: dict[tuple, float]) -> None:
    """The share of keyframes over all replicas, in place of the sum of their shares."""
    path = re.compile(r"_steps_total$")
    steps = {dict(labels)["path"]: value for (_, name, labels), value in values.items() if path.search(name)}
    for key in values:
        if key[1].endswith("_keyframe_share"):
            values[key] = steps.get("full", 0.0) / max(sum(steps.values()), 1.0)
