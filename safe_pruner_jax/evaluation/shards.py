"""Parts of a run: which one a machine plays, and whether the files of all parts belong together."""

import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from safe_pruner_jax.evaluation.records import Record, RecordsError
from safe_pruner_jax.policy.identity import differences

logger = logging.getLogger(__name__)

NAME = re.compile(r"(?P<run>.+)\.(?P<part>\d+)-of-(?P<parts>\d+)$")
"""Stem of a shard's file: safe-keep0.2.3-of-8."""


def read_shard(text: str, environ: Mapping[str, str]) -> tuple[int, int]:
    """(i, n) of "i/n", or of "slurm": the place of this task in its job array.

    Args:
      text: of the command line.
      environ: of the process.

    Raises:
      ValueError: neither, or "slurm" outside a job array.

    >>> read_shard("2/4", {})
    (2, 4)
    >>> array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "4"}
    >>> read_shard("slurm", array)
    (3, 4)
    """
    if text == "slurm":
        names = ("ID", "MIN", "COUNT")
        values = [environ.get(f"SLURM_ARRAY_TASK_{name}", "") for name in names]
        if not all(value.isdigit() for value in values):
            raise ValueError(
                "shard: expected to be a task of a SLURM job array, got no SLURM_ARRAY_TASK_ID; use sbatch -a"
            )
        number, first, count = map(int, values)
        step = int(environ.get("SLURM_ARRAY_TASK_STEP", "1"))
        return (number - first) // step + 1, count
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit()):
        raise ValueError(f"shard: expected i/n, for example 1/4, or slurm, got {text!r}")
    return int(part), int(parts)


def check_shards(files: Mapping[Path, Sequence[Record]]) -> None:
    """Refuses files of one run, by their names, whose configurations differ; warns of parts that are not there.

    Raises:
      RecordsError: names the two files and the difference.
    """
    runs: dict[tuple[Path, str], dict[int, Path]] = {}
    for path in files:
        if match := NAME.match(path.stem):
            runs.setdefault((path.parent / match["run"], match["parts"]), {})[int(match["part"])] = path
    for (run, parts), members in runs.items():
        there = [path for _, path in sorted(members.items()) if files[path]]
        for first, other in itertools.pairwise(there):
            if differing := differences(files[first][0].configuration, files[other][0].configuration):
                raise RecordsError(
                    f"{other}: another configuration than {first} ({'; '.join(differing)}); shards of one run are "
                    "played with the same arguments on the same software"
                )
        if absent := sorted(set(range(1, int(parts) + 1)) - set(members)):
            logger.warning("%s: parts %s of %s are not there", run, ", ".join(map(str, absent)), parts)
