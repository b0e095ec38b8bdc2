"""Makes the animated picture of README and of the site: the embedded policy at work, kept patches lit.

    python scripts/make_film.py libero:libero_object_shuffled/1/0     the policy plays a held-out scene (LIBERO)
    python scripts/make_film.py policy_records/NAME.episode           what `openpi serve --record` wrote
    python scripts/make_film.py                                       the recording inside the package

Milliseconds are those of a call on this machine, the fastest of `--repeats` runs over the episode after one that
compiles: what a call takes when nothing else runs.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tyro.conf import Positional

from safe_pruner_jax.analysis.episodes import EXAMPLE, episodes
from safe_pruner_jax.figures.film import Shot, film, save
from safe_pruner_jax.policy.embedded import EMBEDDED
from safe_pruner_jax.policy.loading import calibrated, load_policy
from safe_pruner_jax.policy.policy import Policy
from safe_pruner_jax.pruners import safe
from safe_pruner_jax.robots.configs import replan_of

OUT = Path(__file__).parents[1] / "docs" / "figures" / "policy.webp"
LARGEST = 3_000_000


def requests_of(source: str, policy: Policy, replan: int) -> list[dict[str, Any]]:
    """What the policy is asked along an episode; it plays a live one itself."""
    recording = next(episodes(source, replan=replan, infer=policy.session().infer))
    return [call.request for call in recording.calls()]


def shots(policy: Policy, requests: list[dict[str, Any]], repeats: int) -> list[Shot]:
    """The episode call by call, with the shortest time of each."""
    runs = []
    for _ in range(repeats + 1):
        session = policy.session()
        runs.append([session.infer(request) for request in requests])
    ms = np.min([[reply["policy_timing"]["infer_ms"] for reply in run] for run in runs[1:]], axis=0)
    result = []
    for request, reply, took in zip(requests, runs[-1], ms, strict=True):
        example, _ = policy.transform.prepare(request)
        raw = policy.transform.config.robot.input(request)["image"]
        images = {camera: np.asarray(raw[camera]) for camera, real in example.image_mask.items() if real}
        pruning = reply["pruning"]
        result.append(
            Shot(images, pruning["index"], pruning["alive"], pruning["kappa"], float(took), pruning["keyframe"])
        )
    return result


def main(
    source: Positional[str] = EXAMPLE,
    out: Path = OUT,
    keep: float = 0.2,
    replan: int = replan_of(EMBEDDED),
    repeats: int = 5,
) -> int:
    """Makes the film.

    Args:
      source: an episode, see above.
      out: WebP file.
      keep: share of the visual tokens.
      replan: robot actions between two calls.
      repeats: runs over the episode that are timed.
    """
    choices = calibrated()
    policy = load_policy(EMBEDDED, pruner=safe(keep=keep, **choices))
    requests = requests_of(source, policy, replan)
    frames = film(shots(policy, requests, repeats), policy.engine.config.tokens_per_camera, choices["threshold"])
    save(frames, out)
    size = out.stat().st_size
    print(f"{out}: {len(frames)} calls, {size / 1000:.0f} kB")
    return int(size > LARGEST)


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
