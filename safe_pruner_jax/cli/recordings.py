"""What analyses are about, the recordings of `--data`, and what they leave behind."""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure

from safe_pruner_jax.analysis.episodes import EXAMPLE, Recording, episodes
from safe_pruner_jax.analysis.trace import Trace, Watch
from safe_pruner_jax.policy.policy import Policy
from safe_pruner_jax.policy.spec import Model
from safe_pruner_jax.pruners.checks import require
from safe_pruner_jax.robots import configs
from safe_pruner_jax.robots.robots import LIBERO

logger = logging.getLogger(__name__)

Load = Callable[[], Policy]
"""Loads the policy; called only if something is left to compute."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analysis:
    """What every analysis writes, and where.

    Args:
      out: folder; NAME.jsonl, NAME.md and NAME.png appear in it, and an interrupted run goes on.
    """

    out: Path = Path("out/analysis")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnRequests(Analysis):
    """An analysis of what a policy is asked.

    Args:
      data: files of demonstrations (HDF5 or packed), folders of LeRobot datasets of the policy's robot,
        libero:SUITE/TASK/TRIAL played live, or "example", the recording inside the package.
      driver: of live episodes: the scripted expert, or the policy without pruning.
      limit: episodes, at most.
      replan: robot actions between two policy calls; by default the policy's own, 10 for the embedded one, else 5.
    """

    data: tuple[str, ...] = (EXAMPLE,)
    driver: Literal["expert", "policy"] = "expert"
    limit: int | None = None
    replan: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnEpisodes(OnRequests):
    """An analysis of what a policy attends to.

    Args:
      cut: layer index before which tokens are dropped.
      late_layers: layers of the late saliency.
      late_steps: denoise steps averaged for it.
      soft: temperature of the correspondence; 0 takes the most similar token.
    """

    cut: int = 3
    late_layers: tuple[int, ...] = (0, -2, -1)
    late_steps: Literal["half", "all", "last"] = "half"
    soft: float = 0.0

    def forecast(self) -> dict[str, Any]:
        """The choices of `safe` that every measurement takes."""
        return {"cut": self.cut, "late_layers": self.late_layers, "late_steps": self.late_steps, "soft": self.soft}


def recordings(args: OnRequests, policy: Load) -> Iterator[Recording]:
    """The episodes of `args`, `args.limit` at most; ValueError if one comes twice, or none at all."""
    require(args.limit is None or args.limit >= 1, "limit", "at least 1 episode", args.limit)
    infer = _driver(policy) if args.driver == "policy" else None
    options = {"replan": replan_of(args), "infer": infer, "robot": robot_of(args)}
    sources = (episodes(source, **options) for source in args.data)
    seen = set()
    for recording in itertools.islice(itertools.chain.from_iterable(sources), args.limit):
        if recording.name in seen:
            raise ValueError(f"data: expected every episode once, got {recording.name} twice; rename one file")
        seen.add(recording.name)
        yield recording
    if not seen:
        raise ValueError("data: expected at least one episode, got none; give files or libero:SUITE/TASK/TRIAL")


def robot_of(args: Any) -> str:
    """Name of the robot that the arguments' policy drives."""
    return configs.get_config(args.named(LIBERO.name)[0]).robot.name if isinstance(args, Model) else LIBERO.name


def replan_of(args: Any) -> int:
    """Robot actions between two calls: `args.replan`, or else as many as the arguments' policy is asked for."""
    if args.replan is not None:
        return args.replan
    return configs.replan_of(args.named(LIBERO.name)[0] if isinstance(args, Model) else "")


def only_libero(args: Any, name: str) -> None:
    """Raises ValueError for a policy of another robot; `name` is of an analysis that compares actions by their σ."""
    if (robot := robot_of(args)) != LIBERO.name:
        raise ValueError(
            f"{name}: expected a policy of LIBERO's robot, got one of {robot}; recall, forecast, kappa, overlap and "
            "attention take any"
        )


class Watched:
    """The episodes of the arguments, for analyses that go over them twice; the policy is loaded for the first."""

    def __init__(self, args: OnRequests, load: Load):
        self._load = load
        self._watch: Watch | None = None
        self._recordings = {r.name: r for r in recordings(args, self.policy)}

    def names(self) -> list[str]:
        """Of all episodes."""
        return list(self._recordings)

    def policy(self) -> Policy:
        """Whose model is watched."""
        return self._watching().policy

    def _watching(self) -> Watch:
        self._watch = self._watch or Watch(self._load())
        return self._watch

    def trace(self, name: str) -> Trace:
        """Of one episode, computed anew."""
        return self._watching()(self._recordings[name].calls())


def _driver(policy: Load) -> Callable[[dict], dict]:
    """One robot, whose policy is loaded when it is asked for the first time."""
    session = functools.cache(lambda: policy().session())
    return lambda request: session().infer(request)


def leave(out: Path, name: str, table: str, figure: Figure | None = None) -> None:
    """Writes and prints the table, draws the figure if there is one."""
    (out / f"{name}.md").write_text(table, encoding="utf-8")
    if figure is not None:
        figure.savefig(out / f"{name}.png")
    print(table, end="")
    what = (
        f"this table in {out / name}.md" if figure is None else f"this table and its figure in {out / name}.md and .png"
    )
    print(f"\nrows are in {out}, {what}")
