"""Plays many episodes at once and records each as it ends.

    with RecordFile("records.jsonl", configuration) as file:
        play(episodes("libero_object", range(10), 50), file, local(policy, configuration), workers=8)

Simulators live in `workers`; this process owns the device. Whoever waits for a reply when the device is free is
served in one step (`batched`): nobody waits for a batch to fill.
"""

import contextlib
import platform
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from typing import Any

import jax

from safe_pruner_jax import __version__
from safe_pruner_jax.evaluation.records import Record, RecordFile, describe_calls, episode_seed
from safe_pruner_jax.evaluation.rollout import Episode
from safe_pruner_jax.evaluation.sources import Source
from safe_pruner_jax.evaluation.workers import Job, MakeEnv, Worker, broken, libero_env

RESTARTS = 5
"""Simulator processes that may die in a run before it stops."""

ERRORS_IN_A_ROW = 10
"""Episodes that may end in an error one after the other before a run stops: nothing is learned from more."""

PATIENCE_S = 5
"""Seconds between two looks at whether somebody stalls."""

STALL_S = 600
"""Seconds without a word from a simulator that is not waiting for us, after which it is killed."""


class EvaluationError(RuntimeError):
    """A run that cannot go on; the finished episodes are in the file, and the message says what to do."""


def episodes(
    suite: str,
    tasks: Iterable[int],
    trials: int,
    *,
    shard: tuple[int, int] = (1, 1),
    replan: int = 5,
    max_steps: int | None = None,
    delay: int = 0,
    rtc: bool = False,
) -> list[Job]:
    """The episodes of a run, task after task: trials 0 to trials - 1 of each, or the i-th of n equal parts of them.

    Raises:
      ValueError: no trials, or a shard that does not exist.

    >>> [(job.task, job.trial) for job in episodes("libero_object", (0, 1), 2, shard=(2, 3))]
    [(0, 1)]
    """
    part, parts = shard
    if trials < 1:
        raise ValueError(f"trials: expected at least 1, got {trials}")
    if not 1 <= part <= parts:
        raise ValueError(f"shard: expected i/n with 1 ≤ i ≤ n, got {part}/{parts}")
    protocol = (replan, max_steps, delay, rtc)
    jobs = [Job(suite, task, trial, *protocol) for task in dict.fromkeys(tasks) for trial in range(trials)]
    return jobs[len(jobs) * (part - 1) // parts : len(jobs) * part // parts]


def versions() -> dict[str, str]:
    """What ran, beside the simulator."""
    return {"safe_pruner_jax": __version__, "jax": jax.__version__, "python": platform.python_version()}


def remaining(jobs: Sequence[Job], file: RecordFile, retry_errors: bool = False) -> list[Job]:
    """The episodes that are still to be played."""
    done = {key for key, record in file.records.items() if not (retry_errors and record.outcome == "error")}
    return [job for job in jobs if _key(job) not in done]


def play(
    jobs: Sequence[Job],
    file: RecordFile,
    source: Source,
    *,
    workers: int = 2,
    retry_errors: bool = False,
    make_env: MakeEnv = libero_env,
    on_record: Callable[[Record], None] = lambda record: None,
) -> None:
    """Plays the episodes that the file does not have, and appends each to it as it ends.

    Args:
      jobs: from `episodes`.
      file: open; its configuration is that of the source.
      source: of the replies.
      workers: simulator processes.
      retry_errors: play episodes again that ended in an error; the last record counts.
      make_env: makes their environments.
      on_record: called with every new record.

    Raises:
      EvaluationError: no simulator, no server, too many errors in a row, too many dead simulators.
      RecordsError: the file cannot be written.
      ValueError: no workers.
    """
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    with contextlib.closing(_Run(remaining(jobs, file, retry_errors), file, source, make_env, on_record)) as run:
        run(workers)


def _key(job: Job) -> tuple[str, int, int]:
    return job.suite, job.task, job.trial


class _Run:
    """The loop of `play`: listen to the simulators, answer who waits, record what ended, hand out what is left."""

    def __init__(self, jobs: Sequence[Job], file: RecordFile, source: Source, make_env: MakeEnv, on_record: Callable):
        self._file, self._source, self._make_env, self._on_record = file, source, make_env, on_record
        self._todo: dict[tuple[str, int], deque[Job]] = {}
        for job in jobs:
            self._todo.setdefault((job.suite, job.task), deque()).append(job)
        self._pool: dict[Any, Worker] = {}
        self._lost = self._errors = 0

    def close(self) -> None:
        """Ends all simulators."""
        for worker in self._pool.values():
            worker.process.terminate()
        for worker in self._pool.values():
            worker.stop()

    def __call__(self, workers: int) -> None:
        for _ in range(min(workers, sum(map(len, self._todo.values())))):
            self._hire()
        while self._pool:
            requests = {}
            for connection in wait(list(self._pool), timeout=PATIENCE_S):
                worker = self._pool[connection]
                kind, content = worker.receive()
                if kind == "request":
                    requests[worker] = content
                else:
                    self._ended(worker, kind, content)
            for worker in self._pool.values():
                if worker not in requests and time.monotonic() - worker.since > STALL_S:
                    worker.give_up(f"after {STALL_S} s without a word")
            if requests:
                for worker, reply in self._source.robots.step(requests).items():
                    worker.send(reply)

    def _ended(self, worker: Worker, kind: str, content: Any) -> None:
        """An episode is over, one way or another."""
        if kind == "fatal":
            raise EvaluationError(content)
        if kind == "lost":
            del self._pool[worker.connection]
            worker.stop()
            self._lost += 1
        episode = broken(worker.job, content) if kind == "lost" else content
        self._record(worker.job, episode)
        if self._lost > RESTARTS:
            raise EvaluationError(f"{self._lost} simulator processes have died, the last one: {content}")
        if self._errors >= ERRORS_IN_A_ROW:
            raise EvaluationError(
                f"{self._errors} episodes in a row ended in an error, the last one: {episode.error}; "
                "when it is mended, play them again with --retry-errors"
            )
        if kind == "lost":
            self._hire()
        else:
            self._assign(worker)

    def _record(self, job: Job, episode: Episode) -> None:
        source = self._source
        paper, exact = source.cost.of(episode) if source.cost else (None, None)
        record = Record(
            *_key(job),
            seed=None if source.seed is None else episode_seed(*_key(job), source.seed),
            outcome=episode.outcome,
            error=episode.error,
            steps=episode.steps,
            seconds=round(episode.seconds, 3),
            paper_flops=paper,
            exact_flops=exact,
            device=source.device,
            versions=versions(),
            configuration=self._file.configuration,
            **describe_calls(episode),
        )
        self._errors = self._errors + 1 if record.outcome == "error" else 0
        self._file.append(record)
        self._on_record(record)

    def _hire(self) -> None:
        """A new simulator, if there is something left for it."""
        if any(self._todo.values()):
            worker = Worker(self._make_env, self._source.server)
            self._pool[worker.connection] = worker
            self._assign(worker)

    def _assign(self, worker: Worker) -> None:
        """The next episode: of the task that it has loaded, or of the one with the fewest simulators."""
        crowd = Counter((w.job.suite, w.job.task) for w in self._pool.values() if w is not worker and w.job)
        loaded = worker.job and (worker.job.suite, worker.job.task)
        tasks = [task for task, jobs in self._todo.items() if jobs]
        if not tasks:
            del self._pool[worker.connection]
            worker.stop()
            return
        job = self._todo[loaded if loaded in tasks else min(tasks, key=lambda task: crowd[task])].popleft()
        if self._source.seed is not None:
            job = replace(job, seed=episode_seed(*_key(job), self._source.seed))
        if self._source.robots:
            self._source.robots.start(worker, job.seed)
        worker.start(job)
