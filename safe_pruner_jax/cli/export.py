"""`openpi export`: demonstrations, recordings and played episodes as a LeRobot dataset.

openpi export --data demos/*.hdf5 --out my_dataset
openpi export --data policy_records/*.episode --out what_it_saw
openpi export --data example --watch --attention -1 --out watched --pruner=safe policy:embedded
"""

import dataclasses
import functools
import logging
from pathlib import Path

from safe_pruner_jax.cli.films import LIVE, Infer, films
from safe_pruner_jax.lerobot.write import Writer
from safe_pruner_jax.policy.spec import Method, Model
from safe_pruner_jax.robots.configs import get_config
from safe_pruner_jax.serving.episodes import SUFFIX

logger = logging.getLogger(__name__)

RATE = 20
"""Control steps per second of LIBERO's robot."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(Model):
    """Write a LeRobot dataset (v3), for lerobot, rerun and `openpi train --data`.

    Args:
      data: demonstrations (HDF5, packed, or "example"); recordings of `openpi serve --record`, files or their folder;
        or libero:SUITE/TASK/TRIAL, played by the policy.
      out: folder of the dataset, new or empty.
      watch: show demonstrations to the policy, and write what it keeps; every row then has the masks of its call.
      attention: layers of the action tokens' attention that are written as grids; needs --watch or a live episode.
      replan: robot actions between two calls.
      fps: rows per second; None takes 20 for demonstrations, 20 / replan where a row is a call.
    """

    data: tuple[str, ...]
    out: Path
    watch: bool = False
    attention: tuple[int, ...] = ()
    replan: int = 5
    fps: int | None = None


def run_export(args: Export, method: Method) -> None:
    """Writes the dataset.

    Raises:
      ValueError, OSError: with what to do.
    """
    calls = [source for source in args.data if _is_of_calls(source)]
    if calls and len(calls) != len(args.data):
        raise ValueError(
            f"data: expected demonstrations or calls, got both ({calls[0]} is of calls); export them apart"
        )
    fps = args.fps or (max(1, round(RATE / args.replan)) if calls else RATE)
    config = get_config(args.named("LIBERO")[0])
    watched = args.watch or any(source.startswith(LIVE) for source in args.data)
    if args.attention and not watched:
        raise ValueError(
            "attention: expected --watch or a live episode beside it, got neither; recordings have their own"
        )
    policy = functools.cache(lambda: args.load("LIBERO", args.fit("LIBERO", method, args.replan).make()))

    def robot() -> Infer:
        session = policy().session()
        wanted = {"attention": {"layers": list(args.attention), "of": "action"}} if args.attention else {}
        return lambda request: session.infer(request | wanted)

    with Writer(args.out, fps, config.robot.name) as writer:
        for source in args.data:
            for film in films(source, config, args.replan, robot if watched else None):
                writer.add(film.task, film.images, film.columns)
                logger.info("%s: episode %d, %d rows", source, len(writer) - 1, len(film.columns["action"]))
    print(f"{len(writer)} episodes in {args.out}: `lerobot-dataset-viz`, rerun and `openpi train --data` read it")


def _is_of_calls(source: str) -> bool:
    return source.startswith(LIVE) or Path(source).is_dir() or source.endswith(SUFFIX)
