"""A robot that executes one action chunk while the next is computed.

    with Asynchronous(client.infer, execute=5, rtc=True) as robot:
        while working:                              # at the control rate
            apply(robot.act(camera.read))           # observes only when it is time to ask

Asked for after `execute` steps, the next chunk arrives some steps later; those were executed from the old chunk, so the
first actions of the new one are skipped (Black et al. 2025, Algorithm 1). With `rtc` the server is told how the two
overlap, and the new one continues the old one (docs/wire.md). No jax here.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from statistics import fmean, median
from typing import Any

import numpy as np

REMEMBERED = 10
"""Delays that are remembered to expect the next one: the longest of them, as in the paper."""


class Asynchronous:
    """Chooses the action of every control step. One control loop, one thread.

    Args:
      infer: request → reply with "actions" [A, W]; called in a thread of its own, one call at a time.
      execute: control steps from one observation to the next.
      delay: control steps from an observation until its chunk is used, whatever the clock says, for simulators; 0 waits
        for every reply. None uses a chunk as soon as it is there.
      rtc: ask for chunks that continue the last one.
      expected: with `delay=None`, the delay to expect before any was seen.

    Attributes:
      borders: numbers of the steps, from 0, whose action is the first of a new chunk; the very first chunk is none.
      stalls: steps that had to wait because the old chunk had ended.

    Raises:
      ValueError: `execute` below 1 or a negative delay.
    """

    def __init__(
        self,
        infer: Callable[[dict[str, Any]], Mapping[str, Any]],
        *,
        execute: int = 5,
        delay: int | None = None,
        rtc: bool = False,
        expected: int = 1,
    ):
        if execute < 1 or (delay or 0) < 0 or expected < 0:
            raise ValueError(f"expected execute ≥ 1 and delays ≥ 0, got {execute}, {delay} and {expected}")
        self._infer, self._execute, self._delay, self._rtc = infer, execute, delay, rtc
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="policy")
        self._pending: Future | None = None
        self._chunk: np.ndarray | None = None
        self._next = self._waited = self._steps = self.stalls = 0
        self._recent = deque([expected if delay is None else delay], maxlen=REMEMBERED)
        self.borders: list[int] = []

    def act(self, observe: Callable[[], dict[str, Any]]) -> np.ndarray:
        """The action [W] of this control step.

        Args:
          observe: gives the request; called if it is time to ask.

        Raises:
          ValueError: chunks too short for `execute` and `delay`.
          Exception: what `infer` raises, at the step that needs its reply.
        """
        if self._chunk is None:
            self._use(self._infer(self._request(observe(), self._execute)), 0)
        else:
            self._look(observe)
        action, self._next, self._steps = self._chunk[self._next], self._next + 1, self._steps + 1
        self._waited += 1
        return action

    def _look(self, observe: Callable[[], dict[str, Any]]) -> None:
        """Takes the next chunk if it is there, and asks for another if it is time."""
        if self._pending is not None and (self._pending.done() if self._delay is None else self._waited >= self._delay):
            self._take()
        if self._pending is None and self._next >= self._execute:
            self._waited, request = 0, self._request(observe(), self._next)
            if self._delay == 0:
                self._use(self._infer(request), 0)
                self.borders.append(self._steps)
            else:
                self._pending = self._pool.submit(self._infer, request)
        if self._next >= len(self._chunk):
            self.stalls += not self._pending.done()
            self._take()

    def _take(self) -> None:
        """Goes on with the chunk that was asked for; waits for it."""
        pending, self._pending = self._pending, None
        self._recent.append(self._waited)
        self._use(pending.result(), self._waited)
        self.borders.append(self._steps)

    def _request(self, observation: dict[str, Any], executed: int) -> dict[str, Any]:
        if not self._rtc:
            return observation
        return observation | {"rtc": {"executed": executed, "delay": max(self._recent)}}

    def _use(self, reply: Mapping[str, Any], first: int) -> None:
        chunk = np.asarray(reply["actions"])
        delay = self._delay or 0
        least = max(self._execute, delay) + delay
        if chunk.ndim != 2 or len(chunk) < max(least, first + 1):
            raise ValueError(f"actions: expected a chunk of at least {least} steps, got {list(chunk.shape)}")
        self._chunk, self._next = chunk, first

    def close(self) -> None:
        """Waits for a reply that is still due, and drops it."""
        self._pool.shutdown(wait=True)

    def __enter__(self) -> "Asynchronous":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def jumps(actions: Sequence[np.ndarray], borders: Sequence[int]) -> dict[str, float] | None:
    """How far actions jump where a new chunk begins, and how far inside chunks.

    Args:
      actions: [D] each, as executed.
      borders: which of them begin a chunk.

    Returns:
      "border", mean L2 distance to the action before, and "inside", the median elsewhere; None without a border.

    >>> jumps([np.array([x]) for x in (0.0, 1.0, 2.0, 5.0)], [3])
    {'border': 3.0, 'inside': 1.0}
    """
    distances = [math.dist(a, b) for a, b in pairwise(actions)]
    inside = [d for step, d in enumerate(distances, 1) if step not in borders]
    border = [d for step, d in enumerate(distances, 1) if step in borders]
    return {"border": fmean(border), "inside": median(inside)} if border and inside else None
