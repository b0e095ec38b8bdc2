"""Episodes on disk, so that what a robot did can be computed again: append-only, readable after any crash.

    "OPENPI-EPISODE 1\n"
    record 0    header: what served it
    record 1…   steps: {"request", "reply", "batch"}, in order

A record is its length and its CRC-32, each 4 bytes little-endian, and a message as on the wire (docs/wire.md). Each
is written at once when its reply has been sent; a process killed in mid-write leaves a tail that readers drop.
"""

import binascii
import datetime
import itertools
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safe_pruner_jax.serving.recorder import Step
from safe_pruner_jax.serving.wire import Limits, WireError, pack, unpack

MAGIC = b"OPENPI-EPISODE 1\n"
SUFFIX = ".episode"
HEAD = struct.Struct("<II")
OPEN = 1024
"""Robots whose file is remembered; one that comes back later starts a new file."""

_LIMITS = Limits(message_bytes=2**30, depth=17, items=2**20)  # a request within its limits, a level deeper


class EpisodeError(ValueError):
    """A file that is no episode, or one of another version."""


class EpisodeRecorder:
    """Writes each episode of each robot to a file of its own; safe to call from several threads.

    Args:
      directory: made if absent.
      header: what is served; packable (see `wire.pack`).
    """

    def __init__(self, directory: str | os.PathLike, header: Mapping[str, Any]):
        self.directory, self._header = Path(directory), dict(header)
        self.directory.mkdir(parents=True, exist_ok=True)
        started = datetime.datetime.now(datetime.UTC)
        self._prefix = f"{started:%Y%m%dT%H%M%S}_{os.getpid()}"
        self._numbers, self._lock = itertools.count(1), threading.Lock()
        self._files: OrderedDict[Hashable, Path] = OrderedDict()

    def __call__(self, step: Step) -> None:
        """Records one step."""
        record = _record({"request": step.request, "reply": step.reply, "batch": step.batch})
        with self._lock:
            path = self._files.pop(step.robot, None)
            if path is None or step.fresh:
                path = self.directory / f"{self._prefix}_{next(self._numbers):05d}{SUFFIX}"
                name = "/".join(map(str, step.robot[1:])) if isinstance(step.robot, tuple) else str(step.robot)
                record = MAGIC + _record(self._header | {"robot": name, "from_start": step.fresh}) + record
            self._files[step.robot] = path
            if len(self._files) > OPEN:
                self._files.popitem(last=False)
            with path.open("ab", buffering=0) as file:
                if file.write(record) != len(record):
                    raise OSError(f"the disk of {path} is full")


@dataclass(frozen=True, eq=False)
class Recorded:
    """An episode read back: its header, its steps, and the bytes of a tail that was not complete."""

    header: dict[str, Any]
    steps: tuple[dict[str, Any], ...]
    torn: int


def read_episode(path: str | os.PathLike) -> Recorded:
    """An episode, up to its last complete step.

    Raises:
      EpisodeError: another file, another version, or a damaged header.
      OSError: no such file.
    """
    data = Path(path).read_bytes()
    if not data.startswith(MAGIC):
        what = "an episode of another version" if data.startswith(MAGIC[:14]) else "another file"
        raise EpisodeError(f"{path}: expected an episode as `openpi serve --record` writes it, got {what}")
    records, at = [], len(MAGIC)
    while at + HEAD.size <= len(data):
        length, checksum = HEAD.unpack_from(data, at)
        payload = data[at + HEAD.size : at + HEAD.size + length]
        if len(payload) < length or binascii.crc32(payload) != checksum:
            break
        try:
            records.append(unpack(payload, _LIMITS))
        except WireError as error:
            raise EpisodeError(f"{path}: record {len(records)} cannot be read: {error}") from error
        at += HEAD.size + length
    if not records:
        raise EpisodeError(f"{path}: expected a header, got {len(data) - at} damaged bytes; nothing was recorded")
    return Recorded(records[0], tuple(records[1:]), len(data) - at)


def _record(message: dict) -> bytes:
    payload = pack(message)
    return HEAD.pack(len(payload), binascii.crc32(payload)) + payload
