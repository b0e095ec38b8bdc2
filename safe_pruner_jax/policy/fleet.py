"""Many robots on one device: whoever asks together is served in one device step, each with its own memory.

    fleet = Fleet(policy, limit=8)
    prepared = fleet.prepare("left", request)               on the host, in any thread
    results = fleet.step([("left", prepared), ("right", other)])   one device step; requests of one `group`

The policy server and the evaluation both stand on it; neither keeps control states of its own.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

from safe_pruner_jax.engine.engine import BATCH_SIZES, batch_size
from safe_pruner_jax.policy.episode import Episode, Prepared
from safe_pruner_jax.policy.policy import Policy
from safe_pruner_jax.policy.reply import Result
from safe_pruner_jax.robots.robots import RequestError


class Fleet:
    """The memories of many robots behind one policy. `prepare` is for any thread, the rest for one.

    Args:
      policy: shared by all.
      limit: robots per device step. With 1 a robot's replies are bit for bit those of a session of its own; in a
        larger batch they equal them up to rounding.
      max_robots: memories kept; the one unused for longest is dropped first.
      max_age_s: a memory unused for longer is dropped, seconds.
      real_time: requests may ask for real-time chunking (`rtc`); its programs are part of the warm-up.
      attention: requests may ask for grids (`attention`); the programs are part of the warm-up.
      clock: seconds, monotonic.

    Attributes:
      evicted: memories dropped so far. A robot that comes back after that starts with a keyframe.

    Raises:
      ValueError: a limit below 1, or fewer memories than robots in a step.
    """

    def __init__(
        self,
        policy: Policy,
        limit: int = 8,
        *,
        max_robots: int | None = None,
        max_age_s: float = math.inf,
        real_time: bool = False,
        attention: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        if limit < 1:
            raise ValueError(f"batch: expected at least 1, got {limit}")
        if max_robots is not None and max_robots < limit:
            raise ValueError(f"max_robots: expected at least the batch limit {limit}, got {max_robots}; raise it")
        self.policy, self.limit, self.evicted = policy, limit, 0
        self._max_robots, self._max_age_s, self._clock = max_robots, max_age_s, clock
        self.real_time = real_time
        self.attention = policy.attention.available if attention else None
        self._episodes: OrderedDict[Hashable, Episode] = OrderedDict()
        self._used: dict[Hashable, float] = {}

    @property
    def metadata(self) -> dict:
        """What a server tells its clients."""
        return self.policy.metadata

    @property
    def robots(self) -> int:
        """Memories at present."""
        return len(self._episodes)

    def warmup(self) -> None:
        """Compiles every program for every number of robots up to the limit."""
        largest = batch_size(self.limit)
        sizes = sorted({size for size in (*BATCH_SIZES, largest) if size <= largest})
        self.policy.warmup(sizes, real_time=self.real_time, attention=self.attention is not None)

    def start(self, robot: Hashable, seed: int) -> None:
        """A new episode of a robot, with the noise of a seed."""
        self.forget(robot)
        self._episodes[robot], self._used[robot] = Episode(seed), self._clock()

    def forget(self, robot: Hashable) -> None:
        """Drops a robot's memory, if there is one."""
        self._episodes.pop(robot, None)
        self._used.pop(robot, None)

    def prepare(self, robot: Hashable, request: dict) -> Prepared:
        """The host's half of a robot's step. Raises RequestError."""
        prepared = self.policy.prepare(request)
        if prepared.overlap is not None and not self.real_time:
            raise RequestError(
                "rtc", "a request without it", "one", "start the server with --serving.real-time to use it"
            )
        if prepared.attention is not None and self.attention is None:
            raise RequestError(
                "attention", "a request without it", "one", "start the server with --serving.attention to use it"
            )
        return prepared

    def step(self, prepared: Sequence[tuple[Hashable, Prepared]]) -> list[Result]:
        """One device step.

        Args:
          prepared: robot and its request, at most `limit`, of one group, no robot twice.

        Returns:
          One result per request, in order.
        """
        if not 1 <= len(prepared) <= self.limit or len({p.group for _, p in prepared}) != 1:
            raise ValueError(f"step: expected 1 to {self.limit} requests of one group, got {len(prepared)}; split them")
        now = self._clock()
        self._evict(now - self._max_age_s)
        for robot, _ in prepared:
            if robot not in self._episodes:
                self._episodes[robot] = Episode(self.policy.seed)
            self._episodes.move_to_end(robot)
            self._used[robot] = now
        while self._max_robots is not None and len(self._episodes) > self._max_robots:
            self._drop(next(iter(self._episodes)))
        return self.policy.advance([self._episodes[robot] for robot, _ in prepared], [p for _, p in prepared])

    def _evict(self, before: float) -> None:
        while self._episodes and self._used[oldest := next(iter(self._episodes))] < before:
            self._drop(oldest)

    def _drop(self, robot: Hashable) -> None:
        self.forget(robot)
        self.evicted += 1
