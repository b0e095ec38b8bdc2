"""What a simulator knows about a picture: the class of every pixel, where things are, how to take them.

The same knowledge that detection, segmentation and pointing data give a vision-language model, for nothing.
"""

import functools
import re
from collections.abc import Mapping

import numpy as np

from safe_pruner_jax.libero.cameras import CAMERAS
from safe_pruner_jax.libero.env import LiberoEnv, load_task, num_tasks
from safe_pruner_jax.libero.expert import Expert
from safe_pruner_jax.libero.simulator import simulator

CLASSES = ("background", "arm", "gripper")
"""The first classes of every suite; then its `kinds`, in their order."""


STAND = (-0.6, 0.0, 0.0)
"""Where LIBERO-Object's robot stands, metres. Places are told as if every suite's stood there: on a table or on the
floor, what is in reach of the hand is at the same place."""

_SPOKEN = {
    "akita_black_bowl": "black bowl",
    "cookies": "cookie box",
    "flat_stove": "stove",
    "glazed_rim_porcelain_ramekin": "ramekin",
}
"""What instructions call a kind that they do not call by its name."""


@functools.cache
def kinds(suite: str) -> tuple[str, ...]:
    """Kinds of all things that stand in a suite's scenes, sorted: ("alphabet_soup", "basket", …)."""
    found = set()
    for index in range(num_tasks(suite)):
        problem = problem_of(suite, index)
        names = [name for group in ("objects", "fixtures") for names in problem[group].values() for name in names]
        found |= {kind(name) for name in names if re.search(r"_\d+$", name)}  # others are what everything stands on
    return tuple(sorted(found))


def twins(suite: str) -> bool:
    """Whether there are two of a kind in the scenes of a suite."""
    return any(re.search(r"_\d+$", kind) for kind in kinds(suite))


def problem_of(suite: str, task: int) -> dict:
    """What a task's scene file says, as LIBERO reads it: "objects", "initial_state", "goal_state" and more."""
    return simulator().parse_problem(str(load_task(suite, task).bddl))


def kind(name: str) -> str:
    """What a thing is: "milk_1" → "milk". A second one of its kind is a kind of its own.

    >>> kind("akita_black_bowl_1"), kind("akita_black_bowl_2")
    ('akita_black_bowl', 'akita_black_bowl_2')
    """
    return name.removesuffix("_1")


def spoken(kind: str) -> str:
    """What instructions call a kind.

    >>> spoken("cream_cheese"), spoken("akita_black_bowl_2")
    ('cream cheese', 'black bowl')
    """
    category = re.sub(r"_\d+$", "", kind)
    return _SPOKEN.get(category, category.replace("_", " "))


class Labels:
    """Labels of one environment's present state.

    Args:
      env: any episode may be running.
      size: pixels per side of the segmentation.
    """

    def __init__(self, env: LiberoEnv, size: int):
        self._env, self._size = env, size
        self.kinds = kinds(env.task.suite)
        inner = env.simulator.env
        named = [name for name in (*inner.objects_dict, *inner.fixtures_dict) if kind(name) in self.kinds]
        self._things: Mapping[str, int] = {name: inner.obj_body_id[name] for name in named}
        model, robot = env.simulator.sim.model._model, env.simulator.robots[0]
        self._origin = env.simulator.sim.data.get_body_xpos(robot.robot_model.root_body) - np.array(STAND)
        names = [model.body(model.geom_bodyid[g]).name for g in range(model.ngeom)]
        self._class = np.array([self._class_of(name) for name in names], np.uint8)

    def _class_of(self, body: str) -> int:
        if body.startswith(("gripper0", "robot0_right_hand")):
            return CLASSES.index("gripper")
        if body.startswith("robot0"):
            return CLASSES.index("arm")
        owner = next((name for name in self._things if body.startswith(name)), None)
        return 0 if owner is None else len(CLASSES) + self.kinds.index(kind(owner))

    def segmentation(self) -> np.ndarray:
        """Class of every pixel, uint8 [cameras, size, size], rotated as the policy's frames are."""
        return np.stack([self._env.segment(camera, self._class, self._size) for camera in CAMERAS.values()])

    def positions(self) -> np.ndarray:
        """Origins of one thing per kind, float32 [kinds, 3] in metres (see `STAND`); NaN where the scene has none."""
        places = self._env.simulator.sim.data.body_xpos
        result = np.full((len(self.kinds), 3), np.nan, np.float32)
        for name, body in self._things.items():
            result[self.kinds.index(kind(name))] = places[body] - self._origin
        return result

    def site(self) -> np.ndarray:
        """Where the hand is, between the finger pads: float32 [3] in metres, as `positions`."""
        place = self._env.simulator.sim.data.site_xpos[self._env.simulator.robots[0].eef_site_id]
        return np.asarray(place - self._origin, np.float32)

    def hand(self, name: str) -> tuple[float, float]:
        """Direction in which the fingers open, radians in the table's plane, and how far they have to turn for grasping
        an object, radians in [-π/2, π/2]."""
        expert = Expert(self._env, goals=())
        return expert.scene.yaw, expert.scene.turn(expert.choose(name).yaw)
