"""`openpi diagnose FILE`: which camera and region the late layers attend to, over a recorded episode."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from safe_pruner_jax import pruners
from safe_pruner_jax.analysis import diagnose
from safe_pruner_jax.analysis.episodes import EXAMPLE, episodes
from safe_pruner_jax.cli.recordings import replan_of, robot_of
from safe_pruner_jax.policy.policy import Policy
from safe_pruner_jax.policy.spec import Model
from safe_pruner_jax.pruners.checks import require
from safe_pruner_jax.serving.episodes import SUFFIX, read_episode
from safe_pruner_jax.serving.replay import load


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagnose(Model):
    """Tell which share of attention goes to which camera and region over time, and whether a camera is ignored.

    Args:
      source: an episode of `openpi serve --record`, looked at with the policy that it names; or, for the policy of the
        other arguments, demonstrations (HDF5 or packed), a LeRobot dataset, libero:SUITE/TASK/TRIAL played by the
        scripted expert, "example".
      out: folder; diagnose.md and diagnose.png appear in it.
      layers: whose attention is averaged; negative counts from the end.
      of: rows that attend: the expert's action tokens, or the prompt.
      limit: calls, at most.
      replan: robot actions between two policy calls of an episode; by default the policy's own.
      dir: checkpoint folder of a recorded episode, if it has moved.
    """

    source: Positional[str] = EXAMPLE
    out: Path = Path("out/diagnose")
    layers: tuple[int, ...] = diagnose.LAYERS
    of: Literal["action", "text"] = "action"
    limit: int | None = None
    replan: int | None = None
    dir: str | None = None


def run_diagnose(args: Diagnose) -> None:
    """Prints the table, writes it and the figure."""
    require(args.limit is None or args.limit >= 1, "limit", "at least 1 call", args.limit)
    policy, requests = _load(args)
    calls = list(itertools.islice(requests, args.limit))
    rows = diagnose.measure(policy, calls, layers=args.layers, of=args.of)
    args.out.mkdir(parents=True, exist_ok=True)
    text = diagnose.table(rows)
    (args.out / "diagnose.md").write_text(text, encoding="utf-8")
    diagnose.figure(rows).savefig(args.out / "diagnose.png")
    print(f"{text}\n{args.out / 'diagnose.png'} shows it over time")


def _load(args: Diagnose) -> tuple[Policy, Iterator[dict[str, Any]]]:
    if args.source.endswith(SUFFIX):
        episode = read_episode(args.source)
        return load(Path(args.source), episode, args.dir, args.tokenizer), (s["request"] for s in episode.steps)
    recording = next(episodes(args.source, replan=replan_of(args), robot=robot_of(args)))
    return args.load("LIBERO", pruners.make("full")), (call.request for call in recording.calls())
