"""What a scripted expert may know and a policy may not: poses, collision geometry and goals, out of the simulator."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from safe_pruner_jax.libero.env import LiberoEnv

_SIGNS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float64)

_COMFORTABLE_REACH = 0.70  # metres from the base's axis
_LEAN, _MOST_LEAN = 3.0, 0.35  # radians per metre beyond it, and at most


@dataclass(frozen=True, eq=False)
class Boxes:
    """Oriented boxes around collision geometries, metres.

    Args:
      centre: float64 [n, 3].
      half: float64 [n, 3], half sizes.
      rotation: float64 [n, 3, 3], local to world.
    """

    centre: np.ndarray
    half: np.ndarray
    rotation: np.ndarray

    @property
    def corners(self) -> np.ndarray:
        """[n, 8, 3]."""
        return self.centre[:, None] + np.einsum("nij,nkj->nki", self.rotation, self.half[:, None] * _SIGNS)

    @property
    def top(self) -> float:
        """Height of the highest corner."""
        return float(self.corners[..., 2].max())

    @property
    def bottom(self) -> float:
        """Height of the lowest corner."""
        return float(self.corners[..., 2].min())

    def count(self, points: np.ndarray, margin: float = 0.004) -> int:
        """How many of the points [k, 3] lie inside a box grown by `margin` metres."""
        local = np.einsum("nji,knj->kni", self.rotation, points[:, None] - self.centre)
        return int((np.abs(local) <= self.half + margin).all(-1).any(-1).sum())


class Scene:
    """Reads one environment's present state; every property is evaluated anew."""

    def __init__(self, env: LiberoEnv):
        self._env: Any = env.simulator.env
        self._model, self._data = self._env.sim.model._model, self._env.sim.data._data
        self._base = np.array(self._data.xpos[self._model.body(self._env.robots[0].robot_model.root_body).id])
        self._geom_ids: dict[str, list[int]] = {}
        self.goals = [tuple(goal) for goal in self._env.parsed_problem["goal_state"]]

    @property
    def site(self) -> np.ndarray:
        """Position of the grip site between the finger pads: [3], metres."""
        return np.asarray(self._env.sim.data.site_xpos[self._env.robots[0].eef_site_id])

    @property
    def _axes(self) -> np.ndarray:
        return np.asarray(self._env.sim.data.site_xmat[self._env.robots[0].eef_site_id]).reshape(3, 3)

    @property
    def yaw(self) -> float:
        """Direction in which the fingers open, radians in the table's plane."""
        across = self._axes[:, 0]
        return float(np.arctan2(across[1], across[0]))

    def turn(self, yaw: float) -> float:
        """Signed angle to an opening direction, by the shorter way (a hand turned by 180° is the same), radians."""
        return float((yaw - self.yaw + np.pi / 2) % np.pi - np.pi / 2)

    def rotation_to(self, yaw: float | None) -> np.ndarray:
        """Rotation vector [3], radians, to a hand that points down and opens towards `yaw` (None: as it does).

        Far from the robot's base the hand leans outwards: pointing straight down, the elbow would be at its limit.
        """
        angle = self.yaw + (0.0 if yaw is None else self.turn(yaw))
        across, down = np.array([np.cos(angle), np.sin(angle), 0.0]), np.array([0.0, 0.0, -1.0])
        outwards = (self.site - self._base)[:2]
        reach = float(np.linalg.norm(outwards))
        axis = np.cross(down, [*outwards / reach, 0.0])
        lean = _rotation(axis * np.clip(_LEAN * (reach - _COMFORTABLE_REACH), 0.0, _MOST_LEAN))
        goal = lean @ np.stack([across, np.cross(down, across), down], axis=1)
        error = goal @ self._axes.T
        vector = np.array([error[2, 1] - error[1, 2], error[0, 2] - error[2, 0], error[1, 0] - error[0, 1]]) / 2
        sine, cosine = np.linalg.norm(vector), (np.trace(error) - 1) / 2
        return vector if sine < 1e-9 else vector / sine * np.arctan2(sine, cosine)

    def proprioception(self) -> dict[str, np.ndarray]:
        """What LIBERO's files hold beside the observation, each float64 [n]: the keys of `demonstrations.EXTRA`.

        Read now, at the end of a control step; the observation is a few milliseconds older.
        """
        robot, data = self._env.robots[0], self._env.sim.data
        fingers = [self._env.sim.model.get_joint_qpos_addr(joint) for joint in robot.gripper.joints]
        body = robot.robot_model.eef_name
        pose = (data.qpos[fingers], self.site, np.roll(data.get_body_xquat(body), -1))  # w first -> last
        return {
            "states": np.array(self._env.sim.get_state().flatten()),
            "robot_states": np.concatenate(pose),
            "joint_states": np.array(data.qpos[robot._ref_joint_pos_indexes]),
        }

    def movable(self, name: str) -> bool:
        """Whether this is an object that can be carried."""
        return name in self._env.objects_dict

    def solid(self, target: str) -> bool:
        """Whether a target is, or is part of, an object or fixture; regions of the table are not."""
        return self._env.get_object(self._owner(target)) is not None

    def position(self, name: str) -> np.ndarray:
        """Origin of an object: [3], metres; LIBERO's predicates compare origins."""
        return np.array(self._data.xpos[self._env.obj_body_id[name]])

    def holds(self, goal: Iterable[str]) -> bool:
        """Whether a goal predicate is true now."""
        return bool(self._env._eval_predicate(list(goal)))

    def boxes(self, *names: str) -> Boxes:
        """Collision geometry of objects and fixtures."""
        return self._boxes([geom for name in names for geom in self._geoms(name)])

    def _geoms(self, name: str) -> list[int]:
        if name not in self._geom_ids:
            self._geom_ids[name] = [self._model.geom(g).id for g in self._env.get_object(name).contact_geoms]
        return self._geom_ids[name]

    def obstacles(self, ignore: str) -> Boxes:
        """Collision geometry of every object and fixture but one."""
        names = (*self._env.objects_dict, *self._env.fixtures_dict)
        return self.boxes(*(name for name in names if name != ignore))

    def highest_between(self, a: np.ndarray, b: np.ndarray, width: float, ignore: str) -> float:
        """Top of the highest obstacle within `width` metres of the segment from a [2] to b [2]; -inf without any."""
        corners = self.obstacles(ignore).corners.reshape(-1, 3)
        along = b - a
        t = np.clip((corners[:, :2] - a) @ along / max(float(along @ along), 1e-9), 0, 1)
        near = np.linalg.norm(corners[:, :2] - (a + t[:, None] * along), axis=1) < width
        return float(corners[near, 2].max(initial=-np.inf))

    def in_hand(self, name: str) -> bool:
        """Whether the object touches the hand."""
        return bool(self._env.check_contact(self._env.robots[0].gripper, self._env.get_object(name)))

    def lifted(self, name: str) -> bool:
        """Whether the object touches nothing but the hand."""
        geoms = {self._model.geom(g).id for g in self._env.get_object(name).contact_geoms}
        gripper = {self._model.geom(g).id for g in self._env.robots[0].gripper.contact_geoms}
        pairs = ({int(c.geom1), int(c.geom2)} for c in self._data.contact[: self._data.ncon])
        return not any(len(pair & geoms) == 1 and not pair & gripper for pair in pairs)

    def touching(self, name: str, target: str) -> bool:
        """Whether an object touches a target, or what the target is part of."""
        return bool(self._env.check_contact(self._env.get_object(name), self._env.get_object(self._owner(target))))

    def around(self, target: str) -> Boxes:
        """Collision geometry of a target, or of what it is part of."""
        return self.boxes(self._owner(target))

    def hollow(self, target: str) -> bool:
        """Whether things are put into the target, between walls."""
        return target not in self._env.objects_dict and "contain" in target

    def place(self, target: str) -> np.ndarray:
        """Where the origin of an object should be (x, y), and the height of the surface there: [3], metres."""
        if self.movable(target):
            x, y, z = self.position(target)
        else:
            x, y, z = self._env.sim.data.get_site_xpos(target)
        boxes = self.around(target)
        under = (np.abs(boxes.centre[:, :2] - [x, y]) < 0.03).all(-1)
        surface = boxes.corners[under, :, 2].max() if under.any() else boxes.bottom
        if not self.movable(target) and not self.hollow(target):
            surface = max(z, surface)
        return np.array([x, y, surface])

    def _owner(self, target: str) -> str:
        return self._env.object_states_dict[target].parent_name if target in self._env.object_sites_dict else target

    def _boxes(self, geoms: list[int]) -> Boxes:
        rotation = np.asarray(self._data.geom_xmat[geoms]).reshape(-1, 3, 3)
        bounds = self._model.geom_aabb[geoms]
        centre = self._data.geom_xpos[geoms] + np.einsum("nij,nj->ni", rotation, bounds[:, :3])
        return Boxes(np.asarray(centre), np.asarray(bounds[:, 3:]), rotation)


def _rotation(vector: np.ndarray) -> np.ndarray:
    """Rotation matrix [3, 3] of a rotation vector [3] (Rodrigues)."""
    angle = np.linalg.norm(vector)
    if angle < 1e-9:
        return np.eye(3)
    x, y, z = vector / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
