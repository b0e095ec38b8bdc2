"""What a simulator knows about a picture: the class of every pixel, where things are, how to take them.

The same knowledge that detection, segmentation and pointing data give a vision-language model, for nothing.
"""

import functools
from collections.abc import Mapping

import numpy as np

from safe_pruner_jax.libero.cameras import CAMERAS
from safe_pruner_jax.libero.env import LiberoEnv, load_task, num_tasks
from safe_pruner_jax.libero.expert import Expert
from safe_pruner_jax.libero.simulator import simulator

CLASSES = ("background", "arm", "gripper")
"""The first classes of every suite; then its `kinds`, in their order."""


@functools.cache
def kinds(suite: str) -> tuple[str, ...]:
    """Categories of the movable objects in all scenes of a suite, sorted: ("alphabet_soup", "basket", …).

    Raises:
      ValueError: a scene has two objects of one kind, which labels by kind cannot tell apart.
    """
    parse, found = simulator().parse_problem, set()
    for index in range(num_tasks(suite)):
        objects = parse(str(load_task(suite, index).bddl))["objects"]
        if twins := next((names for names in objects.values() if len(names) > 1), None):
            got = f"{' and '.join(twins)} in {suite} task {index}"
            raise ValueError(f"suite: expected one object of a kind per scene, as in libero_object, got {got}")
        found |= set(objects)
    return tuple(sorted(found))


def kind(name: str) -> str:
    """Category of an object: "milk_1" → "milk"."""
    return name.rsplit("_", 1)[0]


class Labels:
    """Labels of one environment's present state.

    Args:
      env: any episode may be running.
      size: pixels per side of the segmentation.
    """

    def __init__(self, env: LiberoEnv, size: int):
        self._env, self._size = env, size
        self.kinds = kinds(env.task.suite)
        self._objects: Mapping = env.simulator.env.objects_dict
        model = env.simulator.sim.model._model
        names = [model.body(model.geom_bodyid[g]).name for g in range(model.ngeom)]
        self._class = np.array([self._class_of(name) for name in names], np.uint8)

    def _class_of(self, body: str) -> int:
        if body.startswith(("gripper0", "robot0_right_hand")):
            return CLASSES.index("gripper")
        if body.startswith("robot0"):
            return CLASSES.index("arm")
        owner = next((name for name in self._objects if body.startswith(name)), None)
        return 0 if owner is None else len(CLASSES) + self.kinds.index(kind(owner))

    def segmentation(self) -> np.ndarray:
        """Class of every pixel, uint8 [cameras, size, size], rotated as the policy's frames are."""
        return np.stack([self._env.segment(camera, self._class, self._size) for camera in CAMERAS.values()])

    def positions(self) -> np.ndarray:
        """Origins of one object per kind, float32 [kinds, 3] in metres; NaN where the scene has none."""
        inner = self._env.simulator.env
        result = np.full((len(self.kinds), 3), np.nan, np.float32)
        for name in self._objects:
            result[self.kinds.index(kind(name))] = inner.sim.data.body_xpos[inner.obj_body_id[name]]
        return result

    def hand(self, name: str) -> tuple[float, float]:
        """Direction in which the fingers open, radians in the table's plane, and how far they have to turn for grasping
        an object, radians in [-π/2, π/2]."""
        expert = Expert(self._env, goals=())
        return expert.scene.yaw, expert.scene.turn(expert.choose(name).yaw)
