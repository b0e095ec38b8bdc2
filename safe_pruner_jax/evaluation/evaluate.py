"""Plays many episodes at once and records each as it ends.

    with RecordFile("records.jsonl", configuration) as file:
        play(episodes("libero_object", range(10), 50), file, local(policy, configuration), workers=8)

Simulators are a `crew`: `workers` of this machine, whose process owns the device, or those of a cluster. Whoever waits
for a reply when the device is free is served in one step (`batched`): nobody waits for a batch to fill.
"""

import contextlib
import logging
import platform
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import jax

from safe_pruner_jax import __version__
from safe_pruner_jax.evaluation.crew import Crew, EvaluationError, Processes
from safe_pruner_jax.evaluation.records import Record, RecordFile, describe_calls, episode_seed
from safe_pruner_jax.evaluation.rollout import Episode
from safe_pruner_jax.evaluation.sources import Source
from safe_pruner_jax.evaluation.workers import Job, MakeEnv, broken, libero_env

logger = logging.getLogger(__name__)

RESTARTS = 5
"""Simulator processes that may die in a run before it stops."""

ERRORS_IN_A_ROW = 10
"""Episodes that may end in an error one after the other before a run stops: nothing is learned from more."""

AGAIN = 5
"""How often an episode is begun again because a machine or a policy has died under it; then it is an error."""


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
    crew: Crew | None = None,
    on_record: Callable[[Record], None] = lambda record: None,
) -> None:
    """Plays the episodes that the file does not have, and appends each to it as it ends.

    Args:
      jobs: from `episodes`.
      file: open; its configuration is that of the source.
      source: of the replies.
      workers: simulators.
      retry_errors: play episodes again that ended in an error; the last record counts.
      make_env: makes their environments.
      crew: plays instead of processes of this machine; is closed at the end.
      on_record: called with every new record.

    Raises:
      EvaluationError: no simulator, no server, too many errors in a row, too many dead simulators.
      RecordsError: the file cannot be written.
      ValueError: no workers.
    """
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    with contextlib.closing(Processes(source, make_env) if crew is None else crew) as players:
        _Run(remaining(jobs, file, retry_errors), file, source, players, on_record)(workers)


def _key(job: Job) -> tuple[str, int, int]:
    return job.suite, job.task, job.trial


class _Run:
    """The loop of `play`: listen to the simulators, record what ended, hand out what is left."""

    def __init__(self, jobs: Sequence[Job], file: RecordFile, source: Source, crew: Crew, on_record: Callable):
        self._file, self._source, self._crew, self._on_record = file, source, crew, on_record
        self._todo: dict[tuple[str, int], deque[Job]] = {}
        for job in jobs:
            self._todo.setdefault((job.suite, job.task), deque()).append(job)
        self._playing: dict[Hashable, Job] = {}
        self._loaded: dict[Hashable, tuple[str, int]] = {}
        self._begun = Counter()
        self._lost = self._errors = 0

    def __call__(self, workers: int) -> None:
        for _ in range(min(workers, sum(map(len, self._todo.values())))):
            self._crew.hire()
        while self._playing or any(self._todo.values()):
            for simulator, kind, content in self._crew.listen():
                self._heard(simulator, kind, content)

    def _heard(self, simulator: Hashable, kind: str, content: Any) -> None:
        match kind:
            case "ready":
                self._assign(simulator)
            case "fatal":
                raise EvaluationError(content)
            case "gone" | "again":
                self._once_more(simulator, kind, content)
            case _:
                self._ended(simulator, kind, content)

    def _ended(self, simulator: Hashable, kind: str, content: Any) -> None:
        """An episode is over, one way or another."""
        job = self._playing.pop(simulator)
        episode = broken(job, content) if kind == "lost" else content
        self._record(job, episode, self._crew.device(simulator))
        if kind == "lost":
            self._lost += 1
            self._crew.dismiss(simulator)
        if self._lost > RESTARTS:
            raise EvaluationError(f"{self._lost} simulator processes have died, the last one: {content}")
        if self._errors >= ERRORS_IN_A_ROW:
            raise EvaluationError(
                f"{self._errors} episodes in a row ended in an error, the last one: {episode.error}; "
                "when it is mended, play them again with --retry-errors"
            )
        if kind != "lost":
            self._assign(simulator)
        elif any(self._todo.values()):
            self._crew.hire()

    def _once_more(self, simulator: Hashable, kind: str, why: str) -> None:
        """What a machine or a policy took with it is played again, unless it has been begun too often."""
        job = self._playing.pop(simulator, None)
        if job is not None and self._begun[_key(job)] > AGAIN:
            self._record(job, broken(job, f"begun {self._begun[_key(job)]} times, the last time: {why}"), "")
        elif job is not None:
            logger.warning("%s task %d, trial %d is played again: %s", *_key(job), why)
            self._todo[job.suite, job.task].appendleft(job)
        if kind == "gone":
            self._crew.dismiss(simulator)
            if any(self._todo.values()):
                self._crew.hire()

    def _record(self, job: Job, episode: Episode, device: str) -> None:
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
            device=device,
            versions=versions(),
            configuration=self._file.configuration,
            **describe_calls(episode),
        )
        self._errors = self._errors + 1 if record.outcome == "error" else 0
        self._file.append(record)
        self._on_record(record)

    def _assign(self, simulator: Hashable) -> None:
        """The next episode: of the task that it has loaded, or of the one with the fewest simulators."""
        crowd = Counter((job.suite, job.task) for job in self._playing.values())
        loaded = self._loaded.get(simulator)
        tasks = [task for task, jobs in self._todo.items() if jobs]
        if not tasks:
            self._crew.dismiss(simulator)
            return
        task = loaded if loaded in tasks else min(tasks, key=lambda task: crowd[task])
        job = self._todo[task].popleft()
        if self._source.seed is not None:
            job = replace(job, seed=episode_seed(*_key(job), self._source.seed))
        self._begun[_key(job)] += 1
        self._playing[simulator], self._loaded[simulator] = job, task
        self._crew.start(simulator, job)
