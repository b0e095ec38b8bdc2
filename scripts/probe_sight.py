"""Does a policy look, and does it listen? Its success when pictures or instruction are not those of the scene.

python scripts/probe_sight.py --trials 5 --out out/sight.jsonl
python scripts/probe_sight.py --checkpoint runs/sees/checkpoint

own          what the robot sees, and the task's instruction
black        black pictures
stranger     the pictures that another episode of the same task showed at the same call
instruction  another object in view is named; solved when that one is where the task's object belongs

A policy that plays from memory solves the second and the third as often as the first. Places are drawn anew for every
episode (`libero_object_shuffled`); an episode is the same for all probes. The same command again goes on.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from safe_pruner_jax.evaluation.report import wilson
from safe_pruner_jax.figures.theme import markdown
from safe_pruner_jax.libero.cameras import CAMERAS
from safe_pruner_jax.libero.env import LiberoEnv
from safe_pruner_jax.libero.labels import kind
from safe_pruner_jax.libero.scene import Scene
from safe_pruner_jax.libero.shuffled import open_env
from safe_pruner_jax.libero.suites import load_task
from safe_pruner_jax.policy.embedded import EMBEDDED, WEIGHTS, embedded_folder
from safe_pruner_jax.policy.identity import checkpoint_fingerprint, local_device
from safe_pruner_jax.policy.loading import load_policy
from safe_pruner_jax.policy.policy import Policy

PROBES = ("own", "black", "stranger", "instruction")

Pictures = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Args:
    """What is played.

    Args:
      suite: benchmark suite whose tasks put one thing somewhere.
      tasks: indices.
      trials: episodes per task and probe, at least 2: a stranger is another trial.
      replan: actions executed per call.
      config: of the policy.
      checkpoint: its folder; the embedded parameters if None.
      out: file of the outcomes.
    """

    suite: str = "libero_object_shuffled"
    tasks: tuple[int, ...] = tuple(range(10))
    trials: int = 5
    replan: int = 10
    config: str = EMBEDDED
    checkpoint: Path | None = None
    out: Path = Path("out/sight.jsonl")


def play(
    env: LiberoEnv,
    policy: Policy,
    trial: int,
    replan: int,
    *,
    target: str | None = None,
    pictures: Callable[[int, Pictures], Pictures] = lambda _, own: own,
) -> tuple[bool, int, list[Pictures]]:
    """One episode: whether it was solved, its control steps, and what the cameras showed at every call.

    Args:
      env: of the task.
      policy: acts, as a new session.
      trial: initial state.
      replan: actions executed per call.
      target: the object that is named and has to be fetched; the task's own if None.
      pictures: (call, what the cameras show) → what the policy is shown.
    """
    request, infer, scene = env.reset(trial), policy.session().infer, Scene(env)
    (predicate, own, where), *_ = scene.goals
    goal, words = (predicate, target or own, where), env.task.language
    if target:
        words = words.replace(kind(own).replace("_", " "), kind(target).replace("_", " "))
    shown: list[Pictures] = []
    for step in range(0, env.max_steps, replan):
        shown.append({name: request[name] for name in CAMERAS})
        reply = infer(request | pictures(len(shown) - 1, shown[-1]) | {"prompt": words})
        for action in np.asarray(reply["actions"])[:replan]:
            env.step(action)
            if scene.holds(goal):
                return True, step + replan, shown
            if not env.running:
                return False, env.max_steps, shown
        request = env.observe()
    return False, env.max_steps, shown


def another(env: LiberoEnv, trial: int) -> str:
    """An object in view that is not the task's own, another one every trial."""
    _, goal, receptacle = Scene(env).goals[0]
    names = [n for n in env.simulator.env.objects_dict if n != goal and not receptacle.startswith(n)]
    return names[trial % len(names)]


def probe(env: LiberoEnv, policy: Policy, args: Args, wanted: Callable[[str, int], bool]) -> Iterator[dict[str, Any]]:
    """The episodes of one task that are wanted."""

    @functools.cache
    def own(trial: int) -> tuple[bool, int, list[Pictures]]:
        return play(env, policy, trial, args.replan)

    def stranger(trial: int) -> Callable[[int, Pictures], Pictures]:
        shown = own((trial + 1) % args.trials)[2]
        return lambda call, _: shown[min(call, len(shown) - 1)]

    black = lambda _, pictures: {name: np.zeros_like(image) for name, image in pictures.items()}
    changes: dict[str, Callable[[int], dict[str, Any]]] = {
        "own": lambda _: {},
        "black": lambda _: {"pictures": black},
        "stranger": lambda trial: {"pictures": stranger(trial)},
        "instruction": lambda trial: {"target": another(env, trial)},
    }
    for name, change in changes.items():
        for trial in range(args.trials):
            if wanted(name, trial):
                changed = change(trial)
                solved, steps, _ = own(trial) if name == "own" else play(env, policy, trial, args.replan, **changed)
                row = {"probe": name, "suite": args.suite, "task": env.task.index, "trial": trial}
                yield row | {"target": changed.get("target"), "success": solved, "steps": steps}


def table(rows: list[dict[str, Any]]) -> str:
    """Success per probe, with Wilson's 95 % interval."""
    lines = []
    for name in PROBES:
        solved = [row["success"] for row in rows if row["probe"] == name]
        if solved:
            share = wilson(sum(solved), len(solved))
            shown = f"{share.value:.0%} [{share.low:.0%}, {share.high:.0%}]"
            lines.append([name, f"{sum(solved)} of {len(solved)}", shown])
    return markdown(["the policy is given", "solved", "share, 95 % interval"], lines)


def main(args: Args) -> int:
    """Plays what is missing, prints the table."""
    if args.trials < 2:
        print(f"trials: expected at least 2, since a stranger is another trial, got {args.trials}", file=sys.stderr)
        return 2
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    policy, note = load_policy(args.config, args.checkpoint), "" if args.checkpoint else WEIGHTS[args.config]
    checkpoint = checkpoint_fingerprint(args.checkpoint or embedded_folder(args.config), note)
    same = {"checkpoint": checkpoint, "replan": args.replan, "device": local_device()}
    rows = [row for row in rows if row["suite"] == args.suite and row["checkpoint"] == checkpoint]
    played = {(row["probe"], row["task"], row["trial"]) for row in rows}
    for task in args.tasks:
        with open_env(load_task(args.suite, task)) as env, args.out.open("a") as file:
            for row in probe(env, policy, args, lambda name, trial, task=task: (name, task, trial) not in played):
                rows.append(row | same)
                file.write(json.dumps(rows[-1]) + "\n")
                file.flush()
                print(task, row["probe"], row["trial"], "solved" if row["success"] else "not solved", flush=True)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
