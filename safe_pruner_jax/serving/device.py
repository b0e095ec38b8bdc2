"""The accelerator's own thread: everything that is run there runs one after the other."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from safe_pruner_jax.policy.reply import Result
from safe_pruner_jax.serving.backend import Backend, Prepared
from safe_pruner_jax.serving.metrics import Metrics


class Device:
    """A backend in a thread of its own.

    Args:
      backend: what steps.
      metrics: counts the steps.

    Attributes:
      limit: robots per step.
      robots: how many are connected.
    """

    def __init__(self, backend: Backend, metrics: Metrics):
        self.limit, self.robots = backend.limit, 0
        self._backend, self._metrics = backend, metrics
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="device")

    async def warmup(self) -> None:
        """Compiles every program; raises what the backend raises."""
        await self._run(self._backend.warmup)

    async def step(self, prepared: Sequence[tuple[Hashable, Prepared]]) -> tuple[Sequence[Result], float]:
        """One step of robots of one group: a result each, and seconds. An error of the device is everybody's."""
        started = time.monotonic()
        try:
            results = await self._run(self._backend.step, prepared)
        except Exception as error:  # the device refuses: everybody in this step is told
            results = [Result(None, error)] * len(prepared)
        seconds = time.monotonic() - started
        self._metrics.stepped(len(prepared), seconds, self._backend.evicted)
        return results, seconds

    def forget(self, robot: Hashable) -> None:
        """Drops a robot's memory when the thread's turn comes; nothing after `shutdown`."""
        with contextlib.suppress(RuntimeError):  # the thread has ended
            self._thread.submit(self._backend.forget, robot)

    def shutdown(self) -> None:
        """Ends the thread after what it runs."""
        self._thread.shutdown()

    async def _run(self, function: Callable, *args: Any) -> Any:
        """`function(*args)` in the thread."""

        def call() -> tuple[Any, Exception | None]:
            try:
                return function(*args), None
            except Exception as error:  # carried over by hand: a future refuses StopIteration and never ends
                return None, error

        result, error = await asyncio.get_running_loop().run_in_executor(self._thread, call)
        if error is not None:
            raise error
        return result
