"""Where things stand in a training scene: LIBERO's own draw, then objects change places and the arm moves.

    placements = Placements(env)
    placements.shuffle(seed)          a new episode: objects permuted and jittered, basket and arm moved
    placements.shuffle(seed, permute=False)    the same with every object near its usual place
    placements.teleport(generator, …)    a new picture without physics: hand anywhere, objects under it or in it
    placements.named                  what every instruction names in the scene

For suites whose objects stand apart on a table, as LIBERO-Object's do; `relations` has LIBERO-Spatial's. LIBERO's fixed
initial states are not among them: everything is drawn from a continuous distribution with centimetres of spread.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from safe_pruner_jax.libero.env import LiberoEnv
from safe_pruner_jax.libero.labels import kind, kinds, spoken

JITTER = 0.03
"""Standard deviation, metres, of a permuted object's place."""
USUAL_JITTER = 0.01
"""The same of an object near its usual place: what LIBERO's own draw leaves, and as much again."""
RECEPTACLE_JITTER = 0.015
"""The same of the basket, which keeps its place."""
APART = 0.085
"""Metres between the origins of two objects, at least."""
_MARGIN = 0.05  # metres by which the region of the fixed states is grown
_TRIES = 300

Draw = Callable[[np.random.Generator, np.ndarray], np.ndarray]
"""Where objects stand now, float64 [objects, 2] in metres → where they stand in a new scene."""


class Visited(NamedTuple):
    """A state that an episode came through, flattened, and the object in the hand then."""

    state: np.ndarray
    held: str | None


