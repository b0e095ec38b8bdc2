"""What is kept of an episode: one line of JSON, written as it ends.

    with RecordFile(path, configuration) as file:      # repairs a torn last line, refuses another configuration
        if (suite, task, trial) not in file.finished:
            file.append(record)                        # one write, flushed to the disk

A file belongs to one `Configuration`: method, weights, precision, simulator. Which suites, tasks and trials it covers
is not part of that, so a run resumes, shards are concatenated, and suites share a file.
"""

import errno
import functools
import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from safe_pruner_jax.evaluation.journal import Journal, read_lines
from safe_pruner_jax.evaluation.rollout import Episode
from safe_pruner_jax.policy.identity import Configuration, differences
from safe_pruner_jax.pruners import factory

Key = tuple[str, int, int]
"""An episode within a configuration: suite, task, trial."""


class RecordsError(RuntimeError):
    """A records file that cannot be read, continued or written; the message says what to do."""


@dataclass(frozen=True)
class Record:
    """One episode.

    Args:
      suite, task, trial: trial k starts from the benchmark's k-th fixed initial state.
      seed: of the policy's noise, see `episode_seed`; None where a server has its own.
      outcome: "error" is neither of the other two and has its text in `error`.
      steps: executed robot actions.
      seconds: wall-clock time.
      calls: policy calls (control steps of the policy).
      keyframes: calls that ran all alive tokens.
      kept, alive: visual tokens, mean over the calls.
      paper_flops, exact_flops: multiply-adds, mean over the calls (`flops`).
      infer_ms: for "keyframe" and "pruned" calls "count", "p50" and "p90" in milliseconds, or None without any. Calls
        that compiled a program are left out.
      batch: robots per device step, mean over the calls.
      views, prompt_slots: encoded cameras and prompt slots of the layout.
      device: where the policy ran.
      versions: of what is installed.
      configuration: as JSON.
      jump: of the arm's actions at the "border" of chunks and "inside" them, see `asynchronous.jumps`; None without
        a border.
    """

    suite: str
    task: int
    trial: int
    seed: int | None
    outcome: Literal["success", "failure", "error"]
    error: str | None
    steps: int
    seconds: float
    calls: int
    keyframes: int
    kept: float | None
    alive: float | None
    paper_flops: float | None
    exact_flops: float | None
    infer_ms: Mapping[str, Mapping[str, float] | None]
    batch: float | None
    views: list[str] | None
    prompt_slots: int | None
    device: str
    versions: Mapping[str, str]
    configuration: Mapping[str, Any]
    jump: Mapping[str, float] | None = None

    @property
    def key(self) -> Key:
        """Which episode this is."""
        return self.suite, self.task, self.trial


