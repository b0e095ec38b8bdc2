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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        conditions = json.loads(json.dumps(dict(conditions)))
        lines = _whole_lines(self.path)
        if lines:
            head, *rest = lines
            if "conditions" not in head or any("part" not in line for line in rest):
                raise RowsError(f"{self.path}: expected rows of an analysis, got something else; choose another --out")
            if head["conditions"] != conditions:
                old = head["conditions"]
                keys = sorted(key for key in {*old, *conditions} if old.get(key) != conditions.get(key))
                raise RowsError(
                    f"{self.path}: expected rows made with the same {', '.join(keys)}, got other ones; "
                    "choose another --out or remove the file"
                )
            self.parts = {line["part"]: line["rows"] for line in rest}
        self._file = self.path.open("a", encoding="utf-8")
        if not lines:
            self._write({"conditions": conditions})

    @property
    def finished(self) -> set[str]:
        """Names of the parts that are in the file."""
        return set(self.parts)

    def rows(self) -> list[Row]:
        """All rows, each with its "part"."""
        return [{"part": part} | row for part, rows in self.parts.items() for row in rows]

    def add(self, part: str, rows: Sequence[Row]) -> None:
        """Appends one part, on the disk when this returns."""
        self._write({"part": part, "rows": rows})
        self.parts[part] = list(rows)

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> "Rows":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()


def read_rows(path: str | os.PathLike) -> list[Row]:
    """The rows of a file, each with its "part".

    Raises:
      OSError: no such file.
      RowsError: it is not a file of rows.
    """
    Path(path).stat()
    lines = _whole_lines(Path(path))
    try:
        return [{"part": line["part"]} | row for line in lines[1:] for row in line["rows"]]
    except KeyError as error:
        raise RowsError(f"{path}: expected rows of an analysis, got something else") from error


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file as JSON objects; a torn last one is removed from the file."""
    if not path.exists():
        return []
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        os.truncate(path, end)
    try:
        lines = [json.loads(line) for line in data[:end].splitlines()]
    except ValueError as error:
        raise RowsError(f"{path}: expected one JSON object per line, got {error}; choose another --out") from error
    if not all(isinstance(line, dict) for line in lines):
        raise RowsError(f"{path}: expected one JSON object per line; choose another --out")
    return lines


def rounded(values: Iterable[float], digits: int = 6) -> list[float | None]:
    """Numbers as they stand in a row: rounded, None where they are not finite."""
    return [round(float(v), digits) if abs(float(v)) < float("inf") else None for v in values]
