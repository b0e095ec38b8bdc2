"""`openpi export`: demonstrations, recordings, played and running episodes as a LeRobot dataset.

openpi export --data demos/*.hdf5 --out my_dataset
openpi export --data policy_records/*.episode --out what_it_saw
openpi export --data example --watch --attention -1 --out watched --pruner=safe policy:embedded
openpi export --data safe.jsonl --out evaluated --pruner=safe policy:embedded
openpi export --data ws://localhost:8000 --limit 20 --out seen_live
"""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safe_pruner_jax.cli.films import LIVE, Film, Infer, evaluated, films, observed
from safe_pruner_jax.evaluation.records import Record, latest, read_records
from safe_pruner_jax.lerobot.write import Writer
from safe_pruner_jax.policy.identity import METHOD, differences
from safe_pruner_jax.policy.spec import Method, Model
from safe_pruner_jax.pruners.checks import require
from safe_pruner_jax.robots.configs import get_config
from safe_pruner_jax.robots.transform import PolicyConfig
from safe_pruner_jax.serving.access import read_key
from safe_pruner_jax.serving.episodes import SUFFIX

logger = logging.getLogger(__name__)

RECORDS = ".jsonl"
SERVERS = ("ws", "wss", "http", "https")
RATE = 20
"""Control steps per second of LIBERO's robot."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(Model):
    """Write a LeRobot dataset (v3), for lerobot, rerun and `openpi train --data`.

    Args:
      data: demonstrations (HDF5, packed, or "example"); recordings of `openpi serve --record`, files or their folder;
        libero:SUITE/TASK/TRIAL, played by the policy; records of `openpi evaluate` (.jsonl), whose episodes the same
        policy plays again; or ws://HOST:PORT of a server with --serving.watch, whose robots are followed.
      out: folder of the dataset, new or empty.
      watch: show demonstrations to the policy, and write what it keeps; every row then has the masks of its call.
      attention: layers of the action tokens' attention that are written as grids; needs --watch or a live episode.
      replan: robot actions between two calls; by default those of the evaluation whose records are exported, else the
        policy's (10 for the embedded one, 5 for others).
      fps: rows per second; None takes 20 for demonstrations, 20 / replan where a row is a call.
      limit: episodes, at most; a server is followed until then, or until Ctrl-C.
      api_key_file: file with the server's key; default: $OPENPI_API_KEY.
    """

    data: tuple[str, ...]
    out: Path
    watch: bool = False
    attention: tuple[int, ...] = ()
    replan: int | None = None
    fps: int | None = None
    limit: int | None = None
    api_key_file: str | None = None


def run_export(args: Export, method: Method) -> None:
    """Writes the dataset.

    Raises:
      ValueError, OSError: with what to do.
    """
    _at_least_one(args)
    calls = [source for source in args.data if _is_of_calls(source)]
    if calls and len(calls) != len(args.data):
        raise ValueError(
            f"data: expected demonstrations or calls, got both ({calls[0]} is of calls); export them apart"
        )
    config = get_config(args.named("LIBERO")[0])
    records = {source: _finished(source) for source in args.data if source.endswith(RECORDS)}
    replan = _replan(args, config, records)
    fps = args.fps or (max(1, round(RATE / replan)) if calls else RATE)
    watched = args.watch or any(source.startswith(LIVE) or source.endswith(RECORDS) for source in args.data)
    if args.attention and not watched:
        raise ValueError(
            "attention: expected --watch or a live episode beside it, got neither; recordings have their own"
        )
    method = args.fit("LIBERO", method, replan) if watched else method
    policy = functools.cache(lambda: args.load("LIBERO", method.make()))

    def robot() -> Infer:
        session = policy().session()
        attention = {"attention": {"layers": list(args.attention), "of": "action"}} if args.attention else {}
        return lambda request: session.infer(request | attention)

    def of(source: str) -> Iterator[Film]:
        if source.partition("://")[0] in SERVERS:
            return observed(source, read_key(args.api_key_file), config)
        if source.endswith(RECORDS):
            _check_evaluation(source, records[source], args.describe("LIBERO", method).as_json() | {"replan": replan})
            return evaluated(records[source], config, replan, robot)
        return films(source, config, replan, robot if watched else None)

    with Writer(args.out, fps, config.robot.name) as writer:
        pairs = ((source, film) for source in args.data for film in of(source))
        for source, film in itertools.islice(pairs, args.limit):
            writer.add(film.task, film.images, film.columns)
            logger.info("%s: episode %d, %d rows", source, len(writer) - 1, len(film.columns["action"]))
    print(f"{len(writer)} episodes in {args.out}: `lerobot-dataset-viz`, rerun and `openpi train --data` read it")


def _at_least_one(args: Export) -> None:
    for name in ("replan", "fps", "limit"):
        value = getattr(args, name)
        require(value is None or value >= 1, name, "at least 1", value)


def _is_of_calls(source: str) -> bool:
    server = source.partition("://")[0] in SERVERS
    return server or source.startswith(LIVE) or Path(source).is_dir() or source.endswith((SUFFIX, RECORDS))


def _replan(args: Export, config: PolicyConfig, records: Mapping[str, list[Record]]) -> int:
    if args.replan is not None:
        return args.replan
    return next((episodes[0].configuration["replan"] for episodes in records.values()), config.replan)


def _finished(file: str) -> list[Record]:
    records = [record for record in latest(read_records(file)) if record.outcome != "error"]
    if not records:
        raise ValueError(f"{file}: expected at least one finished episode, got none")
    return records


def _check_evaluation(file: str, records: list[Record], here: Mapping[str, Any]) -> None:
    """Its episodes can be played again: the evaluation is one of these arguments."""
    evaluation = records[0].configuration
    keys = (*METHOD, "policy", "checkpoint", "replan")
    if changes := differences({key: evaluation.get(key) for key in keys}, {key: here[key] for key in keys}):
        raise ValueError(f"{file}: expected the policy and method of its evaluation, got {'; '.join(changes)}")
    if evaluation.get("delay") or evaluation.get("rtc"):
        raise ValueError(f"{file}: expected an evaluation without --delay and --rtc, got one with; export another")
