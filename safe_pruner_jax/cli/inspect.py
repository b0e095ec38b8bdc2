"""`openpi inspect FILE`: what an episode holds, and whether the same policy gives the same actions again."""

import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from safe_pruner_jax.serving.episodes import EpisodeError, read_episode
from safe_pruner_jax.serving.replay import load, replay


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


def run_inspect(args: Inspect) -> int:
    """Prints the episode and the verdicts."""
    episode = read_episode(args.file)
    header = episode.header
    print(f"{args.file}: {len(episode.steps)} steps of robot {header.get('robot')}")
    print(f"{header.get('config')} from {header.get('checkpoint') or 'the package'}, pruner {header.get('pruner')}")
    print(f"safe_pruner_jax {header.get('version')}, jax {header.get('jax')}, {header.get('device')}")
    if episode.torn:
        print(f"the last {episode.torn} bytes are an unfinished step, which is left out")
    if not args.show and not header.get("from_start"):
        raise EpisodeError(f"{args.file} does not begin at the start of its episode; replay the one that does")
    verdicts = (
        ["" for _ in episode.steps]
        if args.show
        else replay(episode, load(args.file, episode, args.dir, args.tokenizer))
    )
    for number, (step, verdict) in enumerate(zip(episode.steps, verdicts, strict=True)):
        pruning = step["reply"].get("pruning") or {}
        path = "" if "keyframe" not in pruning else "keyframe" if pruning["keyframe"] else "pruned"
        print(f"{number:5d}  {path:8}  kept {pruning.get('kept', '-'):>4}  robots {step['batch']}  {verdict}")
    differing = sum(verdict.startswith("differs") for verdict in verdicts)
    if differing:
        print(f"openpi inspect: {differing} of {len(verdicts)} steps differ", file=sys.stderr)
    return 1 if differing else 0