class Placements:
    """Draws scenes for one environment.

    Attributes:
      goal: the task's predicate, ("in", "milk_1", "basket_1_contain_region").
      receptacle: what things are put into or on.
      names: of the objects that may be fetched, in the simulator's order.
      instructions: what the suite's tasks say, for every object that a scene of it may have.
      scenes: pictures that are made of one settled scene.
      noise: of the hand on its way to where pictures are made.

    Args:
      env: any episode may be running.

    Raises:
      ValueError: the task is not to put one object somewhere.
    """

    scenes, noise = 60, 0.4

    def __init__(self, env: LiberoEnv):
        self._env = env
        model, objects = env.simulator.sim.model, env.simulator.env.objects_dict
        address = lambda name: model.get_joint_qpos_addr(objects[name].joints[0])[0]
        self._places = {name: 1 + address(name) for name in objects if objects[name].joints}
        self.goal = _goal(env)
        target = self.goal[2]
        self.receptacle = next((name for name in objects if target.startswith(name)), target)
        self.names = [name for name in self._places if name != self.receptacle]
        found = [k for k in kinds(env.task.suite) if k != kind(self.receptacle)]
        self.instructions: tuple[str, ...] = tuple(self._instruction(k) for k in found)
        robot = env.simulator.robots[0]
        self._arm = 1 + np.asarray(robot._ref_joint_pos_indexes)
        self._fingers = 1 + np.asarray(robot._ref_gripper_joint_pos_indexes)
        states = env.init_states[:, [[self._places[n], self._places[n] + 1] for n in self.names]]
        self._low, self._high = states.min((0, 1)) - _MARGIN, states.max((0, 1)) + _MARGIN
        self._positions = 1 + model.nq

    @property
    def named(self) -> Mapping[str, str]:
        """Instruction → the object that it names in the present scene; others are not said there."""
        return {self._instruction(kind(name)): name for name in self.names}

    def _instruction(self, kind_: str) -> str:
        """LIBERO-Object's for an object: "pick up the cream cheese and place it in the basket"."""
        return f"pick up the {spoken(kind_)} and place it in the {spoken(kind(self.receptacle))}"

    def shuffle(self, seed: int, *, permute: bool = True, arm: float = 0.02) -> None:
        """Starts an episode in which every object stands at another's place, more or less.

        Args:
          seed: of the whole scene, together with the task.
          permute: False leaves every object within a few centimetres of where LIBERO puts it.
          arm: standard deviation, rad, that the arm's joints get.
        """
        env = self._env
        rng = np.random.default_rng([seed, env.task.index])
        env.randomize(seed)
        state = env.simulator.get_sim_state().copy()
        self._mix(state, rng, _exchanged if permute else _near)
        state[self._arm] += rng.normal(0.0, arm, len(self._arm))
        state[self._positions :] = 0
        env.begin(state)

    def teleport(self, rng: np.random.Generator, base: np.ndarray, visited: Sequence[Visited]) -> str | None:
        """Puts everything somewhere else without stepping; returns the object in the hand, if one is there.

        A fifth of the scenes have an object between the fingers, and of the others half have one within 5 cm of the
        hand (in the table's plane).

        Args:
          rng: draws everything.
          base: a settled state of this environment, flattened.
          visited: whose arms the arm may have, more or less.
        """
        env, sim = self._env, self._env.simulator.sim
        state = base.copy()
        state[self._positions :] = 0
        self._mix(state, rng, _exchanged if rng.random() < 0.6 else self._anywhere)
        arm = visited[int(rng.integers(len(visited)))].state[self._arm]
        state[self._arm] = arm + rng.normal(0.0, 0.06, len(self._arm))
        half = rng.uniform(0.0, 0.04) if rng.random() < 0.4 else 0.0395
        state[self._fingers] = half, -half
        sim.set_state_from_flattened(state)
        sim.forward()
        site = np.array(sim.data.site_xpos[env.simulator.robots[0].eef_site_id])
        name = self.names[rng.integers(len(self.names))]
        place, held = self._places[name], None
        draw = rng.random()
        if draw < 0.2:
            held = name
            state[place : place + 3] = site + rng.normal(0.0, 0.006, 3) + np.array([0, 0, rng.uniform(-0.03, 0.0)])
            state[self._fingers] = 0.022, -0.022
        elif draw < 0.6:
            state[place : place + 2] = site[:2] + rng.normal(0.0, 0.025, 2)
        sim.set_state_from_flattened(state)
        sim.forward()
        env.look()
        return held

    def _mix(self, state: np.ndarray, rng: np.random.Generator, draw: Draw) -> None:
        """Moves objects and receptacle in a flattened state; objects stay `APART` where that can be had."""
        columns = np.array([[self._places[n], self._places[n] + 1] for n in self.names])
        now = new = state[columns]
        for _ in range(_TRIES):
            new = np.clip(draw(rng, now), self._low, self._high)
            gaps = np.linalg.norm(new[:, None] - new[None], axis=-1) + 9 * np.eye(len(new))
            if gaps.min() > APART:
                break
        state[columns] = new
        at = self._places[self.receptacle]
        state[at : at + 2] += rng.normal(0.0, RECEPTACLE_JITTER, 2)

    def _anywhere(self, rng: np.random.Generator, now: np.ndarray) -> np.ndarray:
        return rng.uniform(self._low, self._high, now.shape)


def _near(rng: np.random.Generator, now: np.ndarray) -> np.ndarray:
    return now + rng.normal(0.0, USUAL_JITTER, now.shape)


def _exchanged(rng: np.random.Generator, now: np.ndarray) -> np.ndarray:
    return now[rng.permutation(len(now))] + rng.normal(0.0, JITTER, now.shape)


def _goal(env: LiberoEnv) -> tuple[str, str, str]:
    """The predicate of a task; raises ValueError if the task is not to put one object somewhere."""
    first, *others = env.simulator.env.parsed_problem["goal_state"]
    if others or first[0] not in ("in", "on") or len(first) != 3:
        task = f"{env.task.suite} task {env.task.index}"
        got = ", ".join(" ".join(goal) for goal in (first, *others))
        raise ValueError(f"{task}: expected to put one object in or on something, got {got}; leave it out of --tasks")
    return tuple(first)
