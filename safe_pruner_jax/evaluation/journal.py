"""Lines of JSON that survive a kill: written whole and flushed, repaired when the file is opened again.

with Journal(path) as journal:          # one process at a time
    journal.lines                       # what was there, complete lines only
    journal.append({"episode": 3})      # on the disk when this returns
"""

import contextlib
import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Journal:
    """A file of JSON lines, open for appending.

    Args:
      path: created with its folders if there is none.
      error: type that is raised when another process writes to the file.

    Attributes:
      lines: complete lines that were there when it was opened.

    Raises:
      error: another writer.
      OSError: the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike, error: type[Exception] = RuntimeError):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            _lock(self._fd, self.path, error)
            self._size = self._repair()
            self.lines = read_lines(self.path)
        except BaseException:
            os.close(self._fd)
            raise

    def append(self, entry: Mapping[str, Any]) -> None:
        """Adds one line. A write that fails leaves the file as it was and raises OSError."""
        line = json.dumps(entry, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
            written = os.write(self._fd, line)
            if written < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._fd)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._size)
            raise
        self._size += len(line)

    def close(self) -> None:
        """Lets others write; may be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _repair(self) -> int:
        """Removes what a killed process left behind its last complete line; returns the size in bytes."""
        data = self.path.read_bytes()
        complete = _complete(data)
        if len(complete) < len(data):
            os.ftruncate(self._fd, len(complete))
        elif len(complete) > len(data):
            os.write(self._fd, b"\n")
        return len(complete)


def read_lines(path: str | os.PathLike) -> list[bytes]:
    """The complete lines of a file, which is not changed. Raises OSError."""
    return _complete(Path(path).read_bytes()).split(b"\n")[:-1]


def _complete(data: bytes) -> bytes:
    """Without a torn last line; a whole one that lacks its newline gets it."""
    end = data.rfind(b"\n") + 1
    with contextlib.suppress(ValueError):
        json.loads(data[end:])
        return data + b"\n"
    return data[:end]


def _lock(fd: int, path: Path, error: type[Exception]) -> None:
    """Takes an advisory lock, which goes with the descriptor; there is none where there is no `fcntl`."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise error(f"{path}: another process is writing to it; choose another file") from None
