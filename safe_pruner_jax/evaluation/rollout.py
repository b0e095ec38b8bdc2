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

from safe_pruner_jax.client.real_time import Asynchronous, jumps
from safe_pruner_jax.libero.env import LiberoEnv

logger = logging.getLogger(__name__)

ARM = 6
"""Leading values of a LIBERO action that move the arm; the gripper's is a switch."""


@dataclass(frozen=True)
class Call:
    """One question to the policy: after how many steps, seconds to the reply, what the reply said beside actions."""

    step: int
    seconds: float
    pruning: Any
    timing: Mapping[str, Any]


@dataclass(frozen=True)
class Episode:
    """The record of one rollout; `error` is "Type: message" exactly when the outcome is "error".

    `jump` is how far the arm's actions jump at the borders of chunks, see `asynchronous.jumps`.
    """

    suite: str
    task: int
    init_state: int
    outcome: Literal["success", "failure", "error"]
    steps: int
    seconds: float
    calls: tuple[Call, ...]
    error: str | None = None
    jump: Mapping[str, float] | None = None


def rollout(
    env: LiberoEnv,
    policy: Callable[[dict[str, Any]], Mapping[str, Any]],
    *,
    init_state: int,
    replan: int = 5,
    delay: int = 0,
    rtc: bool = False,
    max_steps: int | None = None,
    on_step: Callable[[LiberoEnv], None] | None = None,
) -> Episode:
    """Plays one episode: asks the policy, executes the first `replan` actions of its chunk, asks again.

    With a delay the robot goes on with its old chunk for so many steps after each question, while the simulator and
    the policy run at the same time.

    Args:
      env: is left open, where the episode ended.
      policy: request to reply; "actions" [AH, 7], AH ≥ max(replan, delay) + delay; "pruning" and timings are recorded
        where present. With a delay it is called in another thread, one call at a time.
      init_state: index of a fixed initial state.
      replan: actions executed per call (openpi's client: 5).
      delay: control steps from an observation until its actions are used.
      rtc: ask for chunks that continue the last one (`rtc`).
      max_steps: at most env.max_steps, which is the default.
      on_step: called with the environment after every executed action, e.g. to collect `env.render()`.

    Returns:
      The record. An exception of policy or simulator is the outcome "error", and is logged with its traceback.

    Raises:
      ValueError: for replan < 1, delay < 0, max_steps out of range, or an initial state that does not exist.
    """
    limit = env.max_steps if max_steps is None else max_steps
    if replan < 1 or delay < 0 or not 0 < limit <= env.max_steps:
        raise ValueError(
            f"expected replan ≥ 1, delay ≥ 0 and 1 ≤ max_steps ≤ {env.max_steps}, got {replan}, {delay} and {limit}"
        )
    first, start = [env.reset(init_state)], time.perf_counter()
    outcome, error, calls, executed, observed = "failure", None, [], [], []
    least = max(replan, delay) + delay

    def observe() -> dict[str, Any]:
        observed.append(len(executed))
        return first.pop() if first else env.observe()

    def ask(request: dict[str, Any]) -> Mapping[str, Any]:
        call_start = time.perf_counter()
        reply = policy(request)
        timing = {key: reply[key] for key in ("policy_timing", "server_timing") if key in reply}
        calls.append(Call(observed[-1], time.perf_counter() - call_start, reply.get("pruning"), timing))
        shape = np.shape(reply["actions"])
        if len(shape) != 2 or shape[0] < least or shape[1] != 7:
            raise ValueError(f"expected actions [≥ {least}, 7], got {list(shape)}")
        return reply

    robot = Asynchronous(ask, execute=replan, delay=delay, rtc=rtc)
    try:
        with robot:
            while outcome == "failure" and len(executed) < limit:
                action = robot.act(observe)
                result = env.step(action)
                executed.append(action)
                if on_step is not None:
                    on_step(env)
                if result.success:
                    outcome = "success"
    except Exception as caught:  # the third outcome beside success and failure: recorded, so the table can count it
        logger.exception("%s task %d, initial state %d", env.task.suite, env.task.index, init_state)
        outcome, error = "error", f"{type(caught).__name__}: {caught}"
    seconds = time.perf_counter() - start
    jump = jumps([action[:ARM] for action in executed], robot.borders)
    played = {"steps": len(executed), "seconds": seconds, "calls": tuple(calls), "error": error, "jump": jump}
    return Episode(env.task.suite, env.task.index, init_state, outcome, **played)
