"""Jobs in processes that may die: what a dead worker was at is missing, and what is missing is done again.

    for number, count, result in finish(missing, work, workers=2):
        print(f"{number}/{count}: {result}")

A job is done when `missing` no longer lists it, for example because its file is there. So a run that is stopped goes
on where it was. Workers end with the process that started them, however that ends.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

DEATHS = 3
"""Times that workers may die before the run is given up."""


def finish(
    missing: Callable[[], Sequence[Job]], work: Callable[[Job], Result], workers: int
) -> Iterator[tuple[int, int, Result]]:
    """Works until nothing is missing.

    Args:
      missing: what is to be done; asked at the start, and again whenever all of it has been done or a worker has died.
      work: of one job, in a fresh process that imports the function by name.
      workers: processes.

    Yields:
      (number, count, result) of every job as it ends: the number-th of count in this turn.

    Raises:
      RuntimeError: workers died `DEATHS` times. What `missing` or `work` raise is passed on, and no new job begins.
    """
    deaths = 0
    while jobs := missing():
        pool, number, death = ProcessPoolExecutor(workers, get_context("spawn"), _end_with_parent), 0, None
        try:
            for done in as_completed([pool.submit(work, job) for job in jobs]):
                if isinstance(done.exception(), BrokenProcessPool):
                    death = done.exception()
                    continue
                number += 1
                yield number, len(jobs), done.result()
        except BrokenProcessPool as error:  # before all jobs were handed over
            death = error
        finally:
            pool.shutdown(cancel_futures=True)
        deaths += death is not None
        if deaths >= DEATHS:
            raise RuntimeError(f"gave up: workers died {deaths} times") from death


def _end_with_parent() -> None:
    """A killed parent cannot stop its workers, and they would wait for its jobs for ever."""
    parent = parent_process()
    assert parent is not None  # a worker has one

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
