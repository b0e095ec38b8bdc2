"""What the server serves: `Backend`, which answers several robots in one step, and `Sessions`, which makes one of
anything that answers a single robot."""

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from safe_pruner_jax.policy.reply import Result


class Prepared(Protocol):
    """A request, checked and ready for the accelerator."""

    @property
    def group(self) -> Hashable:
        """Requests of one group can share a step."""
        ...


@dataclass(frozen=True, eq=False)
class Served:
    """A request that was run: its result, seconds it waited, seconds its step took, and robots in the step."""

    result: Result
    queue_s: float
    device_s: float
    batch: int


class Backend(Protocol):
    """Many robots behind one accelerator; `fleet.Fleet` is one. `prepare` is called in any thread, all else in one.

    Attributes:
      metadata: greets each client; it must be packable (see `wire.pack`).
      limit: robots per step.
      real_time: whether requests may ask for chunks that continue the last ones.
      attention: what requests may ask for with `attention` (`policy.attention`); None: nothing.
      evicted: memories dropped so far because of their age or number.
    """

    metadata: dict
    limit: int
    real_time: bool
    attention: dict | None
    evicted: int

    def warmup(self) -> None:
        """Compiles every program; blocks, and is called once before the server is ready."""

    def prepare(self, robot: Hashable, request: dict) -> Prepared:
        """The part of a step that needs no accelerator; raises what is wrong with the request."""
        ...

    def step(self, prepared: Sequence[tuple[Hashable, Any]]) -> Sequence[Result]:
        """One step of 1 to `limit` robots with requests of one group; one result each, complete on the host."""
        ...

    def forget(self, robot: Hashable) -> None:
        """Drops the memory of a robot that will not come back."""


class Session(Protocol):
    """One robot's episode."""

    def infer(self, request: dict) -> dict:
        """The reply to one request; blocks, and is called in the device thread."""
        ...


class SessionMaker(Protocol):
    """What `Sessions` makes a backend of; `policy.Policy` is one."""

    metadata: dict

    def session(self) -> Session:
        """A fresh session, called in the device thread."""
        ...

    def warmup(self) -> None:
        """Compiles every program."""


@dataclass(frozen=True, eq=False)
class _Single:
    request: dict
    group: int


class Sessions:
    """A backend that keeps one session per robot and steps one robot at a time.

    Args:
      maker: makes the sessions.
    """

    limit, real_time, evicted = 1, True, 0

    def __init__(self, maker: SessionMaker):
        self.metadata, self.warmup = maker.metadata, maker.warmup
        self.attention: dict | None = None  # a session answers what it can
        self._maker, self._numbers = maker, itertools.count()
        self._sessions: dict[Hashable, Session] = {}

    def prepare(self, robot: Hashable, request: dict) -> _Single:
        """Sessions check their requests themselves."""
        return _Single(request, next(self._numbers))

    def step(self, prepared: Sequence[tuple[Hashable, _Single]]) -> list[Result]:
        """One session's inference."""
        ((robot, single),) = prepared
        fresh = robot not in self._sessions
        try:
            if fresh:
                self._sessions[robot] = self._maker.session()
            reply = self._sessions[robot].infer(single.request)
            return [Result(reply, None, reply.get("pruning") or {}, fresh)]
        except Exception as error:
            return [Result(None, error, fresh=fresh)]

    def forget(self, robot: Hashable) -> None:
        """Drops the session."""
        self._sessions.pop(robot, None)


def as_backend(served: Backend | SessionMaker) -> Backend:
    """A backend as it is, and anything with `session()` behind `Sessions`."""
    return cast(Backend, served if hasattr(served, "step") else Sessions(cast(SessionMaker, served)))
