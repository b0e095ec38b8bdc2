"""`openpi analyze controls`: does the forecast work, or is its target wrong, or its matching?

openpi analyze controls --data libero:libero_object/0/1 libero:libero_object/1/1 --out out/analysis policy:embedded
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from safe_pruner_jax.analysis import controls
from safe_pruner_jax.analysis.rows import Row, Rows
from safe_pruner_jax.cli.recordings import Load, OnRequests, Watched, leave, logger, only_libero, replan_of

PRIOR = "prior.npy"
"""The mean late saliency of all episodes, as `baseline/prior` takes it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Controls(OnRequests):
    """The forecast against an oracle, the same slots and a prior; needs two episodes or more.

    Args:
      cuts: layer indices before which tokens are dropped, of 1 to 3.
      keep: share of the visual tokens kept.
      fuse: λ of every score with a late saliency.
      queries: rows of the shallow saliency.
      late_steps: denoise steps averaged for the late saliency of the expert.
      every: calls between keyframes within a subtask; every subtask starts with one.
    """

    cuts: tuple[int, ...] = (1, 2, 3)
    keep: float = 0.2
    fuse: float = 0.5
    queries: Literal["action", "text", "last", "all"] = "text"
    late_steps: Literal["half", "all", "last"] = "half"
    every: int = 10


def run_controls(args: Controls, load: Load, conditions: Mapping[str, Any]) -> None:
    """Watches every episode for its mean maps, then again against the mean of the others."""
    only_libero(args, "controls")
    if not args.cuts or not set(args.cuts) <= {1, 2, 3}:
        raise ValueError(f"cuts: expected some of 1, 2 and 3, got {args.cuts}")
    settings = {**conditions, "replan": replan_of(args), "driver": args.driver, "cuts": args.cuts}
    watched = Watched(args, load)
    with Rows(args.out / "maps.jsonl", {**settings, "late_steps": args.late_steps}) as file:
        for name in watched.names():
            if name not in file.finished:
                file.add(name, controls.maps(watched.trace(name), args.cuts, args.late_steps))
        maps = [row for row in file.rows() if row["part"] in watched.names()]
    others = {name: controls.priors(maps, name) for name in watched.names()}
    choices = {key: getattr(args, key) for key in ("keep", "fuse", "queries", "late_steps", "every")}
    with Rows(args.out / "controls.jsonl", {**settings, **choices, "episodes": watched.names()}) as file:
        for name in watched.names():
            if name not in file.finished:
                logger.info("%s: controls", name)
                act, trace = controls.Acting(watched.policy(), args.keep), watched.trace(name)
                rows = controls.measure(trace, others[name], act, cuts=args.cuts, executed=replan_of(args), **choices)
                file.add(name, rows)
        rows = file.rows()
    _leave(args, rows, maps)


def _leave(args: Controls, rows: list[Row], maps: list[Row]) -> None:
    if not any(row["errors"] for row in rows):
        raise ValueError("data: expected episodes with calls between keyframes, got none; give longer ones")
    cell = controls.Cell(max(args.cuts), "visual", "paper")
    np.save(args.out / PRIOR, controls.priors(maps)[cell].astype(np.float32))
    leave(args.out, "controls", controls.table(rows), controls.figure(rows))


COMMANDS: dict[str, tuple[type, Callable[..., None]]] = {"controls": (Controls, run_controls)}
"""Name of the analysis → its arguments and what runs them, as in `analyze`."""
