"""What an analysis leaves behind: rows of JSON that survive an interruption, a table of markdown, a figure.

with Rows(path, conditions) as rows:            an interrupted run goes on where it stopped
    if name not in rows.finished:
        rows.add(name, [{"keep": 0.2, "loss": 0.1}, ...])
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safe_pruner_jax.evaluation.journal import Journal, read_lines

Row = dict[str, Any]


class RowsError(ValueError):
    """A file of rows that cannot be continued; the message says what to do."""


class Rows:
    """A JSONL file: the first line says under which conditions, every other line is one part's rows.

    A part (an episode, a group of measurements) is written in one piece and flushed, so it is there as a whole or
    not at all; a line that a kill has torn is removed.

    Args:
      path: created with its folders.
      conditions: what must agree for parts to be counted together; JSON types.

    Raises:
      RowsError: the file was made under other conditions, or is none of these files.
      OSError: it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike, conditions: Mapping[str, Any]):
        self.path, self.parts = Path(path), {}
        conditions = json.loads(json.dumps(dict(conditions)))
        self._journal = Journal(path, RowsError)
        try:
            lines = _objects(self.path, self._journal.lines)
            if lines:
                self.parts = _parts(self.path, lines, conditions)
            else:
                self._journal.append({"conditions": conditions})
        except BaseException:
            self._journal.close()
            raise

    @property
    def finished(self) -> set[str]:
        """Names of the parts that are in the file."""
        return set(self.parts)

    def rows(self) -> list[Row]:
        """All rows, each with its "part"."""
        return [{"part": part} | row for part, rows in self.parts.items() for row in rows]

    def add(self, part: str, rows: Sequence[Row]) -> None:
        """Appends one part, on the disk when this returns."""
        self._journal.append({"part": part, "rows": rows})
        self.parts[part] = list(rows)

    def __enter__(self) -> "Rows":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._journal.close()


def read_rows(path: str | os.PathLike) -> list[Row]:
    """The rows of a file, each with its "part".

    Raises:
      OSError: no such file.
      RowsError: it is not a file of rows.
    """
    lines = _objects(Path(path), read_lines(path))
    try:
        return [{"part": line["part"]} | row for line in lines[1:] for row in line["rows"]]
    except KeyError as error:
        raise RowsError(f"{path}: expected rows of an analysis, got something else") from error


def _parts(path: Path, lines: list[dict[str, Any]], conditions: Mapping[str, Any]) -> dict[str, list[Row]]:
    """The rows of every part; RowsError for a file of something else, or made under other conditions."""
    head, *rest = lines
    if "conditions" not in head or any("part" not in line for line in rest):
        raise RowsError(f"{path}: expected rows of an analysis, got something else; choose another --out")
    if (old := head["conditions"]) != conditions:
        keys = sorted(key for key in {*old, *conditions} if old.get(key) != conditions.get(key))
        raise RowsError(
            f"{path}: expected rows made with the same {', '.join(keys)}, got other ones; "
            "choose another --out or remove the file"
        )
    return {line["part"]: line["rows"] for line in rest}


def _objects(path: Path, lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """Lines as JSON objects."""
    try:
        objects = [json.loads(line) for line in lines]
    except ValueError as error:
        raise RowsError(f"{path}: expected one JSON object per line, got {error}; choose another --out") from error
    if not all(isinstance(line, dict) for line in objects):
        raise RowsError(f"{path}: expected one JSON object per line; choose another --out")
    return objects


def rounded(values: Iterable[float], digits: int = 6) -> list[float | None]:
    """Numbers as they stand in a row: rounded, None where they are not finite."""
    return [round(float(v), digits) if abs(float(v)) < float("inf") else None for v in values]
