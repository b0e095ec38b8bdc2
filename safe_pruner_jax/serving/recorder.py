"""Writing served steps to disk: what a recorder is given, and openpi's own files."""

import itertools
import os
import pathlib
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Step:
    """One answered request.

    Args:
      robot: whose it was.
      request: as it came.
      reply: as it went, without `server_timing`.
      fresh: the robot had no memory before it.
      batch: robots in the device step.
      images: camera → uint8 [S, S, 3] as the network read it; {} where the backend does not tell.
      saliency: see `policy.reply.Result`.
    """

    robot: Hashable
    request: dict
    reply: dict
    fresh: bool
    batch: int
    images: Mapping[str, np.ndarray] = field(default_factory=dict)
    saliency: Mapping[str, Any] = field(default_factory=dict)


class Recorder:
    """Writes every step to `<directory>/step_<i>.npy`, the files of openpi's `--record`.

    A file holds one dict with flat keys, `inputs/<request key>` and `outputs/<reply key>`, read back by
    `np.load(path, allow_pickle=True).item()`. Steps of all connections share one numbering; it goes on after
    the files already there, where openpi overwrites them. A file appears under its name only when complete.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = pathlib.Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        names = (re.fullmatch(r"step_([0-9]+)\.npy", file.name) for file in self.directory.iterdir())
        self._numbers = itertools.count(max((int(name[1]) for name in names if name), default=-1) + 1)

    def __call__(self, step: Step) -> None:
        """Records one step; safe to call from several threads."""
        path = self.directory / f"step_{next(self._numbers)}.npy"
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.save(file, np.asarray(_flatten({"inputs": step.request, "outputs": step.reply})), allow_pickle=True)
        partial.replace(path)


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}/") if isinstance(value, dict) else {name: value}
    return flat
