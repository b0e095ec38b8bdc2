"""States that a policy visits itself, with what the expert would have done there (DAgger, Ross et al. 2011).

    played = play(maker, policy, seed, mix=0.3)      one episode: frames with labels, and how it went

At every call of the policy the simulator is saved, the feedback law is run ten steps without rendering, its actions
are kept as label, and the simulator is put back (`law.label`). With probability `mix` the label is executed instead of
the policy's chunk, so that late phases are visited by a policy that does not get there by itself yet.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from safe_pruner_jax.libero.law import CHUNK, FeedbackExpert, label
from safe_pruner_jax.libero.scenes import Frames, SceneMaker, stack

Infer = Callable[[dict[str, Any]], dict[str, Any]]
"""Request → reply with "actions" [≥ 10, 7], as `Session.infer`."""


class Played(NamedTuple):
    """One episode.

    Args:
      frames: one per call, all with labels; None where labels were not wanted.
      success: whether the object got where it should.
      steps: control steps.
      closest: least distance of the hand to the object, metres.
    """

    frames: Frames | None
    success: bool
    steps: int
    closest: float


def play(
    maker: SceneMaker,
    policy: Infer,
    seed: int,
    *,
    fixed: bool = False,
    labels: bool = True,
    mix: float = 0.0,
    limit: int = 280,
    usual: float = 0.0,
    often: Mapping[str, float] | None = None,
) -> Played:
    """Plays one episode of a shuffled scene, or of a fixed initial state with the task's own object.

    Args:
      maker: draws scenes and frames.
      policy: is told of the new episode by "reset".
      seed: of scene, target and mixture; the number of the initial state if `fixed`.
      fixed: play LIBERO's own initial state; such frames must not be trained on.
      labels: whether frames and labels are wanted.
      mix: share of calls at which the expert's chunk is executed.
      limit: control steps.
      usual: probability of a scene whose objects stand near their usual places, with the task's own object as target.
      often: how often each instruction is given, relative to 1, so that a policy meets more of what it fails on; None:
        all equally.
    """
    env, rng = maker.env, np.random.default_rng([seed, maker.env.task.index, 3])
    if fixed:
        env.reset(seed)
        words = env.task.language
    else:
        words = _shuffled(maker, seed, rng, usual, often or {})
    name = maker.placements.named[words]
    goal = maker.goal(name)
    law, rows, steps, closest, success = FeedbackExpert(env, goal), [], 0, np.inf, False
    while steps < limit and not success:
        request = env.observe() | {"prompt": words} | ({"reset": True} if steps == 0 else {})
        chunk = np.asarray(policy(request)["actions"])[:CHUNK]
        if labels:
            rows.append(maker.frame(words, law.holds_object()))
            rows[-1] |= {"actions": label(env, goal), "acts": np.bool_(True)}
            if rng.random() < mix:
                chunk = rows[-1]["actions"]
        for action in chunk:
            env.advance(np.clip(action, -1, 1))
            steps += 1
            closest = min(closest, float(np.linalg.norm(law.scene.site - law.scene.position(name))))
            if success := law.scene.holds(goal):
                break
    return Played(stack(rows) if labels else None, success, steps, closest)


def _shuffled(maker: SceneMaker, seed: int, rng: np.random.Generator, usual: float, often: Mapping[str, float]) -> str:
    """Starts an episode in a new scene; returns the instruction."""
    if rng.random() < usual:
        maker.placements.shuffle(seed, permute=False)
        return maker.instruction(maker.placements.goal[1])
    maker.placements.shuffle(seed)
    said = list(maker.placements.named)
    share = np.array([often.get(words, 1.0) for words in said])
    return said[rng.choice(len(said), p=share / share.sum())]