def episode_seed(suite: str, task: int, trial: int, base: int = 0) -> int:
    """The noise seed of an episode, in [0, 2³¹): the same for every method and whatever was played before.

    >>> episode_seed("libero_object", 0, 0), episode_seed("libero_object", 0, 1)
    (687378917, 1895583381)
    """
    digest = hashlib.sha256(f"{base}/{suite}/{task}/{trial}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def read_records(path: str | os.PathLike) -> list[Record]:
    """All records of a file, a torn last line left out.

    Raises:
      RecordsError: a line that is no record; says which.
      OSError: the file cannot be read.
    """
    return list(_parse(Path(path), read_lines(path)))


def latest(records: Iterable[Record]) -> list[Record]:
    """One record per episode and configuration: the last one written counts."""
    return list({(json.dumps(r.configuration, sort_keys=True), r.key): r for r in records}.values())


def percentiles(values: Iterable[float]) -> dict[str, float] | None:
    """ "count", "p50" and "p90" (nearest rank) of some milliseconds; None of none."""
    ordered = sorted(values)
    if not ordered:
        return None
    rank = lambda q: round(ordered[max(0, -(-len(ordered) * q // 100) - 1)], 3)
    return {"count": len(ordered), "p50": rank(50), "p90": rank(90)}


def describe_calls(episode: Episode) -> dict[str, Any]:
    """The fields of a record that come from what the policy replied, but for the cost.

    A reply without "pruning" counts as a full pass: that is what a server without a pruner does.
    """
    pruning = [call.pruning or {} for call in episode.calls]
    full = [bool(p.get("keyframe", True)) for p in pruning]
    timing = [call.timing.get("policy_timing") or call.timing.get("server_timing") or {} for call in episode.calls]
    warm = [(k, t["infer_ms"]) for k, t in zip(full, timing, strict=True) if "infer_ms" in t and not t.get("compiled")]
    views = next((list(p["views"]) for p in pruning if "views" in p), None)
    return {
        "calls": len(pruning),
        "keyframes": sum(full),
        "kept": _mean(p.get("kept") for p in pruning),
        "alive": _mean(p.get("alive") for p in pruning),
        "infer_ms": {
            "keyframe": percentiles(ms for k, ms in warm if k),
            "pruned": percentiles(ms for k, ms in warm if not k),
        },
        "batch": _mean(t.get("batch") for t in timing),
        "views": views,
        "prompt_slots": next((p["text"] for p in pruning if "text" in p), None),
        "jump": episode.jump,
    }


def _mean(values: Iterable[float | None]) -> float | None:
    values = list(values)
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined and len(defined) == len(values) else None


class RecordFile:
    """The records of one configuration, open for appending. One process at a time.

    Attributes: `records`, what it holds (the last one per episode); `finished`, their keys.

    Args:
      path: created with its folders if there is none.
      configuration: of what will be appended.

    Raises:
      RecordsError: records of another configuration, a broken line before the last, or another writer.
      OSError: the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike, configuration: Configuration):
        self.path, self.configuration = Path(path), configuration.as_json()
        self._journal = Journal(path, RecordsError)
        try:
            self.records = {r.key: r for r in self._of_this_configuration(_parse(self.path, self._journal.lines))}
        except BaseException:
            self._journal.close()
            raise

    @property
    def finished(self) -> set[Key]:
        """Episodes that are in the file, whatever their outcome."""
        return set(self.records)

    def append(self, record: Record) -> None:
        """Adds one line, on the disk when this returns. A write that fails leaves the file as it was.

        Raises:
          RecordsError: the disk is full or refuses; what was finished before is safe.
        """
        try:
            self._journal.append(asdict(record))
        except OSError as error:
            why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
            raise RecordsError(
                f"{self.path}: cannot write: {why}; {len(self.records)} finished episodes are kept, "
                "make room and run the same command again"
            ) from error
        self.records[record.key] = record

    def close(self) -> None:
        """Lets others write; may be called again."""
        self._journal.close()

    def __enter__(self) -> "RecordFile":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _of_this_configuration(self, records: Iterable[Record]) -> Iterator[Record]:
        for record in records:
            if changes := differences(record.configuration, self.configuration):
                raise RecordsError(
                    f"{self.path} holds records of another configuration ({'; '.join(changes)}); choose another file"
                )
            yield record


_EARLIER = {"delay": 0, "rtc": False, "temperature": 1.0}
"""What was so before it could be chosen; files of that time go on."""


def _of_today(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as it would be written today: what its method could not choose yet had today's default."""
    whole = {**_EARLIER, **configuration}
    return whole | {"choices": {**_defaults(whole["pruner"]), **whole["choices"]}}


@functools.cache
def _defaults(pruner: str) -> dict[str, Any]:
    """Choices of a method as JSON, each with its default; none of a method that is not installed."""
    try:
        parameters = inspect.signature(factory(pruner)).parameters
    except (ValueError, ImportError):
        return {}
    return json.loads(json.dumps({name: p.default for name, p in parameters.items() if p.default is not p.empty}))


def _parse(path: Path, lines: Iterable[bytes]) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        try:
            read = Record(**json.loads(line))
            read = replace(read, configuration=_of_today(read.configuration))
        except (ValueError, TypeError) as error:
            raise RecordsError(f"{path}, line {number}: not a record of an episode ({error})") from error
        yield read
