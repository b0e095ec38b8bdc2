"""Collects labelled scenes and demonstrations for training a policy that sees.

python scripts/collect_scenes.py --out data/scenes --scenes 20 --demonstrations 60 --workers 2

Writes <out>/<suite>_<task>_<scenes|demo>_<seed>.npz. Start it again with the same or larger numbers and it goes on:
files that are there are complete. docs/training.md says what is in them.
"""

import dataclasses
import os
import shutil
import sys
import time
from pathlib import Path

import tyro

from safe_pruner_jax.libero.labels import kinds
from safe_pruner_jax.training.pool import finish

SPACE = 2**30
"""Bytes that must be free."""


@dataclasses.dataclass(frozen=True)
class Args:
    """What to collect.

    Args:
      out: folder.
      suite: libero_object or libero_spatial.
      tasks: indices; all ten if none are given.
      scenes: files of 60 teleported scenes per task.
      demonstrations: episodes per task.
      first: first seed; runs with other seeds have other scenes.
      size: pixels per side of images and labels, a multiple of 14.
      workers: processes, one core each.
    """

    out: Path
    suite: str = "libero_object"
    tasks: tuple[int, ...] = tuple(range(10))
    scenes: int = 20
    demonstrations: int = 60
    first: int = 1000
    size: int = 112
    workers: int = 2


@dataclasses.dataclass(frozen=True)
class Job:
    """One file: `what` is "scenes" or "demo"."""

    path: Path
    suite: str
    task: int
    what: str
    seed: int
    size: int


def make(job: Job) -> tuple[str, int]:
    """One file; returns its name and its number of frames (0: the expert failed)."""
    from safe_pruner_jax.libero.scenes import current_maker, write

    source = current_maker(job.suite, job.task, job.size)
    frames = source.scenes(job.seed) if job.what == "scenes" else source.demonstration(job.seed)
    if frames is None:
        job.path.with_suffix(".failed").touch()
        return job.path.name, 0
    write(job.path, frames, source.about | {"what": job.what, "seed": job.seed})
    return job.path.name, len(frames["site"])


def missing(args: Args) -> list[Job]:
    """What is to be made, in rounds over tasks, so that a run that is stopped has some of everything.

    Raises:
      OSError: there is something, and no space for it.
    """
    rows = []
    for what, count in (("scenes", args.scenes), ("demo", args.demonstrations)):
        for task in args.tasks:
            for k in range(count):
                path = args.out / f"{args.suite}_{task}_{what}_{args.first + k}.npz"
                if not path.exists() and not path.with_suffix(".failed").exists():
                    round_ = k * 4 // count if count >= 4 else k
                    rows.append(((round_, task, what, k), Job(path, args.suite, task, what, args.first + k, args.size)))
    if rows and shutil.disk_usage(args.out).free < SPACE:
        raise OSError(f"less than {SPACE >> 20} MiB are free in {args.out}")
    return [job for _, job in sorted(rows, key=lambda row: row[0])]


def main(args: Args) -> int:
    """Collects until all is there, or says in one line why not."""
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("LP_NUM_THREADS", "0")  # software OpenGL in the calling thread: no waiting for another
    start, frames, failed = time.perf_counter(), 0, 0
    try:
        kinds(args.suite)  # before anything is drawn
        for number, total, (name, count) in finish(lambda: missing(args), make, args.workers):
            frames, failed = frames + count, failed + (count == 0)
            seconds = time.perf_counter() - start
            text = f"{name}: {count} frames, {frames} in all, {failed} failed episodes"
            print(f"[{seconds:6.0f} s] {number}/{total} {text}", flush=True)
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"gave up: {error}; free some space and start it again", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
