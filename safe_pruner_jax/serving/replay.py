"""`openpi inspect FILE`: what an episode holds, and whether the same policy gives the same actions again."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tyro.conf import Positional

import safe_pruner_jax
from safe_pruner_jax import pruners
from safe_pruner_jax.loading import load_policy
from safe_pruner_jax.policy import Policy
from safe_pruner_jax.serving.episodes import EpisodeError, Recorded, read_episode

ROUNDING = 1e-4
"""Largest difference, relative to the range of the actions, between a step in a batch and the same step alone."""


@dataclass(frozen=True)
class Inspect:
    """Replay a recorded episode step by step; exit code 0 if the actions are the same, 1 if not.

    Args:
      file: from `openpi serve --record`.
      dir: checkpoint folder, if it has moved.
      tokenizer: SentencePiece model file, if it has moved.
      show: print what was recorded, without computing it again.
    """

    file: Positional[Path]
    dir: str | None = None
    tokenizer: str | None = None
    show: bool = False


def header(
    config: str,
    checkpoint: str | None,
    pruner: str,
    choices: dict[str, Any],
    *,
    options: dict[str, Any],
) -> dict[str, Any]:
    """What `run_inspect` needs to load the same policy.

    Args:
      config, checkpoint: of `load_policy`.
      pruner, choices: the factory's name and arguments.
      options: further arguments of `load_policy`.
    """
    return {
        "version": safe_pruner_jax.__version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "config": config,
        "checkpoint": checkpoint if checkpoint is None or "://" in checkpoint else str(Path(checkpoint).absolute()),
        "pruner": pruner,
        "choices": choices,
        "options": options,
    }


def load(episode: Recorded, args: Inspect) -> Policy:
    """The policy an episode was recorded with."""
    told = episode.header
    try:
        options = {"temperature": 1.0} | told["options"]  # all there was before it could be chosen
        options |= {key: tuple(told["options"][key]) for key in ("prompt_lengths", "kernels")}
        choices = {k: tuple(v) if isinstance(v, list) else v for k, v in told["choices"].items()}
        pruner = pruners.make(told["pruner"], **choices)
        name, checkpoint = told["config"], told["checkpoint"]
    except (KeyError, TypeError, AttributeError) as error:
        raise EpisodeError(
            f"{args.file}: recorded by version {told.get('version')}, this is {safe_pruner_jax.__version__} "
            f"({error!r}); install that version to replay it"
        ) from error
    if args.tokenizer is not None:
        options["tokenizer"] = args.tokenizer
    return load_policy(name, args.dir or checkpoint, pruner=pruner, **options)


def replay(episode: Recorded, policy: Policy) -> list[str]:
    """The verdict on each step: "same", "same up to rounding", or what differs."""
    session, verdicts, alone = policy.session(), [], True
    for step in episode.steps:
        alone &= step["batch"] == 1
        recorded = np.asarray(step["reply"]["actions"])
        computed = np.asarray(session.infer(step["request"])["actions"])
        if recorded.dtype == computed.dtype and recorded.tobytes() == computed.tobytes():
            verdicts.append("same")
            continue
        if recorded.shape != computed.shape:
            verdicts.append(f"differs: shape {recorded.shape}, computed {computed.shape}")
            continue
        difference = float(np.abs(recorded - computed).max())
        if not alone and difference <= ROUNDING * max(float(np.ptp(recorded)), 1.0):
            verdicts.append(f"same up to rounding ({difference:.1e}: it shared its device step)")
        else:
            verdicts.append(f"differs by up to {difference:.3e}")
    return verdicts


def run_inspect(args: Inspect) -> int:
    """Prints the episode and the verdicts."""
    episode = read_episode(args.file)
    told = episode.header
    print(f"{args.file}: {len(episode.steps)} steps of robot {told.get('robot')}")
    print(f"{told.get('config')} from {told.get('checkpoint') or 'the package'}, pruner {told.get('pruner')}")
    print(f"safe_pruner_jax {told.get('version')}, jax {told.get('jax')}, {told.get('device')}")
    if episode.torn:
        print(f"the last {episode.torn} bytes are an unfinished step, which is left out")
    if not args.show and not told.get("from_start"):
        raise EpisodeError(f"{args.file} does not begin at the start of its episode; replay the one that does")
    verdicts = ["" for _ in episode.steps] if args.show else replay(episode, load(episode, args))
    for number, (step, verdict) in enumerate(zip(episode.steps, verdicts, strict=True)):
        pruning = step["reply"].get("pruning") or {}
        path = {True: "keyframe", False: "pruned"}.get(pruning.get("keyframe"), "")
        print(f"{number:5d}  {path:8}  kept {pruning.get('kept', '-'):>4}  robots {step['batch']}  {verdict}")
    differing = sum(verdict.startswith("differs") for verdict in verdicts)
    if differing:
        print(f"openpi inspect: {differing} of {len(verdicts)} steps differ", file=sys.stderr)
    return 1 if differing else 0
