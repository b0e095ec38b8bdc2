"""Who runs next: waiting requests are joined into steps of the one accelerator.

    submit ──> waiting, at most one per robot ──> step of up to `limit` robots of one group ──> answer
                 │ a newer request of the robot:   superseded
                 │ too many wait:                  rejected
                 └ waited longer than it may:      expired

Everything here runs in the event loop; the backend's steps run in the device thread.
"""

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from safe_pruner_jax.policy.reply import Result
from safe_pruner_jax.serving.backend import Prepared, Served


@dataclass(frozen=True)
class Terms:
    """What a request may expect.

    Args:
      max_queue: requests waiting at most; the next is rejected.
      max_delay_s: how long a request waits for others to join its step while several robots are connected, seconds.
      deadline_s: a request that waits longer than this is not run, seconds; the request may say less.
      drain_s: how long a stopping server goes on answering what waits, seconds.

    Raises:
      ValueError: a value out of range.
    """

    max_queue: int = 64
    max_delay_s: float = 0.005
    deadline_s: float = 10.0
    drain_s: float = 20.0

    def __post_init__(self):
        if self.max_queue < 1:
            raise ValueError(f"max_queue: expected at least 1, got {self.max_queue}")
        for name in ("max_delay_s", "drain_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected seconds of at least 0, got {getattr(self, name)}")
        if not 0 < self.deadline_s < float("inf"):
            raise ValueError(f"deadline_s: expected seconds above 0, got {self.deadline_s}")


class Device(Protocol):
    """What the scheduler knows of the accelerator; `device.Device` is one.

    Attributes:
      limit: robots per step.
      robots: how many are connected; with one of them nobody is waited for.
    """

    limit: int
    robots: int

    async def step(self, prepared: Sequence[tuple[Hashable, Prepared]]) -> tuple[Sequence[Result], float]:
        """One step of robots of one group: a result each, an error too, and the seconds it took."""
        ...


class Turned(Exception):
    """A request that was answered without being run; `kind` is "rejected", "expired" or "superseded"."""

    def __init__(self, kind: str, text: str):
        super().__init__(f"{kind}: {text}")
        self.kind = kind


@dataclass(eq=False)
class _Ticket:
    robot: Hashable
    prepared: Prepared
    since: float
    answer: asyncio.Future
    timer: asyncio.TimerHandle
    wanted: Callable[[], bool]


class Scheduler:
    """The queue in front of the accelerator.

    Args:
      device: what steps.
      terms: what a request may expect.
    """

    def __init__(self, device: Device, terms: Terms):
        self._device, self._terms = device, terms
        self._waiting: dict[Hashable, _Ticket] = {}  # in order of arrival
        self._changed = asyncio.Event()
        self._closing = False

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def capacity(self) -> int:
        """Requests that may wait at a time."""
        return self._terms.max_queue

    def submit(
        self,
        robot: Hashable,
        prepared: Prepared,
        deadline_s: float | None = None,
        wanted: Callable[[], bool] = lambda: True,
    ) -> asyncio.Future:
        """Queues a request.

        Args:
          robot: whose it is; an older request of the same robot that still waits is superseded.
          prepared: from `Backend.prepare`.
          deadline_s: seconds it may wait, at most the server's.
          wanted: asked before it is run; False if its client has left.

        Returns:
          Future of `Served`; its exception is `Turned`, or what the step raised.
        """
        loop = asyncio.get_running_loop()
        answer = loop.create_future()
        older = self._waiting.get(robot)
        if older is None and (self._closing or len(self._waiting) >= self._terms.max_queue):
            why = "the server is stopping" if self._closing else f"{len(self._waiting)} requests wait already"
            answer.set_exception(Turned("rejected", f"{why}; send a fresh observation later"))
            return answer
        limit = self._terms.deadline_s if deadline_s is None else min(deadline_s, self._terms.deadline_s)
        timer = loop.call_later(limit, self._expire, robot, answer, limit)
        ticket = _Ticket(robot, prepared, time.monotonic(), answer, timer, wanted)
        if older is not None:  # the newer observation takes its place in the queue
            self._turn(older, "superseded", "a newer request of this robot came before this one was run")
        self._waiting[robot] = ticket
        self._changed.set()
        return answer

    def cancel(self, answer: asyncio.Future) -> None:
        """Takes a request out of the queue whose robot has left."""
        for ticket in self._waiting.values():
            if ticket.answer is answer:
                self._turn(ticket, "rejected", "the robot left")
                del self._waiting[ticket.robot]
                return

    def close(self) -> None:
        """Lets `run` end once nothing waits; what still waits after `drain_s` is rejected."""
        self._closing = True
        self._changed.set()
        asyncio.get_running_loop().call_later(self._terms.drain_s, self._give_up)

    async def run(self) -> None:
        """Serves the queue until `close`."""
        while self._waiting or not self._closing:
            if not self._waiting:
                self._changed.clear()
                await self._changed.wait()
                continue
            await self._gather()
            if tickets := self._take():
                await self._step(tickets)

    async def _gather(self) -> None:
        """Waits for others to join the first request, as long as it may."""
        first = next(iter(self._waiting.values()))
        until = first.since + self._terms.max_delay_s
        while not self._closing and self._device.robots > 1:
            together = sum(ticket.prepared.group == first.prepared.group for ticket in self._waiting.values())
            seconds = until - time.monotonic()
            if seconds <= 0 or together >= min(self._device.limit, self._device.robots):
                return
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), seconds)
            except TimeoutError:
                return

    def _take(self) -> list[_Ticket]:
        """The first request, and those behind it that can share its step; none if all have gone meanwhile."""
        for ticket in [ticket for ticket in self._waiting.values() if not ticket.wanted()]:
            self.cancel(ticket.answer)
        tickets = list(self._waiting.values())
        group = tickets[0].prepared.group if tickets else None
        tickets = [ticket for ticket in tickets if ticket.prepared.group == group][: self._device.limit]
        for ticket in tickets:
            ticket.timer.cancel()
            del self._waiting[ticket.robot]
        return tickets

    async def _step(self, tickets: list[_Ticket]) -> None:
        started = time.monotonic()
        results, device_s = await self._device.step([(ticket.robot, ticket.prepared) for ticket in tickets])
        for ticket, result in zip(tickets, results, strict=True):
            if not ticket.answer.done():
                ticket.answer.set_result(Served(result, started - ticket.since, device_s, len(tickets)))

    def _expire(self, robot: Hashable, answer: asyncio.Future, limit_s: float) -> None:
        ticket = self._waiting.get(robot)
        if ticket is not None and ticket.answer is answer:
            del self._waiting[robot]
            self._turn(ticket, "expired", f"not run within its {limit_s * 1e3:.0f} ms; send a fresh observation")

    def _give_up(self) -> None:
        for ticket in self._waiting.values():
            self._turn(ticket, "rejected", "the server is stopping; send a fresh observation later")
        self._waiting.clear()
        self._changed.set()

    @staticmethod
    def _turn(ticket: _Ticket, kind: str, text: str) -> None:
        ticket.timer.cancel()
        if not ticket.answer.done():
            ticket.answer.set_exception(Turned(kind, text))
