"""An expert as a feedback law: its next action depends on the present state of the simulator and on nothing else.

    law = FeedbackExpert(env, ("in", "milk_1", "basket_1_contain_region"))
    action = law.act()                    the phase is recomputed at every call
    chunk = label(env, goal)              the next ten actions from here; the simulator is put back

`expert.Expert` is a script over waypoints and remembers where it is in it; asked anew at every call of a policy, it
starts over above the object and never lifts it. A law can be asked in any state, so demonstrations and relabels of a
policy's own states (DAgger, Ross et al. 2011) come from one expert.

Phases, first match: held (`_carry`): lower, over, lift; empty hand: close, descend, approach, rise.
"""

from collections.abc import Sequence

import numpy as np

from safe_pruner_jax.libero.env import LiberoEnv
from safe_pruner_jax.libero.expert import (
    CLOSED,
    OPEN,
    ORIENTATION_GAIN,
    ORIENTATION_LIMIT,
    POSITION_GAIN,
    Expert,
    Grasp,
)
from safe_pruner_jax.libero.snapshot import restore, save

CHUNK = 10
"""Actions of a label: what π0.5 on LIBERO predicts per call."""

# Metres and radians. An object is approached at `_ABOVE` over its top; within `_COLUMN` of its axis and `_ALIGNED`
# the hand goes down, at the grasp within `_REACHED` (sideways) and `_DEPTH` it closes.
_ABOVE, _COLUMN, _ALIGNED = 0.05, 0.02, 0.2
_REACHED, _DEPTH = 0.010, 0.012
_PADS, _UNDERSIDE = 0.008, 0.020
_OVERLAP = 0.008  # of pads and object, without which closing grips air
_CLEARANCE = 0.04
_OVER, _OVER_FLAT = 0.025, 0.015  # of the basket's middle, of a plate's: near enough to go down
_FAST = 0.02  # m/s of a finger that still closes
_STILL = 0.01  # m/s of a hand that gets no nearer
_AJAR = 0.0385  # half opening of a hand that nothing has begun to close
_EMPTY = 0.002  # half opening of a hand that closed on nothing
_INSIDE, _ON = 0.07, 0.028  # of the basket's middle, of a plate's: it counts there when let go


