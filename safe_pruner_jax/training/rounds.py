"""The `correct` stage: play, relabel, add, train, round after round.

    out/correct/round_0/checkpoint       the policy that played, in openpi's layout
    out/correct/data/*.npz               one file per episode, all rounds
    out/correct/rounds.jsonl             success per round, with counts

Episodes are played by processes with a simulator and a policy each. A file is complete when it is there, so a run that
is stopped goes on with the episode it was at; a worker that dies costs its episode, which is played again.
"""

import functools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safe_pruner_jax.libero.scenes import current_maker, read, write
from safe_pruner_jax.model.checkpoint import save_params
from safe_pruner_jax.model.params import Params
from safe_pruner_jax.policy.loading import load_policy
from safe_pruner_jax.robots.configs import PolicyConfig
from safe_pruner_jax.robots.transforms import NormStats, save_norm_stats
from safe_pruner_jax.training.correct import Infer, play
from safe_pruner_jax.training.perception import HEADS
from safe_pruner_jax.training.pool import finish

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rounds:
    """How to correct.

    Args:
      suite: benchmark suite.
      tasks: whose scenes are played.
      rounds: of playing and training.
      episodes: per task and round.
      mix: share of calls at which the expert's chunk is executed; halved every round.
      insist: an instruction that was never followed in the round before is given 1 + `insist` times as often as one
        that always was.
      usual: share of episodes in scenes whose objects stand near LIBERO's own places; the task's object is the target.
      coarse: play with the quick pictures of `collect_scenes` instead of those that an evaluation shows; that takes
        two thirds of the time, and what fails only on an evaluation's pictures is not met.
      first: seed of the first episode.
      workers: processes, one core each.
    """

    suite: str = "libero_object"
    tasks: tuple[int, ...] = tuple(range(10))
    rounds: int = 3
    episodes: int = 10
    mix: float = 0.4
    insist: float = 5.0
    usual: float = 0.3
    coarse: bool = False
    first: int = 500_000
    workers: int = 2


@dataclass(frozen=True)
class Attempt:
    """One episode to be played: its file, whose scene and pictures, and `how`: options of `correct.play`."""

    path: Path
    suite: str
    task: int
    seed: int
    size: int
    coarse: bool
    how: dict[str, Any]


def export(out: Path, params: Params, config: PolicyConfig, stats: dict[str, NormStats], tokenizer: Path) -> Path:
    """Writes a checkpoint in openpi's layout, without heads; returns its folder."""
    save_params(out, {name: leaf for name, leaf in params.items() if name != HEADS}, overwrite=True)
    save_norm_stats(out, config.asset_id, stats)
    shutil.copy(tokenizer, out / "tokenizer.model")
    return out


def play_round(r: Rounds, number: int, config: str, checkpoint: Path, out: Path, size: int) -> dict[str, Any]:
    """Plays what is missing of one round.

    Args:
      r: settings.
      number: of the round, from 0.
      config, checkpoint: of the policy that plays.
      out: folder of the episodes' files.
      size: pixels per side of images and labels.

    Returns:
      {"round", "episodes", "successes", "frames", "steps"}, of all the round's episodes.

    Raises:
      RuntimeError: workers died several times.
    """
    out.mkdir(parents=True, exist_ok=True)
    seeds = range(r.first + number * r.episodes, r.first + (number + 1) * r.episodes)
    how = {"mix": r.mix * 0.5**number, "usual": r.usual, "often": targets(r, number, out)}
    attempts = [
        Attempt(
            path=_path(out, r, task, seed),
            suite=r.suite,
            task=task,
            seed=seed,
            size=size,
            coarse=r.coarse,
            how=how,
        )
        for task in r.tasks
        for seed in seeds
    ]
    missing = lambda: [attempt for attempt in attempts if not attempt.path.exists()]
    work = functools.partial(_episode, config=config, checkpoint=str(checkpoint))
    for count, total, line in finish(missing, work, r.workers):
        logger.info("round %d, %d of %d: %s", number, count, total, line)
    return summary(number, [attempt.path for attempt in attempts])


def targets(r: Rounds, number: int, out: Path) -> dict[str, float]:
    """How often each instruction is given in a round: more often where the round before failed.

    Returns:
      {instruction: 1 + insist · share of failures}; those that were not given are missing; empty for the first round.
    """
    if number == 0:
        return {}
    outcomes: dict[str, list[bool]] = {}
    for task in r.tasks:
        for seed in range(r.first + (number - 1) * r.episodes, r.first + number * r.episodes):
            frames, about = read(_path(out, r, task, seed))
            outcomes.setdefault(about["instructions"][int(frames["target"][0])], []).append(about["success"])
    return {words: 1 + r.insist * (1 - sum(solved) / len(solved)) for words, solved in outcomes.items()}


def _path(out: Path, r: Rounds, task: int, seed: int) -> Path:
    return out / f"{r.suite}_{task}_correct_{seed}.npz"


def summary(number: int, paths: Any) -> dict[str, Any]:
    """Counts over the files of a round."""
    about = [read(path)[1] for path in paths]
    return {
        "round": number,
        "episodes": len(about),
        "successes": sum(row["success"] for row in about),
        "frames": sum(row["frames"] for row in about),
        "steps": sum(row["steps"] for row in about),
    }


def correct(
    r: Rounds,
    params: Params,
    config: PolicyConfig,
    *,
    stats: dict[str, NormStats],
    tokenizer: Path,
    out: Path,
    train: Callable[[Params, int], Params],
) -> Iterator[tuple[dict[str, Any], Params]]:
    """Plays and trains, yielding what came of every round and the weights after it.

    Args:
      r: settings.
      params: weights that act, heads included.
      config, stats, tokenizer: of the policy.
      out: folder of the stage.
      train: (weights, round) → weights trained on the data that there is then.
    """
    for number in range(r.rounds):
        folder = export(out / f"round_{number}" / "checkpoint", params, config, stats, tokenizer)
        row = play_round(r, number, config.name, folder, out / "data", config.model.image_size)
        with (out / "rounds.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        params = train(params, number)
        yield row, params


@functools.lru_cache(1)
def _policy(config: str, checkpoint: str) -> Infer:
    return load_policy(config, checkpoint, prompt_lengths=(32,)).session().infer


def _episode(attempt: Attempt, config: str, checkpoint: str) -> str:
    """One episode in a worker; returns a line about it."""
    os.environ.setdefault("LP_NUM_THREADS", "0")  # software OpenGL in the calling thread
    task, seed = attempt.task, attempt.seed
    maker = current_maker(attempt.suite, task, attempt.size, coarse=attempt.coarse)
    played = play(maker, _policy(config, checkpoint), seed, **attempt.how)
    about = maker.about | {"what": "correct", "seed": seed}
    about |= {"success": bool(played.success), "steps": played.steps, "frames": len(played.frames["site"])}
    write(attempt.path, played.frames, about)
    outcome = "solved" if played.success else f"closest {100 * played.closest:.1f} cm"
    return f"task {task} seed {seed}: {outcome} in {played.steps} steps"
