"""One episode of a policy in LIBERO, recorded: openpi's client as a function.

with LiberoEnv(load_task("libero_spatial", 0)) as env:
    episode = rollout(env, session.infer, init_state=0)        # or a websocket client's `infer`
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from safe_pruner_jax.evaluation.libero import LiberoEnv

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """One question to the policy: after how many steps, seconds to the reply, what the reply said beside actions."""

    step: int
    seconds: float
    pruning: Any
    timing: Mapping[str, Any]


@dataclass(frozen=True)
class Episode:
    """The record of one rollout; `error` is "Type: message" exactly when the outcome is "error"."""

    suite: str
    task: int
    init_state: int
    outcome: Literal["success", "failure", "error"]
    steps: int
    seconds: float
    calls: tuple[Call, ...]
    error: str | None = None


def rollout(
    env: LiberoEnv,
    policy: Callable[[dict[str, Any]], Mapping[str, Any]],
    *,
    init_state: int,
    replan: int = 5,
    max_steps: int | None = None,
    on_step: Callable[[LiberoEnv], None] | None = None,
) -> Episode:
    """Plays one episode: asks the policy, executes the first `replan` actions of its chunk, asks again.

    Args:
      env: is left open, where the episode ended.
      policy: request to reply; "actions" [AH, 7], AH ≥ replan; "pruning" and timings are recorded where present.
      init_state: index of a fixed initial state.
      replan: actions executed per call (openpi's client: 5).
      max_steps: at most env.max_steps, which is the default.
      on_step: called with the environment after every executed action, e.g. to collect `env.render()`.

    Returns:
      The record. An exception of policy or simulator is the outcome "error", and is logged with its traceback.

    Raises:
      ValueError: for replan < 1, max_steps out of range, or an initial state that does not exist.
    """
    limit = env.max_steps if max_steps is None else max_steps
    if replan < 1 or not 0 < limit <= env.max_steps:
        raise ValueError(f"expected replan ≥ 1 and 1 ≤ max_steps ≤ {env.max_steps}, got {replan} and {limit}")
    request, start = env.reset(init_state), time.perf_counter()
    outcome, error, steps, calls = "failure", None, 0, []
    try:
        while outcome == "failure" and steps < limit:
            request, asked = request or env.observe(), time.perf_counter()
            reply, request = policy(request), None
            timing = {key: reply[key] for key in ("policy_timing", "server_timing") if key in reply}
            calls.append(Call(steps, time.perf_counter() - asked, reply.get("pruning"), timing))
            actions = np.asarray(reply["actions"])
            if actions.ndim != 2 or len(actions) < replan or actions.shape[1] != 7:
                raise ValueError(f"expected actions [≥ {replan}, 7], got {list(actions.shape)}")
            for action in actions[: min(replan, limit - steps)]:
                result, steps = env.step(action), steps + 1
                if on_step is not None:
                    on_step(env)
                if result.success:
                    outcome = "success"
                    break
    except Exception as caught:  # the third outcome beside success and failure: recorded, so the table can count it
        logger.exception("%s task %d, initial state %d", env.task.suite, env.task.index, init_state)
        outcome, error = "error", f"{type(caught).__name__}: {caught}"
    seconds = time.perf_counter() - start
    return Episode(env.task.suite, env.task.index, init_state, outcome, steps, seconds, tuple(calls), error)
