"""The whole state of an environment, saved and restored: physics, controller, gripper, counters.

MuJoCo's own state is not enough: robosuite's controller keeps goals, and its gripper integrates its commands.
A restored environment repeats the same steps to 1e-3 of every coordinate (`tests/test_law.py`).
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from safe_pruner_jax.libero.env import LiberoEnv


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What `restore` puts back; opaque, and of no use in another environment."""

    physics: np.ndarray
    control: np.ndarray
    warm_start: np.ndarray
    gripper: np.ndarray
    controller: dict[str, Any]
    counters: dict[str, Any]
    episode: tuple[Any, ...]


_COUNTERS = ("cur_time", "timestep", "done")
_VALUES = (np.ndarray, float, int, bool, type(None))


def save(env: LiberoEnv) -> Snapshot:
    """The present state; what is derived from positions (contacts, sites) is brought up to date on the way."""
    inner = env.simulator.env
    inner.sim.forward()  # a step leaves them as they were before its last 2 ms
    robot, data = inner.robots[0], inner.sim.data
    controller = {k: copy.copy(v) for k, v in vars(robot.controller).items() if isinstance(v, _VALUES)}
    return Snapshot(
        physics=inner.sim.get_state().flatten().copy(),
        control=data.ctrl.copy(),
        warm_start=data.qacc_warmstart.copy(),
        gripper=np.array(robot.gripper.current_action),
        controller=controller,
        counters={name: getattr(inner, name) for name in _COUNTERS},
        episode=env.progress,
    )


def restore(env: LiberoEnv, snapshot: Snapshot) -> None:
    """Puts an environment back to where `save` found it."""
    inner = env.simulator.env
    robot, data = inner.robots[0], inner.sim.data
    inner.sim.set_state_from_flattened(snapshot.physics)
    data.ctrl[:], data.qacc_warmstart[:] = snapshot.control, snapshot.warm_start
    inner.sim.forward()
    robot.gripper.current_action = snapshot.gripper.copy()
    for name, value in snapshot.controller.items():
        setattr(robot.controller, name, copy.copy(value))
    for name, value in snapshot.counters.items():
        setattr(inner, name, value)
    env.progress = snapshot.episode