class FeedbackExpert:
    """Fetches one object and puts it where the goal says.

    Attributes: `phase`, the name of the one that the last action belongs to; `scene`, the privileged state.

    Args:
      env: with a running episode; read, never stepped.
      goal: ("in" or "on", object, target), as in LIBERO's predicates.

    Raises:
      expert.Unsupported: for a goal of another kind.
    """

    def __init__(self, env: LiberoEnv, goal: Sequence[str]):
        self._script = Expert(env, goals=(tuple(goal),))
        self.scene, self._robot = self._script.scene, env.simulator.robots[0]
        _, self._thing, self._target = goal
        self.phase = "start"

    def grasp(self) -> Grasp:
        """Where the hand would close on the object, from the present state."""
        return self._script.choose(self._thing)

    def holds_object(self) -> bool:
        """Whether the object is in the closed hand, and touches nothing else."""
        touched = self.scene.in_hand(self._thing)
        return touched and self._fingers()[0] < _AJAR and self.scene.lifted(self._thing)

    def act(self) -> np.ndarray:
        """The next action, float64 [7]: translation 3, rotation 3 (both in [-1, 1]), gripper (1 closes)."""
        scene = self.scene
        if self.holds_object():
            return self._carry()
        half, speed = self._fingers()
        near = _INSIDE if scene.hollow(self._target) else _ON
        if np.linalg.norm((scene.position(self._thing) - scene.place(self._target))[:2]) < near:
            return self._leave(half)
        return self._fetch(half, speed)

    def _leave(self, half: float) -> np.ndarray:
        """The object stands where it should: let go, then go up."""
        away = half > _AJAR
        site = self.scene.site + np.array([0, 0, 0.06 if away else 0.0])
        return self._towards("retreat" if away else "open", site, self.scene.yaw, OPEN)

    def _fetch(self, half: float, speed: float) -> np.ndarray:
        scene, grasp = self.scene, self.grasp()
        at = scene.position(self._thing) + grasp.offset
        above = scene.boxes(self._thing).top + _ABOVE + _PADS
        away, depth = np.linalg.norm((scene.site - at)[:2]), abs(scene.site[2] - at[2])
        aligned = abs(scene.turn(grasp.yaw)) < _ALIGNED
        beside = depth < scene.boxes(self._thing).top - at[2] + _PADS - _OVERLAP  # pads are, also of a flat object
        if beside and _EMPTY < half < _AJAR and away < 0.03 and depth < 0.03:  # it has begun to close here
            return self._grip(speed < _FAST and scene.in_hand(self._thing), grasp.yaw)
        there = away < _REACHED and depth < _DEPTH
        stuck = away < _COLUMN and depth < 2 * _DEPTH and self._speed() < _STILL  # far out the arm stops short
        if beside and (there or stuck) and aligned and half >= _AJAR:
            return self._grip(False, grasp.yaw)
        if away < _COLUMN and aligned:
            return self._towards("descend", at, grasp.yaw, OPEN)
        cruise = max(above, scene.highest_between(scene.site[:2], at[:2], 0.11, self._thing) + _PADS + _CLEARANCE)
        if away > 0.05 and scene.site[2] < cruise - 0.03:
            return self._towards("rise", np.array([*scene.site[:2], cruise]), grasp.yaw, OPEN)
        return self._towards("approach", np.array([*at[:2], cruise if away > 0.05 else above]), grasp.yaw, OPEN)

    def _grip(self, firm: bool, yaw: float) -> np.ndarray:
        """The object is between the fingers: close them, and lift when it is firmly held."""
        site = self.scene.site + np.array([0, 0, 0.06 if firm else 0.0])
        return self._towards("lift" if firm else "close", site, self.scene.yaw if firm else yaw, CLOSED)

    def _carry(self) -> np.ndarray:
        scene = self.scene
        depth = scene.site[2] - scene.boxes(self._thing).bottom
        goal = scene.place(self._target)
        over = goal[:2] + (scene.site - scene.position(self._thing))[:2]
        away = np.linalg.norm(scene.site[:2] - over)
        walls = scene.around(self._target).top - _UNDERSIDE + 0.015 if scene.hollow(self._target) else -np.inf
        low = max(goal[2] + depth + 0.004, walls)
        if away < (_OVER if scene.hollow(self._target) else _OVER_FLAT):
            if scene.site[2] < low + 0.012:
                return self._towards("open", scene.site, scene.yaw, OPEN)
            return self._towards("lower", np.array([*over, low]), scene.yaw, CLOSED)
        obstacle = scene.highest_between(scene.site[:2], over, 0.11, self._thing)
        cruise = max(obstacle, goal[2]) + max(depth, _PADS) + _CLEARANCE
        if scene.site[2] < cruise - 0.03:
            return self._towards("lift", np.array([*scene.site[:2], cruise]), scene.yaw, CLOSED)
        return self._towards("over", np.array([*over, cruise]), scene.yaw, CLOSED)

    def _towards(self, phase: str, position: np.ndarray, yaw: float, gripper: float) -> np.ndarray:
        self.phase = phase
        move = np.clip(POSITION_GAIN * (position - self.scene.site), -1, 1)
        turn = np.clip(ORIENTATION_GAIN * self.scene.rotation_to(yaw), -ORIENTATION_LIMIT, ORIENTATION_LIMIT)
        return np.array([*move, *turn, gripper])

    def _speed(self) -> float:
        """Of the grip site, m/s."""
        site = self._robot.gripper.important_sites["grip_site"]
        return float(np.linalg.norm(self._robot.sim.data.get_site_xvelp(site)))

    def _fingers(self) -> tuple[float, float]:
        """Half opening (m) and speed (m/s) of the fingers."""
        data, robot = self._robot.sim.data, self._robot
        half = float(np.abs(data.qpos[robot._ref_gripper_joint_pos_indexes]).mean())
        return half, float(np.abs(data.qvel[robot._ref_gripper_joint_vel_indexes]).max())


def label(env: LiberoEnv, goal: Sequence[str], steps: int = CHUNK) -> np.ndarray:
    """What the expert would do for the next steps, without rendering; the simulator is as it was afterwards.

    Args:
      env: with a running episode.
      goal: as in `FeedbackExpert`.
      steps: actions wanted; the last one repeats where the episode is solved earlier.

    Returns:
      float32 [steps, 7].
    """
    before = save(env)
    law, actions = FeedbackExpert(env, goal), []
    for _ in range(steps):
        actions.append(law.act())
        env.advance(np.clip(actions[-1], -1, 1))
        if law.scene.holds(goal):
            break
    restore(env, before)
    actions += [actions[-1]] * (steps - len(actions))
    return np.asarray(actions, np.float32)
